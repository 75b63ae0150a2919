"""Rotary position embeddings: queries and keys are turned by an angle that grows with the position.

Feature c is paired with feature c + C/2, as in Hugging Face's LLaMA, so weights exchange without a permutation.
Shapes: B rows, T positions, H heads, C head_dim.
Source: Su et al. 2021 (RoFormer), section 3.2.
"""

import torch


def rotary_table(position_ids_BT: torch.Tensor, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of every position, in fp32 whatever the model's dtype.

    Recomputed per micro-batch rather than kept as a buffer: it is B T C numbers at most, and an engine that casts a
    model to bf16 casts its buffers too, which would spoil long positions.

    Returns:
        Two tensors (B, T, 1, C). The sine is negated in the first half of the features, so that `rotate` needs none.
    """
    exponents_c = torch.arange(0, head_dim, 2, device=position_ids_BT.device, dtype=torch.float32) / head_dim
    angles_BTc = position_ids_BT[..., None].float() * base**-exponents_c
    cos_BTc, sin_BTc = angles_BTc.cos(), angles_BTc.sin()
    return (
        torch.cat((cos_BTc, cos_BTc), dim=-1)[:, :, None],
        torch.cat((-sin_BTc, sin_BTc), dim=-1)[:, :, None],
    )


def rotate(heads_BTHC: torch.Tensor, cos_BT1C: torch.Tensor, sin_BT1C: torch.Tensor) -> torch.Tensor:
    """Turns each pair of features by the angle of its position; computes in fp32, returns the input's dtype."""
    swapped_BTHC = heads_BTHC.roll(heads_BTHC.shape[-1] // 2, dims=-1)
    return (heads_BTHC * cos_BT1C + swapped_BTHC * sin_BT1C).to(heads_BTHC.dtype)
