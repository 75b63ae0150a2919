"""The first error among the ends of many ranks."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.supervise.first_error import RankEnd, first_cause, merge_errors, summarize, write_first_error
from megascale.errors import EXIT_PEER_LOST, EXIT_STOPPED

WALL = "Traceback (most recent call last):\n  File \"x.py\", line 3\nRuntimeError: [gloo] Connection closed by peer\n"


def end(rank: int, code: int = 1, error: str | None = None, tail: str = "", at_s: float = 0.0, **values) -> RankEnd:
    return RankEnd(rank, f"node{rank // 4}", code, error, tail, 1000 + at_s, 7, "compute",
                   f"/r/rank_{rank:05d}.log", **values)


def test_the_wall_of_peers_is_one_line_and_not_the_cause():
    """Though peers died first by their clocks. Mutation seen caught: the earliest end whatever its reason."""
    peers = [end(rank, 1, None, WALL, at_s=-1) for rank in range(1, 7)]
    lost = [end(7, EXIT_PEER_LOST, "rank 7 lost its peers")]
    cause = end(0, 1, None, "log\nTraceback (most recent call last):\nValueError: bad norm\n")
    text = merge_errors([*peers, *lost, cause])
    assert text.splitlines()[:2] == [
        "first error: rank 0 on node0, after step 7, in phase compute", "failed with exit code 1: ValueError: bad norm",
    ]
    assert text.count("Connection closed") == 0
    assert "ranks 1-7 ended because the connection to another rank was gone" in text
    assert "full log: /r/rank_00000.log" in text


def test_equal_messages_stand_once():
    """Mutation seen caught: numbers that differ between ranks kept in what is compared."""
    ends = [end(rank, 3, f"rank {rank}: loss is not finite at step 8", at_s=rank / 10) for rank in (2, 0, 1, 3)]
    text = merge_errors(ends)
    assert text.splitlines()[:3] == [
        "first error: rank 0 on node0, after step 7, in phase compute", "rank 0: loss is not finite at step 8",
        "(the same on ranks 1-3)",
    ]
    assert text.count("not finite") == 1


def test_other_errors_come_after_the_cause():
    text = merge_errors([end(0, -signal.SIGSEGV, at_s=0), end(1, 3, "disk full", at_s=1), end(2, EXIT_STOPPED, at_s=2)])
    assert text.startswith("first error: rank 0")
    assert "SIGSEGV" in text.splitlines()[1]
    assert "  rank 1: disk full" in text
    assert "  rank 2: stopped and saved, as asked" in text


def test_memory_is_told_with_its_numbers():
    """SIGKILL without the kernel's numbers isn't called out of memory for sure."""
    killed = end(3, -signal.SIGKILL, oom={"limit_bytes": 2 << 30, "peak_bytes": 3 << 29})
    assert summarize([killed]) == "rank 3 on node0: killed by SIGKILL: out of memory, says the kernel:" \
        " limit 2.00 GiB, peak 1.50 GiB (cgroup)"
    assert "out of memory?" in summarize([end(3, -signal.SIGKILL)])
    assert "out of memory, says the kernel" in summarize([end(3, -9, oom={"limit_bytes": None, "peak_bytes": None})])


@pytest.mark.parametrize(("code", "words"), [
    (-signal.SIGABRT, "SIGABRT"), (-signal.SIGBUS, "/dev/shm"), (-60, "killed by "), (0, "exit code 0 while others"),
])
def test_every_way_to_end_is_explained(code, words):
    assert words in merge_errors([end(0, code), end(1, EXIT_PEER_LOST, at_s=-5)])


def test_an_early_quiet_end_is_the_cause_when_the_others_only_lost_it():
    """Mutation seen caught: exit code 0 never a cause."""
    assert first_cause([end(0, 1, None, WALL, at_s=-1), end(1, 0), end(2, EXIT_PEER_LOST)]).rank == 1


def test_nobody_but_followers_still_gives_a_text():
    assert merge_errors([end(0, EXIT_PEER_LOST, tail=WALL)]).startswith("first error: rank 0")


def test_secrets_in_urls_are_left_out(tmp_path):
    write_first_error(tmp_path / "e.txt", [end(0, 3, "https://u:canary@h/x?key=canary failed", "s3://a:canary@b\n")])
    assert "canary" not in (tmp_path / "e.txt").read_text()


@given(st.permutations(range(5)), st.integers(0, 4))
def test_the_cause_does_not_depend_on_the_order_of_reports(order, culprit):
    ends = [end(rank, 1, None, WALL if rank != culprit else "OSError: [Errno 28] no space\n", at_s=rank % 3)
            for rank in order]
    assert first_cause(ends).rank == culprit
    assert merge_errors(ends).splitlines()[0] == f"first error: rank {culprit} on node{culprit // 4}, after step 7," \
        " in phase compute"


def test_ten_thousand_ranks_make_a_short_text():
    ends = [end(rank, 1, None, WALL, at_s=1) for rank in range(10_000)]
    ends[4321] = end(4321, -signal.SIGSEGV)
    assert len(merge_errors(ends)) < 2000


def test_each_rank_is_told_of_once():
    ends = [end(rank, 3 + rank % 3, f"fault of kind {'abc'[rank % 3]}", at_s=rank) for rank in range(9)]
    text = merge_errors(ends)
    assert all(text.count(f"fault of kind {kind}") == 1 for kind in "abc")
    assert "ranks 1, 4, 7: fault of kind b" in text
