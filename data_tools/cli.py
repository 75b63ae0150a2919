"""`megascale data`: from text to a tokenized corpus, and checks of one."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from data_tools.cli_options import (
    ArrayOption,
    BlockTokensOption,
    CharactersOption,
    DeduplicateOption,
    EosTokenOption,
    FastOption,
    FractionOption,
    OutOption,
    OverwriteOption,
    PatternOption,
    SeedOption,
    SeparatorOption,
    ShardTokensOption,
    SourceArgument,
    SpecialTokenOption,
    TextFieldOption,
    VocabSizeOption,
    WorkersOption,
)
from data_tools.image_cli import images
from data_tools.look_cli import add_commands
from data_tools.settings import BuildSettings

app = typer.Typer(no_args_is_help=True, help="Make tokenized corpora from text, verify and inspect them.")
add_commands(app)
app.command()(images)

# The commands import their work when called: `megascale --help` and planning on a login node stay fast.


@app.command()
def build(
    source: SourceArgument,
    out: OutOption,
    vocab_size: VocabSizeOption = BuildSettings.vocab_size,
    characters: CharactersOption = False,
    special_token: SpecialTokenOption = None,
    validation_fraction: FractionOption = BuildSettings.validation_fraction,
    deduplicate: DeduplicateOption = False,
    pattern: PatternOption = None,
    text_field: TextFieldOption = "text",
    separator: SeparatorOption = None,
    seed: SeedOption = BuildSettings.seed,
    shard_tokens: ShardTokensOption = BuildSettings.shard_tokens,
    block_tokens: BlockTokensOption = BuildSettings.block_tokens,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    fast: FastOption = True,
) -> None:
    """Make a corpus from text: train a tokenizer, tokenize, write shards and index.

    Killed, it goes on where it was when the same command is given again. A finished corpus is kept.
    """
    settings = BuildSettings(
        vocab_size=vocab_size,
        characters=characters,
        special_tokens=tuple(special_token or ()),
        validation_fraction=validation_fraction,
        deduplicate=deduplicate,
        seed=seed,
        shard_tokens=shard_tokens,
        block_tokens=block_tokens,
    )
    run_build(open_source(source, pattern, text_field, separator), out, settings, workers, overwrite, fast)


@app.command()
def tokenize(
    source: SourceArgument,
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer.json to use.", show_default=False)],
    out: OutOption,
    eos_token: EosTokenOption = BuildSettings.eos_token,
    special_token: SpecialTokenOption = None,
    validation_fraction: FractionOption = BuildSettings.validation_fraction,
    deduplicate: DeduplicateOption = False,
    array: ArrayOption = None,
    pattern: PatternOption = None,
    text_field: TextFieldOption = "text",
    separator: SeparatorOption = None,
    seed: SeedOption = BuildSettings.seed,
    shard_tokens: ShardTokensOption = BuildSettings.shard_tokens,
    block_tokens: BlockTokensOption = BuildSettings.block_tokens,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    fast: FastOption = True,
) -> None:
    """Make a corpus from text with a tokenizer that exists, or a part of one, to be joined by `megascale data merge`.

    Killed, it goes on where it was when the same command is given again. A finished corpus is kept.
    """
    settings = BuildSettings(
        eos_token=eos_token,
        special_tokens=tuple(special_token or ()),
        validation_fraction=validation_fraction,
        deduplicate=deduplicate,
        seed=seed,
        shard_tokens=shard_tokens,
        block_tokens=block_tokens,
    )
    found = open_source(source, pattern, text_field, separator)
    run_build(found, out, settings, workers, overwrite, fast, tokenizer, array)


@app.command()
def pairs(
    source: Annotated[Path, typer.Argument(help="A pair a line: .jsonl or .tsv (also .gz, .zst).", show_default=False)],
    out: OutOption,
    source_field: Annotated[str, typer.Option(help="Field of the text that is read.")] = "source",
    target_field: Annotated[str, typer.Option(help="Field of the text that is to be written.")] = "target",
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use; one is trained without it.")] = None,
    vocab_size: VocabSizeOption = BuildSettings.vocab_size,
    eos_token: EosTokenOption = BuildSettings.eos_token,
    validation_fraction: FractionOption = BuildSettings.validation_fraction,
    deduplicate: DeduplicateOption = False,
    seed: SeedOption = BuildSettings.seed,
    shard_tokens: ShardTokensOption = BuildSettings.shard_tokens,
    block_tokens: BlockTokensOption = BuildSettings.block_tokens,
    workers: WorkersOption = None,
    overwrite: OverwriteOption = False,
    fast: FastOption = True,
) -> None:
    """Make a corpus of pairs of texts, such as translations, for data.objective.kind = pairs."""
    from data_tools.corpora import find_source

    settings = BuildSettings(
        vocab_size=vocab_size,
        eos_token=eos_token,
        validation_fraction=validation_fraction,
        deduplicate=deduplicate,
        seed=seed,
        shard_tokens=shard_tokens,
        block_tokens=block_tokens,
    )
    found = replace(find_source(str(source), ("**/*.jsonl*", "**/*.tsv*"), source_field), target_field=target_field)
    run_build(found, out, settings, workers, overwrite, fast, tokenizer)


@app.command()
def merge(out: Annotated[Path, typer.Argument(help="The --out of all parts.", show_default=False)]) -> None:
    """Join the parts that `tokenize --array` made into one corpus. Killed, it is finished by the same command."""
    from data_tools.merge import merge_parts

    typer.echo(merge_parts(out).describe())


@app.command("tokenizer")
def fit_tokenizer(
    source: Annotated[str | None, typer.Argument(help="Text to train on, as for build.", show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="File to write, such as tokenizer.json.")] = Path("tokenizer.json"),
    take: Annotated[
        str | None, typer.Option("--from", help="Take this tokenizer.json instead, or hub:NAME to fetch one.")
    ] = None,
    vocab_size: VocabSizeOption = BuildSettings.vocab_size,
    eos_token: EosTokenOption = BuildSettings.eos_token,
    special_token: SpecialTokenOption = None,
    pattern: PatternOption = None,
    text_field: TextFieldOption = "text",
    separator: SeparatorOption = None,
) -> None:
    """Train a byte-level BPE tokenizer on all of a source's text, or take one that exists."""
    from rich.console import Console

    from data_tools.build import write_tokenizer
    from data_tools.tokenizer import take_tokenizer
    from data_tools.write_shards import write_file
    from megascale.errors import DataError

    if (source is None) == (take is None):
        raise DataError("give either a SOURCE to train a tokenizer on, or --from TOKENIZER to take one")
    settings = BuildSettings(vocab_size=vocab_size, special_tokens=tuple(special_token or ()), validation_fraction=0)
    content = None if take is None else take_tokenizer(take, eos_token, settings.special_tokens)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            write_tokenizer(open_source(source, pattern, text_field, separator), settings, Console(stderr=True), out)
        else:
            write_file(out, content)
    except OSError as error:
        raise DataError(f"tokenizer {out} can't be written ({error}); choose another --out") from None
    typer.echo(f"tokenizer {out}")


def open_source(source: str, pattern: list[str] | None, text_field: str, separator: str | None):
    """The source that the options describe."""
    from data_tools.corpora import find_source

    separator = separator.replace("\\n", "\n") if separator else None
    return find_source(source, tuple(pattern or ()), text_field, separator)


def run_build(
    source,
    out: Path,
    settings: BuildSettings,
    workers: int | None,
    overwrite: bool,
    fast: bool,
    tokenizer: Path | None = None,
    array: str | None = None,
) -> None:
    """Builds a corpus or a part of one and prints what came of it."""
    from rich.console import Console

    from data_tools.build import build_corpus
    from data_tools.parts import parse_part
    from megascale.errors import DataError

    if array is not None and overwrite:
        raise DataError(f"--overwrite with --array would let a part remove others; remove {out} yourself")
    part = None if array is None else parse_part(array, os.environ)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    summary = build_corpus(source, out, settings, workers, Console(stderr=True), tokenizer, overwrite, part, fast)
    typer.echo(summary.describe())
