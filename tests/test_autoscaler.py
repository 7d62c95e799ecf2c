"""Ray's own autoscaler with made-up nodes: an elastic run on a cluster that has none yet.

The oracle is an undisturbed run in one process, as for the other disturbed runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from chaos_run import Command, Place, config_of

from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.launch.sweep import read_sweep

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.chaos, pytest.mark.full]

HEAD = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # what the provider calls it
IDLE_S = 12


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


class Autoscaled:
    """A head whose autoscaler starts nodes of 2 CPUs, up to four, as processes of this machine."""

    def __init__(self, folder: Path, address: str):
        self.folder, self.address = folder, address

    def raylets(self) -> list[int]:
        """Process ids of the nodes that are up, without the head."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                words = (place / "cmdline").read_bytes().split(b"\0")
                if words[0].endswith(b"/raylet/raylet") and str(self.folder).encode() in b" ".join(words):
                    own = f"RAY_OVERRIDE_NODE_ID_FOR_TESTING={HEAD}".encode()
                    if own not in (place / "environ").read_bytes().split(b"\0"):
                        found.append(int(place.name))
        return found


@contextlib.contextmanager
def autoscaled(folder: Path, environment: dict[str, str]) -> Iterator[Autoscaled]:
    from ray.util import get_node_ip_address

    ip, (port, dashboard, *ports) = get_node_ip_address(), free_ports(8)
    worker = {"resources": {"CPU": 2, "object_store_memory": 80 << 20}, "node_config": {}, "max_workers": 4}
    none: dict[str, list | dict] = {name: {} for name in ("auth", "docker", "file_mounts")}
    phases = ("", "head_", "worker_")
    none |= {f"{phase}setup_commands": [] for phase in phases}
    none |= {f"{phase}start_ray_commands": [] for phase in phases[1:]}
    none |= {"cluster_synced_files": [], "initialization_commands": []}
    cluster = {
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD,
            "gcs_address": f"{ip}:{port}",
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": worker | {"min_workers": 0},
        },
        "head_node_type": HEAD_TYPE,
        **none,
    }
    (folder / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    own = environment | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        "AUTOSCALER_METRIC_PORT": str(ports[4]),
        "DASHBOARD_METRIC_PORT": str(ports[5]),
    }
    names = (
        "ray-client-server-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "metrics-export-port",
    )
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=0"]
    command += [f"--dashboard-port={dashboard}", *(f"--{n}={p}" for n, p in zip(names, ports, strict=False))]
    command += ["--object-store-memory=80000000", f"--temp-dir={folder}/ray", "--disable-usage-stats"]
    command += [f"--autoscaling-config={folder}/cluster.yaml"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            until = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=5).close()
                    break
                assert process.poll() is None and time.monotonic() < until, (folder / "head.log").read_text()
                time.sleep(0.5)
            yield Autoscaled(folder, f"{ip}:{port}")
        finally:
            process.terminate()  # the made-up nodes end with it
            try:
                process.wait(30)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def gone(cluster: Autoscaled) -> None:
    """Waits until all nodes have left, as they are idle."""
    until = time.monotonic() + 90
    while cluster.raylets():
        assert time.monotonic() < until, "idle nodes have not left"
        time.sleep(1)


@pytest.fixture
def command(bucket, s3_server, tmp_path_factory) -> Iterator[Command]:
    folder = tmp_path_factory.mktemp("as")  # short: Ray's sockets have names of 107 characters at most
    config = config_of(120)
    write_dataset(f"{bucket}/data", records(7, 500, image_size=16), rows_per_group=20, groups_per_shard=5)
    environment = os.environ | {
        "PYTHONUNBUFFERED": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # nothing is left to drain when the test ends the head
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    environment.pop("RAY_ADDRESS", None)
    with autoscaled(folder, environment) as cluster:
        place = Place(cluster, None, environment | {"RAY_ADDRESS": cluster.address}, config, f"{bucket}/data", [])
        command = Command(place, "autoscaled", folder)
        try:
            yield command
        finally:
            command.end()


def until_three(command: Command) -> None:
    """The workers rest until there are nodes for three."""
    while len(command.workers()) < 3:
        command.rest_until_resized()


def test_an_empty_cluster_grows_loses_a_node_and_shrinks(command):
    cluster = command.place.nodes
    assert cluster.raylets() == []
    command.start()
    command.wait_for(lambda: "worker 0 of" in command.output, "a worker", 180)
    until_three(command)
    command.reach(20)
    victim = cluster.raylets()[0]
    os.kill(victim, signal.SIGKILL)
    command.wait_for(lambda: "starting again" in command.output or "lost a node" in command.output, "a failure")
    started = command.output.count("worker 0 of")
    command.wait_for(lambda: command.output.count("worker 0 of") > started, "a new start", 180)
    until_three(command)
    assert victim not in cluster.raylets() and len(cluster.raylets()) >= 3
    command.finish()  # curve, weights and audit are those of the undisturbed run
    assert 3 in command.sizes() and "resumed at step" in command.output
    gone(cluster)


def test_a_sweep_grows_and_shrinks_the_cluster(command):
    """A node for each of two trials at once, none before and none after."""
    place = command.place
    storage = place.data.rpartition("/")[0]
    given = ["--data", place.data, "--storage", storage, "--name", "sweep", "--trials", "3", "--at-once", "2"]
    given += ["--space", "optim.peak_lr=1e-4,1e-3,2e-3", "--no-prune"]
    fields = {
        "model.image_size": 16, "phases": [[40, 8]], "log_every": 10, "micro_batch": 8, "slice_size": 4,
        "cluster.max_workers": 1, "cluster.cpus_per_worker": 1,
    }  # fmt: skip
    given += [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]
    assert place.nodes.raylets() == []
    log = place.nodes.folder / "sweep.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "vlmo_ray", "tune", "tiny", *given],
            env=place.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        most, until = 0, time.monotonic() + 300
        while process.poll() is None and time.monotonic() < until:
            most = max(most, len(place.nodes.raylets()))
            time.sleep(0.5)
        assert process.poll() is not None, "the sweep has not ended"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    output = log.read_text()
    assert process.returncode == 0, output
    sweep = read_sweep(Store(f"{storage}/sweep"))
    assert [(trial.state, trial.step) for trial in sweep.trials] == [("finished", 40)] * 3, output
    assert most == 2
    gone(place.nodes)
