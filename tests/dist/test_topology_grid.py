"""A checkpoint of any layout is the same state in any other: one state, saved by each layout and loaded by each.

Digests and all bits of masters and moments are equal, whoever saved and whoever loads, in fp32 and bf16. What a layout
computes next is, to the bit, independent of which layout saved; and in fp32 within the parity tolerance of what the run
computes that never stopped.

CI takes each layout as source and as target, `make soak` all pairs. Mutation seen to be caught: a digest that takes an
element's place within its box for that in the tensor.
"""

import json
from itertools import chain
from pathlib import Path

import pytest

from megascale.checkpoint.find import read_stored_index
from megascale.checkpoint.local_store import LocalStore
from tests.dist.parity_table import TOLERANCE
from tests.dist.programs.topology_grid import GRID, HALF, REFERENCE
from tests.support.ranks import run_ranks
from tests.support.tiny import gap

MODULE = "tests.dist.programs.topology_grid"
SAME_MATHS = [("dp2_zero1", "dp2_zero2_offload"), ("dp2_zero1", "dp2_zero3"), ("pp2", "pp2_interleaved")]
"""Layouts that differ only in who keeps what: the next loss is equal to the bit. Those after it are not quite where
gradients are clipped: their norm is a sum over the shards."""


def launch(folder: Path, ranks: int, *, reference: bool = False, relays=(), loads=None) -> list[dict]:
    plan = {"reference": reference, "relays": relays, "loads": loads or {}}
    seconds = 100 + 3 * sum(map(len, plan["loads"].values()))
    output = run_ranks(MODULE, ranks, [str(folder), json.dumps(plan)], folder, timeout_s=seconds)[0]
    return [json.loads(line) for line in output.splitlines()]


def run_pairs(folder: Path, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], dict]:
    """Each (source, target) and its result; sources are saved first, each from the reference."""
    saved, results, left = set(), [], list(pairs)

    def loads_now(ranks: int) -> dict[str, list[str]]:
        now = [pair for pair in left if pair[0] in saved and GRID[pair[1]].ranks == ranks]
        left[:] = [pair for pair in left if pair not in now]
        return {target: [a for a, b in now if b == target] for _, target in now}

    for ranks in (1, 2, 4):
        relays = [name for name in GRID if GRID[name].ranks == ranks]
        saved.update(relays)
        results += launch(folder, ranks, reference=ranks == 1, relays=relays, loads=loads_now(ranks))
    for ranks in (2, 1):
        if loads := loads_now(ranks):  # from more ranks to fewer
            results += launch(folder, ranks, loads=loads)
    found = {(result["source"], result["target"]): result for result in results}
    assert found.keys() == set(pairs)
    return found


def check_digests(folder: Path) -> None:
    """Each layout's index has the digests of the reference, of every tensor."""
    indexes = {name: read_stored_index(LocalStore(folder / name), HALF) for name in (REFERENCE, *GRID)}
    digests = {
        name: {key: record.digest for key, record in index.tensors.items()} for name, index in indexes.items()
    }
    assert len({record.digest for record in indexes[REFERENCE].tensors.values()}) == len(digests[REFERENCE])
    assert [name for name in GRID if digests[name] != digests[REFERENCE]] == []
    scalars = {name: index.state.optimizer_scalars for name, index in indexes.items()}
    assert [name for name in GRID if scalars[name] != {"step": HALF}] == []


def check_pairs(folder: Path, results: dict[tuple[str, str], dict]) -> None:
    reference, next_of = json.loads((folder / "next.json").read_text()), {}
    for (source, target), result in results.items():
        assert result["same_bits"], result
        assert result["scalars"] == {"step": HALF}
        assert result["next"] == next_of.setdefault(target, result["next"]), f"{source} continues otherwise: {result}"
        width = GRID[source].parallel.get("tp", 1) * GRID[target].parallel.get("tp", 1)
        for read, held in zip(result["read_bytes"], result["held_bytes"], strict=True):
            assert 0 < read <= width * held, result
    for target, found in next_of.items():
        if "bf16" not in target:
            gaps = [gap(a, b) for a, b in zip(chain(*reference), chain(*found), strict=True)]
            assert max(gaps) <= TOLERANCE, (target, gaps)
    for one, other in SAME_MATHS:
        assert next_of[one][0][0] == next_of[other][0][0], (one, other)
    assert next_of["dp1_zero0"] == reference


def test_each_layout_as_source_and_target(tmp_path):
    names = list(GRID)
    results = run_pairs(tmp_path, [(names[i - 1], names[i]) for i in range(len(names))])
    check_digests(tmp_path)
    check_pairs(tmp_path, results)


@pytest.mark.slow
def test_every_pair_of_layouts(tmp_path):
    results = run_pairs(tmp_path, [(source, target) for source in GRID for target in GRID])
    check_digests(tmp_path)
    check_pairs(tmp_path, results)
