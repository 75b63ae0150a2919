"""What a rank does between its start and its exit code: set up, train, close, and say why it ended."""

import os
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path

import torch

from megascale.config.load import load_config
from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_RUN, PEER_LOST_WORDS, MegascaleError, StopRequested
from megascale.parallel.heartbeat import Heartbeat, Phase
from megascale.parallel.mesh import close_mesh, read_rank_info
from megascale.train.loop import train
from megascale.train.setup import set_up
from megascale.train.signals import StopRequest
from megascale.train.start_options import StartOptions


def train_as_rank(arguments: list[str], stop: StopRequest, pulse: Heartbeat) -> int:
    """Runs the rank to its end, prints why it ended, and returns the exit code."""
    try:
        run_rank(arguments, stop, pulse)
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


def run_rank(arguments: list[str], stop: StopRequest, pulse: Heartbeat) -> None:
    """Loads the config, sets the run up, trains, and closes what was opened, in whatever way it ends.

    The heartbeat of a run that failed stays in the phase that it failed in.
    """
    options = StartOptions.from_arguments(arguments[1:])
    overrides = [argument for argument in arguments[1:] if not argument.startswith("--")]
    pulse.enter(Phase.LOAD)
    config = load_config(Path(arguments[0]), overrides)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with ExitStack() as at_end:
        run = set_up(config, arguments[0], read_rank_info(dict(os.environ)), stop, pulse, at_end, options)
        status = "failed"
        try:
            train(run)
            status = "finished"
        except StopRequested:
            status = "stopped"
            raise
        finally:
            if status != "failed":
                pulse.enter(Phase.CLOSE)
            run.logger.close(status)
    close_mesh()
