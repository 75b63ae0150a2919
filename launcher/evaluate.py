"""`megascale eval`: scores of a checkpoint, computed by ranks of their own, so that the launcher needs no torch."""

import json
from pathlib import Path

from launcher.local import check_num_ranks, run_local
from launcher.request import run_request
from megascale.errors import ConfigError

EVAL_MODULE = "megascale.train.eval_run"
HARNESS_MODULE = "megascale.train.harness"


def evaluate_run(
    run_folder: Path, step: int | None, overrides: list[str], num_ranks: int, *, ema: bool, max_rows: int | None,
    as_json: bool,
) -> None:
    """Prints loss and hits of a run's checkpoint on its validation splits.

    Args:
        step: of the checkpoint; None for the newest whole one.
        overrides: changes to the run's config, such as `parallel.tp=2`.
        max_rows: the first so many rows of each split; None for all.

    Raises:
        RankFailedError: a rank failed, for the reason in its message.
    """
    check_num_ranks(num_ranks)
    request = {"run_folder": str(run_folder), "step": step, "overrides": overrides, "ema": ema, "max_rows": max_rows,
               "as_json": as_json}
    run_local([json.dumps(request)], num_ranks, EVAL_MODULE)


def evaluate_tasks(run_folder: Path, step: int | None, tasks: str, limit: int | None, *, ema: bool) -> None:
    """Prints what lm-evaluation-harness finds on its tasks.

    Raises:
        ConfigError: no task is named.
        RankFailedError: it isn't installed, or the evaluation failed.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks: name tasks of lm-evaluation-harness, such as --tasks lambada_openai,hellaswag")
    run_request(HARNESS_MODULE, {
        "run_folder": str(run_folder), "step": step, "tasks": names, "limit": limit, "ema": ema,
    })
