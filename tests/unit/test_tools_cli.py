"""`megascale data` from the command line: build, verify, inspect; and verify's eye for damage."""

import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.verify import verify_corpus
from megascale.data.manifest import load_manifest, read_tokenizer
from megascale.errors import DataError
from tests.support.corpus import QUIET, make_corpus, make_text, make_text_corpus


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_build_verify_inspect(tmp_path):
    text, out = make_text(tmp_path / "text"), tmp_path / "out"
    options = ["--vocab-size", 300, "--validation-fraction", 0.2, "--shard-tokens", 4000, "--workers", 1]
    assert f"corpus {out}: built" in run("build", text, "--out", out, *options)
    assert "found finished, nothing to do" in run("build", text, "--out", out, *options)
    assert "documents: good" in run("verify", out)
    shown = run("inspect", out, "--row", 0, "--seq-len", 40)
    assert "epoch 0, shard-000000.tar, row 0: 41 tokens in 1 pieces" in shown
    assert "return" in run("inspect", out, "--row", 100_000, "--seq-len", 300, "--seed", 1)


def test_tokenizer_and_tokenize(tmp_path):
    text = make_text(tmp_path / "text")
    run("tokenizer", text, "--out", tmp_path / "t" / "tokenizer.json", "--vocab-size", 280, "--pattern", "*.txt")
    tokenizer, fraction = tmp_path / "t" / "tokenizer.json", ["--validation-fraction", 0.2]
    run("tokenize", text, "--tokenizer", tokenizer, "--out", tmp_path / "out", "--workers", 1, *fraction)
    manifest = load_manifest(tmp_path / "out", "train")
    assert manifest.vocab_size == 280
    assert read_tokenizer(manifest) == tokenizer.read_bytes()


def test_array_and_merge(tmp_path, monkeypatch):
    text, tokenizer, out = make_text(tmp_path / "text"), tmp_path / "tokenizer.json", tmp_path / "out"
    run("tokenizer", text, "--out", tokenizer, "--vocab-size", 280, "--special-token", "<|fim_prefix|>")
    run("tokenizer", "--from", tokenizer, "--special-token", "<|fim_prefix|>", "--out", tmp_path / "taken.json")
    assert (tmp_path / "taken.json").read_bytes() == tokenizer.read_bytes()
    monkeypatch.setattr("data_tools.chunks.MIN_CHUNK_BYTES", 3000)
    options = ["--tokenizer", tokenizer, "--out", out, "--workers", 1, "--validation-fraction", 0.2, "--no-fast"]
    run("tokenize", text, *options, "--array", "1/2")
    for name, value in {"ID": 0, "MIN": 0, "MAX": 1, "COUNT": 2}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert "tokenized by tokenizers, as asked" in run("tokenize", text, *options, "--array", "slurm")
    assert f"corpus {out}: " in run("merge", out)
    assert "documents: good" in run("verify", out)
    with pytest.raises(DataError, match=r"--overwrite with --array would let a part remove others; remove .*out"):
        run("tokenize", text, *options, "--array", "0/2", "--overwrite")
    with pytest.raises(DataError, match=r"give either a SOURCE to train a tokenizer on, or --from TOKENIZER"):
        run("tokenizer", text, "--from", tokenizer, "--out", tmp_path / "other.json")


def test_inspect_refuses_a_row_that_is_not_there(tmp_path):
    folder = make_corpus(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"--row 9999 is not in 0 .. \d+, the rows of .*train"):
        run("inspect", folder, "--row", 9999)


def test_verify_names_every_damaged_shard(tmp_path):
    folder = make_text_corpus(tmp_path / "corpus")
    shards = sorted((folder / "train").glob("*.tar"))
    assert len(verify_corpus(folder, QUIET)) == 2
    content = bytearray(shards[0].read_bytes())
    content[2000] ^= 1
    shards[0].write_bytes(content)
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    with pytest.raises(DataError) as caught:
        verify_corpus(folder, QUIET)
    first, *faults = str(caught.value).splitlines()
    assert first.startswith("2 of ")
    assert [shards[number].name in fault for number, fault in enumerate(faults)] == [True, True]


@pytest.mark.parametrize("offset", [0, 30, 155, 512, 640])
def test_verify_finds_a_flipped_bit_anywhere(tmp_path, offset):
    """In a header's name, mode or checksum, a .npy header, the data: caught by sha256 if by nothing else."""
    folder = make_corpus(tmp_path / "corpus")
    path = folder / "train" / "shard-000000.tar"
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"1 of \d+ shards .* are damaged:\nshard .*shard-000000.tar"):
        verify_corpus(folder, QUIET)
