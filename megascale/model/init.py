"""The initial value of a parameter as a function of (seed, its global name): no layout changes the start.

Vectors of norms begin with one, biases with zero. How matrices begin is the family's; n is the number of inputs and m
that of outputs of a matrix, s `model.init_std`. Queries, keys and values are matrices of their own, and so are a gate
and what it gates, and each expert.

| family      | matrices                                              | tables                             |
|-------------|-------------------------------------------------------|------------------------------------|
| gpt2        | normal s; those that write to the stream s / (2 L)^.5 | normal s                           |
| llama, moe  | as gpt2; their papers give no rule                    | as gpt2                            |
| palm        | normal n^-.5                                          | normal 1                           |
| bert        | truncated normal s                                    | truncated normal s                 |
| t5          | normal n^-.5, queries (n C)^-.5                       | normal 1; that of distances D^-.5  |
| transformer | uniform, variance 2 / (n + m)                         | normal D^-.5                       |
| vit         | uniform, variance 2 / (n + m); of patches truncated   | truncated normal s, as the head,   |
|             | normal n^-.5                                          | which in the paper begins with 0   |

`model.init_scale` gives matrices of blocks a truncated normal (init_scale / n)^.5 instead, as Switch has it. muP
divides those of blocks by r^.5 (`megascale.model.mup`). L is the number of blocks of a decoder-only model, of which
each writes to the stream twice: its variance then doesn't grow with depth.

Source: gpt2: Radford et al. 2019, section 2.3; palm: Chowdhery et al. 2022, section 5; bert, t5 and vit: the code of
Devlin et al. 2019, Raffel et al. 2020 (Mesh TensorFlow) and Dosovitskiy et al. 2020; transformer: Glorot and Bengio
2010, and the code of Vaswani et al. 2017 (tensor2tensor); switch: Fedus et al. 2021, section 2.4.
"""

from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch

from megascale.config.model import ModelConfig
from megascale.model.matrices import is_hidden_matrix, split_fused
from megascale.model.seeds import derive_seed
from megascale.model.sharding import InitKind, rule_of

STD_OF_TRUNCATED = 0.87962566103423978
"""Standard deviation of a unit normal cut off at two; a truncated normal is drawn so that it has the one it says."""
TABLES = ("embedding.tokens.weight", "embedding.positions.weight", "embedding.segments.weight")
QUERIES = ("*.qkv.weight", "*.query.weight")


class Draw(NamedTuple):
    """How the elements of a matrix are drawn; all have mean 0.

    Attributes:
        distribution: `truncated` at twice its standard deviation before it is cut.
        std: standard deviation.
    """

    distribution: Literal["normal", "truncated", "uniform"]
    std: float


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The whole initial tensor of one parameter, in fp32 on the CPU; a sharded layout slices the result.

    Rows that only pad the vocabulary are zero; neither loss nor decay ever moves them.

    Cost: generates the whole tensor wherever it is called, about 10 ns per element on one core.
    """
    kind = rule_of(name).init
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "ones":
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    value = torch.empty(shape)
    parts = split_fused(name, value, config)
    draws = [draw_of(name, kind, part, part is value, index == 0, config) for index, part in enumerate(parts)]
    draw_unit(value, draws[0].distribution, generator)
    for part, draw in zip(parts, draws, strict=True):
        part.mul_(draw.std)
    if kind == "vocabulary":
        value[config.vocab_size :] = 0
    return value


def draw_unit(value: torch.Tensor, distribution: str, generator: torch.Generator) -> None:
    """Fills a tensor with numbers of mean 0 and standard deviation 1."""
    if distribution == "normal":
        torch.randn(value.shape, generator=generator, out=value)
    elif distribution == "uniform":
        value.uniform_(-(3**0.5), 3**0.5, generator=generator)
    else:
        torch.nn.init.trunc_normal_(value, a=-2.0, b=2.0, generator=generator).div_(STD_OF_TRUNCATED)


def draw_of(
    name: str, kind: InitKind, part: torch.Tensor, is_whole: bool, is_first: bool, config: ModelConfig
) -> Draw:
    """How a matrix begins, or a table.

    Args:
        part: a tensor of its shape; the last dim is its inputs.
        is_whole: whether that is a parameter of its own, or a stack; else its outputs are all dims but the last.
        is_first: whether it is the first of those that are fused.
    """
    num_inputs = part.shape[-1]
    num_outputs = part.shape[-2] if is_whole and part.dim() > 1 else part.numel() // num_inputs
    std, width = config.init_std, config.d_model
    is_table = part.dim() < 2 or name in TABLES
    is_matrix = is_hidden_matrix(name, part.shape)
    if config.init_scale is not None and is_matrix:
        return Draw("truncated", (config.init_scale / num_inputs) ** 0.5)
    if config.family == "bert":
        return Draw("truncated", std)
    if config.family == "vit":
        if is_table or kind == "vocabulary" or not name.endswith(".weight"):
            return Draw("truncated", std)
        return Draw("truncated", num_inputs**-0.5) if "patches" in name else xavier(num_inputs, num_outputs)
    if config.family == "transformer":
        return Draw("normal", width**-0.5) if is_table else xavier(num_inputs, num_outputs)
    if config.family == "palm":
        return Draw("normal", 1.0 if is_table else num_inputs**-0.5)
    if config.family == "t5":
        is_query = is_first and any(fnmatchcase(name, pattern) for pattern in QUERIES)
        inner = num_inputs * (config.head_dim if is_query else 1)
        return Draw("normal", 1.0 if is_table else width**-0.5 if "relative" in name else inner**-0.5)
    std = std / (2 * config.num_layers) ** 0.5 if kind == "residual" else std
    return Draw("normal", std / config.width_ratio**0.5 if is_matrix else std)


def xavier(num_inputs: int, num_outputs: int) -> Draw:
    """Keeps the variance of activations and, backwards, of gradients.

    Source: Glorot and Bengio 2010, equation 16.
    """
    return Draw("uniform", (2 / (num_inputs + num_outputs)) ** 0.5)
