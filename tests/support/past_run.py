"""A run folder as sessions of training leave it behind, without a model: rows are read by the loader itself."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.records import to_json
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.run_file import RUN_FILE, RunFile
from megascale.checkpoint.save import save_checkpoint
from megascale.checkpoint.state import RunState
from megascale.config.derive import derive
from megascale.config.dump import resolved_values, to_yaml
from megascale.config.schema import RunConfig
from megascale.data.ledger import add_counts, chain_digest
from megascale.data.loader import Loader
from megascale.data.stream import open_stream
from megascale.observe.run_files import Session, SkippedRows, append_session, append_skips
from megascale.parallel.boxes import Box
from megascale.parallel.layout import Layout
from tests.support.checkpoint_ranks import RUN, make_piece, make_tensors


class PastSession(NamedTuple):
    """Steps [first_step, stop_step), counted from 0, under a layout."""

    first_step: int
    stop_step: int
    layout: Layout


def make_past_run(folder: Path, config: RunConfig, sessions: list[PastSession]) -> dict[tuple[int, int], np.ndarray]:
    """Writes config, sessions, metrics, skips and a checkpoint after the last step.

    Returns:
        tokens_BT of all rows by (step as the log numbers it, replica), as the session that ran the step last read them.
    """
    folder.mkdir(parents=True)
    (folder / RUN_FILE).write_bytes(to_json(asdict(RunFile(RUN.run_id, eos_id=0, url=None))))
    (folder / "config.yaml").write_text(to_yaml(resolved_values(config)))
    states, read = {0: RunState.at_start()}, {}
    for session in sessions:
        layout, derived = session.layout, derive(config, session.layout.world_size)
        append_session(folder, Session(0.0, session.first_step, layout.world_size, asdict(layout) | {"zero_stage": 1}))
        stream, state = open_stream(config, derived), states[session.first_step]
        names = [corpus.name for corpus in stream.corpora]
        loaders = [Loader(stream, derived.batches, 1, replica, layout.dp) for replica in range(layout.dp)]
        for step in range(session.first_step, session.stop_step):
            for loader in loaders:
                data = loader.make_step(step)
                read[step + 1, loader.replica] = np.concatenate([batch.tokens_BT for batch in data.micro_batches])
                state = replace(state, ledger=add_counts(state.ledger, names, data.counts.read))
                for fault in data.faults:
                    append_skips(folder, SkippedRows(step, 0, *fault))
            total = sum(loader.make_step(step).counts.digest_sum for loader in loaders)
            state = states[step + 1] = replace(
                state, step=step + 1, rows=derived.batches.first_row(step + 1),
                stream_digest=chain_digest(state.stream_digest, total),
            )
    metrics = [{"kind": "train", "step": step + 1} for step in range(sessions[-1].stop_step)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    save_state(folder, state)
    return read


def save_state(folder: Path, state: RunState) -> None:
    """Saves a checkpoint of a state, with one small tensor."""
    (tensor,) = make_tensors({"master/a": (3,)}).values()
    piece = make_piece("master/a", tensor, Box((0,), (3,)))
    save_checkpoint(LocalStore(folder), RUN, state, [piece], comm=LocalComm(), retention=Retention(9))
