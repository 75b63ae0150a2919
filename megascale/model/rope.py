"""Rotary position embeddings: queries and keys are turned by an angle that grows with the position.

Feature c is paired with feature c + C/2, as in Hugging Face's LLaMA, so weights exchange without a permutation.
Shapes: B rows, T positions, H heads, C head_dim.
Source: Su et al. 2021 (RoFormer), section 3.2.
"""

import math

import torch

from megascale.config.rope import RopeScalingConfig


def rotary_table(
    position_ids_BT: torch.Tensor, head_dim: int, base: float, scaling: RopeScalingConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of every position, in fp32 whatever the model's dtype.

    Recomputed per micro-batch rather than kept as a buffer: it is B T C numbers at most, and an engine that casts a
    model to bf16 casts its buffers too, which would spoil long positions.

    Returns:
        Two tensors (B, T, 1, C). The sine is negated in the first half of the features, so that `rotate` needs none.
    """
    angles_BTc = position_ids_BT[..., None].float() * frequencies(head_dim, base, scaling, position_ids_BT.device)
    length = score_length(scaling)
    cos_BTc, sin_BTc = angles_BTc.cos() * length, angles_BTc.sin() * length
    return (
        torch.cat((cos_BTc, cos_BTc), dim=-1)[:, :, None],
        torch.cat((-sin_BTc, sin_BTc), dim=-1)[:, :, None],
    )


def frequencies(
    head_dim: int, base: float, scaling: RopeScalingConfig | None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Radians that each pair of features turns by per position, fp32, fastest first. Shape: (C / 2,)."""
    exponents_c = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    plain_c = base**-exponents_c
    if scaling is None:
        return plain_c
    kept_c = kept_share(plain_c, base, scaling)
    return plain_c * kept_c + plain_c / scaling.factor * (1 - kept_c)


def kept_share(plain_c: torch.Tensor, base: float, scaling: RopeScalingConfig) -> torch.Tensor:
    """How much of each frequency stays, from 1, unchanged, to 0, divided by the whole factor. Shape: (C / 2,).

    `linear` keeps none. The other two keep those that turn often over the original context: `llama3` by a ramp over the
    number of turns, `yarn` by one over the numbers of the pairs, its ends rounded outwards to whole pairs.

    Source: Chen et al. 2023, arXiv 2306.15595; Grattafiori et al. 2024, section 3.4.3 (the rule is that of their code);
        Peng et al. 2023, arXiv 2309.00071, section 3.2.
    """
    if scaling.kind == "linear":
        return torch.zeros_like(plain_c)
    if scaling.kind == "llama3":
        turns_c = scaling.original_seq_len * plain_c / (2 * math.pi)
        return ((turns_c - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    head_dim = 2 * len(plain_c)
    first, last = (
        head_dim * math.log(scaling.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
    pairs_c = torch.arange(len(plain_c), device=plain_c.device, dtype=torch.float32)
    # With both ends at one pair the ramp is a step there.
    return 1 - ((pairs_c - first) / max(last - first, 1e-3)).clamp(0, 1)


def score_length(scaling: RopeScalingConfig | None) -> float:
    """What `yarn` multiplies rotated queries and keys by, each: longer contexts spread the softmax, this sharpens it.

    Source: Peng et al. 2023, arXiv 2309.00071, equation 22.
    """
    return 0.1 * math.log(scaling.factor) + 1 if scaling is not None and scaling.kind == "yarn" else 1.0


def rotate(heads_BTHC: torch.Tensor, cos_BT1C: torch.Tensor, sin_BT1C: torch.Tensor) -> torch.Tensor:
    """Turns each pair of features by the angle of its position; computes in fp32, returns the input's dtype."""
    swapped_BTHC = heads_BTHC.roll(heads_BTHC.shape[-1] // 2, dims=-1)
    return (heads_BTHC * cos_BT1C + swapped_BTHC * sin_BT1C).to(heads_BTHC.dtype)
