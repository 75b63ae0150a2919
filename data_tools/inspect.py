"""Shows what a model reads: a row, decoded."""

from pathlib import Path

from megascale.data.manifest import load_manifest
from megascale.data.order import RowOrder
from megascale.data.rows import CorpusRows
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError


def describe_row(folder: Path, split: str, number: int, seq_len: int, seed: int | None) -> str:
    """One row as text, with where it comes from.

    Args:
        folder: the corpus.
        split: `train` or `validation`.
        number: row number.
        seq_len: input tokens of a row.
        seed: seed of a run whose order numbers the rows; without it they are numbered as they lie in the shards.
    """
    rows = CorpusRows(load_manifest(folder, split), seq_len)
    if number < 0 or (seed is None and number >= rows.num_rows):
        raise DataError(f"--row {number} is not in 0 .. {rows.num_rows - 1}, the rows of {rows.manifest.split_folder}")
    if seed is None:
        epoch, (shard, row) = 0, rows.locate_unshuffled(number)
    else:
        epoch, shard, row = (int(x[0]) for x in RowOrder(rows.rows_per_shard, seed).locate([number]))
    tokens = rows.read(shard, row)
    start, stop = rows.token_range(shard, row)
    text = load_tokenizer(rows.manifest.tokenizer_path).decode(tokens.tolist(), skip_special_tokens=False)
    place = f"epoch {epoch}, {rows.manifest.shards[shard].name}, row {row}, tokens {start} .. {stop - 1}"
    return f"row {number}: {place}\n{text}"
