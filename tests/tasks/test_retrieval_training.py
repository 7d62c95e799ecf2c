"""Fine-tuning for retrieval: its loss is `test_step.py`'s; here, whole runs and the evaluation."""

import dataclasses

import numpy as np
import pytest
import torch
from small_run import SMALL, job, train_on

from vlmo_ray.config import Config, OptimConfig, Phase
from vlmo_ray.data.schema import PAIRS
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.recipes.retrieval import RetrievalConfig
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.load import load_all
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.tasks import build_evaluation, build_task
from vlmo_ray.train.loop import train

HEADS = {"contrast": ("itc",), "contrast and matching": ("itc", "itm")}


def config_of(kind: str) -> Config:
    task = RetrievalConfig(itm=1.0 if "matching" in kind else 0.0)
    model = dataclasses.replace(SMALL.model, heads=HEADS[kind], image_size=24, drop_path=0.1)
    return dataclasses.replace(
        SMALL, name="retrieval", model=model, task=task, phases=(Phase(6, 12),), evaluate_every=3, precision="float64",
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(scenes, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pretrained")
    assert train(job(scenes, folder)).step == 10
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEADS)
def test_a_run_of_two_workers_equals_that_of_one(scenes, pretrained, tmp_path, kind):
    """From a pre-trained run at another image size; the scores inside the run too."""
    runs = []
    for world in (1, 2):
        spec = job(scenes, tmp_path / str(world), dataclasses.replace(config_of(kind), init=pretrained))
        spec = dataclasses.replace(spec, eval_data=scenes)
        assert all(outcome.step == 6 for outcome in train_on(world, spec))
        runs.append(Store(str(tmp_path / str(world))))
    one, two = (
        [[row[name] for name in ("step", "loss", "itc", "grad_norm", "temperature")] for row in read_metrics(run)[0]]
        for run in runs
    )
    np.testing.assert_allclose(one, two, rtol=1e-9)
    names = ["itc", "itm"] if "matching" in kind else ["itc"]
    assert [name for name in ("itc", "itc_vl", "itm", "mlm") if name in read_metrics(runs[0])[0][0]] == names
    scores = [[(step, result.scores) for step, result in read_evaluations(run)] for run in runs]
    assert scores[0] == scores[1] and [step for step, _ in scores[0]] == [3, 6]
    loaded = load_all(runs[0].uri)
    assert loaded.config.task.kind == "retrieval" and loaded.model.config.image_size == 24


def test_what_no_term_reaches_is_frozen():
    for kind in HEADS:
        config = config_of(kind)
        model = VLMo(dataclasses.replace(config.model, heads=("itc", "itc_vl", "itm", "mlm")))
        task = build_task(model, config, PAIRS)
        frozen = {name for name, _ in task.named_parameters() if not task.trainable(name)}
        heads = {"contrast": ("itc_vl", "itm", "mlm", "pooler"), "contrast and matching": ("itc_vl", "mlm")}[kind]
        expected = {n for n, _ in task.named_parameters() if n.startswith(tuple(f"model.{head}." for head in heads))}
        if kind == "contrast":
            expected |= {n for n, _ in task.named_parameters() if ".experts.vl." in n}
        assert frozen == expected


def blocks_of(evaluation, counts, seed=0):
    """Made-up features: image i with `counts[i]` texts."""
    generator = np.random.default_rng(seed)
    keys = np.repeat(generator.permutation(len(counts)) * 1000, counts)
    features = {key: generator.normal(size=8) for key in keys}
    image = np.stack([features[key] for key in keys]).astype(np.float32)
    text = (image + generator.normal(size=image.shape)).astype(np.float32)
    rows = {"image_feature": image, "text_feature": text, "image_key": keys}
    return [{name: values[a : a + 7] for name, values in rows.items()} for a in range(0, len(keys), 7)], rows


def slow_recalls(rows, images: list[int]) -> dict[str, float]:
    """One query after the other, among the images with these keys and their texts."""
    texts = [i for i, key in enumerate(rows["image_key"]) if key in images]
    first = {key: next(i for i in texts if rows["image_key"][i] == key) for key in images}
    found = {}
    for k in (1, 5, 10):
        hits = []
        for key in images:
            query = rows["image_feature"][first[key]]
            order = sorted(texts, key=lambda i, q=query: -float(rows["text_feature"][i] @ q))
            hits.append(any(rows["image_key"][i] == key for i in order[:k]))
        found[f"text_retrieval_r@{k}"] = np.mean(hits)
        hits = []
        for i in texts:
            query = rows["text_feature"][i]
            order = sorted(images, key=lambda key, q=query: -float(rows["image_feature"][first[key]] @ q))
            hits.append(rows["image_key"][i] in order[:k])
        found[f"image_retrieval_r@{k}"] = np.mean(hits)
    return found


def test_folds_and_rsum_against_one_query_after_the_other():
    model = VLMo(config_of("contrast").model)
    init_weights(model, 1)
    evaluation = build_evaluation("retrieval", model, PAIRS, folds=3)
    counts = [5, 6, 5, 7, 5, 1] * 4  # some images have more texts than five: all count
    blocks, rows = blocks_of(evaluation, counts)
    scores = evaluation.score(blocks)
    keys = sorted(set(rows["image_key"].tolist()))
    whole = slow_recalls(rows, keys)
    assert {name: scores[name].value for name in whole} == pytest.approx(whole)
    assert scores["image_retrieval_r@1"].count == sum(counts)
    assert scores["rsum"].value == pytest.approx(100 * sum(whole.values())) and not scores["rsum"].is_share
    parts = [slow_recalls(rows, keys[first : first + 8]) for first in (0, 8, 16)]
    for name in whole:
        assert scores[f"folds_{name}"].value == pytest.approx(np.mean([part[name] for part in parts]))
    with pytest.raises(UserError, match="24 images do not divide into folds=5"):
        build_evaluation("retrieval", model, PAIRS, folds=5).score(blocks)
    for options, words in (
        ({"folds": 0}, "folds=0 of retrieval must be at least 1"),
        ({"subset": "a.jpg"}, r"is not a list of texts; write for example subset=\["),
        ({"subset": [391895]}, r"is not a list of texts; write for example subset=\["),
        ({"subset": 391895}, r"is not a list of texts; write for example subset=\["),
    ):
        with pytest.raises(UserError, match=words):
            build_evaluation("retrieval", model, PAIRS, **options)
    with pytest.raises(UserError, match=r"no image of subset, for example 'nowhere\.jpg', is among those"):
        build_evaluation("retrieval", model, PAIRS, subset=["nowhere.jpg"]).score(blocks)
    with pytest.raises(UserError, match="'fold' is not an option of retrieval; it has subset, folds"):
        build_evaluation("retrieval", model, PAIRS, fold=5)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("retrieval_")])
def test_recipes_train_the_contrast_alone(name):
    config = recipe(name)
    assert config.task.heads == config.model.heads == ("itc",)
    with torch.device("meta"):
        task = build_task(VLMo(config.model), config, PAIRS)
    assert len(task.passes()) == 2 and task.encoder().fields == ("image", "text")
