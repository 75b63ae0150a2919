"""Text from a run: `python -m megascale.train.generate REQUEST` prints it as it comes; the request is JSON.

One text is printed token by token; of several each is printed when it is done.

The weights come from the newest whole checkpoint, in whatever layout it was written: into one process, or over as many
ranks as the request's tp x pp, of which each reads and holds its own part.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from megascale.checkpoint.find import VerifiedCheckpoint, peek_checkpoint
from megascale.checkpoint.load import fill_pieces
from megascale.checkpoint.run_file import RUN_FILE, peek_run_store, read_run_file
from megascale.config.derive import derive
from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.config.training import ParallelConfig
from megascale.data.tokenizer import encode_texts, load_tokenizer
from megascale.engine.base import StatePiece
from megascale.engine.pipeline import build_forward_pipeline
from megascale.engine.precision import TORCH_DTYPE
from megascale.errors import CheckpointError, ConfigError
from megascale.model.axes import ONE_RANK, Axes
from megascale.model.beam import BeamSettings, beam_search
from megascale.model.context import Context
from megascale.model.generate import Continuation, Sampling, check_prompts, draw_rows, open_rows
from megascale.model.pair_generate import PairRows
from megascale.model.transformer import Transformer, build_model
from megascale.parallel.layout import Layout
from megascale.parallel.mesh import Mesh, build_mesh, read_rank_info
from megascale.train.build import build_axes, own_stages
from megascale.train.prompts import read_prompts
from megascale.train.request import serve_request
from megascale.train.routing import bias_pieces
from megascale.train.run_folder import TOKENIZER_FILE


def load_model(
    checkpoint: VerifiedCheckpoint, config: RunConfig, axes: Axes = ONE_RANK, stages: list[range] | None = None,
    kind: str = "master",
) -> Transformer:
    """The checkpoint's model in fp32, ready to use: all of it, or this rank's part.

    Args:
        kind: of the checkpoint's tensors: the masters, or another copy of the parameters.

    Cost: reads the bytes of this part once.
    """
    model = build_model(config.model, config.run.seed, axes, stages)
    fill_pieces(checkpoint, [
        StatePiece(f"{kind}/{place.name}", place.global_shape, place.box, parameter.data.view(-1), is_owner=False)
        for parameter, place in model.placements().items()
    ] + list(bias_pieces(model, is_owner=False)))
    return model.eval()


def check_weights(checkpoint: VerifiedCheckpoint, kind: str) -> None:
    """Refuses a copy of the weights that a checkpoint doesn't have. Raises CheckpointError."""
    if not any(key.startswith(f"{kind}/") for key in checkpoint.index.tensors):
        raise CheckpointError(f"{checkpoint.path}: has no averaged weights; train with optimizer.ema_decay, or leave"
                              " out --ema")


class SharedModel:
    """A model whose layers several ranks share, as generation asks for it; every rank calls it with the same rows."""

    def __init__(
        self, checkpoint: VerifiedCheckpoint, config: RunConfig, mesh: Mesh, dtype: torch.dtype, kind: str = "master"
    ):
        self.config, self.mesh, self.device = config.model, mesh, mesh.device
        self.axes = build_axes(config, mesh)
        model = load_model(checkpoint, config, self.axes, list(own_stages(config, mesh).values()), kind)
        self.model = model.to(mesh.device, dtype)
        self.pipeline = None
        if mesh.pp.size > 1:
            (stage,) = self.model.stages
            self.pipeline = build_forward_pipeline(stage, self.config.d_model, dtype, mesh.device, mesh.pp)

    def __call__(self, tokens_BT: torch.Tensor, context: Context, *, last_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) of position `last_B` of each row, the same on every rank.

        Cost: the collectives of one forward pass, and of the last positions' logits.
        """
        if self.pipeline is None:
            return self.model(tokens_BT, context, last_B=last_B)
        hidden_shape = (*tokens_BT.shape, self.config.d_model)
        return self.pipeline.logits(tokens_BT, context, last_B, hidden_shape, self.config.padded_vocab_size)


def open_model(
    checkpoint: VerifiedCheckpoint, layout: Layout, dtype: torch.dtype = torch.float32, kind: str = "master"
) -> Transformer | SharedModel:
    """The checkpoint's model over the ranks of a layout, or in this process when that is one rank.

    Args:
        kind: of the checkpoint's tensors to take as weights.

    Raises:
        CheckpointError: it has no such weights.
        ConfigError: the layout doesn't fit the model, or the model writes no text.
    """
    check_weights(checkpoint, kind)
    config = parse_config(checkpoint.index.run.config, source=str(checkpoint.path))
    if not config.model.traits.is_causal:
        raise ConfigError(f"{checkpoint.path}: a {config.model.family} model doesn't continue texts; megascale eval RUN"
                          " says how well it does what it was trained for")
    if layout.world_size == 1:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return load_model(checkpoint, config, kind=kind).to(device, dtype)
    parallel = ParallelConfig(tp=layout.tp, pp=layout.pp, zero_stage=0, sequence_parallel=False, schedule="gpipe")
    config = config.model_copy(update={"parallel": parallel})
    derive(config, layout.world_size, source=str(checkpoint.path))
    return SharedModel(checkpoint, config, build_mesh(layout, read_rank_info(dict(os.environ))), dtype, kind)


@dataclass(frozen=True)
class Wanted:
    """What to write.

    Attributes:
        prompts: texts to continue; for a model with an encoder, texts to read.
        num_samples: texts for each prompt.
        max_tokens: longest continuation, in tokens.
        sampling: how tokens are drawn; text i of all is drawn by seed and i.
        beam: search instead of drawing, see `megascale.model.beam`; gives `num_best` texts for each prompt.
        use_cache: whether keys and values are kept.
        as_json: one JSON object a text instead of the text.
    """

    prompts: list[str]
    num_samples: int
    max_tokens: int
    sampling: Sampling
    beam: BeamSettings | None
    use_cache: bool
    as_json: bool

    @property
    def texts_per_prompt(self) -> int:
        """Drawn or searched."""
        return self.num_samples if self.beam is None else self.beam.num_best


class Writer:
    """Prints texts on the first rank.

    Args:
        end: id of the token that ends a text.
    """

    def __init__(self, wanted: Wanted, tokenizer: Tokenizer, end: int, *, shows_prompt: bool):
        self.wanted, self.tokenizer, self.end, self.shows_prompt = wanted, tokenizer, end, shows_prompt
        self.say = print if os.environ.get("RANK", "0") == "0" else lambda *_, **__: None

    def stream(self, steps: Iterator[list[int | None]]) -> None:
        """Prints one text as its tokens come."""
        self.say(self.wanted.prompts[0] if self.shows_prompt else "", end="", flush=True)
        shown, drawn = "", []
        for (token,) in steps:
            if token is None or token == self.end:
                break
            drawn.append(token)
            text = self.tokenizer.decode(drawn)
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest of its bytes
                self.say(text[len(shown):], end="", flush=True)
                shown = text
        self.say()

    def collect(self, steps: Iterator[list[int | None]]) -> None:
        """Prints each of several texts when it is done; those that come to no end, when all are."""
        num_texts = len(self.wanted.prompts) * self.wanted.texts_per_prompt
        drawn: list[list[int]] = [[] for _ in range(num_texts)]
        is_shown = [False] * num_texts
        for step in steps:
            for index, token in enumerate(step):
                if token is not None:
                    drawn[index].append(token)
                    if token == self.end:
                        self.show(index, drawn[index])
                        is_shown[index] = True
        for index in (index for index, shown in enumerate(is_shown) if not shown):
            self.show(index, drawn[index])

    def show(self, index: int, tokens: list[int], score: float | None = None) -> None:
        """Prints text `index` of all."""
        prompt, sample = divmod(index, self.wanted.texts_per_prompt)
        text = self.tokenizer.decode([token for token in tokens if token != self.end])
        if self.wanted.as_json:
            line = {"prompt": prompt, "sample": sample, "text": text, "num_tokens": len(tokens),
                    "is_ended": tokens[-1:] == [self.end]}
            self.say(json.dumps(line if score is None else line | {"score": score}), flush=True)
            return
        if len(self.wanted.prompts) * self.wanted.texts_per_prompt > 1:
            said = "" if score is None else f", score {score:.4f}"
            self.say(f"--- prompt {prompt}, text {sample}{said}")
        self.say(f"{self.wanted.prompts[prompt] if self.shows_prompt else ''}{text}", flush=True)


def write_texts(
    run_folder: Path, step: int | None, wanted: Wanted, layout: Layout, dtype: str, kind: str = "master"
) -> None:
    """Prints what is wanted, from a run's checkpoint, to the standard output of the first rank.

    Args:
        kind: see `open_model`.

    Raises:
        CheckpointError, DataError: no whole checkpoint, or no tokenizer to read and write text with.
        ConfigError: a layout or a model that can't generate.
    """
    model = open_model(peek_checkpoint(peek_run_store(run_folder), step), layout, TORCH_DTYPE[dtype], kind)
    tokenizer = load_tokenizer(run_folder / TOKENIZER_FILE)
    run_file = read_run_file(run_folder)
    if run_file is None:
        raise CheckpointError(f"{run_folder / RUN_FILE} is missing; it names the token that ends a text")
    end = run_file.eos_id
    prompts = [ids or [end] for ids in encode_texts(tokenizer, wanted.prompts)]
    check_prompts(prompts, model.config.vocab_size)
    writer = Writer(wanted, tokenizer, end, shows_prompt=not model.config.traits.has_decoder)
    if wanted.beam is not None:
        for number, prompt in enumerate(prompts):
            rows, follow = begin(model, [prompt] * wanted.beam.num_beams, end, wanted)
            for place, found in enumerate(beam_search(follow, rows[0], wanted.max_tokens, end, wanted.beam)):
                writer.show(number * wanted.beam.num_best + place, found.tokens, found.score)
        return
    rows, follow = begin(model, [prompt for prompt in prompts for _ in range(wanted.num_samples)], end, wanted)
    steps = draw_rows(follow, rows, wanted.max_tokens, wanted.sampling, end)
    if len(rows) == 1 and not wanted.as_json:
        writer.stream(steps)
    else:
        writer.collect(steps)


def begin(
    model: Transformer | SharedModel, prompts: list[list[int]], end: int, wanted: Wanted
) -> tuple[list[list[int]], Continuation]:
    """The rows that are to grow, and what says how: of an encoder-decoder they begin with the end token alone."""
    if not model.config.traits.has_decoder:
        return prompts, open_rows(model, prompts, wanted.max_tokens, use_cache=wanted.use_cache)
    sources = [[*prompt, end] for prompt in prompts]
    return [[end]] * len(prompts), PairRows(model, sources, 1 + wanted.max_tokens, end, use_cache=wanted.use_cache)


def serve(values: dict) -> None:
    """Writes as a request asks."""
    given, beam = values["prompts"], values["beam"]
    wanted = Wanted(
        prompts=given if isinstance(given, list) else read_prompts(Path(given)),
        num_samples=values["num_samples"],
        max_tokens=values["max_tokens"],
        sampling=Sampling(**values["sampling"]),
        beam=BeamSettings(**beam) if beam else None,
        use_cache=values["use_cache"],
        as_json=values["as_json"],
    )
    layout, kind = Layout(**values["layout"]), "ema" if values["ema"] else "master"
    write_texts(Path(values["run_folder"]), values["step"], wanted, layout, values["dtype"], kind)


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
