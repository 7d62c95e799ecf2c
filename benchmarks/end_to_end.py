"""What a run adds to its steps: the time to the first one, and pairs/s beside the same steps alone.

    python benchmarks/end_to_end.py [--recipe tiny] [--set A.B=C ...] [--rounds 3] [--out FILE.md]

Each round runs `vlmo train` on drawn scenes, on this machine's CPUs with one worker, and then, in a process without
Ray, the same steps on the very same batches, read beforehand. The start is cut at the lines that the command prints;
what the first step waited for its rows, and how long it took, is from the run's metrics. The rate is of all steps but
the first.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro
from report import publish, table
from tyro.conf import UseAppendAction, arg

from vlmo_ray.config import Config
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.order import deal, schedule_of
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.overrides import override
from vlmo_ray.recipes import recipe as named
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.build import RunSpec, begin, precision_of, stream_of
from vlmo_ray.train.optim import build_optimizer, lr_at, set_lr
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients

ON_CPU = ("cluster.gpus_per_worker=0", "cluster.max_workers=1", "cluster.min_workers=1", "log_every=1")
# what ends each part of the start: a pattern of the line that the command prints then
PARTS = {
    "imports, checks, Ray": r"\w+: [\d,]+ steps, ",
    "resources": "starting 1 workers",
    "Ray Train, the worker's process": "worker 0 of 1",
}


def through_ray(recipe: str, settings: list[str], data: str, storage: str) -> tuple[dict[str, float], float]:
    """(seconds of each part of the start, seconds of all steps but the first) of a run."""
    changes = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-u", "-m", "vlmo_ray", "train", recipe, "--data", data, "--storage", storage, *changes]
    began = time.monotonic()
    found, at, patterns = {}, began, dict(PARTS)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        first = last = 0.0
        lines = []
        for line in running.stdout:
            now = time.monotonic()
            lines.append(line)
            for name, pattern in list(patterns.items()):
                if re.search(pattern, line):
                    found[name], at = now - at, now
                    del patterns[name]
            if re.search(r"\bstep +\d+/", line):
                first, last = first or now, now
    assert running.returncode == 0 and not patterns, "".join(lines)
    [run] = Path(storage).iterdir()
    row = read_metrics(Store(str(run)))[0][0]
    waited = row["data_wait"] * row["step_s"]
    found["model, optimizer"] = first - at - row["step_s"]
    found["first rows"] = waited
    found["first step"] = row["step_s"] - waited
    return found, last - first


def alone(config: Config, data: str) -> float:
    """Seconds of all steps but the first, in this process and with the rows at hand."""
    torch.set_num_threads(os.cpu_count() or 1)
    spec = RunSpec(config, data, "", load_manifest(data).fingerprint, in_process_data=True)
    sets, task = begin(spec)
    with stream_of(spec, sets, task, 0, 0, 1) as stream:
        batches = list(stream)
    device = torch.device("cpu")
    dtype, bf16 = precision_of(config, device)
    task = task.to(device, dtype)
    parallel, schedule = parallelize(task, config.cluster, 1, device, bf16), schedule_of(config)
    optimizer = build_optimizer(task, config)
    began = 0.0
    for step, batch in enumerate(batches):
        first, last = deal(schedule.num_slices(step), 1, 0)
        workers = Workers(((last - first) * schedule.slice_size,))
        figures = gradients(parallel, batch, workers, step, config.micro_batch, bf16)
        set_lr(optimizer, lr_at(step, config))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(figures["loss"])
        began = began or time.perf_counter()
    return time.perf_counter() - began


def main(
    recipe: str = "tiny",
    settings: UseAppendAction[Annotated[tuple[str, ...], arg(name="set", metavar="A.B=C")]] = (),
    rounds: int = 3,
    out: str = "",
) -> None:
    """
    Args:
        recipe: of pairs, by the name that `vlmo recipes` lists.
        settings: change a field, for example `--set phases=[[20,32]]`; may be repeated.
        rounds: how many.
        out: a file for the report.
    """
    asked = [*ON_CPU, *settings]
    config = override(named(recipe), asked)
    rows = max(phase.global_batch for phase in config.phases)
    starts: list[dict[str, float]] = []
    times: dict[str, list[float]] = {"a run": [], "the steps alone": []}
    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data"
        write_dataset(data, records(1, 20 * rows, image_size=config.model.image_size))
        for turn in range(rounds):
            parts, seconds = through_ray(recipe, asked, data, f"{folder}/runs-{turn}")
            starts.append(parts)
            times["a run"].append(seconds)
            code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import end_to_end as e; "
            code += f"print(e.alone(e.override(e.named({recipe!r}), {asked!r}), {data!r}))"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            times["the steps alone"].append(float(done.stdout.split()[-1]))
    pairs = sum(phase.steps * phase.global_batch for phase in config.phases) - config.phases[0].global_batch
    middles = {name: statistics.median(found) for name, found in times.items()}
    lines = [[name, f"{middle:.1f} s", f"{pairs / middle:.2f}"] for name, middle in middles.items()]
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    text = table([f"{config.total_steps - 1} steps", "time", "pairs/s"], lines)
    text += f"\n\nA run has {statistics.median(ratios):.3f} of the rate of its steps alone ({min(ratios):.3f} to "
    text += f"{max(ratios):.3f}). From the command to the end of the first step:\n\n"
    shown = [[name, f"{statistics.median(start[name] for start in starts):.1f} s"] for name in starts[0]]
    totals = [sum(start.values()) for start in starts]
    shown.append(["all", f"{statistics.median(totals):.1f} s ({min(totals):.1f} to {max(totals):.1f})"])
    publish(f"A run of {recipe} end to end", text + table(["part of the start", "time"], shown), out)


if __name__ == "__main__":
    tyro.cli(main)
