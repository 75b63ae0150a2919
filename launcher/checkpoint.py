"""`megascale checkpoint`: what a run has saved, whether it is whole, how two checkpoints differ, and what may go."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megascale.errors import EXIT_DIFFERENT, CheckpointError, redact

if TYPE_CHECKING:  # imported when a command runs: `megascale --help` stays fast
    from megascale.checkpoint.difference import Difference, ValueDifference
    from megascale.checkpoint.index import Change, LineageRecord
    from megascale.checkpoint.inspect import CheckpointSummary, Listing
    from megascale.checkpoint.prune import PrunePlan
    from megascale.checkpoint.store import Store
    from megascale.checkpoint.verify import Verification

app = typer.Typer(no_args_is_help=True, help="List, verify, compare and prune the checkpoints of a run.")

MIB = 1 << 20
NAMES_SHOWN = 10
PIPE_WIDTH = 240
"""Columns of a table that no terminal limits."""

Place = Annotated[str, typer.Argument(help="Run folder, checkpoint folder, or url of a run's checkpoints.")]
PlaceAtStep = Annotated[str, typer.Argument(help="The same, and @STEP for another than the newest: runs/a@1000.")]


@contextmanager
def clear_errors() -> Iterator[None]:
    """Makes what the system refuses, such as a folder without permission or a network that is away, a user's error."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CheckpointError(error) from None


@app.command("list")
@clear_errors()
def list_command(
    run: Place,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Show every checkpoint of a run, why it is kept, and what is wrong with it."""
    from megascale.checkpoint.inspect import list_checkpoints, open_place

    listing = list_checkpoints(open_place(run))
    if as_json:
        print(json.dumps(asdict(listing) | {"place": redact(listing.place)}, indent=2))
    else:
        _print_listing(listing)


@app.command()
@clear_errors()
def verify(
    run: Place,
    step: Annotated[int | None, typer.Option(min=0, help="Step to verify. Default: the newest.")] = None,
    all_steps: Annotated[bool, typer.Option("--all", help="Verify every checkpoint.")] = False,
) -> None:
    """Read every byte of a checkpoint, and compare each file's hash and each tensor's digest with what was saved."""
    from megascale.checkpoint.find import DamagedCheckpointError
    from megascale.checkpoint.inspect import choose_step, open_place

    if all_steps and step is not None:
        raise CheckpointError("--all and --step can't go together: give one of them")
    try:
        store = open_place(run)
        steps = store.steps() if all_steps else [choose_step(store, step)]
        if not steps:
            raise CheckpointError(f"{store.place}: holds no checkpoint")
    except DamagedCheckpointError as damage:  # of a folder that was copied elsewhere
        print(f"DAMAGED: {damage}")
        raise typer.Exit(EXIT_DIFFERENT) from None
    results = [_verify_one(store, one, may_skip=all_steps) for one in steps]
    if not all(results):
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
@clear_errors()
def diff(
    first: PlaceAtStep, second: PlaceAtStep,
    values: Annotated[bool, typer.Option("--values", help="Read the tensors that differ, and say how far.")] = False,
) -> None:
    """Show in what two checkpoints differ: config, state, data, code, history, tensors."""
    from megascale.checkpoint.difference import compare_indices, compare_values, open_tensors
    from megascale.checkpoint.find import read_stored_index
    from megascale.checkpoint.inspect import choose_step, open_place, split_step

    stores, indices = [], []
    for text in (first, second):
        place, step = split_step(text)
        stores.append(open_place(place))
        indices.append(read_stored_index(stores[-1], choose_step(stores[-1], step)))
        print(f"{'AB'[len(stores) - 1]}: {redact(str(stores[-1].path(indices[-1].state.step)))}")
    difference = compare_indices(*indices)
    _print_difference(difference, with_names=not values)
    if values and difference.different:
        with open_tensors(stores[0], indices[0]) as one, open_tensors(stores[1], indices[1]) as two:
            shapes = {key: indices[0].tensors[key].shape for key in difference.different}
            _print_values([compare_values(one, two, key, shape) for key, shape in shapes.items()])
    if not difference.has_equal_tensors:
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
@clear_errors()
def prune(
    run: Annotated[str, typer.Argument(help="Run folder; no job may be at work on it.")],
    keep_last: Annotated[int | None, typer.Option(min=1, help="Newest to keep. Default: the run's config.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=0, help="Keep multiples of this step; 0: none.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=0, help="Keep so many with the lowest validation loss.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete the checkpoints that retention doesn't keep; the newest is verified first, and stays."""
    from megascale.checkpoint.prune import plan_pruning
    from megascale.checkpoint.prune import prune as prune_run

    apply = plan_pruning if dry_run else prune_run
    _print_plan(apply(run, last=keep_last, every_steps=keep_every, best=keep_best), is_dry=dry_run)


def _verify_one(store: "Store", step: int, *, may_skip: bool) -> bool:
    """Verifies one checkpoint and prints the result; whether it is whole, or was deleted meanwhile and may be."""
    from megascale.checkpoint.verify import verify_bits

    try:
        result = verify_bits(store, step)
        problem = None if result.is_whole else "damaged"
    except OSError as error:
        problem = str(error)
    if problem and step not in store.steps():
        message = f"{redact(str(store.path(step)))}: was deleted while it was read; the run is at work"
        if not may_skip:
            raise CheckpointError(f"{message}: give the command again, for a newer one")
        print(message)
        return True
    if problem and problem != "damaged":
        raise CheckpointError(f"{redact(str(store.path(step)))}: can't be read: {problem}")
    _print_verification(result)
    return result.is_whole


def _print_verification(result: "Verification") -> None:
    path = redact(result.path)
    if result.problem:
        print(f"DAMAGED: {redact(result.problem)}")
        return
    rate = f"{result.bytes / MIB:.1f} MiB at {result.bytes / 1e6 / max(result.seconds, 1e-9):.0f} MB/s"
    print(f"{'ok' if result.is_whole else 'DAMAGED'}: {path}: {result.num_files} files, {result.num_tensors} tensors,"
          f" {rate}")
    for message in result.bad_files:
        print(f"  file {message}")
    for key in result.bad_tensors:
        print(f"  tensor {key}: its elements aren't those that were saved")


def _print_listing(listing: "Listing") -> None:
    rule = "unknown"
    if policy := listing.policy:
        rule = f"last {policy.last}, every {policy.every_steps or 'no'} steps, best {policy.best}"
    run = f"run {listing.run_id}" if listing.run_id else "no readable checkpoint"
    print(f"{redact(listing.place)}: {run}; keeps: {rule}")
    if listing.checkpoints:
        rows = [_listing_row(summary) for summary in listing.checkpoints]
        _print_table(("step", "written", "MiB", "files", "tokens", "validation loss", "probe loss", "kept as",
                      "state"), rows, numbers=(0, 2, 3, 4, 5, 6))
    for remnant in listing.remnants:
        reason = f": {remnant.reason}" if remnant.reason else ""
        print(f"{remnant.what}: {remnant.name}, {remnant.bytes / MIB:.1f} MiB{redact(reason)}")


def _listing_row(summary: "CheckpointSummary") -> list[str]:
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(summary.written)) if summary.written else "-"
    return [
        str(summary.step), written, _number(summary.bytes and summary.bytes / MIB, ".1f"),
        _number(summary.num_files, "d"), _number(summary.tokens, ","), _number(summary.validation_loss, ".4f"),
        _number(summary.probe_loss, ".4f"), ", ".join(summary.kept) or "-",
        f"UNUSABLE: {redact(summary.problem)}" if summary.problem else "ok",
    ]


def _print_difference(difference: "Difference", *, with_names: bool) -> None:
    if difference.run_ids[0] != difference.run_ids[1]:
        print(f"run: {difference.run_ids[0]} in A, {difference.run_ids[1]} in B")
    for name in ("config", "state", "data", "code"):
        _print_changes(name, getattr(difference, name))
    for side, turns in zip("AB", difference.lineage, strict=True):
        for turn in turns:
            print(f"history, only of {side}: {_describe_turn(turn)}")
    _print_changes("shape", difference.reshaped)
    for side, keys in zip("AB", difference.only, strict=True):
        if keys:
            print(f"tensors only in {side}: {_name_some(keys)}")
    print(f"tensors: {difference.num_equal} equal, {len(difference.different)} different")
    if with_names and difference.different:
        print(f"  {_name_some(difference.different)}")


def _print_changes(name: str, changes: "Iterable[Change]") -> None:
    for change in changes:
        print(f"{name}: {change.key}: {change.old!r} in A, {change.new!r} in B")


def _describe_turn(turn: "LineageRecord") -> str:
    changes = "".join(f"; {change.key}: {change.old!r} -> {change.new!r}" for change in turn.changes)
    return f"{turn.kind} at step {turn.step} from {redact(turn.source)} ({turn.run_id or 'no run'}){changes}"


def _print_values(differences: "Sequence[ValueDifference]") -> None:
    rows = [
        [one.key, f"{one.num_different:,} of {one.numel:,}", f"{one.largest:.3e}", f"{one.relative:.3e}"]
        for one in differences
    ]
    _print_table(("tensor", "elements that differ", "max |a - b|", "|a - b| / |a|"), rows, numbers=(1, 2, 3))


def _print_plan(plan: "PrunePlan", *, is_dry: bool) -> None:
    for summary in plan.passed_over:
        print(f"left alone: step {summary.step}: {redact(summary.problem or f'belongs to run {summary.run_id}')}")
    for step, reasons in plan.kept.items():
        print(f"kept: step {step} ({', '.join(reasons)})")
    verb = "would be deleted" if is_dry else "deleted"
    for summary in plan.deleted:
        print(f"{verb}: step {summary.step}, {summary.bytes / MIB:.1f} MiB")
    for remnant in plan.leftovers:
        print(f"{verb}: {remnant.name}, left behind, {remnant.bytes / MIB:.1f} MiB")
    print(f"{plan.freed_bytes / MIB:.1f} MiB {'would be freed' if is_dry else 'freed'}")


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> None:
    table = Table()
    for position, name in enumerate(columns):
        table.add_column(name, justify="right" if position in numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # plain: brackets in a key are no markup
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _name_some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMES_SHOWN} more" if len(keys) > NAMES_SHOWN else ""
    return ", ".join(keys[:NAMES_SHOWN]) + more
