"""What more workers cost: CPU workers on this machine at equal rows each, by term; and the plan for 8 to 512 GPUs.

    python benchmarks/scaling.py [--size tiny] [--rows 32] [--workers 1 2 4] [--repeats 5] [--out FILE.md]

The workers are gloo processes with one thread each, so beyond the number of cores they wait for one another: then the
CPU time of a step says more than its time. Steps with and without the sum of gradients take turns; the difference is
what of that sum is not hidden behind the backward. Bytes are counted in the collectives, and stand beside what
`vlmo plan` computes, which the table for GPUs rests on: computed and not measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from report import publish, table
from train_step import make_batch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from worker_processes import in_processes

from vlmo_ray.config import MODEL_SIZES, ClusterConfig, Config, Phase
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes import recipe
from vlmo_ray.recipes.pretraining import PretrainingConfig
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.plan import plan, traffic
from vlmo_ray.train.step import gradients

# the terms of `vlmo plan` that each collective carries
CARRIES = {"gather": ("features", "texts and choices"), "fetch": ("negative images",), "gradients": ("gradients",)}
GPUS, ROWS = (1, 8, 64, 128, 256, 512), 128  # rows of a GPU: 16k on 128


def config_of(size: str, rows: int, workers: int) -> Config:
    return dataclasses.replace(
        recipe("pretrain_base"),
        model=MODEL_SIZES[size],
        phases=(Phase(10_000, rows * workers),),
        slice_size=rows,
        micro_batch=rows,
        task=PretrainingConfig(),
    )


class Watched(Workers):
    """Adds up the seconds and the received bytes of its collectives."""

    seconds: dict[str, float]
    received: dict[str, float]

    def _timed(self, name: str, call, *given):
        began = time.perf_counter()
        found = call(*given)
        self.seconds[name] += time.perf_counter() - began
        return found

    def gather(self, rows):
        if rows.dtype != torch.bool:  # a gather of those calls this once more
            self.received["gather"] += (sum(self.counts) - len(rows)) * rows[:1].numel() * rows.element_size()
        return self._timed("gather", super().gather, rows)

    def sum(self, values):
        return self._timed("sum", super().sum, values)

    def fetch(self, rows, wanted):
        found = self._timed("fetch", super().fetch, rows, wanted)
        self.received["fetch"] += found[1]
        return found


def work(rank: int, world: int, size: str, rows: int, repeats: int) -> dict[str, list[float]]:
    """Of every step: seconds and CPU seconds, those of each collective, and its bytes."""
    config = config_of(size, rows, world)
    model = VLMo(config.model)
    init_weights(model, 0)
    task = Pretraining(model, config)
    parallel = parallelize(task, ClusterConfig(), world, torch.device("cpu"))
    found: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        batch = make_batch(config.model, rows, turn * world + rank)
        batch = dataclasses.replace(batch, position=batch.position + rank * rows)
        batch = batch.with_columns(image_key=batch.position, text_key=batch.position)
        for summed in (True, False):
            workers = Watched((rows,) * world, rank)
            for name in ("seconds", "received"):
                object.__setattr__(workers, name, defaultdict(float))
            alone = parallel.ddp.no_sync() if parallel.ddp and not summed else contextlib.nullcontext()
            if world > 1:
                dist.barrier()
            began, cpu = time.perf_counter(), time.process_time()
            with alone:
                gradients(parallel, batch, workers, turn, rows)
            seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
            task.zero_grad(set_to_none=True)
            if not turn:
                continue  # allocators, caches, DDP's buckets
            if not summed:
                found.setdefault("without the sum", []).append(seconds)
                continue
            figures = {"step": seconds, "cpu": cpu}
            figures |= {name: workers.seconds[name] for name in ("gather", "sum", "fetch")}
            figures |= {f"bytes of {name}": workers.received[name] for name in ("gather", "fetch")}
            for name, value in figures.items():
                found.setdefault(name, []).append(value)
    return found


def measured(size: str, rows: int, numbers: list[int], repeats: int) -> str:
    lines, compared, base = [], [], 0.0
    for number in numbers:
        ranks = in_processes(number, work, size, rows, repeats)

        def middle(name: str, ranks=ranks) -> float:
            return statistics.mean(statistics.median(rank[name]) for rank in ranks)

        step, base = middle("step"), base or middle("step")
        collectives = [middle(name) for name in ("gather", "fetch", "sum")]
        exposed = max(0.0, step - middle("without the sum")) if number > 1 else 0.0
        passes = step - sum(collectives) - exposed
        cells = [step, passes, *collectives, exposed, middle("cpu")]
        lines.append([str(number), *(f"{value:.3f}" for value in cells), f"{base / step:.2f}"])
        if number == 1:
            continue
        config = config_of(size, rows, number)
        task = Pretraining(VLMo(config.model), config)
        expected = traffic(task, config, config.phases[0], number)
        for name, terms in CARRIES.items():
            if name != "gradients":
                wanted = sum(expected[term] for term in terms)
                counted = middle(f"bytes of {name}")
                compared.append([str(number), ", ".join(terms), f"{wanted / 1e6:.3f}", f"{counted / 1e6:.3f}"])
    head = ["workers", "a step, s", "passes", "gather", "fetch", "sums", "gradients, not hidden", "CPU s", "efficiency"]
    text = f"{size}, {rows} rows a worker, {os.cpu_count()} cores, one thread a worker:\n\n{table(head, lines)}\n\n"
    text += "A worker receives in a step, in MB:\n\n"
    return text + table(["workers", "what", "computed", "counted"], compared)


def computed() -> str:
    lines = []
    for name in ("pretrain_base", "pretrain_large"):
        alone = 0.0
        for gpus in GPUS:
            config = recipe(name)
            config = dataclasses.replace(config, phases=(Phase(10_000, ROWS * gpus),))
            config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, data_cpus_per_worker=12))
            [step] = plan(config, gpus, "H100").steps
            alone = alone or step.rate
            waits = ", ".join(f"{term} {value * 1e3:.0f}" for term, value in step.exposed.items() if value >= 5e-4)
            lines.append(
                [
                    name,
                    str(gpus),
                    f"{step.seconds:.3f} s",
                    waits or "-",
                    f"{step.rate / (alone * gpus):.1%}",
                    step.binds,
                ]
            )
    head = ["recipe", "H100", "a step", "waits for, ms", "efficiency", "bound by"]
    return f"{ROWS} rows a GPU, by `vlmo plan --gpu H100`:\n\n{table(head, lines)}"


def main(
    size: Literal["tiny", "base"] = "tiny",
    rows: int = 32,
    workers: tuple[int, ...] = (1, 2, 4),
    repeats: int = 5,
    out: str = "",
) -> None:
    publish("More workers", f"{measured(size, rows, list(workers), repeats)}\n\n{computed()}", out)


if __name__ == "__main__":
    tyro.cli(main)
