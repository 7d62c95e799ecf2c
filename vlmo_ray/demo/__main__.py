"""`make demo`: the main job at small scale, end to end.

A SeaweedFS server on this machine holds the bucket. The demo writes scenes of coloured shapes into it as shards,
pre-trains a small VLMo with all three objectives by `vlmo train` on two elastic CPU workers, kills one of them on the
way, and measures zero-shot retrieval and matching on unseen scenes. `demo-out/` keeps the scores as JSON, a page about
the run, the log and the bucket.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.demo.local_s3 import local_s3
from vlmo_ray.demo.scenes.records import declared, records, retrieval_records
from vlmo_ray.errors import UserError
from vlmo_ray.evaluate import evaluate
from vlmo_ray.recipes import recipe
from vlmo_ray.report.page import report
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.evaluations import table
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.session import ray_session

OUT = Path("demo-out")
TRAIN, EVAL, RUNS = "s3://demo/scenes-train", "s3://demo/scenes-eval", "s3://demo/runs"
PAIRS = "s3://demo/scenes-pairs"  # more unseen ones, so that matching has a small standard error
NUM_SCENES, NUM_UNSEEN, NUM_PAIRS = 20_000, 200, 500
LEAST_R1 = 0.05  # ten times chance
LEAST_AUC = 0.85  # of matching against random negatives
SEED = 1

_WORKER = re.compile(r"worker (\d+) of (\d+): process (\d+)")


@dataclass
class Story:
    """What happened to the run, as its output tells."""

    killed_pid: int = 0
    killed_at: float = 0.0  # seconds after the start
    workers: dict[int, int] = field(default_factory=dict)  # rank -> process id of the current workers
    resumed_step: int = -1


def main() -> int:
    """Runs the demo. Returns 0 if everything it promises came true, else 1 after printing the reason."""
    console = Console()
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # child processes end too
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    try:
        with local_s3(OUT / "bucket", buckets=("demo",)) as environment:
            os.environ.update(environment)
            _write_data(console)
            story = _pretrain(console)
            return _report(console, story, began)
    except (UserError, RuntimeError) as error:
        console.print(f"[bold red]The demo failed:[/] {error}")
        return 1


def _write_data(console: Console) -> None:
    size = recipe("demo").model.image_size
    console.rule(f"{NUM_SCENES:,} scenes for training, {NUM_UNSEEN} unseen ones for evaluation")
    scenes = records(SEED, NUM_SCENES, "train", image_size=size)
    write_dataset(TRAIN, track(scenes, "drawing and uploading", NUM_SCENES, console=console), source="scenes")
    for uri, count in ((EVAL, NUM_UNSEEN), (PAIRS, NUM_PAIRS)):
        unseen = declared(retrieval_records(SEED, count, image_size=size))
        write_dataset(uri, unseen, source="scenes")


def _pretrain(console: Console) -> Story:
    """Runs `vlmo train demo` and kills one of its workers after the first checkpoint."""
    command = [sys.executable, "-m", "vlmo_ray", "train", "demo", "--data", TRAIN, "--storage", RUNS]
    console.rule("vlmo " + " ".join(command[3:]))
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0"}
    story, began = Story(), time.monotonic()
    checkpoints = Checkpoints(Store(f"{RUNS}/demo"))
    with (
        (OUT / "pretrain.log").open("w", buffering=1) as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None  # it is a pipe
            for line in process.stdout:
                log.write(line)
                message = re.sub(r"\x1b\[\d+m|\(\w+ pid=[^)]*\) ?", "", line).strip()  # Ray's colours and prefixes
                if found := _WORKER.search(line):
                    rank, world, pid = map(int, found.groups())
                    story.workers = {r: p for r, p in story.workers.items() if r < world} | {rank: pid}
                elif found := re.search(r"resumed at step (\d+)", line):
                    story.resumed_step = int(found[1])
                elif not re.match(r"step \d+/|.* steps, .* samples|done:|masked|vlmo:", message):
                    continue
                console.print(message, highlight=False, markup=False)
                if not story.killed_pid and message.startswith("step ") and checkpoints.newest():
                    story.killed_pid = story.workers[max(story.workers)]
                    story.killed_at = time.monotonic() - began
                    os.kill(story.killed_pid, signal.SIGKILL)
                    console.print(f"[bold yellow]killed the worker with process id {story.killed_pid}[/]")
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise RuntimeError(f"pre-training ended with exit code {process.returncode}; see {OUT / 'pretrain.log'}")
    if not story.killed_pid:
        raise RuntimeError("no worker was killed: the run had no checkpoint before its end")
    return story


def _report(console: Console, story: Story, began: float) -> int:
    console.rule("evaluation")
    unseen = list(retrieval_records(SEED, NUM_UNSEEN, image_size=recipe("demo").model.image_size))
    held_out = [record["image_id"] for record in unseen if record["held_out"]]
    with ray_session():
        result = evaluate(f"{RUNS}/demo", EVAL, "retrieval", subset=held_out)
        matching = evaluate(f"{RUNS}/demo", PAIRS, "matching")
    metrics, repeated = read_metrics(open_store(f"{RUNS}/demo"))
    last, planned = int(metrics[-1]["step"]), recipe("demo").total_steps
    page = report([f"{RUNS}/demo"], str(OUT / "report.html"), PAIRS)

    console.print(table(result, "retrieval among unseen scenes"))
    console.print(table(matching, "matching on unseen scenes"))
    run = Table("the run", "")
    run.add_row("killed worker, process id", str(story.killed_pid))
    run.add_row("resumed at step", str(story.resumed_step))
    run.add_row("steps repeated", f"{len(repeated)} ({repeated[0]} to {repeated[-1]})" if repeated else "0")
    run.add_row("last step, reached of planned", f"{last} of {planned}")
    run.add_row("loss, first and last 20 steps", f"{_mean(metrics[:20]):.2f}, {_mean(metrics[-20:]):.2f}")
    run.add_row("held-out scenes among the unseen", str(len(held_out)))
    run.add_row("time", f"{time.monotonic() - began:.0f} s")
    run.add_row("to look at, in a browser", page)
    console.print(run)
    summary = {
        "scores": {name: dataclasses.asdict(score) for name, score in result.scores.items()},
        "matching": {name: dataclasses.asdict(score) for name, score in matching.scores.items()},
        "killed_pid": story.killed_pid,
        "repeated_steps": repeated,
        "last_step": last,
        "planned_steps": planned,
        "seconds": time.monotonic() - began,
    }
    (OUT / "result.json").write_text(json.dumps(summary, indent=1) + "\n")

    failures = []
    if last != planned or [int(m["step"]) for m in metrics] != list(range(1, planned + 1)):
        failures.append(f"the run reached step {last} of {planned}, or a step is missing from its log")
    if story.resumed_step < 1:
        failures.append("the run did not resume from a checkpoint after the kill")
    if (num_images := result.scores["text_retrieval_r@1"].count) != NUM_UNSEEN:
        failures.append(f"{num_images} images were compared instead of {NUM_UNSEEN}")
    failures += [
        f"{name} is {result[name]:.1%}, below {LEAST_R1:.0%}"
        for name in ("text_retrieval_r@1", "image_retrieval_r@1")
        if result[name] < LEAST_R1
    ]
    if matching["auc_random"] < LEAST_AUC:
        failures.append(f"matching has an AUC of {matching['auc_random']:.2f} on random negatives, not {LEAST_AUC}")
    if (mined := matching["auc_mined"]) <= 0.5 + 2 * matching["auc_mined_standard_error"]:
        failures.append(f"matching has an AUC of {mined:.2f} on mined negatives, which may be chance")
    for failure in failures:
        console.print(f"[bold red]The demo failed:[/] {failure}")
    return 1 if failures else 0


def _mean(metrics: list[dict[str, float]]) -> float:
    return sum(m["loss"] for m in metrics) / len(metrics)


if __name__ == "__main__":
    sys.exit(main())
