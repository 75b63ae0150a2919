"""The training loop: evaluate and save when due, agree on stopping, take a step, note it."""

import math
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import NamedTuple

from megascale.checkpoint.run_file import note_saved
from megascale.checkpoint.state import RunState
from megascale.config.derive import Derived
from megascale.config.schema import RunConfig
from megascale.data.ledger import NOTHING_READ, StepCounts
from megascale.data.loader import StepData
from megascale.data.prefetch import Prefetched
from megascale.engine.base import StepOutput
from megascale.errors import (
    CheckpointError,
    DataError,
    LeaseLostError,
    MegascaleError,
    NonFiniteError,
    StopRequested,
)
from megascale.observe.console import say
from megascale.observe.metrics import EvalRecord, TrainRecord
from megascale.observe.run_files import SKIPS_FILE, SkippedRows, append_skips
from megascale.optim.schedules import learning_rate
from megascale.parallel.heartbeat import Phase
from megascale.train.evaluate import evaluate
from megascale.train.probe import measure_probe
from megascale.train.setup import Run
from megascale.train.signals import STOP_FILE

CHECKED_DIGESTS = 1 << 32
"""Ranks of a replica compare so many values of a step's digest; the sum over any number of ranks fits int64."""
STALL_LOOK_S = 0.5
"""Between two looks at what was asked of the run, while its data isn't there."""


def train(run: Run) -> RunState:
    """Trains from `run.start` to the last step and returns the state there.

    Raises:
        StopRequested: a signal or a file asked to stop; the state is saved.
        CheckpointError: a save failed that the policy, or its importance, doesn't let pass.
        NonFiniteError: a loss or gradient wasn't finite and the policy is to stop; it wasn't applied.
        DataError: a shard is missing or damaged, and the policy or its limit is to stop.
    """
    state, due_step = run.start, run.saver.saved_step
    last_step, interval_steps = run.config.train.max_steps, run.config.checkpoint.interval_steps
    with closing(run.loader.steps_from(state.step)) as steps:
        while True:
            state = evaluate_when_due(run, state)
            is_complete = state.step >= last_step and state.evaluated_step == state.step
            if state.step != due_step and (is_complete or (state.step and state.step % interval_steps == 0)):
                save(run, state, is_last=is_complete)
                due_step = state.step
            if is_complete:
                return state
            run.timer.start()
            run.pulse.begin_step(state.step, run.derived.batches.first_row(state.step))
            data = wait_for_data(run, steps)
            counts, is_stopped, is_save_asked = count_step(run, state, data)
            if is_stopped:
                save(run, state, is_last=True)
                raise StopRequested(describe_stop(run, state))
            if is_save_asked:
                run.stop.clear_save(removes=run.mesh.rank == 0)
                if state.step != due_step:
                    save(run, state, is_last=False)
                    due_step = state.step
            check_masked(run, state, counts)
            output = take_step(run, state, data, counts)
            check_finite(run, state, output)
            state = state.advance(output, counts, run.corpus_names)
            run.timer.stop(worked_tokens(run, state.step - 1, counts))
            log_step(run, state, output if counts.labels else replace(output, loss=math.nan))


def wait_for_data(run: Run, steps: Prefetched) -> StepData | None:
    """This rank's part of the next step; None when a stop was asked for while it wasn't there.

    A rank that waits looks for the file itself, where else rank 0 does for all: the others wait for this one, and so
    can't tell it.
    """
    run.pulse.enter(Phase.DATA)
    while (data := steps.take(STALL_LOOK_S)) is None:
        run.stop.look()
        if run.stop.is_set:
            return None
    return data


def take_step(run: Run, state: RunState, data: StepData, counts: StepCounts) -> StepOutput:
    """Forward, backward and update."""
    run.pulse.enter(Phase.COMPUTE)
    output = run.engine.train_step(
        # A step whose rows are all masked has no label: its gradient is zero, whatever divides it.
        data.micro_batches, step=state.step, num_tokens=max(1, counts.labels),
        learning_rate=rate_of(run.config, run.derived, state.step),
    )
    run.pulse.end_step(output.compute_s)
    return output


def worked_tokens(run: Run, step: int, counts: StepCounts) -> int:
    """Tokens by which the speed of a step is told: those the model works on.

    For the next token these are the labels, so that padding counts as no work. Elsewhere a few positions have labels,
    and an image one for all its patches: there it is all positions of the rows, by which FLOPs are counted too.
    """
    if run.config.objective_kind == "causal":
        return counts.labels
    return run.derived.batches.rows_of(step) * run.config.train.seq_len


class Agreement(NamedTuple):
    """What all ranks know at the start of a step.

    Attributes:
        counts: what the step reads over all replicas; meaningless when it isn't taken.
        is_stopped: whether a rank was asked to stop.
        is_save_asked: whether a save was asked for.
    """

    counts: StepCounts
    is_stopped: bool
    is_save_asked: bool


def count_step(run: Run, state: RunState, data: StepData | None) -> Agreement:
    """What the step about to be taken reads over all replicas, and what was asked of the run. Every rank calls it.

    The one word that all ranks have a step; so the news of a save under way goes with it.

    Args:
        data: None on a rank that was asked to stop before its data came; no rank then takes the step.

    Raises:
        CheckpointError: see `note_save`.
        DataError: ranks of one replica read different rows, which damage that not all of them see can bring about.
    """
    run.pulse.enter(Phase.AGREE)
    mesh = run.mesh
    if mesh.rank == 0:
        run.stop.look()
    own_counts = data.counts if data else StepCounts(0, 0, (NOTHING_READ,) * len(run.corpus_names))
    vector = own_counts.to_vector()
    own = vector if mesh.leads_replica else [0] * len(vector)
    for fault in data.faults if data and mesh.leads_replica else ():
        append_skips(run.folder, SkippedRows(state.step + 1, mesh.rank, *fault))
    # Digests of a replica's ranks cancel out when they are equal. Each replica has a factor of its own, or ranks that
    # read each other's rows would cancel out too.
    share = 1 - mesh.world_size // mesh.layout.dp if mesh.leads_replica else 1
    check = share * (2 * mesh.dp_rank + 1) * own_counts.digest_sum % CHECKED_DIGESTS
    wants_save = mesh.rank == 0 and run.stop.is_save_asked
    num_stops, num_saves, num_done, num_failed, mismatch, *total = mesh.control_sum(
        [int(run.stop.is_set), int(wants_save), *run.saver.report(), check, *own]
    )
    note_save(run, lambda: run.saver.advance(num_done, num_failed))
    if mismatch % CHECKED_DIGESTS and not num_stops:  # a rank without data matches no other
        raise DataError(
            f"step {state.step + 1}: the ranks of a replica read different rows, so a shard is good on one machine and"
            f" damaged or missing on another; {run.folder / SKIPS_FILE} lists what was masked"
        )
    return Agreement(StepCounts.from_vector(total), bool(num_stops), bool(num_saves))


def describe_stop(run: Run, state: RunState) -> str:
    """What a run says that was asked to stop, and has saved."""
    what = f"stopped at step {state.step} of {run.config.train.max_steps}, as asked"
    if run.stop.is_stop_file_there():
        return f"{what} by {run.folder / STOP_FILE}; remove it, and the same command resumes"
    return f"{what}; the same command resumes"


def check_masked(run: Run, state: RunState, counts: StepCounts) -> None:
    """Stops a run of which too many rows were masked.

    Raises:
        DataError: with the number, the limit and where each fault is listed.
    """
    so_far = sum(read.masked_rows for read in state.ledger.values())
    new, limit = sum(read.masked_rows for read in counts.read), run.config.data.max_masked_rows
    if so_far + new > limit:
        raise after_saves(run, DataError(
            f"step {state.step + 1}: {so_far + new} rows of the run could not be read, {new} of them in this step, more"
            f" than data.max_masked_rows = {limit}; {run.folder / SKIPS_FILE} names the shards: restore them, or raise"
            " the limit"
        ))


def evaluate_when_due(run: Run, state: RunState) -> RunState:
    """Evaluates at each interval, and on all rows after the last step; a pass cut short by a stop isn't counted."""
    is_last = state.step >= run.config.train.max_steps
    is_due = is_last or (state.step > 0 and state.step % run.config.evaluate.interval_steps == 0)
    if not is_due or state.evaluated_step == state.step:
        return state
    record = evaluate(run, state.step, None if is_last else run.config.evaluate.max_rows)
    if record is None:
        return state
    if run.config.optimizer.validate_ema:
        average = evaluate_average(run, state.step, None if is_last else run.config.evaluate.max_rows)
        if average is None:
            return state
        record = replace(record, ema_loss=average.loss)
    run.logger.log_eval(record)
    loss = record.loss if math.isfinite(record.loss) else None
    return replace(state, evaluated_step=state.step, validation_loss=loss)


def evaluate_average(run: Run, step: int, max_rows: int | None) -> EvalRecord | None:
    """As `evaluate`, of the averaged weights; afterwards the weights are what they were."""
    run.engine.swap_average()
    try:
        return evaluate(run, step, max_rows)
    finally:
        run.engine.swap_average()


def save(run: Run, state: RunState, *, is_last: bool) -> None:
    """Begins to save, after the save before is done; the last one of a session is waited for.

    The last one is the whole point of the session, so its failure is never passed over.

    Raises:
        CheckpointError: see `note_save`.
    """
    run.pulse.enter(Phase.SAVE)
    deadline_s = agree_deadline(run) if is_last else None
    note_save(run, lambda: run.saver.finish(deadline_s))
    if state.step == run.saver.saved_step:
        return
    run.logger.log_goodput()
    probe = run.probe and measure_probe(run.probe, run.engine, run.mesh, run.config.precision.dtype)
    run.saver.start(replace(state, optimizer_scalars=run.engine.scalars()), run.engine.state_pieces(), probe)
    if is_last:
        note_safe(run, run.saver.finish(deadline_s))


def agree_deadline(run: Run) -> float | None:
    """Until when a last save may take, as the rank knows it that was asked to stop first. Every rank calls it."""
    own_s = run.stop.deadline_s(run.config.checkpoint.grace_s)
    now_s = time.monotonic()
    rests_ms = run.mesh.control_gather(-1 if own_s is None else max(0, round(1000 * (own_s - now_s))))
    return min((now_s + rest / 1000 for rest in rests_ms if rest >= 0), default=None)


def after_saves(run: Run, error: MegascaleError) -> MegascaleError:
    """An error that all ranks are about to raise together, once the save under way has come to its end."""
    run.pulse.enter(Phase.SAVE)
    with suppress(CheckpointError):
        run.saver.finish()
    return error


def note_save(run: Run, proceed: Callable[[], int | None]) -> None:
    """Lets a save under way proceed, and tells the log when it is safe.

    Raises:
        LeaseLostError, NonFiniteError: always.
        CheckpointError: the save failed, and `checkpoint.on_save_error` is `stop`.
    """
    try:
        step = proceed()
    except CheckpointError as error:
        if run.config.checkpoint.on_save_error == "stop" or isinstance(error, LeaseLostError):
            raise
        if run.mesh.rank == 0:
            say(f"warning: {error}. Training goes on; the next save is tried as planned")
        return
    if step is not None:
        note_safe(run, step)


def note_safe(run: Run, step: int) -> None:
    """Tells log, heartbeat and run folder of a checkpoint that is safe."""
    run.logger.commit(step)
    run.pulse.note_saved(step)
    if run.mesh.rank == 0:
        note_saved(run.folder, step)


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
        raise after_saves(run, NonFiniteError(f"{what} (train.on_nonfinite = stop; `skip` would go on)"))
    if state.skipped_in_a_row + 1 >= limit:
        raise after_saves(run, NonFiniteError(
            f"{what}, as in the {state.skipped_in_a_row} steps before (train.max_skipped_steps = {limit})"
        ))
    if run.mesh.rank == 0:
        say(f"warning: {what} (train.on_nonfinite = skip)")


def log_step(run: Run, state: RunState, output: StepOutput) -> None:
    """Logs the step just taken, when its turn has come."""
    run.logger.note(state.step)
    if state.step % run.config.observe.log_interval_steps:
        return
    run.pulse.enter(Phase.LOG)
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
        ledger={name: counts.tokens for name, counts in state.ledger.items()},
        figures=run.engine.figures(),
    ))
