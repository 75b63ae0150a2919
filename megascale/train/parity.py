"""One rank of a traced run: `python -m megascale.train.parity REQUEST`, as `megascale parity` starts it.

The request is JSON: the config's path, its overrides, the number of steps, the folder of the trace, and the trace to
follow, if any. The run's own folder isn't touched.
"""

import os
import sys
from contextlib import closing
from pathlib import Path

import torch

from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.config.model import ModelConfig
from megascale.data.loader import Loader
from megascale.data.stream import open_stream
from megascale.model.axes import ONE_RANK
from megascale.model.transformer import Transformer
from megascale.parallel.mesh import build_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of, own_stages
from megascale.train.loop import rate_of
from megascale.train.request import serve_request
from megascale.train.trace import TraceRecorder
from megascale.train.trace_files import Names, TraceFolder


def trace_run(
    config_path: Path, overrides: list[str], num_steps: int, folder: Path, leader: Path | None
) -> None:
    """Takes the first steps of a run on the ranks that the environment describes, and writes their trace.

    Args:
        leader: folder of a trace whose state each further step begins with; None for the run's own.

    Raises:
        ConfigError, DataError, LaunchError: as a training run would.
    """
    config, info = load_config(config_path, overrides), read_rank_info(dict(os.environ))
    derived = derive(config, info.world_size, source=str(config_path))
    stream = open_stream(config, derived)
    mesh = build_mesh(layout_of(config, derived), info)
    loader = Loader(stream, derived.batches, config.train.micro_batch_size, mesh.dp_rank, derived.dp)
    engine = build_run_engine(config, mesh)
    names = model_names(config.model)
    layer_names = [[names.layers[index] for index in stage] for stage in own_stages(config, mesh).values()]
    recorder = TraceRecorder(
        engine, mesh, TraceFolder(folder), layer_names, names, config.parallel.is_sequence_parallel, config.run.seed,
        None if leader is None else TraceFolder(leader),
    )
    with closing(loader.steps_from(0)) as steps:
        for step in range(num_steps):
            data, rate = next(steps), rate_of(config, derived, step)
            (num_tokens,) = mesh.control_sum([data.counts.labels if mesh.leads_replica else 0])
            output = engine.train_step(data.micro_batches, step=step, num_tokens=num_tokens, learning_rate=rate)
            recorder.finish_step(output, rate)


def model_names(config: ModelConfig) -> Names:
    """The layers and parameters of a whole model, without memory for it."""
    with torch.device("meta"):
        model = Transformer(config, ONE_RANK)
    return Names(
        [spec.name for spec in model.specs], [placement.name for placement in model.placements().values()]
    )


def serve_trace(values: dict) -> None:
    """Does what one request says."""
    leader = values["leader"] and Path(values["leader"])
    trace_run(Path(values["config"]), values["overrides"], values["steps"], Path(values["folder"]), leader)


if __name__ == "__main__":
    serve_request(serve_trace, sys.argv[1])
