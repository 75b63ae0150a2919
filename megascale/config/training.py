"""The sections that say how a run trains: batch, optimizer, precision, layout, evaluation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from megascale.config.base import Section
from megascale.config.schedules import SCHEDULES

BLOCK_PARTS = ("attention", "feed_forward")


class BatchStageConfig(Section):
    """A smaller batch at the start of a run."""

    until_step: int = Field(ge=1)
    """The first step that no longer has it, counted from 0."""

    global_batch_tokens: int = Field(ge=1)
    """Input tokens of a step until then; a multiple of micro_batch_size x seq_len x dp."""


class TrainConfig(Section):
    """The batch, the length of the run, and what the step does beyond plain forward and backward."""

    seq_len: int = Field(ge=2)
    """Input tokens of a row; a row reads one more token as the last label."""

    micro_batch_size: int = Field(ge=1)
    """Rows through the model in one forward pass on one replica. Sets memory, never the result."""

    global_batch_tokens: int = Field(ge=1)
    """Input tokens of one optimizer step over all replicas; a multiple of micro_batch_size x seq_len x dp. The number
    of micro-batches follows from it, so the batch is the same on any number of ranks."""

    batch_ramp: Annotated[tuple[BatchStageConfig, ...], Field(strict=False)] = ()
    """Smaller batches at the start, in the order of their steps; `global_batch_tokens` follows the last. Empty, the
    default: one size throughout. A batch that grows saves tokens early on (GPT-3, arXiv 2005.14165, appendix B)."""

    max_steps: int = Field(ge=1)
    """Optimizer steps of the run."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept: `selective` the attention core and the
    feed-forward activation, `full` each whole block. Less memory for more work; the result is the same to the bit."""

    recompute_parts: Annotated[tuple[Literal["attention", "feed_forward"], ...], Field(strict=False, min_length=1)] = (
        BLOCK_PARTS
    )
    """The halves of a block that `recompute: selective` covers; both by default, which saves most. `attention` alone
    costs least for what it saves (Korthikanti et al. 2022, arXiv 2205.05198, section 5)."""

    recompute_every: int = Field(1, ge=1)
    """Recompute every k-th block, the first included, and keep all of the others; 1, the default, is every block.
    Larger numbers trade memory back for time in steps of one block."""

    offload_activations: bool = False
    """Keep what a block saves for its backward pass in the memory of the CPU. Off by default: it costs a copy each way
    for every saved byte, and pays only where recompute doesn't save enough. On a CPU it saves nothing."""

    compile: bool = False
    """Compile each block with torch.compile. Pays on GPUs and long runs; the first step takes longer."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: `stop` ends the run before the update, `skip` leaves the
    parameters as they were and goes on. In fp16, steps that only lower the loss scale are always skipped."""

    max_skipped_steps: int = Field(10, ge=1)
    """Steps in a row that `on_nonfinite: skip` may skip before the run stops after all: a model that has diverged
    doesn't come back."""

    @model_validator(mode="after")
    def check_ramp(self) -> Self:
        """Refuses sizes that don't rise with their steps."""
        steps = [stage.until_step for stage in self.batch_ramp]
        sizes = [*(stage.global_batch_tokens for stage in self.batch_ramp), self.global_batch_tokens]
        if steps != sorted(set(steps)) or sizes != sorted(sizes):
            raise ValueError(
                f"train.batch_ramp: until_step {steps} and batches of {sizes} tokens, the last one"
                " train.global_batch_tokens, must both rise from stage to stage"
            )
        return self

    @model_validator(mode="after")
    def check_recompute(self) -> Self:
        """Refuses recompute settings that the mode would ignore."""
        if self.recompute != "selective" and set(self.recompute_parts) != set(BLOCK_PARTS):
            raise ValueError(
                f"train.recompute_parts = {list(self.recompute_parts)} says which half train.recompute = selective"
                f" covers, and recompute is {self.recompute}; use recompute: selective, or leave the parts out"
            )
        if self.recompute == "none" and self.recompute_every > 1:
            raise ValueError(
                f"train.recompute_every = {self.recompute_every} has nothing to recompute, since train.recompute ="
                " none; use recompute: selective or full, or recompute_every: 1"
            )
        return self


class PrecisionConfig(Section):
    """The number formats of the run. Masters, moments and gradient accumulation are fp32 in each of them."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Format of parameters and activations in the forward and backward pass."""

    initial_loss_scale_log2: int = Field(16, ge=0, le=32)
    """fp16 only: the first loss scale is 2 to this power; it halves at an overflow."""

    loss_scale_window_steps: int = Field(1000, ge=1)
    """fp16 only: steps without overflow after which the loss scale doubles."""

    fp8_linear: bool = False
    """Compute the products of the linear layers in 8 bits, with a scale for each tensor: e4m3 forward, e5m2 for
    gradients (Micikevicius et al. 2022, arXiv 2209.05433). bf16 runs on Hopper and newer GPUs only. Off by default: it
    changes the numbers."""

    @model_validator(mode="after")
    def check_fp8(self) -> Self:
        """Refuses 8-bit products whose results would not be bf16."""
        if self.fp8_linear and self.dtype != "bf16":
            raise ValueError(
                f"precision.fp8_linear with precision.dtype = {self.dtype}: the 8-bit products give bf16 results; use"
                " dtype: bf16, or fp8_linear: false"
            )
        return self


class ParallelConfig(Section):
    """How the run is laid out over ranks. dp follows: world_size / (pp x cp x tp)."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What the dp x cp ranks share out among themselves: 0 nothing, 1 optimizer state, 2 also gradients, 3 also
    parameters (ZeRO, arXiv 1910.02054, section 5). 1, the default, moves no more bytes than 0 and goes with all."""

    tp: int = Field(1, ge=1)
    """Tensor-parallel ranks that share each layer; 1, the default, shares none. They talk in every layer, so keep them
    within one machine (Shoeybi et al. 2019, arXiv 1909.08053, section 3)."""

    pp: int = Field(1, ge=1)
    """Pipeline-parallel ranks that share the list of layers; 1, the default, is no pipeline. They talk least of all
    axes, and idle at both ends of a step."""

    cp: int = Field(1, ge=1)
    """Context-parallel ranks that share the positions of each row; 1, the default, shares none. For sequences whose
    activations don't fit."""

    ep: int = Field(1, ge=1)
    """Expert-parallel ranks that share out the experts of each layer, among the dp x cp ranks that otherwise hold the
    same weights; 1, the default, shares none. Two all-to-alls a layer take tokens to their experts and back (Lepikhin
    et al. 2020, GShard, arXiv 2006.16668, section 3.2). ep divides dp x cp and the number of experts."""

    sequence_parallel: bool | None = None
    """Whether tp ranks also share the positions of norms, dropout and the residual stream (Korthikanti et al. 2022,
    arXiv 2205.05198, section 4.2.2). Empty: yes when tp > 1, since it saves memory and moves as many bytes."""

    context_attention: Literal["ring", "ulysses"] = "ring"
    """How attention crosses the cp ranks. `ring`: keys and values travel round while others compute (Liu et al. 2023,
    arXiv 2310.01889); the default, since any number of heads will do. `ulysses`: an all-to-all changes positions for
    heads and back (Jacobs et al. 2023, arXiv 2309.14509); fewer messages, needs cp to divide the heads of a rank."""

    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zero_bubble_v", "dualpipe_v"] = "1f1b"
    """Order in which pipeline stages run their micro-batches. `1f1b`, the default, holds at most pp of them and works
    with everything; `interleaved_1f1b` idles less for more messages (Narayanan et al. 2021, arXiv 2104.04473, section
    2.2); the others fill idle time with weight gradients (Qi et al. 2023, arXiv 2401.10241). No effect at pp 1."""

    virtual_stages: int | None = Field(None, ge=1)
    """Pipeline stages of each rank. Empty: 1 for gpipe and 1f1b, 2 for the others, the least that they gain from."""

    stage_layers: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)] | None = None
    """Transformer blocks of each pipeline stage, first stage first. Empty: balanced by cost, with the embedding and
    the head counted."""

    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where masters and moments live and are updated: `cpu` keeps them in the memory of the CPU. `none`, the default:
    on the device, which is fastest. `nvme` is refused, with the reason."""

    @property
    def is_sequence_parallel(self) -> bool:
        """`sequence_parallel`, resolved."""
        return self.tp > 1 and self.sequence_parallel is not False

    @property
    def stages_per_rank(self) -> int:
        """`virtual_stages`, resolved; 1 without a pipeline."""
        return (self.virtual_stages or SCHEDULES[self.schedule].stages_per_rank) if self.pp > 1 else 1

    @property
    def num_stages(self) -> int:
        """Pipeline stages of one replica."""
        return self.pp * self.stages_per_rank

    @model_validator(mode="after")
    def check_stages(self) -> Self:
        """Refuses more or fewer stages per rank than the schedule can drive."""
        rules = SCHEDULES[self.schedule]
        least, most = rules.min_stages_per_rank, rules.max_stages_per_rank
        if self.virtual_stages is None or least <= self.virtual_stages <= (most or self.virtual_stages):
            return self
        legal = f"{least} or more" if most is None else f"exactly {least}"
        others = [
            name for name, other in SCHEDULES.items()
            if other.min_stages_per_rank <= self.virtual_stages <= (other.max_stages_per_rank or self.virtual_stages)
        ]
        raise ValueError(
            f"parallel.virtual_stages = {self.virtual_stages}: schedule {self.schedule} drives {legal} on each rank;"
            f" leave it out, or use schedule {' or '.join(others)}"
        )

    @model_validator(mode="after")
    def check_offload(self) -> Self:
        """Refuses a disk: nothing that this format could save would be in memory."""
        if self.offload_optimizer == "nvme":
            raise ValueError(
                "parallel.offload_optimizer = nvme: DeepSpeed then keeps masters and moments in swap files of its own,"
                " from which a checkpoint in global coordinates can't be written; use offload_optimizer: cpu, which"
                " needs 16 bytes of CPU memory for each parameter of a rank's share, or more ranks to share"
            )
        return self


class EvaluateConfig(Section):
    """The validation passes during training."""

    interval_steps: int = Field(ge=1)
    """Steps between two validation passes; there is one more at the end of the run."""

    max_rows: int | None = Field(None, ge=1)
    """Rows of each corpus's validation split to read, the same ones each time; all of them when not given."""
