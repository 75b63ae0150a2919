"""One real rank of a checkpoint test: saves step 3, finds it, loads it in another layout, then saves step 6.

Arguments: the run folder, and whether rank 1 gets SIGKILL in the second save, at its first fsync.
"""

import os
import signal
import sys
from pathlib import Path

from megascale.checkpoint.find import find_checkpoint
from megascale.checkpoint.load import load_pieces
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.save import save_checkpoint
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import build_mesh, close_mesh, read_rank_info
from tests.support.checkpoint_ranks import RUN, cut_columns, cut_flat, equal_bits, make_tensors, state_at, zeros_like
from tests.support.file_faults import FileCalls, watched_files

SHAPES = {"master/a": (7, 5), "exp_avg/a": (7, 5)}


def main(run_folder: Path, is_killed: bool) -> None:
    info = read_rank_info(os.environ)
    mesh = build_mesh(Layout(pp=1, dp=info.world_size, cp=1, tp=1), info, timeout_s=60)
    tensors = make_tensors(SHAPES)
    mine = cut_flat(tensors, [300_000])[mesh.rank]
    assert find_checkpoint(LocalStore(run_folder), run_id="run-a", comm=mesh) is None
    save_checkpoint(LocalStore(run_folder), RUN, state_at(3), mine, comm=mesh, retention=Retention(1))
    wanted = cut_columns(tensors, mesh.world_size)[mesh.rank]
    loaded, = zeros_like([wanted])
    load_pieces(find_checkpoint(LocalStore(run_folder), run_id="run-a", comm=mesh), loaded, comm=mesh)
    assert equal_bits([loaded], [wanted])
    calls = FileCalls(2 if is_killed and mesh.rank == 1 else 0, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with watched_files(calls):
        save_checkpoint(LocalStore(run_folder), RUN, state_at(6), mine, comm=mesh, retention=Retention(1))
    close_mesh()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "killed")
