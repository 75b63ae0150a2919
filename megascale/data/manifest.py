"""What a tokenized corpus consists of, and the checks that cost no reading of tokens.

A corpus is a folder: `tokenizer.json`, and for each split (`train`, `validation`) a folder of tar shards, the table of
the shards `shards.npy`, and `index.json`, which is written last, so that its presence means that the split is complete.
`docs/data_format.md` describes each field.
"""

import hashlib
import io
import json
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from megascale.data.fetch import Access, read_bytes
from megascale.data.location import is_local, join, local_path
from megascale.data.npy import parse_npy
from megascale.errors import DataError

FORMAT_VERSION = 2
INDEX_FILE = "index.json"
TABLE_FILE = "shards.npy"
INDEX_MEMBER = "__index__"
DOCUMENT_DTYPE = np.dtype("<u4")
"""Document ends are counted within a block, which 2^32 tokens bound."""
TABLE_DTYPE = np.dtype([
    ("number", "<i8"), ("bytes", "<i8"), ("tokens", "<i8"), ("documents", "<i8"), ("blocks", "<i8"),
    ("index_offset", "<i8"), ("index_bytes", "<i8"), ("index_crc32", "<i8"), ("sha256", "u1", 32),
])
"""A shard of the table: 96 bytes, so that the table of 150,000 shards is read in a tenth of a second."""


class BlockEntry(NamedTuple):
    """One row of a shard's block table. Offsets are bytes from the start of the tar to the first array element."""

    token_offset: int
    tokens: int
    document_offset: int
    documents: int
    token_crc32: int
    document_crc32: int


class ShardInfo(NamedTuple):
    """One shard of a split, a row of `shards.npy`.

    Attributes:
        number: of the shard, in its name and in the keys of its samples.
        bytes: size of the tar file.
        tokens: of all its blocks, the end-of-text tokens included.
        documents: of all its blocks.
        blocks: its WebDataset samples.
        index_offset: byte at which the content of the `__index__` member begins.
        index_bytes: size of that content.
        index_crc32: checksum of that content: the offsets and checksums in it can be trusted once it matches.
        sha256: hash of the whole tar file, in hexadecimal.
    """

    number: int
    bytes: int
    tokens: int
    documents: int
    blocks: int
    index_offset: int
    index_bytes: int
    index_crc32: int
    sha256: str

    @property
    def name(self) -> str:
        """File name within the split's folder."""
        return shard_name(self.number)


class Index(BaseModel):
    """The content of `index.json`: strict, unknown fields refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    format_version: Literal[2]
    """Version of the format."""
    split: str
    """`train` or `validation`, also the name of the sub-folder."""
    dtype: Literal["uint8", "uint16", "uint32"]
    """Type of a token on disk, little endian: uint16 where the vocabulary has at most 65,536 entries. uint8: the split
    holds images, and its "tokens" are the bytes of their samples."""
    vocab_size: PositiveInt
    """Every token id, or class of an image, is below it."""
    eos_id: NonNegativeInt
    """The token that ends each document."""
    text_bytes: NonNegativeInt
    """UTF-8 bytes of the split's documents: turns nats per token into bits per byte."""
    tokenizer_file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the tokenizer's file within the corpus folder."""
    tokenizer_sha256: str
    """Hash of that file, in hexadecimal."""
    num_shards: PositiveInt
    """Rows of `shards.npy`."""
    num_tokens: PositiveInt
    """Tokens of all shards."""
    num_documents: PositiveInt
    """Documents of all shards."""
    table_sha256: str
    """Hash of `shards.npy`, in hexadecimal; through it the index pins every byte of the split."""


class Manifest:
    """One split of a corpus: its index and the table of its shards.

    Args:
        folder: local path or url of the corpus. Not stored, so that a corpus can be moved.
        index: `index.json`.
        table: `shards.npy`, of TABLE_DTYPE.
    """

    def __init__(self, folder: str, index: Index, table: np.ndarray):
        self.folder, self.index, self.table = folder, index, table

    @property
    def split(self) -> str:
        return self.index.split

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def eos_id(self) -> int:
        return self.index.eos_id

    @property
    def text_bytes(self) -> int:
        return self.index.text_bytes

    @property
    def num_shards(self) -> int:
        return self.index.num_shards

    @property
    def num_tokens(self) -> int:
        return self.index.num_tokens

    @property
    def num_documents(self) -> int:
        return self.index.num_documents

    @property
    def holds_images(self) -> bool:
        """Whether its documents are images, each a sample of its own, see `megascale.data.images`."""
        return self.index.dtype == "uint8"

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype(self.index.dtype).newbyteorder("<")

    @property
    def index_place(self) -> str:
        """Path or url of `index.json`, for messages."""
        return join(self.folder, self.split, INDEX_FILE)

    @property
    def tokenizer_place(self) -> str:
        """Path or url of the tokenizer."""
        return join(self.folder, self.index.tokenizer_file)

    @cached_property
    def fingerprint(self) -> str:
        """Names the content of the split: equal fingerprints mean equal rows in an equal order."""
        content = f"{self.index.tokenizer_sha256} {self.index.dtype} {self.index.table_sha256}\n"
        return hashlib.sha256(content.encode()).hexdigest()

    def shard(self, position: int) -> ShardInfo:
        """The shard at a position of the table."""
        *numbers, sha256 = self.table[position].item()
        return ShardInfo(*numbers, bytes(sha256).hex())

    def shard_place(self, position: int) -> str:
        """Path or url of the shard at a position of the table."""
        return join(self.folder, self.split, shard_name(int(self.table["number"][position])))


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def table_of(shards: list[ShardInfo]) -> np.ndarray:
    """The table of some shards, in their order."""
    rows = [(*shard[:-1], tuple(bytes.fromhex(shard.sha256))) for shard in shards]
    return np.array(rows, TABLE_DTYPE)


def table_bytes(table: np.ndarray) -> bytes:
    """The content of `shards.npy`."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, table, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def index_bytes(index: Index) -> bytes:
    """The content of `index.json`."""
    return (json.dumps(index.model_dump(), indent=1) + "\n").encode()


def load_manifest(folder: str, split: str, access: Access | None = None) -> Manifest:
    """Reads the index of one split and the table of its shards.

    Raises:
        DataError: no such corpus or split, an index that isn't one, or a table that isn't the index's.
    """
    place, access = join(str(folder), split, INDEX_FILE), access or Access()
    try:
        content = read_bytes(place, access)
    except FileNotFoundError:
        raise DataError(_missing_index(str(folder), split, place)) from None
    index = _parse_index(content, place)
    table_place = join(str(folder), split, TABLE_FILE)
    try:
        table_content = read_bytes(table_place, access)
    except FileNotFoundError:
        raise DataError(
            f"{table_place} is missing, and {place} names its hash; restore it, or make the index again with: "
            f"megascale data index {folder}"
        ) from None
    found = hashlib.sha256(table_content).hexdigest()
    if found != index.table_sha256:
        raise DataError(
            f"{table_place} isn't the table that {place} was written with: sha256 {found[:12]}..., expected "
            f"{index.table_sha256[:12]}...; restore it, or make the index again with: megascale data index {folder}"
        )
    return Manifest(str(folder), index, _parse_table(table_content, table_place, index))


def _parse_table(content: bytes, place: str, index: Index) -> np.ndarray:
    try:
        table = parse_npy(content, TABLE_DTYPE, (index.num_shards,))
    except ValueError as error:
        raise DataError(f"{place} is no table of shards ({error}); make it again with: megascale data index") from None
    counts = int(table["tokens"].sum()), int(table["documents"].sum())
    expected = index.num_tokens, index.num_documents
    if counts != expected:
        raise DataError(
            f"{place} counts (tokens, documents) = {counts}, its index {expected}; make it again with: megascale data "
            "index"
        )
    return table


def _parse_index(content: bytes, place: str) -> Index:
    remedy = "restore it, or make it again from the shards with: megascale data index FOLDER"
    try:
        return Index.model_validate(json.loads(content))
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        raise DataError(f"{place} is no index of format {FORMAT_VERSION} ({faults}); {remedy}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{place} can't be read ({error}); {remedy}") from None


def _missing_index(folder: str, split: str, place: str) -> str:
    if not is_local(folder):
        return f"no split {split!r} at {folder}: {place} doesn't exist; is the folder the corpus's, and public to you?"
    path = local_path(folder)
    make = f"make one with: megascale data build SOURCE --out {folder}"
    if not path.is_dir():
        return f"no corpus at {folder}: no such folder; {make}"
    found = ", ".join(sorted(child.parent.name for child in path.glob(f"*/{INDEX_FILE}"))) or "none"
    return f"{folder} holds no finished split {split!r} (no {place}; splits found: {found}); {make}"


def check_vocabulary(manifest: Manifest, vocab_size: int) -> None:
    """Refuses a split with token ids that a model of `vocab_size` ids doesn't know."""
    if manifest.holds_images and manifest.vocab_size > vocab_size:
        raise DataError(
            f"the corpus has {manifest.vocab_size} classes, model.vocab_size = {vocab_size} is smaller; set"
            f" model.vocab_size to {manifest.vocab_size} ({manifest.index_place})"
        )
    if manifest.vocab_size > vocab_size:
        raise DataError(
            f"the corpus has {manifest.vocab_size} token ids, model.vocab_size = {vocab_size} is smaller; set "
            f"model.vocab_size to {manifest.vocab_size} or more, or build the corpus with --vocab-size {vocab_size} "
            f"({manifest.index_place})"
        )


def read_tokenizer(manifest: Manifest, access: Access | None = None) -> bytes:
    """The tokenizer of a split: the very one that made its tokens.

    Raises:
        DataError: it is missing or another one.
    """
    place = manifest.tokenizer_place
    try:
        content = read_bytes(place, access or Access())
    except FileNotFoundError:
        raise DataError(
            f"tokenizer {place} is missing ({manifest.index_place} names it); restore it or build the corpus again with"
            " --overwrite"
        ) from None
    found = hashlib.sha256(content).hexdigest()
    if found != manifest.index.tokenizer_sha256:
        raise DataError(
            f"tokenizer {place} isn't the one that made the tokens: sha256 {found[:12]}..., {manifest.index_place} says"
            f" {manifest.index.tokenizer_sha256[:12]}...; restore it or build the corpus again with --overwrite"
        )
    return content


def check_shard_files(manifest: Manifest) -> None:
    """Refuses a local split of which a shard is missing or of another size. Cost: one stat a shard."""
    if is_local(manifest.folder):
        for position in range(manifest.num_shards):
            check_shard_size(manifest, position)


def check_shard_size(manifest: Manifest, position: int) -> None:
    """Refuses a local shard that is missing, cut short or grown."""
    place, expected = manifest.shard_place(position), int(manifest.table["bytes"][position])
    try:
        found = local_path(place).stat().st_size
    except OSError as error:
        raise DataError(
            f"shard {place} can't be opened ({error.strerror}); {manifest.index_place} lists {manifest.num_shards} "
            "shards; restore it or build the corpus again with --overwrite"
        ) from None
    if found != expected:
        raise DataError(
            f"shard {place} has {found} bytes, {manifest.index_place} says {expected}: it was "
            f"{'cut short' if found < expected else 'changed'}; restore it or build the corpus again with --overwrite"
        )
