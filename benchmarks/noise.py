"""Against noise: what momentum distillation gains on shuffled captions, and how well cosines find them.

    python benchmarks/noise.py --out FILE.jsonl [--steps 400] [--shuffled 0.3] [--seeds 1 2 3]

Pre-trains the demo's model on scenes of which a share has the caption of another one, with and without distillation, at
equal steps; both give the average of their weights. Writes for every run the retrieval on unseen scenes with their own
captions. Then of each run: pairs by its cosines, those with the lowest ones left out, as many as were shuffled; what
share of these was shuffled (precision, and recall as well, since they are as many), and the AUC.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import tyro
from matching import measure

from vlmo_ray.config import Phase
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.demo.scenes.records import declared, records, retrieval_records
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.load import load
from vlmo_ray.tasks.metrics import auc
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.tasks.similarity import Similarity
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train


def noisy(count: int, share: float) -> tuple[list[dict], set[str]]:
    """Scenes, of which a share has the captions of others; and the ids of those."""
    rows = list(declared(records(1, count, image_size=32)))
    chosen = np.random.default_rng(0).permutation(count)[: round(share * count)]
    moved = {int(a): rows[b]["text"] for a, b in zip(chosen, np.roll(chosen, 1), strict=True)}
    wrong = {rows[i]["id"] for i, text in moved.items() if text != rows[i]["text"]}
    return [row | {"text": moved.get(i, row["text"])} for i, row in enumerate(rows)], wrong


def main(
    out: Path,
    steps: int = 400,
    shuffled: float = 0.3,
    seeds: tuple[int, ...] = (1, 2, 3),
    share: float = 0.4,
    decay: float = 0.98,
    scenes: int = 20_000,
) -> None:
    torch.set_num_threads(1)
    rows, wrong = noisy(scenes, shuffled)
    demo = recipe("demo")
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(f"{folder}/noisy", rows)
        write_dataset(f"{folder}/unseen", declared(retrieval_records(1, 500, image_size=32)))
        for seed in seeds:
            for distill in (0.0, share):
                config = dataclasses.replace(
                    demo,
                    phases=(Phase(steps, 96),),
                    task=dataclasses.replace(demo.task, distill=distill, distill_ramp=scenes // 96 if distill else 0),
                    optim=dataclasses.replace(demo.optim, average_decay=decay),
                    seed=seed,
                    log_every=50,
                    checkpoint_every=steps,
                )
                run = f"{folder}/{seed}-{distill}"
                fingerprint = load_manifest(f"{folder}/noisy").fingerprint
                outcome = train(RunSpec(config, f"{folder}/noisy", run, fingerprint, in_process_data=True))
                assert not outcome.stopped, outcome
                model = load(run)
                found = measure(model, f"{folder}/unseen", Retrieval)
                line = {"seed": seed, "distill": distill, "steps": steps, "shuffled": shuffled}
                line |= {name: score.value for name, score in found.scores.items() if "r@" in name or name == "rsum"}
                table = measure(model, f"{folder}/noisy", Similarity).predictions
                assert table is not None
                ids, cosine = table["id"].to_pylist(), table["score"].to_numpy()
                is_wrong = np.array([name in wrong for name in ids])
                dropped = np.argsort(cosine, kind="stable")[: len(wrong)]
                line |= {"found": float(is_wrong[dropped].mean()), "auc": auc(cosine[~is_wrong], cosine[is_wrong])}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
