"""Self-attention against a plain softmax in float64: values, gradients, padding, odd head widths."""

from __future__ import annotations

import pytest
import torch

from vlmo_ray.model.attention import SelfAttention


def plain_attention(module: SelfAttention, x, bias, real):
    """One query, one head at a time; padded keys are left out of the sum."""
    batch, size, width = x.shape
    d = width // module.num_heads
    q_w, k_w, v_w = module.qkv.weight.split(width)
    rows = []
    for b in range(batch):
        keys = real[b].nonzero()[:, 0]
        for i in range(size):
            heads = []
            for h in range(module.num_heads):
                part = slice(h * d, (h + 1) * d)
                q = q_w[part] @ x[b, i] + module.q_bias[part]
                logits = torch.stack([q @ (k_w[part] @ x[b, j]) / d**0.5 + bias[h, i, j] for j in keys])
                values = torch.stack([v_w[part] @ x[b, j] + module.v_bias[part] for j in keys])
                heads.append(logits.softmax(0) @ values)
            rows.append(module.out(torch.cat(heads)))
    return torch.stack(rows).view(batch, size, width)


@pytest.mark.parametrize("num_heads", [2, 3])  # head widths 9 and 6, neither a multiple of 8
def test_equals_plain_attention_in_values_and_gradients(num_heads):
    torch.manual_seed(0)
    module = SelfAttention(18, num_heads).double()
    for parameter in (module.q_bias, module.v_bias):
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 5, 18, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(num_heads, 5, 5, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[True, True, False, True, True], [True, True, True, False, False]])
    padding = ~real
    inputs = [x, bias, *module.parameters()]
    weights = torch.randn(2, 5, 18, dtype=torch.float64)

    ours = module(x, bias, padding)
    plain = plain_attention(module, x, bias, real)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)
    ours = torch.autograd.grad((ours * weights).sum(), inputs)
    plain = torch.autograd.grad((plain * weights).sum(), inputs)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_a_row_without_real_keys_is_finite():
    module = SelfAttention(16, 2)
    x = torch.randn(1, 3, 16, requires_grad=True)
    padding = torch.ones(1, 3, dtype=torch.bool)
    for bias in (None, torch.zeros(2, 3, 3)):
        out = module(x, bias, padding)
        out.sum().backward()
        assert out.isfinite().all() and x.grad.isfinite().all()


def test_bfloat16_autocast_stays_near_float32():
    torch.manual_seed(1)
    module = SelfAttention(32, 2)
    x, bias = torch.randn(2, 7, 32), torch.randn(2, 7, 7, requires_grad=True)
    padding = torch.tensor([[False] * 5 + [True] * 2])
    exact = module(x, bias, padding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(x, bias, padding)
    torch.testing.assert_close(rounded.float(), exact, atol=2e-2, rtol=2e-2)
