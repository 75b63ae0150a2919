"""The only speller of DeepSpeed's config keys.

DeepSpeed ignores a misspelt top-level key and has defaults that change results (clipping at 1.0, bf16 accumulation and
communication), so the dict is made here from our own config and never written by a user.
"""

from typing import Any

BUCKET_ELEMENTS = 50_000_000
"""Gradients that travel together at most: 200 MB in fp32, enough to fill any link."""


def deepspeed_config(
    *, zero_stage: int, dtype: str, clip_norm: float, micro_batch_size: int, initial_loss_scale_log2: int,
    loss_scale_window_steps: int, num_elements: int, is_offloaded: bool = False, pins_memory: bool = False,
) -> dict[str, Any]:
    """DeepSpeed's config for ZeRO-2 and ZeRO-3 with fp32 masters, accumulation and communication of gradients.

    Accumulation is unmanaged: the engine is given any number of backward passes and then one step. Offloaded state is
    updated by the optimizer that was given; DeepSpeed would rather have its own, which is compiled at the first start.

    Args:
        num_elements: of all parameters of this rank. DeepSpeed's own bucket is 2 GB, whatever the model.
        is_offloaded: whether masters, moments and the update live in CPU memory.
        pins_memory: whether that memory is page-locked, for a GPU to read without a detour.
    """
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": pins_memory}} if is_offloaded else {}
    precision: dict[str, Any] = {}
    if dtype == "bf16":
        precision["bf16"] = {"enabled": True, "check_grad_overflow": True}
    elif dtype == "fp16":
        precision["fp16"] = {
            "enabled": True,
            "initial_scale_power": initial_loss_scale_log2,
            "loss_scale_window": loss_scale_window_steps,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip_norm,
        "zero_optimization": {
            "stage": zero_stage,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "reduce_bucket_size": min(num_elements, BUCKET_ELEMENTS),
        } | offload,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **precision,
    }
