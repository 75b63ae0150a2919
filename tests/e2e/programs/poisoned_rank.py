"""A rank whose loss or gradient isn't finite at chosen steps, and that notes what the step did to its state.

The file named by MEGASCALE_TEST_PLAN holds JSON: {"folder": folder, "rank": r, "steps": [...], "value": "nan" or "inf",
"parameter": name, or null to poison the loss}. Each rank writes `steps_<rank>.jsonl` into the folder: for each step a
hash of its masters and moments before and after, and the loss scale after it.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import torch

from megascale.train import build, rank

PLAN = json.loads(Path(os.environ["MEGASCALE_TEST_PLAN"]).read_text())
RANK = int(os.environ["RANK"])
VALUE = float(PLAN["value"])
position = {"step": -1}


def is_poisoned() -> bool:
    return PLAN["rank"] == RANK and position["step"] in PLAN["steps"]


def follow_steps(objective):
    """The objective, which also tells the hooks which step it is."""

    def prepare(batch, step, loss_factor):
        position["step"] = step
        return objective(batch, step, loss_factor)

    return prepare


def poison_loss(model, arguments: tuple, loss: torch.Tensor) -> torch.Tensor | None:
    return loss * VALUE if model.training and is_poisoned() else None


def poison_gradient(gradient: torch.Tensor) -> torch.Tensor | None:
    if not is_poisoned():
        return None
    poisoned = gradient.clone()
    poisoned.view(-1)[0] = VALUE
    return poisoned


def note_steps(engine) -> None:
    original, path = engine.train_step, Path(PLAN["folder"]) / f"steps_{RANK}.jsonl"

    def train_step(micro_batches, *, step, **options):
        before = hash_state(engine)
        output = original(micro_batches, step=step, **options)
        scale = engine.scalars().get("loss_scaler.cur_scale", 1.0)
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "before": before, "after": hash_state(engine), "scale": scale}) + "\n")
        return output

    engine.train_step = train_step


def hash_state(engine) -> str:
    digest = hashlib.sha256()
    for piece in engine.state_pieces():
        digest.update(piece.tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    original = build.build_engine

    def build_engine(model, optimizer, objective, *arguments):
        if PLAN["parameter"] is None:
            model.register_forward_hook(poison_loss)
        else:
            model.get_parameter(PLAN["parameter"]).register_hook(poison_gradient)
        engine = original(model, optimizer, follow_steps(objective), *arguments)
        note_steps(engine)
        return engine

    build.build_engine = build_engine
    rank.main(sys.argv[1:])


if __name__ == "__main__":
    main()
