"""Progress for people: a live line on a terminal, one plain line per record anywhere else."""

import contextlib
import os
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megascale.observe.metrics import EvalRecord, Goodput, TrainRecord
from megascale.observe.sinks import Status


def format_duration(seconds: float) -> str:
    """Two leading units of a duration: `45s`, `3m12s`, `2h05m`, `3d04h`."""
    seconds = round(seconds)
    for unit_s, name, part_s, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= unit_s:
            return f"{seconds // unit_s}{name}{seconds % unit_s // part_s:02d}{part_name}"
    return f"{seconds}s"


def format_count(count: float) -> str:
    """Three significant digits: `950`, `12.3k`, `4.56M`."""
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{name}" if count < 999.5 * size else f"{count / size:.0f}{name}"
    return f"{count:.0f}"


def describe_train(record: TrainRecord) -> str:
    """The numbers of a step on one line."""
    parts = [
        f"loss {record.loss:.4f}",
        f"lr {record.learning_rate:.2e}",
        f"grad {record.grad_norm:.3f}",
        f"{format_count(record.tokens_per_s)} tok/s",
    ]
    if record.mfu_fraction is not None:
        parts.append(f"MFU {100 * record.mfu_fraction:.1f}%")
    if record.eta_s is not None:
        parts.append(f"ETA {format_duration(record.eta_s)}")
    if record.loss_scale != 1.0:
        parts.append(f"scale {record.loss_scale:g}")
    if record.is_skipped:
        parts.append("skipped")
    return "  ".join(parts)


def describe_eval(record: EvalRecord) -> str:
    """The numbers of an evaluation on one line."""
    parts, counted = [f"validation loss {record.loss:.4f}"], "labels"
    if record.perplexity is not None:
        parts, counted = [*parts, f"perplexity {record.perplexity:.2f}"], "tokens"
    if record.bits_per_byte is not None:
        parts.append(f"{record.bits_per_byte:.4f} bits/byte")
    if record.ema_loss is not None:
        parts.append(f"{record.ema_loss:.4f} averaged")
    parts.append(f"{format_count(record.num_tokens)} {counted} in {format_duration(record.eval_s)}")
    if record.corpora:
        losses = (f"{name} {corpus.loss:.4f}" for name, corpus in record.corpora.items())
        parts.append(f"({', '.join(losses)})")
    return "  ".join(parts)


def describe_goodput(goodput: Goodput) -> str:
    """Where the time went on one line: the share that trained, then what took the rest, most first."""
    rest = sorted(goodput.parts().items(), key=lambda part: -part[1])
    shares = [(name, 100 * spent_s / (goodput.wall_s or 1.0)) for name, spent_s in rest if name != "training"]
    others = ", ".join(f"{name} {share:.1f} %" for name, share in shares if share >= 0.05)
    whole = f"goodput {100 * goodput.goodput_fraction:.1f} % of {format_duration(goodput.wall_s)}"
    return f"{whole}: {others}" if others else whole


class _LastingConsole(Console):
    """A console whose broken pipe is an error to handle; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        """Called by rich while it handles the BrokenPipeError."""
        raise


def say(line: str) -> None:
    """Prints a line for people; a standard output that nobody reads any more stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        print(line, flush=True)


class ConsoleSink:
    """Writes progress to standard output; when its reader dies, what follows goes nowhere, without an error."""

    def __init__(self, max_steps: int, console: Console | None = None):
        self._max_steps = max_steps
        self._console = console or _LastingConsole(highlight=False)
        self._progress: Progress | None = None
        if self._console.is_terminal:
            # No refresh thread: it would meet a closed terminal where nobody can catch the error.
            self._progress = Progress(
                TextColumn("[bold]step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}", markup=False),
                console=self._console,
                auto_refresh=False,
            )
            self._task = self._progress.add_task("train", total=max_steps, numbers="")

    def log_train(self, record: TrainRecord) -> None:
        """Moves the bar, or prints a line."""
        if self._progress is None:
            self._write(f"step {record.step}/{self._max_steps}  {describe_train(record)}")
            return
        try:
            self._progress.start()
            self._progress.update(self._task, completed=record.step, numbers=describe_train(record), refresh=True)
        except (OSError, ValueError):
            self._give_up()

    def log_eval(self, record: EvalRecord) -> None:
        """Prints a line that stays, above the bar when there is one."""
        self._write(f"step {record.step}/{self._max_steps}  {describe_eval(record)}")

    def log_goodput(self, record: Goodput) -> None:
        """Nothing to do: the session's end says it."""

    def commit(self, step: int) -> None:
        """Nothing to do: the console has no memory."""

    def close(self, status: Status) -> None:
        """Leaves the last state of the bar on the screen."""
        try:
            if self._progress is not None:
                self._progress.stop()
        except (OSError, ValueError):
            self._give_up()

    def _write(self, line: str) -> None:
        try:
            self._console.print(line, markup=False, soft_wrap=True)
            self._console.file.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Points standard output at nothing, or the flush at exit would fail and change the exit code."""
        self._progress = None
        self._console = Console(file=open(os.devnull, "w"))  # noqa: SIM115
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
        except (OSError, ValueError):
            # Standard output is closed or no file at all: nothing will be flushed into it.
            return
