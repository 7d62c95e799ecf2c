"""The cross-entropy of masked words against the plain one, for any number of rows at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vlmo_ray.model.heads import MaskedWordHead
from vlmo_ray.objectives import masked_lm
from vlmo_ray.objectives.masked_lm import masked_lm_loss

ROWS, WIDTH, VOCABULARY = 17, 6, 11
TARGETS = ["words", "smoothed", "taught"]


def make(dtype=torch.float64, rows=ROWS):
    generator = torch.Generator().manual_seed(4)
    head = MaskedWordHead(WIDTH, VOCABULARY).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    states = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (rows,), generator=generator, dtype=torch.int32)
    taught = torch.randn(rows, VOCABULARY, generator=generator, dtype=torch.float64).softmax(dim=1).to(dtype)
    return head, states, labels, taught


def plain(head, states, labels, kind, taught):
    """The definition: a target for each row over the whole vocabulary."""
    target = F.one_hot(labels.long(), VOCABULARY).double()
    if kind == "smoothed":
        target = 0.7 * target + 0.3 / VOCABULARY
    if kind == "taught":
        target = 0.7 * target + 0.3 * taught.double()
    logits = head(states)
    return -(target * logits.double().log_softmax(dim=1)).sum() / 9, int((logits.argmax(dim=1) == labels).sum())


def ours(head, states, labels, kind, taught):
    soft = 0.0 if kind == "words" else 0.3
    taught = taught if kind == "taught" else None
    return masked_lm_loss(head.hidden(states), head.decoder, labels, torch.tensor(9), soft, taught)


def grads(function, *arguments):
    head, states, *_ = arguments
    loss, right = function(*arguments)
    return loss, right, torch.autograd.grad(2.5 * loss, [states, *head.parameters()])


@pytest.mark.parametrize("rows", [6, 8, 17])  # at the least as many as the width
@pytest.mark.parametrize("kind", TARGETS)
def test_values_and_gradients_are_those_of_the_definition(kind, rows, monkeypatch):
    monkeypatch.setitem(masked_lm.LOGITS, "cpu", rows * VOCABULARY)
    head, states, labels, taught = make()
    loss, right, found = grads(ours, head, states, labels, kind, taught)
    wanted, wanted_right, expected = grads(plain, head, states, labels, kind, taught)
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
    assert int(right) == wanted_right > 0
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


class Widest(TorchDispatchMode):
    """The largest number of rows of a matrix over the vocabulary, of those that operations make."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.ndim == 2 and made.shape[1] == VOCABULARY:
            self.rows = max(self.rows, len(made))
        return made


def test_no_logits_of_more_rows_than_a_block_exist(monkeypatch):
    monkeypatch.setitem(masked_lm.LOGITS, "cpu", 8 * VOCABULARY)
    arguments = make()[:3]
    with Widest() as seen:
        grads(ours, *arguments, "smoothed", None)
    with Widest() as plainly:
        grads(plain, *arguments, "smoothed", None)
    assert seen.rows == 8 and plainly.rows == ROWS


@pytest.mark.parametrize("kind", TARGETS)
def test_under_autocast_it_differs_by_the_rounding_of_bfloat16(kind, monkeypatch):
    monkeypatch.setitem(masked_lm.LOGITS, "cpu", 8 * VOCABULARY)
    arguments = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, found = grads(ours, *arguments[:3], kind, arguments[3])
        wanted, _, expected = grads(plain, *arguments[:3], kind, arguments[3])
    assert loss.dtype == torch.float32 and all(grad.dtype == torch.float32 for grad in found)
    assert loss.item() == pytest.approx(wanted.item(), rel=0.01)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm()) <= 0.02 * float(b.norm())


def test_under_autocast_a_sum_over_many_blocks_is_as_exact_as_over_one(monkeypatch):
    head, states, labels, taught = make(torch.float32, rows=3000)

    def errors(rows: int) -> list[float]:
        monkeypatch.setitem(masked_lm.LOGITS, "cpu", rows * VOCABULARY)
        with torch.autocast("cpu", torch.bfloat16):
            found = grads(ours, head, states, labels, "words", taught)[2]
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]

    expected = grads(plain, head, states, labels, "words", taught)[2]
    for many, one in zip(errors(6), errors(3000), strict=True):
        assert 0 < many <= 1.5 * one


@pytest.mark.parametrize("rows", [8, 600])
def test_in_bfloat16_the_loss_can_have_any_scale(rows, monkeypatch):
    """A scale that bfloat16 rounds would change all gradients alike."""
    monkeypatch.setitem(masked_lm.LOGITS, "cpu", rows * VOCABULARY)
    head, states, labels, _ = make(torch.bfloat16, rows=600)
    loss, _ = masked_lm_loss(states, head.decoder, labels, torch.tensor(1))
    one, many = (torch.autograd.grad(k * loss, states, retain_graph=True)[0].double() for k in (1.0, 0.2778))
    assert float((one * many).sum() / (one * one).sum()) == pytest.approx(0.2778, rel=3e-4)  # 0.2773 in bfloat16


def test_without_a_target_the_loss_and_its_gradients_are_zero():
    head, states, labels, _ = make()
    loss, right = masked_lm_loss(head.hidden(states[:0]), head.decoder, labels[:0], torch.tensor(0))
    assert loss.item() == 0 and int(right) == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, [*head.parameters()]))


def test_what_needs_no_gradient_gets_none():
    head, states, labels, _ = make()
    head.requires_grad_(False)
    loss, _ = masked_lm_loss(head.hidden(states), head.decoder, labels, torch.tensor(9))
    wanted, _ = plain(head, states, labels, "words", None)
    (found,), (expected,) = (torch.autograd.grad(value, states) for value in (loss, wanted))
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        loss, _ = masked_lm_loss(head.hidden(states), head.decoder, labels, torch.tensor(9))
    assert not loss.requires_grad and loss.item() == pytest.approx(wanted.item(), rel=1e-13)
