"""Image-text matching on hard negatives mined over the whole global batch (paper section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.objectives.contrastive import Pairs, columns_of
from vlmo_ray.rng import uniforms_torch


@torch.no_grad()
def hard_negatives(
    rows: Tensor, columns: Tensor, log_scale: Tensor, pairs: Pairs, key: int, chunk: int = 4096
) -> Tensor:
    """For each local row the position of one negative column, int64 `[b]`; -1 where a row has none.

    A column is drawn with probability softmax(scale * row . column) among those that may oppose the row. The
    draw is the Gumbel-max form of it: the argmax of logit - log(-log u), u being a function of (key, row
    position, column position), so that neither the number of workers nor the chunk changes it, and no value
    is read back to the host. rows `[b, D]`, columns `[N, D]`, both L2-normalised.
    """
    with torch.autocast(rows.device.type, enabled=False):
        working = torch.promote_types(rows.dtype, torch.float32)
        rows, columns = rows.to(working), columns.to(working)
        scale = log_scale.to(working).exp()
        position = torch.arange(pairs.first, pairs.first + pairs.rows, device=rows.device)
        best = rows.new_full((len(rows),), -torch.inf)
        chosen = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
        for block in columns_of(len(columns), chunk):
            draw = uniforms_torch(key, position, block.stop - block.start, first=block.start).to(working)
            gumbel = -torch.log(-torch.log(draw.clamp(min=2.0**-25)))  # draws are multiples of 2^-24 below 1
            score = scale * (rows @ columns[block].T) + gumbel
            score = score.masked_fill(~pairs.may_oppose(block), -torch.inf)
            value, index = score.max(dim=1)
            better = value > best
            best = torch.where(better, value, best)
            chosen = torch.where(better, index + block.start, chosen)
        return chosen


def matching_loss(
    positive: Tensor, negative_image: Tensor, negative_text: Tensor, kept: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy over 3 rows per kept pair, class 1 = matched; returns (loss, number right).

    Each logits tensor is `[b, 2]`; kept is bool `[b]`; count is the number of kept pairs in the whole step.
    The loss is this worker's sum divided by 3 x count, 0 if nothing is kept anywhere.
    """
    logits = torch.stack([positive, negative_image, negative_text], dim=1)  # [b, 3, 2]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = torch.tensor([1, 0, 0], device=logits.device).expand(len(logits), 3)
    each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(-1, 3)
    loss = (each * kept[:, None]).sum() / (3 * count).clamp(min=1)
    right = ((logits.argmax(dim=-1) == target) & kept[:, None]).sum()
    return loss, right
