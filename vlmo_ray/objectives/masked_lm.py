"""Masked language modelling (paper section 3.3): cross-entropy over the vocabulary, a few rows of logits at a time.

With logits z_i = W h_i + b of the masked position i, whose label is y_i, and a target t_i over the vocabulary,

    L = 1/n sum_i [ lse(z_i) - t_i . z_i ]        dL/dz_i = 1/n (softmax(z_i) - t_i)

Both need the logits of one position at a time. So the gradients at h, W and b are found in the forward, a block of rows
after the other, and logits never exist for more. On a CPU a block stays in its cache, which more than halves the time
of a small model's head; on a GPU 768 words of BERT's vocabulary would otherwise keep 230 MB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmo_ray.objectives.pairs import columns_of

LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}  # of a block, which has as many rows as W has columns, at the least


def masked_lm_loss(
    hidden: Tensor, decoder: nn.Linear, labels: Tensor, count: Tensor, soft: float = 0.0, taught: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the words that `decoder` reads from the head's `hidden` states [M, D], against labels int [M].

    count is the number of targets in the whole step. The loss is this worker's sum divided by it, or 0 if there is no
    target. The share `soft` of each target is spread evenly over the vocabulary (label smoothing), or, where a teacher
    predicts `taught` [M, V], probabilities, as it says (ALBEF, Li et al. 2021, section 3.3). Returns (loss, number of
    right predictions).
    """
    kind, weight, bias = hidden.device.type, decoder.weight, decoder.bias
    if torch.is_autocast_enabled(kind):
        hidden, weight, bias = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight, bias))
    size = max(LOGITS[kind] // len(weight), weight.shape[1])
    loss, right = _CrossEntropy.apply(hidden, weight, bias, labels.long(), soft, taught, size)
    return loss / count.clamp(min=1), right


class _CrossEntropy(torch.autograd.Function):
    """The sum of the above over the rows, in float32 or wider, and how many are right; `size` rows at a time.

    The gradient at the logits of a single block is kept, that of several blocks is turned into those at h, W and b,
    summed in the loss's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, soft: float, taught: Tensor | None,
        size: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss, right = hidden.new_zeros((), dtype=wide), labels.new_zeros(())
        ctx.single, ctx.dtype = len(hidden) <= size, hidden.dtype
        grads = [] if ctx.single else [torch.zeros_like(x, dtype=wide) for x in (hidden, weight, bias)]
        for rows in columns_of(len(hidden), size) or [slice(0)]:
            label = labels[rows, None]
            logits = torch.addmm(bias, hidden[rows], weight.T).to(wide)
            top, best = logits.max(dim=1, keepdim=True)
            right += (best == label).sum()
            wanted = (1 - soft) * logits.gather(1, label)
            if soft:
                spread = logits.mean(dim=1) if taught is None else (taught[rows] * logits).sum(dim=1)
                wanted = wanted + soft * spread[:, None]
            shares = logits.sub_(top).exp_()
            whole = shares.sum(dim=1, keepdim=True)
            loss += (top + whole.log() - wanted).sum()
            if not any(ctx.needs_input_grad):
                continue
            grad = shares.div_(whole)
            if soft:
                grad.sub_(soft / len(weight) if taught is None else soft * taught[rows])
            grad = grad.scatter_add_(1, label, torch.full_like(whole, soft - 1)).to(hidden.dtype)
            if ctx.single:
                ctx.save_for_backward(grad, hidden, weight)
                break
            hidden_grad, weight_grad, bias_grad = grads
            hidden_grad[rows] = grad @ weight
            if grad.dtype == wide:
                weight_grad.addmm_(grad.T, hidden[rows])
            else:
                weight_grad += grad.T @ hidden[rows]
            bias_grad += grad.sum(dim=0, dtype=wide)
        if grads:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scale = grads[0]  # in the loss's dtype; products with it are rounded afterwards
        if ctx.single:
            grad, hidden, weight = ctx.saved_tensors
            grad = (grad.to(scale.dtype) * scale).to(grad.dtype)
            found = (grad @ weight, grad.T @ hidden, grad.sum(dim=0))
        else:
            found = tuple((x * scale).to(ctx.dtype) for x in ctx.saved_tensors)
        return *found, None, None, None, None
