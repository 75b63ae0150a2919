"""What the leak test found, as a table and in words. Without torch, so that the launcher can import it."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

from megascale.config.schema import RunConfig
from megascale.errors import ConfigError

GRADIENT = "gradient"
"""In place of a layer: the gradient of a loss, where no layer's output differs."""
REMEDY = (
    "Don't train on this. Try the same with fewer axes, such as parallel.cp=1, another parallel.context_attention or"
    " train.compile=false to see what is at fault, and report it with this message"
)


class Counts(NamedTuple):
    """Positions of all rows in one comparison, over all ranks.

    Attributes:
        others, itself: with logits, outside and inside the perturbed documents.
        others_changed, itself_changed: of them, those whose logits have other bits than before.
        others_inputs, itself_inputs: with inputs, outside and inside the labelled documents.
        others_reached, itself_reached: of them, those where the loss of the labelled ones has a gradient.
    """

    others: int
    itself: int
    others_changed: int
    itself_changed: int
    others_inputs: int
    itself_inputs: int
    others_reached: int
    itself_reached: int


class Leak(NamedTuple):
    """The first place where a document sees another.

    Attributes:
        layer: whose output differs first, in the model's order; the number of layers for `GRADIENT`.
        row: number of the row.
        source, source_start, source_stop: the document that is seen, and its columns in the row.
        reached: the document that sees it.
        column: the first that differs in that row.
    """

    layer: int
    row: int
    source: int
    source_start: int
    source_stop: int
    reached: int
    column: int


class Finding(NamedTuple):
    """One comparison.

    Attributes:
        perturbed: which document of each row got other tokens; None for none.
        is_separated: whether the rows' documents were told apart; False in the control.
        leak: None where there is none.
    """

    perturbed: str | None
    is_separated: bool
    counts: Counts
    leak: Leak | None


def check_separates(config: RunConfig, source: str) -> None:
    """Refuses a config whose documents see each other by its own choice, or whose logits can't be compared by bits.

    Raises:
        ConfigError: with the setting to change.
    """
    if not config.data.document_mask:
        raise ConfigError(
            f"{source}: --leak asks whether documents packed into one row see each other, and with data.document_mask ="
            " false they do, by choice: a row is one text to the model. Use data.document_mask=true to keep them apart,"
            " or leave --leak out"
        )
    if config.objective_kind != "causal":
        raise ConfigError(
            f"{source}: --leak labels each token with the next one, as causal language models are trained; this run's"
            f" objective is {config.objective_kind}, whose rows it can't make. Leave --leak out"
        )
    if config.model.moe:
        raise ConfigError(
            f"{source}: --leak compares logits bit by bit, and the tokens that choose an expert are multiplied"
            " together, so that how many of them there are has a say in each one's rounding. Test the mask without"
            " model.moe"
        )
    if config.precision.fp8_linear:
        raise ConfigError(
            f"{source}: --leak compares logits bit by bit, and precision.fp8_linear gives all positions of a"
            " micro-batch one scale, by the largest number among them, so that each has a say in the others' rounding."
            " Test the mask with precision.fp8_linear=false"
        )


def judge(findings: Sequence[Finding], layers: Sequence[str], where: str) -> str | None:
    """What is wrong, in words; None where nothing is.

    Args:
        layers: names of the model's layers, in its order.
        where: kernel and layout.
    """
    unperturbed = next(each.counts for each in findings if each.is_separated and each.perturbed is None)
    if unperturbed.others_changed:
        return (
            f"the same rows, computed twice, gave other logits at {unperturbed.others_changed:,} of"
            f" {unperturbed.others:,} positions: {where} isn't deterministic to the bit, so nothing can be said of"
            " leaks. Try another kernel or number format"
        )
    leaks = [each.leak for each in findings if each.is_separated and each.leak is not None]
    if leaks:
        return describe_leak(min(leaks, key=lambda leak: leak.layer), layers, where)
    return describe_blindness(findings, where)


def describe_leak(leak: Leak, layers: Sequence[str], where: str) -> str:
    """Which document sees which, and where it shows first."""
    source = f"document {leak.source} of row {leak.row} (columns {leak.source_start} to {leak.source_stop - 1})"
    if leak.layer == len(layers):
        what = (
            f"the loss of {source} has a gradient at column {leak.column}, in document {leak.reached}, though no"
            " layer's output shows it: the fault is in a backward pass"
        )
    else:
        what = (
            f"{source} is seen by document {leak.reached}: with other tokens in the one, column {leak.column} of the"
            f" other changes, first in the output of {layers[leak.layer]}"
        )
    return f"a document leaks into another under {where}: {what}. {REMEDY}"


def describe_blindness(findings: Sequence[Finding], where: str) -> str | None:
    """Why the test couldn't have seen a leak; None when it could, or where there is no control."""
    control = next((each.counts for each in findings if not each.is_separated), None)
    if control is None:
        return None
    changed = [each.counts for each in findings if each.perturbed is not None]
    if not all(counts.itself_changed and counts.itself_reached for counts in changed):
        fault = "a document's own logits stay as they are when its tokens change, or its loss has no gradient at them"
    elif not control.others_changed or not control.others_reached:
        fault = "with nothing to keep documents apart they still don't see each other"
    else:
        return None
    return (
        f"the leak test is blind under {where}: {fault}, so that it couldn't find a leak. Look for weights that are"
        " zero (model.init_std), model.window = 1, or a number format that rounds everything away"
    )


def report_table(findings: Sequence[Finding], vocab_size: int) -> Table:
    """A line for each comparison; the control is the one in which nothing keeps documents apart."""
    table = Table(
        "document perturbed", "logits compared", "changed in others", "changed in itself", "gradient in others",
        "gradient in itself",
    )
    for each in findings:
        counts, is_bad = each.counts, each.is_separated
        table.add_row(
            (each.perturbed or "none") if each.is_separated else "control",
            f"{counts.others + counts.itself:,} x {vocab_size:,}",
            show_count(counts.others_changed, counts.others, is_bad),
            show_count(counts.itself_changed, counts.itself),
            show_count(counts.others_reached, counts.others_inputs, is_bad),
            show_count(counts.itself_reached, counts.itself_inputs),
        )
    return table


def show_count(count: int, of: int, is_bad: bool = False) -> str:
    """A count of positions, red where there should be none."""
    return f"[red]{count:,} of {of:,}[/red]" if is_bad and count else f"{count:,} of {of:,}"
