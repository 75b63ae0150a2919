"""One process that trains a tiny fp16 run and resumes copies of it, each with one saved field put back to its start.

Arguments: a config file, a folder, and a JSON object {poison, cases} with cases {name, step, drop, poison}: `drop` is
`state.FIELD`, `scalar.NAME`, `tensor.KIND`, or null for nothing; `poison` lists the steps, from 0, whose loss is NaN.
Prints a line for the whole run, and one a case: {name, observed}.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import torch

from megascale.checkpoint.folders import checkpoint_path, list_steps
from megascale.checkpoint.state import RunState
from megascale.errors import MegascaleError
from megascale.parallel.heartbeat import Heartbeat
from megascale.parallel.mesh import join_ranks, lay_out_mesh, read_rank_info
from megascale.train import build, session, setup
from megascale.train.signals import StopRequest

OPTIONS = [
    "precision.dtype=fp16", "precision.initial_loss_scale_log2=18", "precision.loss_scale_window_steps=3",
    "train.on_nonfinite=skip", "train.max_skipped_steps=3", "checkpoint.interval_steps=1", "checkpoint.keep_last=99",
    "checkpoint.asynchronous=false", "checkpoint.read_back=false", "train.global_batch_tokens=128",
]
CURVES = ("loss", "grad_norm", "loss_scale", "tokens_seen", "ledger")
plan = {"drop": None, "poison": [], "step": 0}
seen: list = []


def drop_at_load(original: Callable) -> Callable:
    """Loads as ever, and then puts back what the plan drops."""

    def load_state(checkpoint, engine, mesh):
        scalars = engine.scalars()
        tensors = {(piece.key, piece.box): piece.tensor.clone() for piece in engine.state_pieces()}
        state = original(checkpoint, engine, mesh)
        source, _, name = (plan["drop"] or "").partition(".")
        if source == "state":
            state = replace(state, **{name: getattr(RunState.at_start("fresh"), name)})
        elif source == "scalar":
            engine.restore_scalars(engine.scalars() | {name: scalars[name]})
        elif source == "tensor":
            pieces = [piece for piece in engine.state_pieces() if piece.key.startswith(f"{name}/")]
            for piece in pieces:
                piece.tensor.copy_(tensors[piece.key, piece.box])
            assert pieces
            engine.restore_scalars(engine.scalars())
        return state

    return load_state


def poison_losses(original: Callable) -> Callable:
    """Builds an engine whose loss is NaN at the steps of the plan."""

    def build_engine(model, optimizer, objective, *arguments):
        def follow(batch, step, loss_factor):
            plan["step"] = step
            return objective(batch, step, loss_factor)

        def poison(model, arguments, loss):
            return loss * float("nan") if model.training and plan["step"] in plan["poison"] else None

        model.register_forward_hook(poison)
        return original(model, optimizer, follow, *arguments)

    return build_engine


def note_run_id(original: Callable) -> Callable:
    def build_logger(config, rank_number, folder, run_id, *arguments, **named):
        seen.append(run_id)
        return original(config, rank_number, folder, run_id, *arguments, **named)

    return build_logger


def observe(config: str, run_folder: Path, first_step: int) -> dict:
    """Trains on, and gives all that can be seen of it afterwards."""
    seen.clear()
    end = None
    try:
        session.run_rank([config, *OPTIONS, f"run.folder={run_folder}"], StopRequest(), Heartbeat())
    except MegascaleError as error:
        end = str(error)
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train" and line["step"] > first_step]
    steps = [step for step in list_steps(run_folder) if step > first_step]
    indexes = [json.loads((checkpoint_path(run_folder, step) / "index.json").read_text()) for step in steps]
    states = [index["state"] for index in indexes]
    return {
        **{name: [(line["step"], line.get(name)) for line in trained] for name in CURVES},
        "evaluations": [(line["step"], line["loss"]) for line in lines if line["kind"] == "eval"],
        "end": end,
        "wandb run": seen[-1],
        "digests": [{key: record["digest"] for key, record in index["tensors"].items()} for index in indexes],
        **{f"saved {field.name}": [state[field.name] for state in states] for field in fields(RunState)},
    }


def run_case(config: str, folder: Path, case: dict) -> dict:
    """Resumes a copy of the run of which only the checkpoint of one step is left."""
    copy = folder / case["name"].replace(" ", "_")
    copy.mkdir()
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(folder / "run" / name, copy / name)
    shutil.copytree(checkpoint_path(folder / "run", case["step"]), checkpoint_path(copy, case["step"]))
    plan.update(drop=case["drop"], poison=case["poison"])
    try:
        return observe(config, copy, case["step"])
    except Exception as error:  # such a run ends otherwise, and that is seen too
        return {"end": repr(error)}
    finally:
        shutil.rmtree(copy)


def main() -> None:
    config, folder, work = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    device = join_ranks(read_rank_info(dict(os.environ)), timeout_s=100)
    torch.set_num_threads(1)
    setup.build_mesh = lambda layout, info: lay_out_mesh(layout, info.rank, device)
    session.close_mesh = lambda: None
    setup._load_state = drop_at_load(setup._load_state)
    setup.build_logger = note_run_id(setup.build_logger)
    build.build_engine = poison_losses(build.build_engine)
    output, sys.stdout = sys.stdout, sys.stderr
    plan["poison"] = work["poison"]
    whole = observe(config, folder / "run", 0)
    print(json.dumps({"name": "whole", "observed": whole}), file=output, flush=True)
    for case in work["cases"]:
        print(json.dumps({"name": case["name"], "observed": run_case(config, folder, case)}), file=output, flush=True)


if __name__ == "__main__":
    main()
