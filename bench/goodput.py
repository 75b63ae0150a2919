"""Goodput of a long run at scale, simulated and in closed form: `python -m bench.goodput`.

Goodput (ETTR, effective training time ratio): seconds of training whose result was kept, over seconds of wall time.

The model: failures anywhere in the job are a Poisson process of rate N r, N nodes at r failures per node and day. After
each, `detect_s` pass until it is noticed, and `restart_s` until the first step (`requeue_s` in a share
`requeue_fraction` of the failures, where the allocation is lost). Then `interval_s` of training and `blocking_s` of
waiting for a save follow each other; a save counts `commit_s` after its end, and a failure loses what no such save
holds. A failure during a restart starts it anew. The run ends with a save.

Left out: stragglers, the supply of spare nodes, failures that come in clusters, loads that are slower at scale.

Sources. Meta's closed form: Kokolis et al. 2024, "Revisiting reliability in large-scale machine learning research
clusters". The exact one and the best interval: Daly 2006, "A higher order estimate of the optimum checkpoint interval
for restart dumps". Failure rates: 6.5 per 1,000 node-days on RSC-1 (Kokolis et al.); 3.8 for Llama 3 (Grattafiori et
al. 2024, arXiv 2407.21783, section 3.3.4: 419 unexpected interruptions of 2,048 nodes in 54 days).
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from bench.figures import describe_machine, show_head, show_row

DAY_S = 86_400.0
NODE_GPUS = 8
CLUSTERS = (1024, 10_240, 16_384)
RATES = {"Llama 3": 3.8, "RSC-1": 6.5}
"""Failures per 1,000 node-days."""
CONFIDENCE = 1.96
"""Standard errors of a mean on each side of a 95 % interval."""


@dataclass(frozen=True)
class Times:
    """What a failure and a save cost, in seconds. The defaults are the aims of the design, not measurements.

    Attributes:
        detect_s: from the failure until it is noticed. Aim: death within 5 s; a hang within its limit.
        restart_s: from there to the first step, inside the allocation: ranks, imports, load, compile. Aim: 180 s with
            detection, at the size of the table.
        interval_s: training between the end of a save and the start of the next.
        blocking_s: training that a save blocks. Aim: 2 s, a copy to memory.
        commit_s: from there until the save counts, beside training.
        requeue_fraction: share of the failures in which the allocation is lost.
        requeue_s: what takes the place of `restart_s` then: the queue, and start-up. SLURM alone waits 120 s.
    """

    detect_s: float = 5.0
    restart_s: float = 175.0
    interval_s: float = 600.0
    blocking_s: float = 2.0
    commit_s: float = 0.0
    requeue_fraction: float = 0.0
    requeue_s: float = 600.0

    @property
    def mean_down_s(self) -> float:
        """Mean seconds from a failure to the first step after it."""
        q = self.requeue_fraction
        return self.detect_s + (1 - q) * self.restart_s + q * self.requeue_s


@dataclass(frozen=True)
class Estimate:
    """A mean over simulated runs.

    Attributes:
        mean: of the runs' goodput.
        half_width: of the 95 % confidence interval of that mean.
        low, high: 5th and 95th percentile of single runs.
    """

    mean: float
    half_width: float
    low: float
    high: float


def failures_per_s(gpus: int, per_1000_node_days: float) -> float:
    """Failures of the whole job per second; N r."""
    return gpus / NODE_GPUS * per_1000_node_days / 1000 / DAY_S


def kept_seconds(up_s: np.ndarray, times: Times) -> np.ndarray:
    """Seconds of training kept of stretches that are `up_s` long from restart to failure: whole intervals, as saved."""
    saves = np.floor((up_s - times.commit_s) / (times.interval_s + times.blocking_s))
    return np.maximum(saves, 0) * times.interval_s


def trained_seconds(up_s: np.ndarray, times: Times) -> np.ndarray:
    """Seconds of training in stretches that end with a save: all but the waits for saves on the way."""
    whole, rest = np.divmod(np.maximum(up_s, 0), times.interval_s + times.blocking_s)
    return whole * times.interval_s + np.minimum(rest, times.interval_s)


def simulate(times: Times, rate: float, days: float, runs: int, seed: int) -> Estimate:
    """Goodput of `runs` runs of `days` wall days at `rate` failures per second.

    Cost: runs x days x failures a day random numbers; 400 runs of 54 days on 16,384 GPUs take 0.1 s.
    """
    generator, length_s = np.random.default_rng(seed), days * DAY_S
    block = math.ceil(rate * length_s + 10 * math.sqrt(rate * length_s) + 10)  # 10 standard deviations above the mean
    ends = np.cumsum(generator.exponential(1 / rate, (runs, block)), axis=1)
    if ends[:, -1].min() < length_s:
        raise ValueError(f"{block} failures were too few for {days} days; another seed")
    starts = np.concatenate([np.zeros((runs, 1)), ends[:, :-1]], axis=1)
    is_requeued = generator.random(ends.shape) < times.requeue_fraction
    down_s = times.detect_s + np.where(is_requeued, times.requeue_s, times.restart_s)
    down_s[:, 0] = 0  # the first start is no failure's
    is_cut = ends > length_s
    up_s = np.minimum(ends, length_s) - starts - down_s
    useful_s = np.where(is_cut, trained_seconds(up_s, times), kept_seconds(up_s, times)) * (starts < length_s)
    goodput = useful_s.sum(axis=1) / length_s
    spread = goodput.std(ddof=1) / math.sqrt(runs)
    low, high = np.percentile(goodput, [5, 95])
    return Estimate(float(goodput.mean()), CONFIDENCE * float(spread), float(low), float(high))


def meta_goodput(times: Times, rate: float) -> float:
    """Kokolis et al.: (1 - N r (u0 + interval / 2)) / (1 + w / interval); good while N r (u0 + interval) is small."""
    lost = rate * (times.mean_down_s + times.interval_s / 2 + times.commit_s)
    return (1 - lost) / (1 + times.blocking_s / times.interval_s)


def exact_goodput(times: Times, rate: float) -> float:
    """The mean of the model above over a run without end: kept seconds over seconds from failure to failure.

    rate x interval x E[exp(-rate x down)] x exp(-rate x commit) / (exp(rate (interval + blocking)) - 1): Daly's
    time to solution, turned over.
    """
    q = times.requeue_fraction
    survives = (1 - q) * math.exp(-rate * times.restart_s) + q * math.exp(-rate * times.requeue_s)
    survives *= math.exp(-rate * (times.detect_s + times.commit_s))
    return rate * times.interval_s * survives / math.expm1(rate * (times.interval_s + times.blocking_s))


def daly_interval(blocking_s: float, rate: float) -> float:
    """Daly's best seconds of training between saves; while a save takes less than twice the time between failures."""
    half = blocking_s * rate / 2
    return math.sqrt(2 * blocking_s / rate) * (1 + math.sqrt(half) / 3 + half / 9) - blocking_s


def simulated_interval(times: Times, rate: float, failures: int, seed: int) -> float:
    """The interval with the best simulated goodput, the same failures for each; a parabola through the best ones."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, failures)
    logs = np.log(daly_interval(times.blocking_s, rate)) + np.linspace(-0.7, 0.7, 15)
    up_s = gaps - times.mean_down_s
    goodput = [kept_seconds(up_s, replace(times, interval_s=math.exp(log))).sum() / gaps.sum() for log in logs]
    curve = np.polynomial.Polynomial.fit(logs, goodput, 4)
    fine = np.linspace(logs[0], logs[-1], 2001)
    return float(np.exp(fine[np.argmax(curve(fine))]))


def read_times(options: argparse.Namespace) -> Times:
    """The defaults, over them a file, over that the options.

    Raises:
        ValueError: unknown names, or numbers that make no sense.
    """
    names = [field.name for field in fields(Times)]
    found = json.loads(options.inputs.read_text(encoding="utf-8")) if options.inputs else {}
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(f"{options.inputs}: {', '.join(unknown)} unknown; the names are {', '.join(names)}")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    times = Times(**found | given)
    if times.interval_s <= 0 or min(getattr(times, name) for name in names) < 0 or times.requeue_fraction > 1:
        raise ValueError(f"{times}: seconds are 0 or more, interval_s above 0, requeue_fraction at most 1")
    return times


def table_rows(times: Times, options: argparse.Namespace) -> Iterator[tuple]:
    """A row for each cluster and rate."""
    for gpus in options.gpus:
        for name, per_1000 in ((f"{each:g}{names_of(each)}", each) for each in options.rates):
            rate = failures_per_s(gpus, per_1000)
            found = simulate(times, rate, options.days, options.runs, options.seed)
            best = daly_interval(times.blocking_s, rate) if times.blocking_s else 0
            yield (
                f"{gpus:,}", name, f"{rate * DAY_S:.2f}", f"{found.mean:.4f} ± {found.half_width:.4f}",
                f"{found.low:.3f} to {found.high:.3f}", f"{exact_goodput(times, rate):.4f}",
                f"{meta_goodput(times, rate):.4f}", f"{best:.0f}",
            )


def names_of(per_1000: float) -> str:
    """Where a rate was published, in brackets."""
    return "".join(f" ({name})" for name, known in RATES.items() if known == per_1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=Path, help="JSON with names of the times below, such as detect_s")
    for field in fields(Times):
        option = field.name.removesuffix("_s").replace("_", "-")
        parser.add_argument(f"--{option}", dest=field.name, type=float, help=f"{field.name}, default {field.default:g}")
    parser.add_argument("--gpus", type=int, nargs="+", default=CLUSTERS)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES.values()), help="per 1,000 node-days")
    parser.add_argument("--days", type=float, default=54.0)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        times = read_times(options)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    print(f"{describe_machine(['numpy'])}\n\n{times}\n{options.runs} runs of {options.days:g} days\n")
    print(show_head(("GPUs", "failures / 1,000 node-days", "failures / day", "goodput", "single runs, 5 to 95 %",
                     "exact", "Meta's form", "best interval, s (Daly)")))
    for row in table_rows(times, options):
        print(show_row(row), flush=True)


if __name__ == "__main__":
    main()
