"""What every destination of the metrics offers."""

from typing import Literal, Protocol

from megascale.observe.metrics import EvalRecord, Goodput, TrainRecord

Status = Literal["finished", "stopped", "failed"]
"""How a session ended: all steps done, asked to stop and saved, or by an error."""


class Sink(Protocol):
    """A destination of metrics. Any call may raise: the logger reports the first fault and training goes on."""

    def log_train(self, record: TrainRecord) -> None:
        """Takes the record of a step."""

    def log_eval(self, record: EvalRecord) -> None:
        """Takes the record of an evaluation."""

    def log_goodput(self, record: Goodput) -> None:
        """Takes the account of the run's time up to the step that is about to be saved."""

    def commit(self, step: int) -> None:
        """Learns that a durable checkpoint covers all steps up to `step`, and that all their records were logged."""

    def close(self, status: Status) -> None:
        """Ends the session."""
