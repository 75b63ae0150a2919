"""Byte-level BPE tokenizers: training, loading, and what a text becomes."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.settings import EOS_TOKEN
from megascale.errors import DataError

MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-text token: any text can be written with these."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer whose token 0 ends a text.

    Args:
        texts: what to learn merges from. The same texts give the same tokenizer.
        vocab_size: entries at most; fewer when the texts have too few pairs to merge.

    Raises:
        DataError: a vocabulary too small for all bytes.

    Source: Sennrich et al., arXiv 1508.07909; bytes as symbols as in GPT-2.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    """Refuses a vocabulary that can't write every byte."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"--vocab-size {vocab_size} is too small for byte-level BPE: 256 bytes and {EOS_TOKEN} need "
            f"{MIN_VOCAB_SIZE} entries; use {MIN_VOCAB_SIZE} or more"
        )


def count_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest token id, which a vocabulary with holes makes larger than its number of entries."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def find_eos_id(tokenizer: Tokenizer, eos_token: str, path: str | Path) -> int:
    """The id of the token that ends a text."""
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise DataError(f"{path} has no token {eos_token!r} to end a document with; name its own by --eos-token")
    return eos_id
