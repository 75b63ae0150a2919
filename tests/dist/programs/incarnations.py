"""Two ranks of one attempt that meet; before that one of them comes as a leftover of an earlier attempt."""

import os

import torch.distributed as dist

from megascale.errors import LaunchError
from megascale.parallel.mesh import close_mesh, join_ranks, read_rank_info
from megascale.parallel.supervision import INCARNATION_VARIABLE


def main() -> None:
    info = read_rank_info(dict(os.environ))
    if info.rank == 1:
        os.environ[INCARNATION_VARIABLE] = "job.0.1"
        try:
            join_ranks(info, timeout_s=60)
        except LaunchError as error:
            print(error)
    os.environ[INCARNATION_VARIABLE] = "job.0.2"
    join_ranks(info, timeout_s=60)
    dist.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
