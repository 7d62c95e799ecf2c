"""The process group of a run's workers, which they make themselves at the beginning of what Ray Train runs.

With Ray Train's own `TorchConfig` the controller makes it, and imports torch for that before it reserves anything: each
start takes one to two seconds longer. The controller imports this module, so torch is imported only in the workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from ray.train.backend import Backend, BackendConfig

if TYPE_CHECKING:
    import torch


class _Backend(Backend):
    share_cuda_visible_devices = True  # the workers of a node reach each other's GPUs directly


@dataclasses.dataclass
class GroupConfig(BackendConfig):
    """In the place of `TorchConfig`: the controller sets up nothing."""

    backend: str  # "nccl" or "gloo", which `TorchTrainer` looks at

    @property
    def backend_cls(self) -> type[Backend]:
        return _Backend


@contextlib.contextmanager
def process_group(rank: int, world: int, device: torch.device, patience_s: float) -> Iterator[None]:
    """The group of all workers inside the block: NCCL on GPUs, gloo on CPUs; none for a worker alone.

    A worker waits half an hour and `patience_s` for the others, one of which may be waiting for storage. That a worker
    is lost is seen by Ray, within seconds.

    After an error it is left to the end of the process: to destroy it would wait for workers that are lost.
    """
    if world == 1:
        yield
        return
    import ray.train.collective
    import ray.util
    import torch.distributed as dist
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # torch documents it there

    store = None
    if rank == 0:
        store = TCPStore(ray.util.get_node_ip_address(), 0, world, is_master=True, wait_for_workers=False)
    place = ray.train.collective.broadcast_from_rank_zero(store and (store.host, store.port))
    if store is None:
        store = TCPStore(*cast(tuple[str, int], place), world, is_master=False)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=1800 + patience_s),
    )
    yield
    dist.destroy_process_group()
