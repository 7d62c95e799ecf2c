"""Visual grounding: where in an image an expression points, learnt from pairs without boxes (ALBEF, Li et al. 2021).

The evidence is that of matching: the attention of the words to the patches in one layer, weighted by the gradient of
the logit of a match (Grad-CAM, Selvaraju et al. 2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo_ray.config import DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.grounding import Regions
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.experts import MoMELayer
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes.grounding import GroundingConfig, attended_layer
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.tasks.task import Columns, Evaluation, Score, ZeroShot, given, joined, pixels, share

_BATCH = 32  # pairs per pass: of each, the layers from the chosen one on are kept for the backward


class GroundingTuning(Pretraining):
    """Contrast and matching of pre-training, on expressions. Those of one image do not oppose each other."""

    def evaluation(self, schema: Schema) -> Evaluation:
        assert isinstance(self.settings, GroundingConfig)
        return Grounding(self.model, schema, self.settings.layer)


class Grounding(ZeroShot):
    """The share of expressions that are found. Where the map is 0 everywhere, the answer is the whole image.

    With a column `proposals`, `accuracy` is the published metric: the best proposal (`best_proposal`) has an IoU of at
    least 0.5 with the true box. Chance is that of a proposal drawn at random.

    Without a detector's boxes there are two stand-ins. `pointing`: the centre of the patch where the map is highest
    lies in the true box; chance is the share of the image that the box covers. `threshold_iou50`: the box around all
    patches above half the maximum has an IoU of at least 0.5; in place of chance, what the whole image would reach.

    `layer` is the layer whose attention is read (`recipes.grounding.attended_layer`).
    """

    def __init__(self, model: VLMo, schema: Schema, layer: int = -1):
        if model.itm is None:
            raise UserError("this model has no matching head ('itm'), which grounding needs; load a pre-trained one")
        self.model, self.layer = model, attended_layer(model.config, layer)
        self.has_proposals = "proposals" in schema

    def encoder(self) -> Regions:
        config = self.model.config
        return Regions(config.image_size, config.max_text_len, DataConfig(), self.has_proposals)

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch.trimmed()
        each = (batch.image.split(_BATCH), batch.text_ids.split(_BATCH), batch.text_mask.split(_BATCH))
        maps, odds = zip(*(self.maps(*some) for some in zip(*each, strict=True)), strict=True)
        heat, size, box = torch.cat(maps), batch.size.double(), batch.box.double()
        scale = torch.cat([size, size], dim=1)  # fractions of the image -> pixels
        point, region = peak(heat) * size, region_of(heat) * scale
        covered = (box[:, 2:] - box[:, :2]).prod(dim=1) / size.prod(dim=1)
        found = {"match": torch.cat(odds), "box": box, "covered": covered, "region": region}
        found["hit"] = ((box[:, :2] <= point) & (point <= box[:, 2:])).all(dim=1)
        found["region_iou"] = iou(region, box)
        if self.has_proposals:
            whole = torch.cat([torch.zeros_like(size), size], dim=1)
            chosen, by_chance = whole.clone(), []
            for row, count in enumerate(batch.num_proposals.tolist()):
                offered = batch.proposals[row, :count].double()
                width, height = batch.size[row].tolist()
                best = best_proposal(heat[row], offered, width, height)
                chosen[row] = offered[best] if best >= 0 else whole[row]
                guesses = offered if count else whole[row : row + 1]
                by_chance.append((iou(guesses, box[row]) >= 0.5).double().mean())
            found |= {"proposal": chosen, "proposal_iou": iou(chosen, box), "by_chance": torch.stack(by_chance)}
        return found

    def maps(self, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(where each text points [B,g,g], the probability [B] that it matches its image).

        image: uint8 [B,3,H,W]; ids, mask: [B,T]. The attention times its gradient, where that is above 0, is averaged
        over the heads and then over the tokens of the text, [CLS] and [SEP] included. ALBEF divides by the length of
        the padded text, which depends on the batch and changes no choice.
        """
        model = self.model
        with torch.inference_mode(False), torch.no_grad(), self._differentiated() as found:
            states = given(model.encode(image=pixels(model, image), text=ids, text_mask=mask, read=1).text)
            logits = given(model.itm)(given(model.pooler)(states[:, 0]))
            [weights] = found
            [gradient] = torch.autograd.grad(logits[:, 1].sum(), weights)
        length = ids.shape[1]
        of_patches = (weights.detach() * gradient.clamp(min=0))[:, :, :length, length + 1 :].mean(dim=1)
        heat = of_patches.sum(dim=1) / mask.sum(dim=1, keepdim=True)  # no token attends to padding: its gradient is 0
        side = model.config.image_size // model.config.patch_size
        return heat.unflatten(1, (side, side)), logits.detach().float().softmax(dim=1)[:, 1]

    @contextmanager
    def _differentiated(self) -> Iterator[list[Tensor]]:
        """Within, the chosen layer attends in a form that can be differentiated by its weights, which the list gets.

        The graph begins there: nothing is kept of the layers below, and no tensor of inference mode is part of it.
        Compiled layers would ignore the hook.
        """
        found: list[Tensor] = []

        def attend(layer, inputs, _) -> Tensor:
            torch.set_grad_enabled(True)
            weights = layer.weights(*inputs).detach().requires_grad_()
            found.append(weights)
            return layer.attended(inputs[0], weights)

        hook = cast(MoMELayer, self.model.layers[self.layer]).attention.register_forward_hook(attend)
        try:
            with torch.compiler.set_stance("force_eager"):
                yield found
        finally:
            hook.remove()

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        found = joined(blocks)
        scores = {}
        if self.has_proposals:
            scores["accuracy"] = share(found["proposal_iou"] >= 0.5, float(found["by_chance"].mean()))
        covered = found["covered"]
        return scores | {
            "pointing": share(found["hit"], float(covered.mean())),
            "threshold_iou50": share(found["region_iou"] >= 0.5, float((covered >= 0.5).mean())),
        }

    def predictions(self, block: Columns) -> Columns:
        """Boxes as "x0 y0 x1 y1" in pixels of the stored image; the score is the probability of a match."""
        answer = block["proposal" if self.has_proposals else "region"]
        prediction, truth = (np.array([_spelled(box) for box in boxes], object) for boxes in (answer, block["box"]))
        return {"id": block["id"], "prediction": prediction, "score": block["match"], "truth": truth}

    def remark(self, scores: dict[str, Score]) -> str:
        if "accuracy" in scores:
            return ""
        return "without a detector's boxes (a column 'proposals') the published accuracy cannot be computed"


def _spelled(box: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in box)


def peak(heat: Tensor) -> Tensor:
    """The centre (x, y) of the patch where a map is highest, [B,g,g] -> [B,2] as fractions of the image; the centre of
    the image where it is 0 everywhere."""
    side, flat = heat.shape[-1], heat.flatten(1)
    best = flat.argmax(dim=1)
    centre = (torch.stack([best % side, best // side], dim=1).double() + 0.5) / side
    return centre.masked_fill((flat.amax(dim=1) <= 0)[:, None], 0.5)


def region_of(heat: Tensor) -> Tensor:
    """The box around all patches above half the maximum of a map, [B,g,g] -> [B,4] as fractions of the image; the whole
    image where the map is 0 everywhere."""
    high = heat > heat.amax(dim=(1, 2), keepdim=True) / 2
    high = high | ~high.any(dim=2, keepdim=True).any(dim=1, keepdim=True)
    side, lines = heat.shape[-1], (high.any(dim=1).int(), high.any(dim=2).int())  # columns, rows: [B,g]
    first = [line.argmax(dim=1) for line in lines]
    last = [side - line.flip(1).argmax(dim=1) for line in lines]
    return torch.stack([*first, *last], dim=1).double() / side


def best_proposal(heat: Tensor, boxes: Tensor, width: int, height: int) -> int:
    """Which of the boxes [n,4] has the most of a map [g,g], by sum(map in the box) / sqrt(area); -1 if none has any.

    As in ALBEF: the map is resized to the image's size with bicubic interpolation, and coordinates are cut to whole
    pixels. Where all sums are 0 or below, its program repeats the box of the expression before.
    """
    shown = F.interpolate(heat.double()[None, None], size=(height, width), mode="bicubic")[0, 0]
    best, most = -1, 0.0
    for number, box in enumerate(boxes.tolist()):
        left, top, right, bottom = (max(0, int(value)) for value in box)
        area = (box[2] - box[0]) * (box[3] - box[1])
        score = float(shown[top:bottom, left:right].sum()) / area**0.5
        if score > most:
            best, most = number, score
    return best


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4].

    As in REFER and ALBEF, where the last pixel of a box x, y, w, h is x + w - 1 and sides are counted in pixels: the
    same number, but an overlap of one pixel or less in width or height is none.
    """
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inside = sides.prod(dim=-1) * (sides > 1).all(dim=-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b)]
    return inside / (areas[0] + areas[1] - inside)
