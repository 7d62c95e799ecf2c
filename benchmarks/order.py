"""A billion pairs: the time to load the manifest and to jump to any step, and the memory for both.

    python benchmarks/order.py [--out FILE] [--shards 100000] [--chunks 40] [--rows 256]

The data set is synthetic: names, offsets and checksums of chunks without images. Loading and jumping are measured in a
fresh process. Its memory is the peak of the whole process, Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
from report import peak_memory, publish, table

from vlmo_ray.data.manifest import load_manifest, write_manifest
from vlmo_ray.data.order import Order, Schedule
from vlmo_ray.demo.local_s3 import local_s3

SLICE, BATCH, SHUFFLE_STEPS = 64, 16384, 8


def make(uri: str, shards: int, chunks: int, rows: int) -> None:
    """A manifest of `shards` shards with `chunks` chunks of `rows` rows each."""
    count = shards * chunks
    generator = np.random.default_rng(0)
    size = generator.integers(5 << 20, 15 << 20, (shards, chunks))
    names = pa.array([f"part-{i:06d}.parquet" for i in range(shards)])
    shard = pa.DictionaryArray.from_arrays(np.repeat(np.arange(shards, dtype=np.int32), chunks), names)
    columns = {
        "index": np.tile(np.arange(chunks, dtype=np.int32), shards),
        "offset": (np.cumsum(size, axis=1) - size).reshape(count),
        "bytes": size.reshape(count),
        "rows": np.full(count, rows, dtype=np.int32),
        "crc": generator.integers(0, 1 << 32, count, dtype=np.uint32),
    }
    write_manifest(uri, "parquet", pa.table({"shard": shard} | columns))


def measure(uri: str) -> dict:
    began = time.perf_counter()
    manifest = load_manifest(uri)
    loaded = time.perf_counter() - began
    epochs = 3
    steps = epochs * manifest.num_rows // BATCH
    order = Order(manifest.chunk_rows, 7, Schedule(((steps, BATCH),), SLICE), SHUFFLE_STEPS)
    chance, first, again = random.Random(1), [], []
    for epoch in reversed(range(epochs)):
        for i in range(4):
            step = min(steps - 1, (epoch * manifest.num_rows) // BATCH + 1 + chance.randrange(steps // epochs - 2))
            began = time.perf_counter()
            rows = order.slice_rows(order.span(step), 0, 8)  # as for the parts that data tasks read
            (again if i else first).append(time.perf_counter() - began)
            assert len(rows) == 8 * SLICE * len(order.span(step))
    return {
        "pairs": manifest.num_rows,
        "shards": len(manifest.shards),
        "chunks": manifest.num_chunks,
        "load": loaded,
        "first": max(first),
        "again": max(again),
        "memory": peak_memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--chunks", type=int, default=40, help="of a shard")
    parser.add_argument("--rows", type=int, default=256, help="of a chunk")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    with tempfile.TemporaryDirectory() as folder, local_s3(folder, ("bench",)) as env:
        os.environ.update(env)
        command = [sys.executable, __file__, "--measure", "s3://bench/data"]
        make("s3://bench/data", given.shards, given.chunks, given.rows)
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout) for _ in range(3)
        ]
    worst = {name: max(run[name] for run in runs) for name in runs[0]}
    rows = [
        ["load the manifest", f"{worst['load']:.2f} s", "10 s"],
        ["jump to a step, the first in its epoch", f"{worst['first']:.2f} s", "1 s"],
        ["jump within an epoch", f"{worst['again']:.3f} s", ""],
        ["memory of the process", f"{worst['memory'] / 1e9:.2f} GB", "1 GB"],
    ]
    publish(
        "The order of a billion pairs",
        f"{worst['pairs']:,} pairs in {worst['shards']:,} shards and {worst['chunks']:,} chunks; batches of "
        f"{BATCH:,}. The manifest comes from an S3 server on the same machine. Worst of three processes. A jump gives "
        f"the rows of 8 slices of {SLICE} rows in every step of a span.\n\n" + table(["", "measured", "target"], rows),
        given.out,
    )


if __name__ == "__main__":
    main()
