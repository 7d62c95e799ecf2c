"""Augmentation of images: what is drawn for each row, and what is done to its pixels.

Every random number comes from the row's `Draw`. All are drawn at once in a fixed layout (`draw_augmentation`), so an
image is the same on any worker and after any resume, and a forbidden operation does not shift the draws of the others.

The operations are Pillow's. timm's and torchvision's have the same arithmetic (the tests compare with timm's), but they
import torch into every data process: 670 MB and 4 s each, against 10 MB for Pillow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlmo_ray.config import DataConfig
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.schema import FORBID
from vlmo_ray.errors import DecodeError

_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
_OPERATION_PROBABILITY = 0.5
_MAGNITUDE_STD = 0.5  # of timm's operations
_ERASED_AREA = (0.02, 1 / 3)  # of the image
_ERASED_RATIO = 0.3  # of height to width, and the inverse
_MAX_TRANSLATION_PX = 10
GREY = 128  # of an image that cannot be used, and outside of an image that is moved


# ---- what is drawn ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Everything random about one image."""

    box: tuple[int, int, int, int]  # of the crop: left, top, right, bottom, in pixels of the stored image
    flip: bool
    operations: tuple[tuple[str, float], ...]  # names in `operations_of`, in order, each with its sign
    levels: tuple[float, ...] = ()  # M / 10 of each of timm's operations; (): all have that of the config


def draw_augmentation(width: int, height: int, data: DataConfig, forbid: Collection[str], draw: Draw) -> Augmentation:
    """The draws for an image of `width` x `height` pixels.

    Layout of the draws: 10 x (area, ratio) of the crop, its left and its top, the flip, then for every RandAugment
    operation (which, whether, sign). All are drawn, whichever are used; so are, with timm's, the magnitudes, from a
    generator of their own.
    """
    if unknown := sorted(set(forbid) - set(FORBID)):
        raise DecodeError(f"forbid has {unknown[0]!r}, which is none of {', '.join(FORBID)}")
    attempts, corner = 2 * _CROP_ATTEMPTS, 2
    draws = draw.generator("augment").random(attempts + corner + 1 + 3 * data.randaugment_ops)
    crop, corner, flip, operations = np.split(draws, np.cumsum([attempts, corner, 1]))
    box = (0, 0, width, height)
    if data.crop and "crop" not in forbid:
        box = _crop_box(width, height, data.crop_area, crop.reshape(-1, 2), corner)
    known, magnitudes = operations_of(data), np.full(data.randaugment_ops, data.randaugment_magnitude, float)
    if data.augment == "timm":
        magnitudes += _MAGNITUDE_STD * draw.generator("magnitude").standard_normal(len(magnitudes))
    names = tuple(known)
    chosen, levels = [], []
    for (which, whether, sign), magnitude in zip(operations.reshape(-1, 3), magnitudes.clip(0, 10), strict=True):
        name = names[int(which * len(names))]
        if whether < _OPERATION_PROBABILITY and known[name].kind not in forbid:
            chosen.append((name, 1.0 if sign < 0.5 else -1.0))
            levels.append(float(magnitude) / 10)
    flipped = bool(data.flip and "flip" not in forbid and flip[0] < 0.5)
    return Augmentation(box, flipped, tuple(chosen), tuple(levels) if data.augment == "timm" else ())


def _crop_box(
    width: int, height: int, area: tuple[float, float], attempts: np.ndarray, corner: np.ndarray
) -> tuple[int, int, int, int]:
    """The first of the attempts `[n, 2]` that fits, otherwise the largest centred crop of an allowed ratio."""
    low, high = _CROP_RATIO
    for area_draw, ratio_draw in attempts:
        target = width * height * (area[0] + (area[1] - area[0]) * area_draw)
        ratio = low * (high / low) ** ratio_draw
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(corner[0] * (width - w + 1)), int(corner[1] * (height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * high)))
    h = max(1, min(height, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


# ---- what is done to pixels ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """One operation of RandAugment: `apply(image, level, sign)` with level = M / 10."""

    apply: Callable[[Image.Image, float, float], Image.Image]
    kind: str | None = None  # the name in `FORBID` that excludes it


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    """What is outside of the image; 255 for a mask."""
    return 255 if image.mode == "L" else (GREY, GREY, GREY)


def _outside(image: Image.Image, sampling: Image.Resampling = Image.Resampling.BILINEAR) -> dict[str, Any]:
    """How a geometric operation samples: for a mask, nearest neighbours."""
    sampling = Image.Resampling.NEAREST if image.mode == "L" else sampling
    return {"resample": sampling, "fillcolor": _fill(image)}


def _affine(image: Image.Image, *matrix: float, sampling: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **_outside(image, sampling))


def _cubic(image: Image.Image, *matrix: float) -> Image.Image:
    return _affine(image, *matrix, sampling=Image.Resampling.BICUBIC)


def _translate(image: Image.Image, x: float, y: float) -> Image.Image:
    """By whole pixels, so nothing is interpolated: `_affine` gives the same, many times slower."""
    out = Image.new(image.mode, image.size, _fill(image))
    out.paste(image, (-round(x), -round(y)))
    return out


def _enhance(enhancer: type) -> Callable[[Image.Image, float, float], Image.Image]:
    return lambda image, level, sign: enhancer(image).enhance(0.1 + 1.8 * level)


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda image, level, sign: image),
    "autocontrast": Operation(lambda image, level, sign: ImageOps.autocontrast(image), "color"),
    "equalize": Operation(lambda image, level, sign: ImageOps.equalize(image), "color"),
    "brightness": Operation(_enhance(ImageEnhance.Brightness), "color"),
    "sharpness": Operation(_enhance(ImageEnhance.Sharpness)),
    "shear_x": Operation(lambda image, level, sign: _affine(image, 1, 0.3 * level * sign, 0, 0, 1, 0), "geometric"),
    "shear_y": Operation(lambda image, level, sign: _affine(image, 1, 0, 0, 0.3 * level * sign, 1, 0), "geometric"),
    "translate_x": Operation(
        lambda image, level, sign: _translate(image, _MAX_TRANSLATION_PX * level * sign, 0), "geometric"
    ),
    "translate_y": Operation(
        lambda image, level, sign: _translate(image, 0, _MAX_TRANSLATION_PX * level * sign), "geometric"
    ),
    "rotate": Operation(lambda image, level, sign: image.rotate(30 * level * sign, **_outside(image)), "geometric"),
}


def _enhance_more(enhancer: type) -> Callable[[Image.Image, float, float], Image.Image]:
    """More or less of a property: the higher the level, the further from the image as it is."""
    return lambda image, level, sign: enhancer(image).enhance(max(0.1, 1 + 0.9 * level * sign))


def _add_to_dark(image: Image.Image, level: float, sign: float) -> Image.Image:
    add = min(128, int(level * 110))
    return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


# The operations of timm's `rand-...-inc1`, which samples with bicubic filters where VLMo's samples linearly.
TIMM_OPERATIONS: dict[str, Operation] = {
    "autocontrast": OPERATIONS["autocontrast"],
    "equalize": OPERATIONS["equalize"],
    "invert": Operation(lambda image, level, sign: ImageOps.invert(image), "color"),
    "rotate": Operation(
        lambda image, level, sign: image.rotate(30 * level * sign, **_outside(image, Image.Resampling.BICUBIC)),
        "geometric",
    ),
    "posterize": Operation(lambda image, level, sign: ImageOps.posterize(image, 4 - int(level * 4)), "color"),
    "solarize": Operation(lambda image, level, sign: ImageOps.solarize(image, 256 - int(level * 256)), "color"),
    "solarize_add": Operation(_add_to_dark, "color"),
    "color": Operation(_enhance_more(ImageEnhance.Color), "color"),
    "contrast": Operation(_enhance_more(ImageEnhance.Contrast), "color"),
    "brightness": Operation(_enhance_more(ImageEnhance.Brightness), "color"),
    "sharpness": Operation(_enhance_more(ImageEnhance.Sharpness)),
    "shear_x": Operation(lambda image, level, sign: _cubic(image, 1, 0.3 * level * sign, 0, 0, 1, 0), "geometric"),
    "shear_y": Operation(lambda image, level, sign: _cubic(image, 1, 0, 0, 0.3 * level * sign, 1, 0), "geometric"),
    "translate_x": Operation(
        lambda image, level, sign: _cubic(image, 1, 0, 0.45 * level * sign * image.width, 0, 1, 0), "geometric"
    ),
    "translate_y": Operation(
        lambda image, level, sign: _cubic(image, 1, 0, 0, 0, 1, 0.45 * level * sign * image.height), "geometric"
    ),
}


def operations_of(data: DataConfig) -> dict[str, Operation]:
    """The operations that RandAugment chooses from, by name."""
    return TIMM_OPERATIONS if data.augment == "timm" else OPERATIONS


def erased(pixels: np.ndarray, share: float, draw: Draw) -> np.ndarray:
    """Of so large a share of images, a rectangle becomes noise (Zhong et al. 2017, timm's mode "pixel").

    uint8 `[3, H, W]`, changed in place. The noise is normal, with grey as its mean and half the range of values as its
    deviation. It is clipped to the range; timm erases after normalisation, and does not clip.
    """
    if not share:
        return pixels
    generator = draw.generator("erase")
    whether, top, left = generator.random(3)
    attempts = generator.random((10, 2))
    if whether >= share:
        return pixels
    _, height, width = pixels.shape
    low, high = _ERASED_AREA
    for area_draw, ratio_draw in attempts:
        area = height * width * (low + (high - low) * area_draw)
        ratio = _ERASED_RATIO ** (1 - 2 * ratio_draw)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            noise = 127.5 + 127.5 * generator.standard_normal((3, h, w))
            pixels[:, y : y + h, x : x + w] = noise.round().clip(0, 255)
            break
    return pixels


def augment(out: Image.Image, drawn: Augmentation, data: DataConfig) -> Image.Image:
    """The flip and the operations; for a mask (mode "L") only those that move pixels."""
    if drawn.flip:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    operations = operations_of(data)
    levels = drawn.levels or (data.randaugment_magnitude / 10,) * len(drawn.operations)
    for (name, sign), level in zip(drawn.operations, levels, strict=True):
        if out.mode == "RGB" or operations[name].kind == "geometric":
            out = operations[name].apply(out, level, sign)
    return out
