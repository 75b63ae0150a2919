"""The layouts that the byte and memory benches measure, and an engine for each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from megascale.config.derive import Derived, derive
from megascale.config.load import parse_config
from megascale.config.schema import RunConfig
from megascale.model.rank_share import RankShare
from megascale.parallel.layout import Layout


@dataclass(frozen=True)
class LayoutCase:
    """One layout of one model.

    Attributes:
        ranks: number of ranks.
        model: the config's section.
        rows, seq_len: of one step over all replicas.
        parallel, train, precision: what the config's sections say beside the defaults.
        block: the one to look at, in the order of the layers.
    """

    name: str
    ranks: int
    model: dict
    rows: int
    seq_len: int
    parallel: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    dtype: str = "fp32"
    block: int = 0

    def config(self) -> RunConfig:
        """The run config."""
        return parse_config({
            "run": {"name": "bench", "folder": "unused", "seed": 1},
            "model": self.model,
            "data": {"folder": "unused", "packing": "none"},
            "train": {
                "seq_len": self.seq_len, "micro_batch_size": 2, "global_batch_tokens": self.rows * self.seq_len,
                "max_steps": 10,
            } | self.train,
            "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
            "precision": {"dtype": self.dtype},
            "parallel": self.parallel,
            "evaluate": {"interval_steps": 1000},
            "checkpoint": {"interval_steps": 1000},
        }, source=self.name)

    def derived(self) -> Derived:
        """What follows from the config."""
        return derive(self.config(), self.ranks, self.name)

    def layout(self) -> Layout:
        """The sizes of the axes."""
        return self.share(0).layout

    def share(self, rank: int) -> RankShare:
        """What a rank has of the model."""
        return RankShare(self.config(), self.derived(), rank)


def by_name(cases: Sequence[LayoutCase]) -> dict[str, LayoutCase]:
    """The cases under their names."""
    return {case.name: case for case in cases}
