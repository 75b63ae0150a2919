"""What the training loop and the checkpoint see of an engine: settings, two values and one protocol."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from megascale.parallel.boxes import Box

Objective = Callable[[object, int, torch.Tensor | None], tuple]
"""(micro-batch, step, loss factor) -> what the model is called with: (inputs, context, labels) of this rank, on its
device. The factor is what the loss is multiplied by before its backward pass, an fp32 scalar; None without one.

The model then gives the sum of negative log-likelihoods over those labels, in nats, fp32 scalar. Engines look no
further into it than this: in a pipeline the first entry gives way to the hidden state received.
"""


@dataclass(frozen=True)
class PipelineSettings:
    """This rank's part in a pipeline.

    Attributes:
        stage_indices: numbers of the stages of this rank, in the order of the model's `stages`.
        num_stages: of all ranks of the pipeline.
        schedule: see `ParallelConfig.schedule`.
        hidden_shape: of the hidden state of a micro-batch on this rank.
    """

    stage_indices: tuple[int, ...]
    num_stages: int
    schedule: str
    hidden_shape: tuple[int, ...]


@dataclass(frozen=True)
class EngineSettings:
    """What an engine has to know of the config.

    Attributes:
        zero_stage: what the ranks along dp and cp share out: 0 nothing, 1 optimizer state, 2 also gradients, 3 also
            parameters.
        clip_norm: largest L2 norm of the whole gradient, 0 for none.
        micro_batch_size: rows of a micro-batch on one replica.
        pipeline: None for a model that is whole on this rank and its tp and cp peers.
        offload_optimizer: where masters, moments and the update live besides the device.
    """

    zero_stage: int
    clip_norm: float
    micro_batch_size: int
    pipeline: PipelineSettings | None = None
    offload_optimizer: Literal["none", "cpu"] = "none"


@dataclass(frozen=True)
class StatePiece:
    """A part of the training state that lives on this rank.

    The same pieces serve saving (read `tensor`) and loading (write into `tensor`), in any layout.

    Attributes:
        key: kind and global parameter name, such as `master/blocks.0.attention.qkv.weight` or `exp_avg/head.weight`.
        global_shape: shape of the whole tensor in the unsharded model.
        box: the part of the global tensor that this piece covers.
        tensor: live memory of the piece: 1-D, contiguous, fp32, `box.numel` long, row-major within the box.
        is_owner: whether this rank writes the piece to a checkpoint. Over all ranks the owned boxes of a key tile the
            global tensor: every element is written once.
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    is_owner: bool


@dataclass(frozen=True)
class StepOutput:
    """What one optimizer step reports, equal on every rank but for `compute_s`.

    Attributes:
        loss: mean negative log-likelihood per label token over the global batch, in nats.
        grad_norm: L2 norm of the whole gradient before clipping; infinite where it isn't finite.
        num_tokens: label tokens in the global batch (padding excluded).
        loss_scale: the fp16 loss scale that the step used, 1.0 in other precisions.
        is_skipped: whether the parameters were left as they were, because a value wasn't finite.
        is_overflow: whether it was skipped for an fp16 overflow that a lower loss scale may cure.
        faults: what wasn't finite and on which rank, such as `rank 1: gradient of head.weight`.
        compute_s: how long this rank took to its gradients, before it waited for another replica: a slow machine shows
            here, where all else of a step is as slow on every rank. 0 when that isn't known.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    loss_scale: float = 1.0
    is_skipped: bool = False
    is_overflow: bool = False
    faults: tuple[str, ...] = ()
    compute_s: float = field(default=0.0, compare=False)


class Watcher(Protocol):
    """Training state beside weights and moments: moved after each step, saved with them, told of in the log."""

    def after_step(self, output: StepOutput) -> None:
        """Takes note of a step. Every rank calls it."""

    def state_pieces(self) -> Iterator[StatePiece]:
        """What of it lives on this rank."""

    def figures(self) -> dict[str, float]:
        """What it measured since it was last asked, equal on every rank, which all call it."""


class Engine(Protocol):
    """Runs forward, backward and the sharded update; the only object that changes parameters."""

    @abstractmethod
    def train_step(self, micro_batches: Sequence, *, step: int, num_tokens: int, learning_rate: float) -> StepOutput:
        """Runs one optimizer step over this replica's micro-batches, of which each step may have another number.

        Args:
            micro_batches: as many on every replica.
            step: number of the step, from 0; dropout is a function of it.
            num_tokens: label tokens of the global batch, by which the loss is divided.
        """

    @abstractmethod
    def evaluate(self, batches: Sequence) -> float:
        """This rank's share of the batches' sum of negative log-likelihoods in nats, without dropout.

        The shares of all ranks add up to the sum over all replicas' batches: ranks whose peers hold the same loss, or
        that hold none, give 0.0. Every rank calls it with as many batches as its peers.
        """

    @abstractmethod
    def state_pieces(self) -> Iterator[StatePiece]:
        """The fp32 master weights and what the optimizer keeps of them, as far as it lives on this rank."""

    @abstractmethod
    def swap_average(self) -> None:
        """Lets the weights and their moving average change places: called once before an evaluation and once after."""

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """The scalar part of the optimizer's state: its step count and, in fp16, the loss scaler's values."""

    @abstractmethod
    def restore_scalars(self, scalars: dict[str, float]) -> None:
        """Puts back what `scalars` gave, and refreshes the parameters from the loaded master weights."""

    def figures(self) -> dict[str, float]:
        """What is to be logged of the model besides, over the steps since it was last asked. Every rank calls it."""
        return {}
