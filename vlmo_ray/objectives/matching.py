"""Image-text matching on hard negatives mined over the whole global batch (paper section 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.objectives.contrastive import BLOCK_SIZE
from vlmo_ray.objectives.pairs import Pairs, columns_of, full_precision, widened
from vlmo_ray.rng import uniforms_torch


@torch.no_grad()
def hard_negatives(
    rows: Tensor,
    columns: Tensor,
    log_scale: Tensor,
    pairs: Pairs,
    key: int,
    *,
    asked: Tensor | None = None,
    among: int | None = None,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """The position of one negative column for each local row, int64 `[b]`; -1 if a row has none.

    A column is drawn with probability softmax(scale * row . column) among those that may oppose the row, by the
    Gumbel-max trick: the argmax of logit - log(-log u). u is a function of (key, row position, column position), so the
    draw depends neither on the number of workers nor on the block size, and no value is read back to the host.

    Args:
        rows: this worker's `[b, D]`, L2-normalised.
        columns: `[N, D]`, L2-normalised.
        key: of the draws, from `rng.stream`.
        asked: int64 indices of the local rows to draw for, one result each; None: all of them.
        among: draw only from a row's own run of this many neighbouring positions; no run crosses workers. This is
            "local hard negative mining" in Table 6, where the run was a GPU's batch. None: all N.
    """
    if asked is not None:
        rows = rows[asked]
    position = torch.arange(pairs.first, pairs.first + pairs.rows, device=rows.device)
    position = position if asked is None else position[asked]
    with full_precision(rows.device):
        rows, columns = widened(rows, columns)
        rows = rows * log_scale.reshape(()).to(rows.dtype).exp()
        best = rows.new_full((len(rows),), -torch.inf)
        chosen = torch.full((len(rows),), -1, dtype=torch.int64, device=rows.device)
        reach = (0, len(columns)) if among is None else (pairs.first, pairs.first + pairs.rows)
        for block in columns_of(reach[1], block_size, start=reach[0]):
            draw = uniforms_torch(key, position, block.stop - block.start, first=block.start).to(rows.dtype)
            gumbel = -torch.log(-torch.log(draw.clamp(min=2.0**-25)))  # draws are multiples of 2^-24 below 1
            score = torch.addmm(gumbel, rows, columns[block].T)
            allowed = pairs.may_oppose(position, block)
            if among is not None:
                there = torch.arange(block.start, block.stop, device=rows.device)
                allowed &= position[:, None] // among == there // among
            value, index = score.masked_fill_(~allowed, -torch.inf).max(dim=1)
            better = value > best
            best = torch.where(better, value, best)
            chosen = torch.where(better, index + block.start, chosen)
        return chosen


def rows_to_match(first: int, rows: int, run: int, share: float) -> Tensor:
    """Indices (int64, on the CPU) of the local rows that matching is computed for: the first `share` of every `run`.

    Rows are in random order within a run of neighbouring positions, so the first ones are a random choice. A fixed
    number per run keeps the work of all workers and micro-batches equal.
    """
    position = torch.arange(first, first + rows)
    return torch.nonzero(position % run < round(share * run)).squeeze(1)


def matching_loss(
    positive: Tensor, negative_image: Tensor, negative_text: Tensor, kept: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy over 3 rows per kept pair, class 1 = matched; returns (loss, number of right predictions).

    Each logits tensor is `[b, 2]`; kept is bool `[b]`; count is the number of kept pairs in the whole step. The loss is
    this worker's sum divided by 3 x count, or 0 if no pair is kept anywhere.
    """
    logits = torch.stack([positive, negative_image, negative_text], dim=1)  # [b, 3, 2]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = torch.tensor([1, 0, 0], device=logits.device).expand(len(logits), 3)
    each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(-1, 3)
    loss = (each * kept[:, None]).sum() / (3 * count).clamp(min=1)
    right = ((logits.argmax(dim=-1) == target) & kept[:, None]).sum()
    return loss, right
