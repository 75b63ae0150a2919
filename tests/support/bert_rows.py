"""Rows for masked language modelling without files: random text of every length, with its neighbours."""

import numpy as np

from megascale.config.bert_rules import mask_fraction
from megascale.config.schema import RunConfig
from megascale.data.batch import Batch
from megascale.data.loader import build_batch
from megascale.data.masked import Masked, MaskTokens
from megascale.data.permutation import derive_key
from megascale.data.row import Row
from megascale.data.words import WordTable

TOKENS = MaskTokens(mask_id=1, cls_id=2, sep_id=3, pad_id=0)
NUM_SPECIAL = 4


def word_table(vocab_size: int) -> WordTable:
    """Text are all ids but the first; every third goes on with the word before it."""
    ids = np.arange(vocab_size)
    return WordTable(ids >= NUM_SPECIAL, (ids >= NUM_SPECIAL) & (ids % 3 == 0), ids >= NUM_SPECIAL)


def build_test_masked(config: RunConfig) -> Masked:
    """The objective of a run, over a made-up tokenizer."""
    objective = config.data.objective
    return Masked(
        config.train.seq_len, TOKENS, word_table(config.model.vocab_size), mask_fraction(config),
        has_whole_words=objective.whole_word, pair_task=objective.pair_task,
        keeps_documents=config.data.document_mask,
    )


def random_row(row_tokens: int, vocab_size: int, number: int) -> Row:
    """A row of two pieces; a third of the rows are full, the others shorter."""
    random = np.random.default_rng(number)
    size = row_tokens if number % 3 == 0 else int(random.integers(4, row_tokens + 1))
    tokens, partner = random.integers(NUM_SPECIAL, vocab_size, (2, size)).astype(np.uint16)
    tokens[1::2] = tokens[0 : size - 1 : 2]  # something to learn
    return Row(tokens, [size // 3, size], size, partner=partner)


def batch_of(masked: Masked, vocab_size: int, seed: int, numbers: range) -> Batch:
    """The batch of rows `numbers` of a step."""
    row_numbers = np.array(numbers)
    rows = [random_row(masked.row_tokens, vocab_size, 1000 * seed + number) for number in numbers]
    return build_batch(masked.assemble(rows, derive_key(seed, row_numbers)), row_numbers, slice(None))
