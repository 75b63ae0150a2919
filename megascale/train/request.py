"""How a rank that serves one request of a command begins and ends; the request is JSON on its command line."""

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

import torch

from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_RUN, PEER_LOST_WORDS, MegascaleError
from megascale.parallel.mesh import close_mesh
from megascale.train.signals import stop_when_parent_dies


def serve_request(work: Callable[[dict], None], request: str) -> NoReturn:
    """Does the work that a request asks for and ends the process with its exit code, as a training rank does."""
    stop_when_parent_dies()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    code = EXIT_OK
    try:
        work(json.loads(request))
        close_mesh()
    except MegascaleError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:  # a full disk; or a peer that is gone, which has the reason
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_PEER_LOST if isinstance(error, ConnectionError) else EXIT_RUN
    except Exception as error:
        traceback.print_exc()
        code = EXIT_PEER_LOST if any(word in str(error) for word in PEER_LOST_WORDS) else EXIT_RUN
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
