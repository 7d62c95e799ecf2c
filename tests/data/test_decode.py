"""Decoding: Pillow and timm as oracles, purity of the draws, what `forbid` leaves alone, hostile bytes."""

import contextlib
import io
import json
import math
import random
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cykooz_resizer import CpuExtensions, Resizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data import augment, decode
from vlmo_ray.data.augment import OPERATIONS, draw_augmentation
from vlmo_ray.data.decode import decode_eval, decode_train, decode_train_with_mask
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.schema import FORBID
from vlmo_ray.errors import DecodeError

SIZE = 32
FULL = DataConfig()
PLAIN = DataConfig(flip=False, randaugment_ops=0)
PILLOW = DataConfig(decoder="pillow")
KIND = {name: operation.kind for name, operation in OPERATIONS.items()}


def picture(width=61, height=47) -> Image.Image:
    """A smooth, asymmetric colour picture."""
    y, x = np.mgrid[:height, :width]
    channels = (
        120 + 100 * np.sin(x / width * 5),
        40 + 150 * y / height,
        100 + 90 * np.cos((x / width + y / height) * 4),
    )
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def encoded(image: Image.Image, format="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def train(image: bytes, position=0, *, data=PLAIN, forbid=(), seed=1, step=2) -> np.ndarray:
    return decode_train(image, SIZE, data, forbid, Draw(seed, step, position))


def augmentation(position: int, forbid=(), data=FULL, size=(61, 47), seed=1, step=2):
    return draw_augmentation(*size, data, forbid, Draw(seed, step, position))


def png(width: int, height: int, depth=8, color=2, rows=b"\0") -> bytes:
    """A PNG with this header, whatever its rows hold."""

    def block(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    blocks = (block(b"IHDR", header), block(b"IDAT", zlib.compress(rows)), block(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)


# ---- values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_eval_is_pillows_square_bicubic_resize(format):
    data = encoded(picture(), format)
    out = decode_eval(data, SIZE, PILLOW)
    want = array(Image.open(io.BytesIO(data)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(out, want)
    assert out.dtype == np.uint8 and out.shape == (3, SIZE, SIZE) and out.flags.c_contiguous


@pytest.fixture(scope="module")
def timm_operations():
    """timm's functions for the operations at M = 7, by our names."""
    from timm.data import auto_augment as aa

    affine = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR}
    enhance = aa._enhance_level_to_arg(7, {})[0]
    assert enhance == pytest.approx(1.36)
    return {
        "identity": lambda image, sign: image,
        "autocontrast": lambda image, sign: aa.auto_contrast(image),
        "equalize": lambda image, sign: aa.equalize(image),
        "brightness": lambda image, sign: aa.brightness(image, enhance),
        "sharpness": lambda image, sign: aa.sharpness(image, enhance),
        "shear_x": lambda image, sign: aa.shear_x(image, sign * 0.21, **affine),
        "shear_y": lambda image, sign: aa.shear_y(image, sign * 0.21, **affine),
        "translate_x": lambda image, sign: aa.translate_x_abs(image, sign * 7, **affine),
        "translate_y": lambda image, sign: aa.translate_y_abs(image, sign * 7, **affine),
        "rotate": lambda image, sign: aa.rotate(image, sign * 21, **affine),
    }


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_operation_is_timms(name, sign, timm_operations):
    image = picture()
    out = OPERATIONS[name].apply(image, 0.7, sign)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(timm_operations[name](image, sign)))


def test_train_is_the_draw_in_pillow_and_timm(timm_operations):
    """The whole of it, from the documented layout of the draws."""
    image, data = picture(), PILLOW
    names, used = list(OPERATIONS), Counter()
    for position in range(60):
        draws = list(rng.generator(1, "augment", 2, position).random(29))
        for area, ratio in zip(draws[0:20:2], draws[1:20:2], strict=True):
            target, ratio = 61 * 47 * (0.5 + 0.5 * area), math.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
            w, h = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
            if w <= 61 and h <= 47:
                break
        left, top = int(draws[20] * (62 - w)), int(draws[21] * (48 - h))
        want = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
        if draws[22] < 0.5:
            want = ImageOps.mirror(want)
        for which, whether, sign in (draws[23:26], draws[26:29]):
            if whether < 0.5:
                want = timm_operations[names[int(which * 10)]](want, 1 if sign < 0.5 else -1)
                used[names[int(which * 10)]] += 1
        np.testing.assert_array_equal(train(encoded(image), position, data=data), array(want))
    assert len(used) == 10


PICTURES = Path(__file__).parent / "pictures"


@pytest.mark.parametrize("name", sorted(file.name for file in PICTURES.glob("*.*") if file.suffix != ".json"))
def test_pixels_are_the_same_everywhere(name):
    """On every platform and with every version of the libraries: sums of the pixels of stored pictures."""
    image = (PICTURES / name).read_bytes()
    found = {
        decoder: [
            zlib.crc32(decode_eval(image, SIZE, DataConfig(decoder=decoder))),
            *(zlib.crc32(train(image, position, data=DataConfig(decoder=decoder))) for position in range(20)),
        ]
        for decoder in ("fast", "pillow")
    }
    assert found == json.loads((PICTURES / "pixels.json").read_text())[name]


def test_the_processors_vector_instructions_change_nothing(monkeypatch):
    def plain() -> Resizer:
        resizer = Resizer()
        resizer.cpu_extensions = CpuExtensions.none
        return resizer

    jpeg = encoded(sharp(300, 200), "JPEG")
    wanted = [train(jpeg, position) for position in range(8)]
    monkeypatch.setattr(decode, "Resizer", plain)
    for position, pixels in enumerate(wanted):
        np.testing.assert_array_equal(train(jpeg, position), pixels)


def sharp(width: int, height: int) -> Image.Image:
    """As a sharp photograph: noise of four scales."""
    random = np.random.default_rng(width)
    pixels = np.full((height, width, 3), 127.5)
    for cell, contrast in ((64, 0.8), (16, 0.4), (4, 0.3), (1, 0.15)):
        small = random.integers(0, 256, (height // cell + 1, width // cell + 1, 3)).astype(np.uint8)
        grown = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        pixels += contrast * (np.asarray(grown) - 127.5)
    pixels[:: height // 7, :] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(61, 47), (160, 160), (500, 375), (1024, 768)])
def test_the_fast_decoder_is_close_to_pillow(size):
    """At the same fraction of the size, before augmentation; also enlarged."""
    jpeg = encoded(sharp(*size), "JPEG", quality=90)
    slow, fast = (DataConfig(flip=False, randaugment_ops=0, decoder=kind) for kind in ("pillow", "fast"))
    apart = [abs(decode_eval(jpeg, 224, fast).astype(int) - decode_eval(jpeg, 224, slow))]
    for position in range(12):
        draw = Draw(1, 2, position)
        apart.append(abs(decode_train(jpeg, 224, fast, (), draw).astype(int) - decode_train(jpeg, 224, slow, (), draw)))
    assert 0 < np.mean(apart) <= 0.25 and np.max(apart) <= 10


def test_the_fast_decoder_on_black_and_white_lines():
    """The worst there is: where the first of the two passes overshoots, it is cut off, and the passes are swapped."""
    pixels = np.asarray(sharp(61, 47)).copy()
    pixels[::6], pixels[:, ::7] = 255, 0
    slow, fast = (decode_eval(encoded(Image.fromarray(pixels)), 224, data).astype(int) for data in (PILLOW, FULL))
    assert abs(slow - fast).mean() <= 1 and abs(slow - fast).max() <= 24


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}], ids=str)
@pytest.mark.parametrize("size", [(61, 47), (16, 16), (1, 9), (640, 481)])
def test_jpegs_are_decoded_as_pillow_does_to_the_bit(kind, options, size):
    jpeg = encoded(sharp(*size).convert(kind) if min(size) > 9 else picture(*size).convert(kind), "JPEG", **options)
    for fraction in (1, 2, 5, 9):
        enough = tuple(max(1, side // fraction) for side in size)
        opened, other = Image.open(io.BytesIO(jpeg)), Image.open(io.BytesIO(jpeg))
        opened.draft(None, enough)
        other.draft(None, enough)
        np.testing.assert_array_equal(decode._pixels(opened, jpeg), np.asarray(other.convert("RGB")))


def test_who_decodes(monkeypatch):
    """simplejpeg clean JPEGs, at a fraction if the crop allows; Pillow other formats, CMYK and what is damaged."""
    plain = decode.simplejpeg.decode_jpeg
    shapes = []
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", lambda *a, **b: (shapes.append(0), plain(*a, **b))[1])
    large = sharp(640, 480)
    for image, times in (
        (encoded(large, "JPEG"), 1),
        (encoded(large.convert("L"), "JPEG"), 1),
        (encoded(large.convert("CMYK"), "JPEG"), 0),
        (encoded(large), 0),
    ):
        shapes.clear()
        train(image)
        assert len(shapes) == times
    shapes.clear()
    train(encoded(large, "JPEG"), data=PILLOW)
    assert not shapes
    sizes = []
    monkeypatch.setattr(decode, "_resize", lambda pixels, *_: (sizes.append(pixels.shape), Image.new("RGB", (8, 8)))[1])
    train(encoded(large, "JPEG"))
    decode_eval(encoded(large, "JPEG"), SIZE, FULL)
    assert sizes[0][0] <= 240 and sizes[1] == (480, 640, 3)


def test_a_jpeg_decoded_at_a_fraction_looks_the_same():
    """Smooth pictures nearly so; of sharp ones the frequencies that the crop cannot show are cut off otherwise."""
    for shown, most, mean in ((picture(700, 500), 4, 0.2), (sharp(1024, 768), 40, 2.5)):
        jpeg = encoded(shown, "JPEG", quality=95)
        same_pixels = encoded(Image.open(io.BytesIO(jpeg)).convert("RGB"))  # a PNG has no draft mode
        for position in range(8):
            draw = Draw(1, 2, position)
            drafted, whole = (decode_train(image, 224, PLAIN, (), draw).astype(int) for image in (jpeg, same_pixels))
            assert abs(drafted - whole).max() <= most and abs(drafted - whole).mean() < mean


def test_crops_keep_area_and_ratio_and_reach_the_corners():
    boxes = np.array([augmentation(p, size=(600, 400)).box for p in range(3000)])
    left, top, right, bottom = boxes.T
    share = (right - left) * (bottom - top) / (600 * 400)
    ratio = (right - left) / (bottom - top)
    assert 0.495 < share.min() < 0.51 and 0.87 < share.max() < 0.892  # 4:3 at full height
    assert 0.745 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.34
    assert left.min() == 0 and top.min() == 0 and right.max() == 600 and bottom.max() == 400


@pytest.mark.parametrize(
    ("size", "box"), [((400, 40), (173, 0, 226, 40)), ((40, 400), (0, 173, 40, 226)), ((1, 1), (0, 0, 1, 1))]
)
def test_a_crop_of_an_extreme_shape_is_the_centre(size, box):
    assert augmentation(0, size=size).box == box
    assert train(encoded(picture(*size))).shape == (3, SIZE, SIZE)


# ---- draws -----------------------------------------------------------------------------------------------


def test_an_image_depends_on_seed_step_and_position_only():
    image, data = encoded(picture(), "JPEG"), DataConfig()
    random.seed(0)
    np.random.seed(0)
    states = random.getstate(), np.random.get_state()[1].tolist()
    first = [train(image, p, data=data) for p in range(6)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    random.seed(1)
    np.random.seed(1)
    for p in reversed(range(6)):
        np.testing.assert_array_equal(train(image, p, data=data), first[p])
    others = [train(image, 0, data=data, seed=9), train(image, 0, data=data, step=9), first[1]]
    assert all((other != first[0]).any() for other in others)


@given(st.sets(st.sampled_from(FORBID)), st.integers(0, 10**9))
@settings(derandomize=True, max_examples=100, deadline=None, database=None)
def test_forbidding_takes_away_and_shifts_nothing(forbid, position):
    free, bound = augmentation(position), augmentation(position, forbid)
    assert bound.box == ((0, 0, 61, 47) if "crop" in forbid else free.box)
    assert bound.flip == (free.flip and "flip" not in forbid)
    assert bound.operations == tuple((name, sign) for name, sign in free.operations if KIND[name] not in forbid)


def test_the_config_takes_away_and_shifts_nothing():
    for position in range(50):
        free = augmentation(position)
        assert augmentation(position, data=DataConfig(flip=False)) == augment.Augmentation(
            free.box, False, free.operations
        )
        one = augmentation(position, data=DataConfig(randaugment_ops=1))
        assert (one.box, one.flip) == (free.box, free.flip)
        assert one.operations == free.operations[: len(one.operations)]


def test_every_operation_occurs_as_often_as_it_should():
    drawn = [augmentation(p) for p in range(4000)]
    counts = Counter(name for p in drawn for name, _ in p.operations)
    signs = Counter(sign for p in drawn for _, sign in p.operations)
    expected = 4000 * 2 * 0.5 / 10
    assert set(counts) == set(OPERATIONS)
    assert all(abs(n - expected) < 4 * expected**0.5 for n in counts.values()), counts
    assert abs(signs[1.0] - signs[-1.0]) < 4 * (10 * expected) ** 0.5
    assert abs(sum(p.flip for p in drawn) - 2000) < 4 * 1000**0.5


def test_forbidden_color_leaves_a_flat_image_its_color():
    flat = encoded(Image.new("RGB", (50, 40), (200, 90, 30)))
    data = DataConfig(randaugment_ops=4)
    color = np.array([200, 90, 30], np.uint8)[:, None, None]
    for position in range(40):
        assert (train(flat, position, data=data, forbid=["color", "geometric"]) == color).all()
        centre = train(flat, position, data=data, forbid=["color"])[:, SIZE // 2, SIZE // 2]
        assert (centre == color[:, 0, 0]).all() or (centre == 128).any()  # shears may bring the border in
    free = [train(flat, p, data=data, forbid=["geometric"]) for p in range(40)]
    assert any((out != color).any() for out in free)


def test_forbidden_geometry_brings_in_no_border():
    flat = encoded(Image.new("RGB", (50, 40), (200, 90, 30)))
    data = DataConfig(randaugment_ops=4)
    bordered = [any((train(flat, p, data=data, forbid=f) == 128).any() for p in range(40)) for f in ([], ["geometric"])]
    assert bordered == [True, False]


def test_forbidden_flip_keeps_left_left():
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:, 20:] = 255
    image, data = encoded(Image.fromarray(halves)), DataConfig(randaugment_ops=0)

    def mirrored(position, forbid):
        out = train(image, position, data=data, forbid=forbid).astype(int)
        return out[:, :, 0].mean() > out[:, :, -1].mean()

    assert not any(mirrored(p, ["flip"]) for p in range(40))
    assert 10 < sum(mirrored(p, []) for p in range(40)) < 30


def test_forbidden_crop_resizes_the_whole_image():
    image = encoded(picture())
    np.testing.assert_array_equal(train(image, 3, forbid=["crop"]), decode_eval(image, SIZE, FULL))
    assert (train(image, 3) != decode_eval(image, SIZE, FULL)).any()


def test_an_unknown_name_in_forbid_is_not_ignored():
    with pytest.raises(DecodeError, match="'colour'"):
        train(encoded(picture()), forbid=["flip", "colour"])


# ---- kinds of files --------------------------------------------------------------------------------------


def flat_value(data: bytes) -> tuple[int, ...]:
    """The one colour of a flat image, the same from both functions."""
    out = decode_eval(data, SIZE, FULL)
    assert (out == out[:, :1, :1]).all()
    np.testing.assert_array_equal(out, train(data))
    return tuple(int(v) for v in out[:, 0, 0])


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP"])
def test_formats(format):
    image = Image.new("RGB", (20, 14), (255, 0, 102))
    assert flat_value(encoded(image, format, **({"lossless": True} if format == "WEBP" else {}))) == (255, 0, 102)


def test_grey_and_palette_become_rgb():
    assert flat_value(encoded(Image.new("L", (20, 14), 77))) == (77, 77, 77)
    assert flat_value(encoded(Image.new("L", (20, 14), 77), "JPEG")) == (77, 77, 77)
    assert flat_value(encoded(Image.new("1", (20, 14), 1))) == (255, 255, 255)
    assert flat_value(encoded(Image.new("RGB", (20, 14), (255, 51, 0)).convert("P"))) == (255, 51, 0)


def test_transparency_becomes_white():
    assert flat_value(encoded(Image.new("RGBA", (20, 14), (200, 10, 10, 0)))) == (255, 255, 255)
    assert flat_value(encoded(Image.new("RGBA", (20, 14), (200, 10, 10, 255)))) == (200, 10, 10)
    assert flat_value(encoded(Image.new("LA", (20, 14), (0, 51)))) == (204, 204, 204)
    palette = Image.new("RGB", (20, 14), (255, 51, 0)).convert("P")
    index = palette.getpixel((0, 0))
    assert flat_value(encoded(palette, transparency=index)) == (255, 255, 255)
    assert flat_value(encoded(palette, transparency=index + 1)) == (255, 51, 0)
    assert flat_value(encoded(Image.new("RGB", (20, 14), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


def test_cmyk_becomes_rgb():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = flat_value(data)
    assert red > 250 and green < 5 and blue < 5


def test_sixteen_bits_keep_the_high_byte():
    grey = Image.fromarray(np.full((14, 20), 0x4DFF, np.uint16))
    assert grey.mode == "I;16"
    assert flat_value(encoded(grey)) == (77, 77, 77)
    rows = (b"\0" + bytes([10, 255, 20, 255, 30, 255]) * 20) * 14
    assert flat_value(png(20, 14, depth=16, rows=rows)) == (10, 20, 30)


# ---- masks -----------------------------------------------------------------------------------------------


def train_with_mask(image: bytes, mask: bytes, position=0, *, data=FULL, forbid=()) -> tuple[np.ndarray, np.ndarray]:
    return decode_train_with_mask(image, mask, SIZE, data, forbid, Draw(1, 2, position))


def inside(wanted: np.ndarray) -> np.ndarray:
    """Where a place and all its neighbours are wanted; nothing at the edge."""
    out = np.zeros_like(wanted)
    out[1:-1, 1:-1] = np.lib.stride_tricks.sliding_window_view(wanted, (3, 3)).all((2, 3))
    return out


@pytest.mark.parametrize(("size", "format"), [((61, 47), "PNG"), ((700, 500), "JPEG")])
def test_a_mask_moves_as_its_image(size, format):
    """The image is grey of the mask's values, a ramp: so interpolation keeps it, and each place knows where it was."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    labels = (130 * x // width + 100 * y // height + 10).astype(np.uint8)
    image = encoded(Image.fromarray(labels).convert("RGB"), format, **({"quality": 98} if format == "JPEG" else {}))
    mask = encoded(Image.fromarray(labels))
    used, filled = Counter(), 0
    for position in range(80):
        pixels, moved = train_with_mask(image, mask, position, forbid=["color"])
        assert moved.dtype == np.uint8 and moved.shape == (SIZE, SIZE)
        np.testing.assert_array_equal(pixels, train(image, position, data=FULL, forbid=["color"]))
        known, outside = inside(moved != 255), inside(moved == 255)
        assert known.sum() > SIZE * SIZE // 3
        # a place is half of one off after each of up to three samplings; places are up to 7 values apart
        assert np.abs(pixels[0].astype(int) - moved)[known].max() <= 10
        assert (pixels[:, outside] == 128).all()
        drawn = augmentation(position, ["color"], size=size)
        used.update(name for name, _ in drawn.operations)
        used["flip" if drawn.flip else "no flip"] += 1
        filled += outside.any()
    geometric = {name for name, kind in KIND.items() if kind == "geometric"}
    assert set(used) >= geometric | {"flip", "no flip"} and filled > 5


def test_masks_of_palettes_and_single_bits_give_their_indices():
    labels = np.arange(48).reshape(6, 8).astype(np.uint8) % 7
    palette = Image.fromarray(labels)
    palette.putpalette([255, 0, 0, 9, 9, 9, 0, 255, 0] + [77] * 100)
    assert palette.mode == "P"
    image = encoded(picture(8, 6))
    nearest = Image.fromarray(labels).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    for stored, wanted in (
        (palette, np.asarray(nearest)),
        (Image.fromarray(labels), np.asarray(nearest)),
        (Image.fromarray(labels % 2 == 1), np.asarray(nearest) % 2),
    ):
        assert stored.mode in ("P", "L", "1")
        _, moved = train_with_mask(image, encoded(stored), forbid=FORBID)
        np.testing.assert_array_equal(moved, wanted)


def test_masks_that_do_not_fit_are_refused():
    image = encoded(picture(20, 14))
    for mask, reason in (
        (encoded(Image.new("L", (14, 20))), "20 x 14 pixels, its mask 14 x 20"),
        (encoded(Image.new("RGB", (20, 14))), "mode RGB"),
        (encoded(Image.new("L", (20, 14)))[:40], "."),
        (b"", "no image bytes"),
    ):
        with pytest.raises(DecodeError, match=reason):
            train_with_mask(image, mask)


# ---- what is refused -------------------------------------------------------------------------------------

GOOD = encoded(picture(), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image bytes"),
        (None, "no image bytes"),
        (b"<html>404 not found</html>", "not an image"),
        (encoded(picture(), "TIFF"), "not an image"),
        (png(9_000, 9_000), "9000 x 9000 pixels is outside the limits"),
        (png(40_000, 2), "outside the limits"),
        (png(60_000, 60_000), "DecompressionBombError"),
        (png(0, 5), "."),
        (png(20, 14), "damaged image"),
        (GOOD[: len(GOOD) // 2], "(?i)truncated"),
        (GOOD[:-100], "(?i)truncated"),
        (GOOD[:60], "."),
        (encoded(picture())[:-200], "damaged image"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_bytes_are_named(data, reason):
    for call in (lambda: decode_eval(data, SIZE, FULL), lambda: train(data)):
        with pytest.raises(DecodeError, match=reason) as caught:
            call()
        assert len(str(caught.value)) < 200 and "0x" not in str(caught.value)


@given(st.data())
@settings(derandomize=True, max_examples=150, deadline=None, database=None)
def test_damaged_bytes_decode_or_are_refused(data):
    image = data.draw(st.sampled_from([GOOD, encoded(picture()), encoded(picture().convert("P"), "GIF")]))
    broken = bytearray(image)
    for where in data.draw(st.lists(st.integers(0, len(image) - 1), min_size=1, max_size=8)):
        broken[where] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError):
        assert decode_eval(bytes(broken), 8, FULL).shape == (3, 8, 8)


def test_running_out_of_memory_is_not_blamed_on_the_record(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr(decode, "_pixels", no_memory)
    with pytest.raises(MemoryError):
        decode_eval(GOOD, SIZE, FULL)


def test_data_processes_are_spared_torch():
    code = "import sys, vlmo_ray.data.decode, vlmo_ray.data.text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_translation_is_the_affine_one(mode):
    """Of every magnitude and sign, to the bit."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 41, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    for magnitude in range(11):
        for sign in (1.0, -1.0):
            moved = 10 * (magnitude / 10) * sign
            for name, matrix in (("translate_x", (1, 0, moved, 0, 1, 0)), ("translate_y", (1, 0, 0, 0, 1, moved))):
                found = augment.OPERATIONS[name].apply(image, magnitude / 10, sign)
                assert np.array_equal(np.asarray(found), np.asarray(augment._affine(image, *matrix))), (name, moved)
