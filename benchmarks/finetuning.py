"""Does pre-training on pairs help VQA, NLVR2 and retrieval? Scenes, from one pre-trained model and from random weights.

    python benchmarks/finetuning.py --out FILE.jsonl [--pretrain-steps 1000] [--steps 400] [--seeds 1 2 3]
        [--keep FOLDER] [--weights MODEL]

Pre-trains the demo's model once, fine-tunes it for each task with equal steps from there and from random weights, and
writes a line for every run: the accuracy on unseen scenes and what the most frequent answer would reach. One process.
With `--keep`, data and pre-trained model stay for a second call. `--weights` takes a model that is there already, for
example the one that `matching.py` leaves, instead of pre-training one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

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
from vlmo_ray.demo.scenes.records import declared, records, retrieval_records
from vlmo_ray.recipes import recipe
from vlmo_ray.recipes.retrieval import RetrievalConfig
from vlmo_ray.runs.evaluations import read_evaluations
from vlmo_ray.runs.load import load
from vlmo_ray.tasks.matching import Matching
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train

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
            rows, schema = {"vqa": (vqa_rows, VQA), "nlvr2": (nlvr2_rows, NLVR2)}[task]
            for split, count in (
                ("train", 6000 if task == "vqa" else 20_000),
                ("eval", 500 if task == "vqa" else 2000),
            ):
                write(f"{folder}/{task}-{split}", rows(count, split), schema=schema)
            for seed in seeds:
                for init in (start, ""):
                    config = recipe(f"{task}_tiny")
                    model = dataclasses.replace(pretraining.model, heads=config.model.heads, num_answers=len(ANSWERS))
                    config = dataclasses.replace(
                        config, model=model, phases=(Phase(steps, 64),), seed=seed, init=init, evaluate_every=steps
                    )
                    place = f"{folder}/{task}-{steps}-{seed}-{bool(init)}"
                    store = run(config, f"{folder}/{task}-train", place, f"{folder}/{task}-eval")
                    [(_, result)] = read_evaluations(store)
                    score = result.scores["accuracy"]
                    line = {"task": task, "seed": seed, "pretrained": bool(init), "steps": steps}
                    with out.open("a") as file:
                        file.write(json.dumps(line | {"accuracy": score.value, "majority": score.chance}) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
