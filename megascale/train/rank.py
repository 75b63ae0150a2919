"""One rank of a run: `python -m megascale.train.rank CONFIG [options] [a.b=c ...]`, as every launcher starts it."""

import os
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch

from megascale.config.load import load_config
from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_RUN, PEER_LOST_WORDS, MegascaleError, StopRequested
from megascale.parallel.mesh import close_mesh, read_rank_info
from megascale.train.loop import train
from megascale.train.setup import set_up
from megascale.train.signals import StopRequest, stop_when_parent_dies
from megascale.train.start_options import StartOptions


def main(arguments: list[str]) -> NoReturn:
    """Trains as one of the ranks that the environment describes and ends the process with its exit code.

    Without the interpreter's own ending: when a peer has failed, torch's process groups abort in it, and the abort
    would take the place of the exit code.
    """
    stop_when_parent_dies()
    stop = StopRequest()
    stop.watch()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    code = train_as_rank(arguments, stop)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train_as_rank(arguments: list[str], stop: StopRequest) -> int:
    """Runs the rank to its end, prints why it ended, and returns the exit code."""
    try:
        run_rank(arguments, stop)
        return EXIT_OK
    except StopRequested as reached:
        print(reached, file=sys.stderr)
        return reached.exit_code
    except MegascaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except ConnectionError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_PEER_LOST
    except OSError as error:  # a full disk, a folder that went away: nothing of ours to trace
        print(f"error: {error}", file=sys.stderr)
        return EXIT_RUN
    except Exception as error:
        traceback.print_exc()
        return EXIT_PEER_LOST if any(word in str(error) for word in PEER_LOST_WORDS) else EXIT_RUN


def run_rank(arguments: list[str], stop: StopRequest) -> None:
    """Loads the config, sets the run up, trains, and closes what was opened, in whatever way it ends."""
    options = StartOptions.from_arguments(arguments[1:])
    overrides = [argument for argument in arguments[1:] if not argument.startswith("--")]
    config = load_config(Path(arguments[0]), overrides)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with ExitStack() as at_end:
        run = set_up(config, arguments[0], read_rank_info(dict(os.environ)), stop, at_end, options)
        status = "failed"
        try:
            train(run)
            status = "finished"
        except StopRequested:
            status = "stopped"
            raise
        finally:
            run.logger.close(status)
    close_mesh()


if __name__ == "__main__":
    main(sys.argv[1:])
