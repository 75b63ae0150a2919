"""Generation: deterministic by seed, right for uneven prompts, stopped at the end of text."""

import pytest
import torch

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError, DataError
from megascale.model.generate import Sampling, draw_token, generate
from megascale.model.transformer import build_model

CONFIG = ModelConfig(
    family="llama", num_layers=2, d_model=32, num_heads=2, vocab_size=50, max_seq_len=8, init_std=0.4, dropout=0.5
)
MODEL = build_model(CONFIG, seed=1).eval()
GREEDY = Sampling(temperature=0)


def continuations(prompts, max_new_tokens=6, sampling=GREEDY, **options):
    """The rows of a generation, each as its list of new tokens."""
    return [list(row) for row in zip(*generate(MODEL, prompts, max_new_tokens, sampling, **options), strict=True)]


def test_greedy_takes_the_likeliest_token_of_the_window():
    prompt = [1, 2, 3, 4, 5, 6]
    (tokens,) = continuations([prompt])
    for count, token in enumerate(tokens):
        window = (prompt + tokens[:count])[-8:]
        assert token == MODEL(torch.tensor([window]))[0, -1].argmax()


def test_uneven_prompts_are_continued_as_if_alone():
    """Caught by a mutation that reads each row's logits at the last column."""
    prompts = [[1], [7, 8, 9], [5, 4, 3, 2, 1, 0, 9, 8, 7, 6]]
    assert continuations(prompts) == [continuations([prompt])[0] for prompt in prompts]


def test_seed_decides_every_draw():
    first = continuations([[1, 2], [3]], sampling=Sampling(seed=4))
    torch.rand(5)
    assert first == continuations([[1, 2], [3]], sampling=Sampling(seed=4))
    assert first != continuations([[1, 2], [3]], sampling=Sampling(seed=5))
    assert first[0] == continuations([[1, 2]], sampling=Sampling(seed=4))[0]


def test_rows_stop_at_the_end_of_text():
    prompts = [[1, 2, 3], [9, 9]]
    free = continuations(prompts)
    eos_token = free[0][2]
    stopped = continuations(prompts, eos_token=eos_token)
    end = free[0].index(eos_token) + 1
    assert stopped[0] == (free[0][:end] + [None] * 6)[: len(stopped[0])]
    assert continuations([prompts[0]], eos_token=eos_token) == [free[0][:end]]


def test_tokens_come_as_they_are_drawn():
    stream = generate(MODEL, [[1]], 1000, GREEDY)
    assert [len(next(stream)) for _ in range(3)] == [1, 1, 1]


def test_padded_ids_are_never_drawn():
    rows = continuations([[1]] * 4, max_new_tokens=50, sampling=Sampling(temperature=50.0))
    assert max(max(row) for row in rows) < 50


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {0, 2}),
        (Sampling(top_k=1), {2}),
        (Sampling(top_p=0.45), {2}),
        (Sampling(top_p=0.6), {0, 2}),
        (Sampling(top_p=0.001), {2}),
        (Sampling(top_k=3, top_p=0.99), {0, 1, 2}),
        (Sampling(top_k=100, top_p=1.0), {0, 1, 2, 3}),
    ],
)
def test_truncation(sampling, allowed):
    logits_V = torch.tensor([0.3, 0.15, 0.5, 0.05]).log()
    generator = torch.Generator().manual_seed(1)
    assert {draw_token(logits_V, sampling, generator) for _ in range(300)} == allowed


def test_draws_follow_the_distribution_and_temperature():
    logits_V = torch.tensor([0.1, 0.6, 0.3]).log()
    generator = torch.Generator().manual_seed(1)
    draws = torch.tensor([draw_token(logits_V, Sampling(), generator) for _ in range(3000)])
    torch.testing.assert_close(draws.bincount() / 3000, logits_V.exp(), rtol=0, atol=0.04)
    cold = [draw_token(logits_V, Sampling(temperature=0.05), generator) for _ in range(100)]
    assert set(cold) == {1}


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name} = "):
        Sampling(**values)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 1 is empty"), ([[1, 50]], "holds token 50"), ([[-1]], "holds token -1")],
)
def test_impossible_prompts_are_refused(prompts, message):
    with pytest.raises(DataError, match=message):
        list(generate(MODEL, prompts, 1))
