"""The rank of `bench.nanogpt`: both models side by side, and the rows of the table.

Argument: the options of `bench.nanogpt` as JSON.
Shapes: B rows, T positions, D d_model, H heads, C head_dim, V vocabulary.
"""

import json
import os
import sys
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from bench.figures import show_ratios, show_row
from bench.nanogpt import shape_of_config
from bench.step_overhead import Shape
from bench.step_rank import CLIP_NORM, LEARNING_RATE, LOSS_TOLERANCE, SEED, Step, our_step, run_rounds
from megascale.config.model import ModelConfig
from megascale.data.batch import Batch
from megascale.model.families.hf_names import split_qkv
from megascale.model.flops import num_parameters
from megascale.model.transformer import build_model
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, close_mesh, read_rank_info


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), without biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.d_model
        self.num_heads = config.num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv, self.mixed = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norms[0](hidden_BTD)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        mixed_BHTC = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden_BTD = hidden_BTD + self.mixed(mixed_BHTC.transpose(1, 2).flatten(2))
        return hidden_BTD + self.down(F.gelu(self.up(self.norms[1](hidden_BTD))))


class PlainGpt(nn.Module):
    """A GPT by hand. Shape: (B, T) int64 to (B, T, V)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        columns_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        hidden_BTD = self.tokens(tokens_BT) + self.positions(columns_T)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD)
        return F.linear(self.norm(hidden_BTD), self.tokens.weight)


@torch.no_grad()
def plain_model(config: ModelConfig) -> PlainGpt:
    """The model by hand with the weights that ours begins with."""
    ours, plain = build_model(config, SEED), PlainGpt(config)
    plain.tokens.weight.copy_(ours.embedding.tokens.weight)
    plain.positions.weight.copy_(ours.embedding.positions.weight)
    for index, block in enumerate(plain.blocks):
        source = ours.get_submodule(f"blocks.{index}")
        block.qkv.weight.copy_(torch.cat(split_qkv(config, source.attention.qkv.weight)))
        block.mixed.weight.copy_(source.attention.output.weight)
        block.up.weight.copy_(source.feed_forward.up.weight)
        block.down.weight.copy_(source.feed_forward.output.weight)
    return plain


def plain_step(shape: Shape, *, is_fused: bool) -> Step:
    """The step of a loop as nanoGPT has it: cross-entropy of all logits, clipping, AdamW with decay of matrices.

    nanoGPT asks for the fused kernel on GPUs alone, though torch has one for CPUs, too.
    """
    model = plain_model(shape.model)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8, fused=is_fused)

    def step(batch: Batch, number: int) -> float:
        loss = F.cross_entropy(model(batch.tokens_BT).flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(threads: int, mesh: Mesh, seconds: float) -> str:
    """One row of the table."""
    torch.set_num_threads(threads)
    shape = shape_of_config()
    steps = {
        "ours": our_step(shape, "fp32", 0, mesh), "other": plain_step(shape, is_fused=False),
        "fused": plain_step(shape, is_fused=True),
    }
    times = run_rounds(steps, shape, mesh, seconds, LOSS_TOLERANCE["fp32"])
    pairs = (("ours", "other"), ("ours", "fused"), ("fused", "other"))
    ratios = [show_ratios(a / b for a, b in zip(times[x], times[y], strict=True)) for x, y in pairs]
    return show_row((
        threads, f"{num_parameters(shape.model) / 1e6:.2f} M", shape.rows, shape.seq_len,
        f"{1e3 * median(times['other']):.2f}", *ratios, len(times["other"]),
    ))


def main() -> None:
    options = json.loads(sys.argv[1])
    mesh = build_mesh(Layout(), read_rank_info(dict(os.environ)), timeout_s=120)
    for threads in options["threads"]:
        print(measure(threads, mesh, options["seconds"]), flush=True)
    mesh.barrier()
    close_mesh()


if __name__ == "__main__":
    main()
