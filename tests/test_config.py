"""Configs: round trip, overrides with typed values, and a sentence for every field that does not fit."""

import copy
import dataclasses
from typing import ClassVar

import pytest

from vlmo_ray.config import ClusterConfig, Config, Phase, TaskConfig, check, check_model, ineffective
from vlmo_ray.errors import UserError
from vlmo_ray.fields import setting
from vlmo_ray.overrides import VERSION, differences, from_dict, override, to_dict
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.recipes.pretraining import PretrainingConfig


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
        ("optim=1", "is a section"),
        ("seed.x=1", "single value"),
        ("seed=abc", "seed='abc' is not of the kind int"),
        ("seed=1.5", "seed=1.5 is not of the kind int"),
        ("data.flip=1", "data.flip=1 is not of the kind bool"),
        ("model.position=sideways", "must be one of 'relative', 'absolute'"),
        ("model.vl_start=5", "must be from 0 to 4, the number of layers"),
        ("model.vl_start=4", "task.vl_contrast=true needs vision-language experts"),
        ("model.drop_path=1", "model.drop_path=1.0 must be from 0 to below 1"),
        ("model.max_text_len=2", "max_text_len=2 must be at least 3; .CLS. and .SEP. take two"),
        ("model.heads=itc,word", "model.heads names word; known: itc, "),
        ("model.num_heads=0", "model.num_heads=0 must be at least 1"),
        ("model.init_temperature=NaN", "init_temperature=nan must be above 0"),
        ("data.crop_area=0.9,0.5", "must satisfy 0 < smallest <= largest <= 1"),
        ("data.randaugment_magnitude=11", "must be from 0 to 10"),
        ("phases=[[60, 32], [0, 32]]", r"phases\[1\].steps=0 must be at least 1"),
        ("phases=[]", "phases=.* must name at least one phase"),
        ("cluster.gpus_per_worker=8", "gpus_per_worker=8 must be from 0 to 1; for more GPUs, raise"),
        ("keep_checkpoints=0", "keep_checkpoints=0 must be at least 1"),
        ("optim.average_decay=1", "average_decay=1.0 must be from 0 to below 1"),
        ("optim.schedule=step", "must be one of 'linear', 'cosine'"),
        ("loss.itc=2", "unknown field 'loss.itc'.*; loss.itc is now task.itc"),
        ("loss=2", "loss is now task"),
        ("data.patience_s=9", "data.patience_s is now data.retry_timeout_s"),
        ("data.mlm_probability=0.2", "data.mlm_probability is now task.mlm_probability"),
        ("task.kind=vqa", "unknown field 'task.kind'.*; the recipe decides the task"),
        ("task=1", "is a section; set one of its fields, for example task.itc="),
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
        ("data.retry_timeout_s=-1", "data.retry_timeout_s=-1.0 must be at least 0; 0 does not retry"),
        ("checkpoint_every=0", "checkpoint_every=0 must be at least 1"),
        ("model.num_answers=10", "no effect here: model.heads has no 'vqa'"),
        ("model.heads=itc,itm", "model.heads lacks itc_vl, mlm"),
        ("task.contrast=sigmoid", "needs a bias to learn: set model.init_logit_bias"),
        ("task.contrast=triplet", "must be one of 'softmax', 'sigmoid'"),
        ("model.init_logit_bias=-10", "would never be used by task.contrast='softmax'"),
        ("task.label_smoothing=1", "label_smoothing=1.0 must be from 0 to below 1"),
        ("task.feature_grad_scale=0", "feature_grad_scale=0.0 must be above 0; 1 is exact"),
        ("task.itm_share=0.05", "itm_share=0.05 of a slice of 8 rows is less than one row"),
        ("task.itm_share=1.5", "choose from 0.125 to 1"),
        ("task.patch_dropout=1", "patch_dropout=1.0 must be from 0 to below 1"),
        ("task.patch_dropout=0.99", "patch_dropout=0.99 leaves none of the 16 patches of an image; lower it"),
        ("task.unmasked_steps=5", "no effect here: task.patch_dropout is 0"),
        ("model.init_temperature=0", "model.init_temperature=0.0 must be above 0; the paper has 0.07"),
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
    assert [str(d) for d in differences(config, other)] == ["optim.peak_lr: 0.001 -> 1.0", "seed: 1 -> 9"]
    assert check(other) is other


def test_options_that_need_each_other():
    sigmoid = ["model.init_logit_bias=-10", "model.init_temperature=0.1", "task.contrast=sigmoid"]
    assert override(recipe("tiny"), sigmoid).task.contrast == "sigmoid"
    with pytest.raises(UserError, match="label_smoothing is only for the softmax contrast"):
        override(recipe("tiny"), [*sigmoid, "task.label_smoothing=0.1"])
    with pytest.raises(UserError, match="computes for some rows; set one of them back"):
        override(recipe("tiny"), ["task.masked_matching=true", "task.itm_share=0.5"])
    with pytest.raises(UserError, match="no effect here: matching and masked words are not both trained"):
        override(recipe("tiny"), ["task.mlm=0", "task.masked_matching=true"])
    with pytest.raises(UserError, match="unmasked_steps=9999 is more than the"):
        override(recipe("tiny"), ["task.patch_dropout=0.5", "task.unmasked_steps=9999"])
    with pytest.raises(UserError, match="slice_size=1 has no other row"):
        override(recipe("tiny"), ["slice_size=1", "task.negatives=local"])


@pytest.mark.parametrize("name, gpus", [("pretrain_base", 64), ("pretrain_base_plus", 64), ("pretrain_large", 128)])
def test_published_recipes_have_the_published_balance(name, gpus):
    assert recipe(name).task.feature_grad_scale == 1 / gpus


def test_recipes_are_the_public_functions_that_return_a_config():
    assert list(RECIPES) == [
        "captioning_coco_base", "captioning_coco_large", "captioning_tiny",
        "classification_base", "classification_base_22k", "classification_base_from_22k",
        "classification_large", "classification_large_22k", "classification_large_from_22k", "classification_tiny",
        "entailment_base", "entailment_base_plus", "entailment_large", "entailment_tiny",
        "grounding_refcoco_plus_base", "grounding_refcoco_plus_large", "grounding_tiny",
        "language_base", "language_base_plus", "language_large", "language_tiny",
        "nlvr2_base", "nlvr2_base_plus", "nlvr2_large", "nlvr2_base_224", "nlvr2_tiny",
        "pretrain_base", "pretrain_base_plus", "pretrain_large", "pretrain_1b",
        "retrieval_coco_base", "retrieval_coco_base_plus", "retrieval_coco_large", "retrieval_flickr_base",
        "retrieval_flickr_base_plus", "retrieval_flickr_large", "retrieval_coco_base_224", "retrieval_tiny",
        "segmentation_ade20k_base", "segmentation_ade20k_large", "segmentation_tiny",
        "tiny", "demo", "pretrain_1b_tiny", "small_photos", "medium_photos",
        "vision_base", "vision_base_plus", "vision_large", "vision_tiny",
        "vqa_base", "vqa_base_plus", "vqa_large", "vqa_base_224", "vqa_tiny",
    ]  # fmt: skip


def test_a_field_outside_its_choices_is_named_without_the_command_line():
    config = recipe("tiny")
    with pytest.raises(UserError, match=r"model\.position='sideways' must be one of 'relative', 'absolute'"):
        check_model(dataclasses.replace(config.model, position="sideways"))
    with pytest.raises(UserError, match=r"cluster\.strategy='zero' must be one of 'ddp', 'fsdp'"):
        check(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, strategy="zero")))


FREE = {
    "micro_batch", "init", "checkpoint_every", "keep_checkpoints", "keep_every", "evaluate_every", "audit", "search",
    "log_every", "log_json", "trackers", "start_text_experts", "start_vl_experts",
    "data.bad_shards", "data.retry_timeout_s", "optim.skip_nonfinite",
    *(f"cluster.{field.name}" for field in dataclasses.fields(ClusterConfig)),
}  # fmt: skip
REBUILT = {"model.drop_path", "model.init_std", "model.init_temperature"}  # of the model, but the weights fit


def changed(value):
    """Another value of about the same type."""
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(
            value, **{field.name: changed(getattr(value, field.name)) for field in dataclasses.fields(value)}
        )
    return (value, "other")


def test_every_field_says_whether_a_resumed_run_may_change_it():
    config = recipe("tiny")
    found = {diff.path: diff.resume for diff in differences(config, changed(config))}
    assert len(found) == len(leaves(to_dict(config))) - 2  # the version and the kind of task
    assert {path for path, mark in found.items() if mark == "free"} == FREE
    fixed = {path for path in found if path.startswith("model.")} - REBUILT
    assert {path for path, mark in found.items() if mark == "fixed"} == fixed
    assert set(found.values()) == {"free", "ask", "fixed"}


def leaves(raw: dict, prefix: str = "") -> dict:
    out = {}
    for name, value in raw.items():
        out |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def version_1(config: Config) -> dict:
    """The config as the first version wrote it; its new fields must have their defaults."""
    raw = copy.deepcopy(to_dict(config))
    del raw["version"], raw["evaluate_every"]
    for name in ("schedule", "clip_norm", "average_decay"):
        del raw["optim"][name]
    raw["loss"] = raw.pop("task")
    assert raw["loss"].pop("kind") == "pretraining"
    raw["data"]["mlm_probability"] = raw["loss"].pop("mlm_probability")
    raw["data"]["patience_s"] = raw["data"].pop("retry_timeout_s")
    raw["data"]["group_steps"] = raw["data"].pop("shuffle_steps")
    assert raw["data"].pop("decoder") == "pillow"
    return raw


def test_a_config_of_the_first_version_is_read():
    config = override(
        recipe("tiny"),
        ["task.itc=0.9", "task.itm=1.1", "task.mlm=0.3", "task.mlm_probability=0.2", "task.label_smoothing=0.1",
         "task.feature_grad_scale=0.5", "task.negatives=local", "task.itm_share=0.5", "data.retry_timeout_s=7",
         "data.shuffle_steps=3", "data.decoder=pillow"],
    )  # fmt: skip
    sigmoid = ["model.init_logit_bias=-10", "task.contrast=sigmoid", "data.decoder=pillow"]
    for new in (config, override(recipe("tiny"), sigmoid)):
        old = version_1(new)
        before = copy.deepcopy(old)
        assert from_dict(old) == new
        assert old == before  # what was given is left as it was


def test_a_config_of_the_second_version_has_its_decoder():
    raw = to_dict(recipe("tiny")) | {"version": 2}
    del raw["data"]["decoder"]
    before = copy.deepcopy(raw)
    assert from_dict(raw) == override(recipe("tiny"), ["data.decoder=pillow"])
    assert raw == before


def test_a_config_of_a_newer_version_or_an_unknown_task_is_refused():
    raw = to_dict(recipe("tiny"))
    assert raw["version"] == VERSION == 3 and raw["task"]["kind"] == "pretraining"
    with pytest.raises(UserError, match="is of version 4 and this program reads up to 3"):
        from_dict(raw | {"version": 4})
    for task in ({"kind": "dancing"}, {}, 3):
        with pytest.raises(UserError, match=r"task.kind=('dancing'|None) is no task here; known: .*pretraining"):
            from_dict(raw | {"task": task})
    with pytest.raises(UserError, match="does not fit PretrainingConfig"):
        from_dict(raw | {"task": {"kind": "pretraining", "rate": 1}})


@pytest.fixture
def counting(monkeypatch) -> type[TaskConfig]:
    """A task of its own, known for the time of a test."""
    monkeypatch.setattr(TaskConfig, "kinds", dict(TaskConfig.kinds))

    @dataclasses.dataclass(frozen=True)
    class Counting(TaskConfig):
        kind: ClassVar[str] = "counting"
        most: int = setting(9, at_least=1)
        least: int = 0

        def check(self, config: Config) -> None:
            if self.most > config.slice_size * 100:
                raise UserError(f"task.most={self.most} is too much for slice_size={config.slice_size}")

        def ineffective(self, config: Config) -> dict[str, str]:
            return {"least": "seed is 1"} if config.seed == 1 else {}

    return Counting


def test_a_task_brings_its_fields_and_its_checks(counting, monkeypatch):
    def count() -> Config:
        return dataclasses.replace(recipe("tiny"), task=counting())

    monkeypatch.setitem(RECIPES, "count", count)
    config = override(recipe("count"), ["task.most=20"])
    assert to_dict(config)["task"] == {"kind": "counting", "most": 20, "least": 0}
    assert from_dict(to_dict(config)) == config
    assert ineffective(config)["task.least"] == "seed is 1"
    for settings, words in [
        (["task.most=0"], "task.most=0 must be at least 1"),
        (["task.most=900"], "too much for slice_size=8"),
        (["task.itc=1"], "Counting has no 'itc'"),
        (["task.least=1"], "no effect here: seed is 1"),
    ]:
        with pytest.raises(UserError, match=words):
            override(config, settings)
    override(config, ["task.least=1", "seed=2"])
    (task,) = differences(recipe("tiny"), config)
    assert str(task) == "task.kind: 'pretraining' -> 'counting'" and task.resume == "fixed"
    assert recipe("tiny").task == PretrainingConfig()
