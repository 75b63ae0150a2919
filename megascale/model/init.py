"""The initial value of a parameter as a function of (seed, its global name): no layout changes the start."""

import torch

from megascale.config.model import ModelConfig
from megascale.model.seeds import derive_seed
from megascale.model.sharding import rule_of


def initial_value(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> torch.Tensor:
    """The whole initial tensor of one parameter, in fp32 on the CPU; a sharded layout slices the result.

    Matrices are normal with `init_std`. Those that write to the residual stream are scaled down by
    1 / sqrt(2 num_layers), the number of such writes, so that the stream's variance doesn't grow with depth. Biases are
    zero and norms one. LLaMA's papers give no rule, and its family takes the same one. Rows that only pad the
    vocabulary are zero; neither loss nor decay ever moves them.

    Cost: generates the whole tensor wherever it is called, about 10 ns per element on one core.
    Source: Radford et al. 2019 (GPT-2), section 2.3.
    """
    kind = rule_of(name).init
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "ones":
        return torch.ones(shape)
    std = config.init_std / (2 * config.num_layers) ** 0.5 if kind == "residual" else config.init_std
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    value = torch.randn(shape, generator=generator).mul_(std)
    if kind == "vocabulary":
        value[config.vocab_size :] = 0
    return value
