"""A linear layer on uninitialised memory, with one or more dims of output features."""

import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """y = x W^T + b.

    Several output dims make a stacked weight, such as gate and up projections as (2, d_ff, d_model): one matrix product
    computes both, and a cut along d_ff keeps the pairs together. The memory is left as it is: parameters are
    initialised by name, and drawing them twice would double the start-up time of a large model.

    Shape: (..., in_features) to (..., product of out_features).
    """

    def __init__(self, in_features: int, *out_features: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*out_features, in_features))
        self.bias = nn.Parameter(torch.empty(*out_features)) if bias else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return F.linear(inputs, self.weight.flatten(0, -2), None if self.bias is None else self.bias.flatten())
