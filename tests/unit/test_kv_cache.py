"""Generation with a cache against generation without one, for every family that writes text; beam search likewise.

Mutations that a test was seen to catch are named with it.
"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from megascale.config.model import ModelConfig
from megascale.errors import ConfigError
from megascale.model.beam import BeamSettings, beam_search
from megascale.model.families.hf_names import to_hf
from megascale.model.generate import Cached, Recomputed, Sampling, draw_rows, generate
from megascale.model.pair_generate import PairRows
from megascale.model.transformer import Transformer, build_model

SHAPE = {"num_layers": 2, "d_model": 32, "num_heads": 4, "d_ff": 48, "vocab_size": 61, "max_seq_len": 16}
ROTARY = {"num_kv_heads": 2, "window": 5, "global_every": 2, "qk_norm": True, "attention_softcap": 5.0}
DECODERS = {
    "gpt2": {}, "gpt2, window": {"window": 4}, "llama": {"num_kv_heads": 1, "window": 3}, "llama, all": ROTARY,
    "palm": {"num_kv_heads": 1}, "moe": {"moe": {"num_experts": 4, "capacity_factor": 1.0}},
}
PROMPTS = [[1], [7, 8, 9, 10, 11, 12, 13], [5, 4, 3]]
END = 3


def build(family: str, **values) -> Transformer:
    """A tiny model with large weights, so that tokens hang on all before them."""
    config = ModelConfig.model_validate(SHAPE | {"family": family, "init_std": 0.3} | values)
    return build_model(config, seed=1).eval()


def texts(steps) -> list[list[int | None]]:
    """The rows of a generation."""
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.fixture(scope="module", params=DECODERS)
def decoder(request) -> Transformer:
    """Each decoder-only model."""
    return build(request.param.split(",")[0], **DECODERS[request.param])


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=20, seed=4)], ids=["greedy", "drawn"])
def test_tokens_are_those_without_a_cache(decoder, sampling):
    """Prompts of several lengths, through the end of the window (16) and beyond.

    Mutations that must fail it: a step's mask leaves out the window; positions are counted from the longest row's; a
    window slides without computing its keys anew.
    """
    cached, plain = (
        texts(generate(decoder, PROMPTS, 14, sampling, eos_token=END, use_cache=use_cache))
        for use_cache in (True, False)
    )
    assert cached == plain


def test_logits_are_those_without_a_cache(decoder):
    """To 1e-5 of the largest; the rows grow by tokens that the model wouldn't draw."""
    cached, plain = Cached(decoder, len(PROMPTS), 16), Recomputed(decoder)
    rows = [list(prompt) for prompt in PROMPTS]
    with torch.no_grad():
        for token in range(20, 28):
            ours, expected = cached(rows)[:, :61], plain(rows)[:, :61]
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
            rows = [[*row, token + index] for index, row in enumerate(rows)]


def test_a_step_copies_one_position_into_memory_of_fixed_size(decoder):
    cached = Cached(decoder, 1, 16)
    with torch.no_grad():
        cached([[1, 2, 3]])
        held = {name: [part.data_ptr() for part in pair] for name, pair in cached.cache._held.items()}
        cached([[1, 2, 3, 4]])
    assert held == {name: [part.data_ptr() for part in pair] for name, pair in cached.cache._held.items()}
    kv_heads = decoder.config.kv_heads
    assert {tuple(part.shape) for pair in cached.cache._held.values() for part in pair} == {(1, 16, kv_heads, 8)}


def test_bf16_rows_are_continued_as_if_alone():
    """In bf16 the order of sums shows, so rows are compared with themselves in other company of the same width."""
    model = build("llama", num_kv_heads=2).to(torch.bfloat16)
    together = texts(generate(model, [[1, 2, 3], [9, 8, 7]], 8, Sampling(temperature=0)))
    swapped = texts(generate(model, [[9, 8, 7], [1, 2, 3]], 8, Sampling(temperature=0)))
    assert together == swapped[::-1]


PAIRS = {"t5": {}, "t5, gated": {"activation": "geglu", "tie_embeddings": False}, "transformer": {}}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request) -> Transformer:
    """Each model with an encoder."""
    return build(request.param.split(",")[0], **PAIRS[request.param])


def test_a_source_is_read_once(pair):
    """An encoder-decoder with sources of several lengths, with and without a cache, beyond max_seq_len (16).

    Mutations that must fail it: the decoder sees the encoder's padding; a step's bias is that of position 0.
    """
    sources = [[*prompt, END] for prompt in PROMPTS]
    found = [
        texts(draw_rows(PairRows(pair, sources, 21, END, use_cache=use_cache), [[END]] * 3, 20, Sampling(seed=2), None))
        for use_cache in (True, False)
    ]
    assert found[0] == found[1]
    alone = PairRows(pair, [sources[1]], 13, END, use_cache=True)
    greedy = Sampling(temperature=0)
    together = PairRows(pair, sources, 13, END, use_cache=True)
    assert texts(draw_rows(together, [[END]] * 3, 12, greedy, None))[1] == texts(
        draw_rows(alone, [[END]], 12, greedy, None)
    )[0]


def test_a_row_that_ends_leaves_the_others_as_they_are(pair):
    """The first row ends long before another.

    Seen to catch: positions of a step counted by the first row.
    """
    sources = [[*prompt, END] for prompt in PROMPTS]

    def write(sources: list[list[int]], end: int | None, use_cache: bool) -> list[list[int | None]]:
        follow = PairRows(pair, sources, 13, END, use_cache=use_cache)
        return texts(draw_rows(follow, [[END]] * len(sources), 12, Sampling(seed=2), end))

    free = write(sources, None, True)
    end = free[0][2]
    assert max(len(cut(row, end)) for row in free) > 8
    for use_cache in (True, False):
        for written, whole in zip(write(sources, end, use_cache), free, strict=True):
            expected = cut(whole, end)
            assert written == expected + [None] * (len(written) - len(expected))


@pytest.fixture(scope="module")
def both_gpt2() -> tuple[Transformer, GPT2LMHeadModel]:
    """A model of ours and of transformers with the same weights."""
    ours = build("gpt2")
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=48, bos_token_id=END, eos_token_id=END,
        pad_token_id=END,
    ))
    named = {placement.name: parameter.detach() for parameter, placement in ours.placements().items()}
    wrong = theirs.load_state_dict(to_hf(ours.config, named), strict=False)
    assert wrong.missing_keys in ([], ["lm_head.weight"])
    assert not wrong.unexpected_keys
    theirs.tie_weights()
    return ours, theirs.eval()


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(3, 0.0), (4, 1.0), (5, -1.0)])
def test_a_search_gives_what_transformers_gives(both_gpt2, num_beams, length_penalty):
    """All beams in their order, with their scores, with and without a cache; END ends some of them early.

    Mutations that must fail it: the penalty is by the length without the end token; all beams are alike from the first
    step on.
    """
    ours, theirs = both_gpt2
    settings = BeamSettings(num_beams, num_beams, length_penalty)
    num_ended = 0
    for prompt in ([1, 2], [7, 8, 9], [5], [40, 3, 41, 42]):
        end = beam_search(Recomputed(ours), prompt, 8, None, settings)[1].tokens[3]  # so that some beams end
        found = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=8,
            num_beams=num_beams, num_return_sequences=num_beams, length_penalty=length_penalty, do_sample=False,
            eos_token_id=end, pad_token_id=end, return_dict_in_generate=True, output_scores=True,
        )
        expected = [cut(row[len(prompt) :].tolist(), end) for row in found.sequences]
        num_ended += sum(end in tokens for tokens in expected)
        for follow in (Cached(ours, num_beams, 16), Recomputed(ours)):
            best = beam_search(follow, prompt, 8, end, settings)
            assert [each.tokens for each in best] == expected
            assert [each.score for each in best] == pytest.approx(found.sequences_scores.tolist(), rel=1e-4)
    assert num_ended > 1


@pytest.mark.parametrize("name", ["t5", "t5, gated"])
@pytest.mark.parametrize(("num_beams", "length_penalty"), [(3, 0.0), (4, 1.0)])
def test_a_search_of_an_encoder_gives_what_transformers_gives(name, num_beams, length_penalty):
    """All beams of T5 in their order, with their scores, with and without a cache; END ends some of them early.

    Seen to catch: keys of the decoder that don't follow their beam.
    """
    ours = build("t5", **PAIRS[name])
    theirs, num_ended = their_t5(ours), 0
    settings = BeamSettings(num_beams, num_beams, length_penalty)
    for source in ([1, 2, END], [7, 8, 9, 10, 11, END], [5, END]):
        follow = PairRows(ours, [source] * num_beams, 9, END, use_cache=True)
        end = beam_search(follow, [END], 8, None, settings)[1].tokens[1]  # so that some beams end
        found = theirs.generate(
            torch.tensor([source]), attention_mask=torch.ones(1, len(source), dtype=torch.int64), max_new_tokens=8,
            num_beams=num_beams, num_return_sequences=num_beams, length_penalty=length_penalty, do_sample=False,
            eos_token_id=end, pad_token_id=end, decoder_start_token_id=END, return_dict_in_generate=True,
            output_scores=True,
        )
        expected = [cut(row[1:].tolist(), end) for row in found.sequences]
        num_ended += sum(end in tokens for tokens in expected)
        for use_cache in (True, False):
            follow = PairRows(ours, [source] * num_beams, 9, END, use_cache=use_cache)
            best = beam_search(follow, [END], 8, end, settings)
            assert [each.tokens for each in best] == expected
            assert [each.score for each in best] == pytest.approx(found.sequences_scores.tolist(), rel=1e-4)
    assert num_ended > 1


def their_t5(ours: Transformer) -> T5ForConditionalGeneration:
    """The model of transformers with the same weights."""
    config = ours.config
    theirs = T5ForConditionalGeneration(T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, layer_norm_epsilon=config.norm_eps,
        feed_forward_proj="gated-gelu" if config.is_gated else "relu", tie_word_embeddings=config.is_tied,
        dropout_rate=0.0,
    ))
    if not config.is_tied:  # transformers 5 ties a head until it has loaded another one
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.clone())
    named = {placement.name: parameter.detach() for parameter, placement in ours.placements().items()}
    assert not theirs.load_state_dict(to_hf(config, named), strict=False).unexpected_keys
    if config.is_tied:
        theirs.tie_weights()
    return theirs.eval()


def cut(tokens: list[int], end: int) -> list[int]:
    """Tokens up to the end token."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def test_a_search_of_width_one_is_greedy(both_gpt2):
    ours, _ = both_gpt2
    (found,) = beam_search(Cached(ours, 1, 16), [1, 2], 8, None, BeamSettings(1))
    assert [found.tokens] == texts(generate(ours, [[1, 2]], 8, Sampling(temperature=0)))


def test_an_encoder_is_searched_with_and_without_a_cache(pair):
    """Mutation that must fail it: the cache isn't reordered with the beams."""
    settings, source = BeamSettings(4, 4, 1.5), [[9, 8, 7, 6, END]] * 4
    cached, plain = (
        beam_search(PairRows(pair, source, 11, END, use_cache=use_cache), [END], 10, END, settings)
        for use_cache in (True, False)
    )
    assert [found.tokens for found in cached] == [found.tokens for found in plain]


@pytest.mark.parametrize("values", [{"num_beams": 0}, {"num_best": 5}, {"length_penalty": float("nan")}])
def test_impossible_searches_are_refused(values):
    (name,) = values
    with pytest.raises(ConfigError, match=f"^{name} = "):
        BeamSettings(**values)
