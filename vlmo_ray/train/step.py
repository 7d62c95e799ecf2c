"""One step: gradients of the global loss, exact for any split into workers and micro-batches."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from vlmo_ray.data.batch import PairBatch
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.losses import Losses, Weights
from vlmo_ray.train.parallel import Parallel


def gradients(
    parallel: Parallel,
    batch: PairBatch,
    workers: Workers,
    step: int,
    weights: Weights,
    micro_batch: int,
    bf16: bool = False,
) -> dict[str, Tensor]:
    """Leaves d(total loss)/d(parameter) in `.grad`, and returns this step's global figures (0-d tensors).

    batch: all rows of this worker, at least one. With one micro-batch nothing is computed twice. With several,
    the single-modality encodings are computed once without a graph for the contrast over the whole global
    batch, and again micro-batch by micro-batch to carry the contrast's gradient on (Gao et al. 2021, "Scaling
    deep contrastive learning batch size under memory limited setup"). Every draw is stateless, so the second
    encoding equals the first.
    """
    assert len(batch), "a worker without rows"
    parts = parallel.micro_batches(workers.counts, workers.rank, micro_batch)
    # an empty micro-batch is the worker's first row with all its losses left out
    micros = [batch.rows(part or slice(0, 1)) for part in parts]
    single = len(micros) == 1

    def precision() -> torch.autocast:
        return torch.autocast(batch.image.device.type, torch.bfloat16, enabled=bf16)

    with precision(), torch.set_grad_enabled(single):
        encoded = [parallel.singles(micro, step) for micro in micros]
    own = [singles.features.detach() for singles, part in zip(encoded, parts, strict=True) if part]
    features = torch.cat(own)
    if not single:
        encoded.clear()

    plan, totals = parallel.task.plan(batch, features, workers, step)
    sums: Counter[str] = Counter()
    for i, (micro, part) in enumerate(zip(micros, parts, strict=True)):
        last = i == len(parts) - 1
        with parallel.backward(last):
            with precision():
                singles = encoded[0] if single else parallel.singles(micro, step)
                needs = plan.rows(part) if part else plan.rows(slice(0, 1)).without_losses()
                micro = micro if part else micro.without_targets()
                losses, right = parallel.fusion(micro, singles, needs, totals, step)
            if last:  # the temperatures' gradients, once, in the backward that the workers share
                itc, itc_vl = parallel.task.scalars(totals)
                losses = Losses(losses.itc + itc, losses.itc_vl + itc_vl, losses.itm, losses.mlm)
            # each term is already divided by its count in the whole step
            (losses.total(weights) * (workers.size if parallel.averages else 1)).backward()
        sums.update({"itm": losses.itm.detach().double(), "mlm": losses.mlm.detach().double(), **right})

    main, vl = totals.branches
    local = {
        "itc": main.loss,
        "itc_vl": vl.loss,
        **sums,
        "negative_similarity": totals.negative_similarity,
        "valid": batch.valid.sum(),
        "without_negative": totals.without_negative,
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
        "temperature": main.temperature,
        "temperature_vl": vl.temperature,
        "masked_pairs": sum(workers.counts) - figures["valid"],
        "pairs_without_negative": figures["without_negative"],
        "exchanged_bytes": figures["exchanged_bytes"],
    }
