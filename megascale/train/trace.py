"""Records what an engine computes, phase by phase, in terms of the whole model: the same words in any layout.

Shapes: B rows, T positions of the residual stream on this rank, D d_model.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from megascale.data.batch import Batch
from megascale.engine.base import Engine, Objective, StatePiece, StepOutput
from megascale.engine.taps import call_before_update, change_objective, stages_of
from megascale.model.context import Context
from megascale.model.dropout import derive_row_keys, mix_64, random_bits
from megascale.model.seeds import derive_seed
from megascale.parallel.mesh import Mesh
from megascale.train.trace_files import Digest, Names, StepFacts, TraceFolder

NUM_SKETCHES = 16
"""Signs per number; the estimate of a difference's norm is then good to about 1 / sqrt(2 x 16) = 18 %."""
BITS_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class ForwardDigests:
    """Digests of the outputs of this rank's layers, added up over the micro-batches of a step.

    Args:
        counts: whether this rank's outputs count; of ranks that hold the same ones, one does.
    """

    def __init__(self, counts: bool):
        self.counts = counts
        self.sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def add(self, name: str, hidden_BTD: torch.Tensor, context: Context) -> None:
        """Adds a micro-batch's output of a layer.

        Cost: some 70 elementwise passes in float64 and int64, one row at a time.
        """
        if not self.counts:
            return
        site_key = torch.tensor(derive_seed("parity", name), device=hidden_BTD.device)
        numbers = torch.zeros(NUM_SKETCHES + 1, dtype=torch.float64, device=hidden_BTD.device)
        checksum = torch.zeros((), dtype=torch.int64, device=hidden_BTD.device)
        for row_BTD, key_B in zip(hidden_BTD.split(1), context.row_keys_B.split(1), strict=True):
            signs_BTD = random_bits(key_B, context.columns_T, row_BTD.shape[-1], site_key)
            exact_BTD = row_BTD.double()
            for bit in range(NUM_SKETCHES):
                numbers[bit] += torch.where((signs_BTD >> bit) & 1 == 1, exact_BTD, -exact_BTD).sum()
            numbers[NUM_SKETCHES] += exact_BTD.square().sum()
            values_BTD = (row_BTD + 0.0).contiguous().view(BITS_OF[row_BTD.dtype])  # both zeros are one number
            checksum += mix_64(values_BTD.long() + (signs_BTD.long() << 32)).sum()
        before = self.sums.get(name)
        self.sums[name] = (numbers, checksum) if before is None else (before[0] + numbers, before[1] + checksum)

    def take(self, names: list[str], mesh: Mesh) -> dict[str, Digest]:
        """The step's digests of all ranks together, on every rank. Every rank calls it.

        Args:
            names: of all layers of the model; those that no rank has noted are left out.
        """
        numbers, checksums = [], []
        for name in names:
            own = self.sums.get(name)
            numbers += [0.0] * (NUM_SKETCHES + 1) if own is None else own[0].tolist()
            checksums += [0, 0] if own is None else [int(own[1]), 1]
        self.sums.clear()
        numbers, checksums = mesh.control_sum(numbers, dtype=torch.float64), mesh.control_sum(checksums)
        digests = {}
        for place, name in enumerate(names):
            *sketch, square_sum = numbers[place * (NUM_SKETCHES + 1) : (place + 1) * (NUM_SKETCHES + 1)]
            if checksums[2 * place + 1]:
                digests[name] = Digest(sketch, square_sum, checksums[2 * place])
        return digests


class WatchedLayer(nn.Module):
    """A layer in the place of another, which it runs and whose output it notes, under its name and with the context."""

    def __init__(self, layer: nn.Module, name: str, note: Callable[[str, torch.Tensor, Context], None]):
        super().__init__()
        self.layer, self.name, self.note = layer, name, note

    def forward(self, hidden_BTD: torch.Tensor, context: Context) -> torch.Tensor:
        output_BTD = self.layer(hidden_BTD, context)
        self.note(self.name, output_BTD.detach(), context)
        return output_BTD


class TraceRecorder:
    """Hangs itself onto an engine and writes what it computes to a trace. Every rank makes one.

    Args:
        layer_names: names of the layers of each of this rank's stages.
        names: of the whole model.
        is_sequence_parallel: whether tp ranks hold different positions of the residual stream.
        seed: the run's.
        leader: a trace of the same run whose state after each step takes the place of this one's, so that rounding in
            one step isn't carried over to the next; None goes on from its own.
    """

    def __init__(
        self, engine: Engine, mesh: Mesh, folder: TraceFolder, layer_names: list[list[str]], names: Names,
        is_sequence_parallel: bool, seed: int, leader: TraceFolder | None,
    ):
        self.engine, self.mesh, self.folder, self.names, self.leader = engine, mesh, folder, names, leader
        self.step = 1
        self.digests = ForwardDigests(counts=is_sequence_parallel or mesh.tp.rank == 0)
        for stage, own_names in zip(stages_of(engine), layer_names, strict=True):
            for place, layer in enumerate(stage.layers):
                stage.layers[place] = WatchedLayer(layer, own_names[place], self.digests.add)
        change_objective(engine, lambda objective: with_row_keys(objective, seed))
        call_before_update(engine, self._write_tensors)
        if mesh.rank == 0:
            folder.write_names(names)
        masters = (piece for piece in engine.state_pieces() if piece.key.startswith("master/"))
        self._write_tensors(masters, kind="start")

    def finish_step(self, output: StepOutput, learning_rate: float) -> None:
        """Writes the rest of the step that the engine has just taken, and goes on to the next one."""
        self._write_tensors(self.engine.state_pieces())
        forward = self.digests.take(self.names.layers, self.mesh)
        if self.mesh.rank == 0:
            updates = int(self.engine.scalars()["step"])
            self.folder.write_facts(
                self.step, StepFacts(output.loss, output.grad_norm, learning_rate, updates, forward)
            )
        if self.leader is not None:
            self._follow(self.leader)
        self.mesh.barrier()
        self.step += 1

    def _write_tensors(self, pieces: Iterator[StatePiece], kind: str | None = None) -> None:
        """Whoever owns a tensor's first element makes its file, then each rank writes what it owns.

        Args:
            kind: what the tensors are, where their keys don't say.

        Cost: 4 bytes of disk for each element of the whole tensors.
        """
        own = [(*piece.key.split("/", 1), piece) for piece in pieces if piece.is_owner]
        for own_kind, name, piece in own:
            if not any(piece.box.starts):
                self.folder.create_tensor(self.step, kind or own_kind, name, piece.global_shape)
        self.mesh.barrier()
        for own_kind, name, piece in own:
            values = piece.tensor.detach().cpu().numpy().reshape(piece.box.shape)
            self.folder.write_box(self.step, kind or own_kind, name, piece.box.slices, values)

    @torch.no_grad()
    def _follow(self, leader: TraceFolder) -> None:
        """Takes over the leader's masters and moments after this step, as if from a checkpoint."""
        for piece in self.engine.state_pieces():
            whole = leader.read_tensor(self.step, *piece.key.split("/", 1))
            piece.tensor.copy_(torch.from_numpy(whole[piece.box.slices].flatten()))
        self.engine.restore_scalars(self.engine.scalars())


def with_row_keys(objective: Objective, seed: int) -> Objective:
    """The objective with a context that always tells rows apart; a model without dropout ignores the keys."""

    def prepare(batch: Batch, step: int, loss_factor: torch.Tensor | None) -> tuple:
        inputs, context, labels = objective(batch, step, loss_factor)
        if context.row_keys_B is None:
            context = context._replace(row_keys_B=derive_row_keys(batch.row_numbers_B, seed, step))
        return inputs, context, labels

    return prepare
