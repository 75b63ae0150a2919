"""The main path by hand, through the command line: text, corpus, training, resume, sample, baselines, report."""

import json

import pytest

from megascale.checkpoint.find import peek_checkpoint
from megascale.checkpoint.local_store import LocalStore
from megascale.config.data import ONLY_CORPUS
from tests.support.corpus import make_text
from tests.support.tiny_run import curve, megascale, read_metrics


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A corpus made from text by the tools, and a run on it by two ranks."""
    folder = tmp_path_factory.mktemp("main")
    make_text(folder / "text")
    built = megascale("data", "build", folder / "text", "--out", folder / "corpus", "--vocab-size", "300",
                      "--validation-fraction", "0.2", "--shard-tokens", "2048", "--block-tokens", "512")
    assert built.returncode == 0, built.stderr
    config = folder / "run.yaml"
    config.write_text(
        f"run: {{name: main, folder: {folder / 'run'}}}\n"
        "model: {family: gpt2, num_layers: 1, d_model: 32, num_heads: 2, vocab_size: 300, max_seq_len: 32}\n"
        f"data: {{folder: {folder / 'corpus'}}}\n"
        "train: {seq_len: 32, micro_batch_size: 2, global_batch_tokens: 256, max_steps: 6}\n"
        "optimizer: {learning_rate: 1e-2, horizon_steps: 6}\n"
        "precision: {dtype: bf16}\n"
        "evaluate: {interval_steps: 3}\n"
        "checkpoint: {interval_steps: 2, keep_last: 2}\n"
        "observe: {wandb: {mode: disabled}}\n"
    )
    done = megascale("train", config, "--nproc", "2")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_training_says_what_it_does_and_what_came_of_it(trained):
    folder, done = trained
    assert "256 = micro-batch 2 x accumulation 2 x dp 2 x seq_len 32" in done.stdout
    assert "validation loss" in done.stdout
    assert done.stderr == ""
    steps = [line["step"] for line in read_metrics(folder / "run") if line["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]
    losses = [line["loss"] for line in read_metrics(folder / "run") if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000006"]


def test_bits_per_byte_are_those_of_the_text(trained):
    folder, _ = trained
    last = [line for line in read_metrics(folder / "run") if line["kind"] == "eval"][-1]
    index = json.loads((folder / "corpus/validation/index.json").read_text())
    expected = last["loss"] * last["num_tokens"] / 0.6931471805599453 / index["text_bytes"]
    assert last["bits_per_byte"] == pytest.approx(expected)


def test_the_same_command_again_has_nothing_to_do(trained):
    """Seen to catch: `evaluated_step` not restored, which evaluates the finished run once more."""
    folder, _ = trained
    before = curve(folder / "run")
    done = megascale("train", folder / "run.yaml", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert curve(folder / "run") == before


def test_text_baselines_and_report_come_from_the_run_alone(trained):
    folder, _ = trained
    first, second = (
        megascale("generate", folder / "run", "--prompt", "the", "--max-tokens", "12", "--seed", "5") for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("the")
    assert megascale("baselines", folder / "run").returncode == 0
    fit = json.loads((folder / "run/baselines.json").read_text())[0]
    assert fit["step"] == 6
    assert fit["num_tokens"] == read_metrics(folder / "run")[-2]["tokens_seen"]
    assert fit["losses"]["trigram"] <= fit["losses"]["unigram"]
    assert megascale("report", folder / "run").returncode == 0
    assert "trigram" in (folder / "run/report.html").read_text()


def test_the_checkpoint_says_what_it_is(trained):
    folder, _ = trained
    index = peek_checkpoint(LocalStore(folder / "run")).index
    assert index.state.step == 6
    assert index.state.rows == 6 * 8
    assert index.run.config["model"]["num_kv_heads"] == 2
    assert set(index.run.stream.corpora) == set(index.run.validation) == {ONLY_CORPUS}
    assert index.state.ledger[ONLY_CORPUS].rows == index.state.rows
    assert index.tensors["exp_avg/embedding.tokens.weight"].shape == (320, 32)


def test_another_layout_goes_on_with_the_same_run(trained):
    """More steps, another ZeRO stage and another number of ranks: the state is read in boxes, whoever wrote them."""
    folder, _ = trained
    done = megascale(
        "train", folder / "run.yaml", "train.max_steps=8", "parallel.zero_stage=3", "train.micro_batch_size=4",
        "--nproc", "1",
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert [line["step"] for line in read_metrics(folder / "run") if line["kind"] == "train"] == list(range(1, 9))
