"""Maximal update parametrization: what is tuned on a narrow model holds for a wide one.

With r the width over the base model's, as table 8 of the paper has it for Adam, which allows a tied head:

| parameter                 | initial std     | learning rate | multiplier |
|---------------------------|-----------------|---------------|------------|
| embeddings, norms, biases | init_std        | 1             | 1          |
| matrices of blocks        | init_std / r^.5 | 1 / r         | 1          |
| head                      | init_std        | 1             | 1 / r      |

Scores are q k / C in place of q k / sqrt(C). All dims of blocks are to grow alike. The decay of matrices is r times
stronger, since AdamW multiplies it by the learning rate: weights shrink as fast at every width.

Source: Yang et al. 2022, arXiv 2203.03466, table 8 and definition 4.1; decay: the paper's package `mup`, MuAdamW.
"""

from collections.abc import Sequence

from megascale.config.model import ModelConfig
from megascale.model.matrices import is_hidden_matrix


def lr_factor(name: str, shape: Sequence[int], config: ModelConfig) -> float:
    """Factor of a parameter's learning rate."""
    return 1 / config.width_ratio if is_hidden_matrix(name, shape) else 1.0


def decay_factor(name: str, shape: Sequence[int], config: ModelConfig) -> float:
    """Factor of a parameter's weight decay."""
    return config.width_ratio if is_hidden_matrix(name, shape) else 1.0


def score_scale(config: ModelConfig) -> float | None:
    """Factor of the products of queries and keys; None without muP."""
    return None if config.mup_base_width is None else 1 / config.head_dim


def logit_scale(config: ModelConfig) -> float:
    """Factor of the logits."""
    return 1 / config.width_ratio
