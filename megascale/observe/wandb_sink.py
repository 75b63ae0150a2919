"""Weights & Biases: follows `metrics.jsonl` up to the newest durable checkpoint, in a thread of its own."""

import contextlib
import json
import netrc
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import wandb

from megascale.config.observe import WandbConfig
from megascale.observe.metrics import EvalRecord, Goodput, TrainRecord, merge_rows
from megascale.observe.redact import redact
from megascale.observe.run_files import METRICS_FILE
from megascale.observe.sinks import Status
from megascale.observe.wandb_files import is_unsynced_offline, mend, session_files

INIT_TIMEOUT_S = 20.0
FINISH_TIMEOUT_S = 30.0

Mode = Literal["online", "offline", "disabled"]


def resolve_mode(config: WandbConfig) -> Mode:
    """Settles the mode: `auto` asks WANDB_MODE first; online needs an API key and is offline without one.

    Without a key wandb would ask for one and wait for the answer.
    """
    wished = os.environ.get("WANDB_MODE", "") if config.mode == "auto" else config.mode
    if wished in ("offline", "disabled"):
        return wished
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether wandb will find credentials where it looks for them: its environment variables, or a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    for path in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
    return False


class WandbSink:
    """Sends each step to one W&B run once, whatever crashes come between, and never holds up training.

    Steps that a crash takes back must not be in W&B, which can't forget them. So a step is sent when a durable
    checkpoint covers it (`commit`), and W&B lags by up to one checkpoint interval. What to send comes from
    `metrics.jsonl`; what W&B already has comes from its server or its offline files. A session thus begins with the
    steps that a crash kept from being sent, and a step that W&B has isn't sent again.

    All calls return at once, `close` excepted, which waits for a bounded time.
    """

    def __init__(
        self,
        config: WandbConfig,
        run_id: str,
        run_folder: Path,
        resume_step: int,
        run_config: dict[str, Any],
        warn: Callable[[str], None] = print,
    ):
        """Starts the thread; build the JSONL sink before, which rewinds the file that this one follows.

        Args:
            config: its section of the run's config.
            run_id: drawn at the first start, from the checkpoint at a resume.
            run_folder: holds `metrics.jsonl` and gets W&B's files, in `wandb/`.
            resume_step: completed steps of the loaded checkpoint, 0 for a fresh start.
            run_config: the resolved config; secrets are redacted here.
            warn: told once, from the thread, when W&B fails.
        """
        self.run_id = run_id
        self._config, self._run_folder, self._warn = config, run_folder.resolve(), warn
        self._run_config = redact(run_config)
        self._mode = resolve_mode(config)
        self._run: wandb.Run | None = None
        self._sent_step = -1
        self._offset = 0
        self._mailbox: queue.SimpleQueue[int | Status] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if self._mode != "disabled":
            self._mailbox.put(resume_step)
            self._thread.start()

    def log_train(self, record: TrainRecord) -> None:
        """Nothing to do: the record is sent from `metrics.jsonl` once a checkpoint covers it."""

    def log_eval(self, record: EvalRecord) -> None:
        """Nothing to do, as for `log_train`."""

    def log_goodput(self, record: Goodput) -> None:
        """Nothing to do, as for `log_train`."""

    def commit(self, step: int) -> None:
        """Lets the steps up to `step` be sent."""
        self._mailbox.put(step)

    def close(self, status: Status) -> None:
        """Ends W&B's session and waits for it, at most INIT_TIMEOUT_S + FINISH_TIMEOUT_S.

        Raises:
            TimeoutError: W&B didn't end in time; the next start of the run sends what is missing.
        """
        self._mailbox.put(status)
        if self._thread.ident is not None:
            self._thread.join(INIT_TIMEOUT_S + FINISH_TIMEOUT_S)
        if self._thread.is_alive():
            raise TimeoutError("W&B didn't end in time; the next start of the run, or `wandb sync`, sends the rest")

    def _work(self) -> None:
        try:
            self._follow()
        except Exception as error:
            self._warn(f"W&B failed: {error!r}; training goes on, the next start of the run sends what is missing.")
            # Else the exit of the process would try to talk to a service that is gone, and print a traceback.
            with contextlib.suppress(Exception):
                wandb.teardown()

    def _follow(self) -> None:
        while not isinstance(message := self._mailbox.get(), str):
            self._send(message)
        if self._run is not None:
            self._run.finish(exit_code=int(message == "failed"))

    def _send(self, committed_step: int) -> None:
        """Sends the steps that the file has, W&B doesn't have, and a checkpoint covers."""
        rows = merge_rows(self._read_committed(committed_step))
        if rows and self._run is None:
            # Not before there is something to send: a run that dies before its first checkpoint leaves no trace.
            self._run = self._open()
        for step, row in rows:
            if step > self._sent_step:
                self._run.log(row, step=step, commit=True)
                self._sent_step = step

    def _read_committed(self, committed_step: int) -> list[dict]:
        lines = []
        with open(self._run_folder / METRICS_FILE, "rb") as file:
            file.seek(self._offset)
            for content in file:
                line = json.loads(content) if content.endswith(b"\n") else None
                if line is None or line["step"] > committed_step:
                    break
                lines.append(line)
                self._offset += len(content)
        return lines

    def _open(self) -> "wandb.Run":
        """Continues the W&B run, and finds out which steps it has."""
        last_steps = {path: mend(path) for path in session_files(self._run_folder, self.run_id)}
        if self._config.mode == "online" and self._mode == "offline":
            self._warn("W&B stays offline: no API key is configured; set WANDB_API_KEY or call `wandb login`.")
        unsynced = [path.parent for path, step in last_steps.items() if step >= 0 and is_unsynced_offline(path)]
        if self._mode == "online" and unsynced:
            # Their steps come before those of this session, and W&B takes steps in order only.
            self._warn(f"W&B stays offline: upload the earlier sessions first, by `wandb sync {unsynced[0].parent}`.")
        elif self._mode == "online":
            try:
                run = self._init("online")
                self._sent_step = run.step - 1
                return run
            except Exception as error:
                self._warn(f"W&B can't be reached, its files stay in {self._run_folder / 'wandb'}: {error}")
                # The service still tries to connect, and would refuse a second run of the same id.
                wandb.teardown()
        self._sent_step = max(last_steps.values(), default=-1)
        return self._init("offline")

    def _init(self, mode: Mode) -> "wandb.Run":
        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            silent=True,
            console="off",
            # No command line, environment, code or git remote: they can hold secrets, and the report has the versions.
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        # Not for the run only: the login before it prints a line as well, through the live progress.
        wandb.setup(wandb.Settings(silent=True))
        return wandb.init(
            mode=mode,
            id=self.run_id,
            resume="allow",
            name=self._run_config.get("run", {}).get("name", self._run_folder.name),
            project=self._config.project,
            entity=self._config.entity,
            tags=self._config.tags,
            config=self._run_config,
            dir=self._run_folder,
            settings=settings,
        )
