"""Image-text contrast over the global batch, exact, with each worker holding only its own rows.

With unit features I_i, T_i, s = exp(log_scale) and z_ij = s I_i.T_j, the loss over the n valid pairs is

    L = 1/(2n) sum_i [ lse_j z_ij - z_ii ] + 1/(2n) sum_i [ lse_j z_ji - z_ii ]            (paper, eq. 3 and 4)

where j runs over the valid pairs that may serve as negatives of i (see `may_oppose`) and i itself. Its
gradient with respect to a local image needs nothing from other workers but their features and the
log-sum-exps of their rows:

    dL/dI_i = s/(2n) [ sum_j (exp(z_ij - row_i) + exp(z_ij - column_j)) T_j - 2 T_i ]

with row_i = lse_j z_ij and column_j = lse_i z_ij. So no `[N, D]` gradient travels, and the similarities exist
one block of `chunk` columns at a time: memory grows with local rows x chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmo_ray.objectives.gather import Workers


@dataclass(frozen=True)
class Pairs:
    """What must be known of all N pairs of a global batch to compare any two; gathered once a step."""

    image_key: Tensor  # int64 [N], equal for the same image
    text_key: Tensor  # int64 [N], equal for the same normalised text
    valid: Tensor  # bool [N], False for a pair that could not be read
    first: int  # position of this worker's first row
    rows: int  # how many rows are this worker's

    @property
    def local(self) -> slice:
        return slice(self.first, self.first + self.rows)

    def may_oppose(self, columns: slice) -> Tensor:
        """Bool `[b, columns]`: may column j be a negative of local row i?

        Both must be valid, and they must share neither image nor text: those are not negatives but true pairs.
        """
        same = self.image_key[self.local, None] == self.image_key[None, columns]
        same |= self.text_key[self.local, None] == self.text_key[None, columns]
        return ~same & self.valid[self.local, None] & self.valid[None, columns]

    def is_own(self, columns: slice) -> Tensor:
        """Bool `[b, columns]`: is column j the pair of local row i itself, and valid?"""
        position = torch.arange(self.first, self.first + self.rows, device=self.valid.device)
        column = torch.arange(columns.start, columns.stop, device=self.valid.device)
        return (position[:, None] == column[None]) & self.valid[self.local, None]


@dataclass
class Contrast:
    """The contrastive loss of this worker's rows, and the gradients of the *global* loss at its inputs."""

    loss: Tensor  # scalar; summed over the workers it is the global loss
    image_grad: Tensor  # [b, D]
    text_grad: Tensor  # [b, D]
    scale_grad: Tensor  # scalar, this worker's share of dL/d log_scale

    def surrogate(self, image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
        """A scalar with the value of `loss` whose backward hands exactly these gradients on."""
        linear = (image * self.image_grad).sum() + (text * self.text_grad).sum() + log_scale * self.scale_grad
        return self.loss + linear - linear.detach()


def columns_of(total: int, chunk: int):
    """Slices of at most `chunk` that cover `range(total)`."""
    return (slice(start, min(start + chunk, total)) for start in range(0, total, chunk))


def _log_sum_exp(rows: Tensor, columns: Tensor, scale: Tensor, pairs: Pairs, chunk: int) -> Tensor:
    """Per local row: log of the sum of exp(scale * row . column) over its own and its opposing columns, `[b]`."""
    running = rows.new_full((len(rows),), -torch.inf)
    for block in columns_of(len(columns), chunk):
        logits = scale * (rows @ columns[block].T)
        counted = pairs.may_oppose(block) | pairs.is_own(block)
        running = torch.logaddexp(running, logits.masked_fill(~counted, -torch.inf).logsumexp(dim=1))
    return running


def _one_side(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    row_lse: Tensor,
    column_lse: Tensor,
    pairs: Pairs,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Gradient `[b, D]` at the rows, and the rows' own part of the gradient at log_scale; neither normalised."""
    grad, scale_grad = torch.zeros_like(rows), rows.new_zeros(())
    for block in columns_of(len(columns), chunk):
        logits = scale * (rows @ columns[block].T)
        own = pairs.is_own(block)
        counted = pairs.may_oppose(block) | own
        # exp only of what is counted: an uncounted logit may be far above its log-sum-exp
        by_row = torch.exp(torch.where(counted, logits - row_lse[:, None], -torch.inf))
        by_column = torch.exp(torch.where(counted, logits - column_lse[None, block], -torch.inf))
        weight = by_row + by_column - 2 * own.to(rows.dtype)
        grad += scale * (weight @ columns[block])
        scale_grad += ((by_row - own.to(rows.dtype)) * logits).sum()
    return grad, scale_grad


@torch.no_grad()
def contrast(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    log_scale: Tensor,
    pairs: Pairs,
    workers: Workers,
    chunk: int = 4096,
) -> Contrast:
    """The loss above for local features `[b, D]` against gathered ones `[N, D]` (position order).

    A step without a valid pair gives 0. Computed in float32, or float64 if the features are.
    """
    with torch.autocast(image.device.type, enabled=False):
        working = torch.promote_types(image.dtype, torch.float32)
        image, text, all_image, all_text = (x.to(working) for x in (image, text, all_image, all_text))
        scale = log_scale.to(working).exp()
        image_lse = _log_sum_exp(image, all_text, scale, pairs, chunk)
        text_lse = _log_sum_exp(text, all_image, scale, pairs, chunk)
        all_image_lse, all_text_lse = workers.gather(torch.stack([image_lse, text_lse], dim=1)).unbind(1)

        image_grad, from_images = _one_side(image, all_text, scale, image_lse, all_text_lse, pairs, chunk)
        text_grad, from_texts = _one_side(text, all_image, scale, text_lse, all_image_lse, pairs, chunk)

        own = pairs.valid[pairs.local]
        own_logits = scale * (image * text).sum(dim=1)
        loss = torch.where(own, 0.5 * (image_lse + text_lse) - own_logits, 0.0).sum()
        count = pairs.valid.sum().clamp(min=1)
        return Contrast(
            loss=loss / count,
            image_grad=image_grad / (2 * count),
            text_grad=text_grad / (2 * count),
            scale_grad=(from_images + from_texts) / (2 * count),
        )
