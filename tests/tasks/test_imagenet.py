"""ImageNet: the recipes are BEiT's, and the ReaL labels are counted as timm counts them."""

import dataclasses
import functools
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from small_run import SMALL
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet

from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.recipes import recipe
from vlmo_ray.recipes.classification import ClassificationConfig
from vlmo_ray.runs.evaluations import scored
from vlmo_ray.tasks.classification import Classification
from vlmo_ray.tasks.metrics import imagenet
from vlmo_ray.tasks.metrics.imagenet import real_top1

WORDNET = tuple(ImageNetInfo().label_names())
IDS = [f"val/n01440764/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]


@functools.cache
def real_labels() -> dict[str, list[int]]:
    """timm's, by name of the file."""
    return RealLabelsImagenet(IDS).real_labels


@pytest.fixture(scope="module")
def predicted() -> np.ndarray:
    """Of each image a right class or, of a third, any class."""
    generator, labels = np.random.default_rng(1), real_labels().values()
    guesses = generator.integers(0, 1000, 50_000)
    pairs = zip(guesses, labels, strict=True)
    return np.array([g if g % 3 == 0 or not right else right[g % len(right)] for g, right in pairs])


def test_real_accuracy_is_timms(predicted):
    """Also with the classes in another order."""
    timms = RealLabelsImagenet(IDS)
    for part in predicted.reshape(50, 1000):
        timms.add_result(torch.nn.functional.one_hot(torch.from_numpy(part), 1000))
    for numbers, names in ((predicted, WORDNET), (999 - predicted, WORDNET[::-1])):
        score = real_top1(IDS, numbers, names)
        assert 100 * score.value == pytest.approx(timms.get_accuracy(1), rel=1e-12) and 0.6 < score.value < 0.7
        assert score.count == sum(bool(right) for right in timms.real_labels.values()) == 46_837
        assert score.chance == pytest.approx(0.00122, abs=0.0001)


def test_real_accuracy_is_of_the_images_that_are_there(predicted):
    some = np.random.default_rng(2).permutation(50_000)[:300]
    labels = list(real_labels().values())
    wanted = [predicted[i] in labels[i] for i in some if labels[i]]
    score = real_top1([IDS[i] for i in some], predicted[some], WORDNET)
    assert score.value == pytest.approx(np.mean(wanted)) and score.count == len(wanted) < 300


def test_other_data_has_no_such_score(predicted):
    assert real_top1(["train/n01440764/n01440764_10026.JPEG", *IDS[1:]], predicted, WORDNET) is None
    assert real_top1(IDS, predicted, tuple(str(i) for i in range(1000))) is None
    assert real_top1(IDS, predicted, WORDNET[:999]) is None
    without_label = next(i for i in IDS if not real_labels()[i.rpartition("/")[2]])
    assert real_top1([without_label], predicted[:1], WORDNET) is None


def evaluation_of(names: tuple[str, ...]):
    config = dataclasses.replace(SMALL, model=dataclasses.replace(SMALL.model, heads=()), task=ClassificationConfig())
    schema = Schema((Field("image", "image"), Field("label", "label", names)))
    return Classification(VLMo(config.model), config, schema).evaluation(schema)


def blocks(predicted: np.ndarray, size: int):
    for first in range(0, 2000, size):
        part = slice(first, first + size)
        best = predicted[:2000][part]
        valid = np.arange(2000)[part] % 7 != 3
        problems = np.where(valid, "", "damaged")
        yield {"rank": best % 9, "best": best, "valid": valid, "id": np.array(IDS[:2000])[part], "problem": problems}


def test_an_evaluation_on_the_validation_images_has_it(predicted, monkeypatch):
    kept = np.arange(2000) % 7 != 3
    results = [scored(evaluation_of(WORDNET), blocks(predicted, size), "val") for size in (2000, 64)]
    assert results[0] == results[1] and results[0].remark == ""
    assert list(results[0].scores) == ["top1", "top5", "real_top1"]
    wanted = real_top1(list(np.array(IDS[:2000])[kept]), predicted[:2000][kept], WORDNET)
    assert results[0].scores["real_top1"] == wanted and wanted.count < results[0].scores["top1"].count == kept.sum()
    others = tuple(str(i) for i in range(1000))
    assert "real_top1" not in scored(evaluation_of(others), blocks(predicted, 64), "val").scores
    imagenet.real_labels.cache_clear()
    monkeypatch.setattr(imagenet.importlib.util, "find_spec", lambda name: None if name == "timm" else find_spec(name))
    without = scored(evaluation_of(WORDNET), blocks(predicted, 64), "val")
    assert list(without.scores) == ["top1", "top5"] and "the package timm, which is not installed" in without.remark
    imagenet.real_labels.cache_clear()


def test_logits_become_rank_and_best_class():
    evaluation = evaluation_of(("a", "b", "c", "d", "e", "f", "g"))
    features = torch.randn(5, evaluation.task.head.in_features, generator=torch.Generator().manual_seed(1))
    logits, evaluation.task.features = evaluation.task.head(features), lambda image: features

    class Rows:
        image, label = None, torch.tensor([0, 1, 2, 3, 4])

    found = evaluation.rows(Rows)
    assert found["best"].tolist() == logits.argmax(dim=1).tolist()
    assert ((found["rank"] == 0) == (found["best"] == Rows.label)).all()


# name: size, images, epochs, warm-up epochs, batch, lr, layer decay, drop path, weight decay, mixes, clip, LayerScale
BEIT = {
    "classification_base_22k": ("base", 14_197_122, 90, 5, 4096, 3e-3, 0.65, 0.2, 0.05, False, 3.0, 0.1),
    "classification_large_22k": ("large", 14_197_122, 90, 5, 2048, 2e-3, 0.75, 0.2, 0.05, False, 1.0, 1e-5),
    "classification_base_from_22k": ("base", 1_281_167, 30, 5, 512, 2e-5, 0.85, 0.1, 1e-8, False, 0.0, 0.1),
    "classification_large_from_22k": ("large", 1_281_167, 30, 5, 512, 2e-5, 0.9, 0.4, 1e-8, False, 0.0, 1e-5),
    "classification_base": ("base", 1_281_167, 100, 20, 1024, 4e-3, 0.65, 0.1, 0.05, True, 0.0, 0.1),
    "classification_large": ("large", 1_281_167, 50, 5, 1024, 1e-3, 0.75, 0.2, 0.05, True, 0.0, 1e-5),
}


@pytest.mark.parametrize("name", BEIT)
def test_recipes_are_beits(name):
    size, images, epochs, warmup, batch, lr, decay, drop_path, weight_decay, mixes, clip, scale = BEIT[name]
    config = recipe(name)
    task, data, optim, [phase] = config.task, config.data, config.optim, config.phases
    assert config.name == name
    assert (config.model.width, config.model.depth) == {"base": (768, 12), "large": (1024, 24)}[size]
    assert (config.model.drop_path, config.model.layer_scale, config.model.init_std) == (drop_path, scale, 0.02)
    assert phase.global_batch == batch and phase.steps * batch <= epochs * images < (phase.steps + epochs) * batch
    assert optim.warmup_steps * epochs == phase.steps * warmup and optim.schedule == "cosine"
    assert (optim.peak_lr, optim.weight_decay, optim.clip_norm) == (lr, weight_decay, clip)
    assert (optim.beta1, optim.beta2, optim.eps, optim.average_decay) == (0.9, 0.999, 1e-8, 0)
    assert (task.layer_decay, task.head_lr_scale, task.label_smoothing) == (decay, 1.0, 0.1)
    assert (task.mixup, task.cutmix) == ((0.8, 1.0) if mixes else (0.0, 0.0))
    assert (task.head, task.eval_crop, data.augment, data.erase) == ("mean_norm", "center", "timm", 0.25)
    assert (data.randaugment_ops, data.randaugment_magnitude, data.crop_area, data.flip) == (2, 9, (0.08, 1.0), True)


def test_the_tiny_recipe_is_as_it_was():
    config = recipe("classification_tiny")
    assert config.task == ClassificationConfig(label_smoothing=0.0, layer_decay=1.0, head="norm_mean")
    assert (config.data.augment, config.data.erase) == ("vlmo", 0.0)
