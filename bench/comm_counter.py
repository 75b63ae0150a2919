"""Counts the bytes that this rank sends in collectives, by process group and kind.

Every collective ends in an operator of torch's `c10d` or `_c10d_functional` namespace: those of `torch.distributed`,
of DeepSpeed, of the pipeline schedules and our own. Here they are seen on their way, from Python or from autograd.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SILENT = {"wait_tensor", "recv_", "recv_any_source_", "barrier"}
"""Operators that send nothing worth counting."""

SENT_OF = {
    "all_reduce": lambda size, ranks: 2 * size * (ranks - 1) / ranks,
    "all_gather": lambda size, ranks: size * (ranks - 1) / ranks,
    "reduce_scatter": lambda size, ranks: size * (ranks - 1) / ranks,
    "all_to_all": lambda size, ranks: size * (ranks - 1) / ranks,
    "broadcast": lambda size, ranks: size * (ranks - 1) / ranks,
    "send": lambda size, ranks: size,
}
"""Bytes sent by each of some ranks for the larger side of a collective: what ring algorithms need, which is the least
(Patarasuk and Yuan 2009). A broadcast counts as its mean over the ranks."""


def size_of(tensors) -> int:
    """Bytes of a tensor, or of lists of tensors."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(size_of(each) for each in tensors)


LARGER_SIDE: dict[str, tuple[str, Callable[[list, int], int]]] = {
    "c10d.allreduce_": ("all_reduce", lambda args, n: size_of(args[0])),
    "c10d.allreduce_coalesced_": ("all_reduce", lambda args, n: size_of(args[0])),
    "c10d.allgather_": ("all_gather", lambda args, n: size_of(args[1]) * n),
    "c10d._allgather_base_": ("all_gather", lambda args, n: size_of(args[0])),
    "c10d.allgather_into_tensor_coalesced_": ("all_gather", lambda args, n: size_of(args[0])),
    "c10d.reduce_scatter_": ("reduce_scatter", lambda args, n: size_of(args[1])),
    "c10d._reduce_scatter_base_": ("reduce_scatter", lambda args, n: size_of(args[1])),
    "c10d.reduce_scatter_tensor_coalesced_": ("reduce_scatter", lambda args, n: size_of(args[1])),
    "c10d.alltoall_": ("all_to_all", lambda args, n: size_of(args[1])),
    "c10d.alltoall_base_": ("all_to_all", lambda args, n: size_of(args[1])),
    "c10d.broadcast_": ("broadcast", lambda args, n: size_of(args[0])),
    "c10d.send": ("send", lambda args, n: size_of(args[0])),
    "_c10d_functional.all_reduce": ("all_reduce", lambda args, n: size_of(args[0])),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", lambda args, n: size_of(args[0]) * n),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", lambda args, n: size_of(args[0])),
    "_c10d_functional.all_to_all_single": ("all_to_all", lambda args, n: size_of(args[0])),
    "_c10d_functional.broadcast": ("broadcast", lambda args, n: size_of(args[0])),
}
"""Operator -> (kind, bytes of its larger side from its arguments and the number of ranks)."""


class CommCounter(TorchDispatchMode):
    """While it is entered, adds up what is sent. Collectives of one rank count as nothing.

    Args:
        axis_of: name of a process group -> name of its axis; other groups keep their own names.

    Attributes:
        sent: (axis, kind) -> bytes that this rank sends.
        calls: (axis, kind) -> number of collectives.
    """

    def __init__(self, axis_of: Mapping[str, str]):
        super().__init__()
        self.axis_of = axis_of
        self.sent: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in SILENT:
            self.note(f"{func.namespace}.{func._opname}", args)
        return func(*args, **(kwargs or {}))

    def note(self, operator: str, args: Iterable) -> None:
        """Counts one collective.

        Raises:
            KeyError: an operator that nobody has given a cost.
        """
        kind, larger_side = LARGER_SIDE[operator]
        group = group_of(args)
        if group.size() == 1:
            return
        key = self.axis_of.get(group.group_name, f"group {group.group_name}"), kind
        self.sent[key] += SENT_OF[kind](larger_side(args, group.size()), group.size())
        self.calls[key] += 1


def group_of(args: Iterable) -> dist.ProcessGroup:
    """The process group among an operator's arguments: an object, or by name as the last string."""
    for each in args:
        if isinstance(each, torch.ScriptObject) and "ProcessGroup" in each._type().qualified_name():
            return dist.ProcessGroup.unbox(each)
    name = [each for each in args if isinstance(each, str)][-1]
    return dist.distributed_c10d._resolve_process_group(name)
