"""Groups over gloo with one worker thread each, because torch's default of two corrupts the heap.

Both threads of a group write down what they completed last, in one std::string and without a lock. Names of over 15
characters, such as ALLGATHER_COALESCED, live on the heap, so two writes at a time free one block twice: now and then a
rank died of `malloc(): unaligned tcache chunk detected`. One thread runs the collectives of its group one after the
other, in the order in which all ranks started them.
Source: torch 2.13, torch/csrc/distributed/c10d/ProcessGroupGloo.cpp, `runLoop`: `pgStatus_->lastCompletedWorkName`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroupGloo

INTERFACES_VARIABLE = "GLOO_SOCKET_IFNAME"


class OneThreadGloo(ProcessGroupGloo):
    """torch's group with another number of threads, for which its functions have no argument."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout, options._threads = _devices(), timeout, 1
        super().__init__(store, rank, size, options)


@contextmanager
def one_gloo_thread() -> Iterator[None]:
    """Groups over gloo that are made meanwhile have one thread each, whoever makes them."""
    distributed_c10d.ProcessGroupGloo = OneThreadGloo
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = ProcessGroupGloo


def _devices() -> list[ProcessGroupGloo.Device]:
    """The interfaces that the environment names, else the one with this host's address."""
    names = [name for name in os.environ.get(INTERFACES_VARIABLE, "").split(",") if name]
    if not names:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in names]
