"""What this machine, or the cluster that it joins, lacks for a run: each finding with its remedy."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import resource
import shutil
import tempfile
import textwrap
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.store import Store, open_store
from vlmo_ray.errors import UserError
from vlmo_ray.report.health import Finding

_SHM_GB, _DISK_GB = 4, 20  # for three windows of rows; for checkpoints and what Ray writes
_FILES = 4096  # open at once
_CPUS_PER_GPU = 8  # for decoding
_RATE_BYTES = 32 << 20  # that are read, or written, for a rate


def examine(data: str = "", storage: str = "") -> list[Finding]:
    """Looks at this machine, or at every node of the cluster of RAY_ADDRESS, and at the given storage."""
    found = [*_ray(), *_nodes()]
    for what, uri in ((_data, data), (_storage, storage)):
        if uri:
            with _told(found):
                found += what(uri)
    return found


def lines(found: list[Finding], width: int = 80) -> Iterator[str]:
    """For a console: the worst come last, where one looks."""
    marks = {"good": "ok", "warning": "warning", "bad": "BAD"}
    for level in ("good", "warning", "bad"):
        for finding in found:
            if finding.level == level:
                text = " ".join([finding.sentence, finding.remedy]).strip()
                first = f"{marks[level]:<9}"
                yield textwrap.fill(text, width, initial_indent=first, subsequent_indent=" " * 9)


@contextlib.contextmanager
def _told(found: list[Finding]) -> Iterator[None]:
    """What a check cannot do is a finding; its sentence has the remedy."""
    try:
        yield
    except (UserError, FileNotFoundError) as error:
        found.append(Finding("bad", f"{error}."))


def _ray() -> list[Finding]:
    wanted = next(r for r in importlib.metadata.requires("vlmo-ray") or () if r.startswith("ray["))
    version = importlib.metadata.version("ray")
    low = wanted.partition(">=")[2].split(",")[0]
    found = [Finding("good", f"Ray {version}.")]
    if version.split(".")[:2] != low.split(".")[:2]:
        found = [Finding("bad", f"Ray is {version}; this version needs {low}.", "pip install -e .")]
    address = os.environ.get("RAY_ADDRESS", "")
    mode, has_token = os.environ.get("RAY_AUTH_MODE", ""), os.environ.get("RAY_AUTH_TOKEN") or _token_file().is_file()
    if mode == "token" and not has_token:
        remedy = "Copy it from the head node, or make one: ray get-auth-token --generate."
        found.append(Finding("bad", f"RAY_AUTH_MODE=token, and there is no token in {_token_file()}.", remedy))
    elif address and (mode == "disabled" or not has_token):  # without a mode, Ray uses a token that is there
        sentence = f"The cluster at {address} is joined without a token: whoever reaches it can run code on its nodes."
        found.append(Finding("warning", sentence, "Set RAY_AUTH_MODE=token (docs/cluster.md)."))
    return found


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _nodes() -> list[Finding]:
    """This machine, or each node; what several nodes have in common is said once."""
    if not os.environ.get("RAY_ADDRESS"):
        return machine()
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

    from vlmo_ray.session import ray_session

    found: list[Finding] = []
    with _told(found), ray_session():
        nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
        look = ray.remote(num_cpus=0)(machine)
        places = {node: Affinity(node, soft=False) for node in nodes}
        asked = [(host, look.options(scheduling_strategy=places[node]).remote()) for node, host in nodes.items()]
        found.append(Finding("good", f"Nodes of the cluster: {len(nodes)}."))
        hosts: dict[Finding, list[str]] = defaultdict(list)
        for host, reference in asked:
            for finding in ray.get(reference):
                hosts[finding].append(host)
        for finding, where in hosts.items():
            some = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
            found.append(Finding(finding.level, f"{some}: {finding.sentence}", finding.remedy))
    return found


def machine() -> list[Finding]:
    """What the machine of this process has and lacks."""
    return [*_gpus(), *_memory(), *_disk(), *_limits()]


def _gpus() -> list[Finding]:
    import torch
    import torch.distributed as dist

    version = f"Python has torch {torch.__version__}"
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return [Finding("warning", f"{version}, which is built for CPUs.", "For GPUs, install a CUDA build.")]
        if shutil.which("nvidia-smi"):
            remedy = "Its driver may be older than the build needs: compare nvidia-smi with torch.version.cuda."
            return [Finding("bad", f"There is an NVIDIA driver, and torch {torch.__version__} sees no GPU.", remedy)]
        return [Finding("warning", "There is no GPU.", "Recipes for CPUs: tiny, demo, small_photos, *_tiny.")]
    count = torch.cuda.device_count()
    names = ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)}))
    found = [Finding("good", f"GPUs: {count}, {names}; {version}.")]
    if count > 1 and not (dist.is_available() and dist.is_nccl_available()):
        found.append(
            Finding("bad", "torch has no NCCL, so several GPUs cannot work together.", "Install a CUDA build.")
        )
    cpus = os.cpu_count() or 1
    if cpus < _CPUS_PER_GPU * count:
        sentence = f"{cpus} CPUs decode images for {count} GPUs."
        found.append(Finding("warning", sentence, "vlmo plan RECIPE --gpus N says how many a recipe needs."))
    return found


def _memory() -> list[Finding]:
    place = "/dev/shm"
    if not os.path.isdir(place):
        return [Finding("good", "There is no /dev/shm: Ray keeps its objects in files.")]
    size = shutil.disk_usage(place).total / 1e9
    if size < _SHM_GB:
        remedy = "Docker: --shm-size=8g. Kubernetes: an emptyDir of medium Memory at /dev/shm (cluster/kuberay)."
        return [Finding("bad", f"{place} has {size:.1f} GB; decoded rows and NCCL need {_SHM_GB} or more.", remedy)]
    return [Finding("good", f"{place} has {size:.0f} GB.")]


def _disk() -> list[Finding]:
    folder = tempfile.gettempdir()
    usage = shutil.disk_usage(folder)
    free, share = usage.free / 1e9, usage.free / usage.total
    remedy = "Free some, or set TMPDIR and `ray start --temp-dir` to another disk."
    if share < 0.05:
        return [Finding("bad", f"{folder} is {1 - share:.0%} full: Ray writes nothing there beyond 95 %.", remedy)]
    if free < _DISK_GB:
        return [Finding("warning", f"{folder} has {free:.0f} GB free.", remedy)]
    return [Finding("good", f"{folder} has {free:.0f} GB free.")]


def _limits() -> list[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FILES:
        return [Finding("warning", f"A process may open {files} files.", "ulimit -n 65536 before `ray start`.")]
    return []


def _data(uri: str) -> list[Finding]:
    manifest = load_manifest(uri)
    store = Store(manifest.uri)
    chunk = manifest.chunk(0)
    wanted = min(_RATE_BYTES, store.size(chunk.shard) or 0)
    seconds = _seconds(lambda: store.read(chunk.shard, 0, wanted))
    each = wanted / 1e6 / seconds
    sentence = f"{uri} has {manifest.num_rows:,} rows; one reader gets {each:,.0f} MB/s of it."
    return [Finding("good", sentence)]


def _storage(uri: str) -> list[Finding]:
    """Writes, reads, lists, replaces and deletes an object."""
    there = Store(uri).is_s3 or os.path.isdir(Store(uri).uri)
    store, name, content = open_store(uri, create=True), f"vlmo-doctor-{uuid.uuid4().hex}", os.urandom(_RATE_BYTES)
    found: list[Finding] = []
    with _told(found):
        written = _RATE_BYTES / 1e6 / _seconds(lambda: store.write(name, content))
        read = _RATE_BYTES / 1e6 / _seconds(lambda: store.read(name))
        if store.read(name) != content or name not in store.list(name):
            found.append(Finding("bad", f"{uri} does not give back what was written to it.", "Use another server."))
        else:
            found.append(Finding("good", f"{uri} can be written, {written:,.0f} MB/s, and read, {read:,.0f} MB/s."))
        if store.is_s3 and store.replace(name, b"", version='"of no object"'):
            remedy = "Never start one run from two places at the same moment."
            sentence = f"{uri} does not support conditional writes: a run is guarded by looking twice."
            found.append(Finding("warning", sentence, remedy))
    try:
        store.delete(name)
        left = store.exists(name)
    except UserError:
        left = not any(finding.level == "bad" for finding in found)  # else nothing was written
    if left:
        sentence = f"{store.address(name)} cannot be deleted again: old checkpoints would stay."
        found.append(Finding("bad", sentence, "Allow s3:DeleteObject, and delete it by hand."))
    if not there:
        os.rmdir(store.uri)
    return found


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return max(time.perf_counter() - began, 1e-9)
