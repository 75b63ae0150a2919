"""The heartbeat file: what a rank writes is what another process reads, whole or not at all."""

import struct
import time

import pytest

from megascale.parallel import heartbeat
from megascale.parallel.heartbeat import COMPUTE_WINDOW, Heartbeat, Phase, read_beat


@pytest.fixture
def path(tmp_path):
    return tmp_path / "beat"


def test_what_was_written_is_read(path):
    """Mutations seen to be caught: the first step counted among the slow ones; the mean in place of the median."""
    pulse = Heartbeat(path)
    assert (read_beat(path).phase, read_beat(path).step, read_beat(path).saved_step) == (Phase.START, -1, -1)
    pulse.begin_step(7, 56)
    time.sleep(0.2)
    pulse.end_step(9.0)  # the first step, which warms up
    for compute_s in (0.5, 0.25, 60.0):
        pulse.begin_step(8, 64)
        time.sleep(0.01)
        pulse.end_step(compute_s)
    pulse.note_saved(6)
    before = time.monotonic()
    pulse.enter(Phase.DATA)
    beat = read_beat(path)
    assert (beat.phase, beat.step, beat.first_row, beat.saved_step, beat.steps_taken) == (Phase.DATA, 9, 64, 6, 4)
    assert 0.01 <= beat.slowest_step_s < 0.2
    assert beat.compute_s == 0.5
    assert before <= beat.since_s <= time.monotonic()


def test_the_pace_is_that_of_the_latest_steps(path):
    pulse = Heartbeat(path)
    for number in range(2 * COMPUTE_WINDOW + 1):
        pulse.begin_step(number, 0)
        pulse.end_step(1.0 if number < COMPUTE_WINDOW else 2.0)
    pulse.enter(Phase.LOG)
    assert read_beat(path).compute_s == 2.0


def test_a_phase_within_another_gives_it_back_and_time_is_shared_out(path):
    pulse = Heartbeat(path)
    pulse.enter(Phase.LOAD)
    with pulse.within(Phase.SAVE):
        assert read_beat(path).phase == Phase.SAVE
        time.sleep(0.05)
    assert read_beat(path).phase == pulse.phase == Phase.LOAD
    assert pulse.seconds[Phase.SAVE] >= 0.05
    assert pulse.seconds[Phase.DATA] == 0


def test_every_phase_fits_its_place(path):
    """Mutation seen to be caught: a phase whose name is longer than its place."""
    pulse = Heartbeat(path)
    for phase in Phase:
        pulse.enter(phase)
        assert read_beat(path).phase == phase


def test_a_torn_write_is_never_taken_for_a_beat(path, monkeypatch):
    """A reader that meets a write half done reads again; its counts at both ends differ.

    Mutation seen to be caught: the counts not compared.
    """
    pulse = Heartbeat(path)
    pulse.enter(Phase.LOAD)
    whole = path.read_bytes()
    pulse.begin_step(1, 0)
    pulse.enter(Phase.COMPUTE)
    new = path.read_bytes()
    layout, reads = heartbeat._LAYOUT, []
    cut = layout.size - struct.calcsize("<q")
    torn = new[:cut] + whole[cut : layout.size]

    class Torn:
        @staticmethod
        def unpack_from(memory):
            reads.append(1)
            return layout.unpack(torn if len(reads) < 3 else bytes(memory[: layout.size]))

    monkeypatch.setattr(heartbeat, "_LAYOUT", Torn)
    beat = read_beat(path)
    assert (beat.phase, beat.step, len(reads)) == (Phase.COMPUTE, 1, 3)


def test_nothing_is_read_where_nothing_was_written(path, tmp_path):
    assert read_beat(path) is None
    path.write_bytes(b"")
    assert read_beat(path) is None
    path.write_bytes(bytes(4096))
    assert read_beat(path) is None
    Heartbeat().enter(Phase.DATA)
    assert sorted(tmp_path.iterdir()) == [path]
