"""Shows what a model reads: a row, decoded, with its source."""

import json
from pathlib import Path

import numpy as np

from megascale.config.data import ONLY_CORPUS, CorpusConfig, DataConfig
from megascale.data.images import IMAGE_START
from megascale.data.manifest import load_manifest, read_tokenizer
from megascale.data.mixture import PERIOD, MixtureStage
from megascale.data.objectives import IMAGE_ROW
from megascale.data.order import CorpusShape, RowOrder
from megascale.data.row import Row
from megascale.data.rows import Corpus, open_corpus
from megascale.data.stream import Stream
from megascale.data.tokenizer import parse_tokenizer
from megascale.errors import DataError

SKETCH_ROWS, SHADES = 24, " .:-=+*#%@"


def describe_corpus_row(folder: Path, split: str, number: int, seq_len: int, packing: str, seed: int | None) -> str:
    """One row of a corpus as text, with where its pieces come from.

    Args:
        folder: the corpus.
        split: `train` or `validation`.
        number: row number.
        seq_len: input tokens of a row.
        packing: `concat`, `bestfit` or `none`.
        seed: of a run over this corpus alone, whose order numbers the rows; without it they are numbered as they lie
            in the shards.

    Raises:
        DataError: no such corpus or row, or damage.
    """
    manifest, source = load_manifest(str(folder), split), CorpusConfig(folder=str(folder), weight=1.0)
    shape = IMAGE_ROW if manifest.holds_images else ()
    data = DataConfig(folder=str(folder), packing="none" if manifest.holds_images else packing)
    corpus = open_corpus(ONLY_CORPUS, source, split, data, seq_len, manifest.vocab_size, *shape)
    if number < 0 or (seed is None and number >= corpus.num_rows):
        raise DataError(f"--row {number} is not in 0 .. {corpus.num_rows - 1}, the rows of {manifest.index_place}")
    if seed is None:
        epoch, (shard, row) = 0, corpus.locate_unshuffled(number)
    else:
        shape, stage = CorpusShape(ONLY_CORPUS, corpus.rows_per_shard), MixtureStage(0, (PERIOD,))
        order = RowOrder([shape], [stage], seed, data.num_lanes, data.window_rows)
        _, epoch, shard, row = (int(array[0]) for array in order.locate([number]))
    return describe_row(corpus, number, epoch, shard, row, corpus.read(shard, row))


def describe_run_row(stream: Stream, number: int) -> str:
    """One row of a run as text, by its global number, as the run read it.

    Raises:
        DataError: no such row, or damage.
    """
    if number < 0:
        raise DataError(f"row {number} of a run: rows are numbered from 0")
    read = stream.read([number])
    if read.rows[0] is None:
        raise DataError(read.faults[0].reason)
    corpus, epoch, shard, row = (int(array[0]) for array in read.places)
    return describe_row(stream.corpora[corpus], number, epoch, shard, row, read.rows[0])


def describe_row(corpus: Corpus, number: int, epoch: int, shard: int, row: int, read: Row) -> str:
    """A row as text, piece by piece.

    Args:
        corpus: that it is of.
        number: under which it is asked for.
        epoch: of the corpus.
        shard, row: where it lies.
        read: its tokens as they are read, rearranged to fill in the middle or not.
    """
    if read.picture is not None:
        return describe_image(corpus, number, epoch, shard, row, read)
    manifest, pieces = corpus.manifest, corpus.describe(shard, row)
    tokenizer = parse_tokenizer(read_tokenizer(manifest), manifest.tokenizer_place)
    lines = [
        f"row {number}: corpus {corpus.name}, epoch {epoch}, {manifest.shard(shard).name}, row {row}: "
        f"{len(read.tokens)} tokens in {len(pieces)} pieces, {manifest.shard_place(shard)}"
    ]
    for place, tokens in zip(pieces, np.split(read.tokens, read.ends[:-1]), strict=True):
        lines.append(
            f"--- block {place.block}, document {place.document}, tokens {place.start} .. {place.stop - 1} of the shard"
            f"{describe_change(len(tokens), place.stop - place.start, tokens[-1] == manifest.eos_id)}"
        )
        lines.append(tokenizer.decode(tokens.tolist(), skip_special_tokens=False))
    return "\n".join(lines)


def describe_image(corpus: Corpus, number: int, epoch: int, shard: int, row: int, read: Row) -> str:
    """An image: where it lies, what it is, and a sketch of it in characters, dark to light."""
    manifest, (pixels_HWC, label) = corpus.manifest, read.picture
    names = json.loads(read_tokenizer(manifest))["classes"]
    height, width, colours = pixels_HWC.shape
    grey_HW = pixels_HWC.mean(axis=2)[:: max(1, height // SKETCH_ROWS), :: max(1, width // (2 * SKETCH_ROWS))]
    levels_HW = (grey_HW * (len(SHADES) / 256)).astype(int)
    return "\n".join([
        f"row {number}: corpus {corpus.name}, epoch {epoch}, {manifest.shard(shard).name}, image {row}: class {label} "
        f"({names[label]}), {width} x {height} pixels of {colours} colours, {len(read.tokens) - IMAGE_START} bytes",
        *("".join(SHADES[level] for level in line) for line in levels_HW),
    ])


def describe_change(num_read: int, num_tokens: int, is_end: bool) -> str:
    """What is to be said of a piece beside where it lies."""
    notes = ["rearranged to fill in the middle"] if num_read != num_tokens else []
    if not is_end:
        notes.append("the document goes on")
    return f" ({', '.join(notes)})" if notes else ""
