"""Joins or starts a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS` (`ray job submit` sets it), or runs one on this machine inside the block.

    Uses Ray as it is if it is already initialised. Never joins another cluster of this machine by accident. `dashboard`
    starts it on a local cluster too; Ray Train asks it whether a run's controller is alive.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": dashboard, "logging_level": "WARNING"} if address == "local" else {}
    ray.init(address=address, **local)
    try:
        yield
    finally:
        ray.shutdown()
