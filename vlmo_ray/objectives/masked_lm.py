"""Masked language modelling (paper section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_lm_loss(
    logits: Tensor, labels: Tensor, count: Tensor, taught: Tensor | None = None, share: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits `[M, V]` at the masked positions against their labels `[M]`.

    count is the number of targets in the whole step. The loss is this worker's sum divided by it, or 0 if there is no
    target. `share` of each target is what a teacher predicts there, `taught` [M, V], probabilities (ALBEF, Li et al.
    2021, section 3.3). Returns (loss, number of right predictions).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, labels, reduction="sum")
    if taught is not None:
        loss = (1 - share) * loss + share * F.cross_entropy(logits, taught.to(logits.dtype), reduction="sum")
    loss = loss / count.clamp(min=1)
    return loss, (logits.argmax(dim=-1) == labels).sum()
