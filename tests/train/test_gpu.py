"""On a GPU: the step against the plain one in float64 on the CPU, every objective, bf16, compiled layers, memory.

`make gpu` runs these. `VLMO_GPU=cpu pytest -m gpu` runs the same code without one, to test the tests.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch
from test_step import CASES, OBJECTIVES, STEP, check, expected, grads_of, make_batch, make_task, teacher_of

from vlmo_ray import rng
from vlmo_ray.config import ClusterConfig
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes import recipe
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.train.memory import memory_of
from vlmo_ray.train.optim import build_optimizer
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients

DEVICE = torch.device(os.environ.get("VLMO_GPU", "cuda"))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32: these tests are about our code, not about the rounding of products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def step(objective="exact", case="duplicates and invalid rows", micro_batch=12, bf16=False, **cluster):
    """(figures, gradients) on the device, the latter moved to the CPU."""
    task = make_task(torch.float32, objective).to(DEVICE)
    parallel = parallelize(task, ClusterConfig(**cluster), 1, DEVICE)
    average = teacher_of(task)
    batch = make_batch(**CASES[case]).to(DEVICE)
    figures = gradients(parallel, batch, Workers((12,)), STEP, micro_batch, bf16, average=average)
    return figures, {name: grad.cpu() for name, grad in grads_of(task).items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [12, 5])
def test_a_step_equals_the_plain_one(case, micro_batch):
    check(*step(case=case, micro_batch=micro_batch), case, tolerance=1e-3)


@pytest.mark.parametrize("objective", list(OBJECTIVES)[1:])
def test_every_objective_equals_the_plain_step(objective):
    case = "duplicates and invalid rows"
    check(*step(objective, case, micro_batch=4), case, objective, tolerance=1e-3)


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"compile": True}], ids=str)
def test_options_of_the_workers_change_nothing(options):
    check(*step(micro_batch=5, **options), "duplicates and invalid rows", tolerance=1e-3)


def test_bf16_is_near():
    figures, grads = step(micro_batch=5, bf16=True)
    exact, exact_grads = expected("duplicates and invalid rows")
    for name in ("itc", "itc_vl", "mlm"):  # a negative may flip, so matching is not compared
        assert float(figures[name]) == pytest.approx(float(exact[name]), rel=0.03)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads.values())
    ours, wanted = (torch.cat([g[n].double().flatten() for n in sorted(exact_grads)]) for g in (grads, exact_grads))
    assert torch.nn.functional.cosine_similarity(ours, wanted, dim=0) > 0.95


def test_draws_are_those_of_numpy_to_the_bit():
    key, positions = rng.stream(1, "drop_path", 7), [0, 5, 1 << 40]
    found = rng.uniforms_torch(key, torch.tensor(positions, device=DEVICE), 50)
    assert np.array_equal(found.cpu().numpy().astype(np.float64), rng.uniforms(key, positions, 50))


def test_a_batch_arrives_as_it_was():
    batch = make_batch()
    moved = batch.to(DEVICE)
    assert all(torch.equal(moved.columns[name].cpu(), column) for name, column in batch.columns.items())
    assert moved.text_len.device.type == "cpu" and torch.equal(moved.text_len, batch.text_len)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts the memory of a GPU")
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_takes_the_memory_that_was_computed(recomputed):
    """Of base in bf16, from 8 to 24 rows: what a row takes; padded texts, since the formula counts those."""
    config = recipe("pretrain_base")
    config = dataclasses.replace(config, cluster=ClusterConfig(activation_checkpointing=recomputed))
    model = VLMo(config.model)
    init_weights(model, 0)
    task = Pretraining(model, config).to(DEVICE)
    parallel, optimizer = parallelize(task, config.cluster, 1, DEVICE), build_optimizer(task, config)
    peaks = []
    for rows in (8, 8, 24):  # the first makes the optimizer's state
        batch = full_batch(config.model, rows).to(DEVICE)
        torch.cuda.reset_peak_memory_stats()
        gradients(parallel, batch, Workers((rows,)), STEP, rows, bf16=True)
        peaks.append(torch.cuda.max_memory_allocated())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    a_row = (peaks[2] - peaks[1]) / 16
    computed = memory_of(task, dataclasses.replace(config, micro_batch=16))
    assert a_row == pytest.approx(computed.passes / computed.rows, rel=0.2)


def full_batch(config, rows: int):
    """Pairs whose texts have the full length."""
    batch = make_batch(rows=rows, invalid=(), same_image=(), same_text=())
    ids = torch.full((rows, config.max_text_len), 2000)
    labels = torch.full_like(ids, -100)
    labels[:, 3:9] = 2000
    mask, size = torch.ones_like(ids, dtype=torch.bool), config.image_size
    columns = {"text_ids": ids, "mlm_ids": ids, "mlm_labels": labels, "text_mask": mask}
    columns["image"] = torch.zeros(rows, 3, size, size, dtype=torch.uint8)
    return type(batch)({**batch.columns, **columns}, batch.valid, batch.position, batch.ids, batch.problems)
