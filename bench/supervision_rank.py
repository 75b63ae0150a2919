"""One rank of `bench.supervision`: takes as many steps as its standard input says, answers with the seconds.

Arguments: a shape of `bench.step_overhead`, a path for the meeting of the ranks. The phases are those of a run's step.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from bench.step_overhead import shape_of
from bench.step_rank import our_step, random_batch
from megascale.parallel.heartbeat import Heartbeat, Phase
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import lay_out_mesh
from megascale.parallel.supervision import HEARTBEAT_VARIABLE
from megascale.train.watch import start_watch

NUM_BATCHES = 8


def main() -> None:
    shape, path, rank = shape_of(sys.argv[1]), os.environ.get(HEARTBEAT_VARIABLE), int(os.environ["RANK"])
    pulse = Heartbeat(Path(path) if path else None)
    start_watch(os.environ, pulse)
    torch.set_num_threads(1)
    size = int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=size)
    mesh = lay_out_mesh(Layout(dp=size), rank, torch.device("cpu"))
    step, done = our_step(shape, "fp32", 1, mesh), 0
    batches = [random_batch(shape, mesh, index) for index in range(NUM_BATCHES)]
    for line in sys.stdin:
        mesh.barrier()
        started_s = time.perf_counter()
        for number in range(done, done + int(line)):
            pulse.begin_step(number, number * shape.rows * size)
            for phase in (Phase.DATA, Phase.AGREE, Phase.COMPUTE):
                pulse.enter(phase)
            step(batches[number % NUM_BATCHES], number)
            pulse.end_step(1e-3)
            pulse.enter(Phase.LOG)
        done += int(line)
        print(time.perf_counter() - started_s, flush=True)


if __name__ == "__main__":
    main()
