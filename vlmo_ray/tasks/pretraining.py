"""Vision-language pre-training: contrast, matching on global hard negatives, masked language modelling.

A step has three parts (paper section 3.3). `singles` encodes images and texts apart, by both branches; `plan`
looks at the whole global batch and decides what each local row needs from it: its contrastive gradient and
its hard negatives; `fusion` encodes the pairs and closes the losses. `train/step.py` puts them in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlmo_ray.config import Config
from vlmo_ray.data.batch import PairBatch
from vlmo_ray.model.heads import ContrastHead
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.contrastive import Contrast, contrast, sigmoid_contrast
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.losses import Losses
from vlmo_ray.objectives.masked_lm import masked_lm_loss
from vlmo_ray.objectives.matching import hard_negatives, matching_loss, rows_to_match
from vlmo_ray.objectives.pairs import Pairs
from vlmo_ray.rng import Noise, stream

IMAGE, TEXT, IMAGE_VL, TEXT_VL = range(4)


@dataclass
class Singles:
    """The dual-encoder side of a micro-batch, and what its pair passes share with it."""

    features: Tensor  # [b, 4, D], L2-normalised: image, text, image and text of the VL branch
    image_tokens: Tensor  # [b, P, D] embedded, before the first layer
    bias: Tensor | None  # [L, H, S, S]


@dataclass
class Plan:
    """What the global batch means for local rows; sliced along with the micro-batches."""

    feature_grad: Tensor  # [b, 4, D], of the contrastive losses
    asked: Tensor  # bool [b], on the CPU: the rows that matching is computed for
    negative_image: Tensor  # uint8 [b, 3, H, W], one for each text
    negative_text: Tensor  # int64 [b, T], one for each image
    negative_mask: Tensor  # bool [b, T]
    kept: Tensor  # bool [b]: asked, valid, and with a negative

    def rows(self, part: slice) -> Plan:
        return Plan(*(getattr(self, name)[part] for name in self.__dataclass_fields__))

    def without_losses(self) -> Plan:
        """The same passes, nothing of which counts."""
        return replace(self, feature_grad=0 * self.feature_grad, kept=self.kept & False)


@dataclass
class Totals:
    """Of the whole step, equal on every worker."""

    kept: Tensor  # pairs with all three matching rows
    targets: Tensor  # masked tokens to predict
    branches: tuple[Contrast, Contrast]
    negative_similarity: Tensor  # local sum of the cosines of the chosen negatives, 2 per kept pair
    without_negative: Tensor  # local count of valid rows that were asked and have no candidate
    exchanged_bytes: int


class Pretraining(nn.Module):
    """The model with its passes; called through `forward(part, ...)` so that a wrapper sees every one."""

    def __init__(self, model: VLMo, config: Config):
        super().__init__()
        self.model = model
        self.seed = config.seed
        self.loss = config.task
        self.slice_size = config.slice_size

    def forward(self, part: str, *args):
        return {"singles": self.singles, "fusion": self.fusion}[part](*args)

    def _noise(self, name: str, position: Tensor, step: int) -> Noise | None:
        if self.model.config.drop_path == 0:
            return None
        return Noise(self.seed, step, name, position)

    def _pixels(self, image: Tensor) -> Tensor:
        """uint8 to [-1, 1], the mean and deviation of 0.5 that BEiT was trained with."""
        return image.to(self.model.dtype) / 127.5 - 1.0

    def singles(self, batch: PairBatch, step: int) -> Singles:
        model = self.model

        def noise(name: str) -> Noise | None:
            return self._noise(name, batch.position, step)

        bias = model.position_bias(batch.text_ids.shape[1])
        tokens = model.embed_image(self._pixels(batch.image))
        image = model.encode(image=tokens, bias=bias, vl_branch=True, noise=noise("image"))
        text = model.encode(
            text=batch.text_ids,
            text_mask=batch.text_mask,
            bias=bias,
            vl_branch=True,
            noise=noise("text"),
        )
        features = torch.stack(
            [
                model.itc.image(image.image[:, 0]),
                model.itc.text(text.text[:, 0]),
                model.itc_vl.image(image.image_vl[:, 0]),
                model.itc_vl.text(text.text_vl[:, 0]),
            ],
            dim=1,
        )
        return Singles(features, tokens, bias)

    @torch.no_grad()
    def plan(self, batch: PairBatch, features: Tensor, workers: Workers, step: int) -> tuple[Plan, Totals]:
        """`batch` and `features` `[b, 4, D]` are all rows of this worker; the collectives of a step are here."""
        facts = torch.stack(
            [batch.image_key, batch.text_key, batch.valid.long(), (batch.mlm_labels >= 0).sum(dim=1)], dim=1
        )
        image_key, text_key, valid, targets = workers.gather(facts).unbind(1)
        valid = valid.bool()
        pairs = Pairs(image_key, text_key, valid, workers.first, len(batch))

        everything = workers.gather(features)
        main = self._contrast(self.model.itc, features[:, :2], everything[:, :2], pairs, workers)
        vl = self._contrast(self.model.itc_vl, features[:, 2:], everything[:, 2:], pairs, workers)

        asked = rows_to_match(workers.first, len(batch), self.slice_size, self.loss.itm_share)
        rows = asked.to(features.device)

        def negatives(of: int, among: int, purpose: str) -> Tensor:
            """Positions `[b]`, -1 for rows that have none or are not asked."""
            chosen = hard_negatives(
                features[:, of],
                everything[:, among],
                self.model.itc.log_scale,
                pairs,
                stream(self.seed, purpose, step),
                asked=rows,
                among=None if self.loss.negatives == "global" else self.slice_size,
            )
            return torch.full_like(batch.position, -1).index_copy_(0, rows, chosen)

        image_for_text = negatives(TEXT, IMAGE, "negative_image")
        text_for_image = negatives(IMAGE, TEXT, "negative_text")
        # who may oppose whom is symmetric: a row without a negative image has no negative text either
        kept = image_for_text >= 0
        own = torch.arange(workers.first, workers.first + len(batch), device=kept.device)
        image_for_text, text_for_image = torch.where(kept, torch.stack([image_for_text, text_for_image]), own)
        similarity = (features[:, TEXT] * everything[image_for_text, IMAGE]).sum(dim=1)
        similarity += (features[:, IMAGE] * everything[text_for_image, TEXT]).sum(dim=1)

        choice = workers.gather(torch.stack([image_for_text, kept.long()], dim=1))
        images, exchanged = workers.fetch(batch.image, choice[:, 0])
        texts = workers.gather(batch.text_ids.masked_fill(~batch.text_mask, -1).to(torch.int32))
        text = texts[text_for_image].long()

        feature_grad = torch.stack([main.image_grad, main.text_grad, vl.image_grad, vl.text_grad], dim=1)
        plan = Plan(
            feature_grad=feature_grad * self.loss.feature_grad_scale,
            asked=torch.zeros(len(batch), dtype=torch.bool).index_fill_(0, asked, True),
            negative_image=images,
            negative_text=text.clamp(min=0),
            negative_mask=text >= 0,
            kept=kept,
        )
        totals = Totals(
            kept=choice[:, 1].sum(),
            targets=targets.sum(),
            branches=(main, vl),
            negative_similarity=(similarity * kept).sum(),
            without_negative=batch.valid[rows].sum() - kept.sum(),
            exchanged_bytes=exchanged,
        )
        return plan, totals

    def _contrast(
        self, head: ContrastHead, local: Tensor, everything: Tensor, pairs: Pairs, workers: Workers
    ) -> Contrast:
        """Of one branch: features `[b, 2, D]` and `[N, 2, D]`, image and text."""
        features = (*local.unbind(1), *everything.unbind(1))
        if head.logit_bias is not None:
            return sigmoid_contrast(*features, head.log_scale, head.logit_bias, pairs)
        smoothing = self.loss.label_smoothing
        return contrast(*features, head.log_scale, pairs, workers, label_smoothing=smoothing)

    def scalars(self, totals: Totals) -> tuple[Tensor, Tensor]:
        """Per branch a 0-d tensor whose backward gives the contrast's gradients to temperature and bias."""
        out = []
        for head, branch in zip((self.model.itc, self.model.itc_vl), totals.branches, strict=True):
            term = head.log_scale * branch.scale_grad
            if head.logit_bias is not None:
                term = term + head.logit_bias * branch.bias_grad
            out.append(term.sum())
        return out[0], out[1]

    def fusion(
        self, batch: PairBatch, singles: Singles, plan: Plan, totals: Totals, step: int
    ) -> tuple[Losses, dict[str, Tensor]]:
        """The pair passes of a micro-batch: three for matching, one for masked language modelling.

        The losses' contrastive terms hand on the gradients at the features; their values mean nothing, those
        are in `totals.branches`.
        """
        model = self.model
        rows = None if plan.asked.all() else plan.asked.nonzero().squeeze(1).to(batch.position.device)

        def asked(x: Tensor) -> Tensor:
            return x if rows is None else x[rows]

        def pair(name: str, position: Tensor, image: Tensor, text: Tensor, mask: Tensor):
            noise = self._noise(name, position, step)
            return model.encode(image=image, text=text, text_mask=mask, bias=singles.bias, noise=noise)

        def match(name: str, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            states = pair(name, asked(batch.position), image, asked(text), asked(mask)).text
            return model.itm(model.pooler(states[:, 0]))

        tokens = singles.image_tokens
        shown = asked(tokens)
        other = model.embed_image(self._pixels(asked(plan.negative_image)))
        itm, itm_right = matching_loss(
            match("itm_positive", shown, batch.text_ids, batch.text_mask),
            match("itm_negative_image", other, batch.text_ids, batch.text_mask),
            match("itm_negative_text", shown, plan.negative_text, plan.negative_mask),
            asked(plan.kept),
            totals.kept,
        )
        hidden = pair("mlm", batch.position, tokens, batch.mlm_ids, batch.text_mask).text
        target = batch.mlm_labels >= 0
        mlm, mlm_right = masked_lm_loss(model.mlm(hidden[target]), batch.mlm_labels[target], totals.targets)

        itc, itc_vl = (singles.features * plan.feature_grad).sum(dim=(0, 2)).view(2, 2).sum(dim=1)
        return Losses(itc, itc_vl, itm, mlm), {"itm_right": itm_right, "mlm_right": mlm_right}
