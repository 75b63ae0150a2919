"""The last layer: the residual stream to one logit per token id.

Shapes: B rows, T positions, D d_model, V padded vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig
from megascale.model.context import Context


class Head(nn.Module):
    """Logits of the next token. Ids that only pad the vocabulary get minus infinity: no softmax gives them anything.

    Shape: (B, T, D) to (B, T, V).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.padded_vocab_size, config.d_model))
        self.vocab_size = config.vocab_size

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        return F.linear(hidden_BTD, self.weight, self.padding_bias())

    def padding_bias(self) -> torch.Tensor | None:
        """A bias that adds 0 to real ids and minus infinity to padding; inside the product it costs no extra pass."""
        if self.weight.shape[0] == self.vocab_size:
            return None
        bias_V = self.weight.new_zeros(self.weight.shape[0])
        bias_V[self.vocab_size :] = float("-inf")
        return bias_V
