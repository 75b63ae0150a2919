"""Overlapping collectives of two kinds in one gloo group for a while; prints the threads of all groups of a mesh.

Argument: seconds. Prints a JSON object {threads of each group, collectives}.
"""

import json
import os
import sys
import time

import torch
from torch.distributed import distributed_c10d

from megascale.parallel.layout import Layout
from megascale.parallel.mesh import close_mesh, join_ranks, lay_out_mesh, read_rank_info

CPU = torch.device("cpu")
ROUND = 20


def overlap(backend: distributed_c10d.Backend, seconds: float) -> int:
    """Starts collectives, with one name that a short string holds and one too long for it, and counts them."""
    sent, received, parts = torch.ones(64), torch.empty(64), [[torch.empty(64)]]
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        works = []
        for _ in range(ROUND):
            works += [backend.allgather_coalesced(parts, [sent]), backend.alltoall_base(received, sent, [], [])]
        for work in works:
            work.wait()
        count += len(works)
    return count


def main() -> None:
    info = read_rank_info(dict(os.environ))
    mesh = lay_out_mesh(Layout(dp=info.world_size), info.rank, join_ranks(info, timeout_s=60))
    backends = [group._get_backend(CPU) for group in distributed_c10d._world.pg_map]
    count = overlap(mesh.self_group._get_backend(CPU), float(sys.argv[1]))
    threads = [backend.options._threads for backend in backends]
    print(json.dumps({"threads": threads, "collectives": count}))
    close_mesh()


if __name__ == "__main__":
    main()
