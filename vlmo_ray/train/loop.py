"""The training loop of one worker; it knows nothing of Ray but what it is handed."""

from __future__ import annotations

import contextlib
import enum
import shutil
import tempfile
import time
import uuid
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
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.model.flops import step_flops
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.runs import checkpoint
from vlmo_ray.runs.audit import Consumed
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.load import load, publish_model
from vlmo_ray.runs.metrics import Meters
from vlmo_ray.runs.scratch import scratch
from vlmo_ray.runs.state import TrainState
from vlmo_ray.tasks.pretraining import Pretraining
from vlmo_ray.train.optim import build_optimizer, lr_at
from vlmo_ray.train.parallel import parallelize, total_norm, whole_state
from vlmo_ray.train.step import gradients
from vlmo_ray.weights.resize import fit_state

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
    data_tasks: int = 1  # of this worker at once
    accept_changes: bool = False  # of data and settings, since the run's newest checkpoint


@dataclass(frozen=True)
class Outcome:
    """How a worker's loop ended: at the last step, or with the sentence that stopped it."""

    step: int
    stopped: str = ""
    again: bool = False  # stopped to be started again, by other workers


class Notice(enum.IntEnum):
    """What a worker has been told from outside; the gravest one counts for all."""

    NONE = 0
    RESIZE = 1  # there is room for more workers: save, end, and be started again
    PREEMPTED = 2  # a node is about to go: save, end, and be started again without it
    STOP = 3  # save and end


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
    notice: Callable[[], Notice] = lambda: Notice.NONE,
) -> Outcome:
    """Trains from the run's newest good checkpoint, or the start, to the last step of the config.

    A process group of `world` workers must exist if world > 1. Errors of one worker (unreadable data, say) stop
    all workers at the same step: the sentence is in the returned `Outcome`. `notice` is asked every
    `cluster.notice_every` steps, on every worker.
    """
    config, device = job.config, torch.device(device)
    torch.set_float32_matmul_precision("high")
    start_up, problem = _attempt(lambda: _start(job))
    if stopped := _agree(problem and f"the start: {problem}", world, device)[0]:
        return Outcome(0, stopped)
    dtype, bf16 = _precision(config, device)
    manifest, model = start_up[0], start_up[1].to(device, dtype)
    parallel = parallelize(Pretraining(model, config), config.cluster, world, device)
    optimizer = build_optimizer(model, config)
    run = Store(job.run, config.data.retry_timeout_s)
    checkpoints = Checkpoints(run, config.keep_checkpoints, config.keep_every, keeper=rank == 0)
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(scratch())
        stack.callback(checkpoints.close)
        with tempfile.TemporaryDirectory(dir=local) as folder:
            name, attempt, stopped = _fetch(checkpoints, Path(folder), rank, world, device)
            if stopped:
                return Outcome(0, f"the start: {stopped}")
            start, attempts = 0, []
            if name:
                found = checkpoint.read_state(Path(folder))
                found.continue_with(config, manifest.fingerprint, job.accept_changes)
                state = checkpoint.load(Path(folder), model, optimizer)
                start, attempts = state.step, state.attempts
        attempts.append((start, attempt))
        if name and rank == 0:
            print(f"resumed at step {start} on {world} workers", flush=True)

        schedule = schedule_of(config)
        meters = Meters(run, config.total_steps, config.log_every) if rank == 0 else None
        trouble = _Troubles()
        if meters is not None:
            stack.callback(_flush, meters)
        consumed = Consumed(attempt) if config.audit else None
        batches = PairStream(
            manifest,
            config.data,
            image_size=config.model.image_size,
            max_text_len=config.model.max_text_len,
            vocab_size=config.model.vocab_size,
            mlm_probability=config.task.mlm_probability,
            seed=config.seed,
            schedule=schedule,
            start=start,
            stop=config.total_steps,
            rank=rank,
            num_workers=world,
            tasks=job.data_tasks,
            in_process=job.in_process_data,
        )
        stack.callback(batches.close)
        samples, saved = schedule.rows_before(start), start
        stream = iter(batches)

        def save(done: int) -> str:
            """Writes a checkpoint and has it uploaded in the background; or the sentence that says why not."""
            if meters is not None:
                trouble.attempt(meters.close_segment)
            folder = local / f"checkpoint-{uuid.uuid4().hex}"
            try:
                state = TrainState.of(done, config, manifest.fingerprint, attempts)
                checkpoint.save(folder, model, optimizer, state)
            except checkpoint.SaveError as error:
                shutil.rmtree(folder, ignore_errors=True)
                return str(error)
            checkpoints.upload(folder, state, consumed and consumed.take())
            return ""

        for step in range(start, config.total_steps):
            began = time.monotonic()
            looks = step % config.cluster.notice_every == 0
            told = (looks and trouble.attempt(notice)) or Notice.NONE
            batch = trouble.attempt(lambda: (checkpoints.check(), next(stream))[1])
            waited = time.monotonic() - began
            stopped, told = _agree(trouble.first and f"step {step}: {trouble.first}", world, device, told)
            if stopped:
                return Outcome(step, stopped)
            if told:
                problem = save(step) if step > saved else ""
                trouble.attempt(checkpoints.wait)
                problem = problem or trouble.first
                stopped = _agree(problem and f"step {step}: {problem}", world, device)[0]
                return Outcome(step, stopped or f"step {step}: {_SENTENCES[told]}", told is not Notice.STOP)
            batch = batch.to(device)
            figures = gradients(
                parallel,
                batch,
                _workers(schedule, step, world, rank),
                step,
                config.task,
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
            if consumed is not None:
                consumed.add(step, batch)
            if meters is not None:
                took = time.monotonic() - began
                row = (
                    {"step": done, "samples": samples, "lr": lr_at(step, config), **values}
                    | {
                        "pairs_per_s": schedule.batch_size(step) / took,
                        "data_wait": waited / took,
                        "step_s": took,
                        "workers": world,
                    }
                    | _mfu(config, schedule.batch_size(step) / took / world, device)
                )
                trouble.attempt(meters.add, row)
            for bad in filter(None, batch.problems):
                print(f"masked a pair: {bad}", flush=True)
            last = done == config.total_steps
            if done % config.checkpoint_every == 0 or last:
                problem = save(done)
                if last:
                    trouble.attempt(checkpoints.wait)
                    problem = problem or trouble.first
                elif not problem:
                    saved = done
                elif rank == 0:
                    print(f"{problem}; the run goes on, and tries again at the next checkpoint", flush=True)
                if last and (stopped := _agree(problem and f"step {done}: {problem}", world, device)[0]):
                    return Outcome(done, stopped)
        state = whole_state(model)
        if rank == 0:
            trouble.attempt(lambda: (checkpoints.retire(), publish_model(model, state, run)))
        done = config.total_steps
        return Outcome(done, _agree(trouble.first and f"step {done}: {trouble.first}", world, device)[0])


_SENTENCES = {
    Notice.RESIZE: "saved, to go on with more workers",
    Notice.PREEMPTED: "saved, to go on without the node that is being taken away",
    Notice.STOP: "saved and ended on request; the same command goes on from here",
}


def _fetch(
    checkpoints: Checkpoints, folder: Path, rank: int, world: int, device: torch.device
) -> tuple[str, str, str]:
    """(name, attempt, problem): the checkpoint that rank 0 found good, in `folder` on every worker; a new name."""
    name, problem = _attempt(lambda: checkpoints.fetch_newest(folder)) if rank == 0 else ("", "")
    if stopped := _agree(problem, world, device)[0]:
        return "", "", stopped
    chosen = [name, uuid.uuid4().hex[:12]]
    if world > 1:
        dist.broadcast_object_list(chosen, 0)
        name = chosen[0]
        if name:
            problem = _attempt(lambda: rank and checkpoints.fetch_named(name, folder))[1]
            if stopped := _agree(problem, world, device)[0]:
                return "", "", stopped
    return name, chosen[1], ""


def _start(job: Job) -> tuple[Manifest, VLMo]:
    manifest = load_manifest(job.data, job.config.data.retry_timeout_s)
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


def _flush(meters: Meters) -> None:
    """At the end, where how the run ended is already agreed on."""
    if problem := _attempt(meters.flush)[1]:
        print(f"the last figures are not in the log: {problem}", flush=True)


class _Troubles:
    """Mistakes that this worker alone knows of, kept until all agree on how to go on."""

    def __init__(self) -> None:
        self.first = ""  # the sentence

    def attempt(self, make: Callable[..., Any], *given: Any) -> Any:
        """What `make` gives; None if a mistake keeps it away."""
        value, problem = _attempt(lambda: make(*given))
        self.first = self.first or problem
        return value


def _agree(problem: str, world: int, device: torch.device, told: Notice = Notice.NONE) -> tuple[str, Notice]:
    """The first worker's problem and the gravest notice, on every worker: one that stopped alone would leave the
    others waiting."""
    if world == 1:
        return problem, told
    both = torch.tensor([bool(problem), told], dtype=torch.int32, device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    troubled, gravest = both.tolist()
    if not troubled:
        return "", Notice(gravest)
    problems: list[str] = [""] * world
    dist.all_gather_object(problems, problem)
    return next(p for p in problems if p), Notice(gravest)


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
