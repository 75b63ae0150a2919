"""Text from a run by the command line: several prompts at once, with and without a cache, over ranks, searched.

Mutations that must fail it: the samples of a prompt share one seed; the layers of a model share one cache; the cache
isn't reordered with the beams.
"""

import json

import pytest

from tests.support.tiny_run import megascale


def texts(run, *arguments) -> list[dict]:
    """The texts that a command gives, in the order of prompts and samples."""
    done = megascale("generate", run, "--json", "--max-tokens", "12", *arguments)
    assert done.returncode == 0, done.stderr
    return sorted(map(json.loads, done.stdout.splitlines()), key=lambda text: (text["prompt"], text["sample"]))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text('"w1"\n{"prompt": "w5 w6 w7"}\n')
    return path


def test_prompts_of_a_file_are_continued_together(clean, prompts):
    """The same with a cache, without, and with a cache over two tp ranks, past the end of the window too."""
    wanted = ["--prompts-file", prompts, "--samples", "2"]
    found = texts(clean, *wanted)
    assert [(text["prompt"], text["sample"]) for text in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[0]["text"] != found[1]["text"]
    assert texts(clean, *wanted, "--no-cache") == found
    assert texts(clean, *wanted, "--tp", "2") == found


def test_a_search_gives_its_best_texts_over_pipeline_ranks_too(clean):
    wanted = ["--prompt", "w3", "--beams", "3", "--best", "2"]
    best, second = texts(clean, *wanted)
    assert best["score"] >= second["score"]
    assert best["text"] != second["text"]
    over_ranks = texts(clean, *wanted, "--pp", "2", "--no-cache")
    assert [text["text"] for text in over_ranks] == [best["text"], second["text"]]
    assert [text["score"] for text in over_ranks] == pytest.approx([best["score"], second["score"]], rel=1e-5)


@pytest.mark.parametrize(("arguments", "part"), [
    (["--samples", "2", "--beams", "2"], "a search draws nothing"),
    (["--best", "2"], "--best 2 is more than --beams 1"),
    (["--prompts-file", "no/such/file"], "no/such/file: can't be read"),
    (["--ema"], "has no averaged weights; train with optimizer.ema_decay"),
])
def test_what_means_nothing_is_refused(clean, arguments, part):
    done = megascale("generate", clean, *arguments)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
