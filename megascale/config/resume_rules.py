"""Which keys of a config may differ when a run goes on from a checkpoint, which on request, which never. Pure."""

import difflib
from collections.abc import Iterable, Iterator
from enum import StrEnum
from types import UnionType
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from megascale.config.schema import RunConfig
from megascale.errors import ConfigError


class ChangeKind(StrEnum):
    """What a change does to a run that goes on with it."""

    SAFE = "safe"
    MATHS = "changes the math"
    FORBIDDEN = "forbidden"


SAFE_KEYS = (
    "run.name",
    "run.folder",
    "data.folder",
    "data.corpora",
    "data.corpora.",
    "data.stages",
    "data.horizon_steps",
    "data.store",
    "data.cache.",
    "data.fetch_attempts",
    "data.fetch_timeout_s",
    "data.allow_commands",
    "data.on_bad_shard",
    "data.max_masked_rows",
    "train.micro_batch_size",
    "train.max_steps",
    "train.recompute",
    "train.recompute_parts",
    "train.recompute_every",
    "train.offload_activations",
    "train.compile",
    "train.on_nonfinite",
    "train.max_skipped_steps",
    "parallel.",
    "evaluate.",
    "optimizer.validate_ema",
    "checkpoint.",
    "observe.",
)
"""Keys (a dot at the end: whole sections) that set where a run lives, how it is laid out and what is logged, never what
is computed. Corpora and their mixture are compared by what was read of them (`megascale.checkpoint.compare`), so
folders may move and what hasn't begun may change. A longer `train.max_steps` alone changes `optimizer.horizon_steps`,
which does count, unless that is given."""

MATHS_KEYS = (
    "run.seed",
    "model.norm_eps",
    "model.rope_theta",
    "model.window",
    "model.global_every",
    "model.rope_scaling",
    "model.rope_scaling.",
    "model.attention_softcap",
    "model.logit_softcap",
    "model.relative_max_distance",
    "model.moe.top_k",
    "model.moe.scores",
    "model.moe.normalize_scores",
    "model.moe.score_scale",
    "model.moe.capacity_factor",
    "model.moe.balance",
    "model.moe.balance_weight",
    "model.moe.bias_rate",
    "model.moe.z_weight",
    "data.objective.mask_fraction",
    "data.objective.whole_word",
    "data.objective.mask_token",
    "data.objective.cls_token",
    "data.objective.sep_token",
    "data.objective.mean_span_tokens",
    "data.objective.label_smoothing",
    "data.objective.crop_min_fraction",
    "data.objective.flips",
    "data.objective.pixel_mean",
    "data.objective.pixel_std",
    "model.vision.mae_patch_norm",
    "model.dropout",
    "model.init_std",
    "model.init_scale",
    "model.mup_base_width",
    "data.document_mask",
    "data.label_document_starts",
    "data.fim.",
    "train.global_batch_tokens",
    "train.batch_ramp",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.horizon_steps",
    "optimizer.min_fraction",
    "optimizer.decay_fraction",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.momentum",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "optimizer.groups",
    "precision.",
)
"""Keys with which the saved weights and the position in the stream keep their meaning, but the steps to come compute
something else. A new seed deals the rows to come in another order: of an epoch under way, some are read again and some
not at all."""

_SHAPE = "the weights have other shapes or another meaning"
_STATE = "the checkpoint has none of the state that the optimizer would go on from"
_ROWS = "row numbers would mean other rows, and the position of the run is one"
FORBIDDEN_KEYS = {
    "model.family": _SHAPE,
    "model.num_layers": _SHAPE,
    "model.num_decoder_layers": _SHAPE,
    "model.head_width": _SHAPE,
    "model.activation": _SHAPE,
    "model.qk_norm": _SHAPE,
    "model.relative_buckets": _SHAPE,
    "model.num_segments": _SHAPE,
    "model.pair_head": _SHAPE,
    "model.moe": _SHAPE,
    "model.moe.num_experts": _SHAPE,
    "model.moe.d_expert": _SHAPE,
    "model.moe.num_shared_experts": _SHAPE,
    "model.moe.num_dense_layers": _SHAPE,
    "model.moe.every": _SHAPE,
    "model.vision": _SHAPE,
    "model.vision.image_size": _SHAPE,
    "model.vision.patch_size": _SHAPE,
    "model.vision.channels": _SHAPE,
    "model.vision.pooling": _SHAPE,
    "model.vision.mae_decoder_layers": _SHAPE,
    "model.vision.mae_decoder_width": _SHAPE,
    "model.vision.mae_decoder_heads": _SHAPE,
    "model.d_model": _SHAPE,
    "model.num_heads": _SHAPE,
    "model.num_kv_heads": _SHAPE,
    "model.d_ff": _SHAPE,
    "model.vocab_size": _SHAPE,
    "model.vocab_multiple": _SHAPE,
    "model.max_seq_len": _SHAPE,
    "model.tie_embeddings": _SHAPE,
    "model.bias": _SHAPE,
    "optimizer.kind": _STATE,
    "optimizer.ema_decay": _STATE,
    "data.packing": _ROWS,
    "data.objective.kind": _ROWS,
    "data.objective.pair_task": _ROWS,
    "data.objective.target_len": _ROWS,
    "data.num_lanes": _ROWS,
    "data.window_rows": _ROWS,
    "train.seq_len": _ROWS,
}
"""Keys that no checkpoint can be continued under, with the reason."""

KEPT_VALUES = {
    "model.moe.balance": ("bias", "with balance: bias a checkpoint has the biases of the experts, else it has none"),
}
"""Keys of `MATHS_KEYS` with a value that adds tensors to a checkpoint, so that no run changes to it or from it."""

STRANGE_KEY = "this version of megascale has no rule for it"
FIM_KEY, VALIDATION_KEY = "data.corpora.{}.fim_fraction", "validation.{}"
"""What is compared besides the config's keys, by name of the corpus, and may be allowed."""


def class_of(key: str) -> tuple[ChangeKind, str]:
    """The class of a change of a dotted key, and why it is forbidden where it is; a key without a rule is."""
    if key in FORBIDDEN_KEYS:
        return ChangeKind.FORBIDDEN, FORBIDDEN_KEYS[key]
    for kind, keys in ((ChangeKind.SAFE, SAFE_KEYS), (ChangeKind.MATHS, MATHS_KEYS)):
        if any(key.startswith(rule) if rule.endswith(".") else key == rule for rule in keys):
            return kind, ""
    return ChangeKind.FORBIDDEN, STRANGE_KEY


def class_of_change(key: str, old: object, new: object) -> tuple[ChangeKind, str]:
    """The class of a change of a key from one value to another: `class_of` the key, but for `KEPT_VALUES`."""
    value, reason = KEPT_VALUES.get(key, (None, ""))
    if value is not None and value in (old, new):
        return ChangeKind.FORBIDDEN, reason
    return class_of(key)


def keeps_maths(key: str) -> bool:
    """Whether a dotted key may differ between a run and its resumption without a word."""
    return class_of(key)[0] is ChangeKind.SAFE


def config_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema; the names in `data.corpora` are a user's own, so that is one key."""
    for name, field in section.model_fields.items():
        # A section that may be left out is both a key, of whether it is there, and a section.
        kinds = get_args(field.annotation) if get_origin(field.annotation) is UnionType else (field.annotation,)
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for kind in inner:
            yield from config_keys(kind, f"{prefix}{name}.")
        if not inner or len(kinds) > 1:
            yield f"{prefix}{name}"


def check_allowed_keys(keys: Iterable[str], config: RunConfig) -> None:
    """Checks the keys that a user allows to change; one that changes nothing is no fault, so that a command can be
    repeated.

    Raises:
        ConfigError: a key that there isn't, with the nearest one, or that may never change, with the reason.
    """
    names = [*config.data.sources]
    extra = [form.format(name) for form in (FIM_KEY, VALIDATION_KEY) for name in names]
    known = [*config_keys(), *extra]
    for key in keys:
        kind, reason = class_of(key)
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"--allow-change {key}: there is no such key"
                + (f"; did you mean `{nearest[0]}`?" if nearest else "; it is a dotted key such as optimizer.beta2")
            )
        if kind is ChangeKind.FORBIDDEN and key not in extra:
            raise ConfigError(
                f"--allow-change {key}: can't be allowed: {reason}; put the key back, or give the changed run a folder"
                " of its own (run.folder) to start again, or to take over weights by `megascale import`"
            )


def batch_ramp_until(train: dict[str, Any], step: int) -> str:
    """The `train.batch_ramp`, as YAML, that gives the steps before `step` the batches that a resolved `train` gave."""
    stages = [stage for stage in train["batch_ramp"] if stage["until_step"] < step]
    under_way = [stage["global_batch_tokens"] for stage in train["batch_ramp"] if stage["until_step"] >= step]
    size = (*under_way, train["global_batch_tokens"])[0]
    ramp = [*stages, {"until_step": step, "global_batch_tokens": size}]
    return yaml.safe_dump(ramp, default_flow_style=True, sort_keys=False, width=1 << 16).strip()
