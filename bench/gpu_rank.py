"""One loop of `bench.gpu` in a process of its own.

Argument: {kind, shape, is_compiled} as JSON. When it is warm it prints its facts as one line of JSON; then, for each
line with a number of steps that it reads, the seconds they took and the peak of memory; at the end of its input it
ends. All else that is printed goes to the standard error.

| kind     | the model computes with | the optimizer updates | gradients of micro-batches add up       |
|----------|-------------------------|-----------------------|-----------------------------------------|
| ours     | bf16                    | fp32 masters          | in fp32: the engine of a run, ZeRO-1    |
| masters  | bf16                    | fp32 masters          | in fp32, by a hook as each one is ready |
| autocast | fp32, cast by autocast  | the same              | in fp32, by autograd                    |
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TextIO

import torch
import torch.nn.functional as F

from bench.gpu import OURS, Shape
from megascale.config.schema import RunConfig
from megascale.data.batch import Batch
from megascale.model.context import build_context
from megascale.model.linear import Linear
from megascale.model.recompute import set_recompute
from megascale.model.sharding import is_decayed
from megascale.model.transformer import Transformer, build_model
from megascale.optim.groups import ParameterFacts, parameter_groups
from megascale.optim.optimizer import build_optimizer
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import build_mesh, pick_device, read_rank_info
from megascale.train.build import build_run_engine

WARM_UP_STEPS, NUM_BATCHES = 3, 4
"""Compilation and the allocator settle in the first steps; so many steps' batches are made, then used again."""

Step = Callable[[Sequence[Batch], int], float]
"""(micro-batches, number of the step) -> mean loss, after one optimizer step; waits for the device."""


def our_step(config: RunConfig) -> tuple[Step, torch.device]:
    """The step of a run, by its own engine."""
    mesh = build_mesh(Layout(), read_rank_info(dict(os.environ)), timeout_s=600)
    engine = build_run_engine(config, mesh)

    def step(batches: Sequence[Batch], number: int) -> float:
        return engine.train_step(
            batches, step=number, num_tokens=config.train.global_batch_tokens,
            learning_rate=config.optimizer.learning_rate,
        ).loss

    return step, mesh.device


def plain_step(config: RunConfig, kind: str) -> tuple[Step, torch.device]:
    """The step of a loop by hand over the same model."""
    device = pick_device(0)
    model = build_model(config.model, config.run.seed).to(device)
    use_plain_products(model)
    set_recompute(model, config.train.recompute)
    if kind == "masters":
        trained, update = keep_masters(model)
    else:
        trained, update = dict(model.named_parameters()), lambda: None
    facts = {name: ParameterFacts(is_decayed(name)) for name in trained}
    groups = parameter_groups(trained.items(), facts, config.optimizer)
    adamw = build_optimizer(groups, config.optimizer, split_parts=lambda name, tensor: [tensor], is_fp32=True)
    context = build_context(config.model, config.train.seq_len, device)

    def loss_of(tokens_BT: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        logits_NV = model(tokens_BT, context).flatten(0, 1).float()
        return F.cross_entropy(logits_NV, labels_BT.flatten())

    if config.train.compile:
        loss_of = torch.compile(loss_of, dynamic=False)

    def step(batches: Sequence[Batch], _: int) -> float:
        total = torch.zeros((), device=device)
        # All at once: a copy from memory that isn't page-locked waits for what the device still has to do.
        for batch in [batch.to(device) for batch in batches]:
            with torch.autocast(device.type, torch.bfloat16, enabled=kind == "autocast"):
                loss = loss_of(batch.tokens_BT, batch.labels_BT) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optimizer.clip_norm)
        adamw.step()
        update()
        adamw.zero_grad(set_to_none=kind == "autocast")
        return total.item()

    return step, device


def use_plain_products(model: Transformer) -> None:
    """Has linear layers call `F.linear` and nothing else; those with stacked weights have a function of their own,
    which autocast doesn't know."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.product = partial(plain_product, module)


def plain_product(linear: Linear, inputs: torch.Tensor, bias: torch.Tensor | None, *_, **__) -> torch.Tensor:
    """x W^T + b."""
    return F.linear(inputs, linear.weight.flatten(0, -2), bias)


def keep_masters(model: Transformer) -> tuple[dict[str, torch.Tensor], Callable[[], None]]:
    """Makes the model bf16, with fp32 masters whose gradients are sums of the model's.

    Returns:
        The masters by name, and what copies them back to the model.
    """
    masters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    model.bfloat16()
    parameters = list(model.parameters())
    for parameter, master in zip(parameters, masters.values(), strict=True):
        master.grad = torch.zeros_like(master)

        def add(parameter: torch.Tensor, master: torch.Tensor = master) -> None:
            master.grad += parameter.grad
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(add)

    @torch.no_grad()
    def update() -> None:
        torch._foreach_copy_(parameters, list(masters.values()))

    return masters, update


def random_batches(config: RunConfig, accumulation: int, number: int) -> list[Batch]:
    """Random rows, the same for every loop."""
    generator, train = torch.Generator().manual_seed(number), config.train
    shape = (train.micro_batch_size, train.seq_len + 1)
    rows = torch.arange(train.micro_batch_size)
    documents_BT = torch.zeros(train.micro_batch_size, train.seq_len, dtype=torch.int32)
    drawn = [torch.randint(0, config.model.vocab_size, shape, generator=generator) for _ in range(accumulation)]
    return [Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents_BT, rows) for tokens in drawn]


def serve(shape: Shape, kind: str, is_compiled: bool, output: TextIO) -> None:
    """Warms up, tells so, and takes the steps that are asked for."""
    config = shape.config(is_compiled=is_compiled)
    step, device = our_step(config) if kind == OURS else plain_step(config, kind)
    steps = [random_batches(config, shape.accumulation, number) for number in range(NUM_BATCHES)]
    is_gpu, number = device.type == "cuda", 0

    def take(num_steps: int) -> dict:
        nonlocal number
        losses, started_s = [], time.perf_counter()
        for _ in range(num_steps):
            losses.append(step(steps[number % NUM_BATCHES], number))
            number += 1
        if is_gpu:
            torch.cuda.synchronize()
        return {
            "seconds": time.perf_counter() - started_s, "losses": losses,
            "peak_bytes": torch.cuda.max_memory_allocated() if is_gpu else 0,
        }

    losses = take(WARM_UP_STEPS)["losses"]
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    tell(output, {**take(1), "losses": losses, **describe_device(device)})
    for line in sys.stdin:
        tell(output, take(int(line)))


def describe_device(device: torch.device) -> dict:
    """Name and bytes of the device, and both with the version of CUDA as a line for people."""
    if device.type != "cuda":
        return {"device": "cpu", "device_bytes": 0, "machine": "CPU: tokens/s say nothing about a GPU"}
    properties = torch.cuda.get_device_properties(device)
    machine = (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count}"
        f" multiprocessors, capability {properties.major}.{properties.minor}; CUDA {torch.version.cuda},"
        f" cuDNN {torch.backends.cudnn.version()}"
    )
    return {"device": properties.name, "device_bytes": properties.total_memory, "machine": machine}


def tell(output: TextIO, values: dict) -> None:
    """Prints a line of JSON."""
    print(json.dumps(values), file=output, flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to the standard output too
    try:
        serve(Shape(**options["shape"]), options["kind"], options["is_compiled"], output)
    except torch.OutOfMemoryError as error:
        tell(output, {"out_of_memory": str(error).split(". ")[0]})


if __name__ == "__main__":
    main()
