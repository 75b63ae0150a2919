"""A checkpoint's decoder as an ONNX graph: `python -m megascale.export.onnx_export REQUEST`; the request is JSON.

The graph takes token ids of any number of rows and positions, and gives the logits of all of them. What onnxruntime
computes with it is compared with our model.
"""

import secrets
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.folders import step_name
from megascale.checkpoint.run_file import peek_run_store
from megascale.config.load import parse_config
from megascale.config.model import ModelConfig
from megascale.errors import ConfigError, MegascaleError
from megascale.export.hf_export import check_target
from megascale.model.kv_cache import NoCache, next_context
from megascale.model.transformer import Transformer
from megascale.train.generate import load_model
from megascale.train.request import serve_request
from megascale.train.run_folder import TOKENIZER_FILE

MODEL_FILE = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest: other kernels, in fp32."""
TRACED_SHAPE = (2, 3)
CHECKED_SHAPES = ((1, 1), (3, 7))
"""Rows and positions that the check runs, none of them the one that the graph was traced with."""
OPSET = 18


class Logits(nn.Module):
    """A decoder as a function of its tokens alone.

    The mask is dense and positions are a tensor, so that the graph holds for any length.

    Shape: (B, T) int64 to (B, T, V), V the vocabulary without its padding.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        num_positions = tokens_BT.shape[1]
        columns_1T = torch.arange(num_positions, device=tokens_BT.device)[None]
        context = next_context(self.config, columns_1T, num_positions, NoCache())
        return self.model(tokens_BT, context)[..., : self.config.vocab_size]


def export_onnx(run_folder: Path, step: int | None, out: Path | None, kind: str = "master") -> Path:
    """Writes a run's decoder and its tokenizer to a new folder, all at once.

    Args:
        kind: of the checkpoint's tensors to take as weights.

    Raises:
        ConfigError: a model that is no decoder, or a package that is missing.
        CheckpointError: no whole checkpoint, a folder that holds something, or no room.

    Cost: the model in fp32 in memory, twice while it is written.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}: pip install 'megascale[onnx]'")
    checkpoint = peek_checkpoint(peek_run_store(run_folder), step)
    config = parse_config(checkpoint.index.run.config, source=str(checkpoint.path))
    check_family(config.model)
    model = load_model(checkpoint, config, kind=kind)
    out = out or run_folder / "export" / f"onnx_{step_name(checkpoint.step)}"
    check_target(out, sum(parameter.nbytes for parameter in model.parameters()))
    temporary = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        write_graph(model, temporary / MODEL_FILE)
        if (run_folder / TOKENIZER_FILE).is_file():
            shutil.copyfile(run_folder / TOKENIZER_FILE, temporary / TOKENIZER_FILE)
        check_graph(model, temporary / MODEL_FILE)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {out}: step {checkpoint.step}, tokens of any rows and positions up to {config.model.max_seq_len}")
    return out


def check_family(config: ModelConfig) -> None:
    """Refuses what the graph can't hold. Raises ConfigError."""
    if not config.traits.is_causal or config.traits.has_decoder or config.moe is not None:
        raise ConfigError(f"--format onnx: family {config.family} isn't a dense decoder; use gpt2, llama or palm, or"
                          " --format hf")


def write_graph(model: Transformer, path: Path) -> None:
    """Traces the decoder and writes it; weights over 2 GB go to a file beside it."""
    tokens_BT = torch.zeros(TRACED_SHAPE, dtype=torch.int64)
    rows = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        Logits(model).eval(), (tokens_BT,), str(path), input_names=["tokens"], output_names=["logits"],
        dynamic_shapes={"tokens_BT": {0: rows, 1: rows}}, dynamo=True, opset_version=OPSET, verbose=False,
        external_data=sum(parameter.nbytes for parameter in model.parameters()) > 1 << 31,
    )


def check_graph(model: Transformer, path: Path) -> None:
    """Compares onnxruntime's logits with ours, where it is installed.

    Raises:
        MegascaleError: they differ by more than `TOLERANCE`.
    """
    if find_spec("onnxruntime") is None:
        print("logits not checked: onnxruntime isn't installed; pip install 'megascale[onnx]' and export again")
        return
    import onnxruntime  # a package that only this check needs

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for num_rows, num_positions in (*CHECKED_SHAPES, (1, model.config.max_seq_len)):
        tokens_BT = torch.randint(0, model.config.vocab_size, (num_rows, num_positions), generator=generator)
        with torch.inference_mode():
            ours_BTV = model(tokens_BT)[..., : model.config.vocab_size]
        theirs_BTV = torch.from_numpy(session.run(None, {"tokens": tokens_BT.numpy()})[0])
        worst = max(worst, (ours_BTV - theirs_BTV).abs().max().item() / ours_BTV.abs().max().item())
    if not worst <= TOLERANCE:
        raise MegascaleError(f"onnxruntime's logits differ from the checkpoint's by {worst:.3g} of the largest; at most"
                             f" {TOLERANCE} is rounding. Nothing was written")
    print(f"onnxruntime gives the checkpoint's logits: largest difference {worst:.1e} of the largest logit")


def serve(values: dict) -> None:
    """Exports as a request asks."""
    out = Path(values["out"]) if values["out"] else None
    export_onnx(Path(values["run_folder"]), values["step"], out, values["kind"])


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
