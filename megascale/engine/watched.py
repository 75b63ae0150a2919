"""An engine with training state of its own kind beside it, such as what balances experts."""

from collections.abc import Iterator, Sequence
from itertools import chain

from megascale.engine.base import Engine, StatePiece, StepOutput, Watcher


class WatchedEngine(Engine):
    """Tells watchers of each step, and gives their state with the engine's."""

    def __init__(self, engine: Engine, watchers: Sequence[Watcher]):
        self.engine, self.watchers = engine, watchers

    def train_step(self, micro_batches: Sequence, *, step: int, num_tokens: int, learning_rate: float) -> StepOutput:
        output = self.engine.train_step(micro_batches, step=step, num_tokens=num_tokens, learning_rate=learning_rate)
        for watcher in self.watchers:
            watcher.after_step(output)
        return output

    def evaluate(self, batches: Sequence) -> float:
        return self.engine.evaluate(batches)

    def state_pieces(self) -> Iterator[StatePiece]:
        return chain(self.engine.state_pieces(), *(watcher.state_pieces() for watcher in self.watchers))

    def swap_average(self) -> None:
        self.engine.swap_average()

    def scalars(self) -> dict[str, float]:
        return self.engine.scalars()

    def restore_scalars(self, scalars: dict[str, float]) -> None:
        self.engine.restore_scalars(scalars)

    def figures(self) -> dict[str, float]:
        return {name: value for watcher in self.watchers for name, value in watcher.figures().items()}
