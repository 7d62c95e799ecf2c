"""From a config to a run on a Ray cluster: checks, the lease, and what the driver needs to start runs of Ray Train."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

from vlmo_ray.config import ClusterConfig, Config, check
from vlmo_ray.data.manifest import check_shards, load_manifest
from vlmo_ray.data.mix import addresses, load_data
from vlmo_ray.data.order import schedule_of
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.launch.driver import Driver
from vlmo_ray.launch.feed import feeding
from vlmo_ray.launch.ray_private import infeasible_groups, keep_stats_here
from vlmo_ray.launch.resources import Share, living_nodes, share
from vlmo_ray.launch.showing import showing
from vlmo_ray.launch.stop import Stop, Stopped
from vlmo_ray.launch.trackers import check_trackers
from vlmo_ray.launch.worker import work
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.events import console, keeping, note, tell
from vlmo_ray.runs.lease import lease
from vlmo_ray.runs.load import published, settled
from vlmo_ray.runs.scratch import scratch
from vlmo_ray.session import ray_session
from vlmo_ray.train.build import RunSpec


def fit(
    config: Config,
    data: str,
    storage: str,
    name: str | None = None,
    accept_changes: bool = False,
    eval_data: str = "",
    stop: threading.Event | None = None,
    parts: int = 1,
) -> Store:
    """Trains `config` on the data at `data`; returns the run, `storage`/`name` (default: the recipe's).

    `data` is a data set, or several, separated by commas: a batch then has slices of each (`data.weights`).

    A run of that name that is already there goes on from its newest checkpoint; if data or settings have changed, only
    with `accept_changes`. A finished run is returned as it is. `eval_data` names the data set that is evaluated
    every `evaluate_every` steps. When `stop` is set, or at the first signal to this process, the workers save and
    end, which raises `Stopped`. `parts` is the number of runs that share the cluster. Raises UserError for everything
    that the caller can mend, most of it before a worker starts.
    """
    check(config)
    config, data, eval_data = absolute(config, data, eval_data)
    name = name or config.name
    sources = load_data(data, config.data.weights)
    for manifest in sources.manifests:
        check_shards(manifest, open_store(manifest.uri))
    sources.order(config.seed, schedule_of(config), config.data.shuffle_steps)  # whether they fit into a batch
    check_evaluation(config, eval_data)
    check_trackers(config.trackers)
    open_store(storage, create=True)
    run = open_store(f"{storage.rstrip('/')}/{name}", create=True, retry_timeout_s=config.data.retry_timeout_s)
    asked = Stop(run, stop)
    with contextlib.ExitStack() as stack:
        stack.enter_context(console("json" if config.log_json else "text"))
        token = stack.enter_context(lease(run, asked.lose))
        stack.enter_context(keeping(run, "driver"))
        stack.push(_note_the_end)
        stack.enter_context(ray_session(dashboard=True))
        stack.enter_context(asked.on_signals())  # after Ray has set signal handlers of its own
        state = Checkpoints(run).newest()
        if state is not None:
            changed = state.continue_with(config, sources.fingerprint, accept_changes)
            if state.step == config.total_steps and published(run, state):
                tell("finished", f"run {name!r} is finished already: nothing is left to do")
                return run
            sentence = f"run {name!r} continues from step {state.step} of {config.total_steps}"
            tell("continued", sentence, step=state.step)
            if changed:
                tell("changed", f"from here on with other settings: {'; '.join(changed)}", changes=changed)
        else:
            config = dataclasses.replace(config, init=settled(config.init))  # the same for all workers and starts
        cluster = config.cluster
        autoscaling = infeasible_groups() is not None
        if autoscaling:
            keep_stats_here()
        each = share(cluster, living_nodes(), autoscaling, parts)
        rows = schedule_rows(config)
        tell(
            "start",
            f"{config.name}: {config.total_steps} steps, {rows:,} samples ({rows / sources.num_rows:.2f} epochs of "
            f"{sources.num_rows:,}); {cluster.min_workers} to {cluster.max_workers} workers with "
            f"{cluster.gpus_per_worker} GPU and {each.cpus:g} CPU each, of that for {each.data_tasks} data "
            f"tasks; room for {each.room}{' now, the cluster adds nodes' if autoscaling else ''}",
            run=run.uri,
            total_steps=config.total_steps,
            data=data,
            eval_data=eval_data,
        )
        spec = RunSpec(
            config,
            data,
            run.uri,
            sources.fingerprint,
            eval_data,
            data_tasks=each.data_tasks,
            accept_changes=accept_changes,
        )
        step = state.step if state else 0
        with scratch() as folder, feeding(run, config), showing(run, config, step) as drawn:
            start = functools.partial(_start, functools.partial(work, spec, token, drawn), cluster, each, name, folder)
            phases = [(phase.steps, phase.global_batch // config.slice_size) for phase in config.phases]
            outcome = Driver(cluster, each, autoscaling, run, asked, start, phases).train()
            if outcome is None:
                raise Stopped(
                    f"run {name!r} ended on request while it had no workers; the same command goes on from its newest "
                    "checkpoint"
                )
            if outcome["stopped"]:
                raise (Stopped if outcome["requested"] else UserError)(f"run {name!r} stopped at {outcome['stopped']}")
        tell("finished", f"run {name!r}: all {config.total_steps} steps are done", step=config.total_steps)
        _write_report(run)
        return run


def _write_report(run: Store) -> None:
    """Beside the metrics; a run that is done does not fail for it."""
    from vlmo_ray.report.page import report  # takes a second

    try:
        tell("report", f"the report: {report([run.uri], pictures=False)}")
    except Exception as error:  # whatever it is, the run has everything
        tell("report", f"there is no report ({type(error).__name__}: {error}); vlmo report {run.uri} makes it")


def _note_the_end(kind: type[BaseException] | None, error: BaseException | None, *_) -> None:
    """What ends a run before its last step is an event too; whoever called shows the sentence."""
    if error is not None:
        note("stopped" if isinstance(error, Stopped) else "failed", str(error) or type(error).__name__)


def absolute(config: Config, data: str, eval_data: str) -> tuple[Config, str, str]:
    """The same with absolute addresses: workers have another working directory."""
    init, eval_data = (uri and Store(uri).uri for uri in (config.init, eval_data))
    data = ",".join(Store(address).uri for address in addresses(data))
    return dataclasses.replace(config, init=init), data, eval_data


def check_evaluation(config: Config, eval_data: str) -> None:
    if bool(eval_data) != bool(config.evaluate_every):
        raise UserError(
            f"evaluate_every={config.evaluate_every} and --eval-data={eval_data!r} go together: give both, or neither"
        )
    if eval_data:
        load_manifest(eval_data)


def schedule_rows(config: Config) -> int:
    return sum(phase.steps * phase.global_batch for phase in config.phases)


def _start(
    work: Callable[[], dict], cluster: ClusterConfig, each: Share, name: str, folder: Path, size: int
) -> concurrent.futures.Future:
    """Starts a run of Ray Train with `size` workers; its result is what `work` returns on the first of them.

    Ray Train's own files go to `folder` on this node: it keeps nothing that a later start could need.
    """
    # How long Ray Train waits for the workers' resources, and how often it looks after them. Ray Train reads the
    # environment, and carries these variables on to its controller.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # its patched `print` would show every line twice
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from vlmo_ray.launch.group import GroupConfig

    trainer = TorchTrainer(
        work,
        torch_config=GroupConfig("nccl" if cluster.gpus_per_worker else "gloo"),  # pyright: ignore[reportArgumentType]  # any BackendConfig will do
        scaling_config=ScalingConfig(
            num_workers=size,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={"CPU": each.cpus}
            | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
        ),
    )
    future: concurrent.futures.Future = concurrent.futures.Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit().return_value)
        except BaseException as error:
            future.set_exception(error)

    # Outside the main thread Ray Train leaves Ctrl-C to us. A daemon, so that a second signal can end the process.
    threading.Thread(target=fit, name="ray-train", daemon=True).start()
    return future
