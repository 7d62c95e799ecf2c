"""The time and memory of an audit, for a part of a run over a thousand million pairs; and what all of it would take.

    python benchmarks/audit.py [--out FILE] [--pairs 10000000] [--epochs 6] [--workers 64] [--batch 32768]

Data set and log are synthetic: shards as `prepare` writes them, whose images are 64 bytes of noise, and the files that
the workers of a run would have recorded, with ids like those of a web crawl, both in folders. The audit runs in a fresh
process. Its memory is the peak of the whole process, Python and libraries included. The process also holds manifest,
order and buckets that an audit of all pairs has, so its memory is measured and only times are extrapolated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from order import make
from report import peak_memory, publish, table

from vlmo_ray.data.index import parquet_chunks
from vlmo_ray.data.manifest import chunk_table, load_manifest, write_manifest
from vlmo_ray.data.order import Order, Schedule, deal
from vlmo_ray.data.schema import PAIRS
from vlmo_ray.data.store import Store

PAIRS_IN_ALL = 1_024_000_000
ROWS, GROUPS, SLICE, EVERY = 256, 40, 64, 1000  # rows of a chunk, chunks of a shard, steps between checkpoints


def shard(data: str, number: int, pairs: int) -> list:
    first = number * ROWS * GROUPS
    n = min(ROWS * GROUPS, pairs - first)
    ids = pa.array([f"laion-{i * 2654435761 % 2**32:010d}-{i:010d}" for i in range(first, first + n)])
    image = pa.FixedSizeBinaryArray.from_buffers(pa.binary(64), n, [None, pa.py_buffer(np.random.bytes(64 * n))])
    columns = [ids, ids, image.cast(pa.binary()), ids, pa.array([[]] * n, pa.list_(pa.string()))]
    name = f"{number:06d}.parquet"
    pq.write_table(pa.table(columns, schema=PAIRS.arrow), f"{data}/{name}", row_group_size=ROWS, use_dictionary=False)
    with Store(data).open_input(name) as file:
        return parquet_chunks(file, name)


def log(data: str, run: str, steps: int, batch: int, workers: int, first: int) -> None:
    """What all workers record in the steps from `first` to the next checkpoint."""
    manifest = load_manifest(data)
    order = Order(manifest.chunk_rows, 1, Schedule(((steps, batch),), SLICE), 8)
    starts = np.cumsum(manifest.chunk_rows, dtype=np.int64) - manifest.chunk_rows
    for rank in range(workers):
        low, high = deal(batch // SLICE, workers, rank)
        spans = [
            order.slice_rows(order.span(s), low, high, s, min(s + 8, steps))
            for s in range(first, min(first + EVERY, steps), 8)
        ]
        columns = [np.concatenate([getattr(s, name) for s in spans]) for name in ("step", "position", "chunk", "row")]
        step, position, chunk, row = columns
        ids = [f"laion-{i * 2654435761 % 2**32:010d}-{i:010d}" for i in (starts[chunk] + row).tolist()]
        rows = {"step": step.astype(np.int32), "position": position.astype(np.int32), "id": ids}
        rows["valid"] = np.ones(len(step), bool)
        Path(run, "audit", "one").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), f"{run}/audit/one/{first:08d}-{low:08d}.parquet", compression="zstd")


def measure(data: str, run: str, large: str, epochs: int, steps: int, batch: int) -> dict:
    from vlmo_ray.runs.audit import _MOST_BUCKETS, _Comparison
    from vlmo_ray.runs.consumed import DataIds, Log
    from vlmo_ray.runs.multisets import Multisets

    manifest = load_manifest(data)
    order = Order(manifest.chunk_rows, 1, Schedule(((steps, batch),), SLICE), 8)
    # what an audit of all pairs has in memory, beside the files that it is reading
    all_pairs = load_manifest(large)
    all_steps = epochs * all_pairs.num_rows // batch
    all_order = Order(all_pairs.chunk_rows, 1, Schedule(((all_steps, batch),), SLICE), 8)
    held = [Multisets(epochs + 2, _MOST_BUCKETS), Multisets(2, all_steps)]
    held.append(DataIds(all_pairs, all_order, all_steps)._due())
    for multisets in held[:2]:
        multisets.counts[:], multisets.sums[:] = 1, 1  # touches the pages
    began, cpu = time.perf_counter(), time.process_time()
    found = _Comparison(Log(Store(run), [(0, "one")], steps), DataIds(manifest, order, steps)).run()
    took = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}
    assert found.clean, found.sentences()
    return took | {"peak": peak_memory(), "rows": int(sum(e.seen for e in found.epochs))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="")
    for name, default in (("pairs", 10_000_000), ("epochs", 6), ("workers", 64), ("batch", 32768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    pairs, batch = options.pairs, options.batch
    steps = options.epochs * pairs // batch
    if options.measure:
        print(json.dumps(measure(*options.measure, options.epochs, steps, batch)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data, run, large = f"{folder}/data", f"{folder}/run", f"{folder}/large"
        Path(data).mkdir()
        make(large, PAIRS_IN_ALL // (ROWS * GROUPS), GROUPS, ROWS)
        with ProcessPoolExecutor() as pool:
            made = [pool.submit(shard, data, i, pairs) for i in range(-(-pairs // (ROWS * GROUPS)))]
            write_manifest(data, "parquet", chunk_table([chunk for one in made for chunk in one.result()]))
            logs = [pool.submit(log, data, run, steps, batch, options.workers, s) for s in range(0, steps, EVERY)]
            for one in logs:
                one.result()
        size = sum(file.stat().st_size for file in Path(run).rglob("*.parquet"))
        command = [sys.executable, *sys.argv, "--measure", data, run, large]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    times = PAIRS_IN_ALL / pairs
    rows = [
        ["rows recorded", f"{found['rows']:,}", f"{found['rows'] * times:,.0f}"],
        ["size of the log", f"{size / 1e9:.2f} GB", f"{size * times / 1e9:,.0f} GB"],
        ["time", f"{found['seconds']:,.0f} s", f"{found['seconds'] * times / 3600:.1f} h"],
        ["of processors", f"{found['cpu_s']:,.0f} s", f"{found['cpu_s'] * times / 3600:.1f} h"],
        ["memory of the process", "", f"{found['peak'] / 1e9:.2f} GB"],
    ]
    head = ["", f"measured: {pairs:,} pairs, {options.epochs} epochs", f"extrapolated: {PAIRS_IN_ALL:,} pairs"]
    publish("An audit of a thousand million pairs", table(head, rows), options.out)


if __name__ == "__main__":
    main()
