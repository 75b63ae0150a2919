"""Tokens/s, MFU and peak memory of a run on one GPU, beside a plain compiled PyTorch loop: `python -m bench.gpu`.

Both loops train equal models on equal rows, each in a process of its own, so that each has its own peak of memory. The
processes stay and take blocks of steps in turn, AB BA, so that whatever the GPU's clock does meets both; the figure is
the median of the paired ratios. Where the GPU has no room for two models, the processes are started in turn instead.
The loop that waits computes nothing. Peak memory is what tensors took at most in the steps after the warm-up.

The plain loop compiles the whole model with the loss, takes flash attention as SDPA picks it, bf16, fp32 masters,
gradients and moments, fused AdamW and clipping. `--against` says how it keeps its weights: see `gpu_rank.py`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch

from bench.figures import describe_machine, show_head, show_ratios, show_row
from launcher.local import rank_environment
from megascale.config.load import parse_config, read_yaml
from megascale.config.schema import RunConfig
from megascale.model.flops import num_parameters, train_flops_per_token
from megascale.observe.peaks import peak_bf16_flops
from megascale.observe.throughput import derive_mfu

OURS, PLAIN = "ours", ("masters", "autocast")
RECOMPUTE = ("none", "selective", "full")
MODELS = Path(__file__).parents[1] / "configs" / "model"
MIN_BLOCKS, BLOCK_S, ROUNDS_APART = 3, 2.0, 2
"""Pairs of blocks at least; seconds of a block of steps; how often each process is started when they take turns."""
LOSS_TOLERANCE = 5e-2
"""In nats, over the first steps: the loops must do the same job. bf16 rounds in other places in each."""
COLUMNS = ("shape", "parameters", "micro-batch x accumulation x seq_len", "recompute", "ours, tok/s", "ours, MFU",
           "ours, GiB", "plain, tok/s", "plain, MFU", "plain, GiB", "ours / plain, tok/s", "pairs", "processes",
           "anchor")


@dataclass(frozen=True)
class Shape:
    """A model and the batch of a step.

    Attributes:
        rows: of a micro-batch.
        anchor: what others reached on one H100 or H200, to be passed.
    """

    name: str
    model: dict[str, Any]
    seq_len: int
    rows: int
    accumulation: int
    recompute: str = "none"
    anchor: str = "-"

    @property
    def tokens_per_step(self) -> int:
        """Input tokens of one optimizer step."""
        return self.rows * self.accumulation * self.seq_len

    def config(self, *, is_compiled: bool) -> RunConfig:
        """The config of a run of this shape, for one rank."""
        never = {"interval_steps": 10**9}
        return parse_config({
            "run": {"name": self.name, "folder": "unused", "seed": 1},
            "model": self.model,
            "data": {"folder": "unused"},
            "train": {"seq_len": self.seq_len, "micro_batch_size": self.rows, "recompute": self.recompute,
                      "global_batch_tokens": self.tokens_per_step, "max_steps": 10**6, "compile": is_compiled},
            "optimizer": {"learning_rate": 3e-4, "schedule": "constant"},
            "evaluate": never,
            "checkpoint": never,
        }, source=self.name)


def published(name: str) -> dict[str, Any]:
    """The model that `configs/model` describes under this name."""
    return read_yaml(MODELS / f"{name}.yaml")["model"]


LLAMA_3B = {"num_layers": 28, "d_model": 3072, "num_heads": 24}
"""The shape of Llama 3.2 3B where it differs from 1B's: 3.2 B parameters."""
TINY = {"num_layers": 2, "d_model": 64, "num_heads": 2, "vocab_size": 1000, "max_seq_len": 64}


def list_shapes() -> list[Shape]:
    """What is measured, with the micro-batch that is tried first.

    Weights, gradients, masters and moments take 16 to 20 bytes a parameter, and without recompute a block keeps about
    32 D bytes a token (gpt2) or 12 D + 6 F + 20 kv-width bytes (llama). On 141 GB no shape needs recompute.

    | shape     | state, GB | a token, MB | micro-batch, why                                                          |
    |-----------|-----------|-------------|---------------------------------------------------------------------------|
    | 124M      | 2         | 0.3         | 32 rows, 10 GB: narrow layers need many rows to fill the GPU              |
    | 1.5B      | 31        | 2.5         | 8 rows, 20 GB: 8192 tokens fill it, and two such models fit               |
    | 1B        | 25        | 1.4         | 16384 tokens, 22 GB, and the plain loop's logits, 17 GB                   |
    | 3B        | 64        | 2.9         | 8192 tokens, 24 GB: more gains little, and the plain loop's logits grow   |

    Accumulation makes steps of 65 k to 524 k tokens, as in training: the optimizer's share is as small as there.
    """
    small, large, llama = published("gpt2-124m"), published("gpt2-1.5b"), published("llama-1b")
    return [
        Shape("gpt2-124m", small, 1024, 32, 16, anchor="468 k tok/s"),
        Shape("gpt2-1.5b", large, 1024, 8, 16, anchor="50 k tok/s, 52 % MFU"),
        Shape("llama-1b-2k", llama, 2048, 8, 8, anchor="46 % MFU"),
        Shape("llama-1b-8k", llama, 8192, 2, 8, anchor="46 % MFU"),
        Shape("llama-3b-2k", llama | LLAMA_3B, 2048, 4, 8),
        Shape("llama-3b-8k", llama | LLAMA_3B, 8192, 1, 8),
    ]


def tiny_shapes() -> list[Shape]:
    """Toys that show on a CPU that everything works."""
    families = {"gpt2": {}, "llama": {"num_kv_heads": 1}}
    return [
        Shape(f"tiny-{family}", {"family": family} | TINY | more, 64, 2, 2) for family, more in families.items()
    ]


class OutOfMemory(Exception):  # noqa: N818 - it is an answer, not a fault
    """The GPU has no room for this loop beside what else is on it."""


class Loop:
    """One of the loops, in a process of its own; a context manager that ends it.

    Attributes:
        facts: what it said when it was warm: losses of the first steps, seconds of one more, device and its bytes.
        peak_bytes: tensors' peak so far.
    """

    def __init__(self, kind: str, shape: Shape, is_compiled: bool):
        options = {"kind": kind, "shape": asdict(shape), "is_compiled": is_compiled}
        environment = rank_environment(0, 0, 1, "127.0.0.1", free_port(), torch.get_num_threads())
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu_rank", json.dumps(options)], env=os.environ | environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.peak_bytes = 0
        try:
            self.facts = self._answer()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def seconds(self, num_steps: int) -> float:
        """Time that so many steps take.

        Raises:
            OutOfMemory: there was no room for them.
        """
        self.process.stdin.write(f"{num_steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
        return answer["seconds"]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a loop ended with exit code {self.process.wait()}; its own message is above")
        answer = json.loads(line)
        if "out_of_memory" in answer:
            raise OutOfMemory(answer["out_of_memory"])
        return answer


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


Start = Callable[[str, Shape], Loop]
"""(kind of loop, shape) -> the loop, warm. Raises OutOfMemory."""


@dataclass
class Result:
    """What was measured.

    Attributes:
        seconds: of a step, block after block, of ours and of the plain loop.
        peak_bytes: of both.
    """

    shape: Shape
    seconds: tuple[list[float], list[float]]
    peak_bytes: tuple[int, int]
    device: str
    processes: str


def measure(shape: Shape, plain: str, seconds: float, start: Start, say: Callable[[str], object]) -> Result:
    """Measures a shape, smaller when the GPU has no room for it.

    Raises:
        OutOfMemory: not even the smallest fits.
    """
    while True:
        try:
            return measure_as_it_is(shape, plain, seconds, start)
        except OutOfMemory as error:
            less = smaller(shape)
            if less is None:
                raise
            say(f"{shape.name}: out of memory with micro-batches of {shape.rows} rows, recompute {shape.recompute}"
                f" ({error}); now {less.rows} x accumulation {less.accumulation}, recompute {less.recompute}")
            shape = less


def smaller(shape: Shape) -> Shape | None:
    """The same step with less memory: half the rows at a time, then more recompute; None when nothing is left."""
    if shape.rows > 1:
        return replace(shape, rows=shape.rows // 2, accumulation=shape.accumulation * 2)
    if shape.recompute != RECOMPUTE[-1]:
        return replace(shape, recompute=RECOMPUTE[RECOMPUTE.index(shape.recompute) + 1])
    return None


def measure_as_it_is(shape: Shape, plain: str, seconds: float, start: Start) -> Result:
    """Both loops side by side, or one after the other where two don't fit."""
    try:
        with start(OURS, shape) as ours:
            if not ours.facts["device_bytes"] or 2 * ours.facts["peak_bytes"] < ours.facts["device_bytes"]:
                with start(plain, shape) as other:
                    return take_turns(shape, ours, other, seconds)
    except OutOfMemory:
        pass  # of one beside the other; each alone may fit
    return start_in_turn(shape, plain, seconds, start)


def take_turns(shape: Shape, ours: Loop, other: Loop, seconds: float) -> Result:
    """A block of steps each, in turn, the other one first in every second pair."""
    check_losses(ours, other)
    step_s = max(ours.facts["seconds"], other.facts["seconds"])
    num_steps = max(1, round(min(BLOCK_S, seconds / MIN_BLOCKS) / step_s))
    found: dict[Loop, list[float]] = {ours: [], other: []}
    while len(found[other]) < MIN_BLOCKS or sum(found[other]) * num_steps < seconds:
        for loop in (ours, other) if len(found[other]) % 2 == 0 else (other, ours):
            found[loop].append(loop.seconds(num_steps) / num_steps)
    return Result(
        shape, (found[ours], found[other]), (ours.peak_bytes, other.peak_bytes), ours.facts["device"], "side by side"
    )


def start_in_turn(shape: Shape, plain: str, seconds: float, start: Start) -> Result:
    """Ours, the other, ours, the other: each started anew, so that only one is on the GPU at a time."""
    found, peaks, last = ([], []), [0, 0], [None, None]
    for _ in range(ROUNDS_APART):
        num_blocks = 0
        for which, kind in enumerate((OURS, plain)):
            with start(kind, shape) as loop:
                step_s = loop.facts["seconds"]
                num_steps = max(1, round(min(BLOCK_S, seconds / ROUNDS_APART / MIN_BLOCKS) / step_s))
                # As many blocks of the one as of the other, since they are paired.
                num_blocks = num_blocks or max(MIN_BLOCKS, round(seconds / ROUNDS_APART / (num_steps * step_s)))
                found[which].extend(loop.seconds(num_steps) / num_steps for _ in range(num_blocks))
                peaks[which], last[which] = max(peaks[which], loop.peak_bytes), loop
    check_losses(*last)
    return Result(shape, found, tuple(peaks), last[0].facts["device"], "in turn")


def check_losses(ours: Loop, other: Loop) -> None:
    """Stops the bench when the loops don't train alike: their times couldn't be compared."""
    pairs = list(zip(ours.facts["losses"], other.facts["losses"], strict=True))
    assert all(abs(a - b) <= LOSS_TOLERANCE for a, b in pairs), f"the loops differ, (ours, plain) of each step: {pairs}"


def show_result(result: Result) -> str:
    """One row of the table."""
    shape, config = result.shape, result.shape.config(is_compiled=False)
    flops, peak_flops = train_flops_per_token(config.model, shape.seq_len), peak_bf16_flops(result.device)
    columns = []
    for step_s, peak_bytes in zip(result.seconds, result.peak_bytes, strict=True):
        tokens_per_s = shape.tokens_per_step / median(step_s)
        mfu = derive_mfu(tokens_per_s, flops, peak_flops)
        columns += [f"{tokens_per_s:,.0f}", f"{mfu:.1%}" if mfu else "-",
                    f"{peak_bytes / 2**30:.1f}" if peak_bytes else "-"]
    ratios = show_ratios(other / ours for ours, other in zip(*result.seconds, strict=True))
    return show_row((
        shape.name, f"{num_parameters(config.model) / 1e6:,.1f} M",
        f"{shape.rows} x {shape.accumulation} x {shape.seq_len}", shape.recompute, *columns, ratios,
        len(result.seconds[0]), result.processes, shape.anchor,
    ))


def main() -> None:
    real, tiny = list_shapes(), tiny_shapes()
    known = {shape.name: shape for shape in (*real, *tiny)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=known, metavar="NAME",
                        help=f"some of {', '.join(known)}; all but the tiny ones by default")
    parser.add_argument("--seconds", type=float, default=30.0, help="time measured of each loop and shape")
    parser.add_argument("--against", choices=PLAIN, default=PLAIN[0], help="how the plain loop keeps its weights")
    parser.add_argument("--eager", action="store_true", help="neither loop is compiled")
    parser.add_argument("--tiny", action="store_true", help="the tiny ones, which run on a CPU too")
    options = parser.parse_args()
    chosen = [known[name] for name in options.shape] if options.shape else tiny if options.tiny else real
    if not all(shape in tiny for shape in chosen) and not torch.cuda.is_available():
        sys.exit("error: bench.gpu measures on a CUDA device, and torch sees none here; --tiny tries it on the CPU")
    print(describe_machine(["torch", "deepspeed"]))
    how = "eager" if options.eager else "compiled"
    print(f"bf16, both loops {how}, the plain one with {options.against}; {options.seconds:g} s per loop and shape;"
          " ratio: median (first to third quartile)\n")
    print(show_head(COLUMNS), flush=True)
    notes, devices = [], set()

    def start(kind: str, shape: Shape) -> Loop:
        loop = Loop(kind, shape, is_compiled=not options.eager)
        devices.add(loop.facts["machine"])
        return loop

    for shape in chosen:
        try:
            print(show_result(measure(shape, options.against, options.seconds, start, notes.append)), flush=True)
        except OutOfMemory as error:
            notes.append(f"{shape.name}: doesn't fit at all ({error})")
    print("\n" + "\n".join([*sorted(devices), *notes]))


if __name__ == "__main__":
    main()
