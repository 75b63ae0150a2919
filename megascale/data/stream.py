"""The rows that a run trains on, from its config: which corpora, in which order, and what is made of them.

Without torch, so that tools can read a run's rows as the run did.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megascale.config.derive import Derived
from megascale.config.schema import RunConfig
from megascale.data.fetch import read_bytes
from megascale.data.images import image_objective
from megascale.data.location import join
from megascale.data.manifest import INDEX_FILE
from megascale.data.masked import build_masked
from megascale.data.mixture import resolve_mixture
from megascale.data.objectives import Causal, RowObjective, row_shape, wants_partners
from megascale.data.order import CorpusShape, Places, RowOrder
from megascale.data.pairs import build_pairs
from megascale.data.permutation import derive_key
from megascale.data.plan import ReadingPlan, plan_reading
from megascale.data.row import Row
from megascale.data.rows import Corpus, open_corpus
from megascale.data.spans import build_spans
from megascale.data.transfer import Access, access_of
from megascale.errors import DataError

FIM_KEY, OBJECTIVE_KEY = 3, 4
"""Separate what is drawn for a row from the hashes of the order, which has 1 and 2."""


@dataclass(frozen=True)
class CorpusRecord:
    """What a checkpoint says of a corpus: all that its rows depend on beside the config.

    Attributes:
        fingerprint: of its training split, see `Manifest.fingerprint`.
        fim_fraction: share of its documents rearranged to fill in the middle.
    """

    fingerprint: str
    fim_fraction: float


@dataclass(frozen=True)
class StageRecord:
    """What a checkpoint says of a mixture: the row number from which it holds, and rows of each corpus in a period."""

    first_row: int
    counts: dict[str, int]


@dataclass(frozen=True)
class StreamRecord:
    """What a checkpoint says of the stream, beside the config and its position."""

    corpora: dict[str, CorpusRecord]
    stages: tuple[StageRecord, ...]


class Fault(NamedTuple):
    """A shard that some rows couldn't be read from.

    Attributes:
        corpus: its name.
        shard: path or url.
        reason: what the reader said.
        rows: the row numbers, which have no labels.
    """

    corpus: str
    shard: str
    reason: str
    rows: tuple[int, ...]


class ReadRows(NamedTuple):
    """Rows and where they lie; None is a row that a fault masks."""

    rows: list[Row | None]
    places: Places
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Stream:
    """The training rows of a run, by row number.

    Attributes:
        corpora: in the order of their names.
        order: over these corpora.
        objective: makes inputs and labels of rows.
        seed: of the run.
        masks_faults: whether a row that can't be read is masked; if not, it is an error.
    """

    corpora: tuple[Corpus, ...]
    order: RowOrder
    objective: RowObjective
    seed: int
    masks_faults: bool = False

    def read(self, row_numbers: Sequence[int] | np.ndarray) -> ReadRows:
        """Reads rows as the run trains on them, rearranged documents included.

        Raises:
            DataError: a shard is missing or damaged, and faults aren't masked.
        """
        row_numbers = np.asarray(row_numbers, np.int64)
        return self.read_at(row_numbers, self.order.locate(row_numbers))

    def read_at(self, row_numbers: np.ndarray, places: Places) -> ReadRows:
        """The same for rows that `order` has located."""
        keys = derive_key(self.seed, FIM_KEY, row_numbers).tolist()
        rows, faults = [], {}
        located = zip(row_numbers.tolist(), keys, self._listed(places), self._partners(row_numbers), strict=True)
        for row_number, key, (number, shard, row), partner in located:
            corpus = self.corpora[number]
            try:
                found = corpus.read(shard, row)
                found = corpus.fim.transform(found, key) if corpus.fim else found
                if partner is not None:
                    number, shard, row = partner
                    corpus = self.corpora[number]
                    found = found._replace(partner=corpus.read(shard, row).tokens)
                rows.append(found)
            except DataError as error:
                if not self.masks_faults:
                    raise
                rows.append(None)
                fault = (corpus.name, corpus.manifest.shard_place(shard), str(error))
                faults.setdefault(fault, []).append(row_number)
        return ReadRows(rows, places, tuple(Fault(*fault, tuple(numbers)) for fault, numbers in faults.items()))

    def _listed(self, places: Places) -> Iterable[tuple[int, int, int]]:
        """(corpus, shard, row in the shard) of each place."""
        return zip(*(places[at].tolist() for at in (0, 2, 3)), strict=True)

    def _partners(self, row_numbers: np.ndarray) -> Iterable[tuple[int, int, int] | None]:
        """Where the neighbour by number of each row lies; None where the objective doesn't want it."""
        if not wants_partners(self.objective):
            return [None] * len(row_numbers)
        return self._listed(self.order.locate(row_numbers ^ 1))

    def keys_of(self, row_numbers: np.ndarray) -> np.ndarray:
        """The key of each row from which its objective draws."""
        return derive_key(self.seed, OBJECTIVE_KEY, row_numbers)

    def describe(self) -> StreamRecord:
        """What a checkpoint must remember of it."""
        names = [corpus.name for corpus in self.corpora]
        return StreamRecord(
            corpora={
                corpus.name: CorpusRecord(corpus.manifest.fingerprint, corpus.fim.fraction if corpus.fim else 0.0)
                for corpus in self.corpora
            },
            stages=tuple(
                StageRecord(stage.first_row, dict(zip(names, stage.counts, strict=True)))
                for stage in self.order.stages
            ),
        )


def open_stream(config: RunConfig, derived: Derived) -> Stream:
    """Opens the training splits of a run, after the checks that cost no reading of tokens.

    Raises:
        ConfigError, DataError: a corpus that can't be read or doesn't fit, or a mixture that can't be had.
    """
    data, seq_len = config.data, config.train.seq_len
    corpora = tuple(
        open_corpus(name, source, "train", data, seq_len, config.model.vocab_size, *row_shape(config))
        for name, source in data.sources.items()
    )
    check_content(config, corpora)
    check_tokenizers(corpora)
    rows = {corpus.name: corpus.num_rows for corpus in corpora}
    stages = resolve_mixture(data, rows, seq_len, derived.batches, config.train.max_steps)
    shapes = [CorpusShape(corpus.name, corpus.rows_per_shard) for corpus in corpora]
    return Stream(
        corpora=corpora,
        order=RowOrder(shapes, stages, config.run.seed, data.num_lanes, data.window_rows),
        objective=build_objective(config, corpora),
        seed=config.run.seed,
        masks_faults=data.on_bad_shard == "mask",
    )


def open_validation(config: RunConfig) -> tuple[Corpus, ...]:
    """Opens the validation splits of a run's corpora; a corpus without one is left out.

    Raises:
        DataError: none has one, or one doesn't fit.
    """
    data, access = config.data, access_of(config.data)
    has_split = {
        name: source for name, source in data.sources.items()
        if _exists(join(source.folder, "validation", INDEX_FILE), access)
    }
    corpora = tuple(
        open_corpus(
            name, source, "validation", data, config.train.seq_len, config.model.vocab_size, *row_shape(config)
        )
        for name, source in (has_split or data.sources).items()
    )
    check_content(config, corpora)
    check_tokenizers(corpora)
    return corpora


def plan_stream(config: RunConfig, derived: Derived, stream: Stream) -> ReadingPlan:
    """What the run will read of each corpus.

    Raises:
        DataError: more of a corpus than its limits allow.
    """
    tokens = [corpus.manifest.num_tokens for corpus in stream.corpora]
    train = config.train
    return plan_reading(stream.order, tokens, config.data, train.seq_len, derived.batches, train.max_steps)


def build_objective(config: RunConfig, corpora: Sequence[Corpus]) -> RowObjective:
    """What the model learns from a row."""
    if config.model.vision is not None:
        return image_objective(config.model.vision, config.data.objective)
    if config.objective_kind == "mlm":
        return build_masked(config, corpora[0].manifest)
    if config.objective_kind == "span":
        return build_spans(config, corpora[0].manifest)
    if config.objective_kind == "pairs":
        return build_pairs(config, corpora[0].manifest)
    return Causal(config.train.seq_len, corpora[0].manifest.eos_id, config.data.label_document_starts)


def check_tokenizers(corpora: Sequence[Corpus]) -> None:
    """Refuses a blend of tokens that mean different texts."""
    first = corpora[0].manifest
    for corpus in corpora:
        hashes = [manifest.index.tokenizer_sha256 for manifest in (first, corpus.manifest)]
        if hashes[0] != hashes[1]:
            raise DataError(
                f"corpora {corpora[0].name!r} and {corpus.name!r} were made with different tokenizers: sha256"
                f" {hashes[0][:12]}... ({first.index_place}) and {hashes[1][:12]}... ({corpus.manifest.index_place});"
                " make one of them again with the other's: megascale data tokenize SOURCE --tokenizer"
                f" {first.tokenizer_place}"
            )


def check_content(config: RunConfig, corpora: Sequence[Corpus]) -> None:
    """Refuses images where the model reads text, and text where it reads images."""
    for corpus in corpora:
        if corpus.manifest.holds_images != (config.model.vision is not None):
            found, family = ("images", "vit") if corpus.manifest.holds_images else ("text", "one of the others")
            raise DataError(
                f"{corpus.manifest.index_place} holds {found}, which model.family = {config.model.family} doesn't read;"
                f" set model.family to {family}, or name a corpus that fits: megascale data build makes one of text,"
                " megascale data images one of images"
            )


def _exists(place: str, access: Access) -> bool:
    try:
        return bool(read_bytes(place, access))
    except FileNotFoundError:
        return False
