"""What a run is at one instant, apart from its tensors: a small value that travels through JSON unchanged."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from megascale.checkpoint.records import MisfitError, check_counts
from megascale.data.ledger import NO_DIGEST, ReadCounts, StepCounts, add_counts, chain_digest

if TYPE_CHECKING:  # which brings torch along; tools that only read checkpoints do without
    from megascale.engine.base import StepOutput


@dataclass(frozen=True)
class RunState:
    """The position of a run. A resumed run starts from here and from the tensors, and from nothing else.

    No field has a default, so that a checkpoint that lacks one is refused instead of filled in.

    Attributes:
        step: completed steps, those whose update was withheld included.
        rows: rows of the data stream that were read, over all replicas: the position of the stream.
        tokens: label tokens that the parameters were updated with.
        skipped_steps: steps so far whose update was withheld because of a non-finite value.
        skipped_in_a_row: how many of these came last, without an update in between.
        evaluated_step: the step at which the model was last evaluated, 0 when it wasn't yet.
        validation_loss: the loss that it had then, in nats per label token; None when it wasn't finite, or before.
        ledger: what was read of each corpus, by its name.
        stream_digest: of every token read, in its place: 16 hexadecimal digits, see `megascale.data.ledger`.
        wandb_run_id: the W&B run that a resumed run continues.
        optimizer_scalars: what `Engine.scalars` gave: the optimizer's own step count, the fp16 loss scaler.
    """

    step: int
    rows: int
    tokens: int
    skipped_steps: int
    skipped_in_a_row: int
    evaluated_step: int
    validation_loss: float | None
    ledger: dict[str, ReadCounts]
    stream_digest: str
    wandb_run_id: str | None
    optimizer_scalars: dict[str, float]

    def __post_init__(self) -> None:
        check_counts(self, "step", "rows", "tokens", "skipped_steps", "skipped_in_a_row", "evaluated_step")
        for name, counts in self.ledger.items():
            if min(counts.rows, counts.tokens, counts.masked_rows) < 0:
                raise MisfitError(f"{counts} has a negative number", "ledger", name)
        if not re.fullmatch(r"[0-9a-f]{16}", self.stream_digest):
            raise MisfitError(f"{self.stream_digest!r} is not 16 hexadecimal digits", "stream_digest")

    @classmethod
    def at_start(cls, wandb_run_id: str | None = None) -> Self:
        """The state of a run that hasn't taken a step."""
        return cls(
            step=0, rows=0, tokens=0, skipped_steps=0, skipped_in_a_row=0, evaluated_step=0, validation_loss=None,
            ledger={}, stream_digest=NO_DIGEST, wandb_run_id=wandb_run_id, optimizer_scalars={},
        )

    def advance(self, output: "StepOutput", counts: StepCounts, corpora: Sequence[str]) -> Self:
        """The state after one more step.

        A skipped step counts as a step, since its rows are gone from the stream; its tokens were not trained on.

        Args:
            counts: of the step's rows over all replicas.
            corpora: the names of the corpora that they count.
        """
        return replace(
            self,
            step=self.step + 1,
            rows=self.rows + sum(read.rows for read in counts.read),
            tokens=self.tokens + (0 if output.is_skipped else counts.labels),
            skipped_steps=self.skipped_steps + int(output.is_skipped),
            skipped_in_a_row=self.skipped_in_a_row + 1 if output.is_skipped else 0,
            ledger=add_counts(self.ledger, corpora, counts.read),
            stream_digest=chain_digest(self.stream_digest, counts.digest_sum),
        )
