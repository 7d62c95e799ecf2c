"""FLOPs of the pre-training step against counts made by hand at 224 px and 40 tokens, in GFLOP per pair."""

from __future__ import annotations

import pytest

from vlmo_ray.config import MODEL_SIZES
from vlmo_ray.model.flops import forward_flops, step_flops
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe
from vlmo_ray.train.memory import on_meta

PARTS = ("itm_positive", "image", "text", "image_vl", "text_vl", "mlm_head")
COUNTED = {
    "base": (42.56, 35.13, 6.85, 5.82, 1.14, 1.92, 221.1, 663.3),
    "large": (148.97, 123.11, 24.32, 15.35, 3.04, 2.58, 764.3, 2292.9),
    "base_plus": (43.50, 35.77, 6.90, 4.45, 0.86, 1.35, 223.3, 670.0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_per_pair(name):
    config = MODEL_SIZES[name]
    parts = forward_flops(config, 40)
    counted = [parts[part] for part in PARTS] + [sum(parts.values()), step_flops(config, 40)]
    assert [flops / 1e9 for flops in counted] == pytest.approx(COUNTED[name], rel=2e-3, abs=6e-3)


def test_left_out_patches_are_not_counted():
    """With half of the patches, 0.58 of a step; with all of them named, the same as without a number."""
    config = MODEL_SIZES["base"]
    whole = step_flops(config, 40)
    assert step_flops(config, 40, config.num_patches) == whole
    assert step_flops(config, 40, config.num_patches // 2) / whole == pytest.approx(0.58, abs=0.01)
    task = on_meta(override(recipe("pretrain_base"), ["task.patch_dropout=0.5"]))
    assert task.flops_per_row() == step_flops(config, 40, config.num_patches // 2)
