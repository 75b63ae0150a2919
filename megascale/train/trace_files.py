"""The files of a trace: what one layout computed in each phase of each step. Without torch, for the launcher to read.

    FOLDER/names.json                    the model's layers and parameters, in its order
    FOLDER/step_00001/facts.json         loss, gradient norm, and a digest of each layer's output
    FOLDER/step_00001/KIND/NAME.npy      a whole fp32 tensor of one of KINDS

All ranks write to the same files, each its own boxes, so no rank ever holds a whole tensor.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PHASES = ("start", "forward", "loss", "gradient", "norm", "update")
"""In the order of their computation; `start`, the weights before anything ran, is part of the first step only."""

KINDS = ("start", "gradient", "exp_avg", "exp_avg_sq", "master")
"""Tensors by parameter: masters before the first step; gradients; moments and masters after the update."""


@dataclass(frozen=True)
class Names:
    """What the model is made of, in its order."""

    layers: list[str]
    parameters: list[str]


@dataclass(frozen=True)
class Digest:
    """A few numbers about a layer's output in a step, the same however its rows and positions are shared out.

    Attributes:
        sketch: sums of all numbers, each time with other random signs. The mean square of the difference of two
            sketches is expected to be the square of the L2 norm of the difference of what they were made from.
        square_sum: of all numbers.
        checksum: a sum of hashes of all numbers' bits, equal only where every bit is.

    Source: Alon, Matias and Szegedy 1996, section 2.2 (the sketch).
    """

    sketch: list[float]
    square_sum: float
    checksum: int


@dataclass(frozen=True)
class StepFacts:
    """The numbers of a step besides its tensors.

    Attributes:
        updates: that the optimizer has made, this step's included.
    """

    loss: float
    norm: float
    learning_rate: float
    updates: int
    forward: dict[str, Digest]


@dataclass(frozen=True)
class TraceFolder:
    """Where a trace lives."""

    path: Path

    def write_names(self, names: Names) -> None:
        """Says what the model is made of; one rank calls it."""
        self._write_json("names.json", asdict(names))

    def read_names(self) -> Names:
        """What the model is made of."""
        return Names(**self._read_json("names.json"))

    def write_facts(self, step: int, facts: StepFacts) -> None:
        """Puts down the numbers of a step, counted from 1; one rank calls it."""
        self._write_json(f"step_{step:05d}/facts.json", asdict(facts))

    def read_facts(self, step: int) -> StepFacts:
        """The numbers of a step."""
        values = self._read_json(f"step_{step:05d}/facts.json")
        digests = {name: Digest(**digest) for name, digest in values.pop("forward").items()}
        return StepFacts(**values, forward=digests)

    def create_tensor(self, step: int, kind: str, name: str, shape: tuple[int, ...]) -> None:
        """Makes a tensor's file, full of NaN, which no two traces have in common: what nobody writes differs."""
        path = self._tensor(step, kind, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)[...] = np.nan

    def write_box(self, step: int, kind: str, name: str, slices: Iterable[slice], values: np.ndarray) -> None:
        """Fills in a part of a tensor."""
        self._open(step, kind, name, "r+")[tuple(slices)] = values

    def read_tensor(self, step: int, kind: str, name: str) -> np.ndarray:
        """A tensor as an array that reads the file when it is looked at."""
        return self._open(step, kind, name, "r")

    def _open(self, step: int, kind: str, name: str, mode: str) -> np.ndarray:
        return np.load(self._tensor(step, kind, name), mmap_mode=mode, allow_pickle=False)

    def _tensor(self, step: int, kind: str, name: str) -> Path:
        return self.path / f"step_{step:05d}" / kind / f"{name}.npy"

    def _write_json(self, name: str, values: dict) -> None:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")

    def _read_json(self, name: str) -> dict:
        return json.loads((self.path / name).read_text(encoding="utf-8"))
