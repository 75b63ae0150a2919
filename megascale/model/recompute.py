"""Activation memory: what a block's forward pass keeps for backward, what is computed again, and where it is kept.

| mode      | kept per block                                   | computed again                                      |
|-----------|--------------------------------------------------|-----------------------------------------------------|
| none      | everything that backward reads                   | nothing                                             |
| selective | the input of each half, the product that widens  | norms, rotation, attention, activation, and what is |
|           | it (queries, keys and values; feed-forward), and | gathered before that product (with sequence         |
|           | what is gathered after that product              | parallelism); with dropout both products are kept   |
| full      | the block's input                                | the whole block, its communication included         |

`selective` may cover one half alone; the other then keeps everything. The product that ends a half is neither kept nor
computed again, because backward never reads it. Dropout comes after it, however, and its mask must be found again, so
with dropout that product and the sum of it over the ranks are kept too.

A block whose halves read the same input is one piece: `selective` keeps its input and both products that widen it.

Nothing depends on a random state (see `dropout.py`), so all modes give the same gradients to the bit.
Source: Chen et al. 2016; selective in the spirit of Korthikanti et al. 2022, section 5.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megascale.model.context import Context

RecomputeMode = Literal["none", "selective", "full"]
RecomputePart = Literal["attention", "feed_forward"]
ALL_PARTS: tuple[RecomputePart, ...] = ("attention", "feed_forward")
Half = Callable[[torch.Tensor, Context], torch.Tensor]

PRODUCTS = frozenset(
    {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default}
)
"""What a linear layer becomes: the operators whose results are dear to compute for the memory that they take."""
MIN_OFFLOAD_BYTES = 2**16
"""Smaller tensors stay: a copy of so little takes longer to start than to run."""


@dataclass(frozen=True)
class MemoryPlan:
    """How a block treats its activations.

    Attributes:
        mode: what is computed again, see the table above.
        parts: the halves of the block that `selective` covers.
        is_offloaded: whether kept activations wait for backward in the CPU's memory. What `selective` keeps of
            products stays on the device.
    """

    mode: RecomputeMode = "none"
    parts: tuple[RecomputePart, ...] = ALL_PARTS
    is_offloaded: bool = False


def set_recompute(
    model: nn.Module,
    mode: RecomputeMode,
    *,
    parts: Iterable[RecomputePart] = ALL_PARTS,
    every: int = 1,
    offload: bool = False,
) -> None:
    """Gives every block of the model its plan.

    Args:
        every: only each `every`-th block of the whole model, from block 0 on, computes anything again; the blocks are
            counted by their global names, so that a pipeline's split changes nothing.
        offload: whether all blocks keep their activations in the CPU's memory.
    """
    for name, module in model.named_modules():
        if isinstance(getattr(module, "memory", None), MemoryPlan):
            is_chosen = int(name.rpartition(".")[2]) % every == 0
            module.memory = MemoryPlan(mode if is_chosen else "none", tuple(parts), offload)


def run_block(plan: MemoryPlan, attend: Half, feed: Half, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
    """The block's two halves one after the other, so that their backward pass keeps what the plan keeps.

    Shape: (B, T, D) to (B, T, D).
    Cost: what `plan.mode` computes again; offloaded bytes cross the bus twice, forward beside the computation.
    """
    if not torch.is_grad_enabled():
        return feed(attend(hidden_BTD, context), context)
    with offloading(context, hidden_BTD.device) if plan.is_offloaded else nullcontext():
        if plan.mode == "full":
            return run_again(lambda hidden_BTD: feed(attend(hidden_BTD, context), context), hidden_BTD)
        for part, half in (("attention", attend), ("feed_forward", feed)):
            if plan.mode == "selective" and part in plan.parts:
                contexts = partial(selective_contexts, context.row_keys_B is not None)
                hidden_BTD = run_again(lambda hidden_BTD, half=half: half(hidden_BTD, context), hidden_BTD, contexts)
            else:
                hidden_BTD = half(hidden_BTD, context)
    return hidden_BTD


def run_joined(plan: MemoryPlan, whole: Half, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
    """The same for a block that is one piece; the config's check has made sure that `plan.parts` is both halves.

    Its products are, in their order: widening and closing of attention, widening and closing of the feed-forward layer.
    """
    if not torch.is_grad_enabled():
        return whole(hidden_BTD, context)
    with offloading(context, hidden_BTD.device) if plan.is_offloaded else nullcontext():
        if plan.mode == "none":
            return whole(hidden_BTD, context)
        contexts = partial(selective_contexts, context.row_keys_B is not None, (0, 2))
        again = contexts if plan.mode == "selective" else None
        return run_again(lambda hidden_BTD: whole(hidden_BTD, context), hidden_BTD, again)


def run_again(function: Callable, hidden_BTD: torch.Tensor, context_fn: Callable | None = None) -> torch.Tensor:
    """Calls the function now and once more in the backward pass."""
    options = {} if context_fn is None else {"context_fn": context_fn}
    return checkpoint(function, hidden_BTD, use_reentrant=False, preserve_rng_state=False, **options)


def selective_contexts(
    has_dropout: bool, widening: tuple[int, ...] = (0,)
) -> tuple[AbstractContextManager, AbstractContextManager]:
    """What `checkpoint` runs the forward pass and its repetition in, for one half of a block."""
    return create_selective_checkpoint_contexts(KeepPolicy(has_dropout, widening))


class KeepPolicy:
    """Decides for the operators of one half, in their order, which results are kept.

    Args:
        has_dropout: whether what comes behind the last product needs its result.
        widening: the products, counted from 0, whose results the backward pass reads.
    """

    def __init__(self, has_dropout: bool, widening: tuple[int, ...] = (0,)):
        self.has_dropout, self.widening = has_dropout, widening
        self.num_products = {False: 0, True: 0}

    def __call__(self, context, operator, *_args, **_kwargs) -> CheckpointPolicy:
        is_product = operator in PRODUCTS
        num_before = self.num_products[context.is_recompute]
        self.num_products[context.is_recompute] += is_product
        is_sent = operator.namespace == "_c10d_functional"
        is_read = (num_before if is_product else num_before - 1) in self.widening
        is_kept = (is_product or is_sent) and (is_read or (self.has_dropout and num_before > 0))
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def offloading(context: Context, device: torch.device) -> AbstractContextManager:
    """Within it, saved activations go to the CPU's memory. Parameters stay, and what all blocks share, the context."""
    shared = {each.data_ptr() for part in (context, context.mask) for each in part if isinstance(each, torch.Tensor)}
    mover = Mover(shared, device)
    return torch.autograd.graph.saved_tensors_hooks(mover.pack, mover.unpack)


class Mover:
    """Moves saved tensors of one block to pinned memory and back, forward on a stream of its own.

    On a CPU nothing moves, though the hooks run.

    Args:
        shared: addresses of tensors that stay where they are.
    """

    def __init__(self, shared: set[int], device: torch.device):
        self.shared = shared
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def pack(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """What autograd keeps in the tensor's place: a function that gives it back."""
        if self.stream is None or not self.moves(tensor):
            kept = tensor.detach()
            return lambda: kept
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            away = torch.empty_like(tensor, device="cpu", pin_memory=True)
            away.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not given to others before the copy is done
        copied, device = self.stream.record_event(), tensor.device

        def bring_back() -> torch.Tensor:
            copied.wait()
            return away.to(device, non_blocking=True)

        return bring_back

    def unpack(self, give_back: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The tensor, on its device."""
        return give_back()

    def moves(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is an activation, and large enough."""
        is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        return not is_parameter and tensor.data_ptr() not in self.shared and tensor.nbytes >= MIN_OFFLOAD_BYTES
