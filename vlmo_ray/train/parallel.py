"""How the model lies on the workers: whole on each (DDP), or sharded layer by layer (FSDP2)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vlmo_ray.config import ClusterConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.objectives.pairs import columns_of
from vlmo_ray.tasks.task import GlobalTask, Losses, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """The task on this worker, and how its gradients are joined with those of the others."""

    task: Task
    ddp: DistributedDataParallel | None = None

    @property
    def averages(self) -> bool:
        """Whether the backward leaves the mean of the workers' gradients."""
        return self.ddp is not None or self.sharded

    @property
    def sharded(self) -> bool:
        """Whether every forward and backward is a collective, which all workers must enter."""
        return isinstance(self.task, FSDPModule)

    def encode(self, *args):
        """`GlobalTask.encode`, not through DDP.

        DDP's forward may start a collective of its own (it broadcasts its buckets once, in the second step), which
        must come after those of `plan` on every worker. Workers with one micro-batch would start it before them,
        those with several after.
        """
        assert isinstance(self.task, GlobalTask)
        return self.task(self.task.encode, *args)

    def losses(self, *args) -> Losses:
        """`Task.losses`, in the pass whose gradients the workers share."""
        return (self.ddp or self.task)(self.task.losses, *args)

    def evaluate(self, rows: Callable[[Batch], T], batch: Batch) -> T:
        """`Evaluation.rows`, or what a teacher says; without gradients."""
        with torch.no_grad():
            found = self.task(rows, batch)
        if self.sharded:
            # Only a backward gives up the gathered weights; kept, they would hide the next optimizer step.
            cast(FSDPModule, self.task).reshard()
        return found

    def micro_batches(self, counts: tuple[int, ...], rank: int, size: int) -> list[slice | None]:
        """This worker's rows in micro-batches of at most `size`; None stands for an empty one.

        Sharded, every forward and backward is a collective, so all workers make as many as the one with the
        most rows.
        """
        spans: list[slice | None] = [*columns_of(counts[rank], size)]
        rounds = -(-max(counts) // size) if self.sharded else len(spans)
        return spans + [None] * (rounds - len(spans))

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """Around a micro-batch's forward and backward: gradients are joined once, in the last."""
        if self.sharded:
            cast(FSDPModule, self.task).set_requires_gradient_sync(last)
            yield
        elif self.ddp is not None and not last:
            with self.ddp.no_sync():
                yield
        else:
            yield


def parallelize(task: Task, cluster: ClusterConfig, world: int, device: torch.device, bf16: bool = False) -> Parallel:
    """Prepares `task`, whose weights are on `device` and equal on all workers; build the optimizer afterwards.

    Freezes the parameters that the task does not train. Sharded with `bf16`, workers gather the layers' weights in that
    type, which autocast would turn them into anyway, at half the traffic; gradients are summed in float32.
    """
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(task.trainable(name))
    if cluster.compile:
        import torch._dynamo.config as dynamo  # slow to import

        # All layers share one code object, of which Dynamo keeps eight variants and then falls back to eager. There are
        # at most four routes a layer, each with and without drop path and a gradient, and the last layer is asked for
        # all tokens, for the text, or for one; more than that is an error.
        dynamo.recompile_limit = dynamo.accumulated_recompile_limit = 4 * 2 * 2 * 3 * len(task.model.layers)
        dynamo.fail_on_recompile_limit_hit = True
    for layer in task.model.layers:
        # on the method and not around the module, so that the names of the weights stay
        if cluster.compile:
            layer.forward = torch.compile(layer.forward, dynamic=True)  # of batch sizes
        if cluster.activation_checkpointing:
            # every draw is stateless: there is no generator to keep
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    if world == 1:
        return Parallel(task)
    if cluster.strategy == "fsdp":
        mesh = init_device_mesh(device.type, (world,))
        # inputs stay as they are: the sum of the residuals is in float32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in task.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy if bf16 else MixedPrecisionPolicy())
        fully_shard(task, mesh=mesh)
        return Parallel(task)
    with warnings.catch_warnings():
        # torch 2.15 gives the argument another name, which 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return Parallel(task, DistributedDataParallel(task, broadcast_buffers=False, gradient_as_bucket_view=True))


def total_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients, 0-d, equal on every worker."""
    return whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def whole(x: Tensor) -> Tensor:
    """`x` itself; where it is sharded, gathered from all workers, which must all call."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def clip(model: nn.Module, largest: float, norm: float) -> None:
    """Scales all gradients so that their norm, which is `norm`, becomes `largest` at most."""
    if norm > largest:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(largest / norm)


def whole_state(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """The tensors in full, on the CPU, or {} without `keep`; every worker must call."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if keep:
            found[name] = full.cpu()
    return found
