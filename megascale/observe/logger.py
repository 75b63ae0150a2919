"""Sends each record to every sink, on rank 0; observing a run never stops it."""

from collections.abc import Callable, Sequence

from megascale.observe.metrics import EvalRecord, TrainRecord
from megascale.observe.sinks import Sink, Status


class Logger:
    """Fans out to sinks; without sinks, as on every rank but 0, it does nothing.

    A sink that raises is reported once through `warn`; its later calls are tried again without a word, since a full
    disk or a lost connection may come back. The order of the sinks is the order of the calls: put the JSONL sink before
    the W&B sink, which reads its file.
    """

    def __init__(self, sinks: Sequence[Sink] = (), warn: Callable[[str], None] = print):
        self._sinks, self._warn = tuple(sinks), warn
        self._reported: set[Sink] = set()

    def log_train(self, record: TrainRecord) -> None:
        """Logs a step."""
        self._each(lambda sink: sink.log_train(record))

    def log_eval(self, record: EvalRecord) -> None:
        """Logs an evaluation; call it before `commit` of the same step."""
        self._each(lambda sink: sink.log_eval(record))

    def commit(self, step: int) -> None:
        """Says that a durable checkpoint of `step` exists; call it after each save, and never before."""
        self._each(lambda sink: sink.commit(step))

    def close(self, status: Status) -> None:
        """Ends the session; may wait for W&B's files, for a bounded time."""
        self._each(lambda sink: sink.close(status))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                call(sink)
            except Exception as error:
                self._report(sink, error)

    def _report(self, sink: Sink, error: Exception) -> None:
        if sink in self._reported:
            return
        self._reported.add(sink)
        try:
            self._warn(f"{type(sink).__name__} failed: {error!r}; training goes on, and so do its other logs.")
        except Exception:
            # Standard output may be the very thing that is gone.
            return
