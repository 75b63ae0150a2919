"""One rank of the leak test: `python -m megascale.train.leak REQUEST`, as `megascale check --leak` starts it.

The documents of packed rows must not see each other. The engine of the run itself, with its kernels, number formats,
layout, schedule and recomputation, takes the same rows forward and backward several times and never updates. Each time
one document of each row gets other tokens, and it alone has labels. Then

- no bit of another document's logits may change: nothing flows forward from the one into the others;
- the gradient of its loss must be zero at their inputs: nothing flows from them into the one;
- its own logits must change and its own inputs get a gradient, and in a control in which nothing keeps the documents
  apart so must those of others. Else the test is blind.

What was computed is kept as a checksum of each position's bits, so that no rank ever holds the logits of a row.
Shapes: B rows, T positions of this rank or of the whole row.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from megascale.config.batch_plan import constant_batch
from megascale.config.derive import Derived, derive
from megascale.config.load import load_config
from megascale.config.schema import RunConfig
from megascale.data.batch import Batch
from megascale.data.loader import Loader
from megascale.data.stream import open_stream
from megascale.errors import DataError, LeakError
from megascale.model.attention_core import SMALLEST_FLEX_HEAD
from megascale.model.attention_mask import cp_columns
from megascale.model.axes import Axes
from megascale.model.kernels import can_train_flex
from megascale.model.loss import IGNORED_LABEL
from megascale.parallel.collectives import start_all_reduce
from megascale.parallel.layout import AXES
from megascale.parallel.mesh import Mesh, build_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of, own_stages
from megascale.train.leak_report import Counts, Finding, Leak, check_separates, judge, report_table
from megascale.train.leak_rows import CHOICES, choose, pack_random, perturb, pick_document
from megascale.train.leak_watch import Sight, Watch
from megascale.train.parity import model_names
from megascale.train.request import serve_request
from megascale.train.setup import close_stores

MAX_MICRO_BATCHES = 4
"""Without a pipeline, whose schedule wants those of a step: enough rows for documents to end everywhere in a row."""


class Rows(NamedTuple):
    """The rows of a micro-batch, as numpy arrays."""

    tokens_BT: np.ndarray
    documents_BT: np.ndarray
    numbers_B: np.ndarray


class Trial(NamedTuple):
    """One pass over the rows.

    Attributes:
        perturbed: which document of each row gets other tokens; None for none.
        labelled: which document of each row has labels.
        is_separated: whether the model is told of documents.
    """

    perturbed: str | None
    labelled: str
    is_separated: bool = True


TRIALS = (Trial(None, "last"), *(Trial(choice, choice) for choice in CHOICES), Trial("first", "last", False))
"""The same rows again, which must give the same bits; each choice; the control."""


def run_leak_test(config_path: Path, overrides: list[str]) -> None:
    """Runs the leak test on the ranks that the environment describes; the first one prints what was found.

    Raises:
        ConfigError, LaunchError: as a training run would; and documents that aren't kept apart by choice.
        LeakError: a document sees another, or the test couldn't tell.
    Cost: the memory of training; eight times the forward and backward passes of a step; fourteen with a corpus.
    """
    config, info = load_config(config_path, overrides), read_rank_info(dict(os.environ))
    derived = derive(config, info.world_size, source=str(config_path))
    check_separates(config, str(config_path))
    mesh, layers = build_mesh(layout_of(config, derived), info), model_names(config.model).layers
    where, console = describe_where(config, mesh), Console(highlight=False, quiet=mesh.rank != 0)
    tester = Tester(config, mesh, layers)
    for name, rows, trials in (
        ("random documents", random_rows(config, derived, mesh), TRIALS),
        ("rows of the corpus", corpus_rows(config, derived, mesh), TRIALS[:-1]),
    ):
        if not rows:
            console.print(f"{name} were not tested: the corpus isn't there, or can't be read")
            continue
        findings = tester.find_leaks(rows, trials)
        console.print(f"leak test, {name}: {where}", soft_wrap=True)
        console.print(report_table(findings, config.model.vocab_size))
        fault = judge(findings, layers, where)
        if fault is not None:
            raise LeakError(fault)
    console.print("no document sees another", style="green")


def num_micro_batches(derived: Derived, mesh: Mesh) -> int:
    """Micro-batches of a pass on this replica."""
    return derived.num_micro_batches if mesh.pp.size > 1 else min(derived.num_micro_batches, MAX_MICRO_BATCHES)


def random_rows(config: RunConfig, derived: Derived, mesh: Mesh) -> list[Rows]:
    """This replica's micro-batches of random documents."""
    train, num_batches = config.train, num_micro_batches(derived, mesh)
    numbers = np.arange(num_batches * derived.dp * train.micro_batch_size).reshape(num_batches, derived.dp, -1)
    return [
        Rows(*pack_random(own, train.seq_len, config.model.vocab_size, config.run.seed), own)
        for own in numbers[:, mesh.dp_rank]
    ]


def corpus_rows(config: RunConfig, derived: Derived, mesh: Mesh) -> list[Rows]:
    """This replica's micro-batches of the run's last batch size, from its first row on; none without a corpus."""
    batches, plan = [], constant_batch(derived.batches.sizes[-1])
    with suppress(DataError), ExitStack() as at_end:
        stream = open_stream(config, derived)
        at_end.callback(close_stores, stream.corpora)
        loader = Loader(stream, plan, config.train.micro_batch_size, mesh.dp_rank, derived.dp)
        batches = loader.make_step(0).micro_batches
    if not mesh.all_true(bool(batches)):
        return []
    return [
        Rows(batch.tokens_BT.numpy(), batch.documents_BT.numpy(), batch.row_numbers_B.numpy())
        for batch in batches[: num_micro_batches(derived, mesh)]
    ]


class Tester:
    """The engine of a run, and what is made of what it computes. Every rank makes one and calls it alike.

    Args:
        layers: names of the model's layers, in its order.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, layers: list[str]):
        own_names = [[layers[index] for index in stage] for stage in own_stages(config, mesh).values()]
        self.watch = Watch(build_run_engine(config, mesh), own_names, layers[0])
        self.compare, self.vocab_size = Comparison(config, mesh, layers), config.model.vocab_size

    def find_leaks(self, rows: list[Rows], trials: Sequence[Trial]) -> list[Finding]:
        """Makes the trials, each against the rows as they are."""
        before = {}
        for is_separated in {trial.is_separated for trial in trials}:
            before[is_separated] = self._see(rows, Trial(None, "last", is_separated))
        return [self.compare(trial, rows, before[trial.is_separated], self._see(rows, trial)) for trial in trials]

    def _see(self, rows: list[Rows], trial: Trial) -> Sight:
        return self.watch.run([make_batch(each, trial, self.vocab_size) for each in rows])


def make_batch(rows: Rows, trial: Trial, vocab_size: int) -> Batch:
    """The rows as a trial has them. Labels are the tokens that follow, of the document that has labels."""
    tokens_BT, documents_BT = rows.tokens_BT, rows.documents_BT
    has_label_BT = choose(documents_BT, trial.labelled)
    arrays = (
        perturb(tokens_BT, choose(documents_BT, trial.perturbed), vocab_size),
        np.where(has_label_BT, np.roll(tokens_BT, -1, axis=1), IGNORED_LABEL),
        documents_BT if trial.is_separated else np.zeros_like(documents_BT),
        rows.numbers_B,
    )
    return Batch(*map(torch.from_numpy, arrays))


class Comparison:
    """Compares what two passes computed, over all ranks. Every rank makes one and calls it alike.

    Args:
        layers: names of the model's layers, the head last.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, layers: list[str]):
        self.mesh, self.layers = mesh, layers
        axes = Axes(cp=mesh.cp, context_attention=config.parallel.context_attention)
        self.attended_T = cp_columns(config.train.seq_len, axes, torch.device("cpu"))
        is_split, tp = config.parallel.is_sequence_parallel, mesh.tp
        self.own_T = self.attended_T.chunk(tp.size)[tp.rank] if is_split else self.attended_T
        self.counts_logits, self.counts_inputs = tp.rank == 0, is_split or tp.rank == 0

    def __call__(self, trial: Trial, rows: list[Rows], before: Sight, now: Sight) -> Finding:
        counts, leaks = np.zeros(len(Counts._fields), np.int64), []
        for number, each in enumerate(rows):
            perturbed_BT, labelled_BT = (
                torch.from_numpy(choose(each.documents_BT, choice)) for choice in (trial.perturbed, trial.labelled)
            )
            for layer, name in enumerate(self.layers):
                if name in now.sums:
                    is_head = layer == len(self.layers) - 1
                    columns_T = self.attended_T if is_head else self.own_T
                    changed_BT = now.sums[name][number] != before.sums[name][number]
                    inside_BT = perturbed_BT[:, columns_T]
                    if is_head:
                        changed_BT = self._on_any_tp_rank(changed_BT)
                        counts[:4] += self.counts_logits * count(~inside_BT, inside_BT, changed_BT)
                    leaks += first_leak(layer, changed_BT & ~inside_BT, columns_T, each, trial.perturbed)
            if number in now.reached:
                reached_BT, inside_BT = now.reached[number], labelled_BT[:, self.own_T]
                counts[4:] += self.counts_inputs * count(~inside_BT, inside_BT, reached_BT)
                leaks += first_leak(len(self.layers), reached_BT & ~inside_BT, self.own_T, each, trial.labelled)
        leak = self._first_of_all(leaks)
        return Finding(trial.perturbed, trial.is_separated, Counts(*self.mesh.control_sum(counts.tolist())), leak)

    def _on_any_tp_rank(self, flags_BT: torch.Tensor) -> torch.Tensor:
        """Each tp rank has the logits of a part of the vocabulary."""
        return start_all_reduce(flags_BT.int().to(self.mesh.device), self.mesh.tp, "max")().cpu().bool()

    def _first_of_all(self, leaks: list[Leak]) -> Leak | None:
        """The first leak that any rank has found: in the first layer, then in the first row and column."""
        width, own = 1 + len(Leak._fields), min(leaks, default=None, key=leak_place)
        slots = [0] * (width * self.mesh.world_size)
        if own is not None:
            slots[width * self.mesh.rank : width * (self.mesh.rank + 1)] = [1, *own]
        slots = self.mesh.control_sum(slots)
        found = [Leak(*slots[at + 1 : at + width]) for at in range(0, len(slots), width) if slots[at]]
        return min(found, default=None, key=leak_place)


def count(others_BT: torch.Tensor, inside_BT: torch.Tensor, flags_BT: torch.Tensor) -> np.ndarray:
    """Positions outside and inside of a document, and those of them with a flag."""
    masks = (others_BT, inside_BT, others_BT & flags_BT, inside_BT & flags_BT)
    return np.array([int(mask_BT.sum()) for mask_BT in masks])


def first_leak(
    layer: int, leaked_BT: torch.Tensor, columns_T: torch.Tensor, rows: Rows, choice: str | None
) -> list[Leak]:
    """The first of this rank's positions that see the chosen document of their row, as a list of one or none."""
    places = leaked_BT.nonzero()
    if choice is None or not len(places):
        return []
    row, place = places[0].tolist()
    column, documents_T = int(columns_T[place]), rows.documents_BT[row]
    source = pick_document(documents_T, choice)
    inside = np.flatnonzero(documents_T == source)
    return [Leak(
        layer, int(rows.numbers_B[row]), source, int(inside[0]), int(inside[-1]) + 1, int(documents_T[column]), column
    )]


def leak_place(leak: Leak) -> tuple[int, int, int]:
    """By which leaks are ordered."""
    return leak.layer, leak.row, leak.column


def describe_where(config: RunConfig, mesh: Mesh) -> str:
    """Kernel, number format and layout, in a few words."""
    parallel, layout = config.parallel, mesh.layout
    words = [f"{axis}{size}" for axis in (*AXES, "ep") if (size := getattr(layout, axis)) > 1] or ["one rank"]
    words += [f"zero{parallel.zero_stage}"] if layout.dp * layout.cp > 1 else []
    words += ["sequence parallel"] if parallel.is_sequence_parallel else []
    words += [parallel.schedule] if layout.pp > 1 else []
    words += ["compiled"] if config.train.compile else []
    words += [f"recompute {config.train.recompute}"] if config.train.recompute != "none" else []
    return f"{describe_kernel(config, mesh.device)}, {config.precision.dtype}, {', '.join(words)}"


def describe_kernel(config: RunConfig, device: torch.device) -> str:
    """What computes attention between documents, see `megascale.model.attention_core`."""
    parallel = config.parallel
    if parallel.cp > 1 and parallel.context_attention == "ring":
        return "ring attention in masked tiles"
    has_flex = can_train_flex(device) and config.model.head_dim >= SMALLEST_FLEX_HEAD
    kernel = "FlexAttention" if has_flex else "attention with a dense mask"
    return f"Ulysses over {kernel}" if parallel.cp > 1 else kernel


if __name__ == "__main__":
    serve_request(lambda values: run_leak_test(Path(values["config"]), values["overrides"]), sys.argv[1])
