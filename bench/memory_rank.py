"""One rank of `bench.memory`: measures what it holds in each layout and compares it with the forms.

Argument: {"table": "state" or "kept", "cases": names, "prints": "table" or "json"} as JSON. Rank 0 prints rows of a
Markdown table; or every rank prints a list of {name, rank, paper, ours, measured}.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.figures import show_row
from bench.layout_cases import LayoutCase
from bench.layout_run import build_case_engine, random_batch, take_step
from bench.memory import KEPT_CASES, STATE_CASES
from bench.memory_forms import paper_kept, paper_state
from megascale.engine.base import Engine
from megascale.engine.precision import TORCH_DTYPE
from megascale.model.block_memory import block_places, kept_of_block
from megascale.model.memory import state_bytes
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train.build import build_axes, build_rank_model
from megascale.train.objective import run_objective

LINGER_S = 0.2
"""gloo's thread lets go of what it sent a little after the message is there."""
LARGE = 512
"""Bytes; smaller storages, such as counters, are left out."""


class LiveStorages(TorchDispatchMode):
    """While it is entered, notes every storage that an operator makes, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.noted: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.noted[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, others: Iterable[torch.Tensor]) -> int:
        """Bytes of the noted storages that are still there, those of some other tensors not counted."""
        known = {tensor.untyped_storage()._cdata for tensor in others}
        return sum(size for at, (storage, size) in self.noted.items() if at not in known and not storage.expired())


def all_storages() -> dict[int, int]:
    """Bytes of every storage of a tensor that Python can reach, by its identity."""
    gc.collect()
    tensors = (each for each in gc.get_objects() if isinstance(each, torch.Tensor))
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return {storage._cdata: storage.nbytes() for storage in storages if storage.nbytes() >= LARGE}


def measure_state(case: LayoutCase, mesh: Mesh) -> dict:
    """Storages that are there after a step's last backward pass and weren't before the engine was built.

    Then gradients are there in each ZeRO stage, and activations are gone.
    """
    before = all_storages()
    engine = build_case_engine(case, mesh)
    take_step(engine, case, 0)
    batches = [random_batch(case, i) for i in range(case.derived().num_micro_batches)]
    engine.runner.run(batches, 1, 1.0)
    batches.clear()
    sizes = [size for at, size in all_storages().items() if at not in before]
    buffers = fixed_buffers(engine, case)
    return {
        "paper": paper_state(case, mesh.rank).total, "ours": state_bytes(case.share(mesh.rank)).total,
        "measured": sum(size for size in sizes if size not in buffers),
    }


def fixed_buffers(engine: Engine, case: LayoutCase) -> set[int]:
    """Bytes of DeepSpeed's bucket of gradients on their way, which doesn't depend on the model."""
    if case.config().parallel.zero_stage < 2:
        return set()
    return {4 * engine.ds_engine.zero_reduce_bucket_size()}


def measure_kept(case: LayoutCase, mesh: Mesh) -> dict:
    """What the forward pass of a block keeps: its input counts, its output doesn't."""
    config, device = case.config(), mesh.device
    axes = build_axes(config, mesh)
    dtype = TORCH_DTYPE[case.dtype]
    model = build_rank_model(config, axes, mesh).to(device, dtype)
    share, number = case.share(mesh.rank), list(block_places(config.model))[case.block]
    block = model.layers[number]
    _, context, _ = run_objective(config, axes)(random_batch(case, 0).to(device), 0, None)
    positions = share.positions // (config.parallel.tp if config.parallel.is_sequence_parallel else 1)
    shape = config.train.micro_batch_size, positions, config.model.d_model
    kept = kept_on_gpu(block, shape, dtype, context) if device.type == "cuda" else kept_on_cpu(
        block, shape, dtype, context, [*model.parameters(), *model.buffers()])
    ours = kept_of_block(share, block_places(config.model)[number], is_fused=device.type == "cuda")
    return {"paper": paper_kept(case), "ours": ours, "measured": kept}


def kept_on_cpu(block: nn.Module, shape: tuple, dtype: torch.dtype, context, others: list[torch.Tensor]) -> int:
    """By the storages that are alive."""
    live, leaf = LiveStorages(), torch.randn(shape, dtype=dtype).requires_grad_()
    with live:
        output = block(leaf.clone(), context)
    time.sleep(LINGER_S)
    gc.collect()
    return live.alive([*others, leaf, output])


def kept_on_gpu(block: nn.Module, shape: tuple, dtype: torch.dtype, context) -> int:
    """By the allocator; a first run lets kernels make what they keep for good."""
    leaf = torch.randn(shape, dtype=dtype, device="cuda").requires_grad_()
    block(leaf.clone(), context).sum().backward()
    block.zero_grad(set_to_none=True)
    leaf.grad = None
    before = torch.cuda.memory_allocated()
    output = block(leaf.clone(), context)
    return torch.cuda.memory_allocated() - before - output.nbytes


def show(result: dict, table: str, case: LayoutCase) -> str:
    """A row of the table."""
    sizes = [f"{result[key]:,.0f}" for key in ("paper", "ours", "measured")]
    counted = [f"{case.share(0).parameters.total:,}"] if table == "state" else []
    return show_row((case.name, *counted, *sizes, f"{result['measured'] / result['ours']:.4f}"))


def main() -> None:
    options = json.loads(sys.argv[1])
    info = read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=120)
    torch.set_num_threads(1)
    measure, cases = {"state": (measure_state, STATE_CASES), "kept": (measure_kept, KEPT_CASES)}[options["table"]]
    results = []
    for case in (cases[name] for name in options["cases"]):
        mesh = lay_out_mesh(case.layout(), info.rank, device)
        results.append({"name": case.name, "rank": info.rank} | measure(case, mesh))
        if options["prints"] == "table" and mesh.rank == 0:
            print(show(results[-1], options["table"], case), flush=True)
    if options["prints"] == "json":
        print(json.dumps(results), flush=True)
    dist.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
