"""From a config to a run on a Ray cluster: checks that can be made beforehand, TorchTrainer, recovery settings."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator

from vlmo_ray.config import ClusterConfig, Config, check
from vlmo_ray.data.manifest import check_shards, load_manifest
from vlmo_ray.data.prefetch import user_error
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.session import ray_session
from vlmo_ray.train.checkpoints import Checkpoints
from vlmo_ray.train.lease import lease
from vlmo_ray.train.loop import Job, Notice, train

_LEAST_CPU = 0.1
_STOP = "stop"  # an object in the run: its workers are to save and end
_RAY_RUN = "ray_run"  # holds Ray Train's id of the run


@dataclasses.dataclass(frozen=True)
class Shares:
    """CPUs asked for: by a training worker, and by its data pipeline."""

    worker: float
    data: float


def shares(cluster: ClusterConfig, cpus: float, gpus: float, autoscaling: bool = False) -> Shares:
    """How the cluster's CPUs are divided, so that reading and decoding always have some.

    Ray Train reserves its CPUs first, and a data task that finds none waits for ever without an error: so on
    CPU workers take less than they ask for where that leaves too little, and on GPU a lack is refused.
    """
    where = "the cluster can ever have" if autoscaling else "this cluster has"
    if cluster.data_cpus_per_worker < _LEAST_CPU:
        raise UserError(
            f"cluster.data_cpus_per_worker={cluster.data_cpus_per_worker} leaves no CPU for reading and decoding; "
            "set it to 0.5 or more"
        )
    if cluster.gpus_per_worker:
        if cluster.min_workers * cluster.gpus_per_worker > gpus:
            raise UserError(
                f"{cluster.min_workers} workers with {cluster.gpus_per_worker} GPU each are more than {where} "
                f"({gpus:g} GPUs); lower cluster.min_workers, add nodes, or train on CPUs with "
                "--set cluster.gpus_per_worker=0"
            )
        need = cluster.min_workers * (cluster.cpus_per_worker + cluster.data_cpus_per_worker)
        if need > cpus:
            raise UserError(
                f"{cluster.min_workers} workers need {cluster.min_workers * cluster.cpus_per_worker:g} CPUs and "
                f"{cluster.min_workers * cluster.data_cpus_per_worker:g} for data, more than {where} ({cpus:g}): no "
                "CPU would be left for data. Lower cluster.cpus_per_worker or cluster.data_cpus_per_worker"
            )
        return Shares(cluster.cpus_per_worker, cluster.data_cpus_per_worker)
    if cluster.min_workers * 2 * _LEAST_CPU > cpus:
        raise UserError(
            f"{cluster.min_workers} workers are more than {where} room for ({cpus:g} CPUs, at least {_LEAST_CPU} for "
            "a worker and as much for its data); lower cluster.min_workers or add nodes"
        )
    # an elastic maximum that the cluster cannot reach today must not starve the workers it does have
    workers = max(cluster.min_workers, min(cluster.max_workers, int(cpus / (2 * _LEAST_CPU))))
    data = min(cluster.data_cpus_per_worker, cpus / 2 / workers)
    return Shares(round(min(cluster.cpus_per_worker, cpus / workers - data), 3), round(data, 3))


def cluster_room() -> tuple[float, float, bool]:
    """CPUs and GPUs the cluster has, or may grow to where an autoscaler says so; and whether one does."""
    import ray

    now = ray.cluster_resources()
    most = ray._private.state.state.get_max_resources_from_cluster_config()
    grown = {key: max(now.get(key, 0), (most or {}).get(key) or 0) for key in ("CPU", "GPU")}
    return grown["CPU"], grown["GPU"], most is not None


def _worker(job: Job) -> dict:
    """Runs in every Ray Train worker."""
    import ray.train
    import torch
    from ray.train.v2._internal.execution.context import get_train_context

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

    rank, run = context.get_world_rank(), Store(job.run, job.config.data.patience_s)
    if rank == 0:
        run.write(_RAY_RUN, get_train_context().train_run_context.run_id.encode())

    def notice() -> Notice:
        if ray.train.get_preemption_info() is not None:  # a barrier: every worker calls, and all get the same
            return Notice.PREEMPTED
        return Notice.STOP if rank == 0 and run.exists(_STOP) else Notice.NONE

    outcome = train(job, rank=rank, world=context.get_world_size(), device=device, notice=notice)
    if outcome.preempted:
        # Ray Train takes an end with an error, while a node drains, for the preemption: it starts the workers
        # again, from this very step, without that node. If the workers are gone before its controller has seen
        # the notice, it counts that as one of `cluster.max_failures`.
        raise RuntimeError(f"preempted at {outcome.stopped}")
    return dataclasses.asdict(outcome)


def pretrain(config: Config, data: str, storage: str, name: str | None = None) -> Store:
    """Pre-trains `config` on the data set at `data`; returns the run, `storage`/`name` (default: the recipe's).

    A run of that name that is already there goes on from its newest checkpoint. Raises UserError for everything
    that the caller can mend, most of it before a worker starts.
    """
    check(config)
    name = name or config.name
    manifest = load_manifest(data)
    check_shards(manifest, open_store(data))
    storage_root = open_store(storage, create=True)
    run = open_store(f"{storage.rstrip('/')}/{name}", create=True, patience_s=config.data.patience_s)
    with lease(run), _stop_on_sigterm(run), ray_session(dashboard=True):
        state = Checkpoints(run).newest()
        if state is not None:
            state.continue_with(config, manifest.fingerprint)
            print(f"run {name!r} continues from step {state.step} of {config.total_steps}", flush=True)
        _release(run)
        cpus, gpus, autoscaling = cluster_room()
        cluster = config.cluster
        share = shares(cluster, cpus, gpus, autoscaling)
        rows = schedule_rows(config)
        print(
            f"{config.name}: {config.total_steps} steps, {rows:,} pairs ({rows / manifest.num_rows:.2f} epochs of "
            f"{manifest.num_rows:,}); {cluster.min_workers} to {cluster.max_workers} workers with "
            f"{cluster.gpus_per_worker} GPU and {share.worker:g} CPU each, {share.data:g} CPU each for data",
            flush=True,
        )
        job = Job(config, data, run.uri, manifest.fingerprint, data_cpus=share.data)
        outcome = _fit(job, share, storage_root, name)
    if outcome["stopped"]:
        raise UserError(f"run {name!r} stopped at {outcome['stopped']}")
    return run


@contextlib.contextmanager
def _stop_on_sigterm(run: Store) -> Iterator[None]:
    """A first SIGTERM asks the workers to save and end; a second one ends this process."""
    run.delete(_STOP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(*_) -> None:
        signal.signal(signal.SIGTERM, before)
        print("SIGTERM: the workers save and end; a second one ends them at once", flush=True)
        threading.Thread(target=run.write, args=(_STOP, b""), daemon=True).start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _release(run: Store) -> None:
    """Gives back what an earlier driver of this run, killed, still has reserved; else Ray waits 180 s for it."""
    from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client as coordinator

    if run.exists(_RAY_RUN):
        requester = f"train-{run.read(_RAY_RUN).decode()}"
        coordinator.TrainAutoscalingCoordinatorClient(requester).cancel_resource_request()


def schedule_rows(config: Config) -> int:
    return sum(phase.steps * phase.global_batch for phase in config.phases)


def _fit(job: Job, share: Shares, storage: Store, name: str) -> dict:
    cluster = job.config.cluster
    # After a lost node Ray Train first tries the old size and waits this long before it takes a smaller one. It
    # reads the environment, and carries this variable on to its controller.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)

    # its patched `print` would show every line twice
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    elastic = cluster.min_workers < cluster.max_workers
    resources = {"CPU": share.worker} | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=(cluster.min_workers, cluster.max_workers) if elastic else cluster.max_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
            # a resize restarts all workers from the last checkpoint: not more often than there are some
            elastic_resize_monitor_interval_s=cluster.resize_interval_s,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage.root,
            storage_filesystem=storage.fs,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            # The data pipeline of a killed worker cannot take back what it asked the cluster for: until that lapses,
            # after 180 s unless told, the pipelines of the new workers get less, on a small cluster nothing at all.
            worker_runtime_env={"env_vars": {"RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30"}},
        ),
    )
    try:
        return trainer.fit().return_value
    except TrainingFailedError as error:
        if found := user_error(error):
            raise found from error
        raise
