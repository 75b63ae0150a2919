"""Groups over gloo have one worker thread each, since two of them corrupt the heap.

Mutations seen to be caught: `lay_out_mesh` outside `one_gloo_thread`, by both (the overlapping collectives aborted or
segfaulted, 3 times of 3); `join_ranks` outside it, by the second.
"""

import json

from tests.support.ranks import run_ranks

SECONDS = 8


def test_collectives_that_overlap_leave_the_heap_whole(tmp_path):
    (shown,) = run_ranks("tests.dist.programs.gloo_threads", 1, [str(SECONDS)], tmp_path)
    assert json.loads(shown)["collectives"] > 1000


def test_every_group_of_a_run_has_one_thread(tmp_path):
    for shown in run_ranks("tests.dist.programs.gloo_threads", 2, ["0"], tmp_path):
        threads = json.loads(shown)["threads"]
        assert len(threads) > 8
        assert set(threads) == {1}
