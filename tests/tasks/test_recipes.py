"""Every recipe: its task is built, its encoder reads a record, and one step trains what it should, at shrunken size."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from conftest import make_image
from PIL import Image

from vlmo_ray.config import ClusterConfig, Config, Phase, check
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.schema import Field, Record, Schema
from vlmo_ray.demo.scenes.records import png
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.recipes.segmentation import SegmentationConfig
from vlmo_ray.tasks import build_task
from vlmo_ray.train.optim import WeightAverage, build_optimizer, set_lr
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients

ROWS, ANSWERS, CLASSES = 4, ("red", "blue", "two"), ("False", "True", "neither")


def shrunken(name: str) -> Config:
    config = recipe(name)
    model = dataclasses.replace(
        config.model, width=24, depth=2, num_heads=2, vl_start=1, image_size=32, patch_size=8, num_answers=len(ANSWERS)
    )
    task = config.task
    if isinstance(task, SegmentationConfig):  # UperNet reads four layers
        model = dataclasses.replace(model, depth=4)
        task = dataclasses.replace(task, layers=(0, 1, 2, 3), channels=16, auxiliary_channels=8)
    return check(
        dataclasses.replace(
            config, model=model, task=task, phases=(Phase(4, ROWS),), slice_size=2, micro_batch=2, init="",
            precision="float32", optim=dataclasses.replace(config.optim, warmup_steps=1), cluster=ClusterConfig(),
        )
    )  # fmt: skip


def batch_of(task) -> Batch:
    encoder, rows = task.encoder(), []
    for i in range(ROWS):
        values = {"image": make_image(i), "image_2": make_image(i + 50), "text": f"a dog and {i} red balls"}
        values |= {"label": i % 2, "answers": [{"answer": ANSWERS[i % 3], "score": 1.0}]}
        values |= {"mask": png(np.asarray(Image.open(io.BytesIO(values["image"])).convert("L")) // 100)}
        record = Record(str(i), str(i), {name: values[name] for name in encoder.fields})
        rows.append(encoder(record, Draw(1, 0, i)))
    columns = {name: np.stack([row[name] for row in rows]).astype(c.dtype) for name, c in encoder.columns.items()}
    own = {"valid": np.ones(ROWS, bool), "position": np.arange(ROWS)}
    return Batch.from_numpy(columns | own | {"id": np.array(list("abcd")), "problem": np.array([""] * ROWS)})


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_of_every_recipe(name):
    config = shrunken(name)
    names = ("False", "True") if config.task.kind == "nlvr2" else CLASSES
    fields = [Field("image", "image"), Field("image_2", "image"), Field("text", "text")]
    more = [Field("label", "label", names), Field("answers", "answers", ANSWERS), Field("mask", "mask", CLASSES)]
    schema = Schema((*fields, *more))
    model = VLMo(config.model)
    init_weights(model, config.seed)
    task = build_task(model, config, schema)
    parallel = parallelize(task, config.cluster, 1, torch.device("cpu"))
    optimizer = build_optimizer(task, config)
    groups = [p for group in optimizer.param_groups for p in group["params"]]
    trainable = {n: p for n, p in task.named_parameters() if task.trainable(n)}
    assert len(groups) == len(trainable) and {id(p) for p in groups} == {id(p) for p in trainable.values()}
    average = WeightAverage(task, config.optim.average_decay) if config.optim.average_decay else None
    before = {n: p.detach().clone() for n, p in task.named_parameters()}
    figures = gradients(parallel, batch_of(task), Workers((ROWS,)), 0, config.micro_batch, average=average)
    assert np.isfinite(float(figures["loss"])) and float(figures["masked_rows"]) == 0
    set_lr(optimizer, 1e-2)
    optimizer.step()
    moved = {n for n, p in task.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= trainable.keys() and len(moved) > 0.7 * len(trainable), trainable.keys() - moved
