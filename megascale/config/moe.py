"""The section that makes feed-forward layers sparse: which experts there are, and how tokens are shared out."""

from typing import Literal

from pydantic import Field

from megascale.config.base import Section


class MoeConfig(Section):
    """Mixture of experts in place of the feed-forward layers of family `moe`."""

    num_experts: int = Field(ge=2)
    """Routed experts of a layer."""

    top_k: int = Field(2, ge=1)
    """Experts that each token goes to: 1 as in Switch (Fedus et al. 2021, arXiv 2101.03961), 2 as in GLaM and Mixtral
    (Jiang et al. 2024, arXiv 2401.04088), 6 or 8 with fine-grained experts."""

    d_expert: int | None = Field(None, ge=1)
    """Width of an expert, in features. Empty: `model.d_ff`. Fine-grained experts are narrower (Dai et al. 2024,
    DeepSeekMoE, arXiv 2401.06066)."""

    num_shared_experts: int = Field(0, ge=0)
    """Experts that every token goes to besides; they are one feed-forward layer of so many times the width (Dai et al.
    2024, section 3.2). 0, the default: none."""

    num_dense_layers: int = Field(0, ge=0)
    """First blocks that keep an ordinary feed-forward layer of width `model.d_ff`; DeepSeek-V3 has 3 of them."""

    every: int = Field(1, ge=1)
    """Every so many-th block is sparse, the last of each such run; 1, the default, is every block; GLaM has 2."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores. `softmax` over all experts; `sigmoid` for each by itself, as in
    DeepSeek-V3 (arXiv 2412.19437, section 2.1.2)."""

    normalize_scores: bool = True
    """Whether the scores of a token's experts are scaled to sum to 1. Off for top_k 1, or the score would be lost: a
    Switch layer multiplies by it."""

    score_scale: float = Field(1.0, gt=0)
    """Factor of the routed experts' output; DeepSeek-V3 has 2.5."""

    capacity_factor: float | None = Field(None, gt=0)
    """Tokens that an expert takes of each row at most, as a multiple of an equal share; others are dropped, which the
    log shows. Empty, the default: no token is dropped."""

    balance: Literal["loss", "bias", "none"] = "loss"
    """What keeps experts equally used. `loss`: an auxiliary loss over each row (Fedus et al. 2021, section 2.2).
    `bias`: added to the scores when experts are chosen, and moved after each step against their load (Wang et al.
    2024, arXiv 2408.15664)."""

    balance_weight: float = Field(0.01, ge=0)
    """Weight of the auxiliary loss. 0.01 as in Switch."""

    bias_rate: float = Field(0.001, gt=0)
    """How far `balance: bias` moves a bias in a step."""

    z_weight: float = Field(0.0, ge=0)
    """Weight of the router's z-loss, which keeps its logits small; 0.001 in ST-MoE (Zoph et al. 2022, arXiv
    2202.08906). 0, the default: none."""
