"""Layouts and rows for tests of models with an encoder and a decoder."""

import torch

from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.data.batch import Batch
from tests.support.layouts import ADAM_EPS, LayoutCase

ROWS, SOURCE_LEN, TARGET_LEN, STEPS, CLIP_NORM, LEARNING_RATE, SEED = 8, 16, 8, 4, 0.02, 1e-2, 1
VOCAB_SIZE = 61
MODELS = {
    "t5": {"family": "t5", "num_layers": 2, "head_width": 12, "dropout": 0.1},
    "t5_v11": {
        "family": "t5", "num_layers": 1, "num_decoder_layers": 3, "activation": "geglu", "d_ff": 48,
        "tie_embeddings": False,
    },
    "transformer": {"family": "transformer", "num_layers": 2, "dropout": 0.1},
}
"""All with d_model 32 and 4 heads. Four stages of t5 are two of the encoder and two of the decoder; of t5_v11 with its
one block of the encoder the first border of two stages lies in the decoder."""
SMOOTHED = {"objective": {"kind": "pairs", "target_len": TARGET_LEN, "label_smoothing": 0.1}, "packing": "none"}
CASES = {case.name: case for case in [
    LayoutCase("tp2", 2, {"tp": 2}, "t5"),
    LayoutCase("tp2_without_sequence_shards", 2, {"tp": 2, "sequence_parallel": False}, "transformer"),
    LayoutCase("tp2_recompute_selective", 2, {"tp": 2}, "t5_v11", train={"recompute": "selective"}),
    LayoutCase("pp2", 2, {"pp": 2}, "t5"),
    LayoutCase("pp2_uneven", 2, {"pp": 2}, "t5_v11"),
    LayoutCase("dp2_zero2", 2, {"zero_stage": 2}, "t5"),
    LayoutCase("dp2_zero3_smoothed", 2, {"zero_stage": 3}, "transformer", data=SMOOTHED),
    LayoutCase("tp2_smoothed", 2, {"tp": 2}, "transformer", data=SMOOTHED),
    LayoutCase("pp2_smoothed", 2, {"pp": 2}, "transformer", data=SMOOTHED),
    LayoutCase("dp2_zero2_recompute", 2, {"zero_stage": 2}, "transformer", train={"recompute": "full"}),
    LayoutCase("pp4", 4, {"pp": 4}, "t5"),
    LayoutCase("pp4_gpipe_recompute", 4, {"pp": 4, "schedule": "gpipe"}, "t5_v11", train={"recompute": "full"}),
    LayoutCase("tp2_zero3", 4, {"tp": 2, "zero_stage": 3}, "t5"),
    LayoutCase("tp2_pp2_interleaved", 4, {"tp": 2, "pp": 2, "schedule": "interleaved_1f1b"}, "transformer"),
    LayoutCase("tp2_pp2_dp2", 8, {"tp": 2, "pp": 2}, "t5"),
    LayoutCase("tp2_pp2_dp2_smoothed", 8, {"tp": 2, "pp": 2}, "transformer", data=SMOOTHED),
]}


def case_config(case: LayoutCase) -> RunConfig:
    """The run config of a case."""
    shape = {"d_model": 32, "num_heads": 4, "vocab_size": VOCAB_SIZE, "max_seq_len": 32, "init_std": 0.2}
    return parse_config({
        "run": {"name": "parity", "folder": "unused", "seed": SEED},
        "model": shape | MODELS[case.model],
        "data": {"folder": "unused", "packing": "none", "objective": {"kind": "pairs", "target_len": TARGET_LEN}}
        | case.data,
        "train": {"seq_len": SOURCE_LEN, "micro_batch_size": 1, "global_batch_tokens": ROWS * SOURCE_LEN,
                  "max_steps": STEPS} | case.train,
        "optimizer": {"learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM, "schedule": "constant", "eps": ADAM_EPS},
        "precision": {"dtype": "fp32"},
        "parallel": {"zero_stage": 1} | case.parallel,
        "evaluate": {"interval_steps": 1000},
        "checkpoint": {"interval_steps": 1000},
    }, source=case.name)


def pair_batch(seed: int, numbers: range) -> Batch:
    """Some of the rows of a step: sources of two documents and of many lengths, padded; the target's are as many."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(0, VOCAB_SIZE, (ROWS, SOURCE_LEN), generator=generator)
    target = torch.randint(0, VOCAB_SIZE, (ROWS, TARGET_LEN), generator=generator)
    sizes = SOURCE_LEN - torch.arange(ROWS)[:, None]
    columns, target_columns = torch.arange(SOURCE_LEN), torch.arange(TARGET_LEN)
    documents = (columns >= 6).int() + (columns >= sizes)
    target_documents = (target_columns >= 4).int().expand(ROWS, -1)
    labels = torch.where(target_columns < TARGET_LEN - torch.arange(ROWS)[:, None] % 3, target.roll(-1, 1), -100)
    index = torch.tensor(list(numbers))
    return Batch(
        target[index], labels[index], target_documents[index], index, source[index], documents[index].int(),
    )
