"""Bad input: one message with what was asked, the numbers, the rule and the file; exit code 2; nothing written."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_tools.write_shards import write_index, write_shards
from megascale.checkpoint.lease import RunLease
from megascale.data.manifest import load_manifest
from megascale.errors import EXIT_USER
from tests.support.tiny_run import megascale, write_config

CONFIG_FAULTS = {
    "misspelt key": (["train.max_stesp=3"], ["run.yaml: unknown key `train.max_stesp`", "did you mean `max_steps`?"]),
    "misspelt section": (["trian.max_steps=3"], ["run.yaml: unknown key `trian`", "did you mean `train`?"]),
    "wrong type": (["train.max_steps=ten"], ["run.yaml: train.max_steps = 'ten' (str)", "valid integer"]),
    "not finite": (["optimizer.learning_rate=.inf"], ["run.yaml: optimizer.learning_rate = inf", "finite number"]),
    "no such choice": (["parallel.zero_stage=5"], ["run.yaml: parallel.zero_stage = 5", "0, 1, 2 or 3"]),
    "no override": (["max_steps"], ["override `max_steps` is not of the form section.key=value"]),
    "tp and heads": (
        ["parallel.tp=3"], ["run.yaml: parallel.tp = 3 does not divide model.num_heads = 2; use one of 1, 2"],
    ),
    "heads and width": (
        ["model.num_heads=5"],
        ["run.yaml: model.num_heads = 5 does not divide model.d_model = 32; use one of 1, 2, 4, 8, 16, 32"],
    ),
    "batch": (
        ["train.global_batch_tokens=250"],
        ["run.yaml: train.global_batch_tokens = 250 is not a multiple", "micro_batch_size 2 x seq_len 32 x dp 2 = 128",
         "the nearest are 128 or 256"],
    ),
    "positions": (
        ["train.seq_len=64"],
        ["run.yaml: train.seq_len = 64 is longer than model.max_seq_len = 32", "use at most 32"],
    ),
    "vocabulary": (
        ["model.vocab_size=32"],
        ["the corpus has 64 token ids, model.vocab_size = 32 is smaller", "set model.vocab_size to 64 or more",
         "corpus/train/index.json"],
    ),
    "corpus": (["data.folder=/no/such"], ["no corpus at /no/such", "megascale data build SOURCE --out /no/such"]),
    "folder name": (["run.folder=''"], ["run.yaml: run.folder = ''", "at least 1 character"]),
    "no ranks": (["--nproc", "0"], ["--nproc 0: this machine has", "use 1 to"]),
    "many ranks": (["--nproc", "100000"], ["--nproc 100000: this machine has", "use 1 to"]),
    "ranks in words": (["--nproc", "two"], ["--nproc", "valid integer"]),
}
"""(arguments, parts of the message) by fault."""


@pytest.fixture
def config(corpus, tmp_path) -> Path:
    return write_config(tmp_path, corpus)


@pytest.fixture
def own_corpus(corpus, tmp_path) -> Path:
    """A copy of the corpus to damage, which the test's config reads."""
    shutil.copytree(corpus, tmp_path / "corpus")
    write_config(tmp_path, tmp_path / "corpus")
    return tmp_path / "corpus"


def listing(folder: Path) -> dict[str, bytes | None]:
    """All that a folder holds."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check_refused(arguments: list, parts: list[str], watched: Path) -> None:
    """One message with all parts in it, exit code 2, no traceback, and the watched folder as it was."""
    before = listing(watched)
    done = megascale(*arguments)
    assert done.returncode == EXIT_USER, done.stderr
    check_message(done.stderr, parts)
    assert listing(watched) == before


def check_message(text: str, parts: list[str]) -> None:
    assert len(re.findall(r"^error: |─ Error ─", text, re.MULTILINE)) == 1, text
    assert "Traceback" not in text
    assert "see its own message" not in text
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_or_call_that_cannot_run(fault, config, tmp_path):
    """Mutation seen to be caught: unknown keys are ignored."""
    arguments, parts = CONFIG_FAULTS[fault]
    nproc = [] if "--nproc" in arguments else ["--nproc", "2"]
    check_refused(["train", config, *arguments, *nproc], parts, tmp_path)


def test_a_config_file_that_is_none(tmp_path):
    for name, text, parts in (
        ("missing.yaml", None, ["missing.yaml: can't be read as a config file", "No such file"]),
        ("twice.yaml", "run: {name: a, name: b}\n", ["twice.yaml: key `name` stands twice, in lines 1 and 1"]),
        ("code.yaml", "run: !!python/object/apply:os.system [ls]\n", ["code.yaml: not valid YAML"]),
        ("list.yaml", "- 1\n", ["list.yaml: holds list, not sections"]),
    ):
        if text:
            (tmp_path / name).write_text(text)
        check_refused(["train", tmp_path / name], parts, tmp_path)


@pytest.mark.parametrize("fault", ["tokenizer missing", "tokenizer changed", "shard missing", "shard cut short",
                                   "index torn", "split missing"])
def test_a_corpus_that_is_incomplete(fault, own_corpus, tmp_path):
    """Found before any rank starts. Mutation seen to be caught: sizes of shards aren't compared."""
    tokenizer = own_corpus / "tokenizer.json"
    shard = sorted((own_corpus / "train").glob("*.tar"))[1]
    index = own_corpus / "train" / "index.json"
    if fault == "tokenizer missing":
        tokenizer.unlink()
        parts = [f"tokenizer {tokenizer} is missing", "restore it or build the corpus again"]
    elif fault == "tokenizer changed":
        tokenizer.write_text(tokenizer.read_text() + " ")
        parts = [f"tokenizer {tokenizer} isn't the one that made the tokens", "sha256"]
    elif fault == "shard missing":
        shard.unlink()
        parts = [f"shard {shard} can't be opened (No such file", "restore it or build the corpus again"]
    elif fault == "shard cut short":
        size = shard.stat().st_size
        shard.write_bytes(shard.read_bytes()[:-100])
        parts = [f"shard {shard} has {size - 100} bytes", f"index.json says {size}", "cut short"]
    elif fault == "index torn":
        index.write_bytes(index.read_bytes()[:100])
        parts = [f"{index} can't be read", "restore it, or make it again from the shards"]
    else:
        index.unlink()
        parts = [f"{own_corpus} holds no finished split 'train'", "splits found: validation"]
    check_refused(["train", tmp_path / "run.yaml", "--nproc", "2"], parts, tmp_path)


def test_a_flipped_bit_in_a_shard_is_named_when_it_is_read(own_corpus, tmp_path):
    """Training goes on to the damaged block; the earlier checkpoints stay, and none holds what came of it.

    Mutation seen to be caught: the checksums aren't compared.
    """
    shard = sorted((own_corpus / "train").glob("*.tar"))[1]
    content = bytearray(shard.read_bytes())
    for place in range(1024, load_manifest(str(own_corpus), "train").shard(1).index_offset - 2048, 512):
        content[place + 100] ^= 4
    shard.write_bytes(content)
    done = megascale("train", tmp_path / "run.yaml", "train.max_steps=28", "--nproc", "2")
    assert done.returncode == EXIT_USER, done.stderr
    check_message(done.stderr, [f"error: shard {shard}: block ", "crc32 of the tokens is", "expected",
                                f"megascale data verify {own_corpus}"])


def test_a_token_outside_the_vocabulary_is_named_when_it_is_read(own_corpus, tmp_path):
    """The checksums are right: the corpus was made so. Mutation seen to be caught: token ids aren't compared."""
    index, folder = load_manifest(str(own_corpus), "validation").index, own_corpus / "validation"
    shutil.rmtree(folder)
    documents = [np.append(np.arange(1, 60), 0), np.append(np.arange(1, 90), 0)]
    shards = write_shards(folder, documents, np.dtype("<u2"), 2048, 512)
    kept = ("split", "dtype", "vocab_size", "eos_id", "text_bytes", "tokenizer_file", "tokenizer_sha256")
    write_index(folder, shards, **index.model_dump(include=set(kept)))
    done = megascale("train", tmp_path / "run.yaml", "--nproc", "2")
    assert done.returncode == EXIT_USER, done.stderr
    check_message(done.stderr, [f"shard {folder}", "block 0 holds token id 89, vocab_size = 64"])


def test_fewer_rows_than_a_batch(config, tmp_path):
    parts = ["corpus/train/index.json: 225 rows of seq_len = 32, fewer than the 512 rows of one step",
             "set train.global_batch_tokens to 7168 or less"]
    check_refused(["train", config, "train.global_batch_tokens=16384", "--nproc", "2"], parts, tmp_path)


def test_a_run_folder_that_cannot_be_one(config, tmp_path):
    (tmp_path / "file").write_text("kept")
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "sub", "Not a directory")):
        parts = [f"{folder}: can't make the run folder: {why}; set run.folder"]
        check_refused(["train", config, f"run.folder={folder}", "--nproc", "2"], parts, tmp_path)


def test_two_runs_on_one_folder(config, tmp_path):
    """This process holds the folder.

    Mutations seen to be caught: the lock isn't asked; ranks end through the interpreter, where torch aborts.
    """
    (tmp_path / "run").mkdir()
    with RunLease.take(tmp_path / "run"):
        parts = [f"{tmp_path / 'run'}: is in use by process", "give this one another run.folder"]
        check_refused(["train", config, "--nproc", "2"], parts, tmp_path)


@pytest.mark.parametrize(("arguments", "part"), [
    (["--temperature", "-1"], "temperature = -1.0 is no finite number from 0 up; use 0"),
    (["--temperature", "nan"], "temperature = nan is no finite number from 0 up; use 0"),
    (["--top-k", "0"], "top_k = 0 keeps no token; use at least 1"),
    (["--top-p", "1.5"], "top_p = 1.5 is not a share of the probability; use more than 0, at most 1"),
    (["--max-tokens", "0"], "greater than or equal to 1"),
])
def test_sampling_that_means_nothing(arguments, part, clean):
    check_refused(["generate", clean, *arguments], [part], clean)


@pytest.mark.parametrize(("command", "parts"), [
    ("generate", ["is no run folder: it has no run.json"]),
    ("eval", ["is no run folder: it has no run.json"]),
    ("report", ["metrics.jsonl has no metrics to report"]),
    ("baselines", ["no run here has logged a step; train it first"]),
])
def test_a_folder_without_a_run(command, parts, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        check_refused([command, tmp_path / name], [str(tmp_path / name), *parts], tmp_path)


def test_check_refuses_what_train_refuses(config, tmp_path):
    check_refused(["check", config, "--nproc", "-1"], ["--nproc -1: use 1 or more"], tmp_path)
    check_refused(["check", config, "train.seq_len=64"], ["longer than model.max_seq_len = 32"], tmp_path)
