"""The loss: sums and counts, ignored labels, fp32, and a padded vocabulary that changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from megascale.config.model import ModelConfig
from megascale.model.loss import token_loss
from megascale.model.transformer import build_model
from megascale.optim.optimizer import build_adamw, parameter_groups

SHAPE = {"num_layers": 1, "d_model": 32, "num_heads": 2, "vocab_size": 50, "max_seq_len": 16}


def test_sum_and_count_over_labels():
    logits_BTV = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    labels_BT = torch.tensor([[1, -100, 3], [-100, 7, 0]])
    nll_sum, num_labels = token_loss(logits_BTV, labels_BT)
    expected = sum(-logits_BTV[b, t].log_softmax(0)[labels_BT[b, t]] for b, t in ((0, 0), (0, 2), (1, 1), (1, 2)))
    assert nll_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    assert num_labels.item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_the_plain_loss_and_gradient(dtype):
    """600 rows of 1000 are three chunks, the last one short; -inf stands for padding."""
    generator = torch.Generator().manual_seed(1)
    logits_BTV = torch.randn(2, 300, 1000, generator=generator).to(dtype)
    logits_BTV[..., 990:] = float("-inf")
    logits_BTV.requires_grad_()
    labels_BT = torch.randint(0, 990, (2, 300), generator=generator)
    labels_BT[:, ::7] = -100
    nll_sum, _ = token_loss(logits_BTV, labels_BT)
    expected = F.cross_entropy(logits_BTV.flatten(0, 1).float(), labels_BT.flatten(), reduction="sum")
    assert nll_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    ours, theirs = (torch.autograd.grad(loss * 0.1, logits_BTV)[0] for loss in (nll_sum, expected))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=1e-7)


def test_a_label_outside_the_vocabulary_is_an_error():
    with pytest.raises(RuntimeError):
        token_loss(torch.randn(1, 2, 8), torch.tensor([[1, -5]]))


def test_no_label_at_all_is_zero_not_nan():
    nll_sum, num_labels = token_loss(torch.randn(1, 2, 8), torch.full((1, 2), -100))
    assert (nll_sum.item(), num_labels.item()) == (0.0, 0)


def test_half_precision_logits_are_summed_in_fp32():
    logits_BTV = torch.randn(4, 500, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    labels_BT = torch.zeros(4, 500, dtype=torch.int64)
    nll_sum, _ = token_loss(logits_BTV, labels_BT)
    assert nll_sum.dtype == torch.float32
    assert nll_sum.item() == pytest.approx(token_loss(logits_BTV.float(), labels_BT)[0].item(), rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_padding_never_changes_a_step(family):
    """Caught by a mutation that leaves the padded logits at 0: loss, gradients and padded rows all differ."""
    tokens_BT = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    results = {}
    for multiple in (1, 64):
        model = build_model(ModelConfig(family=family, vocab_multiple=multiple, **SHAPE), seed=1)
        with torch.no_grad():  # the draw of a table depends on its size: begin from the same rows
            for parameter in model.parameters():
                if parameter.shape[0] in (50, 64) and parameter.dim() == 2:
                    parameter[:50] = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)) * 0.02
        groups = parameter_groups(model.named_parameters(), 0.1, lambda name: True)
        optimizer = build_adamw(groups, learning_rate=0.01, beta1=0.9, beta2=0.95, eps=1e-8)
        for _ in range(3):
            nll_sum, num_labels = token_loss(model(tokens_BT[:, :-1]), tokens_BT[:, 1:])
            optimizer.zero_grad()
            (nll_sum / num_labels).backward()
            optimizer.step()
        results[multiple] = (nll_sum.item(), model)
    assert results[64][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, parameter in results[64][1].named_parameters():
        exact = results[1][1].get_parameter(name)
        if parameter.shape != exact.shape:
            assert not parameter[50:].any()
            assert not parameter.grad[50:].any()
        torch.testing.assert_close(parameter[: len(exact)], exact, rtol=0, atol=2e-5)
