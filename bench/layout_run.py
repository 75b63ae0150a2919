"""Builds the engine of a layout on this rank and lets it take steps on random rows."""

from dataclasses import replace

import torch

from bench.layout_cases import LayoutCase
from megascale.data.batch import Batch
from megascale.engine.base import Engine
from megascale.parallel.mesh import Mesh
from megascale.train.build import build_run_engine

LEARNING_RATE = 1e-3


def build_case_engine(case: LayoutCase, mesh: Mesh) -> Engine:
    """The engine of a run in this layout."""
    return build_run_engine(case.config(), mesh)


def random_batch(case: LayoutCase, seed: int) -> Batch:
    """A micro-batch of random rows; equal on all ranks, for only its size matters here."""
    config = case.config()
    shape = config.train.micro_batch_size, config.train.seq_len + 1
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    documents_BT = torch.zeros(shape[0], shape[1] - 1, dtype=torch.int32)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents_BT, torch.arange(shape[0]))
    if config.model.traits.has_decoder:
        return replace(batch, source_BS=batch.tokens_BT)
    return replace(batch, segments_BT=documents_BT.long()) if config.model.family == "bert" else batch


def take_step(engine: Engine, case: LayoutCase, step: int) -> float:
    """One optimizer step; gives the loss."""
    derived = case.derived()
    batches = [random_batch(case, step * derived.num_micro_batches + i) for i in range(derived.num_micro_batches)]
    return engine.train_step(
        batches, step=step, num_tokens=derived.tokens_per_step, learning_rate=LEARNING_RATE
    ).loss
