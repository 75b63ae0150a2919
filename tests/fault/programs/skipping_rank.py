"""A gloo rank that takes part in a few collectives, of which one rank skips the last; then it dumps when asked."""

import os
import sys
import time

import torch
import torch.distributed as dist

from megascale.parallel.heartbeat import Heartbeat
from megascale.train.watch import start_watch


def main() -> None:
    """Arguments: the file of the rendezvous, the rank that skips, and `skip` or `other` for another collective."""
    store, odd, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start_watch(os.environ, Heartbeat())
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    group = dist.new_group(list(range(world_size)), group_desc="dp_cp")
    for _ in range(3):
        dist.all_reduce(torch.ones(5), group=group)
    print("ready", flush=True)
    if rank != odd:
        dist.all_reduce(torch.ones(7), group=group)
    elif how == "other":
        dist.barrier(group=group)
    time.sleep(600)


if __name__ == "__main__":
    main()
