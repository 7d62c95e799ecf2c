"""Image-text contrast over the global batch, exact, with each worker holding only its own rows.

With unit features I_i, T_i, s = exp(log_scale) and z_ij = s I_i.T_j, the loss over the n valid pairs is

    L = 1/(2n) sum_i [ lse_j z_ij - z_ii ] + 1/(2n) sum_i [ lse_j z_ji - z_ii ]            (paper, eq. 3 and 4)

where j runs over i itself and the valid pairs that may be negatives of i (see `Pairs.may_oppose`). The gradient with
respect to a local image needs only the features of other workers and the log-sum-exps of their rows:

    dL/dI_i = s/(2n) [ sum_j (exp(z_ij - row_i) + exp(z_ij - column_j)) T_j - 2 T_i ]

with row_i = lse_j z_ij and column_j = lse_i z_ij. So no `[N, D]` gradient travels, and similarities exist one block of
`block_size` columns at a time: memory grows with local rows x block_size. L depends on s and I only through s I, so its
derivative at log s is sum_i I_i . dL/dI_i and needs no further pass.

`sigmoid_contrast` is the pairwise loss of Zhai et al. 2023, "Sigmoid loss for language image pre-training",
with the same inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.pairs import Pairs, columns_of, full_precision, widened

BLOCK_SIZE = 4096  # columns that are compared at once


@dataclass
class Contrast:
    """The contrastive loss of this worker's rows, and the gradients of the *global* loss at its inputs.

    The sums of `loss` and of the gradients at the scalars over the workers are the global ones.
    """

    loss: Tensor  # 0-d
    image_grad: Tensor  # [b, D]
    text_grad: Tensor  # [b, D]
    scale_grad: Tensor  # 0-d, at log_scale
    temperature: Tensor  # 0-d, 1 / scale
    bias_grad: Tensor | None = None  # 0-d, at the bias of the sigmoid loss


@dataclass
class Taught:
    """Soft targets: what another model's features say of the same pairs."""

    features: tuple[Tensor, Tensor, Tensor, Tensor]  # image and text [b, D], all images and texts [N, D]
    share: float  # of a row's target


@torch.no_grad()
def contrast(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    log_scale: Tensor,
    pairs: Pairs,
    workers: Workers,
    *,
    label_smoothing: float = 0.0,
    taught: Taught | None = None,
    block_size: int = BLOCK_SIZE,
) -> Contrast:
    """The loss above for local features `[b, D]` against gathered ones `[N, D]` in position order.

    With `label_smoothing` e, a row's target is 1 - e on its own column plus e spread evenly over all columns it is
    compared with. With `taught` of share a, it is 1 - a on its own column plus a times the softmax of the teacher's
    similarities at the same temperature (momentum distillation: ALBEF, Li et al. 2021, section 3.3). A step without a
    valid pair gives 0. Computed in float32, or float64 if the features are.
    """
    with full_precision(image.device):
        image, text, all_image, all_text = widened(image, text, all_image, all_text)
        scale = log_scale.reshape(()).to(image.dtype).exp()
        sides = [(scale * image, all_text), (scale * text, all_image)]
        if taught is not None:  # two further sides, whose logits only make targets
            image_m, text_m, all_image_m, all_text_m = widened(*taught.features)
            sides += [(scale * image_m, all_text_m), (scale * text_m, all_image_m)]
        blocks = columns_of(len(all_image), block_size)

        def logits_of(block: slice) -> tuple[Tensor, list[Tensor]]:
            """Which columns of a block each row is compared with, and the logits of all sides, -inf elsewhere."""
            compared = pairs.compared(block)
            barred = torch.zeros_like(compared, dtype=image.dtype).masked_fill_(~compared, -torch.inf)
            return compared, [torch.addmm(barred, rows, columns[block].T) for rows, columns in sides]

        # per local row: log-sum-exps of the image and the text side (and the teacher's); sums for smoothing
        lse = image.new_full((len(sides), len(image)), -torch.inf)
        num_compared, sums = image.new_zeros(len(image)), image.new_zeros(2, len(image))
        held = None
        for block in blocks:
            held = compared, logits = logits_of(block)
            lse = torch.logaddexp(lse, torch.stack([side.logsumexp(dim=1) for side in logits]))
            if label_smoothing:
                num_compared += compared.sum(dim=1)
                sums += torch.stack([side.masked_fill(~compared, 0).sum(dim=1) for side in logits[:2]])
        share = label_smoothing / num_compared if label_smoothing else num_compared  # of every compared column
        everyones = workers.gather(torch.stack([*lse, share], dim=1)).unbind(1)
        all_lse_image, all_lse_text, all_share = everyones[0], everyones[1], everyones[-1]
        # what a row expects of its own logits, by the teacher
        hoped, kept = image.new_zeros(2, len(image)), 1 - label_smoothing - (taught.share if taught else 0.0)

        grads = [torch.zeros_like(image), torch.zeros_like(text)]
        for block in reversed(blocks):
            compared, logits = held or logits_of(block)  # those of the last block are still held
            held = None
            turn = zip(logits[:2], lse[:2], (all_lse_text, all_lse_image), sides[:2], grads, strict=True)
            for side, (z, row_lse, column_lse, (_, columns), grad) in enumerate(turn):
                weight = torch.exp(z - row_lse[:, None])
                if taught is not None:
                    theirs = logits[2 + side]
                    target = torch.exp(theirs - lse[2 + side][:, None])
                    hoped[side] += (target * z.masked_fill(~compared, 0)).sum(dim=1)
                    target += theirs.sub_(everyones[3 - side][block]).exp_()
                    weight -= target.masked_fill_(~compared, 0).mul_(taught.share)
                weight += z.sub_(column_lse[block]).exp_()
                if label_smoothing:
                    weight -= (share[:, None] + all_share[block]).masked_fill_(~compared, 0)
                grad.addmm_(weight, columns[block])
        valid = pairs.valid[pairs.local]
        count = pairs.valid.sum().clamp(min=1)
        image_grad, text_grad = (
            torch.where(valid[:, None], grad - 2 * kept * own, 0) * (scale / (2 * count))
            for grad, own in zip(grads, (text, image), strict=True)
        )
        own_logits = scale * (image * text).sum(dim=1)
        each = lse[:2].mean(dim=0) - kept * own_logits - share * sums.mean(dim=0)
        each -= (taught.share if taught else 0.0) * hoped.mean(dim=0)
        return Contrast(
            loss=torch.where(valid, each, 0).sum() / count,
            image_grad=image_grad,
            text_grad=text_grad,
            scale_grad=(image * image_grad).sum(),
            temperature=1 / scale,
        )


@torch.no_grad()
def sigmoid_contrast(
    image: Tensor,
    text: Tensor,
    all_image: Tensor,
    all_text: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    *,
    block_size: int = BLOCK_SIZE,
) -> Contrast:
    """The mean over the n valid pairs i of -sum_j log sigmoid(y_ij (z_ij + bias)); y_ij is 1 if j is i, else -1.

    j runs over the same columns as in `contrast`. No row is normalised, so nothing needs to be gathered.
    """
    with full_precision(image.device):
        image, text, all_image, all_text = widened(image, text, all_image, all_text)
        scale, bias = (x.reshape(()).to(image.dtype) for x in (log_scale.exp(), bias))
        loss, bias_grad = image.new_zeros(()), image.new_zeros(())
        grads = [torch.zeros_like(image), torch.zeros_like(text)]
        for block in columns_of(len(all_image), block_size):
            opposing = pairs.may_oppose(pairs.local, block)
            for side, (rows, columns) in enumerate(((scale * image, all_text), (scale * text, all_image))):
                logits = torch.addmm(bias, rows, columns[block].T).masked_fill_(~opposing, -torch.inf)
                weight = torch.sigmoid(logits)  # of an opposing column: the gradient of -log sigmoid(-z)
                grads[side].addmm_(weight, columns[block])
                if side == 0:  # the other side has the same pairs, seen from their columns
                    loss += F.softplus(logits).sum()
                    bias_grad += weight.sum()
        valid = pairs.valid[pairs.local]
        count = pairs.valid.sum().clamp(min=1)
        own = scale * (image * text).sum(dim=1) + bias
        missing = torch.where(valid, torch.sigmoid(-own), 0)  # 1 - the probability of the own pair
        image_grad, text_grad = (
            (grad - missing[:, None] * other) * (scale / count)
            for grad, other in zip(grads, (text, image), strict=True)
        )
        return Contrast(
            loss=(loss + torch.where(valid, F.softplus(-own), 0).sum()) / count,
            image_grad=image_grad,
            text_grad=text_grad,
            scale_grad=(image * image_grad).sum(),
            temperature=1 / scale,
            bias_grad=(bias_grad - missing.sum()) / count,
        )
