"""What the end-to-end tests share: one corpus, and one run on it that nobody disturbed."""

from pathlib import Path

import pytest

from tests.support.corpus import make_corpus
from tests.support.tiny_run import megascale, write_config


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A corpus of synthetic tokens. Not to be changed."""
    return make_corpus(tmp_path_factory.mktemp("e2e") / "corpus", vocab_size=64)


@pytest.fixture(scope="session")
def clean(corpus) -> Path:
    """The run folder of an undisturbed run on two ranks. Not to be changed."""
    done = megascale("train", write_config(corpus.parent, corpus), "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return corpus.parent / "run"
