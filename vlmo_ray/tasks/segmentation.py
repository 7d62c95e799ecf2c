"""Semantic segmentation with the image encoder and UperNet (paper section 4.4)."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlmo_ray import rng
from vlmo_ray.config import Config, DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.segments import Segments, WholeSegments
from vlmo_ray.data.schema import IGNORED, Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.upernet import UperNet, resized
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes.segmentation import SegmentationConfig
from vlmo_ray.tasks.task import (
    Columns,
    Counts,
    Evaluation,
    Losses,
    Pass,
    Score,
    Task,
    Term,
    in_image_pass,
    layer_rate,
    pixels,
)

_WINDOWS = 8  # that pass through the model at once


class Segmentation(Task):
    """One class a pixel; the classes are those of the data set's `mask` column.

    Both losses are means over the pixels of the global batch that have a class.
    """

    shown = ("cross_entropy", "pixel_accuracy")

    def __init__(self, model: VLMo, config: Config, schema: Schema):
        super().__init__(model, config, schema)
        assert isinstance(config.task, SegmentationConfig)
        settings = self.settings = config.task
        self.data = config.data
        if "mask" not in schema or len(schema.field("mask").values) < 2:
            raise UserError("segmentation needs a 'mask' column with its classes: `vlmo prepare ade20k`")
        self.names = schema.field("mask").values
        width = model.config.width
        self.head = UperNet(width, settings.channels, len(self.names), settings.auxiliary_channels)
        for name, module in self.head.named_modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                self.init_conv(f"head.{name}", module)

    def init_conv(self, name: str, conv: nn.Conv2d | nn.ConvTranspose2d) -> None:
        """Starts a convolution as He et al. (2015) do, from the seed; its bias at 0."""
        generator = torch.Generator().manual_seed(rng.stream(self.seed, f"init/task.{name}") >> 1)
        with torch.no_grad():
            values = torch.empty(conv.weight.shape)
            nn.init.kaiming_normal_(values, nonlinearity="relu", generator=generator)
            conv.weight.copy_(values)
            if conv.bias is not None:
                conv.bias.zero_()

    def encoder(self) -> Segments:
        return Segments(self.model.config.image_size, self.names, self.data)

    def trainable(self, name: str) -> bool:
        return in_image_pass(name) and not name.startswith("model.norm.")

    def lr_scale(self, name: str) -> float:
        if name.startswith("head."):
            return 1.0
        return layer_rate(name, self.model.config.depth, self.settings.layer_decay)

    def segment(
        self, shown: Tensor, noise: rng.Noise | None = None, draws: rng.Noise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels [B,3,S,S] from -1 to 1 -> logits [B,K,4g,4g] and auxiliary ones [B,K,g,g], of g x g patches.

        `noise` holds the draws of drop path, `draws` those of dropout.
        """
        settings, grid = self.settings, math.isqrt(self.model.config.num_patches)
        states = self.model.encode(image=shown, layers=settings.layers, noise=noise).layers
        maps = [state[:, 1:].transpose(1, 2).unflatten(2, (grid, grid)) for state in states]
        keep = [None, None]
        if draws is not None:
            channels = {"dropout": settings.channels, "auxiliary_dropout": settings.auxiliary_channels}
            keep = [(draws.uniform(k, n) >= settings.dropout) / (1 - settings.dropout) for k, n in channels.items()]
        return self.head(maps, *keep)

    def counts(self, batch: Batch) -> Counts:
        return super().counts(batch) | {"pixels": (_classes(batch) != IGNORED).sum()}

    def losses(self, batch: Batch, totals: Counts, step: int) -> Losses:
        noise = self.noise("image", batch.position, step)
        draws = rng.Noise(self.seed, step, "head", batch.position) if self.settings.dropout else None
        logits, auxiliary = self.segment(pixels(self.model, batch.image), noise, draws)
        classes, count = _classes(batch), totals["pixels"].clamp(min=1)

        def loss(found: Tensor) -> Tensor:
            found = resized(found.to(torch.promote_types(found.dtype, torch.float32)), *classes.shape[1:])
            return F.cross_entropy(found, classes.long(), ignore_index=IGNORED, reduction="sum") / count

        right = (resized(logits.detach(), *classes.shape[1:]).argmax(dim=1) == classes).sum()
        terms = {"cross_entropy": Term(loss(logits)), "auxiliary": Term(loss(auxiliary), self.settings.auxiliary)}
        return Losses(terms, {"right": right})

    def metrics(self, sums: Counts, totals: Counts) -> dict[str, Tensor]:
        return {"pixel_accuracy": sums["right"] / totals["pixels"].clamp(min=1)}

    def chance(self, global_batch: int) -> dict[str, float]:
        return dict.fromkeys(("cross_entropy", "auxiliary"), math.log(len(self.names)))

    def passes(self) -> list[Pass]:
        return [Pass(0, image=True)]

    def flops_per_row(self) -> float:
        return super().flops_per_row() + 3.0 * self._head_flops

    @functools.cached_property
    def _head_flops(self) -> float:
        """Of one forward of the head over one row."""
        config, settings = self.model.config, self.settings
        grid = math.isqrt(config.num_patches)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            head = UperNet(config.width, settings.channels, len(self.names), settings.auxiliary_channels)
            head([torch.zeros(1, config.width, grid, grid)] * 4)
        return counter.get_total_flops()

    def head_bytes_per_row(self) -> float:
        # two sets of logits of the image's size with their softmax and gradient, and UperNet's maps on its finest grid
        finest = 16 * self.model.config.num_patches
        return 24.0 * len(self.names) * self.model.config.image_size**2 + 31.0 * self.settings.channels * finest

    def evaluation(self, schema: Schema) -> MeanIoU:
        return MeanIoU(self)


class MeanIoU(Evaluation):
    """Intersection over union, summed over the whole data set for each class, then the mean over the classes.

    Images keep their aspect ratio: the shorter side is as long as the model's image. A window of that size slides by
    two thirds of it, logits are averaged where windows overlap, and resized to the stored mask. With several `scales`,
    or `flipped`, probabilities are averaged; an image that would be smaller than the window is as large as that.
    """

    def __init__(self, task: Segmentation):
        self.task = task

    def encoder(self) -> WholeSegments:
        return WholeSegments(self.task.model.config.image_size, self.task.names, DataConfig())

    def rows(self, batch: Batch) -> dict[str, Tensor]:
        """Pixels by class: int64 [B,3,K] of those that are right, predicted, and labelled."""
        shapes = zip(batch.image_shape.tolist(), batch.mask_shape.tolist(), strict=True)
        found = []
        for row, (shape, mask_shape) in enumerate(shapes):
            image = batch.image[row, : 3 * math.prod(shape)].view(1, 3, *shape)
            mask = batch.mask[row, : math.prod(mask_shape)].view(*mask_shape)
            found.append(areas(self.predicted(image, mask.shape), mask, len(self.task.names)))
        return {"areas": torch.stack(found)}

    def predicted(self, image: Tensor, shape: torch.Size) -> Tensor:
        """uint8 [1,3,h,w] -> the class of each pixel of an image of `shape` (height, width)."""
        settings, shown = self.task.settings, pixels(self.task.model, image)
        views = [view for scale in settings.scales for view in self._views(shown, scale)]

        def logits(view: Tensor, mirrored: bool) -> Tensor:
            found = resized(self._slide(view), *shape)[0]
            return found.flip(2) if mirrored else found

        if len(views) == 1:
            return logits(*views[0]).argmax(dim=0)
        # a view after the other: one can have a gigabyte
        return functools.reduce(Tensor.add_, (logits(*view).softmax(dim=0) for view in views)).argmax(dim=0)

    def _views(self, image: Tensor, scale: float) -> Iterator[tuple[Tensor, bool]]:
        """The image [1,3,h,w] at a scale, and its mirror image."""
        if scale != 1.0:
            least = self.task.model.config.image_size
            share = max(scale * min(image.shape[2:]), least) / min(image.shape[2:])
            height, width = (max(least, round(share * side)) for side in image.shape[2:])
            image = F.interpolate(image, (height, width), mode="bilinear", align_corners=False, antialias=True)
        yield image, False
        if self.task.settings.flipped:
            yield image.flip(3), True

    def _slide(self, image: Tensor) -> Tensor:
        """Pixels [1,3,h,w] -> logits [1,K,h,w]: the means over the windows that see a pixel."""
        size = self.task.model.config.image_size
        height, width = image.shape[2:]
        corners = [(top, left) for top in starts(height, size) for left in starts(width, size)]
        logits: Tensor | None = None
        seen = image.new_zeros(1, 1, height, width)
        for first in range(0, len(corners), _WINDOWS):
            some = corners[first : first + _WINDOWS]
            windows = torch.cat([image[:, :, y : y + size, x : x + size] for y, x in some])
            for (y, x), part in zip(some, resized(self.task.segment(windows)[0].float(), size, size), strict=True):
                logits = part.new_zeros(1, len(part), height, width) if logits is None else logits
                logits[0, :, y : y + size, x : x + size] += part
                seen[0, :, y : y + size, x : x + size] += 1
        assert logits is not None, "an image has a window"
        return logits / seen

    def score(self, blocks: Iterable[Columns]) -> dict[str, Score]:
        total = np.zeros((3, len(self.task.names)), np.int64)
        for block in blocks:
            total += block["areas"].sum(axis=0)
        return iou_scores(total)


def areas(predicted: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Int64 [3,K] for class numbers [h,w]: pixels that are right, predicted, and labelled; IGNORED ones count for
    nothing."""
    counted = mask != IGNORED
    found, labels = predicted[counted].long(), mask[counted].long()
    kinds = (found[found == labels], found, labels)
    return torch.stack([torch.bincount(kind, minlength=num_classes) for kind in kinds])


def iou_scores(total: np.ndarray) -> dict[str, Score]:
    """`miou`, `mean_accuracy` and `pixel_accuracy` of sums [3,K] of `areas`.

    A class that is neither predicted nor labelled is left out of the mean of IoU, one that is not labelled out of that
    of accuracy. Chance is what the most frequent class would reach, everywhere.
    """
    right, predicted, labelled = total.astype(np.float64)
    union, pixels = predicted + labelled - right, int(total[2].sum())
    if not pixels:
        raise UserError("no pixel of the data set has a class; prepare it with the right zero= and classes=")
    most, present = labelled.max() / pixels, labelled > 0
    return {
        "miou": Score(float((right[union > 0] / union[union > 0]).mean()), most / int(present.sum()), pixels),
        "mean_accuracy": Score(float((right[present] / labelled[present]).mean()), 1 / int(present.sum()), pixels),
        "pixel_accuracy": Score(float(right.sum() / pixels), most, pixels),
    }


def starts(length: int, size: int) -> list[int]:
    """Where windows of `size` begin that slide by two thirds of it; the last ends with the image."""
    stride = round(size * 2 / 3)
    return [min(i * stride, length - size) for i in range(-(-(length - size) // stride) + 1)]


def _classes(batch: Batch) -> Tensor:
    """uint8 [B,S,S], IGNORED in invalid rows."""
    return batch.mask.masked_fill(~batch.valid[:, None, None], IGNORED)
