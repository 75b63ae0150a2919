"""Sends each record to every sink, on rank 0; observing a run never stops it."""

from collections.abc import Callable, Sequence

from megascale.observe.goodput import GoodputLog
from megascale.observe.metrics import EvalRecord, TrainRecord
from megascale.observe.sinks import Sink, Status


class Logger:
    """Fans out to sinks; without sinks, as on every rank but 0, it does nothing.

    A sink that raises is reported once through `warn`; its later calls are tried again without a word, since a full
    disk or a lost connection may come back. The order of the sinks is the order of the calls: put the JSONL sink before
    the W&B sink, which reads its file. The account of the run's time, where one is kept, is treated as the sinks are.
    """

    def __init__(
        self, sinks: Sequence[Sink] = (), warn: Callable[[str], None] = print, goodput: GoodputLog | None = None
    ):
        self._sinks, self._warn, self._goodput = tuple(sinks), warn, goodput
        self._reported: set[Sink | GoodputLog] = set()

    def note(self, step: int) -> None:
        """Says that a step is completed, logged or not."""
        if self._goodput is not None:
            self._try(self._goodput, lambda: self._goodput.note(step))

    def log_train(self, record: TrainRecord) -> None:
        """Logs a step."""
        self._each(lambda sink: sink.log_train(record))

    def log_eval(self, record: EvalRecord) -> None:
        """Logs an evaluation; call it before `commit` of the same step."""
        self._each(lambda sink: sink.log_eval(record))

    def log_goodput(self) -> None:
        """Logs where the time went; call it when a save begins, so that its line stands among those of its step."""
        if self._goodput is not None:
            self._try(self._goodput, self._log_goodput)

    def commit(self, step: int) -> None:
        """Says that a durable checkpoint of `step` exists; call it after each save, and never before."""
        self._each(lambda sink: sink.commit(step))

    def close(self, status: Status) -> None:
        """Ends the session; may wait for W&B's files, for a bounded time."""
        self._each(lambda sink: sink.close(status))
        if self._goodput is not None:
            self._try(self._goodput, self._goodput.close)

    def _log_goodput(self) -> None:
        record = self._goodput.measure()
        self._each(lambda sink: sink.log_goodput(record))

    def _each(self, call: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            self._try(sink, lambda sink=sink: call(sink))

    def _try(self, sink: Sink | GoodputLog, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._report(sink, error)

    def _report(self, sink: Sink | GoodputLog, error: Exception) -> None:
        if sink in self._reported:
            return
        self._reported.add(sink)
        try:
            self._warn(f"{type(sink).__name__} failed: {error!r}; training goes on, and so do its other logs.")
        except Exception:
            # Standard output may be the very thing that is gone.
            return
