"""Everything that needs a GPU, in under ten minutes, with one table of verdicts: `make gpu`.

    python benchmarks/gpu.py [--data URI] [--seconds 120]

Runs the tests marked `gpu` (the step against a plain one, bf16, compiled layers, memory), a step of base and of large
beside a plain one, and `medium_photos` for two minutes: on the data set `--data`, or on scenes that are drawn first.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from report import machine, table

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import declared, records
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Step:
    """A case of `train_step.py`, and the least share of the ceiling that is wanted."""

    size: str
    batch: int
    share: float


STEPS = (Step("base", 64, 0.5), Step("large", 32, 0.55))
TIMES_PLAIN = 4.0
Line = tuple[str, str, str, bool]  # what, found, wanted, met


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True)


def tests() -> Line:
    done = run("-m", "pytest", "-m", "gpu", str(HERE.parent / "tests"))
    if done.returncode:
        print(done.stdout[-6000:])
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1]
    passed = done.returncode == 0 and "passed" in last
    return "tests marked gpu", re.sub(r" in .*", "", last), "all pass", passed


def steps(step: Step, device: str) -> list[Line]:
    done = run("train_step.py", "--size", step.size, "--batch", str(step.batch), "--device", device, "--repeats", "5")
    if done.returncode:
        return [(f"a step of {step.size}", done.stderr.strip().splitlines()[-1][:60], "runs", False)]
    print(done.stdout)
    ours = re.search(r"\| ours \| ([\d.]+) s \| ([\d.]+) \| ([\d.]+)% \| ([\d.]+) GB", done.stdout)
    times = re.search(r"plain step takes ([\d.]+) times", done.stdout)
    assert ours and times, done.stdout
    share, ratio = float(ours[3]) / 100, float(times[1])
    return [
        (f"{step.size}: of the ceiling", f"{share:.1%}, {ours[2]} pairs/s", f"{step.share:.0%}", share >= step.share),
        (f"{step.size}: times the plain step", f"{ratio:.2f}", f"{TIMES_PLAIN:.0f}", ratio >= TIMES_PLAIN),
    ]


def learning(data: str, seconds: float) -> Line:
    """`medium_photos` for some seconds; whether the loss falls."""
    with tempfile.TemporaryDirectory() as folder:
        if not data:
            data = f"{folder}/scenes"
            write_dataset(data, declared(records(1, 6000, image_size=128)))
        cluster = dataclasses.replace(recipe("medium_photos").cluster, notice_every=1)
        config = dataclasses.replace(recipe("medium_photos"), cluster=cluster, log_every=5, checkpoint_every=10**6)
        until = time.monotonic() + seconds

        def notice() -> Notice:
            return Notice.STOP if time.monotonic() > until else Notice.NONE

        spec = RunSpec(config, data, f"{folder}/run", load_manifest(data).fingerprint, in_process_data=True)
        train(spec, notice=notice)
        rows, _ = read_metrics(Store(f"{folder}/run"))
    first, last = rows[0]["loss"], rows[-1]["loss"]
    found = f"loss {first:.2f} to {last:.2f} in {len(rows)} steps"
    return f"medium_photos, {seconds:.0f} s", found, "falls", last < first


def main(data: str = "", seconds: float = 120.0, device: str = "cuda") -> int:
    lines = [tests()]
    for step in STEPS:
        lines += steps(step, device)
    lines.append(learning(data, seconds))
    rows = [[what, found, wanted, "met" if met else "NOT met"] for what, found, wanted, met in lines]
    print(f"{machine()}\n\n{table(['what', 'found', 'wanted', ''], rows)}")
    return 0 if all(met for *_, met in lines) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
