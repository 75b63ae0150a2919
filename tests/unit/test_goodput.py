"""The account of a run's time: what it adds up to, what faults took back, and files that were torn."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascale.observe import goodput as account
from megascale.observe.console import describe_goodput
from megascale.observe.goodput import (
    GoodputLog,
    SessionTime,
    derive_goodput,
    extend,
    read_sessions,
    write_session,
)
from megascale.observe.jsonl import JsonlSink
from megascale.observe.logger import Logger
from megascale.observe.run_files import GOODPUT_FILE, read_json, read_metrics
from megascale.parallel.heartbeat import Heartbeat, Phase
from tests.unit.test_observe_sinks import train_record

SECONDS = st.floats(0, 1e6, allow_nan=False)


@st.composite
def lineages(draw) -> list[SessionTime]:
    """Sessions one after the other, each resumed at or before the step that some earlier one reached."""
    sessions, now_s, reached = [], draw(st.floats(1e9, 2e9)), 0
    for number in range(draw(st.integers(1, 6))):
        resumed = draw(st.integers(0, reached))
        reached = resumed + draw(st.integers(0, 50))
        seconds = {str(phase): draw(SECONDS) for phase in draw(st.sets(st.sampled_from(Phase)))}
        sessions.append(SessionTime(f"session_{number}", now_s, resumed, reached, seconds))
        now_s = sessions[-1].ended_s + 1 + draw(SECONDS)
    return sessions


@given(lineages(), st.randoms())
def test_parts_add_up_to_the_wall_time(sessions, random):
    """Mutations seen to be caught: the time between sessions left out; lost steps counted as training as well; a
    session's steps lost by its next session's fallback only, not by a later one's.
    """
    shuffled = list(sessions)
    random.shuffle(shuffled)
    found = derive_goodput(shuffled)
    wall_s = sessions[-1].ended_s - sessions[0].began_s
    assert sum(found.parts().values()) == pytest.approx(found.wall_s)
    assert found.wall_s == pytest.approx(wall_s, rel=1e-6, abs=1e-3)
    assert min(found.parts().values()) >= -1e-6
    assert 0 <= found.goodput_fraction <= 1 + 1e-9
    assert found.steps_kept == sessions[-1].reached_step
    assert found.steps_kept + found.steps_redone == sum(one.reached_step - one.resumed_step for one in sessions)


def times(**seconds: float) -> dict[str, float]:
    return {str(Phase(name)): spent_s for name, spent_s in seconds.items()}


def test_two_faults_by_hand():
    """The second session begins 10 steps before the end of the first, the third 2 steps before that of the second.

    Mutation seen to be caught: the mean step taken over all sessions instead of the session that lost it.
    """
    sessions = [
        SessionTime("a", 1000.0, 0, 30, times(start=5, load=5, data=3, agree=1, compute=59, save=7, evaluate=10)),
        SessionTime("b", 1100.0, 20, 24, times(start=4, join=1, load=5, compute=40)),  # 10 s after a
        SessionTime("c", 1200.0, 22, 40, times(load=10, compute=18, log=1, close=1)),  # 50 s after b
    ]
    found = derive_goodput(sessions)
    assert found.steps_kept == 20 + 2 + 18
    assert found.steps_redone == 10 + 2
    assert found.lost_s == pytest.approx(10 * 60 / 30 + 2 * 40 / 4)
    assert found.compute_s == pytest.approx(60 + 40 + 18 - 40)
    assert (found.data_s, found.save_s, found.evaluate_s) == (3, 7, 10)
    assert found.startup_s == 10 + 10 + 10
    assert found.other_s == pytest.approx(2)
    assert found.down_s == 10 + 50
    assert found.wall_s == 230
    assert found.goodput_fraction == pytest.approx(78 / 230)
    assert (found.step, found.unix_s, found.num_sessions) == (40, 1230, 3)
    assert describe_goodput(found) == (
        "goodput 33.9 % of 3m50s: down 26.1 %, lost and redone 17.4 %, start-up 13.0 %, evaluation 4.3 %, saving 3.0 %,"
        " waiting for data 1.3 %, other 0.9 %"
    )


def test_a_later_fallback_takes_back_steps_of_several_sessions():
    """Mutation seen to be caught: a session compared with the next one only."""
    sessions = [
        SessionTime("a", 0.0, 0, 6, times(compute=6)), SessionTime("b", 6.0, 6, 9, times(compute=3)),
        SessionTime("c", 9.0, 3, 9, times(compute=6)),
    ]
    found = derive_goodput(sessions)
    assert (found.steps_kept, found.steps_redone, found.lost_s, found.compute_s) == (9, 6, 6, 9)


def test_a_step_that_never_ended_is_lost_unless_it_still_may_end():
    """Mutation seen to be caught: a session without a step counted as training."""
    hung, fresh = SessionTime("a", 0.0, 4, 4, times(compute=7)), SessionTime("b", 9.0, 4, 4, times(compute=3))
    found = derive_goodput([hung, fresh])
    assert (found.lost_s, found.compute_s, found.steps_redone) == (7, 3, 0)


def test_clocks_that_overlap_give_no_negative_time():
    """Machines whose clocks differ: the next session began, by its clock, before the last one ended.

    Mutation seen to be caught: the time between them taken as it is.
    """
    sessions = [SessionTime("a", 100.0, 0, 5, times(compute=50)), SessionTime("b", 140.0, 5, 9, times(compute=10))]
    found = derive_goodput(sessions)
    assert (found.down_s, found.wall_s, found.goodput_fraction) == (0, 60, 1)


def test_torn_missing_and_impossible_files_are_left_out(tmp_path):
    """Mutation seen to be caught: a session file that isn't checked for what it can't say."""
    (tmp_path / "goodput").mkdir()
    good = SessionTime("session_5_good", 5.0, 0, 3, times(compute=2.0))
    write_session(tmp_path, good)
    bad = [
        "", "{", "[]", "null", '{"began_s": 1}',
        '{"began_s": "x", "resumed_step": 0, "reached_step": 1, "seconds": {}}',
        '{"began_s": NaN, "resumed_step": 0, "reached_step": 1, "seconds": {}}',
        '{"began_s": 1, "resumed_step": 5, "reached_step": 1, "seconds": {}}',
        '{"began_s": 1, "resumed_step": 0, "reached_step": 1, "seconds": {"compute": -1}}',
        '{"began_s": 1, "resumed_step": 0, "reached_step": 1, "seconds": 7}',
    ]
    for number, content in enumerate(bad):
        (tmp_path / f"goodput/session_{number}_bad.json").write_text(content)
    (tmp_path / "goodput/.session_9_x.json.77.tmp").write_text("{")
    assert read_sessions(tmp_path) == [good]
    assert read_sessions(tmp_path / "nowhere") == []


def test_the_log_tells_what_a_killed_session_could_not(tmp_path):
    """A session that wrote its file at step 6 and logged step 8 was killed: two steps are lost, though no file says so.

    The account is taken before `metrics.jsonl` is rewound. Mutations seen to be caught: the end of
    the log not read; what it found not written back, so that the session after next doesn't know.
    """
    (tmp_path / "goodput").mkdir()
    write_session(tmp_path, SessionTime("session_100_killed", 100.0, 0, 6, times(compute=6.0)))
    sink = JsonlSink(tmp_path, 0)
    for step in range(1, 9):
        sink.log_train(train_record(step, unix_s=100.0 + step))
    found = derive_goodput(read_sessions(tmp_path))
    assert (found.step, found.compute_s, found.steps_redone) == (8, 8.0, 0)
    GoodputLog(tmp_path, Heartbeat(), 6)
    JsonlSink(tmp_path, 6)
    goodput = GoodputLog(tmp_path, Heartbeat(), 6).measure()
    assert (goodput.steps_kept, goodput.steps_redone, goodput.num_sessions) == (6, 2, 3)
    assert (goodput.compute_s, goodput.lost_s) == (6.0, 2.0)


def test_extension_is_only_forwards():
    session = SessionTime("a", 100.0, 0, 6, times(compute=6.0))
    assert extend(session, 6, 120.0) == session
    assert extend(session, 8, 105.0) == session


def test_a_session_from_begin_to_end(tmp_path, monkeypatch, capsys):
    """Through the logger: the file while it trains, the line of a save, `goodput.json` and the last word.

    Mutations seen to be caught: the present stay in a phase left out; no file before the session's end; the line
    dropped by the rewind of `metrics.jsonl`.
    """
    pulse = Heartbeat()
    logger = Logger([JsonlSink(tmp_path, 0)], goodput=GoodputLog(tmp_path, pulse, 0))
    pulse.enter(Phase.COMPUTE)
    time.sleep(0.05)
    logger.log_train(train_record(1))
    logger.note(1)
    (session,) = read_sessions(tmp_path)
    assert session.seconds["compute"] == 0
    monkeypatch.setattr(account.time, "monotonic", lambda now=time.monotonic: now() + account.WRITE_INTERVAL_S)
    logger.note(1)
    (session,) = read_sessions(tmp_path)
    assert session.seconds["compute"] >= 0.05
    pulse.enter(Phase.SAVE)
    logger.log_goodput()
    logger.log_train(train_record(2))
    logger.note(2)
    logger.close("stopped")
    (line,) = read_metrics(tmp_path, ["goodput"])
    assert (line["step"], line["num_sessions"], line["steps_kept"]) == (1, 1, 1)
    assert [one["step"] for one in read_metrics(tmp_path)] == [1, 2]
    JsonlSink(tmp_path, 1)
    assert [one["kind"] for one in read_metrics(tmp_path, ["train", "goodput"])] == ["train", "goodput"]
    whole = read_json(tmp_path / GOODPUT_FILE)
    assert whole["step"] == 2
    assert whole["compute_s"] == pytest.approx(read_sessions(tmp_path)[0].seconds["compute"])
    assert abs(whole["unix_s"] - time.time()) < 5
    assert capsys.readouterr().out.startswith("goodput ")


def test_a_folder_that_takes_no_file_stops_nothing(tmp_path, monkeypatch):
    """Reported once, as a sink's failure is; mutation seen to be caught: `note` called outside of `_try`."""
    warnings = []
    logger = Logger([JsonlSink(tmp_path, 0)], warnings.append, GoodputLog(tmp_path, Heartbeat(), 0))
    (tmp_path / "goodput").rename(tmp_path / "gone")
    monkeypatch.setattr(account.time, "monotonic", lambda now=time.monotonic: now() + account.WRITE_INTERVAL_S)
    for step in (1, 2):
        logger.note(step)
        logger.log_goodput()
        logger.log_train(train_record(step))
    logger.close("finished")
    assert len(warnings) == 1
    assert "GoodputLog failed" in warnings[0]
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_line_of_json_has_all_parts(tmp_path):
    goodput = GoodputLog(tmp_path, Heartbeat(), 0).measure()
    sink = JsonlSink(tmp_path, 0)
    sink.log_goodput(goodput)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["kind"] == "goodput"
    assert sum(line[name] for name in line if name.endswith("_s") and name not in ("wall_s", "unix_s")) == (
        pytest.approx(line["wall_s"])
    )
