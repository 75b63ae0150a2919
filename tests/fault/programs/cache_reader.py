"""One process of a cache test: opens random shards through the cache and compares every byte with the local corpus.

Arguments: folder of the corpus, its url, cache folder, budget in bytes, opens, seed. It prints a line after its first
open, and then `opens wrong`. A process that is alone with a seed of -1 opens shard 0 only.
"""

import random
import sys
from pathlib import Path

from megascale.data.cache import ShardCache
from megascale.data.manifest import load_manifest
from megascale.data.transfer import Access


def main(folder: str, url: str, cache_folder: str, max_bytes: int, num_opens: int, seed: int) -> None:
    manifest, chance = load_manifest(folder, "train"), random.Random(seed)
    truths = [Path(manifest.shard_place(n)).read_bytes() for n in range(manifest.num_shards)]
    remote = load_manifest(folder, "train")
    remote.folder = url
    cache = ShardCache(Path(cache_folder), max_bytes, Access(attempts=20, timeout_s=10, pause_s=0.001))
    held, wrong = [], 0
    for opened in range(num_opens):
        shard = chance.randrange(manifest.num_shards) if seed >= 0 else 0
        held = [*held[-3:], (shard, cache.open(remote.shard_place(shard), remote.shard(shard)))]
        # Shards opened before are read again: others may have deleted their files meanwhile.
        wrong += sum(memory[:] != truths[number] for number, memory in held)
        if opened == 0:
            print("first", flush=True)
    print(num_opens, wrong, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
