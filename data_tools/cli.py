"""`megascale data`: from text to a tokenized corpus, and checks of one."""

import os
from pathlib import Path
from typing import Annotated

import typer

from data_tools.settings import BuildSettings

app = typer.Typer(no_args_is_help=True, help="Make tokenized corpora from text, verify and inspect them.")

# The commands import their work when called: `megascale --help` and planning on a login node stay fast.

SourceArgument = Annotated[
    str, typer.Argument(help="Folder, .txt, .jsonl or .parquet file, or the word python-stdlib.", show_default=False)
]
PatternOption = Annotated[list[str] | None, typer.Option(help="Glob within a folder, such as '**/*.py'; repeatable.")]
TextFieldOption = Annotated[str, typer.Option(help="Field of a JSON line or column of a parquet file.")]
SeparatorOption = Annotated[str | None, typer.Option(help="Text between documents of a text file; \\n is a newline.")]
FolderArgument = Annotated[Path, typer.Argument(help="Folder of the corpus.", show_default=False)]
OutOption = Annotated[Path, typer.Option(help="Folder to make.", show_default=False)]
VocabSizeOption = Annotated[int, typer.Option(help="Entries of the tokenizer, at most.")]
FractionOption = Annotated[float, typer.Option(help="Share of documents for validation; 0 for none.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the order of documents in shards.")]
ShardTokensOption = Annotated[int, typer.Option(help="Tokens of a shard.")]
BlockTokensOption = Annotated[int, typer.Option(help="Tokens of a block, the unit of checksums.")]
WorkersOption = Annotated[int | None, typer.Option(help="Tokenizing processes; one per core by default.")]
OverwriteOption = Annotated[bool, typer.Option(help="Replace another corpus in the folder.")]


@app.command()
def build(
    source: SourceArgument,
    out: OutOption,
    vocab_size: VocabSizeOption = BuildSettings.vocab_size,
    validation_fraction: FractionOption = BuildSettings.validation_fraction,
    pattern: PatternOption = None,
    text_field: TextFieldOption = "text",
    separator: SeparatorOption = None,
    seed: SeedOption = BuildSettings.seed,
    shard_tokens: ShardTokensOption = BuildSettings.shard_tokens,
    block_tokens: BlockTokensOption = BuildSettings.block_tokens,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a corpus from text: train a tokenizer, tokenize, write shards and index. A finished one is kept."""
    settings = BuildSettings(
        vocab_size=vocab_size,
        validation_fraction=validation_fraction,
        seed=seed,
        shard_tokens=shard_tokens,
        block_tokens=block_tokens,
    )
    run_build(open_source(source, pattern, text_field, separator), out, settings, workers, None, overwrite)


@app.command()
def tokenize(
    source: SourceArgument,
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer.json to use.", show_default=False)],
    out: OutOption,
    eos_token: Annotated[str, typer.Option(help="Its token that ends a document.")] = BuildSettings.eos_token,
    validation_fraction: FractionOption = BuildSettings.validation_fraction,
    pattern: PatternOption = None,
    text_field: TextFieldOption = "text",
    separator: SeparatorOption = None,
    seed: SeedOption = BuildSettings.seed,
    shard_tokens: ShardTokensOption = BuildSettings.shard_tokens,
    block_tokens: BlockTokensOption = BuildSettings.block_tokens,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a corpus from text with a tokenizer that exists."""
    settings = BuildSettings(
        eos_token=eos_token,
        validation_fraction=validation_fraction,
        seed=seed,
        shard_tokens=shard_tokens,
        block_tokens=block_tokens,
    )
    run_build(open_source(source, pattern, text_field, separator), out, settings, workers, tokenizer, overwrite)


@app.command("tokenizer")
def fit_tokenizer(
    source: SourceArgument,
    out: Annotated[Path, typer.Option(help="File to write, such as tokenizer.json.", show_default=False)],
    vocab_size: VocabSizeOption = BuildSettings.vocab_size,
    pattern: PatternOption = None,
    text_field: TextFieldOption = "text",
    separator: SeparatorOption = None,
) -> None:
    """Train a byte-level BPE tokenizer on all of a source's text."""
    from rich.console import Console

    from data_tools.build import write_tokenizer
    from megascale.errors import DataError

    settings = BuildSettings(vocab_size=vocab_size, validation_fraction=0)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_tokenizer(open_source(source, pattern, text_field, separator), settings, Console(stderr=True), out)
    except OSError as error:
        raise DataError(f"tokenizer {out} can't be written ({error}); choose another --out") from None
    typer.echo(f"tokenizer {out}")


@app.command()
def verify(folder: FolderArgument) -> None:
    """Read every byte of a corpus: hashes, checksums, counts, token ids, and as a stock WebDataset."""
    from rich.console import Console

    from data_tools.verify import verify_corpus

    for manifest in verify_corpus(folder, Console(stderr=True)):
        typer.echo(
            f"{manifest.split_folder}: {len(manifest.shards)} shards, {manifest.num_tokens:,} tokens, "
            f"{manifest.num_documents:,} documents: good"
        )


@app.command("inspect")
def inspect_row(
    folder: FolderArgument,
    row: Annotated[int, typer.Option(help="Row number.")] = 0,
    seq_len: Annotated[int, typer.Option(min=1, help="Input tokens of a row.")] = 256,
    split: Annotated[str, typer.Option(help="train or validation.")] = "train",
    seed: Annotated[int | None, typer.Option(min=0, help="Number rows as a run of this seed reads them.")] = None,
) -> None:
    """Show one row as text, and where its tokens come from."""
    from data_tools.inspect import describe_row

    typer.echo(describe_row(folder, split, row, seq_len, seed))


def open_source(source: str, pattern: list[str] | None, text_field: str, separator: str | None):
    """The source that the options describe."""
    from data_tools.corpora import find_source

    separator = separator.replace("\\n", "\n") if separator else None
    return find_source(source, tuple(pattern or ()), text_field, separator)


def run_build(
    source, out: Path, settings: BuildSettings, workers: int | None, tokenizer: Path | None, overwrite: bool
) -> None:
    """Builds a corpus and prints what came of it."""
    from rich.console import Console

    from data_tools.build import build_corpus

    num_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    summary = build_corpus(source, out, settings, num_workers, Console(stderr=True), tokenizer, overwrite)
    typer.echo(summary.describe())
