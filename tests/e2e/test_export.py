"""`megascale export` through the command line, of a run that was trained."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.tiny_run import megascale, read_metrics


def test_a_trained_run_is_exported_checked_and_loads(clean, tmp_path):
    done = megascale("export", clean, "--format", "hf", "--out", tmp_path / "hf", "--max-shard-size", "20KB")
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'hf'}: step 12" in done.stdout
    assert "transformers gives the checkpoint's logits" in done.stdout
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    tokenizer, model = (kind.from_pretrained(tmp_path / "hf") for kind in (AutoTokenizer, AutoModelForCausalLM))
    prompt = tokenizer("w1 w2", return_tensors="pt")["input_ids"]
    drawn = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :]
    ours = megascale("generate", clean, "--prompt", "w1 w2", "--max-tokens", "5", "--temperature", "0")
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout.strip() == "w1 w2" + tokenizer.decode(drawn, skip_special_tokens=True)
    card = (tmp_path / "hf" / "README.md").read_text()
    last = read_metrics(clean)[-1]
    assert f"| validation | 12 | {last['loss']:.4f} |" in card
    assert str(clean.parent) not in card


@pytest.mark.slow
def test_an_older_step_in_half_precision_without_check(clean, tmp_path):
    done = megascale(
        "export", clean, "--format", "hf", "--out", tmp_path / "hf", "--step", "9", "--dtype", "bfloat16", "--no-check")
    assert done.returncode == 0, done.stderr
    assert "step 9" in done.stdout
    assert "logits not checked, as asked" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto").dtype == torch.bfloat16


def test_a_fault_of_the_user_is_one_message(clean, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, words in (
        (("--out", tmp_path / "full"), "isn't an empty folder"),
        (("--step", "5"), "no whole checkpoint of step 5"),
        (("--max-shard-size", "5"), "such as 5GB"),
    ):
        done = megascale("export", clean, "--format", "hf", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    assert not (clean / "export").exists()
