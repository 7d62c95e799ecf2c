"""From a config to a run on a Ray cluster: checks that can be made beforehand, TorchTrainer, recovery settings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
import threading
from collections.abc import Iterator

from vlmo_ray.config import ClusterConfig, Config, check
from vlmo_ray.data.manifest import check_shards, load_manifest
from vlmo_ray.data.prefetch import user_error
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.lease import lease
from vlmo_ray.runs.load import published
from vlmo_ray.session import ray_session
from vlmo_ray.train.loop import Job, Notice, train

_LEAST_CPUS = 0.1875  # of a CPU worker with its data
_STOP = "stop"  # an object in the run: its workers are to save and end
_RESIZE = "resize"  # likewise, and they are started again, as many as there is room for
_RAY_RUN = "ray_run"  # holds Ray Train's id of the run


@dataclasses.dataclass(frozen=True)
class Share:
    """What a worker is given of the cluster."""

    cpus: float  # reserved on its node, for itself and its data tasks
    data_tasks: int  # at once
    room: int  # for how many workers there is room now, or can ever be


@dataclasses.dataclass(frozen=True)
class Node:
    cpus: float
    gpus: float = 0.0


def share(cluster: ClusterConfig, nodes: list[Node], autoscaling: bool = False) -> Share:
    """What each worker reserves on one of `nodes`; UserError if there is no room for `min_workers` of that.

    A worker's data tasks run on its node and under its reservation, asking for no CPU of their own, so they always have
    theirs. Without GPUs a worker takes less than it asks for where else not even `min_workers` would have room.
    """
    where = "the cluster can ever have" if autoscaling else "this cluster has"
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    # sixteenths are exact: Ray divides sums of these with floor division
    need = math.ceil(16 * (cluster.cpus_per_worker + cluster.data_cpus_per_worker)) / 16
    if cluster.gpus_per_worker:
        if cluster.min_workers * cluster.gpus_per_worker > gpus:
            raise UserError(
                f"{cluster.min_workers} workers with {cluster.gpus_per_worker} GPU each are more than {where} "
                f"({gpus:g} GPUs); lower cluster.min_workers, add nodes, or train on CPUs with "
                "--set cluster.gpus_per_worker=0"
            )
        found = Share(need, cluster.data_cpus_per_worker, _room(nodes, need, cluster.gpus_per_worker))
        if cluster.min_workers > found.room:
            raise UserError(
                f"{cluster.min_workers} workers with {cluster.cpus_per_worker:g} CPUs and "
                f"{cluster.data_cpus_per_worker} for data each are more than {where} room for: {found.room}, with "
                f"{cpus:g} CPUs on {len(nodes)} nodes. Lower cluster.cpus_per_worker or cluster.data_cpus_per_worker"
            )
        return found
    pieces = {
        math.floor(16 * node.cpus / k) / 16
        for node in nodes
        for k in range(1, int(node.cpus / _LEAST_CPUS) + 1)
    }
    for size in sorted({need} | {size for size in pieces if size < need}, reverse=True):
        if (room := _room(nodes, size)) >= cluster.min_workers:
            return Share(size, max(1, round(size / need * cluster.data_cpus_per_worker)), room)
    raise UserError(
        f"{cluster.min_workers} workers are more than {where} room for ({cpus:g} CPUs, at least {_LEAST_CPUS} for "
        "a worker with its data); lower cluster.min_workers or add nodes"
    )


def _room(nodes: list[Node], cpus: float, gpus: int = 0) -> int:
    """How many workers of that size fit, each on one node."""
    return sum(int(min(node.cpus // cpus, node.gpus // gpus if gpus else math.inf)) for node in nodes)


def cluster_nodes() -> tuple[list[Node], bool]:
    """The living nodes, or where an autoscaler says how far the cluster may grow, that as one; and whether one does."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = ray._private.state.state.get_max_resources_from_cluster_config()
    if most is None:
        return [Node(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes], False
    grown = {key: max(sum(n.get(key, 0) for n in nodes), most.get(key) or 0) for key in ("CPU", "GPU")}
    return [Node(grown["CPU"], grown["GPU"])], True


def _worker(job: Job) -> dict:
    """Runs in every Ray Train worker."""
    import ray.exceptions
    import ray.train
    import torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        on_node = context.get_local_world_size()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // on_node))

    print(
        f"worker {context.get_world_rank()} of {context.get_world_size()}: process {os.getpid()} on "
        f"{os.uname().nodename}, {device}",
        flush=True,
    )

    rank, run = context.get_world_rank(), Store(job.run, job.config.data.retry_timeout_s)
    if rank == 0:
        run.delete(_RESIZE)

    def notice() -> Notice:
        # a barrier: every worker calls, and all get the same
        going = ray.train.get_preemption_info() is not None
        if rank == 0 and run.exists(_STOP):
            return Notice.STOP
        if going:
            return Notice.PREEMPTED
        return Notice.RESIZE if rank == 0 and run.exists(_RESIZE) else Notice.NONE

    outcome = train(job, rank=rank, world=context.get_world_size(), device=device, notice=notice)
    if outcome.again:
        # This is how Ray Train knows an end by preemption, which it does not count as a failure: it starts workers
        # again, as many as there is room for, from this very step. (By keyword the error would not survive pickling.)
        raise ray.exceptions.RayActorError(None, f"to start again, ended at {outcome.stopped}", False, True)
    return dataclasses.asdict(outcome)


def pretrain(
    config: Config, data: str, storage: str, name: str | None = None, accept_changes: bool = False
) -> Store:
    """Pre-trains `config` on the data set at `data`; returns the run, `storage`/`name` (default: the recipe's).

    A run of that name that is already there goes on from its newest checkpoint; if data or settings have changed, only
    with `accept_changes`. One that is finished is returned as it is. Raises UserError for everything that the caller
    can mend, most of it before a worker starts.
    """
    check(config)
    name = name or config.name
    manifest = load_manifest(data)
    check_shards(manifest, open_store(data))
    storage_root = open_store(storage, create=True)
    run = open_store(
        f"{storage.rstrip('/')}/{name}", create=True, retry_timeout_s=config.data.retry_timeout_s
    )
    lost: list[str] = []  # why this process may not train the run any more
    # Ray sets signal handlers of its own
    with lease(run, functools.partial(_end, lost)), ray_session(dashboard=True), _stop_on_signals(run, lost):
        if run.exists(_RAY_RUN):  # of a driver that did not end by itself
            _release(run.read(_RAY_RUN).decode())
        state = Checkpoints(run).newest()
        if state is not None:
            changed = state.continue_with(config, manifest.fingerprint, accept_changes)
            if state.step == config.total_steps and published(run, state):
                print(f"run {name!r} is finished already: nothing is left to do", flush=True)
                return run
            print(f"run {name!r} continues from step {state.step} of {config.total_steps}", flush=True)
            if changed:
                print(f"from here on with other settings: {'; '.join(changed)}", flush=True)
        cluster = config.cluster
        each = share(cluster, *cluster_nodes())
        rows = schedule_rows(config)
        print(
            f"{config.name}: {config.total_steps} steps, {rows:,} pairs ({rows / manifest.num_rows:.2f} epochs of "
            f"{manifest.num_rows:,}); {cluster.min_workers} to {cluster.max_workers} workers with "
            f"{cluster.gpus_per_worker} GPU and {each.cpus:g} CPU each, of that for {each.data_tasks} data "
            f"tasks; room for {each.room}",
            flush=True,
        )
        job = Job(
            config,
            data,
            run.uri,
            manifest.fingerprint,
            data_tasks=each.data_tasks,
            accept_changes=accept_changes,
        )
        outcome = _fit(job, each.cpus, storage_root, name, run)
    if outcome is None:
        raise UserError(
            f"run {name!r} ended on request while it had no workers; the same command goes on from its newest "
            "checkpoint"
        )
    if outcome["stopped"]:
        raise UserError(f"run {name!r} stopped at {outcome['stopped']}")
    return run


def _end(lost: list[str], reason: str) -> None:
    """Ends the main thread's training, from another thread."""
    lost.append(reason)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _stop_on_signals(run: Store, lost: list[str]) -> Iterator[None]:
    """A first SIGTERM or SIGINT (Ctrl-C) asks the run to save and end; a second one ends this process.

    The run of which the lease is `lost` is asked for nothing: it is another's.
    """
    run.delete(_STOP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _) -> None:
        if lost:
            raise KeyboardInterrupt  # a UserError would be lost in what Ray waits for
        restore()
        name = signal.Signals(number).name
        print(f"{name}: the workers save and end; a second one ends them at once", flush=True)
        threading.Thread(target=run.write, args=(_STOP, b""), daemon=True).start()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        if lost:
            raise UserError(lost[0]) from None
        raise
    finally:
        restore()


def _release(ray_run: str) -> None:
    """Gives back what a run of Ray Train that did not end by itself has reserved; else Ray waits 180 s for it."""
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as coordinator

    coordinator.TrainAutoscalingCoordinatorClient(f"train-{ray_run}").cancel_resource_request()


def _asked(run: str, what: str) -> bool:
    """Whether `what` is asked of the run; no, if its storage cannot tell: the workers say what is wrong with it."""
    try:
        return Store(run).exists(what)
    except UserError:
        return False


def _ask(run: str, what: str) -> None:
    """Asks `what` of the run, if its storage is there."""
    with contextlib.suppress(UserError):
        Store(run).write(what, b"")


def schedule_rows(config: Config) -> int:
    return sum(phase.steps * phase.global_batch for phase in config.phases)


def _fit(job: Job, cpus: float, storage: Store, name: str, run: Store) -> dict | None:
    cluster = job.config.cluster
    # How long Ray Train waits for the resources of the size it has decided on before it looks again. It reads the
    # environment, and carries this variable on to its controller.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)

    # its patched `print` would show every line twice
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from vlmo_ray.launch.trainer import Trainer

    elastic = cluster.min_workers < cluster.max_workers
    resources = {"CPU": cpus} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    trainer = Trainer(
        _worker,
        train_loop_config=job,
        asked_to_end=functools.partial(_asked, run.uri, _STOP),
        ask_to_resize=functools.partial(_ask, run.uri, _RESIZE),
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.max_workers) if elastic else cluster.max_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=cluster.resize_interval_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.root,
            storage_filesystem=storage.fs,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    # before anything is reserved under it, as this process may be killed at any time
    ray_run = trainer.train_run_context.run_id
    run.write(_RAY_RUN, ray_run.encode())
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        if found := first_user_error(error):
            raise found from error
        raise
    except (KeyboardInterrupt, SystemExit):  # a second signal, or the lease is lost
        _release(ray_run)
        raise


def first_user_error(error: Exception) -> UserError | None:
    """The `UserError` behind Ray Train's error, of a worker or of its controller; None if there is none."""
    failures = [getattr(error, "controller_failure", None), *getattr(error, "worker_failures", {}).values()]
    return next(filter(None, map(user_error, failures)), None)
