"""The sections that say how a run trains: data, batch, optimizer, precision, layout, evaluation."""

from typing import Literal

from pydantic import Field

from megascale.config.base import Section


class DataConfig(Section):
    """What the run reads."""

    folder: str = Field(min_length=1)
    """Folder of a tokenized corpus, as `megascale data build` writes it: `train/`, `validation/`, `tokenizer.json`."""

    num_lanes: int = Field(64, ge=1)
    """Independent streams that the row order is woven from. Part of the order: a run never changes it. 64 lets up to
    64 nodes each stay on few shards; on one machine it has no effect on speed."""

    window_rows: int = Field(4096, ge=1)
    """Rows of one lane that are shuffled among themselves. Larger mixes better and keeps more shards open."""


class TrainConfig(Section):
    """The batch, the length of the run, and what the step does beyond plain forward and backward."""

    seq_len: int = Field(ge=2)
    """Input tokens of a row; a row reads one more token as the last label."""

    micro_batch_size: int = Field(ge=1)
    """Rows through the model in one forward pass on one replica. Sets memory, never the result."""

    global_batch_tokens: int = Field(ge=1)
    """Input tokens of one optimizer step over all replicas; a multiple of micro_batch_size x seq_len x dp. The number
    of micro-batches follows from it, so the batch is the same on any number of ranks."""

    max_steps: int = Field(ge=1)
    """Optimizer steps of the run."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: `selective` the attention core and the
    feed-forward activation, `full` each whole block. Less memory for more work; the result is the same to the bit."""

    compile: bool = False
    """Compile each block with torch.compile. Pays on GPUs and long runs; the first step takes longer."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: `stop` ends the run before the update, `skip` leaves the
    parameters as they were and goes on. In fp16, steps that only lower the loss scale are always skipped."""

    max_skipped_steps: int = Field(10, ge=1)
    """Steps in a row that `on_nonfinite: skip` may skip before the run stops after all: a model that has diverged
    doesn't come back."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate, reached at the end of the warm-up."""

    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Shape after the warm-up: `wsd` (warm-up, stable, decay) stays at the peak and falls over the last
    `decay_fraction` of the run (MiniCPM, arXiv 2404.06395, section 4)."""

    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly to the peak."""

    horizon_steps: int | None = Field(None, ge=1)
    """Step at which the schedule ends; train.max_steps when not given. Give it to make a run longer later without
    changing the part already trained."""

    min_fraction: float = Field(0.1, ge=0, le=1)
    """Final learning rate as a fraction of the peak (0.1: Chinchilla, arXiv 2203.15556, appendix B)."""

    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Part of the horizon over which `wsd` decays."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the second moment (0.95: GPT-3, arXiv 2005.14165, appendix B)."""

    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""

    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay of matrices; norms and biases have none (0.1: GPT-3, arXiv 2005.14165, appendix B)."""

    clip_norm: float = Field(1.0, ge=0)
    """Largest L2 norm of the whole gradient; larger ones are scaled down to it. 0 turns clipping off."""


class PrecisionConfig(Section):
    """The number formats of the run. Masters, moments and gradient accumulation are fp32 in each of them."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Format of parameters and activations in the forward and backward pass."""

    initial_loss_scale_log2: int = Field(16, ge=0, le=32)
    """fp16 only: the first loss scale is 2 to this power; it halves at an overflow."""

    loss_scale_window_steps: int = Field(1000, ge=1)
    """fp16 only: steps without overflow after which the loss scale doubles."""


class ParallelConfig(Section):
    """How the run is laid out over ranks. dp follows: world_size / (pp x cp x tp)."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the replicas share out among themselves: 0 nothing, 1 optimizer state, 2 also gradients, 3 also
    parameters (ZeRO, arXiv 1910.02054, section 5)."""

    tp: int = Field(1, ge=1)
    """Tensor-parallel ranks that share each layer."""

    pp: int = Field(1, ge=1)
    """Pipeline stages that share the list of layers."""

    cp: int = Field(1, ge=1)
    """Context-parallel ranks that share each row."""


class EvaluateConfig(Section):
    """The validation passes during training."""

    interval_steps: int = Field(ge=1)
    """Steps between two validation passes; there is one more at the end of the run."""

    max_rows: int | None = Field(None, ge=1)
    """Rows of the validation split to read, the same ones each time; all of them when not given."""
