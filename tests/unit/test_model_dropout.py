"""Dropout: its mask depends on (seed, step, row, site, position, feature) and on nothing else."""

import pytest
import torch

from megascale.config.model import ModelConfig
from megascale.model.context import build_context
from megascale.model.dropout import Dropout, derive_row_keys, mix_32, mix_64, random_bits
from megascale.model.transformer import build_model

CONFIG = ModelConfig(family="gpt2", num_layers=2, d_model=256, num_heads=4, vocab_size=64, max_seq_len=64, dropout=0.1)


def mask_of(rows, seed=1, step=2, site="blocks.0.attention", probability=0.1, num_positions=64, features=256):
    """Which features are kept, for rows of ones."""
    ones_BTD = torch.ones(len(rows), num_positions, features)
    row_keys_B = derive_row_keys(torch.tensor(rows), seed, step)
    context = build_context(CONFIG, num_positions, ones_BTD.device, row_keys_B=row_keys_B)
    return Dropout(probability, site)(ones_BTD, context)


def test_a_row_is_masked_alike_in_any_batch_and_length():
    """Caught by a mutation that hashes the index in the batch instead of the row's number."""
    together = mask_of([3, 8, 2**40])
    assert torch.equal(together[1:2], mask_of([8]))
    assert torch.equal(together[[2, 0]], mask_of([2**40, 3]))
    assert torch.equal(together[:, :10], mask_of([3, 8, 2**40], num_positions=10))


def test_any_other_key_gives_an_unrelated_mask():
    """Caught by mutations that leave out the seed, the step, the row or the site."""
    masks = [mask_of([3]), mask_of([4]), mask_of([3], seed=2), mask_of([3], step=3), mask_of([3], site="embedding")]
    masks += [mask_of([3]).roll(shift, dims=dim) for shift, dim in ((1, 1), (1, 2), (-1, 1), (-1, 2))]
    kept = torch.stack([(mask > 0).flatten().float() for mask in masks])
    correlation = torch.corrcoef(kept) - torch.eye(len(masks))
    assert correlation.abs().max() < 0.04  # 5 standard deviations of 16,384 samples


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_rate_and_mean(probability):
    masked = mask_of([1, 2, 3, 4], probability=probability)
    kept_fraction = (masked > 0).float().mean().item()
    assert kept_fraction == pytest.approx(1 - probability, abs=0.006)
    assert set(masked.unique().tolist()) <= {0.0, 1.0, torch.tensor(1 / (1 - probability)).item()}
    for dim in (0, 1, 2):  # no row, position or feature is favoured
        fractions = (masked > 0).float().mean(dim=[d for d in range(3) if d != dim])
        assert (fractions - (1 - probability)).abs().max() < 0.1


def test_bits_are_even():
    bits = random_bits(torch.tensor([5, 6]), torch.arange(64), 512, torch.tensor(7))
    ones = torch.stack([(bits >> shift) & 1 for shift in range(32)]).float().mean(dim=(1, 2, 3))
    assert (ones - 0.5).abs().max() < 0.01


def test_mixes_are_permutations_and_avalanche():
    for mix, dtype, width in ((mix_64, torch.int64, 64), (mix_32, torch.int32, 32)):
        values = torch.arange(1 << 16, dtype=dtype) - (1 << 15)
        assert len(mix(values).unique()) == len(values)
        for bit in (0, 1, width // 2, width - 2):
            flipped = mix(values) ^ mix(values ^ (1 << bit))
            rates = torch.stack([(flipped >> shift) & 1 for shift in range(width)]).float().mean(dim=1)
            assert (rates - 0.5).abs().max() < 0.05


def test_eval_mode_and_rate_0_change_nothing():
    hidden_BTD = torch.randn(2, 3, 256)
    context = build_context(CONFIG, 3, hidden_BTD.device)
    assert Dropout(0.5, "site").eval()(hidden_BTD, context) is hidden_BTD
    assert Dropout(0.0, "site")(hidden_BTD, context) is hidden_BTD
    with pytest.raises(ValueError, match="row_keys_B"):
        Dropout(0.5, "site")(hidden_BTD, context)


def test_whole_model_is_a_function_of_rows_not_of_call_order():
    model = build_model(CONFIG, seed=1)
    tokens_BT = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    keys_B = derive_row_keys(torch.tensor([10, 11, 12, 13]), seed=5, step=7)

    def logits(rows):
        return model(tokens_BT[rows], build_context(CONFIG, 16, tokens_BT.device, row_keys_B=keys_B[rows]))

    whole = logits([0, 1, 2, 3])
    torch.rand(17)
    torch.testing.assert_close(torch.cat((logits([2, 3]), logits([1]))), whole[[2, 3, 1]], rtol=0, atol=1e-5)
    assert not torch.allclose(whole, model.eval()(tokens_BT))


def test_a_cast_model_drops_the_same_features():
    """The site's key is an integer, which a cast to bf16 must leave alone."""
    dropout = Dropout(0.5, "site")
    ones_BTD = torch.ones(2, 8, 64)
    context = build_context(CONFIG, 8, ones_BTD.device, row_keys_B=torch.tensor([1, 2]))
    assert torch.equal(dropout(ones_BTD, context) > 0, dropout.bfloat16()(ones_BTD.bfloat16(), context) > 0)
    assert dropout.state_dict() == {}
