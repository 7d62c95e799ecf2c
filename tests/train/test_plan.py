"""What a run would take: against the paper's runs, memory as it is counted, and bytes as the loopback counts them."""

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_run import SMALL
from worker_processes import in_processes

from vlmo_ray.config import ClusterConfig, Config, Phase, check
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.schema import PAIRS
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes import RECIPES, recipe
from vlmo_ray.tasks import build_task
from vlmo_ray.train.memory import ROOM, memory_of, on_meta
from vlmo_ray.train.optim import WeightAverage
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.plan import GPUS, plan, traffic
from vlmo_ray.train.step import gradients


def test_the_papers_runs_take_the_days_that_they_took():
    base = plan(recipe("pretrain_base"), 64, "V100")
    assert 2 / 1.5 < base.days < 2 * 1.5 and base.fits
    large = dataclasses.replace(recipe("pretrain_large"), slice_size=8, micro_batch=8)
    found = plan(large, 128, "V100")
    assert 3 / 1.5 < found.days < 3 * 1.5 and found.fits


@pytest.mark.parametrize("name", ["pretrain_base", "pretrain_1b", "vqa_large"])
def test_memory_is_that_of_the_model_and_the_largest_micro_batch_is_the_largest(name):
    config = recipe(name)
    found = plan(config, 8, "A100")
    assert found.memory == memory_of(on_meta(config), config, 8)
    fitting = []
    for rows in range(1, 257):
        other = dataclasses.replace(config, micro_batch=rows)
        with contextlib.suppress(UserError):  # a size that a run would refuse
            check(other)
            if memory_of(on_meta(other), other, 8).total <= ROOM * GPUS["A100"].memory:
                fitting.append(rows)
    assert found.largest_micro_batch == max(fitting)


def test_losses_of_nodes_by_hand():
    config = recipe("pretrain_base")
    calm, rough = plan(config, 16, "H100"), plan(config, 16, "H100", spot=2.0, price=3.0)
    assert calm.days == calm.undisturbed_days == rough.undisturbed_days and rough.nodes == 2
    second = calm.steps[0].seconds
    lost = 4 * (config.checkpoint_every / 2 * second + 60 + 600 / 2)  # seconds of a day: two nodes, two losses each
    assert rough.days == pytest.approx(calm.days * 86_400 / (86_400 - lost))
    assert rough.cost == pytest.approx(rough.days * 24 * 16 * 3.0)
    assert plan(config, 16, "H100", spot=1e6).days == float("inf")


def test_what_binds():
    config = recipe("pretrain_base")
    assert plan(config, 8, "H100").steps[0].binds == "matrix products"
    few = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, data_cpus_per_worker=1))
    assert plan(few, 8, "H100").steps[0].binds == "decoding"
    assert plan(config, 64, "V100", nodes=64, utilisation=0.9).steps[0].binds == "gradients"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_can_be_planned(name):
    assert plan(recipe(name), 1, "H200").steps[0].seconds > 0


def test_mistakes_are_sentences():
    config = recipe("pretrain_base")
    for arguments, words in (
        ((8, "B200"), "known: H100"),
        ((65, "H100"), "64 slices of 16 rows"),
        ((4, "H100", 8), "at least one GPU"),
        ((0, "H100"), "at least one GPU"),
    ):
        with pytest.raises(UserError, match=words):
            plan(config, *arguments)
    with pytest.raises(UserError, match="--spot"):
        plan(config, 8, "H100", spot=-1)


def test_the_command(vlmo):
    done = vlmo("plan", "pretrain_1b", "--gpus", "64", "--spot", "1", "--price", "2", "--explain")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 and "torchtitan" in done.stdout
    done = vlmo("plan", "pretrain_1b", "--gpus", "64", "--json-output")
    found = json.loads(done.stdout)
    assert found["fits"] and found["nodes"] == 8 and len(found["phases"]) == 2
    assert vlmo("plan", "pretrain_1b", "--gpus", "4096").returncode == 2


WORLD, ROWS = 4, 8


def wide(strategy: str, distill: float) -> Config:
    """Large enough for its bytes to outweigh what gloo adds to each message."""
    task = dataclasses.replace(SMALL.task, distill=distill)
    model = dataclasses.replace(SMALL.model, width=128, num_heads=4, image_size=64, drop_path=0.0, init_std=0.05)
    cluster = ClusterConfig(max_workers=WORLD, gpus_per_worker=0, strategy=strategy)
    return dataclasses.replace(
        SMALL,
        model=model,
        phases=(Phase(9, WORLD * ROWS),),
        micro_batch=4,
        cluster=cluster,
        precision="float32",
        task=task,
        optim=dataclasses.replace(SMALL.optim, average_decay=0.9 if distill else 0.0),
    )


def received() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


class Gathers:
    """Counts what this worker receives by all-gathers, FSDP's too, whose name in torch has changed."""

    def __init__(self):
        self.received = 0.0
        for name in ("all_gather_into_tensor", "all_gather_single"):
            if hasattr(dist, name):
                setattr(dist, name, functools.partial(self._count, getattr(dist, name)))

    def _count(self, function, *arguments, **options):
        output, input = [*arguments, *options.values()][:2]
        self.received += (output.numel() - input.numel()) * output.element_size()
        return function(*arguments, **options)


def count_bytes(rank: int, world: int, strategy: str, distill: float) -> tuple[float, float]:
    """Of a step and by worker: what the loopback carried, and what came by all-gathers."""
    gathers = Gathers()
    config = wide(strategy, distill)
    model = VLMo(config.model)
    init_weights(model, 1)
    task = build_task(model, config, PAIRS)
    parallel = parallelize(task, config.cluster, world, torch.device("cpu"))
    average = WeightAverage(task, 0.9) if distill else None
    draw = torch.Generator().manual_seed(rank)
    text_len = config.model.max_text_len
    ids = torch.randint(1000, 1100, (ROWS, text_len), generator=draw)
    keys = rank * ROWS + torch.arange(ROWS)
    columns = {
        "image": torch.randint(0, 256, (ROWS, 3, 64, 64), generator=draw, dtype=torch.uint8),
        "text_ids": ids, "text_mask": torch.ones(ROWS, text_len, dtype=torch.bool),
        "mlm_ids": ids, "mlm_labels": ids.where(torch.arange(text_len) % 3 == 1, -100),
        "image_key": keys, "text_key": keys,
    }  # fmt: skip
    batch = Batch(columns, torch.ones(ROWS, dtype=torch.bool), keys, [str(k) for k in keys.tolist()], [""] * ROWS)
    wire, gathered = [], []
    for step in range(7):
        dist.barrier()
        before, gathered_before = received(), gathers.received
        gradients(parallel, batch, Workers((ROWS,) * world, rank), step, config.micro_batch, average=average)
        dist.barrier()
        wire.append(received() - before)
        gathered.append(gathers.received - gathered_before)
    return sum(wire[3:]) / 4 / world, gathered[-1]  # the first steps also agree on buckets


@pytest.mark.full
@pytest.mark.parametrize("distill", [0.0, 0.4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_traffic_is_what_workers_receive(strategy, distill):
    """Sharded, the loopback says nothing of the gradients: gloo sums them whole on every worker."""
    config = wide(strategy, distill)
    computed = traffic(on_meta(config), config, config.phases[0], WORLD)
    wire, gathered = in_processes(WORLD, count_bytes, strategy, distill)[0]
    if strategy == "ddp":
        assert wire == pytest.approx(sum(computed.values()), rel=0.05)
    names = {"sharded weights", "features", "texts and choices"} & computed.keys()
    assert gathered == pytest.approx(sum(computed[name] for name in names), rel=0.05)
