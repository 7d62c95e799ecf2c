"""From a config to what the loop works with: model, task, order of the data, precision."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

from vlmo_ray.config import Config
from vlmo_ray.data.mix import DataSets, load_data
from vlmo_ray.data.order import schedule_of
from vlmo_ray.data.pipeline import Stream
from vlmo_ray.data.reader import Reader, Sources
from vlmo_ray.data.schema import Schema
from vlmo_ray.errors import UserError
from vlmo_ray.model.vlmo import VLMo, copy_experts, init_weights
from vlmo_ray.runs.load import load_all
from vlmo_ray.tasks import build_task
from vlmo_ray.tasks.task import Task
from vlmo_ray.weights.resize import fit_state

# Dense bf16 peak (fp16 on the V100), TFLOP/s, from the vendors' data sheets; MFU is left out on other devices.
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "V100": 125, "L4": 121, "A10G": 70}


@dataclass(frozen=True)
class RunSpec:
    """What a worker needs to know; equal on all workers."""

    config: Config
    data: str  # URI of the data set, or several, separated by commas
    run: str  # URI of the run: metrics, checkpoints, final weights
    fingerprint: str  # of the data, as the launcher saw it
    eval_data: str = ""  # URI of the data set that is evaluated every `evaluate_every` steps
    in_process_data: bool = False  # read and decode in the training process, without Ray Data
    data_tasks: int = 1  # of this worker at once
    accept_changes: bool = False  # of data and settings, since the run's newest checkpoint


class _Uninitialised(TorchFunctionMode):
    """Inside, modules are built without the random numbers of PyTorch's own initialisation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def starting_task(config: Config, schema: Schema, start: bool = True) -> Task:
    """The task around its model, at its starting point: random from the seed, or the weights named by `config.init`.

    Weights of the task's own, as a classifier's head, come from there too if they were trained for the same task with
    the same classes; otherwise they start anew. Without `start` the model's weights are whatever was in memory, to be
    filled from a checkpoint. Raises UserError if the weights were trained for the same task with other answers than
    `schema` has.
    """
    with _Uninitialised():
        model = VLMo(config.model)
    if not start:
        return build_task(model, config, schema)
    init_weights(model, config.seed)
    given = load_all(config.init, allow_missing=True) if config.init else None
    # the schema of the data that they were trained on, if that was for this task
    trained = given.schema if given and given.config and given.config.task.kind == config.task.kind else None
    if given:
        if trained:
            _check_values(config.init, trained, schema)
        fitted = fit_state(given.model.state_dict(), given.model.config, config.model)
        model.load_state_dict(fitted.state, strict=False)
    copy_experts(model, "text", config.start_text_experts)
    copy_experts(model, "vl", config.start_vl_experts)
    task = build_task(model, config, schema)
    if given and trained and _same_classes(trained, schema):
        own = {name: value.shape for name, value in task.state_dict().items() if not name.startswith("model.")}
        if own == {name: value.shape for name, value in given.heads.items()}:
            given.fill(task)
    return task


def _same_classes(trained: Schema, schema: Schema) -> bool:
    """Whether there are classes, and all of them have the same names."""
    named = [field for field in trained.fields if field.values]
    return bool(named) and all(field.name in schema and schema.field(field.name) == field for field in named)


def _check_values(init: str, trained: Schema, schema: Schema) -> None:
    if "answers" not in trained or "answers" not in schema:
        return
    before, now = trained.field("answers").values, schema.field("answers").values
    if before != now:
        old, new = next((a, b) for a, b in itertools.zip_longest(before, now) if a != b)
        raise UserError(
            f"{init} was trained for another list of answers: {len(before):,} there and {len(now):,} in the data "
            f"set, the first difference is {old!r} there and {new!r} here. Prepare the data set with the list of "
            "the weights, or start from the weights before that training"
        )


def begin(spec: RunSpec, start: bool = True) -> tuple[DataSets, Task]:
    """The data and the task, at its starting point if `start`. Raises UserError if either cannot be had."""
    config = spec.config
    data = load_data(spec.data, config.data.weights, config.data.retry_timeout_s)
    if data.fingerprint != spec.fingerprint:
        raise UserError(f"the data set at {spec.data} changed while the run was starting; start it again")
    return data, starting_task(config, data.schema, start)


def stream_of(spec: RunSpec, data: DataSets, task: Task, start: int, rank: int, world: int) -> Stream:
    """The batches of a worker from step `start` on."""
    config = spec.config
    sources = Sources(data.manifests)
    reader = Reader(
        sources.places,
        task.encoder(),
        config.seed,
        mask_damaged=config.data.bad_shards == "mask",
        retry_timeout_s=config.data.retry_timeout_s,
    )
    return Stream(
        sources,
        reader,
        data.order(config.seed, schedule_of(config), config.data.shuffle_steps),
        start=start,
        stop=config.total_steps,
        rank=rank,
        num_workers=world,
        tasks=spec.data_tasks,
        in_process=spec.in_process_data,
    )


def precision_of(config: Config, device: torch.device) -> tuple[torch.dtype, bool]:
    """The type of the weights, and whether passes run under bf16 autocast."""
    if config.precision == "float64":
        return torch.float64, False
    on_gpu = device.type == "cuda"
    return torch.float32, config.precision == "bf16" or (config.precision == "auto" and on_gpu)


def mfu(flops_per_s: float, device: torch.device) -> dict[str, float]:
    """Model FLOPs utilisation of one device, {} where its peak is not known."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    return {} if peak is None else {"mfu": flops_per_s / (peak * 1e12)}
