"""Synthetic scenes: purity, pictures that show what the graph says, the hold-out, and the records.

The oracle for pictures are pixels: colours where a shape covers them fully, areas, and connected regions.
"""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scenes.questions import pair_statement, questions
from scenes.records import classification_records, nlvr2_records
from scipy import ndimage

from vlmo_ray.demo.scenes.captions import captions, forbidden_augmentations
from vlmo_ray.demo.scenes.records import mask_of, records, segmented
from vlmo_ray.demo.scenes.render import OUTLINES, PALETTE, PATTERNS, coverage
from vlmo_ray.demo.scenes.world import BACKGROUND_COLOURS, COMBINATIONS, HELD_OUT, KINDS, SEEN, SHAPE_COLOURS, scene
from vlmo_ray.errors import UserError

# ---- scenes and their pictures --------------------------------------------------------------------------


def sample(n=120, size=64, seed=11):
    return [scene(seed, i, split, size) for split in ("train", "eval") for i in range(n)]


def nearest_colour(pixels: np.ndarray) -> np.ndarray:
    names = np.array(list(PALETTE))
    distances = np.linalg.norm(pixels[:, None, :].astype(float) - np.array(list(PALETTE.values())), axis=-1)
    return names[distances.argmin(1)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**7), st.sampled_from(["train", "eval"]), st.sampled_from([16, 32, 50]))
def test_pure(seed, index, split, size):
    first, second = scene(seed, index, split, size), scene(seed, index, split, size)
    assert first == second
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(mask_of(first), mask_of(second))
    assert captions(first, 3) == captions(second, 5)[:3]
    assert captions(first) == captions(scene(seed, index, split, 64)), "the size changes nothing but pixels"
    assert questions(first) == questions(second)
    assert first.image.shape == (size, size, 3) and first.image.dtype == np.uint8
    assert mask_of(first).shape == (size, size) and mask_of(first).dtype == np.uint8


def test_seed_index_and_split_matter():
    images = [
        scene(*key).image.tobytes() for key in ((1, 0, "train"), (2, 0, "train"), (1, 1, "train"), (1, 0, "eval"))
    ]
    assert len(set(images)) == 4


def test_mistakes_are_named():
    with pytest.raises(UserError, match='"test"'):
        scene(0, 0, "test")
    with pytest.raises(UserError, match="8 pixels"):
        pair_statement(0, 0, image_size=8)


@pytest.mark.parametrize("size", [32, 64])
def test_pixels_show_the_graph(size):
    for shown in sample(size=size):
        labels, mask = {1 + KINDS.index(s.kind) for s in shown.shapes}, mask_of(shown)
        assert set(np.unique(mask)) == {0, *labels}
        pieces = {label: ndimage.label(mask == label, np.ones((3, 3))) for label in labels}
        assert sum(n for _, n in pieces.values()) == len(shown.shapes), "each in one piece, none touching"
        for s in shown.shapes:
            regions, _ = pieces[1 + KINDS.index(s.kind)]
            points = np.argwhere(regions)
            nearest = points[np.hypot(*(points + 0.5 - (s.y * size, s.x * size)).T).argmin()]
            own = regions == regions[tuple(nearest)]
            covered = coverage(s.kind, s.radius * size)[..., 0]
            covered = covered[covered >= 0.5]
            assert own.sum() == len(covered)
            core = shown.image[own][covered > 0.95]  # edges blend with the background
            assert len(core) >= 12 and np.mean(nearest_colour(core) == s.colour) > 0.95
            extent = np.argwhere(own)
            middle = (extent.min(0) + extent.max(0) + 1) / 2
            assert tuple((middle * 3 // size).astype(int)) == (s.row, s.col)
        clear = ndimage.minimum_filter(mask == 0, 3)  # away from blended edges
        assert np.mean(nearest_colour(shown.image[clear]) == shown.background.colour) > 0.7


def test_outlines_survive_a_flip():
    for kind in OUTLINES:
        for radius in (4.4, 15.0):
            np.testing.assert_array_equal(coverage(kind, radius), coverage(kind, radius)[:, ::-1])


def test_the_first_shape_is_the_only_largest():
    for shown in sample():
        radii = sorted((s.radius for s in shown.shapes), reverse=True)
        assert shown.shapes[0].radius == radii[0]
        assert len(radii) == 1 or radii[0] > 1.4 * radii[1]
        assert [s.size for s in shown.shapes[1:]] == ["small"] * (len(radii) - 1)
        assert len({(s.colour, s.kind) for s in shown.shapes}) == len(radii)


def test_held_out_combinations():
    assert len(HELD_OUT) == 8 and {c for c, _ in HELD_OUT} == set(SHAPE_COLOURS)
    assert {k for _, k in HELD_OUT} == set(KINDS)
    seen, evaluated, shares = Counter(), Counter(), []
    for i in range(3000):
        train, evaluation = scene(3, i), scene(3, i, "eval")
        seen.update((s.colour, s.kind) for s in train.shapes)
        evaluated.update((s.colour, s.kind) for s in evaluation.shapes)
        assert not train.held_out
        shares.append(evaluation.held_out)
        assert evaluation.held_out == any((s.colour, s.kind) in HELD_OUT for s in evaluation.shapes)
    assert set(seen) == set(SEEN) and set(evaluated) == set(COMBINATIONS)
    assert min(seen.values()) > 0.6 * np.mean(list(seen.values()))
    assert np.mean(shares) == pytest.approx(1 / 3, abs=0.04)


def test_everything_occurs():
    scenes = [scene(4, i) for i in range(2000)]
    for values, expected in (
        (Counter(s.background.colour for s in scenes), BACKGROUND_COLOURS),
        (Counter(s.background.pattern for s in scenes), PATTERNS),
        (Counter(s.shapes[0].kind for s in scenes), KINDS),
        (Counter((t.row, t.col) for s in scenes for t in s.shapes), itertools.product(range(3), range(3))),
        (Counter(t.size for s in scenes for t in s.shapes), ("small", "large")),
        (Counter(len(s.shapes) for s in scenes), (1, 2, 3)),
    ):
        assert set(values) == set(expected)
        assert min(values.values()) > 0.2 * max(values.values()), values


# ---- records --------------------------------------------------------------------------------------------


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


def test_records():
    rows = list(records(1, 12, "train", 32))
    assert rows[:5] == list(records(1, 5, "train", 32))
    for i, row in enumerate(rows):
        shown = scene(1, i, "train", 32)
        assert (row["id"], row["image_id"]) == (f"scene-train-{i:07d}-0", f"scene-train-{i:07d}")
        assert set(row) == {"id", "image_id", "image", "text", "forbid"}
        np.testing.assert_array_equal(pixels(row["image"]), shown.image)
        caption = captions(shown)[0]
        assert row["text"] == caption.text and row["forbid"] == list(forbidden_augmentations(caption))
    assert next(records(2, 1, "train", 32))["image"] != rows[0]["image"]


def test_nlvr2_records():
    for i, row in enumerate(nlvr2_records(1, 20, "eval", 32)):
        left, right, text, truth = pair_statement(1, i, "eval", 32)
        np.testing.assert_array_equal(pixels(row["image"]), left.image)
        np.testing.assert_array_equal(pixels(row["image_right"]), right.image)
        assert (row["text"], row["label"]) == (text, int(truth))
        assert row["id"] == f"pair-eval-{i:07d}" and "flip" not in row["forbid"]


def test_classification_and_segmentation_records():
    labelled = list(classification_records(1, 30, "train", 32))
    for i, (row, seg) in enumerate(zip(labelled, segmented(1, 30, "train", 32), strict=True)):
        shown = scene(1, i, "train", 32)
        assert KINDS[row["label"]] == row["label_name"] == shown.shapes[0].kind
        assert row["id"] == seg["id"] == f"scene-train-{i:07d}" and row["image"] == seg["image"]
        mask = pixels(seg["mask"])
        np.testing.assert_array_equal(mask, mask_of(shown))
        assert (mask == row["label"] + 1).any()


def test_torch_is_not_imported():
    code = "import sys, vlmo_ray.demo.scenes.records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
