"""Runs one rank of the test of the vocabulary-parallel loss and of recompute over tp. Prints a line of JSON per case.

Argument: the vocabulary's real size; the padded one is PADDED.
"""

import json
import os
import sys
from collections import Counter

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megascale.config.model import ModelConfig
from megascale.model import loss as loss_module
from megascale.model.axes import Axes
from megascale.model.context import build_context
from megascale.model.dropout import derive_row_keys
from megascale.model.loss import linear_cross_entropy
from megascale.model.recompute import set_recompute
from megascale.model.transformer import build_model
from megascale.parallel.collectives import copy_to
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, close_mesh, read_rank_info

ROWS, FEATURES, PADDED, ROWS_PER_CHUNK = 50, 16, 64, 7
SHAPE = {"num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 61, "max_seq_len": 16, "num_kv_heads": 1}


class Operators(TorchDispatchMode):
    """Counts what runs and notes the most elements of any result."""

    def __init__(self):
        super().__init__()
        self.counts, self.most_elements = Counter(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[f"{operator.namespace}.{operator.overloadpacket.__name__}"] += 1
        result = operator(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.most_elements = max(self.most_elements, result.numel())
        return result


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def loss_case(mesh: Mesh, vocab_size: int) -> dict:
    """The loss and both gradients against the plain operators on the whole vocabulary in fp64."""
    generator, tp = torch.Generator().manual_seed(1), mesh.tp
    hidden_ND = torch.randn(ROWS, FEATURES, generator=generator)
    weight_VD = torch.randn(PADDED, FEATURES, generator=generator)
    labels_N = torch.randint(0, vocab_size, (ROWS,), generator=generator)
    labels_N[::7] = -100
    exact = hidden_ND.double().requires_grad_(), weight_VD.double().requires_grad_()
    expected = F.cross_entropy(F.linear(*exact)[:, :vocab_size], labels_N, reduction="sum")
    (expected * 0.1).backward()
    own = slice(tp.rank * PADDED // tp.size, (tp.rank + 1) * PADDED // tp.size)
    hidden_ND.requires_grad_()
    weight_vD = weight_VD[own].clone().requires_grad_()
    loss_module.CHUNK_ELEMENTS = ROWS_PER_CHUNK * PADDED // tp.size
    with Operators() as operators:
        loss = linear_cross_entropy(copy_to(hidden_ND, tp), weight_vD, labels_N, vocab_size, tp)
        (loss * 0.1).backward()
    return {
        "loss": loss.item(), "loss_gap": abs(loss.item() / expected.item() - 1),
        "hidden_gap": relative_gap(hidden_ND.grad, exact[0].grad),
        "weight_gap": relative_gap(weight_vD.grad, exact[1].grad[own]) if exact[1].grad[own].any() else 0.0,
        "most_elements": operators.most_elements, "num_reduced": operators.counts["_c10d_functional.all_reduce"],
    }


def recompute_case(mesh: Mesh, mode: str, is_sequence_parallel: bool, dropout: float) -> dict:
    """Loss and gradients of one step, and how often each operator ran."""
    config = ModelConfig(family="llama", dropout=dropout, **SHAPE)
    axes = Axes(tp=mesh.tp, kv=mesh.split_tp(mesh.tp.size), is_sequence_parallel=is_sequence_parallel)
    model = build_model(config, 1, axes)
    set_recompute(model, mode)
    tokens_BT = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
    keys_B = derive_row_keys(torch.arange(2), 1, 1) if dropout else None
    context = build_context(config, 16, tokens_BT.device, axes, row_keys_B=keys_B)
    with Operators() as operators:
        loss = model(tokens_BT[:, :-1], context, tokens_BT[:, 1:])
        loss.backward()
    gradients = {name: parameter.grad.double().sum().item() for name, parameter in model.named_parameters()}
    counts = {name: count for name, count in operators.counts.items() if name.startswith("_c10d") or "mm" in name}
    return {"loss": loss.item(), "gradients": gradients, "counts": counts}


def main() -> None:
    info = read_rank_info(dict(os.environ))
    torch.set_num_threads(1)
    mesh = build_mesh(Layout(tp=info.world_size), info, timeout_s=60)
    if sys.argv[1] == "loss":
        print(json.dumps(loss_case(mesh, int(sys.argv[2]))), flush=True)
    else:
        for mode in ("none", "selective", "full"):
            print(json.dumps(recompute_case(mesh, mode, sys.argv[2] == "sequence", float(sys.argv[3]))), flush=True)
    mesh.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
