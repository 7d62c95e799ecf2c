"""Several raylets on this machine, driven from a process of their own; commands come in as lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any


class Nodes:
    """The test's side: start, kill and drain nodes of one cluster."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.address = self._answer()

    def _answer(self) -> Any:
        for line in self._process.stdout:
            if line.startswith("> "):
                return json.loads(line[2:])
        raise RuntimeError(f"the cluster's process ended with {self._process.wait()}")

    def _ask(self, *command: Any) -> Any:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def add(self) -> str:
        """A new node; its id."""
        return self._ask("add")

    def kill(self, node: str) -> None:
        """Its raylet and so all its workers, without a word."""
        self._ask("kill", node)

    def drain(self, node: str, seconds: float) -> None:
        """A notice that it will be taken away."""
        self._ask("drain", node, seconds)


@contextlib.contextmanager
def nodes(environment: dict[str, str]) -> Iterator[Nodes]:
    """A cluster whose head has no CPU; every process of it has `environment`."""
    command = [sys.executable, __file__]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Nodes(process)
        finally:
            process.stdin.close()  # it then shuts its cluster down
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def main() -> None:
    from ray._raylet import GcsClient
    from ray.cluster_utils import Cluster
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason
    from ray.util import get_node_ip_address

    def say(answer: Any) -> None:
        print(f"> {json.dumps(answer)}", flush=True)

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    # for Ray Train's cleaner, which else asks the newest cluster of this machine whether a controller lives
    os.environ["RAY_ADDRESS"] = f"{get_node_ip_address()}:{port}"
    # with the dashboard: Ray Train asks it whether a killed driver's controller lives
    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": True, "dashboard_port": 0}
    head["gcs_server_port"] = port
    cluster = Cluster(initialize_head=True, head_node_args=head)
    running = {}
    assert cluster.address == os.environ["RAY_ADDRESS"]
    say(cluster.address)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if name == "add":
            node = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
            running[node.node_id] = node
            say(node.node_id)
        elif name == "kill":
            cluster.remove_node(running.pop(arguments[0]), allow_graceful=False)
            say(True)
        elif name == "drain":
            node, seconds = arguments
            deadline = int((time.time() + seconds) * 1000)
            reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            say(GcsClient(cluster.address).drain_node(node, reason, "spot", deadline))
    cluster.shutdown()


if __name__ == "__main__":
    main()
