"""muP's coordinate check: `python -m megascale.train.coord_check REQUEST` prints a table; the request is JSON.

Models of several widths take some steps on the same random tokens. With muP the size of activations doesn't depend on
the width, neither at the start nor after a step; without it some of them grow with it, and the wider model diverges at
a learning rate that was the narrow one's best.

Source: Yang et al. 2022, arXiv 2203.03466, section 8 and appendix D.1.
"""

import sys
from collections.abc import Sequence
from math import log
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from megascale.config.load import load_config
from megascale.config.schema import RunConfig
from megascale.errors import ConfigError
from megascale.model.transformer import Transformer, build_model, parameter_shapes
from megascale.train.build import build_run_optimizer
from megascale.train.request import serve_request

ROWS, SEQ_LEN = 4, 32
KINDS = ("standard", "muP")
SHOWN = ("embedding", "attention", "feed_forward", "blocks", "logits")
"""What is measured: outputs of the embedding, of the halves of the blocks, of the blocks, and the logits."""

Sizes = dict[tuple[str, int, int], dict[str, float]]
"""(parametrization, width, step) -> what -> mean magnitude of its activations."""


def serve(request: dict) -> None:
    """Does what a request asks for."""
    config = load_config(Path(request["config"]), request["overrides"])
    widths = check_widths(request["widths"], config)
    sizes: Sizes = {}
    for kind in KINDS:
        for width in widths:
            for step, found in enumerate(measure(scaled_config(config, width, widths[0], kind), request["steps"])):
                sizes[kind, width, step] = found
    print_table(sizes, widths, request["steps"])
    if request["plot"]:
        draw_plot(sizes, widths, request["steps"], Path(request["plot"]))
        print(f"plot: {request['plot']}")


def check_widths(widths: Sequence[int], config: RunConfig) -> list[int]:
    """The widths in rising order.

    Raises:
        ConfigError: fewer than two, or some that the heads don't divide.
    """
    heads = config.model.num_heads
    wrong = [width for width in widths if width % (2 * heads)]
    if len(set(widths)) < 2 or wrong:
        raise ConfigError(
            f"--widths {','.join(map(str, widths))}: give two or more multiples of {2 * heads}, twice model.num_heads,"
            f" such as {16 * heads},{32 * heads},{64 * heads}"
        )
    return sorted(set(widths))


def scaled_config(config: RunConfig, width: int, base_width: int, kind: str) -> RunConfig:
    """The config with another width: as many heads, of another size, and a feed-forward layer in proportion.

    Raises:
        ConfigError: a family or optimizer that muP isn't for.
    """
    model = config.model
    if model.family not in ("gpt2", "llama") or config.optimizer.kind not in ("adamw", "lion"):
        raise ConfigError(
            f"coord-check with model.family = {model.family} and optimizer.kind = {config.optimizer.kind}: muP is there"
            " for families gpt2 and llama with adamw or lion"
        )
    changes = {
        "d_model": width, "head_width": None, "d_ff": model.ffn_dim * width // model.d_model, "dropout": 0.0,
        "max_seq_len": max(SEQ_LEN, model.max_seq_len), "mup_base_width": base_width if kind == "muP" else None,
    }
    values = config.model_dump()
    return RunConfig.model_validate(values | {"model": values["model"] | changes})


def measure(config: RunConfig, num_steps: int) -> list[dict[str, float]]:
    """Mean magnitudes of activations before each step, and after the last.

    Cost: num_steps + 1 passes over 128 tokens, on one core or GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config.model, config.run.seed).to(device)
    optimizer = build_run_optimizer(config, model.named_parameters(), parameter_shapes(config.model))
    generator = torch.Generator().manual_seed(config.run.seed)
    tokens = torch.randint(config.model.vocab_size, (ROWS, SEQ_LEN + 1), generator=generator).to(device)
    sizes: list[dict[str, float]] = []
    watch(model, sizes)
    for group in optimizer.param_groups:
        group["lr"] = config.optimizer.learning_rate * group["lr_factor"]
    for _ in range(num_steps + 1):
        sizes.append({})
        logits_BTV = model(tokens[:, :-1])[..., : config.model.vocab_size]
        sizes[-1]["logits"] = logits_BTV.detach().abs().mean().item()
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return sizes


def watch(model: Transformer, sizes: list[dict[str, float]]) -> None:
    """Has the last entry of `sizes` filled at each pass, by the mean over the blocks."""
    num_blocks = model.config.num_layers

    def note(what: str, share: float):
        def add(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            sizes[-1][what] = sizes[-1].get(what, 0.0) + output.detach().abs().mean().item() * share

        return add

    for spec, layer in zip(model.own_specs, model.layers, strict=True):
        if spec.name == "embedding":
            layer.register_forward_hook(note("embedding", 1.0))
        elif spec.name.startswith("blocks."):
            layer.register_forward_hook(note("blocks", 1 / num_blocks))
            layer.attention.register_forward_hook(note("attention", 1 / num_blocks))
            layer.feed_forward.register_forward_hook(note("feed_forward", 1 / num_blocks))


def slope(sizes: Sizes, kind: str, step: int, what: str, widths: Sequence[int]) -> float:
    """By which power of the width a size grows, from the narrowest to the widest model."""
    first, last = (sizes[kind, width, step][what] for width in (widths[0], widths[-1]))
    return log(last / first) / log(widths[-1] / widths[0])


def print_table(sizes: Sizes, widths: Sequence[int], num_steps: int) -> None:
    """After the last step, what each size is by width, and by which power it grows; then the largest power."""
    for kind in KINDS:
        print(f"{kind}: mean |activation| after {num_steps} steps")
        print(f"{'width':<14}" + "".join(f"{width:>10}" for width in widths) + f"{'power':>10}")
        for what in SHOWN:
            row = [sizes[kind, width, num_steps][what] for width in widths]
            power = slope(sizes, kind, num_steps, what, widths)
            print(f"{what:<14}" + "".join(f"{value:>10.4f}" for value in row) + f"{power:>+10.2f}")
        print()


def draw_plot(sizes: Sizes, widths: Sequence[int], num_steps: int, path: Path) -> None:
    """Sizes over widths, a line a step; a row of panels a parametrization."""
    figure, panels = plt.subplots(2, len(SHOWN), figsize=(3 * len(SHOWN), 6), sharex=True, sharey="col")
    for kind, row in zip(KINDS, panels, strict=True):
        for what, panel in zip(SHOWN, row, strict=True):
            for step in range(num_steps + 1):
                values = [sizes[kind, width, step][what] for width in widths]
                panel.plot(widths, values, marker="o", label=f"step {step}")
            panel.set(xscale="log", yscale="log", title=f"{kind}: {what}")
            panel.set_xticks(widths, widths)
            panel.minorticks_off()
    for panel in panels[-1]:
        panel.set_xlabel("width")
    for row in panels:
        row[0].set_ylabel("mean |activation|")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
