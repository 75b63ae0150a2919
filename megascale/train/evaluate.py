"""A validation pass: each row once over all replicas, and a stop request noticed between two batches."""

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch

from megascale.data.batch import Batch
from megascale.data.loader import evaluation_batches
from megascale.observe.metrics import EvalRecord, build_eval_record
from megascale.train.setup import Run

BATCHES_PER_STAGE = 4
"""Batches through the model between two looks at the stop request, for each pipeline rank: fills a pipeline well."""


def evaluate(run: Run, step: int, max_rows: int | None) -> EvalRecord | None:
    """Mean loss per label token over the validation split, or None when a stop was asked for before its end.

    Args:
        step: completed steps of the model.
        max_rows: the first so many rows; None for all, which alone gives bits per byte of the text.
    """
    started_s = time.perf_counter()
    loss_sum, num_tokens = 0.0, 0
    mesh, micro_rows = run.mesh, run.config.train.micro_batch_size
    batches = evaluation_batches(run.validation, micro_rows, mesh.dp_rank, mesh.layout.dp, max_rows)
    for together in batched(batches, BATCHES_PER_STAGE * mesh.pp.size):
        if mesh.control_sum([int(run.stop.is_set)])[0]:
            return None
        loss_sum += run.engine.evaluate(together)
        num_tokens += count_labels(together) if mesh.leads_replica else 0
    loss_sum, num_tokens = mesh.control_sum([loss_sum, num_tokens], dtype=torch.float64)
    manifest = run.validation.manifest
    is_whole = max_rows is None or max_rows >= run.validation.num_rows
    return build_eval_record(
        step=step,
        loss=loss_sum / num_tokens,
        num_tokens=int(num_tokens),
        num_bytes=manifest.text_bytes if is_whole else None,
        eval_s=time.perf_counter() - started_s,
        unix_s=time.time(),
    )


def batched(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """The batches, up to `size` of them at a time."""
    batches = iter(batches)
    while together := list(islice(batches, size)):
        yield together


def count_labels(batches: Sequence[Batch]) -> int:
    """Label tokens of this replica's batches."""
    return sum(int((batch.labels_BT >= 0).sum()) for batch in batches)
