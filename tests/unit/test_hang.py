"""Whether a run hangs and for whom it waits, from made-up heartbeats and dumps."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.supervise.hang import HangKind, RankView, find_culprit, find_hang
from launcher.supervise.hang_report import summarize_hang, write_hang_report
from launcher.supervise.rank_dumps import Dumps, describe_ranks, read_dumps
from megascale.config.cluster import LimitsConfig
from megascale.parallel.heartbeat import Beat, Phase

LIMITS = LimitsConfig()
LOCAL_PHASES = (Phase.LOG, Phase.EVALUATE, Phase.SAVE, Phase.DATA)
LIMIT_OF = {Phase.LOG: 10.0, Phase.EVALUATE: LIMITS.evaluate_s, Phase.SAVE: LIMITS.save_s, Phase.DATA: LIMITS.data_s}
COMPUTING = 'Thread 0x01 (most recent call first):\n  File "/x/megascale/model/block.py", line 9 in forward\n'
WAITING = ('Thread 0x02 (most recent call first):\n  File "/p/torch/distributed/distributed_c10d.py", line 2 in recv\n'
           '  File "/x/megascale/engine/pipeline.py", line 7 in run\n')


def view(rank: int, phase: Phase = Phase.COMPUTE, step: int = 7, silent_s: float = 0.0, *, state: str = "S",
         taken: int = 5, slowest_s: float = 0.5, stopped_s: float | None = None, node: str = "") -> RankView:
    now_s = 1000.0 + 77 * rank  # each node's clock has its own origin
    beat = Beat(phase, 40 + rank, step, now_s - silent_s, taken, slowest_s, 0.1, 56, 4)
    stopped_since_s = None if stopped_s is None else now_s - stopped_s
    return RankView(rank, node or f"node{rank}", beat, state, now_s, 0.0, stopped_since_s)


def entry(group: tuple[str, str], number: int, *, over: bool, call: str = "gloo:all_reduce", size: int = 3,
          state: str = "scheduled") -> dict:
    return {"process_group": list(group), "collective_seq_id": number, "profiling_name": call, "state": state,
            "retired": over, "is_p2p": False, "input_sizes": [[size]]}


def dump_into(folder: Path, rank: int, entries: list[dict], stack: str | None = COMPUTING) -> None:
    (folder / f"collectives_{rank:05d}.json").write_text(json.dumps({"entries": entries}))
    if stack:
        (folder / f"stacks_{rank:05d}.txt").write_text(stack)


def test_the_rearmost_rank_is_named_when_it_is_over_its_limit():
    """Mutation seen caught: the foremost position instead of the rearmost."""
    views = [view(0, Phase.AGREE, 8, 12), view(1, Phase.COMPUTE, 7, 12), view(2, Phase.AGREE, 8, 12)]
    hang = find_hang(views, LIMITS)
    assert (hang.kind, hang.ranks, hang.is_certain, hang.limit_s) == (HangKind.STEP, (1,), True, 10.0)
    assert find_hang([view(0, Phase.AGREE, 8, 12), view(1, Phase.COMPUTE, 7, 9.9)], LIMITS) is None


@pytest.mark.parametrize("phase", LOCAL_PHASES)
def test_waiting_for_slow_storage_is_excused_until_storage_breaks_its_own_limit(phase):
    """Mutation seen caught: any rank over its limit hangs, wherever the others are."""
    limit_s = LIMIT_OF[phase]
    others = [view(rank, Phase.AGREE, 7, limit_s + 50) for rank in (0, 2)]
    assert find_hang([*others, view(1, phase, 7, limit_s - 1)], LIMITS) is None
    hang = find_hang([*others, view(1, phase, 7, limit_s + 1)], LIMITS)
    assert hang.ranks == (1,)
    assert hang.phase == phase


def test_a_rank_that_has_just_left_a_slow_phase_excuses_those_that_waited_for_it():
    """Mutation seen caught: a hang as soon as any of the rearmost is late (`any` and `all` exchanged)."""
    assert find_hang([view(0, Phase.COMPUTE, 7, 200), view(1, Phase.COMPUTE, 7, 1)], LIMITS) is None


def test_limit_of_a_step_follows_the_slowest_rank_after_two_steps():
    """Mutation seen caught: the step limit of the rank itself in place of the slowest one's."""
    slow = [view(0, silent_s=30, slowest_s=1), view(1, silent_s=30, slowest_s=7)]
    assert find_hang(slow, LIMITS) is None
    assert find_hang([view(0, silent_s=36, slowest_s=1), view(1, silent_s=36, slowest_s=7)], LIMITS)
    first = [view(0, silent_s=800, taken=5), view(1, silent_s=800, taken=1)]
    assert find_hang(first, LIMITS) is None


def test_a_stopped_process_is_found_in_any_phase_and_at_any_place():
    """Mutation seen caught: `frozen_s` not asked for."""
    for phase in Phase:
        hang = find_hang([view(0, Phase.START, -1), view(3, phase, 9, state="T", stopped_s=6)], LIMITS)
        assert (hang.kind, hang.ranks) == (HangKind.STOPPED, (3,))
        assert find_hang([view(0), view(3, phase, 9, state="T", stopped_s=4)], LIMITS) is None
    assert find_hang([view(0), view(1, state="t")], LIMITS) is None


def test_joining_waits_for_ranks_that_still_start():
    starting = RankView(1, "node1", None, "R", 700.0, 150.0)
    assert find_hang([view(0, Phase.JOIN, -1, 900, taken=0), starting], LIMITS) is None
    hang = find_hang([view(0, Phase.JOIN, -1, 900, taken=0), RankView(1, "node1", None, "R", 800.0, 150.0)], LIMITS)
    assert (hang.kind, hang.ranks) == (HangKind.START, (1,))


def test_dead_ranks_are_not_asked():
    assert find_hang([view(0, silent_s=100, state="Z")], LIMITS) is None
    assert find_hang([], LIMITS) is None


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_hang_while_all_ranks_progress_within_their_limits(data):
    """Ranks in step with each other: local phases of any length within the limit, then two barriers.

    Mutation seen caught: a hang as soon as one of the rearmost is late (`any` and `all` exchanged).
    """
    ranks, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    ends, spans = [0.0] * ranks, [[] for _ in range(ranks)]
    for step in range(steps):
        for rank in range(ranks):
            for phase in LOCAL_PHASES:
                length_s = data.draw(st.floats(0, 0.99)) * LIMIT_OF[phase]
                spans[rank].append((ends[rank], ends[rank] + length_s, phase, step))
                ends[rank] += length_s
        for phase in (Phase.AGREE, Phase.COMPUTE):
            together_s = max(ends) + data.draw(st.floats(0, 9))
            for rank in range(ranks):
                spans[rank].append((ends[rank], together_s, phase, step))
            ends = [together_s] * ranks
    for now_s in sorted({end - 1e-6 for own in spans for _, end, *_ in own if end > 1e-6}):
        views = []
        for rank, own in enumerate(spans):
            began_s, _, phase, step = next(span for span in own if span[0] <= now_s < span[1])
            views.append(view(rank, phase, step, now_s - began_s, slowest_s=0))
        assert find_hang(views, LIMITS) is None, now_s


LAYOUTS = {
    "dp": {"dp": [(0, 1, 2, 3)]},
    "tp": {"tp": [(0, 1), (2, 3)], "dp": [(0, 2), (1, 3)]},
    "pp": {"pp": [(0, 1, 2, 3)]},
    "dp and pp": {"dp": [(0, 1), (2, 3)], "pp": [(0, 2), (1, 3)]},
}


@pytest.mark.parametrize("frozen", range(4))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_single_frozen_rank_is_named(layout, frozen, tmp_path):
    """The peers in its first group wait for it, the rest wait for those; gloo records no send and no receive.

    Mutations seen caught: all absent ranks blamed, not only those that wait for nobody; idle stacks not asked (pp).
    """
    groups = [((f"{axis}{number}", axis), ranks) for axis, sets in LAYOUTS[layout].items()
              for number, ranks in enumerate(sets)]
    for rank in range(4):
        own = [(group, ranks) for group, ranks in groups if rank in ranks]
        entries = [entry(group, 1, over=True) for group, _ in own if group[1] != "pp"]
        entries.append(entry(("0", "default_pg"), 1, over=True))
        stack = COMPUTING if rank == frozen else WAITING
        if rank != frozen:
            peers = next((pair for pair in own if frozen in pair[1]), own[-1])
            if peers[0][1] != "pp":
                entries.append(entry(peers[0], 2, over=False))
                stack = COMPUTING  # the recorder alone must do
        dump_into(tmp_path, rank, entries, stack)
    views = [view(rank, silent_s=20) for rank in range(4)]
    hang = find_hang(views, LIMITS)
    assert hang.ranks == (0, 1, 2, 3)
    assert not hang.is_certain
    blame = find_culprit(hang, views, read_dumps(tmp_path, 4))
    assert blame.is_known
    assert blame.ranks == (frozen,), blame


def test_a_chain_of_waits_is_followed_to_its_end(tmp_path):
    """Rank 0 waits in dp for 2, which waits in tp for 3, which waits for nobody.

    Mutation seen caught: the ranks absent from any collective blamed at once.
    """
    tp, dp = ("2", "tp"), ("3", "dp")
    dump_into(tmp_path, 0, [entry(dp, 1, over=True), entry(dp, 2, over=False)])
    dump_into(tmp_path, 2, [entry(dp, 1, over=True), entry(tp, 4, over=True), entry(tp, 5, over=False)])
    dump_into(tmp_path, 3, [entry(tp, 4, over=True)])
    views = [view(rank, silent_s=20) for rank in (0, 2, 3)]
    assert find_culprit(find_hang(views, LIMITS), views, read_dumps(tmp_path, 4)).ranks == (3,)


def test_a_wait_that_only_the_stack_shows_is_followed_too(tmp_path):
    """Rank 0 waits in dp for 2, which waits in a receive from 3; gloo doesn't record that.

    Mutation seen caught: stacks of awaited ranks not asked.
    """
    dp = ("3", "dp")
    dump_into(tmp_path, 0, [entry(dp, 1, over=True), entry(dp, 2, over=False)])
    dump_into(tmp_path, 2, [entry(dp, 1, over=True)], WAITING)
    dump_into(tmp_path, 3, [])
    views = [view(rank, silent_s=20) for rank in (0, 2, 3)]
    assert find_culprit(find_hang(views, LIMITS), views, read_dumps(tmp_path, 4)).ranks == (3,)


def test_different_collectives_at_one_place_are_a_desync(tmp_path):
    """Mutation seen caught: sizes of an all-reduce not compared; the majority named as odd."""
    group = ("0", "default_pg")
    for odd in (entry(group, 2, over=False, size=8), entry(group, 2, over=False, call="gloo:broadcast")):
        for rank in range(3):
            dump_into(tmp_path, rank, [entry(group, 1, over=True), odd if rank == 1 else entry(group, 2, over=False)])
        views = [view(rank, silent_s=20) for rank in range(3)]
        blame = find_culprit(find_hang(views, LIMITS), views, read_dumps(tmp_path, 3))
        assert (blame.kind, blame.ranks, blame.is_known) == (HangKind.DESYNC, (1,), True)
        assert "ranks 0, 2 called gloo:all_reduce [3]" in blame.reason


def test_a_collective_that_a_device_has_not_begun_tells_who_is_late(tmp_path):
    """NCCL: all have queued it, and only one device has not begun it."""
    for rank in range(3):
        state = "scheduled" if rank == 2 else "started"
        dump_into(tmp_path, rank, [entry(("5", "dp_cp"), 9, over=False, call="nccl:all_reduce", state=state)])
    views = [view(rank, silent_s=20) for rank in range(3)]
    blame = find_culprit(find_hang(views, LIMITS), views, read_dumps(tmp_path, 3))
    assert set(blame.ranks) == {2}
    assert blame.is_known


def test_a_rank_whose_interpreter_is_stuck_writes_nothing_and_is_named(tmp_path):
    for rank in (0, 1):
        dump_into(tmp_path, rank, [], WAITING)
    views = [view(rank, silent_s=20) for rank in range(3)]
    blame = find_culprit(find_hang(views, LIMITS), views, read_dumps(tmp_path, 3))
    assert blame.ranks == (2,)
    assert blame.is_known


def test_what_cannot_be_told_is_said(tmp_path):
    """All wait, nobody is absent: no rank is accused."""
    for rank in range(2):
        dump_into(tmp_path, rank, [], WAITING)
    views = [view(rank, silent_s=20) for rank in range(2)]
    hang = find_hang(views, LIMITS)
    blame = find_culprit(hang, views, read_dumps(tmp_path, 2))
    assert not blame.is_known
    assert blame.ranks == (0, 1)
    assert "nobody can be named for certain" in summarize_hang(hang, blame, views)


def test_torn_and_strange_dumps_are_left_out(tmp_path):
    (tmp_path / "collectives_00000.json").write_text('{"entries": [{"process_group"')
    (tmp_path / "collectives_00001.json").write_text('{"entries": [{"process_group": 3}]}')
    (tmp_path / "collectives_00002.json").write_text("[]")
    (tmp_path / "stacks_00001.txt").write_bytes(b"\xff\xfe Thread")
    dumps = read_dumps(tmp_path, 4)
    assert dumps.collectives == {}
    assert list(dumps.stacks) == [1]


def test_report_says_the_first_things_first(tmp_path):
    """Mutation seen caught: stacks in order of ranks, the culprit's not first."""
    group = ("3", "dp_cp")
    for rank in range(4):
        entries = [entry(group, 1, over=True)] + ([entry(group, 2, over=False)] if rank != 2 else [])
        dump_into(tmp_path, rank, entries, (COMPUTING if rank == 2 else WAITING).replace("0x0", f"0x{rank}"))
    views = [view(rank, silent_s=20, node=f"n{rank // 2}", state="D" if rank == 2 else "S") for rank in range(4)]
    hang, dumps = find_hang(views, LIMITS), read_dumps(tmp_path, 4)
    write_hang_report(tmp_path / "r.md", hang, find_culprit(hang, views, dumps), views, dumps, "noon")
    text = (tmp_path / "r.md").read_text()
    first = text.splitlines()[2]
    assert first == "**step: rank 2 on n1; silent for 20 s in compute after step 7, limit 10 s**"
    assert "begins with row 56" in text
    assert "step 4" in text
    assert "state D" in text
    assert "- ranks 0-1, 3 wait in gloo:all_reduce [3], number 2 of group dp_cp (3)" in text
    assert "### Rank 2\n" in text
    assert "### Ranks 0-1, 3 (the same)" in text
    assert text.index("### Rank 2") < text.index("### Ranks 0-1")
    assert "| dp_cp (3) | no. 1 gloo:all_reduce [3] | over | rank 2 |" in text


def test_report_of_many_ranks_shows_the_odd_ones(tmp_path):
    views = [view(rank, silent_s=20) for rank in range(1024)]
    views[700] = view(700, Phase.DATA, 7, 700)
    hang = find_hang(views, LIMITS)
    write_hang_report(tmp_path / "r.md", hang, find_culprit(hang, views, Dumps()), views, Dumps())
    text = (tmp_path / "r.md").read_text()
    assert "rank 700 on node700; silent for 700 s in data" in text
    assert "1023 in compute after step 7" in text
    assert text.count("\n| ") == 2
    assert len(text) < 4000


@given(st.lists(st.integers(0, 50), unique=True))
def test_ranks_in_words_hold_each_rank_once(ranks):
    words = describe_ranks(ranks).replace("ranks", "").replace("rank", "").strip()
    parts = [part.split("-") for part in words.split(", ")] if ranks else []
    spelled = [range(int(part[0]), int(part[-1]) + 1) for part in parts]
    assert list(itertools.chain(*spelled)) == sorted(ranks)
