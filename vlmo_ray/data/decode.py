"""From encoded images to augmented uint8 arrays of the training size.

Every random number comes from the row's `Draw`. All are drawn at once in a fixed layout (`draw_augmentation`), so an
image is the same on any worker and after any resume, and a forbidden operation does not shift the draws of the others.
JPEGs are decoded by simplejpeg, to the same bits as by Pillow, which decodes all else and what simplejpeg refuses. The
resize is that of cykooz-resizer, at a third of the cost of Pillow's. Of photographs that get smaller, pixels differ by
0.2 of 255 on average and by 10 at most; of black and white lines that get larger, by up to 20. Neither depends on the
processor's vector instructions.

The operations are Pillow's. timm's and torchvision's have the same arithmetic (the tests compare with timm's), but they
import torch into every data process: 670 MB and 4 s each, against 10 MB for Pillow.

The orientation tag of EXIF is not applied, as in the preparation that the released weights saw.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, ImageEnhance, ImageOps

from vlmo_ray.config import DataConfig
from vlmo_ray.data.encoders import Column, Draw
from vlmo_ray.data.schema import FORBID, IMAGE_FORMATS, MAX_PIXELS, MAX_SIDE, Record
from vlmo_ray.errors import RecordError

_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_ATTEMPTS = 10
_OPERATION_PROBABILITY = 0.5
_MAGNITUDE_STD = 0.5  # of timm's operations
_ERASED_AREA = (0.02, 1 / 3)  # of the image
_ERASED_RATIO = 0.3  # of height to width, and the inverse
GREY = 128  # of an image that cannot be used, and outside of an image that is moved
_MAX_TRANSLATION_PX = 10
_BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)  # as Pillow's, with a = -0.5


class DecodeError(RecordError):
    """Why the bytes of one record cannot be used as an image."""


class SizeError(DecodeError):
    """The image has too many pixels, or none."""


def decode_train(image: bytes, size: int, data: DataConfig, forbid: Collection[str], draw: Draw) -> np.ndarray:
    """An augmented image, uint8 `[3, size, size]`, C-contiguous; the same for the same arguments everywhere.

    Random resized crop, horizontal flip and RandAugment (VLMo section 4.1 with RandAugment of Cubuk et al. 2020,
    without its colour inversions; or that of timm, and random erasing). `forbid` names augmentations that would make
    the caption untrue, from `schema.FORBID`: "crop" (the whole image is resized instead, and nothing is erased),
    "flip", "color" (autocontrast, equalize, brightness; timm's other changes of colours) and "geometric" (shear,
    translate, rotate). Sharpness is never forbidden: it changes neither flat areas nor positions.

    Raises `DecodeError` if the bytes cannot be used or `forbid` has an unknown name.
    """
    picture = _open(image)
    drawn = draw_augmentation(*picture.size, data, forbid, draw)
    pixels = _channels_first(_augment(_part(picture, image, drawn.box, (size, size), data, draft=True), drawn, data))
    return pixels if "crop" in forbid else erased(pixels, data.erase, draw)


def decode_train_with_mask(
    image: bytes, mask: bytes, size: int, data: DataConfig, forbid: Collection[str], draw: Draw
) -> tuple[np.ndarray, np.ndarray]:
    """An augmented image as from `decode_train`, and its mask uint8 `[size, size]` under the same draw.

    The mask gets the crop, the flip and the geometric operations, all with nearest neighbours; nothing is erased in
    it. Pixels from outside of the image have the value 255. Raises `DecodeError`, also if the sizes of the two differ.
    """
    width, height = _open(image).size
    labels = _open_mask(mask)
    if labels.size != (width, height):
        raise DecodeError(f"the image has {width} x {height} pixels, its mask {labels.width} x {labels.height}")
    drawn = draw_augmentation(width, height, data, forbid, draw)
    labels = labels.resize((size, size), Image.Resampling.NEAREST, box=drawn.box)
    return decode_train(image, size, data, forbid, draw), np.array(_augment(labels, drawn, data))


def _augment(out: Image.Image, drawn: Augmentation, data: DataConfig) -> Image.Image:
    """The flip and the operations; for a mask (mode "L") only those that move pixels."""
    if drawn.flip:
        out = out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    operations = operations_of(data)
    levels = drawn.levels or (data.randaugment_magnitude / 10,) * len(drawn.operations)
    for (name, sign), level in zip(drawn.operations, levels, strict=True):
        if out.mode == "RGB" or operations[name].kind == "geometric":
            out = operations[name].apply(out, level, sign)
    return out


def image_column(size: int) -> Column:
    """The column of `image_row`."""
    return Column("uint8", (3, size, size), GREY)


def image_row(record: Record, name: str, size: int, data: DataConfig, draw: Draw | None) -> np.ndarray:
    """The stored image `name` of a record, uint8 `[3, size, size]`: augmented by `draw`, plain without one."""
    image = record.values[name]
    return decode_eval(image, size, data) if draw is None else decode_train(image, size, data, record.forbid, draw)


def decode_eval(image: bytes, size: int, data: DataConfig) -> np.ndarray:
    """The whole image resized to a square (bicubic, aspect ratio not kept), uint8 `[3, size, size]`.

    Raises `DecodeError` if the bytes cannot be used.
    """
    picture = _open(image)
    return _channels_first(_part(picture, image, (0, 0, *picture.size), (size, size), data))


def decode_center(image: bytes, size: int, data: DataConfig) -> np.ndarray:
    """The centre of the image, aspect ratio kept, uint8 `[3, size, size]`: how ImageNet models are evaluated.

    The short side is resized (bicubic) to `size` / 0.875, from 384 px on to `size`, and the centre is cut out.
    Raises `DecodeError` if the bytes cannot be used.
    """
    picture = _open(image)
    width, height = picture.size
    short = int(size / 0.875) if size < 384 else size
    w, h = (short * side // min(width, height) for side in (width, height))  # of the resized image
    left, top = round((w - size) / 2), round((h - size) / 2)
    # the pixels of the resized image that are cut out lie in this box of the stored one
    box = (left * width / w, top * height / h, (left + size) * width / w, (top + size) * height / h)
    return _channels_first(_part(picture, image, box, (size, size), data))


def size_of(image: bytes) -> tuple[int, int]:
    """Width and height of a stored image, from its header. Raises `DecodeError` if the bytes cannot be used."""
    return _open(image).size


def decode_whole(image: bytes, size: int, data: DataConfig) -> np.ndarray:
    """The whole image, aspect ratio kept, its shorter side resized to `size` (bicubic), uint8 `[3, height, width]`.

    Raises `DecodeError` if the bytes cannot be used.
    """
    picture = _open(image)
    width, height = picture.size
    resized = (round(width * size / min(width, height)), round(height * size / min(width, height)))
    if max(resized) > MAX_SIDE:
        raise SizeError(f"image of {width} x {height} pixels is too long for a shorter side of {size}")
    return _channels_first(_part(picture, image, (0, 0, width, height), resized, data))


def decode_mask(mask: bytes) -> np.ndarray:
    """The values of a mask as it is stored, uint8 `[height, width]`. Raises `DecodeError` if it is none."""
    return np.asarray(_open_mask(mask))


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


def _part(
    picture: Image.Image,
    image: bytes,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    data: DataConfig,
    draft: bool = False,
) -> Image.Image:
    """The box of `picture`, opened from `image`, as an RGB image of `size` (width, height), bicubic with antialiasing.

    With `draft`, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size as long as the box keeps that many pixels on either
    side.
    """
    width, height = picture.size
    left, top, right, bottom = box
    share = 1.0  # of the stored size that is decoded
    with _reported():
        if draft:
            enough = (math.ceil(size[0] * width / (right - left)), math.ceil(size[1] * height / (bottom - top)))
            drafted = picture.draft(None, enough)  # None for other formats
            share = drafted[1][2] / width if drafted else 1.0
        part = (left * share, top * share, right * share, bottom * share)
        if data.decoder == "pillow":
            return _to_rgb(picture).resize(size, Image.Resampling.BICUBIC, box=part)
        return _resize(_pixels(picture, image), part, size)


def _pixels(picture: Image.Image, image: bytes) -> np.ndarray:
    """uint8 `[height, width, 3]` at the size that `picture` was drafted to, as Pillow's to the bit."""
    width, height = picture.size
    if picture.format == "JPEG" and picture.mode in ("RGB", "L"):
        with suppress(ValueError):  # damaged, or of an odd kind: Pillow says what can be used
            pixels = simplejpeg.decode_jpeg(image, min_height=height, min_width=width)
            if pixels.shape[:2] == (height, width):
                return pixels
    return np.asarray(_to_rgb(picture))


def _resize(pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """The box (left, top, right, bottom) of uint8 `[height, width, 3]`."""
    height, width, _ = pixels.shape
    left, top, right, bottom = box
    out = ImageData(*size, PixelType.U8x3)
    options = ResizeOptions(resize_alg=_BICUBIC, crop_box=CropBox(left, top, right - left, bottom - top))
    Resizer().resize(ImageData(width, height, PixelType.U8x3, pixels.tobytes()), out, options)
    return Image.frombytes("RGB", size, out.get_buffer())


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB. Transparent pixels become white, as on a web page: the colours stored under them are arbitrary.
    Of 16-bit grey, the high byte is kept."""
    picture.load()
    if picture.mode.startswith("I"):  # Pillow's own conversion clips at 255, to an all-white image
        high_byte = np.clip(np.asarray(picture), 0, 65535) >> 8
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _open_mask(mask: bytes) -> Image.Image:
    """A mask with one channel of 8 bits; of a palette image, the indices."""
    picture = _open(mask)
    if picture.mode not in ("L", "P", "1"):
        raise DecodeError(f"a mask of mode {picture.mode}; it must have one channel of 8 bits")
    with _reported():
        return Image.fromarray(np.asarray(picture).astype(np.uint8))


# ---- what is refused -------------------------------------------------------------------------------------


def _open(image: bytes) -> Image.Image:
    """The picture with its header read and its size checked; no pixel is decoded yet."""
    if not image:
        raise DecodeError("no image bytes")
    with _reported():
        picture = Image.open(io.BytesIO(image), formats=IMAGE_FORMATS)
    width, height = picture.size
    if min(width, height) < 1 or max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise SizeError(f"image of {width} x {height} pixels is outside the limits")
    return picture


def image_problem(image: bytes, verify: bool, *, is_mask: bool = False) -> str:
    """Why training could not decode these bytes, "" if it can; messages have no values, so that they can be counted.

    Reads the header, and with `verify` decodes all pixels. A mask must have a single channel.
    """
    problem = "the image header is unreadable"
    try:
        with warnings.catch_warnings(action="ignore"):
            picture = _open(image)
            if is_mask and len(picture.getbands()) != 1:
                return "the mask has several channels"
            problem = "the image cannot be decoded"
            if verify:
                with _reported():
                    _to_rgb(picture)
    except SizeError:
        return "the image size is outside the limits"
    except DecodeError:
        return problem
    return ""


@contextmanager
def _reported() -> Iterator[None]:
    """Turns Pillow's errors about damaged bytes, which are of many types, into a `DecodeError`."""
    try:
        yield
    except MemoryError:  # a problem of the machine, not of the record
        raise
    except Image.DecompressionBombError as error:
        raise SizeError(f"image outside the limits: {type(error).__name__}: {error}") from error
    except Image.UnidentifiedImageError:
        raise DecodeError(f"not an image in a known format ({', '.join(IMAGE_FORMATS)})") from None
    except Exception as error:
        raise DecodeError(f"damaged image: {type(error).__name__}: {str(error)[:120]}") from error
