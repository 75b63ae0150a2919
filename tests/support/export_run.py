"""A run folder with a checkpoint of a given model, made without training, for tests of export and import."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch

from megascale.checkpoint.comm import LocalComm
from megascale.checkpoint.index import ProbeRecord
from megascale.checkpoint.local_store import LocalStore
from megascale.checkpoint.records import to_json
from megascale.checkpoint.retention import Retention
from megascale.checkpoint.run_file import RUN_FILE, RunFile
from megascale.checkpoint.save import save_checkpoint
from megascale.config.dump import resolved_values
from megascale.config.load import parse_config
from megascale.model.transformer import build_model
from megascale.parallel.boxes import whole_box
from tests.support.checkpoint_ranks import RUN, make_piece, state_at
from tests.support.corpus import make_corpus

EOS_ID = 0


def make_run(
    folder: Path, model: dict, *, step: int = 3, probe: ProbeRecord | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Writes a run folder whose model has random weights, none of them special, or those given; gives them by name.

    Args:
        model: the config's `model` section.
        weights: by our names, in our shapes.
    """
    values = {
        "run": {"name": "exported", "folder": str(folder), "seed": 1}, "model": model,
        "data": {"folder": str(folder / "corpus")},
        "train": {"seq_len": 8, "micro_batch_size": 1, "global_batch_tokens": 8, "max_steps": 9},
        "optimizer": {"learning_rate": 0.1}, "evaluate": {"interval_steps": 3}, "checkpoint": {"interval_steps": 3},
    }
    config = parse_config(values, source="test")
    corpus = make_corpus(folder / "corpus", num_documents=2, num_validation_documents=0, vocab_size=model["vocab_size"])
    (folder / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    (folder / RUN_FILE).write_bytes(to_json(asdict(RunFile(RUN.run_id, eos_id=EOS_ID, url=None))))
    weights = weights or random_weights(config.model)
    tensors = {f"master/{name}": tensor for name, tensor in weights.items()}
    tensors |= {f"exp_avg/{name}": torch.ones_like(tensor) for name, tensor in weights.items()}
    pieces = [make_piece(key, tensor, whole_box(tuple(tensor.shape))) for key, tensor in tensors.items()]
    run = replace(RUN, config=json.loads(json.dumps(resolved_values(config))))
    save_checkpoint(
        LocalStore(folder), run, state_at(step), pieces, comm=LocalComm(), retention=Retention(9), probe=probe
    )
    return weights


def random_weights(model_config) -> dict[str, torch.Tensor]:
    """Weights by name; norms and biases far from ones and zeros, padding rows of the vocabulary zero as in training."""
    generator = torch.Generator().manual_seed(2)
    weights = {}
    for name, parameter in build_model(model_config, seed=1).named_parameters():
        weights[name] = parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
        if name in ("embedding.tokens.weight", "head.weight", "head.bias"):
            weights[name][model_config.vocab_size :] = 0
    return weights
