"""From encoded images to augmented uint8 arrays of the training size.

JPEGs are decoded by simplejpeg, to the same bits as by Pillow, which decodes all else and what simplejpeg refuses. The
resize is that of cykooz-resizer, at a third of the cost of Pillow's. Of photographs that get smaller, pixels differ by
0.2 of 255 on average and by 10 at most; of black and white lines that get larger, by up to 20. Neither depends on the
processor's vector instructions.

The orientation tag of EXIF is not applied, as in the preparation that the released weights saw.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

from vlmo_ray.config import DataConfig
from vlmo_ray.data.augment import GREY, augment, draw_augmentation, erased
from vlmo_ray.data.encoders import Column, Draw
from vlmo_ray.data.schema import IMAGE_FORMATS, MAX_PIXELS, MAX_SIDE, Record
from vlmo_ray.errors import DecodeError

_BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)  # as Pillow's, with a = -0.5


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
    pixels = _channels_first(augment(_part(picture, image, drawn.box, (size, size), data, draft=True), drawn, data))
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
    return decode_train(image, size, data, forbid, draw), np.array(augment(labels, drawn, data))


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
