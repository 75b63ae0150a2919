"""Counts the rows of a corpus for a packing, which a run over a corpus elsewhere needs before it starts."""

from pathlib import Path

from megascale.data.fim import NUM_FIM_TOKENS
from megascale.data.manifest import INDEX_FILE, load_manifest
from megascale.data.packing import Packing
from megascale.data.row_counts import count_rows_of_split, store_counts
from megascale.data.rows import TRAIN_SPLIT
from megascale.errors import DataError


def count_rows(folder: Path, seq_len: int, kind: str, has_fim: bool, overlap: int = 1) -> list[str]:
    """Writes the counts file of every split.

    Args:
        folder: the corpus.
        seq_len: tokens from the start of a full row to that of the next one of the same text.
        kind: `bestfit` or `none`; the rows of `concat` follow from the index.
        has_fim: whether documents are rearranged to fill in the middle, which takes room for three tokens each.
        overlap: see `Packing`.

    Returns:
        A line about each split.

    Raises:
        DataError: no such corpus, one of images, a damaged shard, or a folder that can't be written to.
    """
    if kind == "concat":
        raise DataError("--packing concat needs no counts: the index says them; count bestfit or none")
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_FILE}")) or ["train"]
    lines = []
    for split in splits:
        manifest = load_manifest(str(folder), split)
        if manifest.holds_images:
            raise DataError(f"{manifest.index_place} is of images, and says how many there are: they need no counts")
        # Only training documents are rearranged.
        spare = NUM_FIM_TOKENS if has_fim and split == TRAIN_SPLIT else 0
        packing = Packing(kind, seq_len + overlap, overlap, spare)
        counts = count_rows_of_split(manifest, packing)
        try:
            place = store_counts(manifest, packing, counts)
        except OSError as error:
            raise DataError(f"{folder / split} can't be written to ({error.strerror}); mend that") from None
        lines.append(f"{place}: {int(counts.sum()):,} rows in {manifest.num_shards} shards")
    return lines
