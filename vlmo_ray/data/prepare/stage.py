"""Work in many tasks on Ray. Each writes its result as a marker, so that a second run does only the rest."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.progress import tracked

WORK = "_vlmo_prepare"  # deleted at the end, so it must not be a name that users choose
_WORKER_BYTES = 256 << 20  # a Python worker with pyarrow and Pillow, before it holds any data
_MAX_BLOCKS = 4096  # Ray Data needs about 25 ms for each


def run_stage(
    out: Store, stage: str, units: list, work: Callable[[Any], dict], memory: int, what: str, sizes: Sequence[float]
) -> None:
    """Call `work(unit)` in a task for every unit that has no marker, and write the result as its marker.

    `what` names the stage for people, and `sizes` say how much of it each unit is.

    `work` must have written all its data when it returns, must give the same result if called again, and must hold at
    most `memory` bytes; Ray runs as many tasks at once as fit. A failed task raises a UserError.
    """
    import ray.data

    done = {name.rpartition("/")[2] for name in out.list(f"{WORK}/{stage}/")}
    left = [(i, unit) for i, unit in enumerate(units) if _marker(i) not in done]
    if not left:
        return
    need = memory + _WORKER_BYTES
    largest = max((n["Resources"].get("memory", 0) for n in ray.nodes() if n["Alive"]), default=0)
    if need > largest:  # Ray would wait for ever
        raise UserError(
            f"memory={memory} needs {need >> 20} MiB for one task, and the largest Ray node offers "
            f"{int(largest) >> 20} MiB; choose a smaller memory"
        )

    def do(batch: dict) -> dict:
        (item,) = batch["unit"]
        i, unit = pickle.loads(item)
        try:
            out.write(f"{WORK}/{stage}/{_marker(i)}", json.dumps(work(unit)).encode())
        except (UserError, OSError) as error:  # as data, because Ray wraps exceptions
            return {"unit": [i], "error": [str(error)]}  # an OSError here means a full disk or a deleted piece
        return {"unit": [i], "error": [""]}

    items = [{"unit": pickle.dumps(item)} for item in left]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MAX_BLOCKS))
    dataset.context.enable_progress_bars = False  # of Ray, which count tasks
    # the stubs do not know that by default batches are dicts of arrays
    dataset = dataset.map_batches(do, batch_size=1, num_cpus=1, memory=need)  # pyright: ignore[reportArgumentType]
    total = sum(sizes)
    before = total - sum(sizes[i] for i, _ in left)
    rows = dataset.iter_rows()  # in the order in which tasks end
    for row in tracked(rows, what, total, lambda row: sizes[row["unit"]], before):
        if row["error"]:
            raise UserError(row["error"])


def results(out: Store, stage: str, num_units: int) -> Iterator[dict]:
    """The results of a finished stage, in the order of its units."""
    with ThreadPoolExecutor(16) as pool:
        names = (f"{WORK}/{stage}/{_marker(i)}" for i in range(num_units))
        yield from map(json.loads, pool.map(out.read, names))


def _marker(i: int) -> str:
    return f"{i:07d}.json"
