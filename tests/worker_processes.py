"""Workers of a process group in plain processes, forked from a server that has imported PyTorch: quick to start."""

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The server imports these once and then only forks; DDP imports torch._dynamo when it is first used.
multiprocessing.set_forkserver_preload(["vlmo_ray.train.loop", "torch._dynamo"])


def _worker(rank: int, world: int, port: int, environment: dict[str, str], folder: str, function, arguments) -> None:
    os.environ.update(environment)  # the server's is that of the first test
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    result = function(rank, world, *arguments)
    Path(folder, str(rank)).write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def in_processes(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, world, *arguments)` returned, by rank, in a gloo group of `world` processes.

    Raises `ProcessRaisedException` with the traceback of a process that failed, and ends the others.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given = (world, port, dict(os.environ), folder, function, arguments)
        running = mp.start_processes(_worker, given, nprocs=world, join=False, start_method="forkserver")
        while not running.join():
            pass
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(world)]
