"""How much memory a step takes on a GPU, from the shapes alone. Computed and counted, never measured on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vlmo_ray.config import Config, Phase
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo
from vlmo_ray.tasks.task import Pass, Task

# What the backward keeps under bf16 autocast with fused attention: bytes per token, unit of width and layer.
# tests/model/test_memory.py counts them. Recomputed layers keep their float32 input.
SAVED, SAVED_INPUT = 43.0, 4.0
# Bytes per parameter: float32 weight, gradient and two moments of AdamW; and the bf16 copy of a step.
STATE, COPY = 16.0, 2.0
ROOM = 0.9  # of a GPU's memory that may be planned for: the rest is for the allocator, NCCL and the contrast's blocks


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    state: float  # weights, gradients, optimizer, average
    passes: float  # what the backward of one micro-batch needs
    rows: int  # of a micro-batch

    @property
    def total(self) -> float:
        return self.state + self.passes

    def __str__(self) -> str:
        gb = [f"{value / 1e9:.1f}" for value in (self.total, self.state, self.passes)]
        return f"{gb[0]} GB on a GPU: {gb[1]} for weights and optimizer, {gb[2]} for {self.rows} rows at once"


def saved_bytes(task: Task, passes: list[Pass], recomputed: bool) -> float:
    """What the backward of these passes over one row keeps."""
    config = task.model.config
    sizes = [p.times * p.size(config)[0] * config.width for p in passes]
    layers = [p.size(config)[1] for p in passes]
    if not recomputed:
        return SAVED * sum(size * depth for size, depth in zip(sizes, layers, strict=True))
    kept = SAVED_INPUT * sum(size * depth for size, depth in zip(sizes, layers, strict=True))
    return kept + SAVED * max(sizes)  # and one layer at a time


def memory_of(task: Task, config: Config, workers: int = 1) -> Memory:
    """The memory of a step on each of `workers` GPUs; only sharded weights depend on their number."""
    parameters = sum(p.numel() for name, p in task.named_parameters() if task.trainable(name))
    frozen = sum(p.numel() for p in task.parameters()) - parameters
    state = (STATE + (4 if config.optim.average_decay else 0)) * parameters + 4 * frozen
    state /= workers if config.cluster.strategy == "fsdp" else 1
    copies = COPY * (parameters + frozen)
    row = saved_bytes(task, task.passes(), config.cluster.activation_checkpointing) + task.head_bytes_per_row()
    return Memory(state + copies, config.micro_batch * row, config.micro_batch)


def largest_share(config: Config, phase: Phase, workers: int) -> int:
    """Rows of the worker that has the most slices."""
    return -(-phase.global_batch // config.slice_size // workers) * config.slice_size


def check_memory(task: Task, config: Config, available: int, workers: int) -> None:
    """Raises UserError, with the setting to change, if a step does not fit a GPU with `available` bytes."""
    share = max(largest_share(config, phase, workers) for phase in config.phases)
    needed = memory_of(task, replace(config, micro_batch=min(config.micro_batch, share)), workers)
    if needed.total <= ROOM * available:
        return
    per_row = needed.passes / needed.rows
    fits = max(0, int((ROOM * available - needed.state) / per_row) // config.slice_size * config.slice_size)
    remedies = [f"--set micro_batch={fits}"] if fits else []
    if not config.cluster.activation_checkpointing:
        remedies.append("--set cluster.activation_checkpointing=true")
    if config.cluster.strategy == "ddp" and workers > 1 and not fits:
        remedies.append("--set cluster.strategy=fsdp")
    raise UserError(
        f"a step needs some {needed}; the GPU has {available / 1e9:.1f} GB. Use {' or '.join(remedies)}"
        if remedies
        else f"a step needs some {needed}; the GPU has {available / 1e9:.1f} GB. Use larger GPUs or a smaller model"
    )


def on_meta(config: Config, schema: Schema | None = None) -> Task:
    """The task of a config without memory, for its shapes. Without the schema of the data, a data set of
    `Config.model`'s own sizes, 1,000 classes and 150 of pixels is assumed."""
    from vlmo_ray.data.schema import Field
    from vlmo_ray.tasks import build_task

    answers = tuple(str(i) for i in range(config.model.num_answers))
    fields = [Field("image", "image"), Field("image_2", "image"), Field("text", "text")]
    fields += [Field("label", "label", tuple(str(i) for i in range(1000))), Field("answers", "answers", answers)]
    fields.append(Field("mask", "mask", tuple(str(i) for i in range(150))))
    with torch.device("meta"):
        return build_task(VLMo(config.model), config, schema or Schema(tuple(fields)))
