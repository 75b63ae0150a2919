"""Logits of an export against those of the checkpoint: `python -m megascale.export.check REQUEST`; it is JSON.

Both models compute in fp32 from weights in the export's precision, so rounded weights are compared with rounded ones,
and one tolerance holds for all precisions. Both are in memory whole.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.index import CheckpointIndex
from megascale.checkpoint.run_file import peek_run_store
from megascale.config.load import parse_config
from megascale.config.model import ModelConfig
from megascale.errors import MegascaleError
from megascale.export.hf_plan import DTYPES
from megascale.model.context import build_context
from megascale.model.pair_context import build_pair_context
from megascale.train.generate import load_model
from megascale.train.request import serve_request

TOLERANCE = 1e-5
"""Largest difference, relative to the largest logit: a hundred roundings of fp32."""
NUM_ROWS = 2
MIN_POSITIONS = 256


def check_logits(run_folder: Path, step: int, folder: Path, dtype: str, kind: str = "master") -> float:
    """The largest difference of the logits of both sides, relative to the largest logit.

    Raises:
        MegascaleError: it is beyond `TOLERANCE`, or transformers can't load the folder as it should.

    Cost: two forward passes in fp32; both models' weights in memory.
    """
    checkpoint = peek_checkpoint(peek_run_store(run_folder), step)
    config = parse_config(checkpoint.index.run.config, source=str(checkpoint.path))
    inputs = choose_inputs(checkpoint.index, config.model)
    with torch.inference_mode():
        ours = load_model(checkpoint, config, kind=kind)
        for parameter in ours.parameters():
            parameter.copy_(parameter.to(DTYPES[dtype]))
        our_logits_BTV = call_ours(ours, inputs)[..., : config.model.vocab_size]
        del ours
        their_logits_BTV = logits_of(call_theirs(load_theirs(folder), inputs))
    difference = (our_logits_BTV - their_logits_BTV).abs().max().item()
    largest = our_logits_BTV.abs().max().item()
    relative = difference / largest if largest else difference
    if not relative <= TOLERANCE:  # so that NaN fails too
        raise MegascaleError(
            f"{folder}: transformers' logits differ from the checkpoint's by {difference:.3g}, {relative:.3g} of the"
            f" largest ({largest:.3g}); at most {TOLERANCE} is rounding. Nothing was removed; don't use these files"
        )
    return relative


def choose_inputs(index: CheckpointIndex, config: ModelConfig) -> torch.Tensor:
    """Rows of tokens as `choose_tokens` has them; for a model of images some noise, (B, C, H, W) fp32."""
    if config.vision is None:
        return choose_tokens(index, config)
    shape = (NUM_ROWS, config.vision.channels, config.vision.image_size, config.vision.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def choose_tokens(index: CheckpointIndex, config: ModelConfig) -> torch.Tensor:
    """Rows to compare on: the checkpoint's probe where its rows reach beyond the window, else random ones.

    Shape: (B, T) int64, T at most `max_seq_len`.
    """
    wanted = min(config.max_seq_len, max(MIN_POSITIONS, 2 * (config.window or 0)))
    rows = [row.tokens[: config.max_seq_len] for row in index.probe.rows[:NUM_ROWS]] if index.probe else []
    if rows and min(map(len, rows)) > min(config.window or 0, config.max_seq_len - 1):
        shortest = min(map(len, rows))
        return torch.tensor([row[:shortest] for row in rows])
    return torch.randint(0, config.vocab_size, (NUM_ROWS, wanted), generator=torch.Generator().manual_seed(0))


def call_ours(model: torch.nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) of our model; a decoder that reads an encoder is given the tokens on both sides."""
    if model.config.vision is not None:
        return model(tokens_BT, build_context(model.config, model.config.vision.num_positions, tokens_BT.device))
    if not model.config.traits.has_decoder:
        return model(tokens_BT)
    context = build_pair_context(model.config, tokens_BT.shape[1], tokens_BT.shape[1], model.device)
    return model(torch.cat((tokens_BT, tokens_BT), dim=1), context)


def call_theirs(model: torch.nn.Module, tokens_BT: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """The same of theirs."""
    if model.config.is_encoder_decoder:
        return model(input_ids=tokens_BT, decoder_input_ids=tokens_BT)
    return model(tokens_BT)


def logits_of(output: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The logits of tokens of their output. Shape: (B, T, V)."""
    logits = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
    return logits if logits.dim() == 3 else logits[:, None]  # an image has one answer


def load_theirs(folder: Path) -> torch.nn.Module:
    """The export in the class that its config names, in fp32, from this folder alone.

    Raises:
        MegascaleError: a weight is missing, left over or misshapen, so that transformers made one up or dropped one.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers  # a package that only this check needs, and slow to import
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    (architecture,) = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in report.items() if names and kind.endswith("keys")}
    if wrong:
        raise MegascaleError(f"{folder}: transformers doesn't take these weights as they are: {wrong}")
    return model.eval()


def serve(values: dict) -> None:
    """Checks as a request asks, and prints what was found."""
    relative = check_logits(Path(values["run_folder"]), values["step"], Path(values["folder"]), values["dtype"],
                            values["kind"])
    print(f"transformers gives the checkpoint's logits: largest difference {relative:.1e} of the largest logit")


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
