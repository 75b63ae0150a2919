"""`megascale parity`: the first steps of a run under two layouts, and the first place where they differ."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launcher.local import check_num_ranks, run_local
from launcher.train import check_data
from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.config.resume_rules import keeps_maths
from megascale.config.schema import RunConfig
from megascale.config.training import ParallelConfig, TrainConfig
from megascale.errors import ConfigError, LaunchError
from megascale.model.flops import num_parameters
from megascale.parallel.layout import AXES
from megascale.train.compare_traces import Adam, Difference, compare_traces, worst_of_phases
from megascale.train.trace_files import PHASES, TraceFolder

PARITY_MODULE = "megascale.train.parity"
TOLERANCE = {"fp32": 1e-6, "bf16": 2.0**-6, "fp16": 2.0**-9}
"""Largest relative difference by number format: about three times what legal layouts of a small model differ by. One
rounding is 2^-24 in fp32, 2^-8 in bf16 and 2^-11 in fp16."""
BYTES_PER_STEP = 16
"""Of a trace for each parameter: gradient, two moments, master."""
AXIS_PATTERN = re.compile(r"(pp|dp|cp|tp|ep|zero)(\d+)")
LENGTH_KEYS = ("max_steps", "on_nonfinite", "max_skipped_steps")
"""Of the train section, what says when a run ends and not how a step is computed."""
EXAMPLE = "tp2,pp2,dp2,zero1,schedule=interleaved_1f1b"


@dataclass(frozen=True)
class LayoutChoice:
    """A layout as asked for.

    Attributes:
        text: as the user wrote it.
        ranks: world size.
        overrides: of the config.
    """

    text: str
    ranks: int
    overrides: tuple[str, ...]


def compare_layouts(
    config_path: Path, layouts: Sequence[str], num_steps: int, tolerance: float | None, keep: Path | None,
    overrides: Sequence[str], *, is_drift: bool,
) -> bool:
    """Runs the first steps of a config under two layouts, one after the other, and prints where they differ.

    Args:
        tolerance: largest relative difference; None for the number format's.
        keep: folder for the traces; None for one that is deleted afterwards.
        is_drift: let the second layout go on from its own state instead of the first one's.

    Returns:
        Whether all differences are within the tolerance.

    Raises:
        MegascaleError: bad input before anything runs, or a failed rank.
    """
    if len(layouts) != 2:
        raise ConfigError(f"--layout is given {len(layouts)} times; give it twice, such as --layout dp1 --layout tp2")
    choices = [parse_layout(text) for text in layouts]
    configs = [check_layout(config_path, choice, overrides, num_steps) for choice in choices]
    config = configs[0]
    with trace_folder(keep) as folder:
        check_room(folder, config, num_steps)
        traces = [TraceFolder(folder / name) for name in ("a", "b")]
        for choice, trace in zip(choices, traces, strict=True):
            leader = str(traces[0].path) if trace is traces[1] and not is_drift else None
            print(f"{num_steps} steps under {choice.text}, ranks: {choice.ranks}", flush=True)
            request = {"config": str(config_path), "overrides": [*overrides, *choice.overrides], "steps": num_steps,
                       "folder": str(trace.path), "leader": leader}
            run_local([json.dumps(request)], choice.ranks, PARITY_MODULE)
        adam = Adam(config.optimizer.beta1, config.optimizer.beta2, config.optimizer.eps)
        differences = list(compare_traces(*traces, num_steps, adam, b_follows=not is_drift))
    limit = TOLERANCE[config.precision.dtype] if tolerance is None else tolerance
    return print_report(differences, choices, limit, config.precision.dtype, is_given=tolerance is not None)


def parse_layout(text: str) -> LayoutChoice:
    """Reads a layout such as `tp2,pp2,dp2,zero1,schedule=interleaved_1f1b`; axes that it leaves out have size 1.

    Raises:
        ConfigError: a word that is neither an axis with its size nor a setting of how a step is computed.
    """
    sizes, overrides, seen = dict.fromkeys((*AXES, "ep"), 1), [], set()
    for word in re.split(r",(?![^\[]*\])", text):
        word = word.strip()
        axis, (key, separator, value) = AXIS_PATTERN.fullmatch(word), word.partition("=")
        name = axis[1] if axis else key
        if name in seen:
            raise ConfigError(f"--layout {text}: `{name}` stands twice; keep one")
        seen.add(name)
        if axis is None:
            if not separator:
                raise ConfigError(
                    f"--layout {text}: `{word}` is neither an axis with its size ({', '.join(sizes)}), nor zero with"
                    f" its stage, nor key=value; write it like {EXAMPLE}"
                )
            overrides.append(f"{section_of(key, text)}.{key}={value}")
        elif name == "zero":
            overrides.append(f"parallel.zero_stage={axis[2]}")
        elif int(axis[2]) < 1:
            raise ConfigError(f"--layout {text}: `{word}`: an axis has 1 rank or more; leave it out, or use {name}1")
        else:
            sizes[name] = int(axis[2])
    ranks = sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]
    axes = [f"parallel.{name}={size}" for name, size in sizes.items() if name != "dp"]
    return LayoutChoice(text, ranks, (*axes, *overrides))


def section_of(key: str, text: str) -> str:
    """The section of the config that a setting of a layout belongs to.

    Raises:
        ConfigError: it is no setting, or one that changes what is computed.
    """
    legal = {name: "parallel" for name in ParallelConfig.model_fields if name not in (*AXES, "ep", "zero_stage")}
    legal |= {
        name: "train" for name in TrainConfig.model_fields if keeps_maths(f"train.{name}") and name not in LENGTH_KEYS
    }
    if key in legal:
        return legal[key]
    if key in (*AXES, "ep", "zero_stage", "zero"):
        raise ConfigError(f"--layout {text}: write `{key.removesuffix('_stage')}` with its number, as in {EXAMPLE}")
    raise ConfigError(
        f"--layout {text}: `{key}` isn't a setting that may differ between layouts of one run; those are"
        f" {', '.join(legal)}. What both share goes after the config, as in train.seq_len=64"
    )


def check_layout(config_path: Path, choice: LayoutChoice, overrides: Sequence[str], num_steps: int) -> RunConfig:
    """The config under a layout, after all the checks that need no ranks.

    Raises:
        MegascaleError: the first thing that is wrong, with the layout that it is about.
    """
    config = load_config(config_path, [*overrides, *choice.overrides])
    if config.optimizer.kind != "adamw" or config.optimizer.ema_decay is not None:
        raise ConfigError(
            f"{config_path}: optimizer.kind = {config.optimizer.kind}, optimizer.ema_decay ="
            f" {config.optimizer.ema_decay}: parity compares what AdamW keeps of each parameter; for layouts it is as"
            " good, so add optimizer.kind=adamw, and optimizer.ema_decay=null"
        )
    if not 1 <= num_steps <= config.train.max_steps:
        raise ConfigError(f"--steps {num_steps}: {config_path} has train.max_steps = {config.train.max_steps}; use 1 to"
                          f" {config.train.max_steps}")
    try:
        check_num_ranks(choice.ranks)
    except LaunchError as error:
        raise LaunchError(f"--layout {choice.text} is one of {choice.ranks} ranks. {error}") from None
    check_data(config, derive(config, choice.ranks, source=f"{config_path} with --layout {choice.text}"))
    return config


@contextmanager
def trace_folder(keep: Path | None) -> Iterator[Path]:
    """The folder for both traces; deleted at the end unless it is the user's.

    Raises:
        ConfigError: the user's isn't empty, or can't be made.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="megascale-parity-") as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
        is_empty = not any(keep.iterdir())
    except OSError as error:
        raise ConfigError(f"--keep {keep}: can't be made a folder for traces: {error.strerror}") from None
    if not is_empty:
        raise ConfigError(f"--keep {keep}: isn't empty; name a new folder")
    yield keep.resolve()


def check_room(folder: Path, config: RunConfig, num_steps: int) -> None:
    """Refuses traces that the disk has no room for.

    Raises:
        ConfigError: with both sizes.
    """
    needed, free = 2 * (BYTES_PER_STEP * num_steps + 4) * num_parameters(config.model), shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"two traces of {num_steps} steps take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free;"
            " use fewer --steps, a smaller model, or --keep with a folder on another disk"
        )


def print_report(
    differences: list[Difference], choices: Sequence[LayoutChoice], limit: float, dtype: str, *, is_given: bool
) -> bool:
    """Prints the largest difference of each step and phase, and the first one over the limit; whether there is none."""
    worst, console = worst_of_phases(differences), Console(highlight=False)
    phases = [phase for phase in PHASES if any(key[1] == phase for key in worst)]
    table = Table("step", *phases, title=f"{choices[0].text} against {choices[1].text}: largest relative difference")
    for step in sorted({step for step, _ in worst}):
        table.add_row(str(step), *(show_cell(worst.get((step, phase)), limit) for phase in phases))
    console.print(table)
    first = next((difference for difference in differences if not difference.relative <= limit), None)
    basis = "as given" if is_given else f"for {dtype}" + (
        "" if dtype == "fp32" else ", four roundings of its numbers; fp32 shows smaller faults"
    )
    if first is not None:
        say = f"first difference over {limit:.2g} ({basis}): {describe_difference(first)}"
        console.print(say, soft_wrap=True, style="red", markup=False)
        return False
    if all(difference.is_equal for difference in differences):
        console.print("equal to the bit in every step and phase", style="green")
        return True
    largest = max(worst.values(), key=lambda difference: difference.relative)
    say = f"within {limit:.2g} ({basis}); the largest difference: {describe_difference(largest)}"
    console.print(say, soft_wrap=True, style="green", markup=False)
    return True


def show_cell(difference: Difference | None, limit: float) -> str:
    """A cell of the table."""
    if difference is None:
        return ""
    if difference.is_equal:
        return "equal"
    return f"[red]{difference.relative:.1e}[/red]" if not difference.relative <= limit else f"{difference.relative:.1e}"


def describe_difference(difference: Difference) -> str:
    """A difference in words."""
    where = f" of {difference.name}" if difference.name else ""
    at = f" at {list(difference.index)}" if difference.index else ""
    size = f"{difference.relative:.2g} relative, {difference.absolute:.2g} absolute{at}"
    return f"step {difference.step}, {difference.phase}{where}: {size}"
