"""`megascale data`: the commands that look at corpora and at what runs read of them."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from megascale.errors import EXIT_DIFFERENT

# The commands import their work when called: `megascale --help` and planning on a login node stay fast.

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the corpus.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="Run folder, such as runs/quickstart.", show_default=False)]
SeqLenOption = Annotated[int, typer.Option(min=1, help="Input tokens of a row, as train.seq_len.")]
PackingOption = Annotated[Literal["concat", "bestfit", "none"], typer.Option(help="As data.packing.")]


def add_commands(app: typer.Typer) -> None:
    """Adds the commands to `megascale data`."""
    for name, command in {
        "verify": verify, "inspect": inspect_row, "stats": stats, "index": index, "count": count, "locate": locate_row,
        "audit": audit,
    }.items():
        app.command(name)(command)


def verify(folder: FolderArgument) -> None:
    """Read every byte of a corpus: hashes, checksums, tar structure, counts, token ids, and as a stock WebDataset."""
    from data_tools.verify import verify_corpus

    for manifest in verify_corpus(folder, Console(stderr=True)):
        content = f"{manifest.num_tokens:,} tokens, {manifest.num_documents:,} documents"
        if manifest.holds_images:
            content = f"{manifest.num_documents:,} images of {manifest.vocab_size} classes"
        typer.echo(f"{folder / manifest.split}: {manifest.num_shards} shards, {content}: good")


def inspect_row(
    folder: Annotated[Path, typer.Argument(help="Folder of a corpus or of a run.", show_default=False)],
    row: Annotated[int, typer.Option(help="Row number; of a run, its global one.")] = 0,
    seq_len: SeqLenOption = 256,
    packing: PackingOption = "concat",
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    seed: Annotated[int | None, typer.Option(min=0, help="Number rows as a run of this seed reads them.")] = None,
) -> None:
    """Show one row as text, and where its tokens come from. Of a run, its own config says how rows are made."""
    from data_tools.inspect import describe_corpus_row, describe_run_row
    from data_tools.locate import open_run
    from megascale.observe.run_files import CONFIG_FILE

    if (folder / CONFIG_FILE).is_file():
        typer.echo(describe_run_row(open_run(folder).stream, row))
    else:
        typer.echo(describe_corpus_row(folder, split, row, seq_len, packing, seed))


def stats(
    folder: FolderArgument,
    seq_len: SeqLenOption = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lengths, exact copies, unknown and used ids, and what each packing pads and cuts at a row length."""
    from data_tools.stats import corpus_stats, format_stats

    figures = corpus_stats(folder, seq_len, Console(stderr=True))
    typer.echo(json.dumps(figures, indent=1) if as_json else format_stats(figures))


def index(
    folder: FolderArgument,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Though shards are missing.")] = False,
) -> None:
    """Write the index of a corpus again from its shards: after a loss, or from an older format."""
    from data_tools.index import rebuild_index

    for manifest in rebuild_index(folder, Console(stderr=True), allow_missing):
        content = f"{manifest.num_documents:,} images" if manifest.holds_images else f"{manifest.num_tokens:,} tokens"
        typer.echo(f"{manifest.index_place}: {manifest.num_shards} shards, {content}")


def count(
    folder: FolderArgument,
    seq_len: SeqLenOption,
    packing: PackingOption = "bestfit",
    fim: Annotated[bool, typer.Option("--fim", help="For a corpus with a fim_fraction.")] = False,
    overlap: Annotated[int, typer.Option(min=0, help="Tokens two rows of a text share: 1, or 0 for MLM, spans.")] = 1,
) -> None:
    """Count the rows of a packing once, beside the index: a corpus that isn't local needs it before a run."""
    from data_tools.count import count_rows

    for line in count_rows(folder, seq_len, packing, fim, overlap):
        typer.echo(line)


def locate_row(
    run: RunArgument,
    step: Annotated[int, typer.Option(help="Step as the log numbers it; the first is 1.", show_default=False)],
    rank: Annotated[int | None, typer.Option(help="Rank of the session that ran it. Default: all replicas.")] = None,
    row: Annotated[int | None, typer.Option(help="Of the rank's rows in that step, from 0. Default: all.")] = None,
) -> None:
    """Show where any row of any step of a run came from, and its text."""
    from data_tools.locate import locate

    typer.echo(locate(run, step, rank, row))


def audit(
    run: RunArgument,
    tokens: Annotated[bool, typer.Option("--tokens", help="Read every row again and compare the digest.")] = False,
) -> None:
    """Work out again what a run has read, and compare it with its ledger. Exits with 1 when they differ."""
    from data_tools.audit import audit_run

    found = audit_run(run, tokens, Console(stderr=True))
    typer.echo("\n".join(found.table))
    if found.faults:
        typer.echo("\n".join(["differs:", *(f"  {fault}" for fault in found.faults)]))
        raise typer.Exit(EXIT_DIFFERENT)
    typer.echo("as the run says")
