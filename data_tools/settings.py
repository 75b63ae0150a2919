"""What a corpus is made with."""

from dataclasses import dataclass

EOS_TOKEN = "<|endoftext|>"


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a build; with the source's files and a given tokenizer they determine every byte of the shards.

    Attributes:
        vocab_size: entries at most of the tokenizer to train; without meaning when a tokenizer is given.
        characters: make each character of the source a token, in place of training a tokenizer.
        eos_token: the token that ends a document.
        special_tokens: further tokens without text of their own, such as those of fill-in-the-middle.
        validation_fraction: share of the documents set aside, chosen by their text, so that copies of a text are on
            one side. 0 makes no validation split.
        deduplicate: drop exact copies of an earlier text.
        seed: of the order in which documents are laid into shards.
        shard_tokens: tokens of a shard. 2^26 make files of 128 MiB: large enough for object stores, small enough to
            replace.
        block_tokens: tokens of a block, the unit of checksums. 2^20 are verified in 1 ms.
    """

    vocab_size: int = 4096
    characters: bool = False
    eos_token: str = EOS_TOKEN
    special_tokens: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    deduplicate: bool = False
    seed: int = 0
    shard_tokens: int = 1 << 26
    block_tokens: int = 1 << 20
