"""How many rows each shard of a split has, which the order of a run is built on.

For `concat` the table of the shards says it. For other packings it takes the document ends of every shard, so the
counts are kept in a file beside the index, named after all that they depend on.
"""

import io
import os
import secrets
from contextlib import suppress

import numpy as np

from megascale.data.fetch import read_bytes
from megascale.data.location import is_local, join, local_path
from megascale.data.manifest import Manifest
from megascale.data.npy import parse_npy
from megascale.data.packing import Packing, count_concat_rows, plan_pieces
from megascale.data.shards import map_shard
from megascale.data.transfer import Access
from megascale.errors import DataError

COUNT_DTYPE = np.dtype("<i8")


def rows_of_shards(manifest: Manifest, packing: Packing, access: Access) -> np.ndarray:
    """Rows of each shard of a split, int64.

    For packings other than `concat` they come from the counts file. A local split without one is counted, which reads
    the document ends of all its shards, and the file is written where the folder may be written to.

    Raises:
        DataError: a counts file that isn't one, or a split elsewhere that has none.
    """
    if packing.kind == "concat":
        return count_concat_rows(manifest.table["tokens"], packing)
    if manifest.holds_images:
        return manifest.table["documents"].astype(COUNT_DTYPE)
    place = counts_place(manifest, packing)
    try:
        return _parse_counts(read_bytes(place, access), manifest, packing)
    except FileNotFoundError:
        pass
    if not is_local(manifest.folder):
        raise DataError(
            f"{manifest.folder} has no counts of the rows of packing = {packing.kind} ({place} doesn't exist), and "
            f"counting reads every shard; where the corpus is local, run: {count_command(manifest, packing)}"
        )
    counts = count_rows_of_split(manifest, packing)
    with suppress(OSError):  # a folder that can't be written to is counted again next time
        store_counts(manifest, packing, counts)
    return counts


def count_rows_of_split(manifest: Manifest, packing: Packing) -> np.ndarray:
    """Counts the rows of each shard of a local split. Cost: about 0.1 s a shard of 2^26 tokens."""
    if packing.kind == "concat":
        return count_concat_rows(manifest.table["tokens"], packing)
    shards = (map_shard(manifest, position) for position in range(manifest.num_shards))
    return np.array([plan_pieces(shard.all_ends(), packing).num_rows for shard in shards], COUNT_DTYPE)


def store_counts(manifest: Manifest, packing: Packing, counts: np.ndarray) -> str:
    """Writes the counts file of a local split, whole or not at all, and returns its place."""
    place = counts_place(manifest, packing)
    path, buffer = local_path(place), io.BytesIO()
    np.lib.format.write_array(buffer, counts.astype(COUNT_DTYPE), version=(1, 0), allow_pickle=False)
    # Ranks and jobs may count at once: each writes a file of its own, and equal files follow one another.
    temporary = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return place


def counts_place(manifest: Manifest, packing: Packing) -> str:
    """Path or url of the counts file; of images, which need none, that of the index."""
    if manifest.holds_images:
        return manifest.index_place
    facts = f"{packing.kind}-{packing.row_tokens}-{packing.overlap}-{packing.spare}"
    return join(manifest.folder, manifest.split, f"rows-{facts}-{manifest.index.table_sha256[:16]}.npy")


def count_command(manifest: Manifest, packing: Packing) -> str:
    """The command that makes the counts file, or that of images the index."""
    if manifest.holds_images:
        return f"megascale data index {manifest.folder}"
    seq_len = packing.row_tokens - packing.overlap
    overlap = "" if packing.overlap == 1 else f" --overlap {packing.overlap}"
    fim = " --fim" if packing.spare else ""
    return f"megascale data count {manifest.folder} --seq-len {seq_len}{overlap} --packing {packing.kind}{fim}"


def _parse_counts(content: bytes, manifest: Manifest, packing: Packing) -> np.ndarray:
    place = counts_place(manifest, packing)
    remedy = f"write it again with: {count_command(manifest, packing)}"
    try:
        counts = parse_npy(content, COUNT_DTYPE, (manifest.num_shards,))
    except ValueError as error:
        raise DataError(f"{place} holds no counts of rows ({error}); {remedy}") from None
    if ((counts < 1) | (counts > manifest.table["tokens"])).any():
        worst = int(np.argmax((counts < 1) | (counts > manifest.table["tokens"])))
        raise DataError(
            f"{place} counts {counts[worst]} rows in {manifest.shard(worst).name}, which has "
            f"{manifest.table['tokens'][worst]} tokens; {remedy}"
        )
    return counts
