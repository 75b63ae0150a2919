"""The metrics on disk: `metrics.jsonl`, the record of a run in which each step stands once."""

import json
import os
from pathlib import Path

from megascale.observe.metrics import KINDS, EvalRecord, Goodput, TrainRecord, to_json_line
from megascale.observe.run_files import METRICS_FILE, read_metrics, write_atomically
from megascale.observe.sinks import Status


def rewind_metrics(run_folder: Path, resume_step: int) -> int:
    """Drops from `metrics.jsonl` what the checkpoint doesn't cover: lines beyond `resume_step`, doubles, torn lines.

    Returns the number of bytes of the file. Of several lines of one kind and step the newest stays.
    Cost: reads the file once, and writes it once when there is something to drop.
    """
    path = run_folder / METRICS_FILE
    if not path.exists():
        return 0
    lines = read_metrics(run_folder, KINDS.values())
    kept = {(line["step"], line["kind"]): line for line in lines if line["step"] <= resume_step}
    content = b"".join((json.dumps(line) + "\n").encode() for line in kept.values())
    if content != path.read_bytes():
        write_atomically(path, content)
    return len(content)


class JsonlSink:
    """Appends records to `metrics.jsonl`, readable while the run goes on.

    Lines that a full disk refuses stay in memory and are written when there is room again; a half-written line is
    cut off first, so the file has whole lines only.
    """

    def __init__(self, run_folder: Path, resume_step: int):
        """Rewinds the file to `resume_step` and opens it.

        Raises:
            OSError: the folder can't be written to.
        """
        self._num_bytes = rewind_metrics(run_folder, resume_step)
        self._descriptor = os.open(run_folder / METRICS_FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._pending: list[bytes] = []

    def log_train(self, record: TrainRecord) -> None:
        """Appends a line; it is in the file when the call returns."""
        self._append(record)

    def log_eval(self, record: EvalRecord) -> None:
        """Appends a line; it is in the file when the call returns."""
        self._append(record)

    def log_goodput(self, record: Goodput) -> None:
        """Appends a line; it is in the file when the call returns."""
        self._append(record)

    def commit(self, step: int) -> None:
        """Makes the lines durable: a checkpoint must not outlive the metrics of its steps."""
        self._write_pending()
        os.fsync(self._descriptor)

    def close(self, status: Status) -> None:
        """Writes what is left and closes the file."""
        try:
            self.commit(step=0)
        finally:
            os.close(self._descriptor)

    def _append(self, record: TrainRecord | EvalRecord | Goodput) -> None:
        self._pending.append(to_json_line(record).encode())
        self._write_pending()

    def _write_pending(self) -> None:
        content = b"".join(self._pending)
        if not content:
            return
        try:
            written = os.pwrite(self._descriptor, content, self._num_bytes)
            if written != len(content):
                raise OSError(f"{METRICS_FILE}: wrote {written} of {len(content)} bytes")
        except OSError:
            os.ftruncate(self._descriptor, self._num_bytes)
            raise
        self._num_bytes += written
        self._pending.clear()
