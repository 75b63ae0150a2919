"""A mixture of experts as the config of MixtralForCausalLM, and back. Pure, no torch.

Its auxiliary loss is K times ours and the mean over the layers, where ours is their sum: so the factors differ.
"""

from collections.abc import Mapping
from typing import Any

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError

PLAIN = {
    "num_shared_experts": 0, "num_dense_layers": 0, "every": 1, "scores": "softmax", "normalize_scores": True,
    "score_scale": 1.0,
}
"""What holds for every Mixtral."""


def mixtral_fields(config: ModelConfig) -> dict[str, Any]:
    """What `config.json` says besides a LLaMA's fields.

    Raises:
        ConfigError: MixtralForCausalLM computes something else.
    """
    check_mixtral(config)
    moe = config.moe
    weight = moe.balance_weight if moe.balance == "loss" else 0.0
    return {
        "model_type": "mixtral", "intermediate_size": config.expert_dim, "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "router_aux_loss_coef": weight * config.num_layers / moe.top_k,
        "output_router_logits": False, "router_jitter_noise": 0.0, "sliding_window": config.window,
    }


def moe_section(known: Mapping[str, Any]) -> dict[str, Any]:
    """What a `config.json` of Mixtral says of its experts, in the fields of `model.moe` that decide what it is."""
    return PLAIN | {"num_experts": known["num_local_experts"], "top_k": known["num_experts_per_tok"]}


def moe_section_of(model: ModelConfig) -> dict[str, Any]:
    """The same fields of a model."""
    return {field: getattr(model.moe, field) for field in ("num_experts", "top_k", *PLAIN)}


def check_mixtral(config: ModelConfig) -> None:
    """Makes sure that MixtralForCausalLM computes what this model computes.

    Raises:
        ConfigError: with the settings that it doesn't have.
    """
    moe = config.moe
    lacks = {
        "num_shared_experts": moe.num_shared_experts > 0,
        "num_dense_layers or every": len(config.sparse_blocks) < config.num_layers,
        "scores = sigmoid": moe.scores != "softmax",
        "normalize_scores = false": not moe.normalize_scores,
        "score_scale": moe.score_scale != 1.0,
        "capacity_factor": moe.capacity_factor is not None,
        "balance = bias": moe.balance == "bias",
    }
    found = [f"model.moe.{name}" for name, is_there in lacks.items() if is_there]
    found += ["model.activation"] if config.feed_forward != "swiglu" else []
    found += ["model.qk_norm"] if config.qk_norm else []
    if found:
        raise ConfigError(
            f"this mixture of experts can't be exported: MixtralForCausalLM has no {', '.join(found)}. It has softmax"
            " scores, normalised over the chosen experts, in every block, and drops no token"
        )
