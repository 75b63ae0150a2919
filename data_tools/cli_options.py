"""Options that several commands of `megascale data` share."""

from pathlib import Path
from typing import Annotated

import typer

SourceArgument = Annotated[
    str,
    typer.Argument(
        help="Folder or file of text, or the word python-stdlib. Read are text files and .jsonl (also .gz and .zst), "
        ".parquet, and WebDataset .tar files with .txt or .json members.",
        show_default=False,
    ),
]
PatternOption = Annotated[list[str] | None, typer.Option(help="Glob within a folder, such as '**/*.py'; repeatable.")]
TextFieldOption = Annotated[str, typer.Option(help="Field of a JSON object or column of a parquet file.")]
SeparatorOption = Annotated[str | None, typer.Option(help="Text between documents of a text file; \\n is a newline.")]
OutOption = Annotated[Path, typer.Option(help="Folder to make.", show_default=False)]
VocabSizeOption = Annotated[int, typer.Option(help="Entries of the tokenizer, at most.")]
CharactersOption = Annotated[
    bool,
    typer.Option("--characters", help="Each character of the text is a token, as in nanoGPT; --vocab-size is unused."),
]
EosTokenOption = Annotated[str, typer.Option(help="The tokenizer's token that ends a document.")]
SpecialTokenOption = Annotated[
    list[str] | None, typer.Option(help="Further special token, such as '<|fim_prefix|>'; repeatable.")
]
FractionOption = Annotated[float, typer.Option(help="Share of documents for validation; 0 for none.")]
DeduplicateOption = Annotated[
    bool,
    typer.Option(
        "--deduplicate", help="Drop exact copies of earlier texts. With --array every task reads the whole source."
    ),
]
ArrayOption = Annotated[
    str | None,
    typer.Option(help="Make part i of n only: i/n, i from 0; or slurm, the task of the job array that this is."),
]
SeedOption = Annotated[int, typer.Option(help="Seed of the order of documents in shards.")]
ShardTokensOption = Annotated[int, typer.Option(help="Tokens of a shard.")]
BlockTokensOption = Annotated[int, typer.Option(help="Tokens of a block, the unit of checksums.")]
WorkersOption = Annotated[int | None, typer.Option(help="Tokenizing processes; one per core by default.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace another corpus in the folder.")]
FastOption = Annotated[bool, typer.Option(help="Tokenize by tiktoken where its ids are equal.")]
