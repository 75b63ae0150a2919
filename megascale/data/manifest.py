"""What a tokenized corpus on disk consists of, and the checks that cost no reading of tokens.

A corpus is a folder: `tokenizer.json`, and for each split (`train`, `validation`) a folder of tar shards and an
`index.json`, which is written last, so that its presence means that the split is complete. `docs/data_format.md`
describes each field.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from megascale.errors import DataError

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
INDEX_MEMBER = "__index__"
DOCUMENT_DTYPE = np.dtype("<u4")
"""Document ends are counted within a block, which 2^32 tokens bound."""


class BlockEntry(NamedTuple):
    """One row of a shard's block table. Offsets are bytes from the start of the tar to the first array element."""

    token_offset: int
    tokens: int
    document_offset: int
    documents: int
    token_crc32: int
    document_crc32: int


class Record(BaseModel):
    """Base of what `index.json` holds: frozen, strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)


class ShardInfo(Record):
    """One shard of a split."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
    """File name within the split's folder."""
    bytes: PositiveInt
    """Size of the tar file."""
    sha256: str
    """Hash of the whole tar file, in hexadecimal."""
    tokens: PositiveInt
    """Tokens of all its blocks, the end-of-text tokens included."""
    documents: PositiveInt
    """Documents of all its blocks."""
    blocks: PositiveInt
    """Blocks, which are the WebDataset samples of the tar."""
    index_offset: NonNegativeInt
    """Byte at which the content of the `__index__` member begins."""
    index_bytes: PositiveInt
    """Size of that content."""
    index_crc32: NonNegativeInt
    """Checksum of that content: the offsets and checksums in it can be trusted once it matches."""


class Manifest(Record):
    """One split of a corpus, as its `index.json` describes it."""

    folder: Path = Field(exclude=True)
    """Folder of the corpus. Not stored, so that a corpus can be moved."""
    format_version: Literal[1]
    """Version of the format."""
    split: str
    """`train` or `validation`, also the name of the sub-folder."""
    dtype: Literal["uint16", "uint32"]
    """Type of a token on disk, little endian: uint16 where the vocabulary has at most 65,536 entries."""
    vocab_size: PositiveInt
    """Every token id is below it."""
    eos_id: NonNegativeInt
    """The token that ends each document."""
    text_bytes: NonNegativeInt
    """UTF-8 bytes of the split's documents: turns nats per token into bits per byte."""
    tokenizer_file: str
    """Name of the tokenizer's file within the corpus folder."""
    tokenizer_sha256: str
    """Hash of that file, in hexadecimal."""
    shards: tuple[ShardInfo, ...] = Field(strict=False, min_length=1)
    """The shards in the order of their numbers."""

    @property
    def split_folder(self) -> Path:
        return self.folder / self.split

    @property
    def index_path(self) -> Path:
        return self.split_folder / INDEX_FILE

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / self.tokenizer_file

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Names the content of the split: equal fingerprints mean equal rows in an equal order."""
        digest = hashlib.sha256(f"{self.tokenizer_sha256} {self.dtype}\n".encode())
        for shard in self.shards:
            digest.update(f"{shard.name} {shard.bytes} {shard.sha256} {shard.tokens}\n".encode())
        return digest.hexdigest()

    def shard_path(self, number: int) -> Path:
        return self.split_folder / self.shards[number].name

    def to_json(self) -> str:
        """The content of `index.json`."""
        return json.dumps(self.model_dump(), indent=1) + "\n"


def load_manifest(folder: str | Path, split: str) -> Manifest:
    """Reads the index of one split.

    Raises:
        DataError: no such corpus or split, or an index that isn't one.
    """
    folder = Path(folder)
    path = folder / split / INDEX_FILE
    if not folder.is_dir():
        raise DataError(
            f"no corpus at {folder}: no such folder; make one with: megascale data build SOURCE --out {folder}"
        )
    if not path.is_file():
        found = ", ".join(sorted(child.parent.name for child in folder.glob(f"*/{INDEX_FILE}"))) or "none"
        raise DataError(
            f"{folder} holds no finished split {split!r} (no {path}; splits found: {found}); "
            f"make one with: megascale data build SOURCE --out {folder}"
        )
    try:
        record = json.loads(path.read_bytes())
        return Manifest.model_validate({**record, "folder": folder})
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise DataError(
            f"{path} is no index of format {FORMAT_VERSION} ({faults}); restore it or build the corpus again with "
            f"--overwrite"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} can't be read ({error}); restore the file or build the corpus again with --overwrite"
        ) from None


def check_corpus(manifest: Manifest, vocab_size: int) -> None:
    """Refuses a split that the model can't read or of which files are missing.

    Args:
        manifest: the split.
        vocab_size: token ids that the model knows.

    Raises:
        DataError: vocabulary larger than the model's, tokenizer missing or changed, shard missing or of another size.

    Cost: one stat per shard and one read of the tokenizer; no tokens are read.
    """
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"the corpus has {manifest.vocab_size} token ids, model.vocab_size = {vocab_size} is smaller; set "
            f"model.vocab_size to {manifest.vocab_size} or more, or build the corpus with --vocab-size {vocab_size} "
            f"({manifest.index_path})"
        )
    check_tokenizer(manifest)
    for number in range(len(manifest.shards)):
        check_shard_file(manifest, number)


def check_tokenizer(manifest: Manifest) -> None:
    """Refuses a corpus whose tokenizer is missing or isn't the one that made its tokens."""
    path = manifest.tokenizer_path
    if not path.is_file():
        raise DataError(
            f"tokenizer {path} is missing ({manifest.index_path} names it); restore it or build the corpus again with "
            f"--overwrite"
        )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != manifest.tokenizer_sha256:
        raise DataError(
            f"tokenizer {path} isn't the one that made the tokens: sha256 {found[:12]}..., {manifest.index_path} says "
            f"{manifest.tokenizer_sha256[:12]}...; restore it or build the corpus again with --overwrite"
        )


def check_shard_file(manifest: Manifest, number: int) -> None:
    """Refuses a shard that is missing, cut short or grown."""
    path, expected = manifest.shard_path(number), manifest.shards[number].bytes
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {path} can't be opened ({error.strerror}); {manifest.index_path} lists {len(manifest.shards)} "
            f"shards; restore it or build the corpus again with --overwrite"
        ) from None
    if found != expected:
        raise DataError(
            f"shard {path} has {found} bytes, {manifest.index_path} says {expected}: it was "
            f"{'cut short' if found < expected else 'changed'}; restore it or build the corpus again with --overwrite"
        )
