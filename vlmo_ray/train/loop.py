"""The training loop of one worker; it knows nothing of Ray but what it is handed."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlmo_ray.config import Config
from vlmo_ray.data.manifest import Manifest, load_manifest
from vlmo_ray.data.order import Schedule, deal
from vlmo_ray.data.pipeline import PairStream
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError
from vlmo_ray.model.flops import step_flops
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.resize import fit_state
from vlmo_ray.tasks.pretrain import Pretraining
from vlmo_ray.train import checkpoint
from vlmo_ray.train.meters import Meters
from vlmo_ray.train.optim import build_optimizer, lr_at
from vlmo_ray.train.parallel import parallelize, total_norm, whole_state
from vlmo_ray.train.runs import load, publish_model
from vlmo_ray.train.state import TrainState
from vlmo_ray.train.step import gradients

# Dense bf16 peak, TFLOP/s, from the vendors' data sheets; MFU is left out on other devices.
_PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312, "V100": 125, "L4": 121, "A10G": 70}


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; equal on all workers."""

    config: Config
    data: str  # URI of the data set
    run: str  # URI of the run: metrics, final weights
    fingerprint: str  # of the data set, as the launcher saw it
    in_process_data: bool = False  # read and decode in the training process, without Ray Data
    data_cpus: float = 1.0  # of this worker's pipeline


@dataclass(frozen=True)
class Outcome:
    """How a worker's loop ended: at the last step, or with the sentence that stopped it."""

    step: int
    stopped: str = ""


def build_model(config: Config) -> VLMo:
    """The model at its starting point: random from the seed, or the weights named by `config.init`."""
    model = VLMo(config.model)
    init_weights(model, config.seed)
    if config.init:
        start = load(config.init, allow_missing=True)
        fitted = fit_state(start.state_dict(), start.config, config.model)
        model.load_state_dict(fitted.state, strict=False)
    return model


def schedule_of(config: Config) -> Schedule:
    return Schedule(tuple((p.steps, p.global_batch) for p in config.phases), config.slice_size)


def train(
    job: Job,
    *,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
    resume: Path | None = None,
    commit: Callable[[Path, int], None] = lambda folder, step: shutil.rmtree(folder),
) -> Outcome:
    """Trains from `resume` (a checkpoint folder) or the start to the last step of the config.

    `commit(folder, step)` is called on every worker with its part of a finished checkpoint, and owns the
    folder. A process group of `world` workers must exist if world > 1. Errors of one worker (unreadable data,
    say) stop all workers at the same step: the sentence is in the returned `Outcome`.
    """
    config, device = job.config, torch.device(device)
    torch.set_float32_matmul_precision("high")
    start_up, problem = _attempt(lambda: _start(job))
    if stopped := _agree(problem and f"the start: {problem}", world, device):
        return Outcome(0, stopped)
    dtype, bf16 = _precision(config, device)
    manifest, model = start_up[0], start_up[1].to(device, dtype)
    parallel = parallelize(Pretraining(model, config), config.cluster, world, device)
    optimizer = build_optimizer(model, config)
    start = 0
    if resume is not None:
        checkpoint.read_state(resume).continue_with(config, manifest.fingerprint)
        start = checkpoint.load(resume, model, optimizer).step
        if rank == 0:
            print(f"resumed at step {start} on {world} workers", flush=True)

    schedule = schedule_of(config)
    meters = (
        Meters(open_store(job.run, create=True), config.total_steps, config.log_every) if rank == 0 else None
    )
    batches = PairStream(
        manifest,
        config.data,
        image_size=config.model.image_size,
        max_text_len=config.model.max_text_len,
        vocab_size=config.model.vocab_size,
        seed=config.seed,
        schedule=schedule,
        start=start,
        stop=config.total_steps,
        rank=rank,
        num_workers=world,
        cpus=job.data_cpus,
        in_process=job.in_process_data,
    )
    samples = schedule.rows_before(start)
    stream = iter(batches)
    step = start
    try:
        for step in range(start, config.total_steps):
            began = time.monotonic()
            batch, problem = _attempt(lambda: next(stream))
            waited = time.monotonic() - began
            if stopped := _agree(problem and f"step {step}: {problem}", world, device):
                return Outcome(step, stopped)
            batch = batch.to(device)
            figures = gradients(
                parallel,
                batch,
                _workers(schedule, step, world, rank),
                step,
                config.loss,
                config.micro_batch,
                bf16,
            )
            figures["grad_norm"] = total_norm(model)
            values = {name: float(value) for name, value in figures.items()}
            if bad := [name for name in ("loss", "grad_norm") if not _finite(values[name])]:
                return Outcome(
                    step,
                    f"step {step}: {' and '.join(bad)} not finite ({values}); the weights are those of the step "
                    "before. Lower optim.peak_lr or look at the pairs of this step",
                )
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, config)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            samples += schedule.batch_size(step)
            if meters is not None:
                took = time.monotonic() - began
                meters.add(
                    {"step": done, "samples": samples, "lr": lr_at(step, config), **values}
                    | {
                        "pairs_per_s": schedule.batch_size(step) / took,
                        "data_wait": waited / took,
                        "step_s": took,
                        "workers": world,
                    }
                    | _mfu(config, schedule.batch_size(step) / took / world, device)
                )
            for bad in filter(None, batch.problems):
                print(f"masked a pair: {bad}", flush=True)
            if done % config.checkpoint_every == 0 or done == config.total_steps:
                if meters is not None:
                    meters.close_segment()
                folder = Path(tempfile.mkdtemp(prefix="vlmo-checkpoint-"))
                checkpoint.save(folder, model, optimizer, TrainState.of(done, config, manifest.fingerprint))
                commit(folder, done)
        state = whole_state(model)
        if rank == 0:
            publish_model(model, state, open_store(job.run))
        return Outcome(config.total_steps)
    finally:
        batches.close()
        if meters is not None:
            meters.close()


def _start(job: Job) -> tuple[Manifest, VLMo]:
    manifest = load_manifest(job.data)
    if manifest.fingerprint != job.fingerprint:
        raise UserError(f"the data set at {job.data} changed while the run was starting; start it again")
    return manifest, build_model(job.config)


def _precision(config: Config, device: torch.device) -> tuple[torch.dtype, bool]:
    """The type of the weights, and whether passes run under bf16 autocast."""
    if config.precision == "float64":
        return torch.float64, False
    on_gpu = device.type == "cuda"
    return torch.float32, config.precision == "bf16" or (config.precision == "auto" and on_gpu)


def _attempt(make: Callable[[], Any]) -> tuple[Any, str]:
    """What `make` gives, or the sentence of the mistake that keeps it away."""
    try:
        return make(), ""
    except UserError as error:
        return None, str(error)


def _agree(problem: str, world: int, device: torch.device) -> str:
    """The first worker's problem, on every worker: one that stopped alone would leave the others waiting."""
    if world == 1:
        return problem
    troubled = torch.tensor([bool(problem)], dtype=torch.int32, device=device)
    dist.all_reduce(troubled, dist.ReduceOp.MAX)
    if not troubled.item():
        return ""
    problems: list[str] = [""] * world
    dist.all_gather_object(problems, problem)
    return next(p for p in problems if p)


def _workers(schedule: Schedule, step: int, world: int, rank: int) -> Workers:
    shares = [deal(schedule.num_slices(step), world, r) for r in range(world)]
    return Workers(tuple((last - first) * schedule.slice_size for first, last in shares), rank)


def _finite(value: float) -> bool:
    return value - value == 0.0


def _mfu(config: Config, pairs_per_s_per_worker: float, device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    peak = next((tflops for key, tflops in _PEAK_TFLOPS.items() if key in name), None)
    if peak is None:
        return {}
    return {
        "mfu": pairs_per_s_per_worker * step_flops(config.model, config.model.max_text_len) / (peak * 1e12)
    }
