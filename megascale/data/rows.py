"""A split as rows: what a row number of it reads, and where that comes from. Without torch, for tools and tests."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np

from megascale.config.batch_plan import BatchPlan
from megascale.config.data import CorpusConfig, DataConfig
from megascale.data.fim import NUM_FIM_TOKENS, Fim
from megascale.data.images import decode_sample
from megascale.data.manifest import Manifest, check_vocabulary, load_manifest, read_tokenizer
from megascale.data.packing import ConcatPlan, Packing, Plan, plan_pieces
from megascale.data.row import PiecePlace, Row
from megascale.data.row_counts import count_command, counts_place, rows_of_shards
from megascale.data.store import ShardStore, open_store
from megascale.data.tokenizer import parse_tokenizer
from megascale.data.transfer import Access, access_of
from megascale.errors import ConfigError, DataError

TRAIN_SPLIT = "train"
MAX_PLANS = 256
"""Shards whose plan is kept: as many as are open."""


class Corpus:
    """The rows of a split of one corpus, as they lie in its shards.

    Args:
        name: of the corpus in the config.
        manifest: the split.
        packing: how its documents become rows.
        rows_per_shard: rows of each shard, int64.
        store: gives its shards.
        fim: how its documents are rearranged, which the reader of rows does by the row's key; None: not at all.

    Raises:
        DataError: no row has a label.
    """

    def __init__(
        self, name: str, manifest: Manifest, packing: Packing, rows_per_shard: np.ndarray, store: ShardStore,
        fim: Fim | None = None,
    ):
        self.name, self.manifest, self.packing, self.fim = name, manifest, packing, fim
        self.rows_per_shard, self.num_rows, self.store = rows_per_shard, int(rows_per_shard.sum()), store
        self._first_rows = np.cumsum(rows_per_shard) - rows_per_shard
        self._plan = lru_cache(MAX_PLANS)(self._make_plan)
        if manifest.table["tokens"].max() <= packing.overlap:
            raise DataError(
                f"{manifest.index_place} has {manifest.num_tokens} tokens in {manifest.num_shards} shards: no row of "
                "two tokens or more; build the corpus from more text"
            )

    def read(self, shard: int, row: int) -> Row:
        """Reads a row, before any fill-in-the-middle.

        Raises:
            DataError: the shard is missing or damaged.
        """
        try:
            return self._read(shard, row)
        except DataError:
            if not self.store.renew(shard):  # a copy in the cache that went bad is fetched again, once
                raise
            return self._read(shard, row)

    def _read(self, shard: int, row: int) -> Row:
        planned, opened = self._plan(shard).row(row), self.store.open(shard)
        if self.packing.kind == "concat":
            tokens, ends = opened.read_documents(*planned.ranges[0])
            ends.append(len(tokens))
            return Row(tokens, ends, planned.new_tokens)
        parts = [opened.read(start, stop) for start, stop in planned.ranges]
        tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
        ends = list(accumulate(stop - start for start, stop in planned.ranges))
        if self.manifest.holds_images:
            picture = decode_sample(tokens, self.manifest.vocab_size, f"{opened.place}, image {row}")
            return Row(tokens, ends, planned.new_tokens, picture=picture)
        return Row(tokens, ends, planned.new_tokens, planned.resumed)

    def new_tokens(self, shard: int, row: int) -> int:
        """Tokens of a row that no earlier row has read, from its plan alone."""
        return self._plan(shard).row(row).new_tokens

    def describe(self, shard: int, row: int) -> list[PiecePlace]:
        """Where the pieces of a row come from, in their order in the row."""
        opened, places = self.store.open(shard), []
        for start, stop in self._plan(shard).row(row).ranges:
            bounds = [start, *opened.ends_between(start, stop), stop]
            places += [PiecePlace(*opened.document_of(begin), begin, end) for begin, end in pairwise(bounds)]
        return places

    def locate_unshuffled(self, number: int) -> tuple[int, int]:
        """(shard, row within the shard) of a row in the order of the shards."""
        shard = int(np.searchsorted(self._first_rows, number, "right")) - 1
        return shard, number - int(self._first_rows[shard])

    def _make_plan(self, shard: int) -> Plan:
        if self.packing.kind == "concat":
            return ConcatPlan(int(self.manifest.table["tokens"][shard]), self.packing)
        plan = plan_pieces(self.store.open(shard).all_ends(), self.packing)
        if plan.num_rows != self.rows_per_shard[shard]:
            raise DataError(
                f"shard {self.manifest.shard_place(shard)} has {plan.num_rows} rows of packing = {self.packing.kind}, "
                f"{counts_place(self.manifest, self.packing)} says {self.rows_per_shard[shard]}; write the counts "
                f"again with: {count_command(self.manifest, self.packing)}"
            )
        return plan


def open_corpus(
    name: str, source: CorpusConfig, split: str, data: DataConfig, seq_len: int, vocab_size: int,
    row_tokens: int | None = None, overlap: int = 1,
) -> Corpus:
    """Opens a split of a corpus after the checks that cost no reading of tokens.

    Args:
        name: of the corpus in the config.
        source: the corpus.
        split: `train` or `validation`, which is never rearranged: its loss is that of plain text.
        data: how it is packed and read.
        seq_len: input tokens of a row.
        vocab_size: of the model.
        row_tokens, overlap: see `megascale.data.objectives.row_shape`; when not given, those of the next token.

    Raises:
        DataError: a corpus, tokenizer or counts file that is missing, damaged or doesn't fit the model.
        ConfigError: rows without room for text.
    """
    access = access_of(data)
    manifest = load_manifest(source.folder, split, access)
    check_vocabulary(manifest, vocab_size)
    fim = resolve_fim(name, source, data, manifest, access) if source.fim_fraction and split == TRAIN_SPLIT else None
    packing = Packing(data.packing, row_tokens or seq_len + 1, overlap, spare=NUM_FIM_TOKENS if fim else 0)
    counts = rows_of_shards(manifest, packing, access)
    return Corpus(name, manifest, packing, counts, open_store(manifest, data), fim)


def resolve_fim(name: str, source: CorpusConfig, data: DataConfig, manifest: Manifest, access: Access) -> Fim:
    """The rearrangement of a corpus, with the ids that its tokenizer gives the three tokens.

    Raises:
        DataError: the tokenizer lacks one, or its id is beyond the vocabulary.
    """
    tokenizer = parse_tokenizer(read_tokenizer(manifest, access), manifest.tokenizer_place)
    ids = []
    tokens = {"prefix": data.fim.prefix_token, "middle": data.fim.middle_token, "suffix": data.fim.suffix_token}
    for part, token in tokens.items():
        found = tokenizer.token_to_id(token)
        if found is None or found >= manifest.vocab_size:
            fault = "isn't" if found is None else f"is id {found}, beyond the {manifest.vocab_size} of the corpus,"
            raise DataError(
                f"corpus {name!r} has fim_fraction = {source.fim_fraction}, and data.fim.{part}_token = {token!r} "
                f"{fault} in {manifest.tokenizer_place}; name one that is, build the corpus with --special-token "
                f"{token!r}, or set fim_fraction to 0"
            )
        ids.append(found)
    return Fim(*ids, manifest.eos_id, source.fim_fraction, data.fim.suffix_first_fraction)


def check_batches(corpora: Sequence[Corpus], batches: BatchPlan, micro_rows: int, num_replicas: int) -> None:
    """Refuses steps that can't be dealt out evenly or that the corpora together can't fill."""
    unit = micro_rows * num_replicas
    for size in batches.sizes:
        if size < 1 or size % unit:
            legal = sorted({max(unit, size // unit * unit), (size // unit + 1) * unit})
            raise ConfigError(
                f"a step of {size} rows isn't a multiple of train.micro_batch_size x dp = {micro_rows} x "
                f"{num_replicas} = {unit}; use {' or '.join(map(str, legal))} rows"
            )
    num_rows, largest = sum(corpus.num_rows for corpus in corpora), max(batches.sizes)
    if num_rows < largest:
        packing, fitting = corpora[0].packing, num_rows // unit * unit
        seq_len = packing.row_tokens - packing.overlap
        # Only rows of the next token say how long the model's are.
        of_length, budget, advice = f" of seq_len = {seq_len}", str(fitting * seq_len), ", shorten train.seq_len,"
        if packing.overlap != 1:
            of_length, budget, advice = "", f"{fitting} x train.seq_len", ""
        remedy = f"set train.global_batch_tokens to {budget} or less"
        remedy = remedy if fitting else f"lower train.micro_batch_size x dp = {unit}"
        more = "more images" if corpora[0].manifest.holds_images else "more text"
        places = ", ".join(corpus.manifest.index_place for corpus in corpora)
        raise DataError(
            f"{places}: {num_rows} rows{of_length}, fewer than the {largest} rows of one step; {remedy}{advice} or "
            f"build the corpus from {more}"
        )
