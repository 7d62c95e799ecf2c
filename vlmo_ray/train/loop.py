"""The training loop of one worker; it knows nothing of Ray but what it is handed."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from vlmo_ray.data.batch import Batch
from vlmo_ray.data.mix import DataSets
from vlmo_ray.data.order import Schedule, deal, schedule_of
from vlmo_ray.data.store import Store
from vlmo_ray.objectives.gather import Workers
from vlmo_ray.runs import checkpoint, evaluations
from vlmo_ray.runs.checkpoints import Checkpoints, name_of
from vlmo_ray.runs.consumed import Consumed
from vlmo_ray.runs.events import keeping, tell
from vlmo_ray.runs.load import describe, publish
from vlmo_ray.runs.masked import Masked
from vlmo_ray.runs.metrics import Meters, last_step
from vlmo_ray.runs.scratch import scratch
from vlmo_ray.runs.state import TrainState
from vlmo_ray.tasks.task import Task
from vlmo_ray.train.agree import Agreement, Notice
from vlmo_ray.train.build import RunSpec, begin, mfu, precision_of, stream_of
from vlmo_ray.train.memory import check_memory
from vlmo_ray.train.optim import WeightAverage, build_optimizer, lr_at, set_lr
from vlmo_ray.train.parallel import clip, parallelize, total_norm, whole_state
from vlmo_ray.train.step import gradients
from vlmo_ray.train.validate import open_evaluation, validate

Observer = Callable[[dict[str, float], tuple[str, ...]], None]


@dataclass(frozen=True)
class Outcome:
    """How a worker's loop ended: at the last step, or with the sentence that stopped it."""

    step: int
    stopped: str = ""
    again: bool = False  # stopped to be started again, by other workers
    requested: bool = False  # saved and stopped, as was asked


_SENTENCES = {
    Notice.RESIZE: "saved, to go on with more workers",
    Notice.PREEMPTED: "saved, to go on without the node that is being taken away",
    Notice.STOP: "saved and ended on request; the same command goes on from here",
}


def train(
    spec: RunSpec,
    *,
    rank: int = 0,
    world: int = 1,
    local_rank: int = 0,
    device: torch.device | str = "cpu",
    notice: Callable[[], Notice] = lambda: Notice.NONE,
    observe: Observer = lambda figures, terms: None,
) -> Outcome:
    """Trains from the run's newest good checkpoint, or the start, to the last step of the config.

    A process group of `world` workers must exist if world > 1, in which those of a node have consecutive ranks; the one
    with `local_rank` 0 fetches checkpoints for them. Errors of one worker (unreadable data, say) stop
    all workers at the same step: the sentence is in the returned `Outcome`. `notice` is asked every
    `cluster.notice_every` steps, on every worker. `observe` gets the metrics of each step and the names of those that
    are shown, on rank 0; it must not wait for anything.
    """
    config, device = spec.config, torch.device(device)
    torch.set_float32_matmul_precision("high")
    agreement = Agreement(world, device)
    with contextlib.ExitStack() as stack:
        store = Store(spec.run, config.data.retry_timeout_s)
        if rank == 0:
            stack.enter_context(keeping(store, "worker"))
        checkpoints = Checkpoints(store, config.keep_checkpoints, config.keep_every, keeper=rank == 0)
        stack.callback(checkpoints.close)
        local = stack.enter_context(scratch())
        fetched, attempt, stopped = _fetch(checkpoints, local / "newest", agreement, rank, world, local_rank)
        if stopped:
            return Outcome(0, stopped)
        begun = agreement.attempt(begin, spec, fetched is None)
        if begun is not None and spec.eval_data:  # now, and not after thousands of steps
            agreement.attempt(open_evaluation, begun[1], spec.eval_data, config.data.retry_timeout_s)
        if begun is not None and device.type == "cuda":
            available = torch.cuda.get_device_properties(device).total_memory
            agreement.attempt(check_memory, begun[1], config, available, world)
        if stopped := agreement.stops("the start"):
            return Outcome(0, stopped)
        assert begun is not None
        run = _Run(spec, *begun, rank, world, device, agreement, stack, checkpoints, local, observe)
        run.resume(fetched, attempt)
        if world > 1:
            dist.barrier()  # the others on the node may still be reading
        shutil.rmtree(local / "newest", ignore_errors=True)
        schedule, start = schedule_of(config), run.done
        batches = stream_of(spec, run.data, run.task, start, rank, world)
        stack.callback(batches.close)
        stream, skipped = iter(batches), 0  # steps in a row without an update

        for step in range(start, config.total_steps):
            began = time.monotonic()
            looks = step % config.cluster.notice_every == 0
            told = (looks and agreement.attempt(notice)) or Notice.NONE
            agreement.attempt(run.checkpoints.check)
            batch = None if agreement.problem else agreement.attempt(lambda: next(stream))
            waited = time.monotonic() - began
            stopped, told = agreement.reach(f"step {step}", told)
            if stopped:
                return Outcome(step, run.save_before(stopped) if told is Notice.UNREADABLE else stopped)
            if told:
                stopped = run.save_and_wait()
                asked = told is Notice.STOP
                return Outcome(step, stopped or f"step {step}: {_SENTENCES[told]}", not asked, asked and not stopped)
            assert batch is not None
            batch = batch.to(device)
            figures = gradients(
                run.parallel,
                batch,
                _workers(schedule, step, world, rank),
                step,
                config.micro_batch,
                run.bf16,
                run.average,
            )
            figures["grad_norm"] = total_norm(run.task)
            problem = _not_finite(figures, step)
            skipped = skipped + 1 if problem else 0
            if skipped > config.optim.skip_nonfinite:
                return Outcome(step, run.save_before(problem))
            figures["skipped"] = torch.tensor(float(skipped > 0))
            if problem:
                run.skip(step, problem)
            else:
                run.update(step, float(figures["grad_norm"]))
            run.write_down(step, batch, figures, schedule, time.monotonic() - began, waited)
            evaluated = config.evaluate_every and run.done % config.evaluate_every == 0
            if evaluated:
                run.evaluate()
            if evaluated or run.done % config.checkpoint_every == 0 or run.done == config.total_steps:
                run.save()
        unsaved = run.saved != config.total_steps or run.uploading
        if unsaved and (stopped := run.save_and_wait()):
            return Outcome(run.done, stopped)
        run.publish()
        return Outcome(config.total_steps, agreement.stops(f"step {config.total_steps}"))


class _Run:
    """What a worker holds while it trains, and what it does between two steps."""

    def __init__(
        self,
        spec: RunSpec,
        data: DataSets,
        task: Task,
        rank: int,
        world: int,
        device: torch.device,
        agreement: Agreement,
        stack: contextlib.ExitStack,
        checkpoints: Checkpoints,
        local: Path,
        observe: Observer,
    ):
        config = spec.config
        self.spec, self.config, self.data = spec, config, data
        self.rank, self.world, self.device, self.agreement = rank, world, device, agreement
        dtype, self.bf16 = precision_of(config, device)
        self.task = task.to(device, dtype)
        self.parallel = parallelize(self.task, config.cluster, world, device, self.bf16)
        self.optimizer = build_optimizer(self.task, config)
        decay = config.optim.average_decay
        self.average = WeightAverage(self.task, decay) if decay else None
        self.store, self.checkpoints, self.local = checkpoints.run, checkpoints, local
        self.meters = Meters(self.store, config.total_steps, config.log_every, task.shown) if rank == 0 else None
        if self.meters is not None:
            stack.callback(_flush, self.meters)
        self.attempts: list[tuple[int, str]] = []
        self.consumed: Consumed | None = None
        self.masked, self.warned = Masked("", rank), ""
        self.done = self.saved = 0  # steps
        self.uploading = False
        self.best = -math.inf  # of the evaluations so far
        self.observe, self.repeated = observe, 0  # steps that were done before, of which nothing was kept

    def resume(self, fetched: Path | None, attempt: str) -> None:
        """Takes the checkpoint in the folder `fetched`, if there is one. Raises UserError if it does not fit."""
        if fetched is not None:
            found = checkpoint.read_state(fetched)
            found.continue_with(self.config, self.data.fingerprint, self.spec.accept_changes)
            averaged = self.average.tensors if self.average else None
            state = checkpoint.load(fetched, self.task, self.optimizer, averaged)
            self.done = self.saved = state.step
            self.attempts = state.attempts
        self.attempts.append((self.done, attempt))
        self.masked = Masked(attempt, self.rank)
        if self.config.audit:
            self.consumed = Consumed(attempt)
        if self.rank == 0:
            if fetched is not None:
                sentence = f"resumed at step {self.done} on {self.world} workers"
                tell("resumed", sentence, step=self.done, workers=self.world)
            self.repeated = max(0, (self.agreement.attempt(last_step, self.store) or 0) - self.done)
            if self.repeated:
                tell("repeated", f"{self.repeated} steps after it are done again", step=self.done, steps=self.repeated)
            if fetched is not None:
                self.agreement.attempt(self._find_best)
            self.agreement.attempt(describe, self.store, self.config, self.data.schema)

    def _find_best(self) -> None:
        for step, result in evaluations.read_evaluations(self.store):
            if result.data == self.spec.eval_data and step <= self.done:
                self._rate(step, result)

    def _rate(self, step: int, result: evaluations.Result) -> None:
        """Keeps the checkpoint of the step with the best first metric; data without truth give none."""
        value = next((score.value for score in result.scores.values()), self.best)
        if value > self.best:
            self.best, self.checkpoints.best = value, step

    def update(self, step: int, grad_norm: float) -> None:
        """One optimizer step."""
        if self.config.optim.clip_norm:
            clip(self.task, self.config.optim.clip_norm, grad_norm)
        set_lr(self.optimizer, lr_at(step, self.config))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.done = step + 1

    def skip(self, step: int, problem: str) -> None:
        """A step without an update: the same on all workers, as they see the same figures."""
        if self.rank == 0:
            tell("skipped", f"{problem}; skipped (optim.skip_nonfinite={self.config.optim.skip_nonfinite})", step=step)
        self.optimizer.zero_grad(set_to_none=True)
        self.done = step + 1

    def write_down(
        self, step: int, batch: Batch, figures: dict[str, Tensor], schedule: Schedule, took_s: float, waited_s: float
    ) -> None:
        """What the step consumed, its figures, and the rows that had to be masked."""
        if self.consumed is not None:
            self.consumed.add(step, batch)
        if self.meters is not None:
            rows = schedule.batch_size(step)
            speed = {
                "samples_per_s": rows / took_s,
                "data_wait": waited_s / took_s,
                "step_s": took_s,
                "workers": self.world,
            } | mfu(rows / took_s / self.world * self.task.flops_per_row(), self.device)
            place = {"step": self.done, "samples": schedule.rows_before(self.done), "lr": lr_at(step, self.config)}
            values = {name: float(value) for name, value in figures.items()}
            self.agreement.attempt(self.meters.add, place | values | speed)
            state = {
                "total_steps": self.config.total_steps,
                "checkpoint_age_s": self.checkpoints.age_s(),
                "repeated_steps": self.repeated,
            }
            self.observe(place | values | speed | state, self.task.shown)
            self.repeated = 0
            warning = self.task.warning(values, rows)
            if warning != self.warned:  # once, and not in every step
                tell("warning", f"step {self.done}: {warning or 'as it should be again'}", step=self.done)
            self.warned = warning
        self.masked.add(step, batch.problems)
        if self.done % self.config.log_every == 0:
            self.masked.tell()

    def evaluate(self) -> None:
        """Scores the weights, or their average where there is one; rank 0 keeps the result in the run."""
        if self.average is not None:
            self.average.swap()
        result = validate(
            self.parallel,
            self.spec.eval_data,
            self.agreement,
            rank=self.rank,
            world=self.world,
            device=self.device,
            bf16=self.bf16,
            retry_timeout_s=self.config.data.retry_timeout_s,
            tasks=self.spec.data_tasks,
        )
        if self.average is not None:
            self.average.swap()
        if result is not None:
            self._rate(self.done, result)
            if self.meters is not None:
                self.meters.later(evaluations.keep, self.store, self.done, result)
            scores = {name: float(score.value) for name, score in result.scores.items()}
            sentence = f"evaluation at step {self.done}: {evaluations.line(result)}"
            tell("evaluation", sentence, step=self.done, data=result.data, scores=scores)
            if result.remark:
                tell("warning", result.remark, step=self.done)

    def save(self) -> str:
        """Writes a checkpoint, and uploads it in the background; or the sentence that says why not.

        The run goes on without a checkpoint that could not be written, and tries again at the next one.
        """
        folder = self.local / f"checkpoint-{uuid.uuid4().hex}"
        state = TrainState.of(self.done, self.config, self.data.fingerprint, self.attempts)
        try:
            averaged = self.average.tensors if self.average else None
            checkpoint.save(folder, self.task, self.optimizer, state, averaged)
        except checkpoint.SaveError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if self.rank == 0 and self.done < self.config.total_steps:
                sentence = f"{error}; the run goes on, and tries again at the next checkpoint"
                tell("checkpoint_failed", sentence, step=self.done)
            return str(error)
        rows = self.masked.take() | (self.consumed.take() if self.consumed else {})
        segment = self.meters.close_segment() if self.meters else dict
        self.checkpoints.upload(folder, state, lambda: segment() | rows)
        self.saved, self.uploading = self.done, True
        return ""

    def save_and_wait(self) -> str:
        """Sees to it that a checkpoint of this step is in the store; or the sentence that says why it is not."""
        if self.saved < self.done:
            self.agreement.note(self.save())
        self.agreement.attempt(self.checkpoints.wait)
        self.uploading = False
        return self.agreement.stops(f"step {self.done}")

    def save_before(self, sentence: str) -> str:
        """Saves the steps that are done before the run stops for the reason `sentence`; what became of both."""
        self.agreement.forget()
        self.checkpoints.keeper = False  # these steps may be what went wrong: the checkpoints before them stay
        failed = self.save_and_wait() if self.done else ""
        done = f"the {self.done} steps before it are " + ("not saved: " + failed if failed else "saved")
        return f"{sentence}; {done}" if self.done else sentence

    def publish(self) -> None:
        """Writes the final weights: their average where there is one."""
        tensors = checkpoint.weights_of(self.task)
        if self.average is not None:
            tensors |= {checkpoint.stored_name(n): t for n, t in self.average.tensors.items()}
        weights = whole_state(tensors, keep=self.rank == 0)
        if self.rank == 0:
            self.agreement.attempt(self.checkpoints.retire)
            arguments = self.store, self.task.model, weights, self.config, self.data.schema
            self.agreement.attempt(publish, *arguments)
            if self.checkpoints.best is not None:
                address = self.store.address(name_of(self.checkpoints.best))
                sentence = f"the best evaluation was at step {self.checkpoints.best}: {address}"
                tell("best", sentence, step=self.checkpoints.best)


def _fetch(
    checkpoints: Checkpoints, folder: Path, agreement: Agreement, rank: int, world: int, local_rank: int
) -> tuple[Path | None, str, str]:
    """(folder, attempt, problem): where the newest good checkpoint is on this node, and the name of a new attempt.

    Rank 0 looks for it and fetches it into `folder`; then the first worker of every other node fetches the same.
    """
    name = agreement.attempt(checkpoints.fetch_newest, folder) if rank == 0 else ""
    if stopped := agreement.stops("the start: its checkpoints"):
        return None, "", stopped
    chosen = [name or "", uuid.uuid4().hex[:12]]
    if world == 1:
        return (folder if name else None), chosen[1], ""
    dist.broadcast_object_list(chosen, 0)
    if chosen[0] and rank and local_rank == 0:
        agreement.attempt(checkpoints.fetch_named, chosen[0], folder)
    if stopped := agreement.stops("the start: its checkpoints"):
        return None, "", stopped
    places: list[Path | None] = [None] * world
    dist.all_gather_object(places, folder if local_rank == 0 else None)
    nearest = next(place for place in reversed(places[: rank + 1]) if place is not None)
    return (nearest if chosen[0] else None), chosen[1], ""


def _flush(meters: Meters) -> None:
    """At the end, where how the run ended is already agreed on."""
    flushing = Agreement()
    flushing.attempt(meters.close)
    if flushing.problem:
        tell("warning", f"the last figures are not in the log: {flushing.problem}")


def _workers(schedule: Schedule, step: int, world: int, rank: int) -> Workers:
    shares = [deal(schedule.num_slices(step), world, r) for r in range(world)]
    return Workers(tuple((last - first) * schedule.slice_size for first, last in shares), rank)


def _not_finite(figures: dict[str, Tensor], step: int) -> str:
    values = {name: float(value) for name, value in figures.items()}
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if not bad:
        return ""
    return (
        f"step {step}: {' and '.join(bad)} not finite ({values}); the weights are those of the step before. "
        "Lower optim.peak_lr, look at the rows of this step, or allow some such steps by optim.skip_nonfinite"
    )
