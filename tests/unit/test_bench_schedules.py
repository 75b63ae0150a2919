"""The arithmetic behind the table and the picture of the schedules.

Mutations seen to be caught: the window of the first rank alone in `idle_fraction`; a backward pass that doesn't wait
for the next stage's (`needs`); a first forward too few in `one_forward_one_backward`; one colour for all boxes.
"""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bench.schedule_picture import COLORS, draw_panel, draw_schedules
from bench.schedule_trace import Action, Box, idle_fraction, main, step_seconds, torch_actions, unit_boxes


def test_idle_is_what_no_box_covers():
    boxes = [[Box("F", 0, 0, 10.0, 11.0), Box("B", 0, 0, 13.0, 14.0)], [Box("F", 1, 0, 11.0, 13.0)]]
    assert step_seconds(boxes) == 4.0
    assert idle_fraction(boxes) == pytest.approx(0.5)


def test_boxes_of_a_step_by_hand():
    """1F1B on two ranks, two micro-batches: F F . B B over F B F B, a unit late."""
    boxes = unit_boxes(torch_actions("1f1b", 2, 1, 2), num_stages=2)
    shown = [[(box.kind, box.micro_batch, box.start, box.end) for box in row] for row in boxes]
    assert shown == [
        [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 4, 6), ("B", 1, 7, 9)],
        [("F", 0, 1, 2), ("B", 0, 2, 4), ("F", 1, 4, 5), ("B", 1, 5, 7)],
    ]


def test_orders_in_a_circle_are_refused():
    first = [Action("B", 0, 0), Action("F", 0, 0)]
    with pytest.raises(ValueError, match="3 actions wait"):
        unit_boxes([first, [Action("F", 1, 0)]], num_stages=2)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_picture_is_drawn(suffix, tmp_path):
    traces = {
        schedule: unit_boxes(torch_actions(schedule, 2, stages_per_rank, 4), 2 * stages_per_rank)
        for schedule, stages_per_rank in [("gpipe", 1), ("zero_bubble_v", 2)]
    }
    path = draw_schedules(traces, tmp_path / "new" / f"picture.{suffix}")
    assert path.stat().st_size > 5000


def test_picture_has_a_box_for_each_action():
    boxes = unit_boxes(torch_actions("zero_bubble", 2, 2, 4), num_stages=4)
    panel = Figure().subplots()
    draw_panel(panel, boxes)
    drawn = [
        (round(patch.get_x()), round(patch.get_y() + 0.42), to_hex(patch.get_facecolor())) for patch in panel.patches
    ]
    assert drawn == [(1000 * box.start, rank, COLORS[box.kind]) for rank, row in enumerate(boxes) for box in row]


def test_trace_of_two_ranks(capsys):
    main(["--pp", "2", "--micro-batches", "4", "--rank-ms", "6", "--steps", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row[0].strip("| ") for row in rows][:2] == ["gpipe", "1f1b"]
    assert len(rows) == 6
    for row in rows:
        assert 0 < float(row[3]) < 1
        assert float(row[-1].strip("| ")) > 0.99, "a step can't take less than its own sleep"
