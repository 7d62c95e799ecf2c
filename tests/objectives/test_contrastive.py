"""Contrasts block by block against full matrices and autograd; every block size, masks, smoothing, extreme logits."""

import pytest
import torch
import torch.nn.functional as F

from vlmo_ray.objectives.contrastive import contrast, sigmoid_contrast
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.pairs import Pairs


def counted_of(pairs):
    same = (pairs.image_key[:, None] == pairs.image_key) | (pairs.text_key[:, None] == pairs.text_key)
    return (~same & pairs.valid & pairs.valid[:, None]) | torch.eye(len(same), dtype=torch.bool)


def plain(image, text, log_scale, pairs, smoothing=0.0):
    logits, counted, losses = log_scale.exp() * image @ text.T, counted_of(pairs), []
    for i in pairs.valid.nonzero().squeeze(1):
        columns = counted[i].nonzero().squeeze(1)
        target = (columns == i).nonzero()[0]
        for row in (logits[i], logits[:, i]):
            losses.append(F.cross_entropy(row[columns][None], target, label_smoothing=smoothing))
    return torch.stack(losses).mean()


def plain_sigmoid(image, text, log_scale, bias, pairs):
    logits = log_scale.exp() * image @ text.T + bias
    sign = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    counted = counted_of(pairs) & pairs.valid[:, None]
    return -F.logsigmoid(sign * logits)[counted].sum() / pairs.valid.sum()


@pytest.mark.parametrize("block_size", [1, 3, 7, 100])
@pytest.mark.parametrize("kind", ["softmax", "smoothed", "sigmoid"])
@pytest.mark.parametrize("log_scale", [0.5, 4.6])  # 4.6: logits of +-100, far beyond what exp can hold unshifted
def test_value_and_gradients(block_size, kind, log_scale):
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=1) for _ in "it")
    log_scale = torch.tensor(log_scale, dtype=torch.float64)
    for x in (image, text, log_scale):
        x.requires_grad_()
    valid = torch.tensor([True, True, False, True, True, True, True])
    pairs = Pairs(torch.tensor([0, 1, 2, 3, 0, 5, 6]), torch.tensor([0, 1, 2, 1, 4, 5, 6]), valid, 0, 7)
    features = (image, text, image.detach(), text.detach())
    if kind == "sigmoid":
        bias = torch.tensor([-1.5], dtype=torch.float64, requires_grad=True)
        expected = plain_sigmoid(image, text, log_scale, bias, pairs)
        wanted = torch.autograd.grad(expected, (image, text, log_scale, bias))
        out = sigmoid_contrast(*features, log_scale, bias, pairs, block_size=block_size)
        torch.testing.assert_close(out.bias_grad, wanted[3][0], rtol=1e-10, atol=1e-12)
    else:
        smoothing = 0.2 if kind == "smoothed" else 0.0
        expected = plain(image, text, log_scale, pairs, smoothing)
        wanted = torch.autograd.grad(expected, (image, text, log_scale))
        out = contrast(*features, log_scale, pairs, Workers((7,)), label_smoothing=smoothing, block_size=block_size)
    torch.testing.assert_close(out.loss, expected.detach(), rtol=1e-12, atol=1e-12)
    for got, want in zip((out.image_grad, out.text_grad, out.scale_grad), wanted[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_half_precision_features_are_compared_in_float32():
    image, text = (F.normalize(torch.randn(4, 8), dim=1).bfloat16() for _ in "it")
    pairs = Pairs(torch.arange(4), torch.arange(4), torch.ones(4).bool(), 0, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = contrast(image, text, image, text, torch.tensor(2.0), pairs, Workers((4,)))
    assert out.loss.dtype == out.image_grad.dtype == torch.float32
    expected = plain(image.float(), text.float(), torch.tensor(2.0), pairs)
    torch.testing.assert_close(out.loss, expected, rtol=1e-6, atol=1e-6)


def test_no_valid_pair_gives_zero():
    x = F.normalize(torch.randn(3, 4), dim=1)
    pairs = Pairs(torch.arange(3), torch.arange(3), torch.zeros(3).bool(), 0, 3)
    out = contrast(x, x, x, x, torch.tensor(1.0), pairs, Workers((3,)))
    assert out.loss == 0 and out.scale_grad == 0 and (out.image_grad == 0).all()
