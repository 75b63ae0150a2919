"""Byte-level BPE tokenizers, and those of single characters: training, loading, and what a text becomes."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.settings import EOS_TOKEN
from megascale.data.tokenizer import load_tokenizer, parse_tokenizer
from megascale.errors import DataError

MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end-of-text token: any text can be written with these."""


HUB = "hub:"
"""Begins the name of a tokenizer that is fetched."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Trains a byte-level BPE tokenizer whose token 0 ends a text.

    Args:
        texts: what to learn merges from. The same texts give the same tokenizer.
        vocab_size: entries at most; fewer when the texts have too few pairs to merge.
        special_tokens: further tokens 1, 2, ... that no text becomes.

    Raises:
        DataError: a vocabulary too small for all bytes, or a special token named twice.

    Source: Sennrich et al., arXiv 1508.07909; bytes as symbols as in GPT-2.
    """
    check_vocab_size(vocab_size, special_tokens)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def character_tokenizer(texts: Iterable[str], special_tokens: Sequence[str] = ()) -> Tokenizer:
    """A tokenizer of which each character of the texts is a token, by code point; token 0 ends a text.

    Args:
        texts: all that is ever to be tokenized: another character is refused, since there is no token for it.
        special_tokens: further tokens 1, 2, ... that no text becomes.

    Raises:
        DataError: a special token named twice.

    Source: data/shakespeare_char/prepare.py of github.com/karpathy/nanoGPT, which has no token that ends a text.
    """
    named = check_special_names(special_tokens)
    entries = [*named, *sorted(set().union(*texts) - set(named))]
    tokenizer = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token=""))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(named)
    return tokenizer


def check_special_names(special_tokens: Sequence[str]) -> list[str]:
    """All special tokens, once they are found distinct."""
    named = [EOS_TOKEN, *special_tokens]
    if "" in named or len(set(named)) < len(named):
        raise DataError(f"--special-token: {named} holds an empty token or one twice; {EOS_TOKEN} is always there")
    return named


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str] = ()) -> None:
    """Refuses a vocabulary that can't write every byte, and special tokens that aren't distinct."""
    named = check_special_names(special_tokens)
    needed = MIN_VOCAB_SIZE + len(special_tokens)
    if vocab_size < needed:
        raise DataError(
            f"--vocab-size {vocab_size} is too small for byte-level BPE: 256 bytes and {', '.join(named)} need "
            f"{needed} entries; use {needed} or more"
        )


def check_special_tokens(tokenizer: Tokenizer, special_tokens: Sequence[str], path: str | Path) -> None:
    """Refuses a tokenizer that lacks one of these as a special token."""
    special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    missing = [token for token in special_tokens if token not in special]
    if missing:
        raise DataError(
            f"{path} has no special token {', '.join(missing)}; it has {', '.join(special[:8])}"
            f"{', ...' if len(special) > 8 else ''}: name one of them, or train a tokenizer with --special-token"
        )


def take_tokenizer(place: str, eos_token: str, special_tokens: Sequence[str]) -> bytes:
    """The content of a tokenizer that exists, once it was found fit.

    Args:
        place: its file, or `hub:NAME` to fetch it from the Hugging Face hub.
        eos_token: the token that it must have to end a text.
        special_tokens: others that it must have.

    Raises:
        DataError: it can't be had, isn't a tokenizer, or lacks a token.
    """
    if place.startswith(HUB):
        try:
            content = Tokenizer.from_pretrained(place.removeprefix(HUB)).to_str(pretty=True).encode()
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{place} can't be fetched ({error}); give the path of a tokenizer.json instead") from None
    else:
        load_tokenizer(place)
        content = Path(place).read_bytes()
    tokenizer = parse_tokenizer(content, place)
    find_eos_id(tokenizer, eos_token, place)
    check_special_tokens(tokenizer, special_tokens, place)
    return content


def count_ids(tokenizer: Tokenizer) -> int:
    """One more than the largest token id, which a vocabulary with holes makes larger than its number of entries."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def find_eos_id(tokenizer: Tokenizer, eos_token: str, path: str | Path) -> int:
    """The id of the token that ends a text."""
    eos_id = tokenizer.token_to_id(eos_token)
    if eos_id is None:
        raise DataError(f"{path} has no token {eos_token!r} to end a document with; name its own by --eos-token")
    return eos_id
