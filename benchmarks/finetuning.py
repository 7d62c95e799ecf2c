"""Does pre-training on pairs help other tasks? Scenes, from one pre-trained model and from random weights.

    python benchmarks/finetuning.py --out FILE.jsonl [--tasks vqa nlvr2] [--pretrain-steps 1000] [--steps 400]
        [--seeds 1 2 3] [--train-rows N] [--peak-lr RATE] [--keep FOLDER] [--weights MODEL]

Tasks: vqa, nlvr2, segmentation, captioning, grounding, retrieval. Pre-trains the demo's model once, fine-tunes it for
each task with equal steps from there and from random weights, and writes a line for every run: what it reaches on
unseen scenes, and what chance would. One process. Of captions, `true` is the share that names a shape by colour and
kind, and a background, and says nothing untrue of shapes and background; `true_known` is that of the scenes in which
no colour is on a kind that it is never on in training (two thirds of them); `colours`, `kinds` and `backgrounds` are
the shares that name some, and none that is not there.
`--train-rows` is the number of scenes to train on, `--peak-lr` a learning rate other than the recipe's. With `--keep`,
data and pre-trained model stay for a second call. `--weights` takes a model that is there already, for example the one
that `matching.py` leaves, instead of pre-training one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from matching import measure
from scenes.questions import ANSWERS
from scenes.records import nlvr2_records, vqa_records

from vlmo_ray.config import Config, Phase
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.nlvr2 import SCHEMA as NLVR2
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes import grounding
from vlmo_ray.demo.scenes.claims import is_true
from vlmo_ray.demo.scenes.grounding import GROUNDING
from vlmo_ray.demo.scenes.reading import read
from vlmo_ray.demo.scenes.records import (
    CAPTIONED,
    SEGMENTED,
    captioned,
    declared,
    records,
    retrieval_records,
    segmented,
)
from vlmo_ray.demo.scenes.world import scene
from vlmo_ray.recipes import recipe
from vlmo_ray.recipes.retrieval import RetrievalConfig
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.load import load
from vlmo_ray.tasks.matching import Matching
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train


@dataclass(frozen=True)
class Scenes:
    """The data of a task: `rows(count, split)`, and how many of each split."""

    rows: Callable[[int, str], Iterable[dict]]
    schema: Schema
    train: int
    eval: int
    metric: str


VQA = Schema((Field("image", "image"), Field("text", "text"), Field("answers", "answers", ANSWERS)))


def vqa_rows(count: int, split: str):
    for row in vqa_records(1, count, split, image_size=32):
        yield {name: row[name] for name in ("id", "image_id", "image", "text", "forbid")} | {
            "answers": [{"answer": row["answer"], "score": 1.0}]
        }


def nlvr2_rows(count: int, split: str):
    for row in nlvr2_records(1, count, split, image_size=32):
        own = {"image_2": row["image_right"], "sentence": row["id"]}
        yield {name: row[name] for name in ("id", "image_id", "image", "text", "label", "forbid")} | own


TASKS = {
    "vqa": Scenes(vqa_rows, VQA, 6000, 500, "accuracy"),
    "nlvr2": Scenes(nlvr2_rows, NLVR2, 20_000, 2000, "accuracy"),
    "segmentation": Scenes(lambda count, split: segmented(1, count, split, 32), SEGMENTED, 6000, 500, "miou"),
    "captioning": Scenes(lambda count, split: captioned(1, count, split, 32), CAPTIONED, 6000, 500, "cider"),
    "grounding": Scenes(
        lambda count, split: grounding.records(1, count, split, 32), GROUNDING, 10_000, 1000, "pointing"
    ),
}


def true_captions(run: Store) -> dict[str, float]:
    """Shares of the captions of the run's evaluation, as the head of this file says."""
    [name] = [name for name in run.list("evaluations/") if name.endswith(".parquet")]
    said = pq.read_table(BytesIO(run.read(name))).to_pylist()
    counts: Counter[str] = Counter()
    for row in said:
        claim, shown = read(row["prediction"]), scene(1, int(row["id"].rpartition("-")[2]), "eval", 32)
        named = claim.background and any(shape.kind and shape.colour for shape in claim.shapes)
        true = bool(named) and is_true(claim, shown)
        counts["true"] += true
        counts["known"] += not shown.held_out
        counts["true_known"] += true and not shown.held_out
        counts["backgrounds"] += claim.background == shown.background.colour
        for name, attribute in (("colours", "colour"), ("kinds", "kind")):
            told = {getattr(shape, attribute) for shape in claim.shapes} - {None}
            counts[name] += bool(told) and told <= {getattr(shape, attribute) for shape in shown.shapes}
    shares = {name: counts[name] / len(said) for name in ("true", "backgrounds", "colours", "kinds")}
    return shares | {"true_known": counts["true_known"] / counts["known"]}


def write(place: str, rows, **options) -> None:
    if not Path(place).exists():
        write_dataset(place, rows, **options)


def run(config: Config, data: str, folder: str, eval_data: str = "") -> Store:
    spec = RunSpec(config, data, folder, load_manifest(data).fingerprint, eval_data, in_process_data=True)
    outcome = train(spec)
    assert not outcome.stopped, outcome
    return Store(folder)


def retrieval(out: Path, pretraining: Config, start: str, folder: str, steps: int, seeds: tuple[int, ...]) -> None:
    """Zero-shot, fine-tuned by contrast, and by contrast and matching; each also re-ranked if it can be."""
    write(f"{folder}/unseen", declared(retrieval_records(1, 500, image_size=32)))
    starts = [(0, "zero-shot", load(start))]
    for seed in seeds:
        for kind, heads in (("contrast", ("itc",)), ("contrast and matching", ("itc", "itm"))):
            model = dataclasses.replace(pretraining.model, heads=heads)
            config = dataclasses.replace(
                recipe("retrieval_tiny"),
                model=model,
                task=RetrievalConfig(itm=float("itm" in heads)),
                phases=(Phase(steps, 96),),
                seed=seed,
                init=start,
            )
            store = run(config, f"{folder}/pairs", f"{folder}/retrieval-{steps}-{seed}-{len(heads)}")
            starts.append((seed, kind, load(store.uri)))
    for seed, kind, model in starts:
        scores = measure(model, f"{folder}/unseen", Matching if model.itm is not None else Retrieval).scores
        shown = {name: score.value for name, score in scores.items() if "retrieval" in name or name == "rsum"}
        with out.open("a") as file:
            file.write(json.dumps({"task": "retrieval", "seed": seed, "kind": kind, "steps": steps} | shown) + "\n")


def main(
    out: Path,
    pretrain_steps: int = 1000,
    steps: int = 400,
    seeds: tuple[int, ...] = (1, 2, 3),
    tasks: tuple[str, ...] = ("vqa", "nlvr2"),
    keep: Path | None = None,
    weights: str = "",
    train_rows: int = 0,
    peak_lr: float = 0.0,
) -> None:
    torch.set_num_threads(1)
    pretraining = dataclasses.replace(recipe("demo"), phases=(Phase(pretrain_steps, 96),), log_every=100)
    with contextlib.ExitStack() as stack:
        folder = str(keep or stack.enter_context(tempfile.TemporaryDirectory()))
        if not weights or "retrieval" in tasks:
            write(f"{folder}/pairs", declared(records(1, 20_000, image_size=32)))
        if weights:
            pretraining = dataclasses.replace(pretraining, model=load(weights).config)
        else:
            run(pretraining, f"{folder}/pairs", f"{folder}/pretrained")
        start = weights or f"{folder}/pretrained"
        for task in tasks:
            if task == "retrieval":
                retrieval(out, pretraining, start, folder, steps, seeds)
                continue
            kind = TASKS[task]
            train_data, eval_data = f"{folder}/{task}-train{train_rows or ''}", f"{folder}/{task}-eval"
            write(train_data, kind.rows(train_rows or kind.train, "train"), schema=kind.schema)
            write(eval_data, kind.rows(kind.eval, "eval"), schema=kind.schema)
            for seed in seeds:
                for init in (start, ""):
                    config = recipe(f"{task}_tiny")
                    model = dataclasses.replace(pretraining.model, heads=config.model.heads, num_answers=len(ANSWERS))
                    [phase] = config.phases
                    phases = (Phase(steps, min(phase.global_batch, 64)),)
                    optim = dataclasses.replace(config.optim, peak_lr=peak_lr or config.optim.peak_lr)
                    config = dataclasses.replace(
                        config, model=model, phases=phases, optim=optim, micro_batch=phases[0].global_batch, seed=seed,
                        init=init, evaluate_every=steps, checkpoint_every=steps, log_every=100,
                    )  # fmt: skip
                    place = f"{train_data}-{steps}-{seed}-{bool(init)}"
                    store = run(config, train_data, place, eval_data)
                    [(_, result)] = read_evaluations(store)
                    score = result.scores[kind.metric]
                    line = {"task": task, "seed": seed, "pretrained": bool(init), "steps": steps}
                    line |= {kind.metric: score.value, "chance": score.chance}
                    if task == "captioning":
                        line |= true_captions(store)
                    with out.open("a") as file:
                        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
