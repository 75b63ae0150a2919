"""Scores: hits of a head, the bridge to lm-evaluation-harness, and graphs in ONNX."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError
from megascale.export.onnx_export import Logits, check_family, check_graph, write_graph
from megascale.model.context import build_context
from megascale.model.transformer import build_model
from megascale.train.eval_run import Score, describe
from megascale.train.harness import HarnessModel, as_harness_class, check_tasks

CONFIG = ModelConfig(
    family="llama", num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, vocab_size=61, max_seq_len=16,
    window=6, init_std=0.3,
)
MODEL = build_model(CONFIG, seed=1).eval()


def tokenizer() -> Tokenizer:
    """Token n is the word `wn`, token 0 the end of a text."""
    words = Tokenizer(models.WordLevel({"END": 0, **{f"w{n}": n for n in range(1, 61)}}, "END"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return words


@pytest.fixture
def answers():
    """What the harness would ask, through a class of its kind."""
    class Base:
        """Stands for `lm_eval.api.model.LM`."""

    return as_harness_class(Base)(HarnessModel(MODEL, tokenizer(), end=0))


def asked(*args) -> list[SimpleNamespace]:
    """One request of the harness."""
    return [SimpleNamespace(args=args)]


@torch.no_grad()
def logprobs(tokens: list[int]) -> torch.Tensor:
    """Log-probability of every token after the first."""
    logits = MODEL(torch.tensor([tokens[:-1]]))[0].log_softmax(dim=-1)
    return logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_hits_are_labels_with_the_largest_logit():
    """Mutation that must fail it: positions without a label are counted."""
    tokens_BT = torch.randint(0, 61, (3, 16), generator=torch.Generator().manual_seed(0))
    context = build_context(CONFIG, 16, tokens_BT.device)
    with torch.no_grad():
        labels_BT = MODEL(tokens_BT).argmax(dim=-1)
        labels_BT[0, :5] = -100
        labels_BT[1] = (labels_BT[1] + 1) % 61
        hidden = tokens_BT
        for layer in MODEL.layers[:-1]:
            hidden = layer(hidden, context)
        hits, total = MODEL.layers[-1].count_hits(hidden, context, labels_BT)
    assert (int(hits), int(total)) == (27, 43)


def test_a_score_of_images_names_its_first_and_its_five_first_choices():
    score = Score(1.5, 8, perplexity=None, accuracy=0.25, bits_per_byte=None, exact_match=None, top5=0.75)
    assert describe(score, "top-1") == "loss 1.5000, top-1 25.00%, top-5 75.00%, 8 labels"
    assert "top-5" not in describe(replace(score, top5=None), "top-1")


def test_a_continuation_has_the_sum_of_its_tokens(answers):
    ((found, is_greedy),) = answers.loglikelihood(asked("w3 w4 w5", " w6 w7"))
    assert found == pytest.approx(logprobs([3, 4, 5, 6, 7])[-2:].sum().item(), rel=1e-5)
    assert not is_greedy
    best = int(MODEL(torch.tensor([[3, 4, 5]]))[0, -1].argmax())
    assert answers.loglikelihood(asked("w3 w4 w5 ", f"w{best}"))[0][1]
    ((found, _),) = answers.loglikelihood(asked("", "w9"))
    assert found == pytest.approx(logprobs([0, 9])[0].item(), rel=1e-5)


def test_of_a_long_context_the_end_is_seen(answers):
    """Mutation that must fail it: the window is cut at the right."""
    words = [1 + index % 60 for index in range(30)]
    ((found, _),) = answers.loglikelihood(asked(" ".join(f"w{n}" for n in words), " w2 w3"))
    assert found == pytest.approx(logprobs([*words, 2, 3][-17:])[-2:].sum().item(), rel=1e-5)


def test_a_text_is_scored_once_in_windows(answers):
    """Mutation that must fail it: a window doesn't see the token before it."""
    words = [1 + 7 * index % 60 for index in range(21)]
    (found,) = answers.loglikelihood_rolling(asked(" ".join(f"w{n}" for n in words)))
    expected = logprobs([0, *words[:16]]).sum() + logprobs(words[15:]).sum()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_an_answer_ends_before_what_ends_it(answers):
    (free,) = answers.generate_until(asked("w3 w4", {"until": [], "max_gen_toks": 6}))
    words = free.split()
    assert len(words) == 6
    (cut,) = answers.generate_until(asked("w3 w4", {"until": [words[3]], "max_gen_toks": 6}))
    assert cut == free[: free.index(words[3])]


def test_a_task_that_is_not_there_is_named(tmp_path):
    (tmp_path / "own.yaml").touch()
    check_tasks(["lambada_openai", str(tmp_path / "own.yaml")], ["hellaswag", "lambada_openai"])
    with pytest.raises(ConfigError, match=r"--tasks lambada: .*; did you mean lambada_openai\?"):
        check_tasks(["lambada"], ["hellaswag", "lambada_openai"])
    with pytest.raises(ConfigError, match=r"--tasks gone\.yaml: .*no such YAML file; lm-eval ls tasks lists them"):
        check_tasks(["gone.yaml"], ["hellaswag", "lambada_openai"])


def test_a_graph_computes_what_the_model_does(tmp_path):
    """Another number of rows and positions than traced, beyond the window."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    write_graph(MODEL, tmp_path / "model.onnx")
    check_graph(MODEL, tmp_path / "model.onnx")


def test_the_function_of_a_graph_is_the_model():
    """With a window shorter than the text."""
    tokens_BT = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(Logits(MODEL)(tokens_BT), MODEL(tokens_BT)[..., :61], rtol=0, atol=1e-4)


def test_what_is_no_decoder_is_refused():
    config = ModelConfig(
        family="t5", num_layers=1, d_model=32, num_heads=4, vocab_size=61, max_seq_len=16
    )
    with pytest.raises(ConfigError, match="family t5 isn't a dense decoder"):
        check_family(config)
