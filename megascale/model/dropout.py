"""Dropout as a pure function of (seed, step, row, layer, position, feature).

There is no random state: each feature's number is a hash of where it is. So the same feature is dropped in any layout,
on CPU and GPU, and when activations are recomputed; ranks can neither agree nor differ by accident.

Shapes: B rows, T positions, D d_model.
"""

import torch
from torch import nn

from megascale.model.context import Context
from megascale.model.seeds import derive_seed

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 / golden ratio, odd, as int64: spreads consecutive integers over 64 bits (Steele et al. 2014, SplitMix)."""
GOLDEN_GAMMA_32 = 0x9E3779B9 - (1 << 32)
"""The same for 32 bits."""


class Dropout(nn.Module):
    """Zeroes each feature with probability `probability` in training, and scales the others to keep the mean.

    Attention probabilities are not dropped, unlike in GPT-2: a fused attention kernel draws them from a random state
    of its own, which no key by row and position can steer. The embeddings and both residual updates of a block are.

    Cost: about 15 elementwise passes over (B, T, D) in int32 in eager mode, nothing when the probability is 0.
    """

    def __init__(self, probability: float, site: str):
        """`site` is the layer's global name; it keeps the masks of different layers apart."""
        super().__init__()
        self.probability = probability
        # A tensor, because torch.compile would make one graph per layer for a Python integer. Integers survive a cast.
        self.register_buffer("site_key", torch.tensor(derive_seed("dropout", site)), persistent=False)

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        if not self.training or self.probability == 0:
            return hidden_BTD
        if context.row_keys_B is None:
            raise ValueError("dropout in training mode needs context.row_keys_B; see dropout.derive_row_keys")
        num_features = hidden_BTD.shape[-1]
        bits_BTD = random_bits(context.row_keys_B, context.columns_T, num_features, self.site_key)
        threshold = round(self.probability * 2**32) - 2**31
        kept_BTD = torch.where(bits_BTD >= threshold, hidden_BTD, 0)
        return kept_BTD * (1 / (1 - self.probability))


def derive_row_keys(row_numbers_B: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """One random key per row of a batch, from the run's seed, the step and the row's global number.

    Shape: (B) int64 to (B) int64.
    """
    return mix_64(mix_64(row_numbers_B + derive_seed("rows", seed)) + step * GOLDEN_GAMMA % 2**63)


def random_bits(
    row_keys_B: torch.Tensor, columns_T: torch.Tensor, num_features: int, site_key: torch.Tensor
) -> torch.Tensor:
    """32 random bits per feature, uniform over all of int32.

    Rows and positions are hashed in 64 bits, where there are few of them; features only in 32, which GPUs and vector
    units do several times faster.

    Shape: (B, T, D) int32.
    """
    site_keys_B = mix_64(row_keys_B ^ site_key)
    keys_BT = mix_64(site_keys_B[:, None] + columns_T * GOLDEN_GAMMA)
    features_D = torch.arange(num_features, dtype=torch.int32, device=row_keys_B.device) * GOLDEN_GAMMA_32
    return mix_32(keys_BT[..., None].to(torch.int32) + features_D)


def mix_64(values: torch.Tensor) -> torch.Tensor:
    """A permutation of int64 in which each input bit flips about half of the output bits.

    Source: Stafford's variant 13 of MurmurHash3's finalizer, as in SplitMix64 (Steele et al. 2014).
    """
    values = (values ^ shift_right(values, 30, 64)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    values = (values ^ shift_right(values, 27, 64)) * (0x94D049BB133111EB - (1 << 64))
    return values ^ shift_right(values, 31, 64)


def mix_32(values: torch.Tensor) -> torch.Tensor:
    """The same for int32.

    Source: `lowbias32` of Wellons, "Prospecting for Hash Functions", 2018.
    """
    values = (values ^ shift_right(values, 16, 32)) * 0x7FEB352D
    values = (values ^ shift_right(values, 15, 32)) * (0x846CA68B - (1 << 32))
    return values ^ shift_right(values, 16, 32)


def shift_right(values: torch.Tensor, count: int, width: int) -> torch.Tensor:
    """Logical right shift of signed integers of `width` bits, whose own shift would drag the sign along."""
    return (values >> count) & ((1 << (width - count)) - 1)
