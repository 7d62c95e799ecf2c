"""A small index of images and one of texts, made without Ray."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import small_scenes
from small_run import SMALL, job

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader
from vlmo_ray.data.store import Store
from vlmo_ray.runs.load import load
from vlmo_ray.search.embed import Embedding, _claim, _items, write_shard
from vlmo_ray.search.vectors import What, encoder_of, fingerprint
from vlmo_ray.train.loop import train


def make_place(scenes: str, folder: Path) -> dict[str, str]:
    """A run, a data set with an image that cannot be decoded, and the vectors of both columns."""
    found = {name: str(folder / name) for name in ("run", "data", "image", "text")}
    assert train(job(scenes, found["run"], SMALL)).step == 10
    rows = list(small_scenes(6, 60))
    rows[5]["image"] = b"no image"
    rows[9]["image"], rows[9]["text"] = rows[30]["image"], "<i>"
    write_dataset(found["data"], rows, rows_per_group=7, groups_per_shard=3)
    for what in ("image", "text"):
        embed_here(found["run"], found["data"], found[what], what)
    return found


def embed_here(run: str, data: str, out: str, what: What) -> None:
    """As `vlmo embed`, in this process."""
    model, manifest, store = load(run).eval(), load_manifest(data), Store(out)
    facts = (manifest.uri, manifest.fingerprint, run, fingerprint(model), model.config.width)
    _claim(store, Embedding(what, *facts, manifest.num_rows, len(manifest.shards)))
    reader = Reader(((manifest.uri, manifest.schema),), encoder_of(model, what))
    with ThreadPoolExecutor(1) as pool:
        for item in _items(manifest):
            write_shard(model, what, reader, pool, store, **item)
