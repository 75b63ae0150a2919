"""Whether a time limit leaves room for a save. SLURM's forms of a time, and what a step takes at least. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megascale.errors import LaunchError

_FORMS = (
    re.compile(r"(?P<m>\d+)(:(?P<s>\d+))?"),
    re.compile(r"(?P<h>\d+):(?P<m>\d+):(?P<s>\d+)"),
    re.compile(r"(?P<d>\d+)-(?P<h>\d+)(:(?P<m>\d+)(:(?P<s>\d+))?)?"),
)
_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
UNLIMITED = ("UNLIMITED", "INFINITE")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and where the number comes from."""

    seconds: float
    source: str


def parse_time_limit(text: str) -> float:
    """Seconds of a time limit in one of SLURM's forms; infinity for UNLIMITED.

    Raises:
        LaunchError: none of the forms, or no time at all.
    """
    if text.strip().upper() in UNLIMITED:
        return float("inf")
    for form in _FORMS:
        if found := form.fullmatch(text.strip()):
            seconds = sum(_SECONDS[unit] * int(number) for unit, number in found.groupdict().items() if number)
            if seconds:
                return float(seconds)
    raise LaunchError(f"--time {text!r}: not a time limit of SLURM; write MINUTES, MINUTES:SECONDS,"
                      " HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS, such as"
                      " 23:30:00")


def choose_step_time(
    metrics: Iterable[dict], sessions: Iterable[dict], world_size: int, tokens_per_step: int, flops_per_token: int,
    peak_flops_per_device: float | None,
) -> StepTime | None:
    """What a step takes: as measured on as many ranks, else at least as long as its FLOPs take at peak; else None."""
    last_session = max(sessions, key=lambda line: line.get("unix_s", 0), default={})
    if last_session.get("world_size") == world_size:
        measured = [line["step_s"] for line in metrics if line.get("kind") == "train" and line.get("step_s")]
        if measured:
            return StepTime(measured[-1], "measured in this run")
    if peak_flops_per_device is None:
        return None
    seconds = tokens_per_step * flops_per_token / (peak_flops_per_device * world_size)
    source = f"{tokens_per_step:,} tokens x {flops_per_token:,} FLOPs at the peak of {world_size} devices"
    return StepTime(seconds, source)


def check_time_limit(text: str, grace_s: float, interval_steps: int, step: StepTime | None) -> None:
    """Refuses a limit within which no checkpoint would be written before the job is warned.

    Raises:
        LaunchError: it is too short, or no time limit at all.
    """
    limit_s = parse_time_limit(text)
    if limit_s <= grace_s:
        raise LaunchError(f"--time {text} is {limit_s:.0f} s, and the job is warned grace_s = {grace_s:.0f} s before"
                          f" its end: nothing is left to train in; give more than {minutes(grace_s)} minutes")
    if step is None:
        return
    needed_s = grace_s + interval_steps * step.seconds
    if limit_s <= needed_s:
        raise LaunchError(
            f"--time {text} is {limit_s:.0f} s, shorter than one save interval and the warning:"
            f" checkpoint.interval_steps {interval_steps} x {step.seconds:.3g} s a step ({step.source})"
            f" + grace_s {grace_s:.0f} s = {needed_s:.0f} s; give --time {minutes(needed_s)} or more, or lower"
            " checkpoint.interval_steps"
        )


def minutes(seconds: float) -> int:
    """The next whole minute after so many seconds."""
    return int(seconds // 60) + 1
