"""Decoders of every kind through the command line: resumed to the bit, and in another layout within rounding.

BERT, T5 and ViT have files of their own.
"""

import pytest

from tests.support.corpus import make_corpus
from tests.support.tiny_run import curve, megascale, write_config

FAMILIES = {
    "gpt2": (["model.family=gpt2"], ["parallel.pp=2"]),
    "palm": (["model.family=palm", "model.num_kv_heads=1"], ["parallel.tp=2"]),
    "llama": (
        ["model.qk_norm=true", "model.attention_softcap=20", "model.logit_softcap=30", "model.window=8",
         "model.global_every=2", "model.rope_scaling.kind=linear",
         "model.rope_scaling.factor=2", "model.rope_scaling.original_seq_len=16"],
        ["parallel.cp=2"],
    ),
    "moe": (["model.family=moe", "model.moe.num_experts=4", "model.moe.balance=bias"], ["parallel.ep=2"]),
}
MIDDLE, END = 3, 6


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_in_the_same_layout_and_in_another(family, tmp_path):
    """Seen to catch: dropout keyed by micro-batches since a start; biases of experts not in a checkpoint."""
    options, layout = FAMILIES[family]
    options = [*options, f"train.max_steps={END}", "optimizer.horizon_steps=12"]
    corpus = make_corpus(tmp_path / "corpus", vocab_size=64)
    source = write_config(tmp_path, corpus)
    assert_trains(source, *options, "--nproc", "1")
    straight = [line for line in curve(tmp_path / "run") if line[1] > MIDDLE]
    for name, changes, tolerance in (("same", ["--nproc", "1"], 0.0), ("other", [*layout, "--nproc", "2"], 1e-6)):
        config = write_config(tmp_path, corpus, name)
        assert_trains(config, *options, *changes, "--fork", f"{tmp_path / 'run'}@{MIDDLE}")
        resumed = [line for line in curve(tmp_path / name) if line[1] > MIDDLE]
        assert [line[:2] for line in resumed] == [line[:2] for line in straight]
        assert len(resumed) >= END - MIDDLE
        for found, expected in zip(resumed, straight, strict=True):
            assert numbers(found) == pytest.approx(numbers(expected), rel=tolerance, abs=0)


def numbers(line: tuple) -> list[float]:
    """Loss, gradient norm and tokens; an evaluation has the first only."""
    return [value or 0.0 for value in line[2:]]


def assert_trains(*arguments) -> None:
    done = megascale("train", *arguments)
    assert done.returncode == 0, done.stderr
