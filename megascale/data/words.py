"""What a tokenizer's ids are: special tokens, and pieces that go on with a word. Worked out once for all ids."""

import json
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

CONTROL_CHARACTERS = range(256, 290)
"""What byte-level tokenizers write for the bytes 0 to 32 and 127: 256 + the byte, and in order from there."""
SPACE_MARK, SPACES = "▁", ("Ġ", "▁")
"""What SentencePiece writes for a space; a space that is a token, of byte-level tokenizers and SentencePiece."""


class WordTable(NamedTuple):
    """Facts about each id, as bool arrays over the vocabulary.

    Attributes:
        is_text_V: whether it is a piece of text, rather than a special token or no token at all.
        begins_V: whether it may go on with a word that the token before it ends within.
        ends_V: whether a word may go on after it.
    """

    is_text_V: np.ndarray
    begins_V: np.ndarray
    ends_V: np.ndarray

    def word_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each token begins a word. Shape: (T) ids to (T) bool."""
        goes_on = self.begins_V[tokens]
        goes_on[1:] &= self.ends_V[tokens[:-1]]
        goes_on[:1] = False
        return ~goes_on


def build_word_table(tokenizer: Tokenizer, vocab_size: int) -> WordTable:
    """The table of a tokenizer.

    A word is a run of letters, digits and underscores with the space before it, in any script; what else a token may
    be is a word of its own. Of WordPiece the marks say what goes on, and in a vocabulary of whole words nothing does.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    model = json.loads(tokenizer.to_str())["model"]
    table = WordTable(*np.zeros((3, vocab_size), bool))
    for token, number in vocabulary.items():
        if number >= vocab_size or number in special or not token:
            continue
        table.is_text_V[number] = True
        if model["type"] == "WordPiece":
            table.begins_V[number], table.ends_V[number] = token.startswith(model["continuing_subword_prefix"]), True
        elif model["type"] != "WordLevel":
            table.begins_V[number] = is_word_character(token[0])
            table.ends_V[number] = is_word_character(token[-1]) or token in SPACES
    return table


def is_word_character(character: str) -> bool:
    """Whether a character of a token is part of a word; of a byte-level token it may be a part of a letter."""
    if character.isascii():
        return character.isalnum() or character == "_"
    return ord(character) not in CONTROL_CHARACTERS and character != SPACE_MARK
