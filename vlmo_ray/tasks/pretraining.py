"""Vision-language pre-training: contrast, matching on global hard negatives, masked language modelling.

A step has three parts (paper section 3.3). `encode` runs the unimodal passes over images and texts, in both
branches; `plan` looks at the whole global batch and decides what each local row needs from it: its contrastive
gradient and its hard negatives; `losses` runs the passes over pairs. `train/step.py` puts them in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmo_ray.config import Config
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.schema import PAIRS, Schema
from vlmo_ray.data.text import IGNORED_LABEL
from vlmo_ray.model.flops import step_flops
from vlmo_ray.model.heads import ContrastHead
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.contrastive import Contrast, contrast, sigmoid_contrast
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.masked_lm import masked_lm_loss
from vlmo_ray.objectives.matching import hard_negatives, matching_loss, rows_to_match
from vlmo_ray.objectives.pairs import Pairs
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.rng import Noise, stream
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.tasks.task import Counts, GlobalTask, Losses, Pass, Term, given, pixels

IMAGE, TEXT, IMAGE_VL, TEXT_VL = range(4)


@dataclass
class Unimodal:
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

    def rows(self, wanted: slice) -> Plan:
        return Plan(*(getattr(self, name)[wanted] for name in self.__dataclass_fields__))

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


class Pretraining(GlobalTask):
    """VLMo pre-training; the three objectives share every weight of the model."""

    shown = ("itc", "itm", "mlm")

    def __init__(self, model: VLMo, config: Config, schema: Schema = PAIRS):
        super().__init__(model, config, schema)
        assert isinstance(config.task, PretrainingConfig)
        self.settings = config.task
        self.data = config.data
        self.slice_size = config.slice_size

    @property
    def itc(self) -> ContrastHead:
        return given(self.model.itc)

    @property
    def itc_vl(self) -> ContrastHead:
        return given(self.model.itc_vl)

    def encoder(self) -> MaskedPairs:
        config = self.model.config
        return MaskedPairs(
            config.image_size, config.max_text_len, self.data, config.vocab_size, self.settings.mlm_probability
        )

    def trainable(self, name: str) -> bool:
        """Not the heads of other tasks, which no term reaches."""
        return not name.startswith(("model.vqa.", "model.nlvr2."))

    def evaluation(self, schema: Schema) -> Retrieval:
        return Retrieval(self.model, schema)

    def passes(self) -> list[Pass]:
        config = self.model.config
        text_len, top = config.max_text_len, config.depth - config.vl_start
        pair = Pass(text_len, image=True)
        unimodal = [Pass(0, True), Pass(text_len, False), Pass(0, True, top), Pass(text_len, False, top)]
        return [*unimodal, pair, pair, pair, pair]

    def head_bytes_per_row(self) -> float:
        """Masked words alone get logits: bf16, float32, and their log-softmax."""
        config = self.model.config
        return 10.0 * self.settings.mlm_probability * config.max_text_len * config.vocab_size

    def flops_per_row(self) -> float:
        return step_flops(self.model.config, self.model.config.max_text_len)

    def without_losses(self, batch: Batch) -> Batch:
        labels = torch.full_like(batch.mlm_labels, IGNORED_LABEL)
        return batch.without_valid().with_columns(mlm_labels=labels)

    def encode(self, batch: Batch, step: int) -> Unimodal:
        model = self.model

        def noise(name: str) -> Noise | None:
            return self.noise(name, batch.position, step)

        bias = model.position_bias(batch.text_ids.shape[1])
        tokens = model.embed_image(pixels(model, batch.image))
        image = model.encode(image=tokens, bias=bias, vl_branch=True, noise=noise("image"))
        text = model.encode(
            text=batch.text_ids, text_mask=batch.text_mask, bias=bias, vl_branch=True, noise=noise("text")
        )
        features = torch.stack(
            [
                self.itc.image(given(image.image)[:, 0]),
                self.itc.text(given(text.text)[:, 0]),
                self.itc_vl.image(given(image.image_vl)[:, 0]),
                self.itc_vl.text(given(text.text_vl)[:, 0]),
            ],
            dim=1,
        )
        return Unimodal(features, tokens, bias)

    @torch.no_grad()
    def plan(self, batch: Batch, features: Tensor, workers: Workers, step: int) -> tuple[Plan, Totals]:
        """`batch` and `features` `[b, 4, D]` are all rows of this worker; the collectives of a step are here."""
        facts = torch.stack(
            [batch.image_key, batch.text_key, batch.valid.long(), (batch.mlm_labels >= 0).sum(dim=1)], dim=1
        )
        image_key, text_key, valid, targets = workers.gather(facts).unbind(1)
        valid = valid.bool()
        pairs = Pairs(image_key, text_key, valid, workers.first, len(batch))

        everything = workers.gather(features)
        main = self._contrast(self.itc, features[:, :2], everything[:, :2], pairs, workers)
        vl = self._contrast(self.itc_vl, features[:, 2:], everything[:, 2:], pairs, workers)

        asked = rows_to_match(workers.first, len(batch), self.slice_size, self.settings.itm_share)
        rows = asked.to(features.device)

        def negatives(of: int, among: int, purpose: str) -> Tensor:
            """Positions `[b]`, -1 for rows that have none or are not asked."""
            chosen = hard_negatives(
                features[:, of],
                everything[:, among],
                self.itc.log_scale,
                pairs,
                stream(self.seed, purpose, step),
                asked=rows,
                among=None if self.settings.negatives == "global" else self.slice_size,
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
            feature_grad=feature_grad * self.settings.feature_grad_scale,
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
        (image, text), (images, texts) = local.unbind(1), everything.unbind(1)
        if head.logit_bias is not None:
            return sigmoid_contrast(image, text, images, texts, head.log_scale, head.logit_bias, pairs)
        smoothing = self.settings.label_smoothing
        return contrast(image, text, images, texts, head.log_scale, pairs, workers, label_smoothing=smoothing)

    def closing(self, totals: Totals) -> Losses:
        """The contrast's values, and terms whose backward gives its gradients to temperatures and biases."""
        terms = {}
        heads = {"itc": self.itc, "itc_vl": self.itc_vl}
        for (name, head), branch in zip(heads.items(), totals.branches, strict=True):
            term = head.log_scale * branch.scale_grad
            if head.logit_bias is not None:
                term = term + head.logit_bias * given(branch.bias_grad)
            terms[name] = Term(term.sum(), value=branch.loss)
        sums = {
            "negative_similarity": totals.negative_similarity,
            "without_negative": totals.without_negative,
            "exchanged_bytes": torch.tensor(totals.exchanged_bytes, device=totals.kept.device),
        }
        return Losses(terms, sums)

    def metrics(self, sums: Counts, totals: Totals) -> dict[str, Tensor]:
        kept, targets = totals.kept.to(torch.float64), totals.targets.to(torch.float64)
        main, vl = totals.branches
        return {
            "itm_accuracy": sums["itm_right"] / (3 * kept).clamp(min=1),
            "mlm_accuracy": sums["mlm_right"] / targets.clamp(min=1),
            "negative_similarity": sums["negative_similarity"] / (2 * kept).clamp(min=1),
            "temperature": main.temperature,
            "temperature_vl": vl.temperature,
            "pairs_without_negative": sums["without_negative"],
            "exchanged_bytes": sums["exchanged_bytes"],
        }

    def warning(self, figures: dict[str, float], num_rows: int) -> str:
        nobody = figures["pairs_without_negative"] > 0 and figures["itm"] == 0.0
        matching = "no pair has a hard negative, so matching is not trained; the data needs pairs of different images"
        return super().warning(figures, num_rows) or (matching if nobody else "")

    def losses(self, batch: Batch, encoded: Unimodal, plan: Plan, totals: Totals, step: int) -> Losses:
        """The pair passes of a micro-batch: three for matching, one for masked language modelling.

        The contrastive terms hand on the gradients at the features; their values are in `totals.branches`.
        """
        model, itm_head, pooler = self.model, given(self.model.itm), given(self.model.pooler)
        rows = None if plan.asked.all() else plan.asked.nonzero().squeeze(1).to(batch.position.device)

        def asked(x: Tensor) -> Tensor:
            return x if rows is None else x[rows]

        def pair(name: str, position: Tensor, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            noise = self.noise(name, position, step)
            return given(model.encode(image=image, text=text, text_mask=mask, bias=encoded.bias, noise=noise).text)

        def match(name: str, image: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            states = pair(name, asked(batch.position), image, asked(text), asked(mask))
            return itm_head(pooler(states[:, 0]))

        tokens = encoded.image_tokens
        shown = asked(tokens)
        other = model.embed_image(pixels(model, asked(plan.negative_image)))
        itm, itm_right = matching_loss(
            match("itm_positive", shown, batch.text_ids, batch.text_mask),
            match("itm_negative_image", other, batch.text_ids, batch.text_mask),
            match("itm_negative_text", shown, plan.negative_text, plan.negative_mask),
            asked(plan.kept),
            totals.kept,
        )
        hidden = pair("mlm", batch.position, tokens, batch.mlm_ids, batch.text_mask)
        target = batch.mlm_labels >= 0
        mlm, mlm_right = masked_lm_loss(given(model.mlm)(hidden[target]), batch.mlm_labels[target], totals.targets)

        itc, itc_vl = (encoded.features * plan.feature_grad).sum(dim=(0, 2)).view(2, 2).sum(dim=1)
        weights, nothing = self.settings, torch.zeros_like(totals.branches[0].loss)
        terms = {  # the contrastive term is the mean of its two branches
            "itc": Term(itc, weights.itc * 0.5, nothing),
            "itc_vl": Term(itc_vl, weights.itc * 0.5, nothing),
            "itm": Term(itm, weights.itm),
            "mlm": Term(mlm, weights.mlm),
        }
        return Losses(terms, {"itm_right": itm_right, "mlm_right": mlm_right})
