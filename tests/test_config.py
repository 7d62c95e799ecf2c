"""Configs: round trip, overrides with typed values, and a sentence for every field that does not fit."""

import dataclasses

import pytest

from vlmo_ray.config import Phase, check
from vlmo_ray.errors import UserError
from vlmo_ray.overrides import differences, from_dict, override, to_dict
from vlmo_ray.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_and_survives_json(name):
    config = recipe(name)
    assert config.name == name
    assert from_dict(to_dict(config)) == config
    assert RECIPES[name].__doc__


def test_override_sets_typed_values():
    config = override(
        recipe("tiny"),
        ["optim.peak_lr=3e-4", "phases=[[5, 32], [6, 64]]", "model.layer_scale=null", "data.crop_area=0.8,1",
         "data.flip=false", "model.heads=itc,itc_vl,itm,mlm", "optim.warmup_steps=2", "init=s3://w/x"],
    )  # fmt: skip
    assert config.optim.peak_lr == 3e-4
    assert config.phases == (Phase(5, 32), Phase(6, 64))
    assert config.model.layer_scale is None
    assert config.data.crop_area == (0.8, 1.0) and config.data.flip is False
    assert config.init == "s3://w/x"


@pytest.mark.parametrize(
    "setting, words",
    [
        ("optim.peak_rl=1", "unknown field 'optim.peak_rl'.*did you mean 'peak_lr'"),
        ("nothing=1", "unknown field 'nothing'"),
        ("optim=1", "group of fields"),
        ("seed.x=1", "single value"),
        ("seed=abc", "seed='abc' is not of the kind int"),
        ("seed=1.5", "seed=1.5 is not of the kind int"),
        ("data.flip=1", "data.flip=1 is not of the kind bool"),
        ("model.position=sideways", "must be one of 'relative', 'absolute'"),
        ("phases=[[1,2,3]]", "does not fit Phase"),
        ("phases=[[1]]", "lacks a field of Phase"),
        ("seed", "has no '='"),
        ("model.image_size=33", "image_size=33 is not a multiple of model.patch_size=8; use 32 or 40"),
        ("micro_batch=12", "micro_batch=12 is not a positive multiple of slice_size=8"),
        ("phases=[[60, 36]]", "global batch of 36 does not divide into micro-batches of 16"),
        ("cluster.max_workers=5", "max_workers=5 is more than the 4 slices"),
        ("cluster.min_workers=3", "1 <= min <= max"),
        ("optim.warmup_steps=60", "leaves nothing of the 60 steps"),
        ("model.max_text_len=30", "above model.bias_text_len"),
        ("model.num_heads=5", "not a multiple of model.num_heads=5"),
        ("keep_every=30", "keep_every=30 must be a multiple of checkpoint_every=20, or 0"),
        ("data.patience_s=-1", "patience_s=-1.0 must be 0"),
        ("checkpoint_every=0", "checkpoint_every=0 must be at least 1"),
        ("model.num_answers=10", "no effect here: model.heads has no 'vqa'"),
        ("model.heads=itc,itm", "needs the heads"),
        ("loss.contrast=sigmoid", "needs a bias to learn: set model.init_logit_bias"),
        ("loss.contrast=triplet", "must be one of 'softmax', 'sigmoid'"),
        ("model.init_logit_bias=-10", "would never be used by loss.contrast='softmax'"),
        ("loss.label_smoothing=1", "label_smoothing=1.0 must be from 0 to below 1"),
        ("loss.feature_grad_scale=0", "feature_grad_scale=0.0 must be above 0; 1 is exact"),
        ("loss.itm_share=0.05", "itm_share=0.05 of a slice of 8 rows is less than one row"),
        ("loss.itm_share=1.5", "choose from 0.125 to 1"),
        ("model.init_temperature=0", "must be above 0"),
        ("cluster.strategy=zero", "must be one of 'ddp', 'fsdp'"),
        ("precision=fp8", "must be one of 'auto', 'bf16', 'float32', 'float64'"),
    ],
)
def test_a_setting_that_cannot_work_is_named(setting, words):
    with pytest.raises(UserError, match=words):
        override(recipe("tiny"), [setting])


def test_an_ineffective_field_is_an_error():
    absolute = ["model.position=absolute"]
    override(recipe("tiny"), absolute)
    with pytest.raises(UserError, match="no effect"):
        override(recipe("tiny"), [*absolute, "model.bias_text_len=50"])


def test_unknown_recipe():
    with pytest.raises(UserError, match="no recipe 'pretrain_bas'; did you mean 'pretrain_base'"):
        recipe("pretrain_bas")


def test_differences_are_spelled_out():
    config = recipe("tiny")
    other = dataclasses.replace(config, seed=9, optim=dataclasses.replace(config.optim, peak_lr=1.0))
    assert differences(config, other) == ["optim.peak_lr: 0.001 -> 1.0", "seed: 1 -> 9"]
    assert check(other) is other


def test_options_that_need_each_other():
    sigmoid = ["model.init_logit_bias=-10", "model.init_temperature=0.1", "loss.contrast=sigmoid"]
    assert override(recipe("tiny"), sigmoid).loss.contrast == "sigmoid"
    with pytest.raises(UserError, match="label_smoothing is of the softmax contrast"):
        override(recipe("tiny"), [*sigmoid, "loss.label_smoothing=0.1"])
    with pytest.raises(UserError, match="slice_size=1 has no other row"):
        override(recipe("tiny"), ["slice_size=1", "loss.negatives=local"])


@pytest.mark.parametrize(
    "name, gpus", [("pretrain_base", 64), ("pretrain_base_plus", 64), ("pretrain_large", 128)]
)
def test_published_recipes_have_the_published_balance(name, gpus):
    assert recipe(name).loss.feature_grad_scale == 1 / gpus
