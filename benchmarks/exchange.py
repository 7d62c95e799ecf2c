"""Bytes of images that each rank receives in a step: only the chosen negatives, compared with all images as floats.

    python benchmarks/exchange.py [--out FILE] [--workers 4] [--rows 64]

The ranks are gloo processes on this machine. Bytes are counted twice: by `Workers.fetch`, and by the counter of the
loopback interface, which includes requests and gloo's own traffic.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from report import publish, table

from vlmo_ray.objectives.gather import Workers
from vlmo_ray.objectives.matching import hard_negatives
from vlmo_ray.objectives.pairs import Pairs

IMAGE = (3, 224, 224)
REPEATS = 3


def distinct_and_remote(workers: Workers) -> torch.Tensor:
    """Every row wants the row at the same place on the next worker, which is the worst case."""
    return torch.arange(sum(workers.counts)).roll(-workers.counts[0])


def drawn(workers: Workers) -> torch.Tensor:
    """Negatives drawn for random features: some are local, and some are wanted twice."""
    total = sum(workers.counts)
    generator = torch.Generator().manual_seed(0)
    text, image = (torch.nn.functional.normalize(torch.randn(total, 64, generator=generator), dim=1) for _ in "ti")
    key = torch.arange(total)
    pairs = Pairs(key, key, torch.ones(total, dtype=torch.bool), 0, total)
    return hard_negatives(text, image, torch.tensor(2.66), pairs, key=7)


def all_floats(images: torch.Tensor, workers: Workers) -> int:
    """Gathers the float images of every rank, as the original program does; returns the bytes received from others."""
    floats = images.float()
    joined = floats.new_empty(workers.size * len(floats), *IMAGE)
    dist.all_gather_into_tensor(joined, floats)
    return (joined.numel() - floats.numel()) * joined.element_size()


def loopback_bytes() -> int:
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[0])


def worker(rank: int, size: int, rows: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    workers = Workers((rows,) * size, rank)
    images = torch.randint(0, 256, (rows, *IMAGE), dtype=torch.uint8)
    ways = {
        "all images, float32": lambda: all_floats(images, workers),
        "chosen, uint8, all remote and distinct": lambda: workers.fetch(images, distinct_and_remote(workers))[1],
        "chosen, uint8, as drawn": lambda: workers.fetch(images, drawn(workers))[1],
    }
    for name, way in ways.items():
        received, wire, took = 0, 0, []
        for _ in range(REPEATS):
            dist.barrier()
            before, began = loopback_bytes(), time.perf_counter()
            received = way()
            dist.barrier()
            took.append(time.perf_counter() - began)
            wire = loopback_bytes() - before
            dist.barrier()
        queue.put((name, rank, received, wire, statistics.median(took)))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    size, rows = arguments.workers, arguments.rows
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    running = mp.start_processes(worker, (size, rows, port, queue), nprocs=size, join=False, start_method="spawn")
    found: dict[str, list] = {}
    for _ in range(3 * size):
        name, *figures = queue.get()
        found.setdefault(name, []).append(figures)
    while not running.join():
        pass

    received = {name: statistics.mean(f[1] for f in figures) for name, figures in found.items()}
    wire = {name: max(f[2] for f in figures) / size for name, figures in found.items()}
    took = {name: max(f[3] for f in figures) for name, figures in found.items()}
    base = next(iter(found))
    lines = [
        [
            name,
            f"{received[name] / 1e6:.2f} MB",
            f"{wire[name] / 1e6:.2f} MB",
            f"{received[base] / received[name]:.2f}",
            f"{wire[base] / wire[name]:.2f}",
            f"{took[name]:.2f} s",
        ]
        for name in found
    ]
    head = ["images that travel", "received per rank", "loopback per rank", "ratio", "ratio on loopback", "time"]
    text = (
        f"{size} workers with {rows} rows of 224 px each; gloo over loopback. The expected ratio is "
        f"4 x (workers - 1) = {4 * (size - 1)} if every negative is remote and distinct.\n\n{table(head, lines)}"
    )
    publish("Exchange of hard negatives", text, arguments.out)


if __name__ == "__main__":
    main()
