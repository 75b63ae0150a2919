"""Reads every byte of a corpus and says what is wrong with it."""

from pathlib import Path

import numpy as np
from rich.console import Console
from webdataset.filters import decode
from webdataset.tariterators import group_by_keys, tar_file_expander

from data_tools.document_hash import hash_documents
from data_tools.image_shards import verify_image_shard
from data_tools.progress import track_bytes
from data_tools.scan import scan_shard
from megascale.data.location import local_path
from megascale.data.manifest import INDEX_FILE, Manifest, ShardInfo, load_manifest, read_tokenizer
from megascale.data.shards import Shard, map_shard
from megascale.errors import DataError


def verify_corpus(folder: Path, console: Console) -> list[Manifest]:
    """Verifies every shard of every split, that no shard is left over, and that no document is in two splits.

    Raises:
        DataError: all that is wrong, one line each.

    Cost: about 0.1 GB/s; 8 bytes of memory a document.
    """
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_FILE}")) or ["train"]
    manifests: list[Manifest] = []
    faults: list[str] = []
    damaged: list[str] = []
    hashes: dict[str, np.ndarray] = {}
    for split in splits:
        try:
            manifest = load_manifest(str(folder), split)
            read_tokenizer(manifest)
        except DataError as error:
            faults.append(str(error))
            continue
        manifests.append(manifest)
        faults += find_strangers(manifest)
        hashes[split] = verify_split(manifest, console, damaged)
    faults += find_shared_documents(hashes, folder)
    if damaged:
        num_shards = sum(manifest.num_shards for manifest in manifests)
        faults += [f"{len(damaged)} of {num_shards} shards of {folder} are damaged:", *damaged]
    if faults:
        raise DataError("\n".join(faults))
    return manifests


def verify_split(manifest: Manifest, console: Console, damaged: list[str]) -> np.ndarray:
    """Verifies the shards of a split; adds a message for each damaged one. Returns the hashes of the documents."""
    hashes = [np.zeros(0, np.uint64)]
    with track_bytes(console, f"verify {manifest.split}", int(manifest.table["bytes"].sum())) as advance:
        for position in range(manifest.num_shards):
            try:
                verify = verify_image_shard if manifest.holds_images else verify_shard
                hashes.append(verify(manifest, position))
            except DataError as error:
                damaged.append(str(error))
            advance(int(manifest.table["bytes"][position]))
    return np.concatenate(hashes)


def verify_shard(manifest: Manifest, position: int) -> np.ndarray:
    """Verifies one shard and returns the hashes of its documents.

    Raises:
        DataError: its first fault; a damaged block before a damaged file, since it says where.
    """
    path, info = local_path(manifest.shard_place(position)), manifest.shard(position)
    shard = map_shard(manifest, position)
    blocks = ((shard.block_tokens(block), shard.document_ends(block)) for block in range(info.blocks))
    hashes = [hash_documents(tokens, ends) for tokens, ends in blocks]
    found = scan_shard(path, manifest.vocab_size, manifest.eos_id)
    for field, value, expected in zip(ShardInfo._fields, found, info, strict=True):
        if value != expected:
            raise DataError(
                f"shard {path}: {field} is {value}, {manifest.index_place} says {expected}; restore it or build the "
                "corpus again with --overwrite"
            )
    compare_with_webdataset(shard, path, info.blocks)
    return np.concatenate(hashes)


def compare_with_webdataset(shard: Shard, path: Path, num_blocks: int) -> None:
    """Refuses a shard of which stock webdataset reads other arrays.

    Its decoder would unpickle a member by the name of .pyd, so this comes after the members were looked at.
    """
    num_samples = 0
    with path.open("rb") as file:
        # Given as a stream: of a path, webdataset takes what follows a `#` or `?` for something else.
        for sample in decode()(group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))):
            tokens, ends = shard.block_tokens(num_samples), shard.document_ends(num_samples)
            if not np.array_equal(sample["tokens.npy"], tokens) or not np.array_equal(sample["docs.npy"], ends):
                raise DataError(f"shard {path}: webdataset reads another block {num_samples} than megascale")
            num_samples += 1
    if num_samples != num_blocks:
        raise DataError(f"shard {path}: webdataset reads {num_samples} samples, the block table has {num_blocks}")


def find_strangers(manifest: Manifest) -> list[str]:
    """A message about shards that lie in the folder and that the index doesn't know: no run would read them."""
    known = {f"shard-{number:06d}.tar" for number in manifest.table["number"].tolist()}
    folder = local_path(manifest.index_place).parent
    strangers = sorted(path.name for path in folder.glob("*.tar") if path.name not in known)
    if not strangers:
        return []
    return [
        f"{folder} holds {len(strangers)} tars that {manifest.index_place} doesn't list, such as {strangers[0]}; remove"
        f" them, or take them in with: megascale data index {manifest.folder}"
    ]


def find_shared_documents(hashes: dict[str, np.ndarray], folder: Path) -> list[str]:
    """A message about documents that are in two splits: a loss on them says nothing about unseen text."""
    if len(hashes) < 2:
        return []
    first, second = list(hashes)[:2]
    shared = np.isin(hashes[second], hashes[first])
    if not shared.any():
        return []
    return [
        f"{int(shared.sum())} of {len(shared)} documents of {folder / second} are in {folder / first} too, the first "
        f"is number {int(np.argmax(shared))}; splits are chosen by a hash of the text, so this one was put together "
        "otherwise: build the corpus again with --overwrite"
    ]
