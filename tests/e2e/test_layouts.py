"""A run from the command line in one layout, resumed in another, and text from it in several.

Seen to catch: pipeline ranks that each draw from logits of their own; weights of a tp rank read from the start of the
tensor; a tied head that the last stage doesn't load; logits of each tp rank's part of the vocabulary alone.
"""

import pytest

from tests.support.corpus import make_corpus
from tests.support.tiny_run import curve, megascale, write_config

TIED = ["model.family=gpt2", "model.dropout=0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder's parent: 6 steps in tp 2 x pp 2, with a tied head."""
    folder = tmp_path_factory.mktemp("layouts")
    config = write_config(folder, make_corpus(folder / "corpus", vocab_size=64))
    done = megascale(
        "train", config, *TIED, "parallel.tp=2", "parallel.pp=2", "train.max_steps=6", "optimizer.horizon_steps=12",
        "--nproc", "4",
    )
    assert done.returncode == 0, done.stderr
    assert "2 stages" in done.stdout
    return folder


def test_text_is_the_same_from_any_layout(trained):
    texts = set()
    for layout in ([], ["--tp", "2"], ["--pp", "2"]):
        done = megascale("generate", trained / "run", "--prompt", "w3 w4", "--max-tokens", "12", *layout)
        assert done.returncode == 0, done.stderr
        texts.add(done.stdout)
    assert len(texts) == 1
    assert texts.pop().startswith("w3 w4")


def test_a_layout_that_the_model_has_no_place_for_is_refused(trained):
    done = megascale("generate", trained / "run", "--prompt", "w3", "--tp", "3")
    assert done.returncode == 2
    assert "parallel.tp = 3 does not divide model.num_heads = 2; use one of 1, 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_resumes_in_another_layout(trained):
    """Six more steps under cp 2 and ZeRO-3 are those of a run that was never laid out otherwise."""
    rest = [*TIED, "optimizer.horizon_steps=12"]
    done = megascale(
        "train", trained / "run.yaml", *rest, "parallel.cp=2", "parallel.zero_stage=3", "--nproc", "2"
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    config = write_config(trained, trained / "corpus", "plain")
    assert megascale("train", config, *rest, "--nproc", "1").returncode == 0
    found, expected = curve(trained / "run"), curve(trained / "plain")
    steps = {line[1]: line for line in expected if line[0] == "train"}
    for kind, step, loss, norm, tokens in found:
        if kind == "train":
            assert loss == pytest.approx(steps[step][2], rel=1e-5)
            assert norm == pytest.approx(steps[step][3], rel=1e-5)
            assert tokens == steps[step][4]
    assert sorted(line[1] for line in found if line[0] == "train") == list(range(1, 13))
