"""Puts a session's logger together: the console, `metrics.jsonl` and W&B on rank 0, nothing on the other ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megascale.config.observe import ObserveConfig
from megascale.observe.console import ConsoleSink
from megascale.observe.jsonl import JsonlSink
from megascale.observe.logger import Logger
from megascale.observe.sinks import Sink


def build_logger(
    config: ObserveConfig,
    rank: int,
    run_folder: Path,
    run_id: str,
    resume_step: int,
    max_steps: int,
    run_config: dict[str, Any],
    warn: Callable[[str], None] = print,
) -> Logger:
    """Builds the sinks that the config asks for; the arguments are those of the sinks.

    Raises:
        OSError: `metrics.jsonl` can't be written; a run that can't record its steps shouldn't start.
    """
    if rank != 0:
        return Logger()
    sinks: list[Sink] = [ConsoleSink(max_steps), JsonlSink(run_folder, resume_step)]
    if config.wandb.mode != "disabled":
        # Here, since importing wandb costs 0.4 s and 60 MB, which only one rank needs to spend.
        from megascale.observe.wandb_sink import WandbSink

        sinks.append(WandbSink(config.wandb, run_id, run_folder, resume_step, run_config, warn))
    return Logger(sinks, warn)
