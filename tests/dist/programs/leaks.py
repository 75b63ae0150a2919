"""Runs the leak test as one rank, over several layouts of a config, some of them with a planted fault.

Arguments: the config's path, and a JSON list of [overrides, fault or null]. Rank 0 prints for each what `judge` says of
it and the counts of each comparison, as one JSON line.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.model import attention_mask, context, ring
from megascale.model.block import Block
from megascale.model.head import Head
from megascale.parallel.mesh import Mesh, close_mesh, join_ranks, lay_out_mesh, read_rank_info
from megascale.train import leak, objective
from megascale.train.build import layout_of
from megascale.train.leak_report import judge
from megascale.train.parity import model_names


def plant(fault: str | None, mesh: Mesh, patch: pytest.MonkeyPatch) -> None:
    """Makes the fault in this process."""
    def replace(owner: object, name: str, change: Callable) -> None:
        patch.setattr(owner, name, change(getattr(owner, name)))

    def one_document(build: Callable) -> Callable:
        return lambda *arguments, **options: build(*arguments, **(options | {"documents_BT": None}))

    if fault == "mask without documents":
        for module in (attention_mask, ring):
            replace(module, "visible", lambda visible: lambda q, k, _q, _k, *others, **options: visible(
                q, k, None, None, *others, **options
            ))
    elif fault == "mask without documents on tp rank 1" and mesh.tp.rank == 1:
        replace(context, "build_mask", lambda build: lambda c, _, *others, **options: build(
            c, None, *others, **options
        ))
    elif fault == "head of tp rank 1 mixes positions" and mesh.tp.rank == 1:
        replace(Head, "share", mix_positions)
    elif fault == "second stage without documents" and mesh.pp.rank == 1:
        replace(objective, "build_context", one_document)
    elif fault == "ring's backward without mask":
        replace(ring, "tile_backward", lambda backward: lambda *arguments: backward(*arguments[:7]))
    elif fault == "perturbs nothing":
        patch.setattr(leak, "perturb", lambda tokens_BT, *_: tokens_BT)
    elif fault == "attention that reads nothing":
        patch.setattr(Block, "attend", lambda self, hidden_BTD, _: hidden_BTD)
    elif fault == "noise":
        replace(Head, "share", lambda share: add_noise(share))


def mix_positions(share: Callable) -> Callable:
    def share_mixed(head: Head, hidden_BTD: torch.Tensor) -> torch.Tensor:
        shared_BTD = share(head, hidden_BTD)
        return shared_BTD + shared_BTD.mean(dim=1, keepdim=True)

    return share_mixed


def add_noise(share: Callable) -> Callable:
    def share_noisily(head: Head, hidden_BTD: torch.Tensor) -> torch.Tensor:
        shared_BTD = share(head, hidden_BTD)
        return shared_BTD + torch.rand_like(shared_BTD)

    return share_noisily


def main() -> None:
    path, info = Path(sys.argv[1]), read_rank_info(dict(os.environ))
    device = join_ranks(info, timeout_s=60)
    for overrides, fault in json.loads(sys.argv[2]):
        config = load_config(path, overrides)
        derived = derive(config, info.world_size)
        mesh, layers = lay_out_mesh(layout_of(config, derived), info.rank, device), model_names(config.model).layers
        with pytest.MonkeyPatch.context() as patch:
            plant(fault, mesh, patch)
            rows = leak.random_rows(config, derived, mesh)
            findings = leak.Tester(config, mesh, layers).find_leaks(rows, leak.TRIALS)
        if info.rank == 0:
            said = judge(findings, layers, leak.describe_where(config, mesh))
            print(json.dumps({"said": said, "counts": [each.counts for each in findings]}), flush=True)
    close_mesh()


if __name__ == "__main__":
    main()
