"""The training loop: evaluate and save when due, agree on stopping, take a step, note it."""

import time
from contextlib import closing
from dataclasses import replace

from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.state import RunState
from megascale.config.derive import Derived
from megascale.config.schema import RunConfig
from megascale.engine.base import StepOutput
from megascale.errors import CheckpointError, LeaseLostError, NonFiniteError, StopRequested
from megascale.observe.console import say
from megascale.observe.metrics import TrainRecord
from megascale.optim.schedules import learning_rate
from megascale.train.evaluate import count_labels, evaluate
from megascale.train.setup import Run


def train(run: Run) -> RunState:
    """Trains from `run.start` to the last step and returns the state there.

    Raises:
        StopRequested: a signal asked to stop; the state is saved.
        NonFiniteError: a loss or gradient wasn't finite and the policy is to stop; it wasn't applied.
    """
    state, saved_step = run.start, run.saved_step
    last_step, interval_steps = run.config.train.max_steps, run.config.checkpoint.interval_steps
    with closing(run.loader.steps_from(state.rows)) as steps:
        while True:
            state = evaluate_when_due(run, state)
            is_complete = state.step >= last_step and state.evaluated_step == state.step
            if state.step != saved_step and (is_complete or (state.step and state.step % interval_steps == 0)):
                saved_step = save(run, state, saved_step, is_last=is_complete)
            if is_complete:
                return state
            run.timer.start()
            micro_batches = next(steps)
            own_labels = count_labels(micro_batches) if run.mesh.leads_replica else 0
            num_tokens, num_stops = run.mesh.control_sum([own_labels, int(run.stop.is_set)])
            if num_stops:
                save(run, state, saved_step, is_last=True)
                raise StopRequested(f"stopped at step {state.step} of {last_step}, as asked; the same command resumes")
            rate = rate_of(run.config, run.derived, state.step)
            output = run.engine.train_step(
                micro_batches, step=state.step, num_tokens=num_tokens, learning_rate=rate
            )
            check_finite(run, state, output)
            state = state.advance(output, run.derived.rows_per_step)
            run.timer.stop(num_tokens)
            log_step(run, state, output)


def evaluate_when_due(run: Run, state: RunState) -> RunState:
    """Evaluates at each interval, and on all rows after the last step; a pass cut short by a stop isn't counted."""
    is_last = state.step >= run.config.train.max_steps
    is_due = is_last or (state.step > 0 and state.step % run.config.evaluate.interval_steps == 0)
    if not is_due or state.evaluated_step == state.step:
        return state
    record = evaluate(run, state.step, None if is_last else run.config.evaluate.max_rows)
    if record is None:
        return state
    run.logger.log_eval(record)
    return replace(state, evaluated_step=state.step)


def save(run: Run, state: RunState, saved_step: int | None, *, is_last: bool) -> int | None:
    """Saves a checkpoint and returns its step, or the step of the last one when this one couldn't be saved.

    The last one of a session is the whole point of it, so its failure is never passed over.
    """
    if state.step == saved_step:
        return saved_step
    state = replace(state, optimizer_scalars=run.engine.scalars())
    try:
        save_checkpoint(
            run.folder, run.record, state, run.engine.state_pieces(), comm=run.mesh,
            keep_last=run.config.checkpoint.keep_last,
            check_lease=run.lease.check_held if run.lease else lambda: None,
        )
    except CheckpointError as error:
        if run.config.checkpoint.on_save_error == "stop" or is_last or isinstance(error, LeaseLostError):
            raise
        if run.mesh.rank == 0:
            say(f"warning: {error}. Training goes on; the next save is tried as planned")
        return saved_step
    run.logger.commit(state.step)
    return state.step


def rate_of(config: RunConfig, derived: Derived, step: int) -> float:
    """The learning rate of a step."""
    optimizer, horizon_steps = config.optimizer, derived.horizon_steps
    return learning_rate(
        step,
        kind=optimizer.schedule,
        peak=optimizer.learning_rate,
        horizon_steps=horizon_steps,
        warmup_steps=optimizer.warmup_steps,
        decay_steps=round(optimizer.decay_fraction * horizon_steps),
        min_fraction=optimizer.min_fraction,
    )


def check_finite(run: Run, state: RunState, output: StepOutput) -> None:
    """Stops the run, or lets it go on without the update, when a loss or gradient wasn't finite.

    Raises:
        NonFiniteError: by policy, or after too many skipped steps in a row.
    """
    if not output.is_skipped or output.is_overflow:
        return
    policy, limit = run.config.train.on_nonfinite, run.config.train.max_skipped_steps
    what = f"step {state.step + 1}: not finite: {'; '.join(output.faults)}; the update was not applied"
    if policy == "stop":
        raise NonFiniteError(f"{what} (train.on_nonfinite = stop; `skip` would go on)")
    if state.skipped_in_a_row + 1 >= limit:
        raise NonFiniteError(
            f"{what}, as in the {state.skipped_in_a_row} steps before (train.max_skipped_steps = {limit})"
        )
    if run.mesh.rank == 0:
        say(f"warning: {what} (train.on_nonfinite = skip)")


def log_step(run: Run, state: RunState, output: StepOutput) -> None:
    """Logs the step just taken, when its turn has come."""
    if state.step % run.config.observe.log_interval_steps:
        return
    speed = run.timer.speed(run.config.train.max_steps - state.step)
    run.logger.log_train(TrainRecord(
        step=state.step,
        loss=output.loss,
        learning_rate=rate_of(run.config, run.derived, state.step - 1),
        grad_norm=output.grad_norm,
        tokens_seen=state.tokens,
        step_s=speed.step_s,
        tokens_per_s=speed.tokens_per_s,
        mfu_fraction=speed.mfu_fraction,
        eta_s=speed.eta_s,
        loss_scale=output.loss_scale,
        is_skipped=output.is_skipped,
        unix_s=time.time(),
    ))
