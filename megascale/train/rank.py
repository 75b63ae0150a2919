"""One rank of a run: `python -m megascale.train.rank CONFIG [--fresh] [a.b=c ...]`, as every launcher starts it."""

import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

from megascale.config.load import load_config
from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_RUN, MegascaleError, StopRequested
from megascale.parallel.mesh import close_mesh, read_rank_info
from megascale.train.loop import train
from megascale.train.setup import set_up
from megascale.train.signals import StopRequest, stop_when_parent_dies

PEER_LOST_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "recvValue failed")


def main(arguments: list[str]) -> int:
    """Trains as one of the ranks that the environment describes and returns the process' exit code."""
    stop_when_parent_dies()
    stop = StopRequest()
    stop.watch()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        run_rank(arguments, stop)
        return EXIT_OK
    except MegascaleError as error:
        print(f"{'' if isinstance(error, StopRequested) else 'error: '}{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        is_secondary = any(word in str(error) for word in PEER_LOST_WORDS)
        return EXIT_PEER_LOST if is_secondary else EXIT_RUN


def run_rank(arguments: list[str], stop: StopRequest) -> None:
    """Loads the config, sets the run up, trains, and closes what was opened, in whatever way it ends."""
    options = {argument for argument in arguments[1:] if argument.startswith("--")}
    overrides = [argument for argument in arguments[1:] if not argument.startswith("--")]
    config = load_config(Path(arguments[0]), overrides)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    run = set_up(config, read_rank_info(dict(os.environ)), stop, is_fresh="--fresh" in options)
    status = "failed"
    try:
        train(run)
        status = "finished"
    except StopRequested:
        status = "stopped"
        raise
    finally:
        run.logger.close(status)
        if run.lease:
            run.lease.release()
    close_mesh()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
