"""Works out again what a run has read, and compares it with what the run says of itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from data_tools.locate import ReadRun, open_run
from data_tools.progress import track_bytes
from megascale.checkpoint.find import read_stored_index
from megascale.checkpoint.index import LineageRecord
from megascale.checkpoint.run_file import peek_run_store
from megascale.data.ledger import NO_DIGEST, NOTHING_READ, ReadCounts, chain_digest, digest_rows
from megascale.data.rows import Corpus
from megascale.data.stream import Stream
from megascale.errors import DataError
from megascale.observe.run_files import SKIPS_FILE, read_json_lines

ROWS_AT_ONCE = 1 << 16


class Audit(NamedTuple):
    """What an audit found.

    Attributes:
        table: a line for each corpus, for people.
        faults: each difference between what the run says and what was worked out; none proves it right.
    """

    table: list[str]
    faults: list[str]


def check_auditable(lineage: Sequence[LineageRecord], place: object) -> None:
    """Refuses a run whose earlier rows were read under other settings than its config has now.

    Raises:
        DataError: what was changed, and when.
    """
    for turn in lineage:
        changed = [change.key for change in turn.changes if change.key == "run.seed" or change.key.startswith("data.")]
        if changed:
            raise DataError(
                f"{place}: {', '.join(changed)} changed at step {turn.step}, so the rows before can't be worked out"
                " from the config; audit a checkpoint of the time before, under its own config"
            )


def audit_run(folder: Path, reads_tokens: bool, console: Console) -> Audit:
    """Audits a run up to its newest checkpoint.

    Rows, epochs and tokens of each corpus, and how often each row was read, follow from the config. With
    `reads_tokens`, every row is read again too and the stream digest worked out: equal digests prove that the run read
    exactly these tokens in these rows of these steps.

    Raises:
        DataError, ConfigError, CheckpointError: no run or checkpoint there, or its corpora aren't as it found them.

    Cost: 1 us a row; 4 bytes of memory a row of the corpora. With `reads_tokens`, that of reading the rows.
    """
    run = open_run(folder)
    store = peek_run_store(folder)
    steps = store.steps()
    if not steps:
        raise DataError(f"{folder} has no checkpoint, which keeps the ledger that an audit compares with")
    place = store.path(steps[-1])
    index = read_stored_index(store, steps[-1])
    check_auditable(index.run.lineage, place)
    state = index.state
    num_rows = run.derived.batches.first_row(state.step)
    faults = []
    if num_rows != state.rows:
        faults.append(f"{state.step} steps read {num_rows} rows, {place} says {state.rows}")
    masked, times = read_masked(folder, num_rows), count_reads(run.stream, num_rows)
    masked_places = find_places(run.stream, masked)
    table = [f"{folder}: step {state.step}, {num_rows:,} rows, against {place}"]
    for corpus, counts, places in zip(run.stream.corpora, times, masked_places, strict=True):
        ledger = ledger_of(corpus, counts, places)
        table.append(describe_corpus(corpus, counts, ledger))
        faults += compare(corpus.name, ledger, state.ledger.get(corpus.name, NOTHING_READ))
        if counts.max() - counts.min() > 1:
            faults.append(f"{corpus.name}: one row was read {counts.max()} times, another {counts.min()} times")
    faults += [f"{name}: is in the ledger, but not in the config" for name in state.ledger.keys() - {
        corpus.name for corpus in run.stream.corpora
    }]
    if reads_tokens:
        digest = digest_run(run, state.step, masked, console)
        table.append(f"stream digest {digest}, of every token of every row")
        if digest != state.stream_digest:
            faults.append(f"the stream digest is {digest}, {place} says {state.stream_digest}: other tokens were read")
    return Audit(table, faults)


def read_masked(folder: Path, stop: int) -> np.ndarray:
    """The row numbers below `stop` that the run masked."""
    numbers = {number for line in read_json_lines(folder / SKIPS_FILE) for number in line["rows"] if number < stop}
    return np.array(sorted(numbers), np.int64)


def count_reads(stream: Stream, num_rows: int) -> list[np.ndarray]:
    """How often the first rows of a run read each row of each corpus."""
    times = [np.zeros(corpus.num_rows, np.int32) for corpus in stream.corpora]
    for first in range(0, num_rows, ROWS_AT_ONCE):
        row_numbers = np.arange(first, min(first + ROWS_AT_ONCE, num_rows))
        for counts, places in zip(times, find_places(stream, row_numbers), strict=True):
            np.add.at(counts, places, 1)
    return times


def find_places(stream: Stream, row_numbers: np.ndarray) -> list[np.ndarray]:
    """The rows of each corpus that row numbers read, numbered as they lie in the shards."""
    if not len(row_numbers):
        return [row_numbers for _ in stream.corpora]
    corpora, _, shards, rows = stream.order.locate(row_numbers)
    firsts = [np.cumsum(corpus.rows_per_shard) - corpus.rows_per_shard for corpus in stream.corpora]
    return [firsts[number][shards[corpora == number]] + rows[corpora == number] for number in range(len(firsts))]


def ledger_of(corpus: Corpus, times: np.ndarray, masked_places: np.ndarray) -> ReadCounts:
    """What the ledger of a corpus must say: a shard read whole gives all of its tokens, so only the rest is planned."""
    unmasked, tokens, first = times - np.bincount(masked_places, minlength=len(times)), 0, 0
    for shard, num_rows in enumerate(corpus.rows_per_shard.tolist()):
        reads = unmasked[first : first + num_rows]
        whole = int(reads.min()) if num_rows else 0
        rest = np.repeat(np.arange(num_rows), reads - whole).tolist()
        tokens += whole * int(corpus.manifest.table["tokens"][shard])
        tokens += sum(corpus.new_tokens(shard, row) for row in rest)
        first += num_rows
    return ReadCounts(int(times.sum()), tokens, len(masked_places))


def compare(name: str, found: ReadCounts, said: ReadCounts) -> list[str]:
    """The differences between a ledger and what was worked out."""
    return [
        f"{name}: {getattr(found, field):,} {field.replace('_', ' ')}, the ledger says {getattr(said, field):,}"
        for field in ("rows", "tokens", "masked_rows")
        if getattr(found, field) != getattr(said, field)
    ]


def describe_corpus(corpus: Corpus, times: np.ndarray, ledger: ReadCounts) -> str:
    """A line about a corpus."""
    low, high = int(times.min()), int(times.max())
    often = str(low) if low == high else f"{low} {'or' if high - low == 1 else 'to'} {high}"
    return (
        f"  {corpus.name}: {ledger.rows:,} rows, {ledger.tokens:,} tokens, {ledger.rows / corpus.num_rows:.3f} epochs "
        f"of {corpus.num_rows:,} rows, each read {often} times, {ledger.masked_rows} masked"
    )


def digest_run(run: ReadRun, num_steps: int, masked: np.ndarray, console: Console) -> str:
    """The stream digest of the first steps, from the shards."""
    digest, batches, skipped = NO_DIGEST, run.derived.batches, set(masked.tolist())
    corpus = run.stream.corpora[0]
    row_bytes = 4 * corpus.packing.row_tokens
    if corpus.manifest.holds_images:
        row_bytes = corpus.manifest.num_tokens // corpus.manifest.num_documents
    with track_bytes(console, "audit", batches.first_row(num_steps) * row_bytes) as advance:
        for step in range(num_steps):
            row_numbers = np.arange(batches.first_row(step), batches.first_row(step + 1))
            read = run.stream.read(row_numbers)
            rows = [
                None if number in skipped else row for number, row in zip(row_numbers.tolist(), read.rows, strict=True)
            ]
            lost = [fault for fault in read.faults if not skipped.issuperset(fault.rows)]
            if lost:
                raise DataError(lost[0].reason)
            digest = chain_digest(digest, digest_rows(row_numbers, rows))
            advance(len(rows) * row_bytes)
    return digest
