"""How many pairs it takes until image-text matching tells mined negatives apart.

    python benchmarks/matching.py --out FILE.jsonl [--width 64] [--pairs 300000]

Pre-trains the demo's model, or a wider one, on scenes in one process with a constant rate after the warm-up, and every
`--every` pairs writes a line: the training losses since the last line and the `matching` scores on unseen scenes. It
ends when mined negatives are told apart in 70 % of balanced cases, or after `--pairs`. Called again with the same
`--out`, it goes on after the last line, from the state in `FILE.pt`. The model lies beside it, in the folder `FILE`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import tyro

from vlmo_ray.config import Phase
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader, Sources, whole_chunk
from vlmo_ray.demo.scenes.records import declared, records, retrieval_records
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.evaluations import scored
from vlmo_ray.tasks.matching import Matching
from vlmo_ray.train.build import RunSpec, begin, stream_of
from vlmo_ray.train.optim import build_optimizer, set_lr
from vlmo_ray.train.parallel import parallelize
from vlmo_ray.train.step import gradients
from vlmo_ray.weights.folder import save_model


def measure(model, data: str, kind=Matching):
    evaluation = kind(model)
    sources = Sources((load_manifest(data),))
    reader = Reader(sources.places, evaluation.encoder())

    def blocks():
        for index in range(sources.num_chunks):
            columns = reader(whole_chunk(sources, index))
            with torch.inference_mode():
                rows = evaluation.rows(Batch.from_numpy(columns))
            yield {n: t.numpy() for n, t in rows.items()} | {n: columns[n] for n in ("valid", "id", "problem")}

    return scored(evaluation, blocks(), data)


def main(
    out: Path, width: int = 64, pairs: int = 300_000, every: int = 9_600, scenes: int = 20_000, lr: float = 1e-3
) -> None:
    torch.set_num_threads(1)
    config = recipe("demo")
    model = dataclasses.replace(config.model, width=width, init_std=1 / math.sqrt(width))
    steps = -(-pairs // 96)
    config = dataclasses.replace(config, model=model, phases=(Phase(steps, 96),))
    with tempfile.TemporaryDirectory() as folder:
        train, unseen = f"{folder}/train", f"{folder}/unseen"
        write_dataset(train, declared(records(1, scenes, "train", image_size=32)))
        write_dataset(unseen, declared(retrieval_records(1, 500, image_size=32)))
        spec = RunSpec(config, train, f"{folder}/run", load_manifest(train).fingerprint, in_process_data=True)
        manifest, task = begin(spec)
        parallel = parallelize(task, config.cluster, 1, torch.device("cpu"))
        optimizer = build_optimizer(task, config)
        first, before, kept = 0, 0.0, out.with_suffix(".pt")
        if kept.exists():
            first, before, weights, moments = torch.load(kept)
            task.load_state_dict(weights)
            optimizer.load_state_dict(moments)
        sums, since, began = defaultdict(float), 0, time.monotonic() - before
        with stream_of(spec, manifest, task, first, 0, 1) as stream:
            for step, batch in enumerate(stream, first):
                figures = gradients(parallel, batch, Workers((96,)), step, 48)
                set_lr(optimizer, lr * min(1.0, (step + 1) / 30))
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                for name in ("itc", "itm", "mlm", "itm_accuracy"):
                    sums[name] += float(figures[name])
                since += 1
                if (step + 1) * 96 % every < 96:
                    result = measure(task.model, unseen)
                    line = {"pairs": (step + 1) * 96, "seconds": round(time.monotonic() - began), "width": width}
                    line |= {name: round(value / since, 4) for name, value in sums.items()}
                    line |= {name: round(score.value, 4) for name, score in result.scores.items()}
                    with out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    state = (step + 1, time.monotonic() - began, task.state_dict(), optimizer.state_dict())
                    torch.save(state, kept)
                    save_model(task.model, out.with_suffix(""))
                    sums, since = defaultdict(float), 0
                    if result["accuracy_mined"] >= 0.7:
                        return


if __name__ == "__main__":
    tyro.cli(main)
