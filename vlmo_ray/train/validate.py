"""Evaluation inside a run: each worker takes some chunks of the data set, and rank 0 scores all rows.

A chunk is one batch here as in `vlmo evaluate`, so the scores do not depend on the number of workers. On a GPU a run
evaluates in the precision that it trains in, `vlmo evaluate` in float32.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist

from vlmo_ray.data.batch import Batch
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.order import deal
from vlmo_ray.data.reader import Reader, Sources, whole_chunk
from vlmo_ray.runs.evaluations import Result, scored
from vlmo_ray.tasks.task import Columns, Evaluation, Task
from vlmo_ray.train.agree import Agreement
from vlmo_ray.train.parallel import Parallel


def validate(
    parallel: Parallel,
    data: str,
    agreement: Agreement,
    *,
    rank: int,
    world: int,
    device: torch.device,
    bf16: bool,
    retry_timeout_s: float,
    tasks: int = 1,
) -> Result | None:
    """The task's scores on the data set at `data`, on rank 0; None on other ranks, and if a worker has a problem.

    Every worker must call. `tasks` chunks are read at once, by threads of this process. A worker's problem is kept by
    `agreement`, and is agreed on before the next step.
    """

    opened = agreement.attempt(open_evaluation, parallel.task, data, retry_timeout_s)
    if agreement.stops("evaluation"):
        return None
    assert opened is not None
    sources, evaluation, reader = opened
    first, last = deal(sources.num_chunks, world, rank)
    chunks = list(range(first, last))
    if parallel.sharded:
        # Every pass is a collective: a worker with fewer chunks repeats one, and leaves its rows out.
        rounds = -(-sources.num_chunks // world)
        chunks += [min(first, sources.num_chunks - 1)] * (rounds - len(chunks))
    found: list[Columns] = []
    with ThreadPoolExecutor(tasks) as pool:
        reading: deque[Future[Columns]] = deque()
        for i in range(len(chunks)):
            while len(reading) <= tasks and i + len(reading) < len(chunks):
                reading.append(pool.submit(reader, whole_chunk(sources, chunks[i + len(reading)])))
            columns = agreement.attempt(reading.popleft().result)
            if parallel.sharded and agreement.stops("evaluation"):
                return None
            if columns is None:
                break
            batch = Batch.from_numpy(columns).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                rows = parallel.evaluate(evaluation.rows, batch)
            if first + i < last:
                own = {name: tensor.cpu().numpy() for name, tensor in rows.items()}
                found.append(own | {name: columns[name] for name in ("valid", "id", "problem")})
    if agreement.stops("evaluation"):
        return None
    everything = [found]
    if world > 1:
        everything = [[] for _ in range(world)] if rank == 0 else None
        dist.gather_object(found, everything, 0)
    if everything is None:
        return None
    return agreement.attempt(scored, evaluation, (block for blocks in everything for block in blocks), data)


def open_evaluation(task: Task, data: str, retry_timeout_s: float) -> tuple[Sources, Evaluation, Reader]:
    """Raises UserError if the task cannot be evaluated on this data set."""
    manifest = load_manifest(data, retry_timeout_s)
    sources, evaluation = Sources((manifest,)), task.evaluation(manifest.schema)
    return sources, evaluation, Reader(sources.places, evaluation.encoder(), retry_timeout_s=retry_timeout_s)
