"""Which experts each token goes to, and with what weight.

Shapes: B rows, T positions, D d_model, E experts, K experts of a token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megascale.config.model import ModelConfig


class Choice(NamedTuple):
    """What a router says of its tokens.

    Attributes:
        logits_BTE: fp32.
        shares_BTE: fp32, the scores of a token's experts as parts of 1; what the balance loss is taken of.
        experts_BTK: int64, the experts of each token.
        gates_BTK: fp32, by which each one's output is multiplied.
    """

    logits_BTE: torch.Tensor
    shares_BTE: torch.Tensor
    experts_BTK: torch.Tensor
    gates_BTK: torch.Tensor


class Router(nn.Module):
    """A linear layer in fp32, whatever the format of the run: rounded logits would tip the choice.

    Attributes:
        bias: (E) fp32, added to the scores when experts are chosen, and to nothing else; None without `balance: bias`.
            No gradient moves it, see `balance.move_bias`.

    Source: Fedus et al. 2021, section 2.4 (fp32); Jiang et al. 2024, section 2.1 (scores of the chosen only); Wang et
        al. 2024, section 3 (the bias); DeepSeek-V3, section 2.1.2 (sigmoid).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        moe = config.moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, config.d_model))
        self.register_buffer("bias", torch.zeros(moe.num_experts) if moe.balance == "bias" else None)
        self.top_k, self.is_softmax = moe.top_k, moe.scores == "softmax"
        self.is_normalized, self.scale = moe.normalize_scores, moe.score_scale

    def forward(self, hidden_BTD: torch.Tensor) -> Choice:
        """
        Shape: (B, T, D).
        """
        wide = torch.promote_types(hidden_BTD.dtype, torch.float32)
        logits_BTE = F.linear(hidden_BTD.to(wide), self.weight.to(wide))
        scores_BTE = logits_BTE.softmax(dim=-1) if self.is_softmax else logits_BTE.sigmoid()
        shares_BTE = scores_BTE if self.is_softmax else scores_BTE / scores_BTE.sum(dim=-1, keepdim=True)
        ranked_BTE = scores_BTE.detach() if self.bias is None else scores_BTE.detach() + self.bias
        experts_BTK = ranked_BTE.topk(self.top_k, dim=-1).indices
        gates_BTK = scores_BTE.gather(-1, experts_BTK)
        if self.is_normalized:
            gates_BTK = gates_BTK / gates_BTK.sum(dim=-1, keepdim=True)
        return Choice(logits_BTE, shares_BTE, experts_BTK, gates_BTK * self.scale)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Keeps the bias in fp32 where a model is cast, as DeepSpeed's engine does: it moves by less than bf16 sees."""
        kept = None if self.bias is None else self.bias.clone()
        super()._apply(fn, recurse)
        if kept is not None and not kept.is_meta:
            self.bias = kept.to(self.bias.device)
        return self


def router_biases(model: nn.Module) -> dict[str, torch.Tensor]:
    """The moving biases of a model by their names: state that a checkpoint has beside the weights."""
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    return {f"{name}.bias": router.bias for name, router in routers.items() if router.bias is not None}
