"""What a run is at one instant, apart from its tensors: a small value that travels through JSON unchanged."""

from dataclasses import dataclass, replace
from typing import Self

from megascale.checkpoint.records import check_counts
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
        wandb_run_id: the W&B run that a resumed run continues.
        optimizer_scalars: what `Engine.scalars` gave: the optimizer's own step count, the fp16 loss scaler.
    """

    step: int
    rows: int
    tokens: int
    skipped_steps: int
    skipped_in_a_row: int
    evaluated_step: int
    wandb_run_id: str | None
    optimizer_scalars: dict[str, float]

    def __post_init__(self) -> None:
        check_counts(self, "step", "rows", "tokens", "skipped_steps", "skipped_in_a_row", "evaluated_step")

    @classmethod
    def at_start(cls, wandb_run_id: str | None = None) -> Self:
        """The state of a run that hasn't taken a step."""
        return cls(
            step=0, rows=0, tokens=0, skipped_steps=0, skipped_in_a_row=0, evaluated_step=0,
            wandb_run_id=wandb_run_id, optimizer_scalars={},
        )

    def advance(self, output: StepOutput, num_rows: int) -> Self:
        """The state after one more step that read `num_rows` rows over all replicas.

        A skipped step counts as a step, since its rows are gone from the stream; its tokens were not trained on.
        """
        return replace(
            self,
            step=self.step + 1,
            rows=self.rows + num_rows,
            tokens=self.tokens + (0 if output.is_skipped else output.num_tokens),
            skipped_steps=self.skipped_steps + int(output.is_skipped),
            skipped_in_a_row=self.skipped_in_a_row + 1 if output.is_skipped else 0,
        )
