"""The routers of a run: their loads gathered over all ranks, figures of them for the log, and their moving biases."""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megascale.config.model import ModelConfig
from megascale.engine.base import StatePiece, StepOutput
from megascale.model.axes import Axes
from megascale.model.moe.balance import move_bias
from megascale.model.moe.layer import MoeLayer
from megascale.model.moe.router import router_biases
from megascale.model.transformer import Transformer
from megascale.parallel.boxes import Box
from megascale.parallel.mesh import Mesh


def bias_pieces(model: Transformer, is_owner: bool) -> Iterator[StatePiece]:
    """The moving biases of this rank's routers as parts of a checkpoint; none without `balance: bias`."""
    for name, bias_E in router_biases(model).items():
        shape = tuple(bias_E.shape)
        yield StatePiece(f"buffer/{name}", shape, Box((0,), shape), bias_E, is_owner)


class RouterWatcher:
    """Counts what this rank's routers did, and after each step moves their biases where they have one.

    The biases are training state (`buffer/blocks.N.feed_forward.router.bias` in checkpoints).
    """

    def __init__(self, model: Transformer, config: ModelConfig, axes: Axes, mesh: Mesh):
        self.moe, self.mesh, self.is_sequence_parallel = config.moe, mesh, axes.is_sequence_parallel
        self.model = model
        self.layers = {
            int(name.split(".")[1]): layer for name, layer in model.named_modules() if isinstance(layer, MoeLayer)
        }
        self.sparse_blocks = config.sparse_blocks
        self.num_labels = 0
        self.reset()

    def reset(self) -> None:
        """Begins to count anew."""
        self.counts = dict.fromkeys(self.layers, 0)
        self.sums = dict.fromkeys(self.layers, 0)
        self.num_labels = 0

    def after_step(self, output: StepOutput) -> None:
        """Cost: with `balance: bias` one all-reduce of 8 E bytes a layer over dp and cp."""
        taken = {block: layer.tally.take() for block, layer in self.layers.items()}
        for block, (counts_E, sums_2) in taken.items():
            self.counts[block] = self.counts[block] + counts_E
            self.sums[block] = self.sums[block] + sums_2
        self.num_labels += output.num_tokens
        if self.moe.balance == "bias" and taken and not output.is_skipped:
            loads_LE = torch.stack([counts_E[:-1] for counts_E, _ in taken.values()]).to(self.mesh.device)
            dist.all_reduce(loads_LE, group=self.mesh.zero_group)
            for layer, load_E in zip(self.layers.values(), loads_LE, strict=True):
                move_bias(layer.router.bias, load_E, self.moe.bias_rate)

    def state_pieces(self) -> Iterator[StatePiece]:
        """The biases: equal on all ranks that have the layer, of which the first writes them."""
        return bias_pieces(self.model, self.mesh.tp.rank == 0 and dist.get_rank(self.mesh.zero_group) == 0)

    def figures(self) -> dict[str, float]:
        """Of each sparse block: the load of its busiest expert over the mean, the part of the choices that was dropped,
        the balance loss and the z-loss, averaged over the labels of the steps since it was last asked.

        Cost: one all-reduce of 8 (E + 3) bytes a layer on CPU.
        """
        rows = []
        for block in self.sparse_blocks:
            counts, sums = self.counts.get(block, 0), self.sums.get(block, 0)
            is_seen = isinstance(counts, torch.Tensor)
            rows += [*counts.tolist(), *sums.tolist()] if is_seen else [0.0] * (self.moe.num_experts + 3)
        totals = torch.tensor(self.mesh.control_sum(rows, dtype=torch.float64), dtype=torch.float64)
        # tp ranks count the same tokens; the sums are of shards, where there are sequence shards.
        counts_LE, sums_L2 = totals.view(len(self.sparse_blocks), -1).tensor_split([-2], dim=1)
        counts_LE = counts_LE / self.mesh.tp.size
        sums_L2 = sums_L2 / (1 if self.is_sequence_parallel else self.mesh.tp.size) / max(1, self.num_labels)
        self.reset()
        figures = {}
        for block, counts_E, (balance, z) in zip(self.sparse_blocks, counts_LE, sums_L2.tolist(), strict=True):
            loads_E, dropped = counts_E[:-1], counts_E[-1].item()
            total = max(1.0, loads_E.sum().item())
            figures |= {
                f"experts/{block}/load_max": loads_E.max().item() * len(loads_E) / total,
                f"experts/{block}/dropped_fraction": dropped / total,
                f"experts/{block}/balance_loss": balance,
                f"experts/{block}/z_loss": z,
            }
        return figures
