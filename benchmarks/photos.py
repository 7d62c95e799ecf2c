"""Photographs: what the stages of images and of texts are worth to pairs, at equal steps of pairs (paper Table 4).

    python benchmarks/photos.py --photos train --val val --texts texts --out FILE.jsonl [--seeds 1 2] [--stages]

Pre-trains `small_photos` on pairs, from random weights or after a stage of masked images and one of masked words, and
writes the retrieval on the validation split. One process. The data come from `vlmo prepare karpathy ... --option
split=train`, the same with `split=val`, and `vlmo prepare text ... --option length=24`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import torch
import tyro
from matching import measure

from vlmo_ray.config import Config, Phase
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.recipes import recipe
from vlmo_ray.runs.load import load
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train


def _like_photos(name: str, steps: int, batch: int) -> Config:
    """A tiny stage, with the network of `small_photos`."""
    stage, photos = recipe(name), recipe("small_photos")
    return dataclasses.replace(
        stage,
        model=dataclasses.replace(photos.model, heads=stage.model.heads),
        phases=(Phase(steps, batch),),
        slice_size=32,
        micro_batch=batch,
        optim=dataclasses.replace(stage.optim, peak_lr=1e-3, warmup_steps=steps // 10),
        checkpoint_every=steps,
        log_every=50,
    )


def main(
    photos: str,
    val: str,
    texts: str,
    out: Path,
    seeds: tuple[int, ...] = (1,),
    stages: bool = False,
    steps: int = 700,
    image_steps: int = 700,
    text_steps: int = 1000,
) -> None:
    torch.set_num_threads(1)
    pairs = recipe("small_photos")
    pairs = dataclasses.replace(
        pairs,
        phases=(Phase(steps, 128),),
        checkpoint_every=steps,
        optim=dataclasses.replace(pairs.optim, warmup_steps=steps // 10),
    )
    chain = [
        (_like_photos("vision_tiny", image_steps, 128), photos),
        (_like_photos("language_tiny", text_steps, 64), texts),
    ]
    for seed in seeds:
        init, seconds = "", {}
        for config, data in [*(chain if stages else ()), (pairs, photos)]:
            run, start = f"{out.with_suffix('')}-{seed}/{config.name}", time.perf_counter()
            config = dataclasses.replace(config, init=init, seed=seed)
            outcome = train(RunSpec(config, data, run, load_manifest(data).fingerprint, in_process_data=True))
            assert not outcome.stopped, outcome
            init, seconds[config.name] = run, round(time.perf_counter() - start)
        found = measure(load(init), val, Retrieval)
        line = {"seed": seed, "stages": stages, "steps": steps, "seconds": seconds}
        line |= {name: score.value for name, score in found.scores.items() if "r@" in name or name == "rsum"}
        with out.open("a") as file:
            print(json.dumps(line), file=file)


if __name__ == "__main__":
    tyro.cli(main)
