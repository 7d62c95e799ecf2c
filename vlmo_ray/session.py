"""Joins or starts a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from vlmo_ray.errors import UserError


def quiet_ray() -> None:
    """Ray says of every pipeline that it begins and ends, of every local cluster that it does have a token, and of
    every trial that it misses the files of loggers that are off."""
    for name in ("execution.streaming_executor", "logging", "progress"):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(logging.ERROR)
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    logging.getLogger("ray._private.authentication.authentication_token_setup").addFilter(_has_no_token)


def _has_no_token(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled")


def actors(num_workers: int | None, device: Literal["auto", "cpu", "gpu"]) -> tuple[int, float, int]:
    """(how many work at once, CPUs of each, GPUs of each) on the cluster of this process.

    By default one for each GPU, or for two CPUs. "auto" takes GPUs if there are any now; "gpu" asks for them where
    nodes are added on demand.
    """
    import ray

    cpus, gpus = (ray.cluster_resources().get(resource, 0) for resource in ("CPU", "GPU"))
    on_gpu = device == "gpu" or (device == "auto" and gpus >= 1)
    workers = num_workers or int(max(1, gpus if on_gpu else cpus // 2))
    # a cluster without CPUs yet adds a node that has one
    return workers, 0.0 if on_gpu else min(1.0, cpus / 2 / workers) or 1.0, int(on_gpu)


@contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS` (`ray job submit` sets it), or runs one on this machine inside the block.

    Uses Ray as it is if it is already initialised. Never joins another cluster of this machine by accident. `dashboard`
    starts it on a local cluster too; Ray Train asks it whether a run's controller is alive.
    """
    import ray

    quiet_ray()
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": dashboard, "logging_level": "WARNING"} if address == "local" else {}
    try:
        ray.init(address=address, **local)
    except Exception as error:  # Ray raises plain exceptions too
        reason = " ".join(str(error).split())[:300]
        what = (
            "Ray did not start on this machine"
            if address == "local"
            else f"the Ray cluster at {address} cannot be used"
        )
        raise UserError(
            f"{what}: {reason}. Look at the load and the memory of its nodes, and at RAY_ADDRESS"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
