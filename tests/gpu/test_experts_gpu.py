"""The grouped product of experts on a CUDA device, against their products one after the other in fp32."""

import pytest
import torch

from megascale.model.moe.experts import GroupedLinear, has_grouped_kernel

pytestmark = [
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("counts", [[100, 0, 156], [0, 0, 256], [1, 254, 1]])
@pytest.mark.parametrize("width", [64, 68])
def test_forward_and_backward_equal_the_loop(counts, width):
    """In bf16, where each number has 8 bits: within 2 % of the largest. 68 is a width that the kernel doesn't take."""
    device = torch.device("cuda")
    layer = GroupedLinear(3, 128, 2, width // 2).to(device)
    torch.nn.init.normal_(layer.weight, std=0.1)
    tokens, counts_e = torch.randn(256, 128, device=device), torch.tensor(counts, device=device)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        layer = layer.to(dtype)
        layer.weight.grad = None
        inputs = tokens.to(dtype, copy=True).requires_grad_()
        if dtype == torch.bfloat16:
            assert has_grouped_kernel(inputs, width) == (width == 64 and torch.cuda.get_device_capability() >= (9, 0))
        outputs = layer(inputs, counts_e)
        outputs.float().square().sum().backward()
        results.append((outputs, inputs.grad, layer.weight.grad))
    for looped, grouped in zip(*results, strict=True):
        assert (grouped.float() - looped.float()).abs().max() <= 0.02 * looped.float().abs().max()
