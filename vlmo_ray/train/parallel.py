"""How the model lies on the workers: whole on each (DDP), or sharded layer by layer (FSDP2)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vlmo_ray.config import ClusterConfig
from vlmo_ray.objectives.pairs import columns_of
from vlmo_ray.tasks.pretraining import Pretraining


@dataclass(frozen=True)
class Parallel:
    """`Pretraining` on this worker, and how its gradients are joined with those of the others."""

    task: Pretraining
    ddp: DistributedDataParallel | None = None

    @property
    def averages(self) -> bool:
        """Whether the backward leaves the mean of the workers' gradients."""
        return self.ddp is not None or self._sharded

    @property
    def _sharded(self) -> bool:
        return isinstance(self.task, FSDPModule)

    def singles(self, *args):
        # not through DDP: its forward may start a collective of its own (it broadcasts its buckets once, in the
        # second step), which must come after those of `plan` on every worker, while workers with one
        # micro-batch would start it before and those with several after
        return self.task("singles", *args)

    def fusion(self, *args):
        return (self.ddp or self.task)("fusion", *args)

    def micro_batches(self, counts: tuple[int, ...], rank: int, size: int) -> list[slice | None]:
        """This worker's rows in micro-batches of at most `size`; None stands for an empty one.

        Sharded, every forward and backward is a collective, so all workers make as many as the one with the
        most rows.
        """
        parts: list[slice | None] = [*columns_of(counts[rank], size)]
        rounds = -(-max(counts) // size) if self._sharded else len(parts)
        return parts + [None] * (rounds - len(parts))

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward: gradients are joined once, in the last."""
        if self._sharded:
            self.task.set_requires_gradient_sync(last)
            yield
        elif self.ddp is not None and not last:
            with self.ddp.no_sync():
                yield
        else:
            yield


def parallelize(task: Pretraining, cluster: ClusterConfig, world: int, device: torch.device) -> Parallel:
    """Prepares `task`, whose weights are on `device` and equal on all workers; build the optimizer afterwards."""
    for layer in task.model.layers:
        # on the method and not around the module, so that the names of the weights stay
        if cluster.compile:
            layer.forward = torch.compile(layer.forward)
        if cluster.activation_checkpointing:
            # every draw is stateless: there is no generator to keep
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
            )
    if world == 1:
        return Parallel(task)
    if cluster.strategy == "fsdp":
        mesh = init_device_mesh(device.type, (world,))
        for layer in task.model.layers:
            fully_shard(layer, mesh=mesh)
        return Parallel(fully_shard(task, mesh=mesh))
    with warnings.catch_warnings():
        # torch 2.15 gives the argument another name, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return Parallel(
            task, DistributedDataParallel(task, broadcast_buffers=False, gradient_as_bucket_view=True)
        )


def total_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients, 0-d, equal on every worker."""
    return whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def whole(x: Tensor) -> Tensor:
    """`x` itself; where it is sharded, gathered from all workers, which must all call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU, on rank 0 at least; every worker must call."""
    if not dist.is_initialized():
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
