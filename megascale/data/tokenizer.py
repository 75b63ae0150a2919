"""The tokenizer of a corpus, as the `tokenizers` package reads it."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from megascale.errors import DataError


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a `tokenizer.json` so that it gives a text's own tokens: none cut, none padded, none injected.

    A text that spells a special token is encoded as plain text: otherwise a document could end itself. Encode with
    `add_special_tokens=False`.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    if not Path(path).is_file():
        raise DataError(f"no tokenizer at {path}; train one with: megascale data tokenizer SOURCE --out {path}")
    return parse_tokenizer(Path(path).read_bytes(), str(path))


def parse_tokenizer(content: bytes, place: str) -> Tokenizer:
    """The tokenizer of which `content` is the file, likewise; `place` names it in messages."""
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{place} isn't a tokenizer file ({error}); restore it or train it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, without special tokens.

    Raises:
        DataError: a text has what the vocabulary can't write, which one of single characters may.
    """
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # the library raises bare Exception
        known = tokenizer.get_vocab()
        strange = sorted({each for text in texts for each in text if each not in known})
        raise DataError(
            f"the tokenizer can't write a text ({error}); of its characters the vocabulary lacks"
            f" {', '.join(map(repr, strange[:8]))}: leave them out, or make the tokenizer from text that has them"
        ) from None
