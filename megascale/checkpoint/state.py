"""What a run is at one instant, apart from its tensors: a small value that travels through JSON unchanged."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from megascale.engine.base import StepOutput


class Record(BaseModel):
    """Base of everything a checkpoint keeps as JSON: frozen; unknown, missing and mistyped fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunState(Record):
    """The position of a run. A resumed run starts from here and from the tensors, and from nothing else.

    No field has a default, so that a checkpoint that lacks one is refused instead of filled in.

    Attributes:
        step: completed steps, those whose update was withheld included; the step that comes next has this number.
        rows: rows of the data stream that were read, over all replicas: the position of the stream.
        tokens: label tokens that the parameters were updated with.
        skipped_steps: steps so far whose update was withheld because of a non-finite value.
        skipped_in_a_row: how many of these ended the run so far without an update in between.
        evaluated_step: the step at which the model was last evaluated, 0 when it wasn't yet.
        wandb_run_id: the W&B run that a resumed run continues.
        optimizer_scalars: what `Engine.scalars` gave: the optimizer's own step count, the fp16 loss scaler.
    """

    step: int = Field(ge=0)
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    skipped_steps: int = Field(ge=0)
    skipped_in_a_row: int = Field(ge=0)
    evaluated_step: int = Field(ge=0)
    wandb_run_id: str | None
    optimizer_scalars: dict[str, float]

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
        return self.replace(
            step=self.step + 1,
            rows=self.rows + num_rows,
            tokens=self.tokens + (0 if output.is_skipped else output.num_tokens),
            skipped_steps=self.skipped_steps + int(output.is_skipped),
            skipped_in_a_row=self.skipped_in_a_row + 1 if output.is_skipped else 0,
        )

    def replace(self, **changes) -> Self:
        """The same state with some fields changed, checked again."""
        return type(self)(**{**dict(self), **changes})
