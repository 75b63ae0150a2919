"""The same byte-level BPE by tiktoken, which is several times faster than tokenizers, where both agree.

tiktoken merges any two neighbours whose concatenation is a token, tokenizers only the pairs that were learnt, and the
two use different regular expression engines. So agreement is not assumed: it is tried on a sample of the text and on
texts that are hard to get right, and again on one document in `RECHECK_EVERY` of a run.
"""

import json
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the pre-tokenizer ByteLevel splits by. Source: tokenizers, pre_tokenizers/byte_level.rs."""
RECHECK_EVERY = 128
"""One document in so many is tokenized both ways: a twentieth of the time."""

WORDS = (
    "naïve café", "Привет, мир", "日本語のテキスト", "안녕하세요", "مرحبا بالعالم", "שלום", "ไทย", "हिन्दी",
    "e\u0301\u0308", "ﬁ ǅ ß İ",
)
AWKWARD_TEXTS = (
    "", " ", "\n", "\r\n", "\t\t x", "a  b   c    d", "x \n\n \n  y", " \u00a0\u2003\u3000 z",
    "\u0085\u2028\u2029\x0b\x0c\x1c\x1f", "don't can't we'll I'VE it's 'tis y'all'd've", "12345 3.14 1e-9 ⅷ ² ٣ 一",
    "def f(x):\n    return {'a': [1, 2]}\n", "!!!???...---===>>>", "<|endoftext|>", "a<|endoftext|><|fim_prefix|>b",
    "</s><s>[INST]", "\x00\x01\x7f\ufeff\ufffd\ufffe", "😀👩‍👩‍👧‍👦🇩🇪👍🏽", "\U0001f9ec\U000e0001\U0010ffff",
    *WORDS, " ".join(WORDS), "a" * 3000, "ab" * 2000, " " * 3000, " " * 2999 + "x", "\n" * 3000, "=" * 3000, "0" * 3000,
    "é" * 2000, "\u200b" * 500, "aA" * 500 + " \t" * 500,
)  # fmt: skip
"""Texts on which engines may differ: white space of every kind, contractions, scripts, control and unassigned
characters, special tokens spelt out, long repetitions."""


class UnknownKindError(Exception):
    """A tokenizer that this file can't translate, and why."""


class FastBpe:
    """A byte-level BPE tokenizer as tiktoken runs it.

    Args:
        content: the `tokenizer.json`.

    Raises:
        UnknownKindError: it isn't of the kind that can be translated, or tiktoken isn't installed.
    """

    def __init__(self, content: bytes):
        try:
            from tiktoken import Encoding
        except ImportError:
            raise UnknownKindError("tiktoken isn't installed: pip install 'megascale[fast]'") from None
        facts = json.loads(content)
        pattern, ranks = read_pattern(facts), read_ranks(facts)
        try:
            self._encoding = Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        except ValueError as error:
            raise UnknownKindError(f"tiktoken refuses it ({error})") from None

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, uint32.

        Raises:
            ValueError: a text that tiktoken's regular expressions can't split, such as a million spaces.
        """
        return self._encoding.encode_to_numpy(text)


def read_pattern(facts: dict) -> str:
    """The regular expression that cuts a text into words before any merge.

    Raises:
        UnknownKindError: the text is changed first, or cut in another way.
    """
    if facts.get("normalizer") is not None:
        raise UnknownKindError(f"it has a normalizer ({facts['normalizer'].get('type')})")
    step = facts.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    *splits, last = steps
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        if not splits and last["use_regex"]:
            return GPT2_PATTERN
        if len(splits) == 1 and not last["use_regex"] and splits[0].get("type") == "Split":
            split = splits[0]
            if split["behavior"] == "Isolated" and not split["invert"] and "Regex" in split["pattern"]:
                return split["pattern"]["Regex"]
    raise UnknownKindError(f"its pre-tokenizer {[step.get('type') for step in steps]} isn't one of GPT-2's kind")


def read_ranks(facts: dict) -> dict[bytes, int]:
    """The id of every token's bytes, special tokens excepted; tiktoken merges the lowest first.

    Raises:
        UnknownKindError: the model isn't BPE over bytes, or ids don't rise in the order of merges.
    """
    model, added = facts["model"], {token["content"]: token for token in facts.get("added_tokens", [])}
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    used = [name for name in options if model.get(name)]
    if model["type"] != "BPE" or used:
        raise UnknownKindError(f"its model is {model['type']} {used or ''}".rstrip())
    if plain := [name for name, token in added.items() if not token["special"]]:
        raise UnknownKindError(f"it adds tokens that aren't special ({', '.join(plain[:3])})")
    byte_of, vocab = byte_level_alphabet(), model["vocab"]
    try:
        ranks = {bytes(byte_of[char] for char in token): n for token, n in vocab.items() if token not in added}
        products = [vocab["".join(pair.split(" ") if isinstance(pair, str) else pair)] for pair in model["merges"]]
    except KeyError as error:
        raise UnknownKindError(f"its vocabulary isn't of bytes ({error})") from None
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UnknownKindError(f"its vocabulary lacks {len(missing)} of the 256 bytes")
    if sorted(set(products)) != products:
        raise UnknownKindError("its ids don't rise in the order of its merges")
    return ranks


def byte_level_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    return alphabet


def find_disagreement(fast: FastBpe, tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """Says on which text both differ, or None."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, encoding in zip(texts, encoded, strict=True):
        try:
            if fast.encode(text).tolist() == encoding.ids:
                continue
        except ValueError as error:
            return f"tiktoken can't take {text[:20]!r}... ({error})"
        return f"the text that begins with {text[:20]!r} becomes other ids"
    return None
