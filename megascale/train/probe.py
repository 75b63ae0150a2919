"""The probe: a batch and its loss that travel with a checkpoint, so that who loads it knows the model for the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megascale.checkpoint.find import VerifiedCheckpoint
from megascale.checkpoint.index import ProbeRecord, ProbeRow
from megascale.config.dump import flat_values
from megascale.data.batch import Batch
from megascale.data.images import plain
from megascale.data.loader import VALIDATION_KEY, build_batch
from megascale.data.objectives import RowObjective
from megascale.data.permutation import derive_key
from megascale.data.row import Row
from megascale.data.rows import Corpus
from megascale.engine.base import Engine
from megascale.errors import CheckpointError
from megascale.parallel.mesh import Mesh

MAX_PROBE_TOKENS = 8192
"""Beyond its first row; they are stored as numbers in the index."""
LOSS_TOLERANCE = {"fp32": 1e-5, "fp16": 2.0**-9, "bf16": 2.0**-6}
"""Relative differences of a loss that another layout or version may bring about by rounding alone."""
DECIDES_LOSS = ("model.", "data.document_mask", "data.label_document_starts")
"""Config keys by which the same weights have another loss on the same rows."""

NO_EFFECT = ("model.dropout", "model.init_std")


@dataclass(frozen=True)
class Probe:
    """A batch that every replica evaluates as a whole.

    Attributes:
        rows: what it was made of.
        batches: the same for this run's model and micro-batches.
    """

    rows: tuple[ProbeRow, ...]
    batches: list[Batch]


def read_probe(corpus: Corpus, objective: RowObjective, micro_rows: int) -> Probe:
    """The first rows of a validation split, a micro-batch of them at most."""
    num_rows = min(micro_rows, corpus.num_rows, max(1, MAX_PROBE_TOKENS // objective.row_tokens))
    rows = (corpus.read(*corpus.locate_unshuffled(number)) for number in range(num_rows))
    kept = tuple(ProbeRow(tuple(row.tokens.tolist()), tuple(row.ends), tuple(row.resumed)) for row in rows)
    return build_probe(kept, objective, micro_rows)


def build_probe(rows: tuple[ProbeRow, ...], objective: RowObjective, micro_rows: int) -> Probe:
    """The batches of some rows; rows without labels fill the last one."""
    batches = []
    for first in range(0, len(rows), micro_rows):
        numbers = np.arange(first, first + micro_rows)
        numbers[numbers >= len(rows)] = -1
        read = [as_row(rows[number]) if number >= 0 else None for number in numbers.tolist()]
        arrays = plain(objective).assemble(read, derive_key(VALIDATION_KEY, numbers))
        batches.append(build_batch(arrays, numbers, slice(None)))
    return Probe(rows, batches)


def as_row(row: ProbeRow) -> Row:
    """The row as it was read; whether its tokens were counted before doesn't matter any more."""
    return Row(np.array(row.tokens, np.uint32), list(row.ends), 0, row.resumed)


def measure_probe(probe: Probe, engine: Engine, mesh: Mesh, dtype: str) -> ProbeRecord | None:
    """Mean loss of the probe under the present weights; None when it isn't finite. Every rank calls it.

    Cost: a forward pass of the probe on every replica.
    """
    loss_sum, = mesh.control_sum([engine.evaluate(probe.batches)], dtype=torch.float64)
    num_tokens = sum(int((batch.labels_BT >= 0).sum()) for batch in probe.batches)
    loss = loss_sum / mesh.layout.dp / max(1, num_tokens)
    return ProbeRecord(probe.rows, loss, num_tokens, dtype) if math.isfinite(loss) else None


def check_probe(
    checkpoint: VerifiedCheckpoint, config: dict[str, Any], objective: RowObjective, micro_rows: int, engine: Engine,
    mesh: Mesh, dtype: str,
) -> str | None:
    """Tests that the loaded weights have the loss that they were saved with. Every rank calls it.

    Args:
        config: of this run, resolved.

    Returns:
        What was found, for the log; None where the checkpoint has no probe.

    Raises:
        CheckpointError: another loss, on every rank.
    """
    saved = checkpoint.index.probe
    if saved is None:
        return None
    if changed := changed_meaning(checkpoint.index.run.config, config):
        return f"probe not compared, since {', '.join(changed)} changed"
    now = measure_probe(build_probe(saved.rows, objective, micro_rows), engine, mesh, dtype)
    loss = now.loss if now else math.nan
    limit = max(LOSS_TOLERANCE[saved.dtype], LOSS_TOLERANCE[dtype]) * max(1.0, abs(saved.loss))
    if not abs(loss - saved.loss) <= limit:
        raise CheckpointError(
            f"{checkpoint.path}: its probe batch had a loss of {saved.loss:.6f} ({saved.dtype}) when it was saved and"
            f" has {loss:.6f} ({dtype}) now, further apart than {limit:.1e}: every tensor was loaded as it was written,"
            " so this model computes something else with it. Was the code changed? Its versions then:"
            f" {', '.join(f'{name} {version}' for name, version in checkpoint.index.run.code.items())}."
            " checkpoint.probe=false goes on regardless"
        )
    return f"probe loss {loss:.6f}, as saved to within {abs(loss - saved.loss):.1e}"


def changed_meaning(saved: dict[str, Any], now: dict[str, Any]) -> Sequence[str]:
    """The changed keys by which the same weights have another loss on the same rows."""
    old, new = flat_values(saved), flat_values(now)
    return [key for key in sorted(old.keys() | new.keys())
            if key.startswith(DECIDES_LOSS) and key not in NO_EFFECT and old.get(key) != new.get(key)]

