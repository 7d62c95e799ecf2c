"""One step: gradients of the global loss, exact for any split into workers and micro-batches."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from vlmo_ray.config import LossWeights
from vlmo_ray.data.batch import PairBatch
from vlmo_ray.objectives.contrastive import columns_of
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.losses import Losses
from vlmo_ray.tasks.pretrain import Pretraining


def gradients(
    task: nn.Module,
    batch: PairBatch,
    workers: Workers,
    step: int,
    weights: LossWeights,
    micro_batch: int,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Leaves d(total loss)/d(parameter) in `.grad`, and returns this step's global figures (0-d tensors).

    task: `Pretraining`, bare or in `DistributedDataParallel`; batch: all rows of this worker. With one
    micro-batch nothing is computed twice. With several, the single-modality encodings are computed once
    without a graph for the contrast over the whole global batch, and again micro-batch by micro-batch to carry
    the contrast's gradient on (Gao et al. 2021, "Scaling deep contrastive learning batch size under memory
    limited setup"). Every draw is stateless, so the second encoding equals the first.

    Only `fusion` goes through the wrapper: its forward may start a collective of its own (DDP broadcasts its
    buckets once, in the second step), which must come after those of `plan` on every worker, and workers with
    one micro-batch would else start it earlier than those with several.
    """
    pretraining: Pretraining = getattr(task, "module", task)
    parts = list(columns_of(len(batch), micro_batch))
    micros = [batch.rows(part) for part in parts]
    single = len(micros) == 1
    precision = lambda: torch.autocast(batch.image.device.type, torch.bfloat16, enabled=bf16)  # noqa: E731

    with precision(), torch.set_grad_enabled(single):
        encoded = [pretraining("singles", micro, step) for micro in micros]
    features = torch.cat([singles.features.detach() for singles in encoded])
    if not single:
        encoded.clear()

    plan, totals = pretraining.plan(batch, features, workers, step)
    sums = {name: torch.zeros((), device=features.device, dtype=torch.float64) for name in ("itm", "mlm")}
    sums |= {
        name: torch.zeros((), device=features.device, dtype=torch.float64)
        for name in ("itm_right", "mlm_right")
    }
    for micro, part in zip(micros, parts, strict=True):
        last = part is parts[-1]
        synchronised = nullcontext() if last or task is pretraining else task.no_sync()
        with synchronised:
            with precision():
                singles = encoded[0] if single else pretraining("singles", micro, step)
                losses, right = task("fusion", micro, singles, plan.rows(part), totals, step)
            if last:  # the temperatures' gradients, once, in the backward that the workers share
                scales = zip(pretraining.log_scales(), totals.branches, strict=True)
                itc, itc_vl = (scale * branch.scale_grad for scale, branch in scales)
                losses = Losses(losses.itc + itc, losses.itc_vl + itc_vl, losses.itm, losses.mlm)
            # DDP averages over workers; each term is already divided by the count of the whole step
            (losses.total(weights) * (1 if task is pretraining else workers.size)).backward()
        for name, value in {"itm": losses.itm, "mlm": losses.mlm, **right}.items():
            sums[name] += value.detach()

    local = {
        "itc": totals.branches[0].loss,
        "itc_vl": totals.branches[1].loss,
        **sums,
        "negative_similarity": totals.negative_similarity,
        "valid": batch.valid.sum(),
        "exchanged_bytes": torch.tensor(totals.exchanged_bytes, device=features.device),
    }
    summed = workers.sum(torch.stack([value.to(torch.float64) for value in local.values()]))
    figures = dict(zip(local, summed, strict=True))
    terms = Losses(figures["itc"], figures["itc_vl"], figures["itm"], figures["mlm"])
    kept, targets = totals.kept.to(torch.float64), totals.targets.to(torch.float64)
    return {
        "loss": terms.total(weights),
        "itc": terms.itc,
        "itc_vl": terms.itc_vl,
        "itm": terms.itm,
        "mlm": terms.mlm,
        "itm_accuracy": figures["itm_right"] / (3 * kept).clamp(min=1),
        "mlm_accuracy": figures["mlm_right"] / targets.clamp(min=1),
        "negative_similarity": figures["negative_similarity"] / (2 * kept).clamp(min=1),
        "masked_pairs": sum(workers.counts) - figures["valid"],
        "pairs_without_negative": figures["valid"] - kept,
        "exchanged_bytes": figures["exchanged_bytes"],
    }
