"""Layouts under test: each trains the same tiny model on the same rows as the plain single-process loop."""

from dataclasses import dataclass, field

from megascale.config.load import parse_config
from megascale.config.schema import RunConfig

ROWS, SEQ_LEN, STEPS, CLIP_NORM, LEARNING_RATE, SEED = 8, 16, 20, 0.5, 1e-3, 1
ADAM_EPS = 1e-5
"""With 1e-8 AdamW makes a full-size step of a gradient that is nothing but rounding, as that of key biases is: a plain
fp32 loop then is 1.8e-6 from the same loop in fp64, on gpt2 with documents, and no layout could be nearer."""

EXPERTS = {"num_experts": 4, "top_k": 2, "d_expert": 24, "num_shared_experts": 1, "num_dense_layers": 1,
           "balance_weight": 0.02, "z_weight": 0.002}
"""The first block is dense, so that a pipeline stage may have no experts."""
MODELS = {
    "llama": {"family": "llama", "num_layers": 4, "num_kv_heads": 2, "d_ff": 48},
    "llama_one_kv_head": {"family": "llama", "num_layers": 2, "num_kv_heads": 1, "d_ff": 48},
    "llama_uneven": {"family": "llama", "num_layers": 5, "num_kv_heads": 2, "d_ff": 48},
    "llama_window": {"family": "llama", "num_layers": 2, "num_kv_heads": 2, "d_ff": 48, "window": 5},
    "llama_features": {
        "family": "llama", "num_layers": 2, "num_kv_heads": 2, "d_ff": 48, "head_width": 12, "qk_norm": True,
        "attention_softcap": 1.0, "logit_softcap": 2.0, "window": 5, "global_every": 2,
        "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_seq_len": 8},
    },
    "palm": {"family": "palm", "num_layers": 2, "num_kv_heads": 1, "d_ff": 48},
    "palm_dropout": {"family": "palm", "num_layers": 4, "num_kv_heads": 1, "d_ff": 48, "dropout": 0.2},
    "gpt2": {"family": "gpt2", "num_layers": 4},
    "gpt2_dropout": {"family": "gpt2", "num_layers": 2, "dropout": 0.2},
    "bert": {"family": "bert", "num_layers": 2, "norm_eps": 1e-12},
    "bert_pairs": {"family": "bert", "num_layers": 2, "norm_eps": 1e-12, "dropout": 0.2, "pair_head": True},
    "moe": {"family": "moe", "num_layers": 3, "num_kv_heads": 2, "d_ff": 48, "moe": EXPERTS},
    "moe_capacity": {"family": "moe", "num_layers": 2, "num_kv_heads": 2, "d_ff": 48,
                     "moe": EXPERTS | {"capacity_factor": 1.0, "num_dense_layers": 0}},
}
"""All with d_model 32, 4 heads and 61 ids padded to 64; gpt2 has tied embeddings, biases and learned positions."""
ROW_BY_ROW = {"micro_batch_size": 1}
COMPILED = {"compile": True}


@dataclass(frozen=True)
class LayoutCase:
    """One layout of one model.

    Attributes:
        ranks: number of ranks.
        parallel, train, precision, data: what the config's sections say beside the defaults.
    """

    name: str
    ranks: int
    parallel: dict
    model: str = "llama"
    train: dict = field(default_factory=dict)
    precision: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)


def case_config(case: LayoutCase) -> RunConfig:
    """The run config of a case."""
    shape = {"d_model": 32, "num_heads": 4, "vocab_size": 61, "max_seq_len": 32}
    return parse_config({
        "run": {"name": "parity", "folder": "unused", "seed": SEED},
        "model": MODELS[case.model] | shape,
        "data": {"folder": "unused"} | case.data,
        "train": {"seq_len": SEQ_LEN, "micro_batch_size": 2, "global_batch_tokens": ROWS * SEQ_LEN, "max_steps": STEPS}
        | case.train,
        "optimizer": {"learning_rate": LEARNING_RATE, "clip_norm": CLIP_NORM, "schedule": "constant", "eps": ADAM_EPS},
        "precision": {"dtype": "fp32", "initial_loss_scale_log2": 10} | case.precision,
        "parallel": {"zero_stage": 1} | case.parallel,
        "evaluate": {"interval_steps": 1000},
        "checkpoint": {"interval_steps": 1000},
    }, source=case.name)


def _pipelines() -> list[LayoutCase]:
    """Every schedule, at pp 2 x dp 2."""
    schedules = ("gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zero_bubble_v", "dualpipe_v")
    return [
        LayoutCase(f"pp2_dp2_{schedule}", 4, {"pp": 2, "schedule": schedule}, "gpt2", train=ROW_BY_ROW)
        for schedule in schedules
    ]


def _expert_parallel() -> list[LayoutCase]:
    """Experts over dp, over cp and over both, beside every other axis."""
    return [
        LayoutCase("ep2", 2, {"ep": 2}, "moe"),
        LayoutCase("tp2_experts", 2, {"tp": 2}, "moe"),
        LayoutCase("pp2_experts", 2, {"pp": 2, "stage_layers": [1, 2]}, "moe"),
        LayoutCase("tp2_pp2_experts", 4, {"tp": 2, "pp": 2, "stage_layers": [1, 2]}, "moe"),
        LayoutCase("dp4_experts", 4, {}, "moe"),
        LayoutCase("ep4", 4, {"ep": 4}, "moe"),
        LayoutCase("ep2_dp4", 4, {"ep": 2}, "moe"),
        LayoutCase("ep2_dp4_zero0", 4, {"ep": 2, "zero_stage": 0}, "moe", train=ROW_BY_ROW),
        LayoutCase("ep4_capacity", 4, {"ep": 4}, "moe_capacity"),
        LayoutCase("ep2_tp2", 4, {"ep": 2, "tp": 2}, "moe"),
        LayoutCase("ep2_tp2_without_sequence_shards", 4, {"ep": 2, "tp": 2, "sequence_parallel": False}, "moe"),
        LayoutCase("ep2_pp2", 4, {"ep": 2, "pp": 2, "stage_layers": [1, 2]}, "moe"),
        LayoutCase("ep2_cp2", 4, {"ep": 2, "cp": 2}, "moe"),
        LayoutCase("ep4_cp2", 4, {"ep": 4, "cp": 2}, "moe"),
        LayoutCase("ep2_cp2_tp2", 4, {"ep": 2, "cp": 2, "tp": 2, "zero_stage": 0}, "moe"),
        LayoutCase("ep2_recompute_full", 4, {"ep": 2}, "moe", train={"recompute": "full"}),
        LayoutCase("ep2_recompute_selective", 4, {"ep": 2}, "moe", train={"recompute": "selective"}),
    ]


CASES = {case.name: case for case in [
    LayoutCase("tp2", 2, {"tp": 2}),
    LayoutCase("tp2_without_sequence_shards", 2, {"tp": 2, "sequence_parallel": False}),
    LayoutCase("tp2_gpt2", 2, {"tp": 2}, "gpt2"),
    LayoutCase("tp4", 4, {"tp": 4}),
    LayoutCase("tp4_gpt2_dropout", 4, {"tp": 4}, "gpt2_dropout"),
    LayoutCase("tp2_dropout_without_sequence_shards", 2, {"tp": 2, "sequence_parallel": False}, "gpt2_dropout"),
    LayoutCase("tp4_one_kv_head", 4, {"tp": 4}, "llama_one_kv_head"),
    LayoutCase("tp2_dp2_zero0", 4, {"tp": 2, "zero_stage": 0}),
    LayoutCase("tp2_dp2_zero1", 4, {"tp": 2, "zero_stage": 1}),
    LayoutCase("tp2_dp2_zero2", 4, {"tp": 2, "zero_stage": 2}),
    LayoutCase("tp2_dp2_zero3", 4, {"tp": 2, "zero_stage": 3}),
    LayoutCase("pp2", 2, {"pp": 2}),
    LayoutCase("pp2_zero0", 2, {"pp": 2, "zero_stage": 0}, "gpt2"),
    LayoutCase("pp2_documents", 2, {"pp": 2}, "gpt2", data={"document_mask": True}),
    LayoutCase("pp4", 4, {"pp": 4}),
    LayoutCase("pp2_uneven_layers", 2, {"pp": 2}, "llama_uneven"),
    LayoutCase("pp2_split_by_hand", 2, {"pp": 2, "stage_layers": [1, 3]}, "gpt2"),
    LayoutCase("pp2_dropout", 2, {"pp": 2}, "gpt2_dropout"),
    *_pipelines(),
    LayoutCase("cp2_ring", 2, {"cp": 2}),
    LayoutCase("cp2_ulysses", 2, {"cp": 2, "context_attention": "ulysses"}),
    LayoutCase("cp2_ring_documents", 2, {"cp": 2}, "gpt2", data={"document_mask": True}),
    LayoutCase("cp2_ulysses_documents", 2, {"cp": 2, "context_attention": "ulysses"}, data={"document_mask": True}),
    LayoutCase("cp2_ring_window", 2, {"cp": 2}, "llama_window"),
    LayoutCase("cp2_dropout", 2, {"cp": 2}, "gpt2_dropout"),
    LayoutCase("cp4_ring", 4, {"cp": 4, "zero_stage": 0}),
    LayoutCase("cp2_dp2_zero2", 4, {"cp": 2, "zero_stage": 2}),
    LayoutCase("cp2_dp2_zero3", 4, {"cp": 2, "zero_stage": 3}),
    LayoutCase("cp2_tp2_ring", 4, {"cp": 2, "tp": 2}),
    LayoutCase("cp2_tp2_ulysses", 4, {"cp": 2, "tp": 2, "context_attention": "ulysses"}),
    LayoutCase("tp2_pp2", 4, {"tp": 2, "pp": 2}, "gpt2"),
    LayoutCase("pp2_cp2", 4, {"pp": 2, "cp": 2}, "gpt2"),
    LayoutCase("tp2_recompute_full", 2, {"tp": 2}, train={"recompute": "full"}),
    LayoutCase("tp2_recompute_selective", 2, {"tp": 2}, train={"recompute": "selective"}),
    LayoutCase("tp2_recompute_attention", 2, {"tp": 2},
               train={"recompute": "selective", "recompute_parts": ["attention"]}),
    LayoutCase("pp2_recompute_every_second", 2, {"pp": 2}, train={"recompute": "full", "recompute_every": 2}),
    LayoutCase("pp2_zero_bubble_recompute", 2, {"pp": 2, "schedule": "zero_bubble"}, train={"recompute": "full"}),
    LayoutCase("tp2_offloaded_activations", 2, {"tp": 2}, train={"offload_activations": True}),
    LayoutCase("tp2_one_micro_batch", 2, {"tp": 2}, train={"micro_batch_size": 8}),
    LayoutCase("tp2_eight_micro_batches", 2, {"tp": 2}, train=ROW_BY_ROW),
    LayoutCase("tp2_offloaded_optimizer", 2, {"tp": 2, "offload_optimizer": "cpu"}),
    LayoutCase("tp2_pp2_dp2", 8, {"tp": 2, "pp": 2}, "gpt2"),
    LayoutCase("tp2_pp2_dp2_interleaved", 8, {"tp": 2, "pp": 2, "schedule": "interleaved_1f1b"}, train=ROW_BY_ROW),
    LayoutCase("tp2_pp2_dp2_zero_bubble_v", 8, {"tp": 2, "pp": 2, "schedule": "zero_bubble_v"}, "gpt2",
               train=ROW_BY_ROW),
    LayoutCase("tp2_cp2_pp2", 8, {"tp": 2, "cp": 2, "pp": 2}, "gpt2"),
    LayoutCase("tp2_cp2_dp2_zero3", 8, {"tp": 2, "cp": 2, "zero_stage": 3}),
    *_expert_parallel(),
    LayoutCase("tp2_compiled", 2, {"tp": 2}, "llama_one_kv_head", train=COMPILED),
    LayoutCase("tp2_compiled_zero3", 2, {"tp": 2, "zero_stage": 3}, train=COMPILED),
    LayoutCase("pp2_compiled", 2, {"pp": 2}, "gpt2_dropout", train=COMPILED),
    LayoutCase("cp2_ring_compiled", 2, {"cp": 2}, train=COMPILED),
    LayoutCase("cp2_ulysses_compiled", 2, {"cp": 2, "context_attention": "ulysses"}, train=COMPILED),
    LayoutCase("tp2_compiled_recompute", 2, {"tp": 2}, train=COMPILED | {"recompute": "full"}),
]}
"""Every case by name; `make parity` runs them all, CI the representative ones."""


WITHOUT_SEQUENCE_SHARDS = {"tp": 2, "sequence_parallel": False}
CASES |= {case.name: case for model in ("llama_features", "palm") for case in [
    LayoutCase(f"{model}_tp2", 2, {"tp": 2}, model),
    LayoutCase(f"{model}_tp2_without_sequence_shards", 2, WITHOUT_SEQUENCE_SHARDS, model),
    LayoutCase(f"{model}_pp2", 2, {"pp": 2}, model),
    LayoutCase(f"{model}_cp2_ring", 2, {"cp": 2}, model),
    LayoutCase(f"{model}_cp2_ulysses", 2, {"cp": 2, "context_attention": "ulysses"}, model),
    LayoutCase(f"{model}_tp2_dp2_zero2", 4, {"tp": 2, "zero_stage": 2}, model),
    LayoutCase(f"{model}_tp2_dp2_zero3", 4, {"tp": 2, "zero_stage": 3}, model),
    LayoutCase(f"{model}_tp4", 4, {"tp": 4}, model),
    LayoutCase(f"{model}_tp2_pp2_dp2", 8, {"tp": 2, "pp": 2}, model),
]}
CASES |= {case.name: case for case in [
    LayoutCase("palm_tp2_recompute_selective", 2, {"tp": 2}, "palm_dropout", train={"recompute": "selective"}),
    LayoutCase("palm_pp2_zero_bubble_recompute", 2, {"pp": 2, "schedule": "zero_bubble"}, "palm_dropout",
               train={"recompute": "full"}),
]}
"""LLaMA with all that may be added to it, and PaLM's blocks in one piece."""


def _in_half_precision(dtype: str) -> list[LayoutCase]:
    """One rank with its rows split up in four ways, then layouts of the same model."""
    precision = {"dtype": dtype}
    alone = [
        LayoutCase(f"{dtype}_alone_{rows}", 1, {}, train={"micro_batch_size": rows}, precision=precision)
        for rows in (1, 2, 4, 8)
    ]
    layouts = [
        ("tp2", 2, {"tp": 2}), ("pp2", 2, {"pp": 2}), ("cp2_ring", 2, {"cp": 2}),
        ("cp2_ulysses", 2, {"cp": 2, "context_attention": "ulysses"}), ("tp2_pp2", 4, {"tp": 2, "pp": 2}),
        ("tp2_dp2_zero2", 4, {"tp": 2, "zero_stage": 2}), ("tp2_dp2_zero3", 4, {"tp": 2, "zero_stage": 3}),
        ("pp2_dp2_zero_bubble", 4, {"pp": 2, "schedule": "zero_bubble"}),
    ]
    return alone + [
        LayoutCase(f"{dtype}_{name}", ranks, parallel, precision=precision) for name, ranks, parallel in layouts
    ]


HALF_PRECISION = {dtype: _in_half_precision(dtype) for dtype in ("bf16", "fp16")}
"""The cases of each 16-bit format; those named `..._alone_...` tell how far one layout is from the plain loop."""
CASES |= {case.name: case for cases in HALF_PRECISION.values() for case in cases}
