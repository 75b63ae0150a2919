"""Reads every byte of a corpus and says what is wrong with it."""

import hashlib
from pathlib import Path

import numpy as np
from rich.console import Console
from webdataset import WebDataset

from data_tools.progress import track_bytes
from megascale.data.manifest import INDEX_FILE, Manifest, check_tokenizer, load_manifest
from megascale.data.shards import Shard
from megascale.errors import DataError


def verify_corpus(folder: Path, console: Console) -> list[Manifest]:
    """Verifies sizes, hashes, checksums, counts and token ids of every shard, and reads it back as a WebDataset.

    Raises:
        DataError: what is wrong, for all damaged shards at once.
    """
    splits = sorted(path.parent.name for path in folder.glob(f"*/{INDEX_FILE}")) or ["train"]
    manifests = [load_manifest(folder, split) for split in splits]
    faults = []
    for manifest in manifests:
        check_tokenizer(manifest)
        with track_bytes(console, f"verify {manifest.split}", sum(shard.bytes for shard in manifest.shards)) as advance:
            for number, info in enumerate(manifest.shards):
                try:
                    verify_shard(manifest, number)
                except DataError as error:
                    faults.append(str(error))
                advance(info.bytes)
    if faults:
        num_shards = sum(len(manifest.shards) for manifest in manifests)
        raise DataError("\n".join([f"{len(faults)} of {num_shards} shards of {folder} are damaged:", *faults]))
    return manifests


def verify_shard(manifest: Manifest, number: int) -> None:
    """Verifies one shard; raises DataError at its first fault, a damaged block before a damaged file."""
    path, info = manifest.shard_path(number), manifest.shards[number]
    shard = Shard(manifest, number)
    blocks = [(shard.block_tokens(block), shard.document_ends(block)) for block in range(info.blocks)]
    for block, (tokens, ends) in enumerate(blocks):
        if int(ends[-1]) != len(tokens) or not (tokens[ends.astype(np.int64) - 1] == manifest.eos_id).all():
            raise DataError(f"shard {path}: block {block} doesn't end its documents with token {manifest.eos_id}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != info.sha256:
        raise DataError(f"shard {path}: sha256 is {found}, {manifest.index_path} says {info.sha256}")
    samples = list(WebDataset([str(path.resolve())], shardshuffle=False, nodesplitter=None).decode())
    if len(samples) != info.blocks:
        raise DataError(f"shard {path}: webdataset reads {len(samples)} samples, the block table has {info.blocks}")
    for block, ((tokens, ends), sample) in enumerate(zip(blocks, samples, strict=True)):
        if not np.array_equal(sample["tokens.npy"], tokens) or not np.array_equal(sample["docs.npy"], ends):
            raise DataError(f"shard {path}: webdataset reads another block {block} than the block table names")
