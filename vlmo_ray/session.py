"""Joining or starting Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# Data processes idle between two windows, and after a second Ray would end those beyond the number of CPUs. To start
# one again costs a CPU-second or more. (A cluster is told by RAY_idle_worker_killing_time_threshold_ms at `ray start`.)
_KEEP_IDLE_WORKERS = {"idle_worker_killing_time_threshold_ms": 600_000}


@contextmanager
def ray_session(dashboard: bool = False) -> Iterator[None]:
    """Joins the cluster of `RAY_ADDRESS` (set inside `ray job submit`), or starts one on this machine and ends it.

    An already initialised Ray is used as it is. A running local cluster is never joined by accident. `dashboard`:
    start it on a local cluster too; Ray Train asks it whether a run's controller lives.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": dashboard, "logging_level": "WARNING", "_system_config": _KEEP_IDLE_WORKERS}
    ray.init(address=address, **(local if address == "local" else {}))
    try:
        yield
    finally:
        ray.shutdown()
