"""Images/s of `vlmo embed` beside a bare loop with the same model, in one process without Ray.

    python benchmarks/embed.py [--size base] [--rows 512] [--repeats 3] [--out FILE.md]

The loop reads a chunk, decodes it, and encodes it, one after the other, with all cores; `vlmo embed` has one actor.
Its rate is taken between the first shard that is there and the last, without the start of Ray. Both take turns.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from report import publish, table

from vlmo_ray.config import MODEL_SIZES
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader, Sources, whole_chunk
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.search.embed import embed
from vlmo_ray.search.vectors import encode, encoder_of
from vlmo_ray.weights.folder import load_model, save_model

_BATCH = 64


def bare(weights: str, data: str) -> float:
    """Images/s."""
    torch.set_num_threads(os.cpu_count() or 1)
    model, sources = load_model(weights).eval(), Sources((load_manifest(data),))
    reader = Reader(sources.places, encoder_of(model, "image"))
    began = None
    done = 0
    for chunk in range(sources.num_chunks):
        batch = Batch.from_numpy(reader(whole_chunk(sources, chunk)))
        for first in range(0, len(batch), _BATCH):
            encode(model, "image", batch.rows(slice(first, first + _BATCH)))
        if began is None:
            began = time.perf_counter()  # the first chunk is for caches
        else:
            done += len(batch)
    return done / (time.perf_counter() - (began or 0))


def ours(weights: str, data: str, out: str, rows_per_shard: int) -> float:
    """Images/s."""
    embed(weights, data, out, num_workers=1, device="cpu")
    times = sorted(path.stat().st_mtime for path in Path(out, "vectors").iterdir())
    return (len(times) - 1) * rows_per_shard / (times[-1] - times[0])


def main(size: Literal["tiny", "base"] = "base", rows: int = 512, repeats: int = 3, out: str = "") -> None:
    each = 64
    with tempfile.TemporaryDirectory() as folder:
        model = VLMo(MODEL_SIZES[size])
        init_weights(model, 0)
        save_model(model, f"{folder}/model")
        drawn = records(1, rows, image_size=max(64, model.config.image_size))
        write_dataset(f"{folder}/data", drawn, rows_per_group=each, groups_per_shard=1)
        found: dict[str, list[float]] = {"a bare loop": [], "vlmo embed": []}
        for turn in range(repeats):
            found["a bare loop"].append(bare(f"{folder}/model", f"{folder}/data"))
            found["vlmo embed"].append(ours(f"{folder}/model", f"{folder}/data", f"{folder}/out-{turn}", each))
    ratios = [b / a for a, b in zip(*found.values(), strict=True)]
    lines = [[name, f"{statistics.median(rates):.1f}"] for name, rates in found.items()]
    text = table([f"{size}, {rows} images", "images/s"], lines)
    text += f"\n\n`vlmo embed` has {statistics.median(ratios):.2f} of the rate of the loop ({min(ratios):.2f} to "
    publish("Vectors of images", f"{text}{max(ratios):.2f}).", out)


if __name__ == "__main__":
    tyro.cli(main)
