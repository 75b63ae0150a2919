"""A validation pass: each row of each corpus once over all replicas, and a stop request noticed between batches."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch

from megascale.data.batch import Batch
from megascale.data.loader import evaluation_batches
from megascale.data.rows import Corpus
from megascale.observe.metrics import CorpusEval, EvalRecord, build_eval_record, derive_bits_per_byte
from megascale.parallel.heartbeat import Phase
from megascale.train.setup import Run

BATCHES_PER_STAGE = 4
"""Batches through the model between two looks at the stop request, for each pipeline rank: fills a pipeline well."""


def evaluate(run: Run, step: int, max_rows: int | None) -> EvalRecord | None:
    """Mean loss per label token over all validation splits, or None when a stop was asked for before its end.

    Args:
        step: completed steps of the model.
        max_rows: the first so many rows of each corpus; None for all, which alone gives bits per byte of the text.
    """
    run.pulse.enter(Phase.EVALUATE)
    started_s = time.perf_counter()
    sums: list[float] = []
    for corpus in run.validation:
        own = evaluate_corpus(run, corpus, max_rows)
        if own is None:
            return None
        sums += own
    sums = run.mesh.control_sum(sums, dtype=torch.float64)
    losses, tokens = sums[::2], [int(number) for number in sums[1::2]]
    # Only where every token is a label does a loss say how well the text could be compressed.
    is_whole = run.config.objective_kind == "causal"
    sizes = [corpus.manifest.text_bytes if is_whole and (max_rows is None or max_rows >= corpus.num_rows) else None
             for corpus in run.validation]
    each = {
        corpus.name: CorpusEval(loss / count, count, derive_bits_per_byte(loss / count, count, size))
        for corpus, loss, count, size in zip(run.validation, losses, tokens, sizes, strict=True)
    }
    return build_eval_record(
        step=step,
        loss=sum(losses) / sum(tokens),
        num_tokens=sum(tokens),
        num_bytes=None if None in sizes else sum(sizes),
        eval_s=time.perf_counter() - started_s,
        unix_s=time.time(),
        corpora=each if len(each) > 1 else None,
        is_of_tokens=run.config.model.vision is None,
    )


def evaluate_corpus(run: Run, corpus: Corpus, max_rows: int | None) -> tuple[float, int] | None:
    """This rank's share of the sum of losses and label tokens of a split, or None when a stop was asked for."""
    loss_sum, num_tokens = 0.0, 0
    mesh, micro_rows = run.mesh, run.config.train.micro_batch_size
    objective = run.loader.stream.objective
    batches = evaluation_batches(corpus, objective, micro_rows, mesh.dp_rank, mesh.layout.dp, max_rows)
    for together in batched(batches, BATCHES_PER_STAGE * mesh.pp.size):
        run.pulse.enter(Phase.EVALUATE)  # anew each time, which shows progress
        if mesh.rank == 0:
            run.stop.look()
        if mesh.control_sum([int(run.stop.is_set)])[0]:
            return None
        loss_sum += run.engine.evaluate(together)
        num_tokens += count_labels(together) if mesh.leads_replica else 0
    return loss_sum, num_tokens


def batched(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches, up to `size` of them at a time."""
    batches = iter(batches)
    while together := list(islice(batches, size)):
        yield together


def count_labels(batches: Sequence[Batch]) -> int:
    """Label tokens of this replica's batches."""
    return sum(int((batch.labels_BT >= 0).sum()) for batch in batches)
