"""Makes the index of a corpus again from its shards alone: after a loss, or from an older format."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from data_tools.build_summary import BUILD_FILE
from data_tools.image_shards import scan_image_shard
from data_tools.images import CLASSES_FILE
from data_tools.progress import track_bytes
from data_tools.scan import count_text_bytes, scan_shard, shard_number, token_dtype
from data_tools.settings import EOS_TOKEN
from data_tools.splits import TOKENIZER_FILE
from data_tools.tokenizer import count_ids, find_eos_id
from data_tools.write_shards import write_index
from megascale.data.manifest import (
    INDEX_FILE,
    TABLE_FILE,
    Manifest,
    ShardInfo,
    load_manifest,
    shard_name,
)
from megascale.data.tokenizer import load_tokenizer
from megascale.errors import DataError

PART_SHARDS = 1_000_000
"""Part i of a corpus made by an array of jobs numbers its shards from i times this."""


class Facts(NamedTuple):
    """What shards don't say about a split.

    Attributes:
        vocab_size: every token id is below it.
        eos_id: the token that ends a document.
        tokenizer_file, tokenizer_sha256: the tokenizer within the corpus folder.
        text_bytes, num_tokens: of all shards when an older index was written.
        numbers: of the shards that it lists.
        holds_images: whether documents are images, and `tokenizer_file` the names of their classes.
    """

    vocab_size: int
    eos_id: int
    tokenizer_file: str
    tokenizer_sha256: str
    text_bytes: int = 0
    num_tokens: int = 0
    numbers: frozenset[int] = frozenset()
    holds_images: bool = False

    @property
    def dtype(self) -> str:
        """Of a token on disk; images are bytes."""
        return "uint8" if self.holds_images else token_dtype(self.vocab_size).name


def rebuild_index(folder: Path, console: Console, allow_missing: bool = False) -> list[Manifest]:
    """Writes `shards.npy` and `index.json` of every split again, from the shards and the tokenizer or class names.

    Every byte is read and every checksum in the shards verified. Bytes of text are taken from an older index that
    counts as many tokens, else from the decoded tokens, which is exact for byte-level BPE tokenizers.

    Args:
        folder: the corpus.
        console: where progress is shown.
        allow_missing: index what is there though an older index, or a gap in the numbers, says that shards are missing.

    Raises:
        DataError: no shards, damaged ones (all by name), missing ones, or another tokenizer than the one that made
            them. Nothing was written then.
    """
    splits = sorted({path.parent.name for path in folder.glob("*/shard-*.tar")})
    if not splits:
        raise DataError(f"{folder} has no */shard-NNNNNN.tar to index; give the folder of a corpus")
    written = []
    for split in splits:
        facts = find_facts(folder, split)
        paths = find_shards(folder / split, facts, allow_missing)
        shards = scan_shards(paths, facts, console)
        is_known = facts.holds_images or sum(shard.tokens for shard in shards) == facts.num_tokens
        tokenizer = folder / facts.tokenizer_file
        text_bytes = facts.text_bytes if is_known else count_text_bytes(paths, load_tokenizer(tokenizer))
        written.append((split, facts, shards, text_bytes))
    for split, facts, shards, text_bytes in written:
        write_index(
            folder / split,
            shards,
            split=split,
            dtype=facts.dtype,
            vocab_size=facts.vocab_size,
            eos_id=facts.eos_id,
            text_bytes=text_bytes,
            tokenizer_file=facts.tokenizer_file,
            tokenizer_sha256=facts.tokenizer_sha256,
        )
    return [load_manifest(str(folder), split) for split in splits]


def find_facts(folder: Path, split: str) -> Facts:
    """What shards don't say, from an older index of format 1 or 2 where there is one, else from the tokenizer.

    Raises:
        DataError: no tokenizer, or another than the older index names.
    """
    if (folder / CLASSES_FILE).is_file():
        return find_image_facts(folder, split)
    old = read_old_index(folder / split)
    name = old.tokenizer_file if old else TOKENIZER_FILE
    tokenizer = load_tokenizer(folder / name)
    found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if old is None:
        eos_id = find_eos_id(tokenizer, read_eos_token(folder), folder / name)
        return Facts(count_ids(tokenizer), eos_id, name, found)
    if found != old.tokenizer_sha256:
        raise DataError(
            f"tokenizer {folder / name} isn't the one that made the tokens: sha256 {found[:12]}..., "
            f"{folder / split / INDEX_FILE} says {old.tokenizer_sha256[:12]}...; restore it"
        )
    return old


def find_image_facts(folder: Path, split: str) -> Facts:
    """The same for images, from the names of their classes.

    Raises:
        DataError: such a file that isn't one.
    """
    path, old = folder / CLASSES_FILE, read_old_index(folder / split)
    content = path.read_bytes()
    try:
        num_classes = len(json.loads(content)["classes"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise DataError(f"{path} has no list of classes; restore it, or make the corpus again") from None
    return Facts(
        num_classes, 0, CLASSES_FILE, hashlib.sha256(content).hexdigest(),
        numbers=old.numbers if old else frozenset(), holds_images=True,
    )


def read_old_index(folder: Path) -> Facts | None:
    """What an index of format 1 or 2 says, None when it is missing or can't be trusted."""
    try:
        index = json.loads((folder / INDEX_FILE).read_bytes())
        if index["format_version"] == 1:
            numbers = frozenset(int(shard["name"][6:-4]) for shard in index["shards"])
            num_tokens = sum(shard["tokens"] for shard in index["shards"])
        else:
            numbers, num_tokens = read_old_numbers(folder, index["table_sha256"]), index["num_tokens"]
        return Facts(
            *(index[name] for name in ("vocab_size", "eos_id", "tokenizer_file", "tokenizer_sha256", "text_bytes")),
            num_tokens, numbers,
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def read_old_numbers(folder: Path, sha256: str) -> frozenset[int]:
    """The numbers of the shards of an older table, none when it isn't the one that its index was written with."""
    content = (folder / TABLE_FILE).read_bytes() if (folder / TABLE_FILE).is_file() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        return frozenset()
    return frozenset(load_manifest(str(folder.parent), folder.name).table["number"].tolist())


def read_eos_token(folder: Path) -> str:
    """The text of the end-of-text token, as the build noted it."""
    try:
        return str(json.loads((folder / BUILD_FILE).read_bytes())["recipe"]["eos_token"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return EOS_TOKEN


def find_shards(folder: Path, facts: Facts, allow_missing: bool) -> list[Path]:
    """The shards of a split in the order of their numbers.

    Raises:
        DataError: some that ought to be there aren't.
    """
    numbers = sorted(shard_number(path) for path in folder.glob("shard-*.tar") if path.stem[6:].isdigit())
    lasts = {number // PART_SHARDS: number for number in numbers}
    due = facts.numbers.union(*(range(part * PART_SHARDS, last) for part, last in lasts.items()))
    missing = sorted(due - set(numbers))
    if missing and not allow_missing:
        raise DataError(
            f"{folder}: {len(missing)} shards are missing, such as {shard_name(missing[0])}; restore them, or index "
            "the others with --allow-missing"
        )
    return [folder / shard_name(number) for number in numbers]


def scan_shards(paths: list[Path], facts: Facts, console: Console) -> list[ShardInfo]:
    """Reads shards; raises DataError with a line for each damaged one."""
    shards, faults = [], []
    with track_bytes(console, f"index {paths[0].parent.name}", sum(path.stat().st_size for path in paths)) as advance:
        for path in paths:
            try:
                is_text = not facts.holds_images
                shards.append(scan_shard(path, facts.vocab_size, facts.eos_id) if is_text else scan_image_shard(path))
            except DataError as error:
                faults.append(str(error))
            advance(path.stat().st_size)
    if faults:
        raise DataError("\n".join([
            f"{len(faults)} of {len(paths)} shards of {paths[0].parent} are damaged; restore them, or move them away "
            "and index the others with --allow-missing:", *faults,
        ]))
    return shards
