"""timm's RandAugment, random erasing and evaluation transform: its own code is the oracle, under our draws."""

import dataclasses
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageOps
from timm.data import auto_augment, create_transform, random_erasing

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data import decode
from vlmo_ray.data.augment import TIMM_OPERATIONS, draw_augmentation, erased
from vlmo_ray.data.decode import decode_center, decode_train
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.schema import FORBID

SIZE = 32
TIMM = DataConfig(crop_area=(0.08, 1.0), augment="timm", randaugment_magnitude=9, decoder="pillow")
NAMES = {  # timm's -> ours, in timm's order
    "AutoContrast": "autocontrast", "Equalize": "equalize", "Invert": "invert", "Rotate": "rotate",
    "PosterizeIncreasing": "posterize", "SolarizeIncreasing": "solarize", "SolarizeAdd": "solarize_add",
    "ColorIncreasing": "color", "ContrastIncreasing": "contrast", "BrightnessIncreasing": "brightness",
    "SharpnessIncreasing": "sharpness", "ShearX": "shear_x", "ShearY": "shear_y", "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
}  # fmt: skip


def picture(width=61, height=47) -> Image.Image:
    """Smooth colours, with noise on them."""
    y, x = np.mgrid[:height, :width]
    channels = (120 + 90 * np.sin(x / width * 5), 40 + 150 * y / height, 100 + 80 * np.cos((x + y) / width * 4))
    noise = np.random.default_rng(width).integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.stack(channels, -1) + noise).clip(0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def timms(name: str, image: Image.Image, magnitude: float, sign: float, monkeypatch) -> Image.Image:
    """What timm's operation makes of an image, with the settings of `create_transform(interpolation="bicubic")`."""
    settings = {"img_mean": (128, 128, 128), "interpolation": Image.Resampling.BICUBIC}
    operation = auto_augment.AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=settings)
    monkeypatch.setattr(auto_augment.random, "random", lambda: 0.9 if sign < 0 else 0.1)
    return operation(image)


def test_there_are_the_operations_of_the_recipe_in_their_order():
    [randaugment] = [
        step
        for step in create_transform(
            224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", mean=(0.5,) * 3
        ).transforms
        if isinstance(step, auto_augment.RandAugment)
    ]
    assert [NAMES[op.name] for op in randaugment.ops] == list(TIMM_OPERATIONS)
    assert randaugment.num_layers == TIMM.randaugment_ops == 2
    for op in randaugment.ops:
        assert (op.prob, op.magnitude, op.magnitude_std, op.magnitude_max) == (0.5, 9, 0.5, None)
        assert op.kwargs == {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BICUBIC}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_operation_is_timms_to_the_bit(name, sign, monkeypatch):
    image = picture()
    for magnitude in (0, 2.5, 7, 8.73214, 9, 9.5, 10):
        wanted = timms(name, image, magnitude, sign, monkeypatch)
        found = TIMM_OPERATIONS[NAMES[name]].apply(image, magnitude / 10, sign)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted), err_msg=f"{magnitude}")


def test_train_is_the_draw_in_timms_operations(monkeypatch):
    """The whole of it, from the documented layout of the draws."""
    image, names, used = picture(), list(NAMES), set()
    for position in range(80):
        draws = list(rng.generator(1, "augment", 2, position).random(29))
        magnitudes = 9 + 0.5 * rng.generator(1, "magnitude", 2, position).standard_normal(2)
        drawn = draw_augmentation(*image.size, TIMM, (), Draw(1, 2, position))
        vlmo = draw_augmentation(*image.size, dataclasses.replace(TIMM, augment="vlmo"), (), Draw(1, 2, position))
        assert (drawn.box, drawn.flip) == (vlmo.box, vlmo.flip)
        wanted = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=drawn.box)
        wanted = ImageOps.mirror(wanted) if draws[22] < 0.5 else wanted
        for (which, whether, sign), magnitude in zip((draws[23:26], draws[26:29]), magnitudes, strict=True):
            if whether < 0.5:
                name = names[int(which * 15)]
                used.add(name)
                with monkeypatch.context() as patched:
                    wanted = timms(name, wanted, min(magnitude, 10), 1 if sign < 0.5 else -1, patched)
        found = decode_train(png(image), SIZE, TIMM, (), Draw(1, 2, position))
        np.testing.assert_array_equal(found, np.asarray(wanted).transpose(2, 0, 1))
    assert len(used) == 15


def test_magnitudes_are_normal_and_cut_off_at_10():
    drawn = [draw_augmentation(61, 47, TIMM, (), Draw(1, 2, position)) for position in range(4000)]
    magnitudes = 10 * np.array([level for each in drawn for level in each.levels])
    assert len(magnitudes) == sum(len(each.operations) for each in drawn)
    assert magnitudes.max() == 10 and 0.01 < (magnitudes == 10).mean() < 0.04  # two deviations: 2.3 %
    assert np.median(magnitudes) == pytest.approx(9, abs=0.05) and magnitudes.std() == pytest.approx(0.49, abs=0.03)
    counts = np.unique([name for each in drawn for name, _ in each.operations], return_counts=True)[1]
    assert len(counts) == 15 and (abs(counts - 4000 / 15) < 4 * (4000 / 15) ** 0.5).all()


@pytest.mark.parametrize("forbid", [(name,) for name in FORBID] + [FORBID])
def test_forbidding_takes_away_and_shifts_nothing(forbid):
    for position in range(60):
        free, bound = (draw_augmentation(61, 47, TIMM, f, Draw(1, 2, position)) for f in ((), forbid))
        both = zip(free.operations, free.levels, strict=True)
        kept = [(op, level) for op, level in both if TIMM_OPERATIONS[op[0]].kind not in forbid]
        assert list(zip(bound.operations, bound.levels, strict=True)) == kept


def test_forbidden_color_leaves_a_flat_image_its_color():
    flat = png(Image.new("RGB", (50, 40), (200, 90, 30)))
    for position in range(40):
        out = decode_train(flat, 8, TIMM, ["color", "geometric"], Draw(1, 2, position))
        assert (out == np.array([200, 90, 30])[:, None, None]).all()


def test_a_mask_moves_with_timms_operations():
    labels = (np.arange(47)[:, None] + np.zeros(61)).astype(np.uint8)
    image = png(Image.fromarray(labels).convert("RGB"))
    moved = 0
    for position in range(40):
        draw = Draw(1, 2, position)
        pixels, mask = decode.decode_train_with_mask(image, png(Image.fromarray(labels)), SIZE, TIMM, ["color"], draw)
        inside = np.zeros_like(mask, bool)
        inside[2:-2, 2:-2] = np.lib.stride_tricks.sliding_window_view(mask != 255, (5, 5)).all((2, 3))
        assert np.abs(pixels[0].astype(int) - mask)[inside].max(initial=0) <= 4
        moved += (mask == 255).any()
    assert moved > 5


class Given:
    """In the place of the module `random`: the next of these draws in [0, 1), however it is asked for."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def random(self) -> float:
        return next(self.draws)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * next(self.draws)

    def randint(self, low: int, high: int) -> int:
        return low + int(next(self.draws) * (high - low + 1))


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 12, 40)])
def test_the_erased_rectangle_is_timms(shape, monkeypatch):
    import torch

    count = 0
    for position in range(120):
        generator = rng.generator(1, "erase", 2, position)
        whether, top, left = generator.random(3)
        attempts = generator.random((10, 2))
        areas = shape[1] * shape[2] * (0.02 + (1 / 3 - 0.02) * attempts[:, 0])
        ratios = 0.3 ** (1 - 2 * attempts[:, 1])
        sides = zip((areas * ratios) ** 0.5, (areas / ratios) ** 0.5, strict=True)
        fits = next(i for i, (h, w) in enumerate(sides) if round(h) < shape[1] and round(w) < shape[2])
        draws = [whether, *attempts[: fits + 1].flatten(), top, left]
        monkeypatch.setattr(random_erasing, "random", Given(draws))
        wanted = random_erasing.RandomErasing(0.25, mode="const", device="cpu")(torch.ones(shape))[0] == 0
        before = np.full(shape, 7, np.uint8)
        found = erased(before.copy(), 0.25, Draw(1, 2, position))
        np.testing.assert_array_equal(found[:, ~wanted.numpy()], 7)
        assert not wanted.any() or (found[:, wanted.numpy()] != 7).mean() > 0.9
        count += bool(wanted.any())
    assert 15 < count < 45


def test_erased_pixels_are_normal_noise_that_is_clipped():
    noise = [erased(np.full((3, 64, 64), 7, np.uint8), 1.0, Draw(1, 0, position)) for position in range(30)]
    values = np.concatenate([each[each != 7] for each in noise])
    assert values.mean() == pytest.approx(127.5, abs=1)
    assert np.isin(values, (0, 255)).mean() == pytest.approx(0.317, abs=0.01)  # beyond one deviation
    assert np.median(abs(values - 127.5)) == pytest.approx(0.6745 * 127.5, abs=1)


def test_erasing_is_a_function_of_the_draw_and_heeds_forbid():
    image, data = png(picture()), DataConfig(randaugment_ops=0, flip=False, erase=1.0, decoder="pillow")
    plain = DataConfig(randaugment_ops=0, flip=False, decoder="pillow")
    state = random.getstate(), np.random.get_state()[1].tolist()
    first = [decode_train(image, SIZE, data, (), Draw(1, 2, position)) for position in range(4)]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    for position, out in enumerate(first):
        draw = Draw(1, 2, position)
        np.testing.assert_array_equal(decode_train(image, SIZE, data, (), draw), out)
        assert (out != decode_train(image, SIZE, plain, (), draw)).any(axis=0).mean() > 0.01
        whole = decode_train(image, SIZE, plain, ["crop"], draw)
        np.testing.assert_array_equal(decode_train(image, SIZE, data, ["crop"], draw), whole)


@pytest.mark.parametrize("stored", [(61, 47), (47, 61), (40, 40), (300, 21), (640, 481)])
@pytest.mark.parametrize("size", [32, 37, 384])
@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_the_centre_is_that_of_timms_evaluation(stored, size, decoder):
    image = picture(*stored)
    share = 0.875 if size < 384 else 1.0
    transform = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=share, normalize=False)
    wanted = transform(image).numpy().astype(int)
    found = decode_center(png(image), size, DataConfig(decoder=decoder)).astype(int)
    assert found.shape == wanted.shape == (3, size, size)
    apart = abs(found - wanted)
    most, mean = (2, 0.02) if decoder == "pillow" else (10, 0.4)
    assert apart.max() <= most and apart.mean() <= mean
