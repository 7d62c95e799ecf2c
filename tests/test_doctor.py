"""What is lacking is said, with its remedy: machines, tokens, storage, a cluster."""

import collections
import resource
import shutil

import pytest

from vlmo_ray import doctor
from vlmo_ray.data.store import Store
from vlmo_ray.doctor import examine, lines, machine
from vlmo_ray.errors import UserError
from vlmo_ray.report.health import Finding

Usage = collections.namedtuple("Usage", "total used free")


def said(found: list[Finding]) -> str:
    return "\n".join(f"{finding.level}: {finding.sentence} {finding.remedy}" for finding in found)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))


def test_memory_disk_and_files(monkeypatch):
    sizes = {"/dev/shm": Usage(64 << 20, 0, 64 << 20)}
    monkeypatch.setattr(shutil, "disk_usage", lambda place: sizes.get(place, Usage(100e9, 97e9, 3e9)))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    found = said(machine())
    assert "bad: /dev/shm has 0.1 GB; decoded rows and NCCL need 4 or more. Docker: --shm-size=8g." in found
    assert "is 97% full: Ray writes nothing there beyond 95 %. Free some, or set TMPDIR" in found
    assert "warning: A process may open 1024 files. ulimit -n 65536" in found
    sizes["/dev/shm"] = Usage(8e9, 0, 8e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: sizes.get(place, Usage(100e9, 85e9, 15e9)))
    found = said(machine())
    assert "good: /dev/shm has 8 GB." in found and "GB free. Free some" in found


def test_gpus(monkeypatch):
    import torch
    import torch.distributed as dist

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "warning: There is no GPU." in said(machine())
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert "bad: There is an NVIDIA driver, and torch" in said(machine())
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "which is built for CPUs. For GPUs, install a CUDA build." in said(machine())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 16)
    found = said(machine())
    assert "good: GPUs: 8, NVIDIA H100" in found and "bad: torch has no NCCL" in found
    assert "warning: 16 CPUs decode images for 8 GPUs." in found


def test_tokens(monkeypatch, tmp_path):
    assert "token" not in said(doctor._ray())
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert f"bad: RAY_AUTH_MODE=token, and there is no token in {tmp_path}/token. Copy it" in said(doctor._ray())
    (tmp_path / "token").write_text("secret")
    assert "token" not in said(doctor._ray())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for mode, words in (("", False), ("token", False), ("disabled", True)):  # a token that is there is used
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        assert ("warning: The cluster at 10.0.0.1:6379 is joined without a token" in said(doctor._ray())) == words
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    (tmp_path / "token").unlink()
    assert "warning: The cluster at 10.0.0.1:6379 is joined without a token" in said(doctor._ray())


def test_another_ray(monkeypatch):
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.49.1" if name == "ray" else real(name))
    assert "bad: Ray is 2.49.1; this version needs 2.60. pip install" in said(doctor._ray())


def test_data_and_storage(scenes, s3_server, monkeypatch):
    found = said(examine(scenes, "s3://vlmo/doctor"))
    assert f"good: {scenes} has 60 rows; one reader gets" in found
    assert "good: s3://vlmo/doctor can be written," in found and not Store("s3://vlmo/doctor").list()
    found = said(examine(storage="s3://no-such-bucket/runs"))
    assert "bad: " in found and "no-such-bucket" in found
    assert "bad: " in said(examine(data="s3://vlmo/no-data"))
    monkeypatch.setattr(Store, "replace", lambda *given, **named: True)
    assert "warning: s3://vlmo/doctor does not support conditional writes" in said(examine(storage="s3://vlmo/doctor"))

    def denied(self, name: str, *more) -> None:
        raise UserError(f"{self.address(name)}: access denied")

    monkeypatch.setattr(Store, "delete", denied)
    found = said(examine(storage="s3://vlmo/doctor"))
    assert "good: s3://vlmo/doctor can be written" in found and "cannot be deleted again: old checkpoints" in found
    monkeypatch.setattr(Store, "write", denied)
    found = said(examine(storage="s3://vlmo/doctor"))
    assert found.count("bad: ") == 1 and "access denied" in found


def test_a_folder_that_was_not_there_is_not_left(tmp_path):
    assert "can be written" in said(examine(storage=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


def test_lines_fit_and_the_worst_are_last():
    found = [Finding("bad", "a " * 100, "do this"), Finding("good", "fine"), Finding("warning", "look", "there")]
    shown = "\n".join(lines(found)).splitlines()
    assert max(map(len, shown)) <= 80 and [line.split()[0] for line in shown if line[0] != " "] == [
        "ok",
        "warning",
        "BAD",
    ]


def test_the_exit_code(vlmo, tmp_path):
    run = vlmo("doctor", "--data", str(tmp_path / "nothing"))
    assert run.returncode == 1 and "nothing" in run.stdout


@pytest.mark.ray
def test_every_node_of_a_cluster(ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    found = said(doctor._nodes())
    assert "Nodes of the cluster: 1." in found and ": /dev/shm has" in found
