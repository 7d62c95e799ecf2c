"""The function that Ray Train runs in every worker."""

from __future__ import annotations

import dataclasses
import os
import threading
import time

import torch

from vlmo_ray.data.store import Store
from vlmo_ray.launch.gauges import Gauges
from vlmo_ray.launch.group import process_group
from vlmo_ray.launch.stop import STOP
from vlmo_ray.runs import events, lease
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train

_LOOK_S = 1.0  # between two looks at the marks
RESIZE = "resize"  # an object in the run's store: its workers save and end, and the driver starts more of them


class Marks:
    """What the driver asks of the workers through the run's store. A thread looks, so slow storage delays no step."""

    def __init__(self, run: Store, token: str):
        self._run, self._token = run, token
        self._told: Notice = Notice.NONE
        self._error: Exception | None = None
        threading.Thread(target=self._look, name="marks", daemon=True).start()

    def check(self) -> Notice:
        """What is asked. Raises UserError if the run is another driver's by now, or its storage stays away."""
        if self._error is not None:
            raise self._error
        return self._told

    def _look(self) -> None:
        try:
            while self._told is not Notice.STOP:
                lease.check(self._run, self._token)
                if self._run.exists(STOP):
                    self._told = Notice.STOP
                elif self._run.exists(RESIZE):
                    self._told = Notice.RESIZE
                time.sleep(_LOOK_S)
        except Exception as error:  # whatever it is: without this thread nobody would notice a lost lease
            self._error = error


def work(spec: RunSpec, token: str, drawn: bool = False) -> dict:
    """Trains until the end or until told to stop, while the run is leased under `token`.

    With `drawn` the first worker prints nothing: the driver shows what it stores.

    Returns the fields of `Outcome` and, as `leaving`, the ids of the nodes that are about to be taken away. A plain
    dict, since Ray Train's controller unpickles it and would first import torch for an object of ours.
    """
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    rank, world, device = context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    else:
        torch.cuda.set_device(device)
    host = os.uname().nodename
    marks = Marks(Store(spec.run, spec.config.data.retry_timeout_s), token) if rank == 0 else None
    leaving: set[str] = set()

    def notice() -> Notice:
        # a barrier: every worker calls, and all get the same
        if (info := ray.train.get_preemption_info()) is not None:
            leaving.update(info.preempted_node_ids)
        marked = marks.check() if marks else Notice.NONE
        return max(marked, Notice.PREEMPTED if leaving else Notice.NONE)

    style = "none" if spec.config.log_json else "text"
    with events.console(style), process_group(rank, world, device, 3 * spec.config.data.retry_timeout_s):
        events.tell("worker", f"worker {rank} of {world}: process {os.getpid()} on {host}, {device}", worker=rank)
        observe = Gauges(spec.run.rstrip("/").rpartition("/")[2])
        local_rank = context.get_local_rank()
        with events.console("none" if drawn and rank == 0 else style):
            outcome = train(
                spec, rank=rank, world=world, local_rank=local_rank, device=device, notice=notice, observe=observe
            )
    return dataclasses.asdict(outcome) | {"leaving": sorted(leaving)}
