"""Router and experts to and from MixtralForCausalLM, whose files have the matrices of each expert apart.

Theirs are w1 (gate), w3 (up) and w2 (down) of each expert; all else of the model is named as a LLaMA's.
Legend: E experts, D d_model, F features of an expert.
"""

import torch

from megascale.config.model import ModelConfig
from megascale.model.families.hf_exchange import Exchange


def is_sparse_part(name: str) -> bool:
    """Whether the parameter with this global name is of a router or of its experts."""
    return ".feed_forward.router." in name or ".feed_forward.experts." in name


def mixtral_exchange(config: ModelConfig, name: str) -> Exchange:
    """How the parameter with this global name is exchanged."""
    block = name.split(".")[1]
    place = f"model.layers.{block}.block_sparse_moe"
    if name.endswith("router.weight"):
        return Exchange((f"{place}.gate.weight",), lambda t: (t,), lambda t: t)
    experts = [f"{place}.experts.{expert}" for expert in range(config.moe.num_experts)]
    if name.endswith("output.weight"):
        return Exchange(tuple(f"{expert}.w2.weight" for expert in experts), torch.unbind, stack)
    names = tuple(f"{expert}.{matrix}.weight" for expert in experts for matrix in ("w1", "w3"))
    return Exchange(names, lambda t: t.flatten(0, 1).unbind(), lambda *halves: stack(*halves).unflatten(0, (-1, 2)))


def stack(*matrices: torch.Tensor) -> torch.Tensor:
    """Matrices on top of each other along a new first dim."""
    return torch.stack(matrices)
