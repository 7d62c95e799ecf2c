"""Weights at another image size, text length or with other heads, against slow plain resampling."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline

from vlmo_ray.config import ModelConfig
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.weights.resize import fit_state, geometric_distances, resample_positions, resample_table

TINY = ModelConfig(
    width=16, depth=2, num_heads=2, vl_start=1, image_size=16, patch_size=4, vocab_size=11, max_text_len=5,
    bias_text_len=6,
)  # fmt: skip


def slow_table(table: torch.Tensor, old_grid: int, new_grid: int) -> np.ndarray:
    """Image rows by one-dimensional not-a-knot splines, first along x, then along y, one column at a time."""
    old, new = 2 * old_grid - 1, 2 * new_grid - 1
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if sum(q**k for k in range(old // 2)) > new // 2:
            high = q
        else:
            low = q
    half = [sum(q**k for k in range(n + 1)) for n in range(old // 2)]
    at = np.array([-d for d in reversed(half)] + [0.0] + half)
    wanted = np.clip(np.arange(-(new // 2), new // 2 + 1), at[0], at[-1])  # constant beyond the ends
    out = np.empty((new * new, table.shape[1]))
    for column in range(table.shape[1]):
        z = table[: old * old, column].double().numpy().reshape(old, old)
        along_x = np.array([CubicSpline(at, row)(wanted) for row in z])  # [old y, new x]
        out[:, column] = np.array([CubicSpline(at, row)(wanted) for row in along_x.T]).T.reshape(-1)
    return out


@pytest.mark.parametrize(("old", "new"), [(4, 6), (4, 7), (6, 4), (3, 9), (4, 5)])
def test_table_equals_a_slow_spline_and_keeps_other_rows(old, new):
    table = torch.randn((2 * old - 1) ** 2 + 5 + 12, 3, generator=torch.Generator().manual_seed(old))
    resampled = resample_table(table, old, new, text_len=6)
    image = resampled[: (2 * new - 1) ** 2]
    np.testing.assert_allclose(image.numpy(), slow_table(table, old, new), atol=2e-5)
    assert torch.equal(resampled[len(image) :], table[(2 * old - 1) ** 2 :])
    assert resample_table(table.half(), old, new, text_len=6).dtype == torch.float16


def test_distances_for_384_pixels():
    """27 distances onto 47: q solves 1 + q + ... + q^12 = 23 (0.5 a step: the centre moves least)."""
    at = geometric_distances(27, 47)
    assert len(at) == 27 and at[13] == 0 and at[14] == 1
    assert at[-1] == pytest.approx(23, abs=1e-3)
    assert np.array_equal(at, -at[::-1])
    ratios = np.diff(at[13:])[1:] / np.diff(at[13:])[:-1]
    assert np.allclose(ratios, ratios[0]) and 1.08 < ratios[0] < 1.1


def test_absolute_positions_are_bicubic():
    """Against the cubic convolution kernel with a = -0.75, edges repeated, half-pixel centres."""
    position = torch.randn(1, 1 + 9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    resampled = resample_positions(position, 3, 5)

    def kernel(d: float, a: float = -0.75) -> float:
        d = abs(d)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0

    weights = np.zeros((5, 3))
    for i in range(5):
        centre = (i + 0.5) * 3 / 5 - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[i, min(max(j, 0), 2)] += kernel(centre - j)
    old = position[0, 1:].numpy().reshape(3, 3, 4)
    expected = np.einsum("iy,jx,yxd->ijd", weights, weights, old).reshape(25, 4)
    np.testing.assert_allclose(resampled[0, 1:].numpy(), expected, atol=1e-5)
    assert torch.equal(resampled[:, 0], position[:, 0])


def state_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = VLMo(config)
    init_weights(model, seed=1)
    return model.state_dict()


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_a_state_fits_a_larger_image_and_a_shorter_text(position):
    source = dataclasses.replace(TINY, position=position)
    target = dataclasses.replace(source, image_size=24, max_text_len=3)
    state = state_of(source)
    fitted = fit_state(state, source, target)
    assert not fitted.missing and not fitted.dropped
    model = VLMo(target)
    model.load_state_dict(fitted.state)
    changed = {name for name in state if fitted.state[name].shape != state[name].shape}
    assert changed == (
        {"relative.table"} if position == "relative" else {"image_embed.position", "text_embed.position.weight"}
    )
    if position == "absolute":
        cut = state["text_embed.position.weight"][:3]
        assert torch.equal(fitted.state["text_embed.position.weight"], cut)
        with pytest.raises(UserError, match=r"text_embed\.position\.weight"):
            fit_state(state, source, dataclasses.replace(source, max_text_len=7))


def test_heads_come_and_go_by_name():
    target = dataclasses.replace(TINY, heads=("itc", "vqa", "nlvr2"))
    state = state_of(TINY)
    fitted = fit_state(state, TINY, target)
    assert {name.split(".")[0] for name in fitted.missing} == {"vqa", "nlvr2"}
    assert {name.split(".")[0] for name in fitted.dropped} == {"itc_vl", "itm", "mlm"}
    rows = state["modality.weight"]
    assert torch.equal(fitted.state["modality.weight"], rows[[0, 1, 1]])
    back = fit_state(fitted.state, target, TINY)
    assert torch.equal(back.state["modality.weight"], rows)


def test_a_text_stage_lacks_the_vision_language_experts():
    text_stage = dataclasses.replace(TINY, vl_start=2, heads=("mlm",))
    missing = fit_state(state_of(text_stage), text_stage, dataclasses.replace(TINY, heads=("mlm",))).missing
    assert missing and all(name.startswith("layers.1.experts.vl.") for name in missing)


@pytest.mark.parametrize("change", [{"width": 32}, {"depth": 3}, {"num_heads": 4}, {"patch_size": 8}])
def test_other_sizes_are_refused_by_name(change):
    with pytest.raises(UserError, match=next(iter(change))):
        fit_state(state_of(TINY), TINY, dataclasses.replace(TINY, **change))
    with pytest.raises(UserError, match="LayerScale"):
        fit_state(state_of(TINY), TINY, dataclasses.replace(TINY, layer_scale=None))
    with pytest.raises(UserError, match=r"shape \(11,\) in the weights and \(12,\)"):
        fit_state(state_of(TINY), TINY, dataclasses.replace(TINY, vocab_size=12))
