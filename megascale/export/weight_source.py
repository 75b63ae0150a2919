"""Where imported weights come from: a Hugging Face folder, or a checkpoint of another run. One tensor at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megascale.checkpoint.files import read_bounded
from megascale.checkpoint.find import VerifiedCheckpoint, peek_checkpoint
from megascale.checkpoint.index import LineageRecord
from megascale.checkpoint.inspect import split_step
from megascale.checkpoint.load import fill_pieces
from megascale.checkpoint.run_file import RUN_FILE, peek_run_store, read_run_file
from megascale.config.load import parse_config
from megascale.config.model import ModelConfig
from megascale.engine.base import StatePiece
from megascale.errors import DataError
from megascale.export.hf_folder import (
    CONFIG_NAME,
    HEAD,
    HUB,
    MAX_TOKENIZER_BYTES,
    HfFolder,
    fetch_folder,
    open_folder,
)
from megascale.export.hf_import import HF_FIELDS, model_section, section_of
from megascale.model.families.hf_names import exchange_of
from megascale.parallel.boxes import Box
from megascale.train.run_folder import TOKENIZER_FILE

Shapes = Mapping[str, tuple[int, ...]]


class WeightSource(Protocol):
    """Weights that a run can begin with.

    Attributes:
        place: where they are, for people.
        section: the `model` section that they belong to.
        field_names: how its fields are named there, where they are named differently.
        eos_ids: tokens that end a text; empty where it isn't said.
        folder: of the run that they come from, None for weights of strangers.
    """

    place: str
    section: dict[str, Any]
    field_names: Mapping[str, str]
    eos_ids: tuple[int, ...]
    folder: Path | None

    def tokenizer(self) -> bytes | None:
        """Content of the `tokenizer.json` that the weights were trained with; None where there is none."""

    def check(self, model: ModelConfig, shapes: Shapes) -> None:
        """Refuses weights that aren't those of a model; `shapes` are of its parameters, by name."""

    def read(self, model: ModelConfig, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A parameter in fp32, row-major, as large as `shape` says. Cost: two or three copies of it in memory."""

    def lineage(self) -> tuple[LineageRecord, ...]:
        """Where they come from, oldest first."""


def open_source(text: str) -> WeightSource:
    """Opens `hf://org/name`, a Hugging Face folder, a run folder, or `RUN@STEP`.

    Raises:
        DataError, ConfigError, CheckpointError: it is none, or damaged.

    Cost: of a run the bytes of the checkpoint, which are verified; else the headers.
    """
    if text.startswith(HUB):
        return HfSource(open_folder(fetch_folder(text)), text)
    folder, step = Path(text), None
    if not folder.exists():
        place, step = split_step(text)
        folder = Path(place)
    if (folder / RUN_FILE).exists():
        return RunSource(peek_checkpoint(peek_run_store(folder), step), folder)
    if (folder / CONFIG_NAME).exists() and step is None:
        return HfSource(open_folder(folder), str(folder.resolve()))
    raise DataError(
        f"{text}: neither a Hugging Face folder, which has a {CONFIG_NAME}, nor a run folder, which has a {RUN_FILE};"
        " give FOLDER, RUN, RUN@STEP or hf://ORG/NAME"
    )


def stored_copies(model: ModelConfig) -> dict[str, str]:
    """Tensors of a folder that may be stored once more -> those that they are copies of."""
    copies = {}
    if model.is_tied and model.family == "bert":
        copies["cls.predictions.decoder.bias"] = "cls.predictions.bias"
    if model.is_tied:
        (embedding,) = exchange_of(model, "embedding.tokens.weight").hf_names
        copies["cls.predictions.decoder.weight" if model.family == "bert" else HEAD] = embedding
    return copies


class HfSource:
    """See `WeightSource`."""

    folder = None

    def __init__(self, content: HfFolder, place: str):
        self._content, self.place = content, place
        self.section = model_section(content.config, f"{place}/{CONFIG_NAME}")
        self.field_names = HF_FIELDS[content.config["model_type"]]
        self.eos_ids = content.eos_ids

    def tokenizer(self) -> bytes | None:
        """See `WeightSource`."""
        return self._content.tokenizer()

    def check(self, model: ModelConfig, shapes: Shapes) -> None:
        """See `WeightSource`. Of a tied model a stored head must be the embedding once more."""
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            exchange = exchange_of(model, name)
            parts = exchange.split(torch.empty(shape, device="meta"))
            expected |= {hf: tuple(part.shape) for hf, part in zip(exchange.hf_names, parts, strict=True)}
        for copy, original in stored_copies(model).items():
            if copy not in self._content.tensors:
                continue
            expected[copy] = expected[original]
            self._content.check_tensors(expected)
            if not torch.equal(self._content.read(copy), self._content.read(original)):
                raise DataError(
                    f"{self.place}: {CONFIG_NAME} ties the head to the embedding, but {copy} and {original} differ;"
                    " one of them would be lost: set tie_word_embeddings there to false"
                )
        self._content.check_tensors(expected)

    def read(self, model: ModelConfig, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """See `WeightSource`. Widening from 16 bits is exact."""
        exchange = exchange_of(model, name)
        fused = exchange.fuse(*(self._content.read(hf_name) for hf_name in exchange.hf_names))
        return fused.to(torch.float32).contiguous()

    def lineage(self) -> tuple[LineageRecord, ...]:
        """See `WeightSource`."""
        return (LineageRecord(kind="import", step=0, source=self.place, run_id=None, changes=()),)


@dataclass(frozen=True)
class RunSource:
    """See `WeightSource`; the fp32 master weights of a checkpoint."""

    checkpoint: VerifiedCheckpoint
    folder: Path

    @property
    def place(self) -> str:
        """See `WeightSource`."""
        return str(self.checkpoint.path)

    @property
    def field_names(self) -> Mapping[str, str]:
        """See `WeightSource`."""
        return {}

    @property
    def section(self) -> dict[str, Any]:
        """See `WeightSource`."""
        model = parse_config(self.checkpoint.index.run.config, self.place).model
        return section_of(model) | {"vocab_multiple": model.vocab_multiple}

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """See `WeightSource`."""
        run_file = read_run_file(self.folder)
        return (run_file.eos_id,) if run_file else ()

    def tokenizer(self) -> bytes | None:
        """See `WeightSource`."""
        return read_bounded(self.folder / TOKENIZER_FILE, MAX_TOKENIZER_BYTES)

    def check(self, model: ModelConfig, shapes: Shapes) -> None:
        """See `WeightSource`."""
        stored = {key.removeprefix("master/"): record.shape for key, record in self.checkpoint.index.tensors.items()
                  if key.startswith("master/")}
        wrong = sorted(name for name in stored.keys() | shapes.keys() if stored.get(name) != shapes.get(name))
        if wrong:
            raise DataError(f"{self.place}: {wrong[0]} has shape {stored.get(wrong[0])} there and"
                            f" {shapes.get(wrong[0])} in this model; {len(wrong)} tensors differ")

    def read(self, model: ModelConfig, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """See `WeightSource`."""
        tensor = torch.empty(shape)
        box = Box((0,) * len(shape), tuple(shape))
        fill_pieces(self.checkpoint, [StatePiece(f"master/{name}", shape, box, tensor.view(-1), is_owner=False)])
        return tensor

    def lineage(self) -> tuple[LineageRecord, ...]:
        """See `WeightSource`: that of the run, and this turn."""
        run = self.checkpoint.index.run
        turn = LineageRecord(kind="import", step=self.checkpoint.step, source=self.place, run_id=run.run_id, changes=())
        return (*run.lineage, turn)
