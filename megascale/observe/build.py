"""Puts a session's logger together: the console, `metrics.jsonl` and W&B on rank 0, nothing on the other ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.config.observe import ObserveConfig
from megascale.observe.console import ConsoleSink
from megascale.observe.goodput import GoodputLog
from megascale.observe.jsonl import JsonlSink
from megascale.observe.logger import Logger
from megascale.observe.sinks import Sink
from megascale.parallel.heartbeat import Heartbeat


def build_logger(
    config: ObserveConfig,
    rank: int,
    run_folder: Path,
    run_id: str,
    resume_step: int,
    max_steps: int,
    run_config: dict[str, Any],
    warn: Callable[[str], None] = print,
    pulse: Heartbeat | None = None,
) -> Logger:
    """Builds the sinks that the config asks for; the arguments are those of the sinks.

    Args:
        pulse: of this process, for the account of the run's time; None keeps no account.

    Raises:
        OSError: `metrics.jsonl` can't be written; a run that can't record its steps shouldn't start.
    """
    if rank != 0:
        return Logger()
    # First: it reads the end of `metrics.jsonl`, which the JSONL sink cuts off.
    goodput = GoodputLog(run_folder, pulse, resume_step) if pulse else None
    sinks: list[Sink] = [ConsoleSink(max_steps), JsonlSink(run_folder, resume_step)]
    if config.wandb.mode != "disabled":
        # Here, since importing wandb costs 0.4 s and 60 MB, which only one rank needs to spend.
        from megascale.observe.wandb_sink import WandbSink

        sinks.append(WandbSink(config.wandb, run_id, run_folder, resume_step, run_config, warn))
    return Logger(sinks, warn, goodput)
