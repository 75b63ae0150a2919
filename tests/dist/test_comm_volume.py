"""Every rank sends in a step what the closed forms of the papers say, to the byte; what goes beyond is named there.

Which tokens a rank sends to experts is for its router to say, so there the mean over the ranks of ep is compared.

Mutations seen to be caught: an all-reduce in place of ZeRO-1's reduce-scatter; column layers' inputs gathered twice.
"""

import json

import pytest

from tests.support.ranks import run_ranks

REPRESENTATIVE = {
    2: ["tp2", "tp2 without sequence shards", "cp2 ring bf16", "cp2 ulysses", "pp2 1f1b, tied", "dp2 zero1 bf16",
        "dp2 zero2", "dp2 zero3", "ep2"],
    4: ["tp4, 2 kv heads", "tp2 dp2 zero1", "tp2 dp2 zero2", "ep2 tp2", "ep2 cp2"],
}


@pytest.mark.parametrize("ranks", REPRESENTATIVE)
def test_bytes_sent_are_those_of_the_closed_forms(ranks, tmp_path):
    names = REPRESENTATIVE[ranks]
    options = json.dumps({"cases": names, "prints": "json"})
    printed = run_ranks("bench.comm_rank", ranks, [options], tmp_path, timeout_s=300)
    found = [result for text in printed for result in json.loads(text.splitlines()[-1])]
    assert len(found) == ranks * len(names)
    for result in found:
        assert result["counted"] == result["expected"], f"{result['name']}, rank {result['rank']}"
