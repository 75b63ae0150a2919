"""Text from a run: `python -m megascale.train.generate REQUEST` prints it as it comes; the request is JSON.

The weights come from the newest whole checkpoint, in whatever layout it was written: into one process, or over as many
ranks as the request's tp x pp, of which each reads and holds its own part.
"""

import json
import os
import sys
from pathlib import Path

import torch

from megascale.checkpoint.find import VerifiedCheckpoint, peek_checkpoint
from megascale.checkpoint.load import fill_pieces
from megascale.checkpoint.run_file import RUN_FILE, peek_run_store, read_run_file
from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.config.training import ParallelConfig
from megascale.data.tokenizer import load_tokenizer
from megascale.engine.base import StatePiece
from megascale.engine.pipeline import build_forward_pipeline
from megascale.errors import CheckpointError, MegascaleError
from megascale.model.axes import ONE_RANK, Axes
from megascale.model.context import build_context
from megascale.model.generate import LanguageModel, Sampling, generate
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, close_mesh, read_rank_info
from megascale.train.build import build_axes, own_stages
from megascale.train.run_folder import TOKENIZER_FILE


def load_model(
    checkpoint: VerifiedCheckpoint, config: RunConfig, axes: Axes = ONE_RANK, stages: list[range] | None = None
) -> Transformer:
    """The checkpoint's model in fp32, ready to use: all of it, or this rank's part.

    Cost: reads the bytes of this part once.
    """
    model = build_model(config.model, config.run.seed, axes, stages)
    fill_pieces(checkpoint, [
        StatePiece(f"master/{place.name}", place.global_shape, place.box, parameter.data.view(-1), is_owner=False)
        for parameter, place in model.placements().items()
    ])
    return model.eval()


class SharedModel:
    """A model whose layers several ranks share, as generation asks for it; every rank calls it with the same rows."""

    def __init__(self, checkpoint: VerifiedCheckpoint, config: RunConfig, mesh: Mesh):
        self.config, self.mesh, self.device = config.model, mesh, mesh.device
        self.axes = build_axes(config, mesh)
        self.model = load_model(checkpoint, config, self.axes, list(own_stages(config, mesh).values())).to(mesh.device)
        self.pipeline = None
        if mesh.pp.size > 1:
            (stage,) = self.model.stages
            self.pipeline = build_forward_pipeline(stage, self.config.d_model, torch.float32, mesh.device, mesh.pp)

    def __call__(self, tokens_BT: torch.Tensor, *, last_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of position `last_B` of each row, the same on every rank.

        Cost: the collectives of one forward pass, and of the last positions' logits.
        """
        context = build_context(self.config, tokens_BT.shape[1], self.device, self.axes)
        if self.pipeline is None:
            return self.model(tokens_BT, context, last_B=last_B)
        hidden_shape = (*tokens_BT.shape, self.config.d_model)
        return self.pipeline.logits(tokens_BT, context, last_B, hidden_shape, self.config.padded_vocab_size)


def open_model(checkpoint: VerifiedCheckpoint, layout: Layout) -> LanguageModel:
    """The checkpoint's model over the ranks of a layout, or in this process when that is one rank.

    Raises:
        ConfigError: the layout doesn't fit the model.
    """
    config = parse_config(checkpoint.index.run.config, source=str(checkpoint.path))
    if layout.world_size == 1:
        return load_model(checkpoint, config)
    parallel = ParallelConfig(tp=layout.tp, pp=layout.pp, zero_stage=0, sequence_parallel=False, schedule="gpipe")
    config = config.model_copy(update={"parallel": parallel})
    derive(config, layout.world_size, source=str(checkpoint.path))
    return SharedModel(checkpoint, config, build_mesh(layout, read_rank_info(dict(os.environ))))


def print_continuation(run_folder: Path, prompt: str, max_tokens: int, sampling: Sampling, layout: Layout) -> None:
    """Prints the prompt and its continuation, token by token, to the standard output of the first rank.

    Raises:
        CheckpointError, DataError: no whole checkpoint, or no tokenizer to read and write text with.
    """
    model = open_model(peek_checkpoint(peek_run_store(run_folder)), layout)
    tokenizer = load_tokenizer(run_folder / TOKENIZER_FILE)
    run_file = read_run_file(run_folder)
    if run_file is None:
        raise CheckpointError(f"{run_folder / RUN_FILE} is missing; it names the token that ends a text")
    end = run_file.eos_id
    tokens = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
    say = print if os.environ.get("RANK", "0") == "0" else lambda *_, **__: None
    say(prompt, end="", flush=True)
    shown, drawn = "", []
    for (token,) in generate(model, [tokens], max_tokens, sampling, eos_token=end):
        if token is None or token == end:
            break
        drawn.append(token)
        text = tokenizer.decode(drawn)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest of its bytes
            say(text[len(shown):], end="", flush=True)
            shown = text
    say()


def main(request: str) -> int:
    """Runs one request; a user's error is one message and an exit code."""
    values = json.loads(request)
    try:
        print_continuation(
            Path(values["run_folder"]), values["prompt"], values["max_tokens"], Sampling(**values["sampling"]),
            Layout(**values["layout"]),
        )
    except MegascaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
