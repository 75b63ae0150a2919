"""One rank of a traced run: `python -m megascale.train.parity REQUEST`, as `megascale parity` starts it.

The request is JSON: the config's path, its overrides, the number of steps, the folder of the trace, and the trace to
follow, if any. The run's own folder isn't touched.
"""

import json
import os
import sys
import traceback
import warnings
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import torch

from megascale.config.derive import derive
from megascale.config.load import load_config
from megascale.config.model import ModelConfig
from megascale.data.loader import Loader
from megascale.data.order import RowOrder
from megascale.data.rows import open_rows
from megascale.errors import EXIT_OK, EXIT_PEER_LOST, EXIT_RUN, MegascaleError
from megascale.model.axes import ONE_RANK
from megascale.model.transformer import Transformer
from megascale.parallel.mesh import build_mesh, close_mesh, read_rank_info
from megascale.train.build import build_run_engine, layout_of, own_stages
from megascale.train.evaluate import count_labels
from megascale.train.loop import rate_of
from megascale.train.rank import PEER_LOST_WORDS
from megascale.train.signals import stop_when_parent_dies
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
    rows = open_rows(config.data.folder, "train", config.train.seq_len, config.model.vocab_size)
    mesh = build_mesh(layout_of(config, derived), info)
    order = RowOrder(rows.rows_per_shard, config.run.seed, config.data.num_lanes, config.data.window_rows)
    loader = Loader(rows, order, derived.rows_per_step, config.train.micro_batch_size, mesh.dp_rank, derived.dp)
    engine = build_run_engine(config, derived, mesh, rows.manifest.eos_id)
    names = model_names(config.model)
    layer_names = [[names.layers[index] for index in stage] for stage in own_stages(config, mesh).values()]
    recorder = TraceRecorder(
        engine, mesh, TraceFolder(folder), layer_names, names, config.parallel.is_sequence_parallel, config.run.seed,
        None if leader is None else TraceFolder(leader),
    )
    with closing(loader.steps_from(0)) as steps:
        for step in range(num_steps):
            micro_batches = next(steps)
            (num_tokens,) = mesh.control_sum([count_labels(micro_batches) if mesh.leads_replica else 0])
            rate = rate_of(config, derived, step)
            output = engine.train_step(micro_batches, step=step, num_tokens=num_tokens, learning_rate=rate)
            recorder.finish_step(output, rate)


def model_names(config: ModelConfig) -> Names:
    """The layers and parameters of a whole model, without memory for it."""
    with torch.device("meta"):
        model = Transformer(config, ONE_RANK)
    return Names(
        [spec.name for spec in model.specs], [placement.name for placement in model.placements().values()]
    )


def main(request: str) -> NoReturn:
    """Runs one request and ends the process with its exit code, as a rank of a training run does."""
    stop_when_parent_dies()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    values, code = json.loads(request), EXIT_OK
    try:
        leader = values["leader"] and Path(values["leader"])
        trace_run(Path(values["config"]), values["overrides"], values["steps"], Path(values["folder"]), leader)
        close_mesh()
    except MegascaleError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:  # a full disk; or a peer that is gone, which has the reason
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_PEER_LOST if isinstance(error, ConnectionError) else EXIT_RUN
    except Exception as error:
        traceback.print_exc()
        code = EXIT_PEER_LOST if any(word in str(error) for word in PEER_LOST_WORDS) else EXIT_RUN
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1])
