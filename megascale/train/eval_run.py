"""How well a checkpoint does on validation splits: `python -m megascale.train.eval_run REQUEST`; the request is JSON.

Loss and hits come from the weights as they were saved, in whatever layout, over the ranks that the request asks for.
No optimizer is built.
"""

import copy
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from megascale.checkpoint.find import VerifiedCheckpoint, peek_checkpoint
from megascale.checkpoint.run_file import peek_run_store
from megascale.config.derive import derive
from megascale.config.load import apply_override, parse_config
from megascale.config.schema import RunConfig
from megascale.data.loader import evaluation_batches
from megascale.data.rows import Corpus
from megascale.data.stream import build_objective, open_validation
from megascale.engine.pipeline import build_pipeline
from megascale.engine.precision import TORCH_DTYPE
from megascale.errors import ConfigError
from megascale.model.context import Context
from megascale.model.image_head import TOP_CLASSES
from megascale.observe.metrics import derive_bits_per_byte
from megascale.parallel.mesh import Mesh, build_mesh, read_rank_info
from megascale.train.build import build_axes, layout_of, own_stages, pipeline_settings
from megascale.train.evaluate import BATCHES_PER_STAGE, batched, count_labels
from megascale.train.exact_match import count_exact
from megascale.train.generate import check_weights, load_model
from megascale.train.objective import run_objective
from megascale.train.request import serve_request

HIT_NAMES = {
    "causal": "next tokens foretold", "mlm": "masked tokens found", "span": "target tokens foretold",
    "pairs": "target tokens foretold", "classify": "top-1",
}
"""What the share of hits is called, by objective."""


@dataclass(frozen=True)
class Score:
    """What a model comes to on one validation split.

    Attributes:
        loss: mean over labels, in nats; of objectives without classes as they define it.
        num_labels: tokens, images or patches with a label.
        perplexity: exp(loss), for objectives over tokens.
        accuracy: share of labels that are the model's first choice; None where there are no classes.
        bits_per_byte: of the text, for next tokens of a whole split.
        exact_match: share of pairs whose whole target greedy decoding gives; None of other objectives, and over a
            pipeline.
        top5: share of images whose class is one of the model's first five; None elsewhere, and of few classes.
    """

    loss: float
    num_labels: int
    perplexity: float | None
    accuracy: float | None
    bits_per_byte: float | None
    exact_match: float | None
    top5: float | None = None


class Scored(nn.Module):
    """A head whose loss comes with its hits. Shape: as the head's, to (4,) fp64: loss, hits, near hits,
    labels that can be hit.
    """

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, *inputs) -> torch.Tensor:
        """The head's logits."""
        return self.head(*inputs)

    def loss(self, hidden: torch.Tensor, context: Context, labels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        loss = self.head.loss(hidden, context, labels)
        count = getattr(self.head, "count_hits", None)
        hits, total = (0, 0) if count is None else (int(number) for number in count(hidden, context, labels))
        count_near = getattr(self.head, "count_near", None)
        near = 0 if count_near is None else int(count_near(hidden, context, labels))
        return torch.tensor([loss.item(), hits, near, total], dtype=torch.float64)


class Scorer:
    """This rank's part of a model, asked for its scores. Every rank builds it."""

    def __init__(self, checkpoint: VerifiedCheckpoint, config: RunConfig, mesh: Mesh, kind: str):
        self.mesh, self.axes = mesh, build_axes(config, mesh)
        stages, dtype = own_stages(config, mesh), TORCH_DTYPE[config.precision.dtype]
        self.objective = run_objective(config, self.axes)
        model = load_model(checkpoint, config, self.axes, list(stages.values()), kind).to(mesh.device, dtype)
        for stage in model.stages:
            stage.head = None if stage.head is None else Scored(stage.head)
            stage.eval()
        self.model, self.stages, self.pipeline = model, model.stages, None
        if mesh.pp.size > 1:
            settings = pipeline_settings(config, self.axes, mesh)
            self.pipeline = build_pipeline(
                self.stages, settings.stage_indices, settings.num_stages, settings.schedule, settings.hidden_shape,
                dtype, mesh.device, mesh.pp, self.objective, lambda *_: None,
            )

    @torch.no_grad()
    def sums(self, batches: list) -> torch.Tensor:
        """This rank's share of what `Scored` gives, summed over batches; (4,) fp64. Every rank calls it."""
        if self.pipeline is not None:
            total = self.pipeline.totals(batches)
        else:
            (stage,) = self.stages
            total = sum(stage(*self.objective(batch.to(self.mesh.device), 0, None)) for batch in batches)
        return total if total is not None and self.mesh.tp.rank == 0 else torch.zeros(4, dtype=torch.float64)

    def exact(self, batches: list, end: int) -> torch.Tensor:
        """This rank's share of (pairs whose whole target is written, pairs); (2,) fp64. Every rank calls it."""
        counts = torch.tensor([count_exact(self.model, batch, end) for batch in batches], dtype=torch.float64)
        return counts.sum(dim=0) if self.mesh.leads_replica else torch.zeros(2, dtype=torch.float64)


def evaluate_checkpoint(
    checkpoint: VerifiedCheckpoint, overrides: list[str], kind: str, max_rows: int | None
) -> dict[str, Score]:
    """The scores of a checkpoint on each validation split of its run, on the ranks that the environment describes.

    Args:
        overrides: changes to the run's config, such as `parallel.tp=2` or `data.folder=OTHER`.
        kind: of the checkpoint's tensors to take as weights.
        max_rows: the first so many rows of each split; None for all.

    Raises:
        ConfigError, DataError: a layout or data that don't fit the model.
        CheckpointError: the checkpoint has no such weights.
    """
    info = read_rank_info(dict(os.environ))
    check_weights(checkpoint, kind)
    config = evaluation_config(checkpoint, overrides, info.world_size)
    derived = derive(config, info.world_size, source=str(checkpoint.path))
    validation = open_validation(config)
    mesh = build_mesh(layout_of(config, derived), info)
    scorer = Scorer(checkpoint, config, mesh, kind)
    return {corpus.name: score_corpus(scorer, config, corpus, validation, max_rows) for corpus in validation}


def evaluation_config(checkpoint: VerifiedCheckpoint, overrides: list[str], world_size: int) -> RunConfig:
    """The run's config on so many ranks, all of them replicas unless told otherwise, with a batch that they can share.

    Raises:
        ConfigError: an override that means nothing, or changes the model.
    """
    values = copy.deepcopy(checkpoint.index.run.config) | {"parallel": {"zero_stage": 0}}
    values["train"] |= {"recompute": "none", "batch_ramp": [], "compile": False}
    for override in overrides:
        if override.startswith("model."):
            raise ConfigError(f"override `{override}`: the weights are of the model that was trained; change data,"
                              " train, parallel or precision only")
        apply_override(values, override)
    config = parse_config(values, source=str(checkpoint.path))
    parallel, train = config.parallel, config.train
    dp = max(1, world_size // (parallel.tp * parallel.pp * parallel.cp))
    rows = train.micro_batch_size * dp * BATCHES_PER_STAGE * parallel.pp
    update = {"train": train.model_copy(update={"global_batch_tokens": rows * train.seq_len})}
    if config.model.traits.has_decoder:  # it writes position by position, which leaves nothing to deal out
        update["parallel"] = parallel.model_copy(update={"sequence_parallel": False})
    return config.model_copy(update=update)


def score_corpus(
    scorer: Scorer, config: RunConfig, corpus: Corpus, validation: tuple[Corpus, ...], max_rows: int | None
) -> Score:
    """The score on one split, the same on every rank."""
    mesh, kind = scorer.mesh, config.objective_kind
    sums, exact, num_labels = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0
    objective, micro_rows = build_objective(config, validation), config.train.micro_batch_size
    batches = evaluation_batches(corpus, objective, micro_rows, mesh.dp_rank, mesh.layout.dp, max_rows)
    for together in batched(batches, BATCHES_PER_STAGE * mesh.pp.size):
        sums += scorer.sums(together)
        if kind == "pairs" and mesh.pp.size == 1:
            exact += scorer.exact(together, corpus.manifest.eos_id)
        num_labels += count_labels(together) if mesh.leads_replica else 0
    totals = mesh.control_sum([*sums.tolist(), *exact.tolist(), num_labels], dtype=torch.float64)
    loss_sum, hits, near, chances, right, pairs, labels = totals
    loss, labels = loss_sum / labels, int(labels)
    is_whole = max_rows is None or max_rows >= corpus.num_rows
    return Score(
        loss=loss,
        num_labels=labels,
        perplexity=math.exp(min(loss, 700.0)) if kind not in ("classify", "mae") else None,
        accuracy=hits / chances if chances else None,
        bits_per_byte=derive_bits_per_byte(loss, labels, corpus.manifest.text_bytes)
        if kind == "causal" and is_whole else None,
        exact_match=right / pairs if pairs else None,
        top5=near / chances if kind == "classify" and config.model.vocab_size > TOP_CLASSES else None,
    )


def describe(score: Score, hit_name: str) -> str:
    """A score as a line for people."""
    parts = [f"loss {score.loss:.4f}"]
    if score.perplexity is not None:
        parts.append(f"perplexity {score.perplexity:.3f}")
    if score.bits_per_byte is not None:
        parts.append(f"{score.bits_per_byte:.4f} bits per byte")
    if score.accuracy is not None:
        parts.append(f"{hit_name} {score.accuracy:.2%}")
    if score.top5 is not None:
        parts.append(f"top-{TOP_CLASSES} {score.top5:.2%}")
    if score.exact_match is not None:
        parts.append(f"whole targets written {score.exact_match:.2%}")
    return ", ".join([*parts, f"{score.num_labels:,} labels"])


def serve(values: dict) -> None:
    """Evaluates as a request asks; the first rank prints."""
    checkpoint = peek_checkpoint(peek_run_store(Path(values["run_folder"])), values["step"])
    kind = "ema" if values["ema"] else "master"
    scores = evaluate_checkpoint(checkpoint, values["overrides"], kind, values["max_rows"])
    if os.environ.get("RANK", "0") != "0":
        return
    if values["as_json"]:
        each = {name: asdict(score) for name, score in scores.items()}
        print(json.dumps({"step": checkpoint.step, "weights": kind, "validation": each}))
        return
    print(f"{checkpoint.path}: step {checkpoint.step}{', averaged weights' if values['ema'] else ''}")
    objective = parse_config(checkpoint.index.run.config, source=str(checkpoint.path)).objective_kind
    for name, score in scores.items():
        print(f"  {name}: {describe(score, HIT_NAMES.get(objective, 'hits'))}")


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
