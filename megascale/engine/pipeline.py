"""Runs the stages of a pipeline rank: torch's schedules for training, a loop of its own for forward passes alone.

Only the hidden state travels between ranks, and its gradient back. Tokens, labels and the context are prepared by each
rank itself: the ranks of a replica read the same rows.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining import stage as torch_stage

from megascale.config.schedules import SCHEDULES
from megascale.engine.base import Objective
from megascale.parallel.axis import Axis
from megascale.parallel.deferred import WeightGradients
from megascale.parallel.stages import forward_order, rank_of_stage

SCHEDULE_CLASSES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zero_bubble_v": schedules.ScheduleZBVZeroBubble,
    "dualpipe_v": schedules.ScheduleDualPipeV,
}
HAS_LEAN_BUFFERS = hasattr(torch_stage, "TensorMeta")
"""Whether this torch describes messages apart from their memory, as 2.13 does and 2.11 doesn't."""
MAX_SENDS_UNDER_WAY = 2
"""Of forward passes alone: a rank that is faster than the next one waits, so that memory stays bounded."""


@dataclass(frozen=True)
class PipelinePlace:
    """Where a rank stands in its pipeline.

    Attributes:
        pp: the pipeline's ranks.
        schedule: as in the config.
        num_stages: of all ranks.
    """

    pp: Axis
    schedule: str
    num_stages: int

    @property
    def last(self) -> int:
        """Number of the last stage."""
        return self.num_stages - 1

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that runs a stage."""
        return rank_of_stage(self.schedule, self.pp.size, stage)


class Feed:
    """The micro-batches of a step: each is prepared once, when the first stage of this rank asks for it.

    It is dropped when the last one has it: what backward passes need of it is in the graph.

    Args:
        num_uses: stages of this rank.
    """

    def __init__(self, objective: Objective, device: torch.device, num_uses: int):
        self.objective, self.device, self.num_uses = objective, device, num_uses
        self.micro_batches: Sequence = ()
        self.step = 0
        self.factor: torch.Tensor | None = None
        self.ready: dict[int, tuple[tuple, int]] = {}

    def start(self, micro_batches: Sequence, step: int, scale: float | None = None) -> None:
        """Takes the micro-batches of a step, and the scale of its gradients where it has any."""
        self.factor = None if scale is None else torch.full((), scale, device=self.device)
        self.micro_batches, self.step = [each.to(self.device) for each in micro_batches], step
        self.ready.clear()

    def take(self, index: int) -> tuple:
        """What the stages are called with for a micro-batch: (inputs, context, labels)."""
        fresh = (None, self.num_uses)
        prepared, uses_left = self.ready.pop(index, fresh)
        if prepared is None:
            prepared = self.objective(self.micro_batches[index], self.step, self.factor)
        if uses_left > 1:
            self.ready[index] = prepared, uses_left - 1
        return prepared


class FedStage(nn.Module):
    """A stage as torch's schedules call it: hidden state in, hidden state out; the rest comes from the feed."""

    def __init__(self, stage: nn.Module, feed: Feed, is_first: bool):
        super().__init__()
        self.stage, self.feed, self.is_first = stage, feed, is_first

    def forward(self, hidden: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden: what the stage before gave; the first stage takes its inputs from the feed and ignores it.
            index: number of the micro-batch, one int64 on the CPU.
        """
        inputs, context, labels = self.feed.take(int(index))
        return self.stage(inputs if self.is_first else hidden, context, labels)


class LeanStage(PipelineStage):
    """A stage that has memory for a message only from its start to its use.

    Torch's keeps a buffer for every micro-batch of a step, both ways, for good. This matters where micro-batches are
    many: 1F1B has at most p of them under way.
    """

    def _prepare_forward_infra(self, *args, **kwargs):
        result = super()._prepare_forward_infra(*args, **kwargs)
        drop_buffers(self.args_recv_info)
        return result

    def _prepare_backward_infra(self, *args, **kwargs):
        result = super()._prepare_backward_infra(*args, **kwargs)
        drop_buffers(self.grad_recv_info)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_first:
            self._make_buffers(self.args_recv_info[fwd_chunk_id])
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._make_buffers(self.grad_recv_info[bwd_chunk_id])
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        drop_buffers({fwd_chunk_id: self.args_recv_info[fwd_chunk_id]})
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        drop_buffers({bwd_chunk_id: self.grad_recv_info[bwd_chunk_id]})

    def _make_buffers(self, infos) -> None:
        for info in infos:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=self.device)


def drop_buffers(infos_of: dict) -> None:
    """Lets go of the memory for the messages of some micro-batches."""
    for infos in infos_of.values():
        for info in infos:
            info.buffer = None


class LossTally:
    """The loss function of a schedule: adds up the losses of a step as they are, and scales them for their gradients.

    Attributes:
        scale: of the gradients.
        total: of the losses so far, fp32 scalar.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.start(1.0)

    def start(self, scale: float) -> None:
        """Begins a step."""
        self.scale, self.total = scale, torch.zeros((), device=self.device)

    def __call__(self, nll_sum: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """A loss that isn't finite makes its gradient so too (inf x 0 = NaN)."""
        self.total += nll_sum.detach()
        return nll_sum * (self.scale * (1.0 + 0.0 * nll_sum.detach()))


class PipelineRunner:
    """Forward and backward of micro-batches through a pipeline, the counterpart of `MicroBatchRunner`.

    Args:
        stages: this rank's, by number.
        build_schedule: torch's schedule of so many micro-batches over the same stages; its loss function is `tally`.
        hidden: a tensor on the meta device, like the hidden state of a micro-batch on this rank.
    """

    def __init__(
        self,
        place: PipelinePlace,
        stages: dict[int, FedStage],
        feed: Feed,
        tally: LossTally,
        build_schedule: Callable[[int], schedules._PipelineSchedule],
        hidden: torch.Tensor,
    ):
        self.place, self.stages, self.feed, self.tally = place, stages, feed, tally
        self.schedule_of = lru_cache(1)(build_schedule)  # the batch grows seldom, and never falls back
        self.hidden = hidden

    def run(self, micro_batches: Sequence, step: int, scale: float) -> torch.Tensor:
        """Accumulates the gradient of `scale` x (sum of losses) over micro-batches, as many on each rank.

        Returns:
            Sum of negative log-likelihoods in nats, fp32 scalar on the device; zero where the last stage isn't.

        Cost: each stage but the last sends a hidden state per micro-batch, each but the first its gradient: bytes of a
            hidden state x 2 x micro-batches x (stages - 1) over all ranks, less where two stages meet on one rank.
        """
        self.feed.start(micro_batches, step, scale)
        self.tally.start(scale)
        indices = torch.arange(len(micro_batches))
        first = (indices,) if 0 in self.stages else ()
        target = indices if self.place.last in self.stages else None
        self.schedule_of(len(micro_batches)).step(*first, index=indices, target=target, return_outputs=False)
        return self.tally.total

    def evaluate(self, batches: Sequence) -> float:
        """The sum of losses over whole batches, as large as micro-batches, without gradients and dropout."""
        total = self.totals(batches)
        return 0.0 if total is None else total.item()

    @torch.no_grad()
    def totals(self, batches: Sequence) -> torch.Tensor | None:
        """The same as a tensor, fp64, of the shape that the last stage gives; None where the last stage isn't."""
        self.feed.start(batches, step=0)
        for stage in self.stages.values():
            stage.eval()
        indices = torch.arange(len(batches))
        losses = self._forward(
            lambda stage, hidden, index: stage(hidden, indices[index]), len(batches), self.hidden.shape
        )
        for stage in self.stages.values():
            stage.train()
        return torch.stack(losses).double().sum(dim=0) if losses else None

    @torch.no_grad()
    def logits(
        self, inputs: torch.Tensor, context: object, last_B: torch.Tensor, hidden_shape: Sequence[int], vocab_size: int
    ) -> torch.Tensor:
        """Logits of position `last_B` of each row, on every rank of the pipeline; all of them call it.

        Shape: inputs (B, T) int64 and `last_B` (B) int64 to (B, vocab_size).
        Cost: beside the hidden states, a broadcast of the logits.
        """

        def run(stage: FedStage, hidden: torch.Tensor | None, _: int) -> torch.Tensor:
            return stage.stage(inputs if stage.is_first else hidden, context, None, last_B)

        found = self._forward(run, 1, hidden_shape)
        (logits_BV,) = found or [torch.empty(len(last_B), vocab_size, dtype=self.hidden.dtype, device=last_B.device)]
        logits_BV = logits_BV.contiguous()
        dist.broadcast(logits_BV, group=self.place.pp.group, group_src=self.place.rank_of(self.place.last))
        return logits_BV

    def _forward(
        self,
        run: Callable[[FedStage, torch.Tensor | None, int], torch.Tensor],
        num_micro_batches: int,
        hidden_shape: Sequence[int],
    ) -> list[torch.Tensor]:
        """Takes this rank's part of `forward_order`; gives the outputs of the last stage, on its rank alone."""
        place, pp = self.place, self.place.pp
        received: dict[tuple[int, int], tuple[torch.Tensor | None, Callable[[], object] | None]] = {}
        sends: deque[Callable[[], object]] = deque()
        outputs = []
        order = forward_order(place.schedule, pp.size, len(self.stages), num_micro_batches)
        for stage, index in order:
            if stage in self.stages:
                hidden, wait = received.pop((stage, index), (None, None))
                if wait is not None:
                    wait()
                output = run(self.stages[stage], hidden, index)
                if stage == place.last:
                    outputs.append(output)
                elif stage + 1 in self.stages:
                    received[stage + 1, index] = output, None
                else:
                    next_rank = place.rank_of(stage + 1)
                    sends.append(dist.isend(output.contiguous(), group=pp.group, group_dst=next_rank).wait)
                    if len(sends) > MAX_SENDS_UNDER_WAY:
                        sends.popleft()()
            elif stage + 1 in self.stages:
                hidden = torch.empty(tuple(hidden_shape), dtype=self.hidden.dtype, device=self.feed.device)
                wait = dist.irecv(hidden, group=pp.group, group_src=place.rank_of(stage)).wait
                received[stage + 1, index] = hidden, wait
        for wait in sends:
            wait()
        return outputs


def build_pipeline(
    stages: Sequence[nn.Module],
    stage_indices: Sequence[int],
    num_stages: int,
    schedule: str,
    hidden_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    pp: Axis,
    objective: Objective,
    add_gradient: Callable[[torch.Tensor, torch.Tensor], None],
) -> PipelineRunner:
    """A runner of this rank's stages. Every rank of the pipeline calls it.

    Args:
        stages: called as `stage(inputs, context, labels, last_B)`, in the order of `stage_indices`.
        hidden_shape: of the hidden state of a micro-batch on this rank, the same on all ranks of the pipeline.
        add_gradient: adds a weight gradient that came late to a parameter's main gradient. Of use in schedules that put
            them off: layers with an attribute `deferred` get a queue there.
    """
    place = PipelinePlace(pp, schedule, num_stages)
    feed, tally = Feed(objective, device, len(stages)), LossTally(device)
    fed = {index: FedStage(stage, feed, index == 0) for index, stage in zip(stage_indices, stages, strict=True)}
    deferred = WeightGradients(add_gradient) if SCHEDULES[schedule].defers_weights else None
    if deferred is not None:
        for layer in (layer for stage in stages for layer in stage.modules() if hasattr(layer, "deferred")):
            layer.deferred = deferred
    hidden = torch.empty(hidden_shape, dtype=dtype, device="meta", requires_grad=True)
    index, loss = torch.empty(1, dtype=torch.int64, device="meta"), torch.empty((), device="meta", requires_grad=True)
    stage_class = LeanStage if HAS_LEAN_BUFFERS else PipelineStage

    def build_schedule(num_micro_batches: int) -> schedules._PipelineSchedule:
        lean = [
            stage_class(
                stage, number, num_stages, device,
                input_args=index if number == 0 else hidden,
                output_args=loss if number == place.last else hidden,
                group=pp.group,
                dw_builder=None if deferred is None else deferred.pop,
            )
            for number, stage in fed.items()
        ]
        has_one_stage = SCHEDULES[schedule].max_stages_per_rank == 1
        return SCHEDULE_CLASSES[schedule](
            lean[0] if has_one_stage else lean, num_micro_batches, loss_fn=tally, scale_grads=False
        )

    return PipelineRunner(place, fed, feed, tally, build_schedule, hidden)


def build_forward_pipeline(
    stage: nn.Module, d_model: int, dtype: torch.dtype, device: torch.device, pp: Axis
) -> PipelineRunner:
    """A runner for `logits` alone, with one stage a rank: nothing is fed to it and nothing is trained."""

    def refuse(*_) -> tuple:
        raise ValueError("this pipeline has no objective: it can be asked for logits alone")

    return build_pipeline([stage], [pp.rank], pp.size, "gpipe", (1, 1, d_model), dtype, device, pp, refuse, refuse)
