"""A checkpoint as a folder that transformers loads: `python -m megascale.export.hf_export REQUEST`; it is JSON.

Weights are streamed: sizes follow from shapes, so a file's header is written first and its tensors after it, one of
ours at a time. In memory are at most a tensor in fp32 and one converted copy.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megascale.checkpoint.digest import digest_box
from megascale.checkpoint.files import free_bytes, move_durably, sync_folder, write_durably
from megascale.checkpoint.find import VerifiedCheckpoint, peek_checkpoint
from megascale.checkpoint.folders import step_name
from megascale.checkpoint.load import fill_pieces
from megascale.checkpoint.run_file import peek_run_store, read_run_file
from megascale.config.load import parse_config
from megascale.config.model import ModelConfig
from megascale.config.schema import RunConfig
from megascale.data.tokenizer import parse_tokenizer
from megascale.engine.base import StatePiece
from megascale.errors import CheckpointError, DataError
from megascale.export.card import write_card
from megascale.export.hf_bert_config import bert_tokens
from megascale.export.hf_config import derive_generation_config, derive_hf_config, derive_tokenizer_config
from megascale.export.hf_plan import (
    DTYPES,
    WEIGHTS_NAME,
    Shard,
    Unit,
    check_shapes,
    derive_weight_map,
    plan_shards,
    plan_units,
)
from megascale.export.hf_vit_config import image_processor, named_classes
from megascale.model.families.hf_names import exchange_of
from megascale.observe.run_files import read_metrics
from megascale.optim.state import EMA
from megascale.parallel.boxes import Box, whole_box
from megascale.train.request import serve_request
from megascale.train.run_folder import TOKENIZER_FILE

CHECK_MODULE = "megascale.export.check"
CLASSES_FILE, PROCESSOR_NAME = "classes.json", "preprocessor_config.json"
CHUNK_BYTES = 4 << 20
"""Bytes that are cast and laid out at a time."""
READ_BYTES = 16 << 20
"""Bytes of a tensor that are read at a time."""


class Export(NamedTuple):
    """What was written.

    Attributes:
        folder: where.
        step: of the checkpoint.
        shards: its files of weights.
    """

    folder: Path
    step: int
    shards: list[Shard]


def export_run(
    run_folder: Path, step: int | None, out: Path | None, dtype: str, max_shard_bytes: int, kind: str = "master"
) -> Export:
    """Writes a run's weights, config, tokenizer and card to a new folder, all at once: a killed export leaves none.

    Args:
        step: of the checkpoint; None takes the newest whole one.
        out: folder to make; None: `export/hf_step_N` in the run folder.
        dtype: of the weights.
        max_shard_bytes: largest file of weights, unless one tensor is larger.
        kind: of the checkpoint's tensors: `master`, or `ema` for the averaged weights.

    Raises:
        CheckpointError: no whole checkpoint, a folder that holds something, or no room.
        ConfigError: a model that transformers can't express.
        DataError: the run folder has no tokenizer.

    Cost: reads the checkpoint once to verify it, and its masters once more. Memory: the largest
    tensor in fp32, a GPT-2 `qkv` twice, and 20 MiB.
    """
    run_file = read_run_file(run_folder)
    checkpoint = peek_checkpoint(peek_run_store(run_folder), step)
    run_config = parse_config(checkpoint.index.run.config, source=str(checkpoint.path))
    config = run_config.model
    hf_config = derive_hf_config(config, eos_id=run_file.eos_id, dtype=dtype)
    shards = plan_shards(check_units(config, checkpoint, kind), dtype, max_shard_bytes)
    if config.vision is None:
        files = text_files(run_folder, run_config, run_file.eos_id)
    else:
        hf_config, files = image_files(run_folder, run_config, hf_config)
    out = out or run_folder / "export" / f"hf_{step_name(checkpoint.step)}"
    check_target(out, sum(shard.data_bytes for shard in shards))
    values: dict = {"config.json": hf_config}
    if len(shards) > 1:
        values[f"{WEIGHTS_NAME}.index.json"] = derive_weight_map(shards)
    texts = {name: as_json(value) for name, value in values.items()}
    texts |= files | {
        "README.md": write_card(checkpoint.index, hf_config, list(read_metrics(run_folder))).encode(),
    }
    temporary = out.with_name(f"{out.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        for shard in shards:
            write_shard(temporary / shard.file, shard, checkpoint, config, kind)
        for name, text in texts.items():
            write_durably(temporary / name, [text])
        sync_folder(temporary)
        move_durably(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Export(out, checkpoint.step, shards)


def text_files(run_folder: Path, run_config: RunConfig, eos_id: int) -> dict[str, bytes]:
    """What goes with the weights of a model of text: its tokenizer and what a text ends with. Raises DataError."""
    tokenizer = _read_tokenizer(run_folder)
    eos_token = parse_tokenizer(tokenizer, str(run_folder / TOKENIZER_FILE)).id_to_token(eos_id)
    settings = derive_tokenizer_config(eos_token, run_config.model.max_seq_len)
    if run_config.model.family == "bert":
        settings |= bert_tokens(run_config.data.objective)
    files = {"tokenizer_config.json": as_json(settings), TOKENIZER_FILE: tokenizer}
    traits = run_config.model.traits
    if traits.is_causal:  # others write no text
        generation = derive_generation_config(eos_id, has_decoder=traits.has_decoder)
        files["generation_config.json"] = as_json(generation)
    return files


def image_files(
    run_folder: Path, run_config: RunConfig, hf_config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The config with the names of the classes, and how images are made ready. Raises DataError."""
    place, vision = run_folder / CLASSES_FILE, run_config.model.vision
    content = place.read_bytes() if place.is_file() else b""
    processor = image_processor(vision, run_config.data.objective)
    return hf_config | named_classes(content, str(place), run_config.model), {PROCESSOR_NAME: as_json(processor)}


def as_json(value: Any) -> bytes:
    """A value as the content of a .json file."""
    return json.dumps(value, indent=2).encode() + b"\n"


def check_units(config: ModelConfig, checkpoint: VerifiedCheckpoint, kind: str) -> list[Unit]:
    """What a checkpoint's weights become, after a check that they are this model's.

    Raises:
        CheckpointError: they aren't, or it has no averaged ones.
    """
    prefix = f"{kind}/"
    units = plan_units(config)
    tensors = checkpoint.index.tensors.items()
    stored = {key.removeprefix(prefix): record.shape for key, record in tensors if key.startswith(prefix)}
    if not stored and kind == EMA:
        raise CheckpointError(
            f"{checkpoint.path}: has no averaged weights: the run had no optimizer.ema_decay; export without --ema"
        )
    check_shapes(units, stored, str(checkpoint.path))
    return units


def check_target(out: Path, needed_bytes: int) -> None:
    """Makes the parent of a folder that is to be made, and looks whether there is room.

    Raises:
        CheckpointError: the folder holds something, can't be made, or the disk has too little room.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        is_taken = os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir()))
        free = free_bytes(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out}: can't make the folder: {error.strerror}; choose another with --out") from None
    if is_taken:
        raise CheckpointError(f"{out}: exists and isn't an empty folder; remove it, or choose another with --out")
    if needed_bytes > free:
        raise CheckpointError(f"{out}: the weights have {needed_bytes} bytes, its disk has {free} left; choose another"
                              " with --out, or a smaller --dtype")


def write_shard(
    path: Path, shard: Shard, checkpoint: VerifiedCheckpoint, config: ModelConfig, kind: str
) -> None:
    """Writes one file of weights, durably; raises OSError, and CheckpointError as `read_whole` and `cast` do."""

    def chunks() -> Iterator[bytes | memoryview]:
        yield shard.header
        for unit in shard.units:
            yield from unit_chunks(unit, shard.dtype, checkpoint, config, kind)

    write_durably(path, chunks())


def unit_chunks(
    unit: Unit, dtype: str, checkpoint: VerifiedCheckpoint, config: ModelConfig, kind: str
) -> Iterator[memoryview | bytes]:
    """The bytes of a unit's tensors as they are stored, some rows at a time.

    Memory: our tensor, for GPT-2's `qkv` a rearranged copy, and `CHUNK_BYTES`.
    """
    if unit.name is None:
        yield bytes(unit.numel * DTYPES[dtype].itemsize)
        return
    parts: Sequence[torch.Tensor] = exchange_of(config, unit.name).split(
        read_whole(checkpoint, kind, unit.name, unit.shape)
    )
    for (hf_name, _), part in zip(unit.hf_tensors, parts, strict=True):
        row_bytes = max(1, part[0].numel() * part.element_size())
        for rows in part.split(max(1, CHUNK_BYTES // row_bytes)):
            stored = cast(rows, DTYPES[dtype], f"{checkpoint.path}: {unit.name} ({hf_name})")
            stored = stored.clone(memory_format=torch.contiguous_format)  # a view would keep the tensor after its turn
            yield memoryview(stored.view(torch.uint8).numpy())


def read_whole(checkpoint: VerifiedCheckpoint, kind: str, name: str, shape: Sequence[int]) -> torch.Tensor:
    """A parameter's fp32 master or average, whole, with the digest that it was saved with.

    Raises:
        CheckpointError: other bits were read.
    """
    tensor, key, shape = torch.empty(tuple(shape)), f"{kind}/{name}", tuple(shape)
    num_rows = max(1, READ_BYTES // (tensor[0].numel() * tensor.element_size()))
    for start in range(0, shape[0], num_rows):  # by parts, since the pages of a mapped file count as memory too
        rows = tensor[start : start + num_rows]
        box = Box((start, *(0,) * (len(shape) - 1)), (start + len(rows), *shape[1:]))
        fill_pieces(checkpoint, [StatePiece(key, shape, box, rows.view(-1), is_owner=False)])
    if f"{digest_box(tensor.view(-1).numpy(), shape, whole_box(shape)):016x}" != checkpoint.index.tensors[key].digest:
        raise CheckpointError(f"{checkpoint.path}: {name} isn't what was saved; its bits changed while they were read")
    return tensor


def cast(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """The tensor in another precision, rounded to nearest.

    Raises:
        CheckpointError: a finite value that the precision can't hold.
    """
    converted = tensor.to(dtype)
    if dtype != torch.float32 and not torch.equal(converted.isfinite(), tensor.isfinite()):
        largest = tensor[tensor.isfinite()].abs().max().item()
        raise CheckpointError(f"{what} has a value of {largest:.3g}, and {dtype} ends at"
                              f" {torch.finfo(dtype).max:.3g}; export with --dtype float32")
    return converted


def _read_tokenizer(run_folder: Path) -> bytes:
    try:
        return (run_folder / TOKENIZER_FILE).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{run_folder / TOKENIZER_FILE}: missing; copy it from the corpus of the run") from None


def serve(values: dict) -> None:
    """Exports as a request asks, says what was written, and has the logits checked by a process with its own memory."""
    out = Path(values["out"]) if values["out"] else None
    run_folder, dtype = Path(values["run_folder"]), values["dtype"]
    done = export_run(run_folder, values["step"], out, dtype, values["max_shard_bytes"], values["kind"])
    total_bytes = sum(shard.data_bytes for shard in done.shards)
    print(f"wrote {done.folder}: step {done.step}, {total_bytes / 1e9:.3g} GB of {dtype} weights in"
          f" {len(done.shards)} file{'s' if len(done.shards) > 1 else ''}", flush=True)
    if not values["check"]:
        print("logits not checked, as asked")
    elif find_spec("transformers") is None:
        print("logits not checked: transformers isn't installed; to check, pip install transformers and export again")
    else:
        request = {"run_folder": str(run_folder), "step": done.step, "folder": str(done.folder), "dtype": dtype,
                   "kind": values["kind"]}
        os.execv(sys.executable, [sys.executable, "-m", CHECK_MODULE, json.dumps(request)])


if __name__ == "__main__":
    serve_request(serve, sys.argv[1])
