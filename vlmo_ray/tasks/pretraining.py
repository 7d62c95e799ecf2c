"""Vision-language pre-training: contrast, matching on global hard negatives, masked language modelling.

A step has three parts (paper section 3.3). `encode` runs the unimodal passes over images and texts, in both
branches; `plan` looks at the whole global batch and decides what each local row needs from it: its contrastive
gradient and its hard negatives; `losses` runs the passes over pairs. `train/step.py` puts them in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmo_ray.config import HEADS, Config
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Encoder
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.encoders.pairs import Pairs as PairEncoder
from vlmo_ray.data.schema import PAIRS, Schema
from vlmo_ray.data.text import IGNORED_LABEL
from vlmo_ray.model.flops import step_flops
from vlmo_ray.model.heads import ContrastHead
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.objectives.contrastive import Contrast, Taught, contrast, sigmoid_contrast
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.masked_lm import masked_lm_loss
from vlmo_ray.objectives.matching import hard_negatives, matching_loss, rows_to_match
from vlmo_ray.objectives.pairs import Pairs
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.rng import Noise, Noises, stream, uniforms_torch
from vlmo_ray.tasks.task import Counts, Evaluation, GlobalTask, Losses, Pass, Term, given, pixels

MATCHING = ("itm_positive", "itm_negative_image", "itm_negative_text")  # passes, whose draws have these names
PairRows = tuple[Tensor, Tensor, Tensor, Tensor]  # positions [b], image tokens [b,P,D], token ids and mask [b,T]
IMAGE, TEXT = range(2)  # of the main branch; then those of the VL branch


@dataclass
class Unimodal:
    """The dual-encoder side of a micro-batch, and what its pair passes share with it."""

    features: Tensor  # [b, 4, D], L2-normalised: image, text, image and text of the VL branch (2 without that)
    image_tokens: Tensor  # [b, P, D] embedded, before the first layer
    bias: Tensor | None  # [L, H, S, S]
    kept: Tensor | None = None  # [P], which of an image's tokens these are; None: all
    lesson: Lesson | None = None


@dataclass
class Lesson:
    """What the average of the weights says of a micro-batch, without drop path (ALBEF, Li et al. 2021)."""

    features: Tensor  # as of `Unimodal`
    words: Tensor | None  # [M, V], the probabilities at the masked words


@dataclass
class Plan:
    """What the global batch means for local rows; sliced along with the micro-batches."""

    feature_grad: Tensor  # as the features, of the contrastive losses
    asked: Tensor  # bool [b], on the CPU: the rows that matching is computed for
    negative_image: Tensor  # uint8 [b, 3, H, W], one for each text
    negative_text: Tensor  # int64 [b, T], one for each image
    negative_mask: Tensor  # bool [b, T]
    negative_len: Tensor  # int64 [b], on the CPU: tokens of each negative text
    kept: Tensor  # bool [b]: asked, valid, and with a negative

    def rows(self, wanted: slice | Tensor) -> Plan:
        """As `Batch.rows`, with the texts cut where the longest one ends."""
        parts = {name: getattr(self, name) for name in self.__dataclass_fields__}
        some = {name: x[wanted if isinstance(wanted, slice) else wanted.to(x.device)] for name, x in parts.items()}
        longest = int(some["negative_len"].max())
        return Plan(**some | {name: some[name][:, :longest] for name in ("negative_text", "negative_mask")})

    def without_losses(self) -> Plan:
        """The same passes, nothing of which counts."""
        return replace(self, feature_grad=0 * self.feature_grad, kept=self.kept & False)


@dataclass
class Totals:
    """Of the whole step, equal on every worker."""

    kept: Tensor  # pairs with all three matching rows
    targets: Tensor  # masked tokens to predict
    branches: list[Contrast]  # main, VL
    negative_similarity: Tensor  # local sum of the cosines of the chosen negatives, 2 per kept pair
    without_negative: Tensor  # local count of valid rows that were asked and have no candidate
    exchanged_bytes: int
    same_share: Tensor  # of all pairs of two rows, those that the same image or text keeps from being negatives


class Pretraining(GlobalTask):
    """VLMo pre-training; the three objectives share every weight of the model. Terms may be left out."""

    def __init__(self, model: VLMo, config: Config, schema: Schema = PAIRS):
        super().__init__(model, config, schema)
        assert isinstance(config.task, PretrainingConfig)
        self.settings = config.task
        self.data = config.data
        self.slice_size = config.slice_size
        if self.settings.patch_dropout:
            self.kept_patches = self.settings.kept_patches(model.config.num_patches)
        self.full_from = config.total_steps - self.settings.unmasked_steps  # the first step with all patches
        self.repeated = 2 * len(self.contrasts)
        self.matches, self.predicts = self.settings.itm > 0, self.settings.mlm > 0
        self.masked_matching = self.settings.masked_matching and self.matches and self.predicts
        self.shown = tuple(name for name in self.settings.heads if name != "itc_vl")
        self.draws_captions = "captions" in schema and "text" not in schema  # one of several for each row

    @property
    def contrasts(self) -> dict[str, ContrastHead]:
        """The contrastive terms and their heads."""
        main = {"itc": given(self.model.itc)}
        return main | {"itc_vl": given(self.model.itc_vl)} if self.settings.vl_contrast else main

    def encoder(self) -> Encoder:
        config, captions = self.model.config, self.draws_captions
        sizes = config.image_size, config.max_text_len
        if not self.predicts:
            return PairEncoder(*sizes, self.data, captions=captions)
        return MaskedPairs(*sizes, self.data, config.vocab_size, self.settings.mlm_probability, captions=captions)

    def order(self, batch: Batch) -> Tensor:
        # the rows that matching is computed for are spread evenly over neighbouring positions
        return torch.arange(len(batch)) if self.settings.itm_share < 1 else super().order(batch)

    def trainable(self, name: str) -> bool:
        """Only what a term reaches: not the heads of others, nor VL experts that nothing passes through."""
        _, inside, rest = name.partition("model.layers.")
        if inside and ".experts.vl." in rest:
            return self.matches or self.predicts or self.settings.vl_contrast
        head = name.removeprefix("model.").partition(".")[0]
        return head in self.settings.heads if head in HEADS else head != "pooler" or self.matches

    def evaluation(self, schema: Schema) -> Evaluation:
        from vlmo_ray.tasks.retrieval import Retrieval  # which trains by this module

        return Retrieval(self.model, schema)

    def chance(self, global_batch: int) -> dict[str, float]:
        found = {"mlm": math.log(self.model.config.vocab_size), "itm": math.log(3) - math.log(4) / 3}
        if self.settings.contrast == "softmax":
            found |= dict.fromkeys(("itc", "itc_vl"), math.log(global_batch))
        return {name: value for name, value in found.items() if name in self.settings.heads}

    def passes(self) -> list[Pass]:
        config = self.model.config
        text_len, top = config.max_text_len, config.depth - config.vl_start
        own = 2 * self.matches + (self.predicts and not self.masked_matching)
        unimodal = [Pass(0, True), Pass(text_len, False)]
        branch = [Pass(0, True, top), Pass(text_len, False, top)] if self.settings.vl_contrast else []
        pairs = [Pass(text_len, image=True, times=times) for times in (own, int(self.matches)) if times]
        return [*unimodal, *branch, *pairs]

    def taught_passes(self) -> list[Pass]:
        passes = self.passes()
        words = [replace(passes[-1], times=1)] * self.predicts
        return [*passes[: self.repeated], *words] if self.settings.distill else []

    def traffic(self, global_batch: int, workers: int) -> dict[str, float]:
        config, rows = self.model.config, global_batch / workers
        remote, branches = global_batch - rows, len(self.contrasts)
        features = 2 * branches * 4 * config.width * (2 if self.settings.distill else 1)
        keys = 4 * 8  # of image and text, whether a row is valid, its masked words
        sums = branches * (5 if self.settings.distill else 3) * 4 if self.settings.contrast == "softmax" else 0
        found = {"features": remote * (features + keys + sums)}
        if self.matches:
            distinct = global_batch * (1 - (1 - 1 / global_batch) ** rows)  # negatives drawn evenly
            found["negative images"] = distinct * (1 - 1 / workers) * 3 * config.image_size**2
            found["texts and choices"] = remote * (4 * config.max_text_len + 2 * 8)
        return found

    def head_bytes_per_row(self) -> float:
        """What a teacher says of masked words."""
        config = self.model.config
        each = 4.0 * self.settings.mlm_probability * config.max_text_len * config.vocab_size
        return each if self.predicts and self.settings.distill else 0.0

    def flops_per_row(self) -> float:
        config, whole = self.model.config, len(self.settings.heads) == 4
        return step_flops(config, config.max_text_len, self.kept_patches) if whole else super().flops_per_row()

    def without_losses(self, batch: Batch) -> Batch:
        if not self.predicts:
            return batch.without_valid()
        labels = torch.full_like(batch.mlm_labels, IGNORED_LABEL)
        return batch.without_valid().with_columns(mlm_labels=labels)

    def taught_share(self, step: int) -> float:
        """Grows linearly from 0 over the first `distill_ramp` steps."""
        ramp = self.settings.distill_ramp
        return self.settings.distill * (min(1.0, step / ramp) if ramp else 1.0)

    def teach(self, batch: Batch) -> Lesson:
        encoded, words = self.encode(batch, None), None
        if self.predicts:
            image, text, mask = encoded.image_tokens, batch.mlm_ids, batch.text_mask
            read = text.shape[1]
            states = given(self.model.encode(image=image, text=text, text_mask=mask, read=read, bias=encoded.bias).text)
            logits = given(self.model.mlm)(states[batch.mlm_labels >= 0])
            words = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
        return Lesson(encoded.features, words)

    def encode(self, batch: Batch, step: int | None, lesson: Lesson | None = None) -> Unimodal:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Without a step there is no drop path."""
        model = self.model

        def noise(name: str) -> Noise | None:
            return None if step is None else self.noise(name, batch.position, step)

        kept = None if step is None else self._kept_tokens(step, batch.position.device)
        bias = model.position_bias(batch.text_ids.shape[1], kept=kept)
        tokens = self._image_tokens(batch.image, kept)
        both = self.settings.vl_contrast
        image = model.encode(image=tokens, read=1, bias=bias, vl_branch=both, noise=noise("image"))
        ids, mask = batch.text_ids, batch.text_mask
        text = model.encode(text=ids, text_mask=mask, read=1, bias=bias, vl_branch=both, noise=noise("text"))
        states = [(image.image, text.text), (image.image_vl, text.text_vl)]
        features: list[Tensor] = []
        for head, (images, texts) in zip(self.contrasts.values(), states, strict=False):
            features += [head.image(given(images)[:, 0]), head.text(given(texts)[:, 0])]
        return Unimodal(torch.stack(features, dim=1), tokens, bias, kept, lesson)

    def _kept_tokens(self, step: int, device: torch.device) -> Tensor | None:
        """The image tokens [P] that a step sees, the first of which is [I_CLS]; None: all.

        They are the same for all images, so that the relative bias stays [L,H,S,S] for the whole batch.
        """
        if self.kept_patches is None or step >= self.full_from:
            return None
        nothing = torch.zeros(1, dtype=torch.int64, device=device)
        draws = uniforms_torch(stream(self.seed, "patch_dropout", step), nothing, self.model.config.num_patches)[0]
        return torch.cat([nothing, 1 + draws.argsort()[: self.kept_patches].sort().values])

    def _image_tokens(self, image: Tensor, kept: Tensor | None) -> Tensor:
        """uint8 [b,3,H,W] -> [b,P,D]."""
        tokens = self.model.embed_image(pixels(self.model, image))
        return tokens if kept is None else tokens[:, kept]

    @torch.no_grad()
    def plan(
        self, batch: Batch, features: Tensor, workers: Workers, step: int, taught: Tensor | None = None
    ) -> tuple[Plan, Totals]:
        """`batch`, `features` and `taught` are all rows of this worker; the collectives of a step are here."""
        own_targets = (batch.mlm_labels >= 0).sum(dim=1) if self.predicts else torch.zeros_like(batch.position)
        facts = torch.stack([batch.image_key, batch.text_key, batch.valid.long(), own_targets], dim=1)
        image_key, text_key, valid, targets = workers.gather(facts).unbind(1)
        valid = valid.bool()
        pairs = Pairs(image_key, text_key, valid, workers.first, len(batch))

        everything = workers.gather(features)
        all_taught = None if taught is None else workers.gather(taught)

        def lesson(i: int) -> Taught | None:
            if taught is None or all_taught is None:
                return None
            share = self.taught_share(step)
            return Taught((taught[:, i], taught[:, i + 1], all_taught[:, i], all_taught[:, i + 1]), share)

        branches = [
            self._contrast(head, features[:, i : i + 2], everything[:, i : i + 2], pairs, workers, lesson(i))
            for head, i in zip(self.contrasts.values(), (0, 2), strict=False)
        ]
        feature_grad = torch.stack([grad for c in branches for grad in (c.image_grad, c.text_grad)], dim=1)
        feature_grad *= self.settings.feature_grad_scale
        if not self.matches:
            nobody, nothing = torch.zeros_like(batch.valid), torch.zeros((), device=features.device)
            texts = (batch.text_ids, batch.text_mask, batch.text_len)
            plan = Plan(feature_grad, nobody.cpu(), batch.image, *texts, nobody)
            return plan, Totals(nobody.sum(), targets.sum(), branches, nothing, nothing, 0, pairs.same_share())

        asked = rows_to_match(workers.first, len(batch), self.slice_size, self.settings.itm_share)
        rows = asked.to(features.device)

        def negatives(of: int, among: int, purpose: str) -> Tensor:
            """Positions `[b]`, -1 for rows that have none or are not asked."""
            chosen = hard_negatives(
                features[:, of],
                everything[:, among],
                given(self.model.itc).log_scale,
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
        texts = workers.gather(self._matched_ids(batch).masked_fill(~batch.text_mask, -1).to(torch.int32))
        text = texts[text_for_image].long()

        plan = Plan(
            feature_grad=feature_grad,
            asked=torch.zeros(len(batch), dtype=torch.bool).index_fill_(0, asked, True),
            negative_image=images,
            negative_text=text.clamp(min=0),
            negative_mask=text >= 0,
            negative_len=(text >= 0).sum(dim=1).cpu(),
            kept=kept,
        )
        totals = Totals(
            kept=choice[:, 1].sum(),
            targets=targets.sum(),
            branches=branches,
            negative_similarity=(similarity * kept).sum(),
            without_negative=batch.valid[rows].sum() - kept.sum(),
            exchanged_bytes=exchanged,
            same_share=pairs.same_share(),
        )
        return plan, totals

    def _contrast(
        self,
        head: ContrastHead,
        local: Tensor,
        everything: Tensor,
        pairs: Pairs,
        workers: Workers,
        taught: Taught | None,
    ) -> Contrast:
        """Of one branch: features `[b, 2, D]` and `[N, 2, D]`, image and text."""
        (image, text), (images, texts) = local.unbind(1), everything.unbind(1)
        if head.logit_bias is not None:
            return sigmoid_contrast(image, text, images, texts, head.log_scale, head.logit_bias, pairs)
        smoothing = self.settings.label_smoothing
        return contrast(
            image, text, images, texts, head.log_scale, pairs, workers, label_smoothing=smoothing, taught=taught
        )

    def closing(self, totals: Totals) -> Losses:
        """The contrast's values, and terms whose backward gives its gradients to temperatures and biases."""
        terms = {}
        for (name, head), branch in zip(self.contrasts.items(), totals.branches, strict=True):
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
        temperatures = [branch.temperature for branch in totals.branches]
        names = ["temperature", "temperature_vl"]
        found = dict(zip(names, temperatures, strict=False)) | {"same_share": totals.same_share}
        if self.matches:
            kept = totals.kept.to(torch.float64)
            found |= {
                "itm_accuracy": sums["itm_right"] / (3 * kept).clamp(min=1),
                "negative_similarity": sums["negative_similarity"] / (2 * kept).clamp(min=1),
                "pairs_without_negative": sums["without_negative"],
                "exchanged_bytes": sums["exchanged_bytes"],
            }
        if self.predicts:
            found["mlm_accuracy"] = sums["mlm_right"] / totals.targets.to(torch.float64).clamp(min=1)
        return found

    def warning(self, figures: dict[str, float], num_rows: int) -> str:
        nobody = figures.get("pairs_without_negative", 0) > 0 and figures["itm"] == 0.0
        matching = "no pair has a hard negative, so matching is not trained; the data needs pairs of different images"
        return super().warning(figures, num_rows) or (matching if nobody else "")

    def losses(self, batch: Batch, encoded: Unimodal, plan: Plan, totals: Totals, step: int) -> Losses:
        """The terms of a micro-batch, with its pair passes: three for matching, one for masked language modelling.

        The contrastive terms hand on the gradients at the features; their values are in `totals.branches`.
        """
        model, weights = self.model, self.settings
        terms: dict[str, Term] = {}
        sums: Counts = {}
        branches = (encoded.features * plan.feature_grad).sum(dim=(0, 2)).view(-1, 2).sum(dim=1)
        for name, term, total in zip(self.contrasts, branches, totals.branches, strict=True):
            terms[name] = Term(term, weights.itc / len(branches), torch.zeros_like(total.loss))
        states = self._pair_passes(batch, encoded, plan, step)
        if self.matches:
            itm_head, pooler = given(model.itm), given(model.pooler)
            positive, image, text = (itm_head(pooler(states[name][:, 0])) for name in MATCHING)
            kept = plan.kept[plan.asked.to(plan.kept.device)]
            term, sums["itm_right"] = matching_loss(positive, image, text, kept, totals.kept)
            terms["itm"] = Term(term, weights.itm)
        if self.predicts:
            target = batch.mlm_labels >= 0
            hidden = states["itm_positive" if self.masked_matching else "mlm"]
            labels, taught = batch.mlm_labels[target], None
            if encoded.lesson is not None and encoded.lesson.words is not None:
                taught = encoded.lesson.words[: len(labels)]  # of a row that must not count, none
            share = 0.0 if taught is None else self.taught_share(step)
            head = given(model.mlm)
            found = masked_lm_loss(head.hidden(hidden[target]), head.decoder, labels, totals.targets, share, taught)
            term, sums["mlm_right"] = found
            terms["mlm"] = Term(term, weights.mlm)
        return Losses(terms, sums)

    def _matched_ids(self, batch: Batch) -> Tensor:
        """The texts [b,T] as matching sees them."""
        return batch.mlm_ids if self.masked_matching else batch.text_ids

    def _pair_passes(self, batch: Batch, encoded: Unimodal, plan: Plan, step: int) -> dict[str, Tensor]:
        """The text states [b,T,D] of every pass over pairs. Those with the rows' own texts run as one."""
        model, position = self.model, batch.position
        own: dict[str, PairRows] = {}
        opposed: dict[str, PairRows] = {}  # their texts are longer or shorter
        if self.matches:
            rows = slice(None) if plan.asked.all() else plan.asked.nonzero().squeeze(1).to(position.device)
            at, shown, ids, mask = (
                x[rows] for x in (position, encoded.image_tokens, self._matched_ids(batch), batch.text_mask)
            )
            other = self._image_tokens(plan.negative_image[rows], encoded.kept)
            own["itm_positive"], own["itm_negative_image"] = (at, shown, ids, mask), (at, other, ids, mask)
            opposed["itm_negative_text"] = (at, shown, plan.negative_text[rows], plan.negative_mask[rows])
        if self.predicts and not self.masked_matching:
            own["mlm"] = (position, encoded.image_tokens, batch.mlm_ids, batch.text_mask)

        def run(passes: dict[str, PairRows], bias: Tensor | None, read: int) -> dict[str, Tensor]:
            if not passes:
                return {}
            positions, images, texts, masks = zip(*passes.values(), strict=True)
            noise = Noises.of(self.noise(name, at, step) for name, at in zip(passes, positions, strict=True))
            image, text, mask = (torch.cat(each) for each in (images, texts, masks))
            states = model.encode(image=image, text=text, text_mask=mask, read=read, bias=bias, noise=noise).text
            return dict(zip(passes, given(states).split([len(at) for at in positions]), strict=True))

        length = batch.text_ids.shape[1]
        found = run(own, encoded.bias, length if self.predicts else 1)
        longest = plan.negative_text.shape[1]
        bias = encoded.bias if length == longest else model.position_bias(longest, kept=encoded.kept)
        return found | run(opposed, bias, 1)
