"""One program at a time on a run: the second is refused, the dead one's place is taken."""

import json
import subprocess
import sys
import textwrap

import pytest

from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.train import lease as module
from vlmo_ray.train.lease import lease

HOLD = """
    import sys, time
    from vlmo_ray.data.store import Store
    from vlmo_ray.train.lease import lease
    with lease(Store(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_refused_and_takes_over_from_the_dead(tmp_path, holder):
    run = Store(str(tmp_path))
    with pytest.raises(
        UserError, match=rf"already being trained, by process {holder.pid} on .*another --name"
    ):
        with lease(run):
            pass
    holder.kill()
    holder.wait()
    with lease(run):
        assert run.exists("lease.json")
    assert not run.exists("lease.json")


def test_another_machines_lease_lapses_unless_it_is_renewed(tmp_path, monkeypatch):
    run = Store(str(tmp_path))
    with lease(run):
        written = json.loads(run.read("lease.json"))
    elsewhere = written | {"host": "far-away"}
    run.write("lease.json", json.dumps(elsewhere).encode())
    monkeypatch.setattr(module, "LAPSE_S", 1.0)
    with lease(run):  # nobody renewed it
        pass

    run.write("lease.json", json.dumps(elsewhere).encode())
    original = module.time.sleep

    def sleep(seconds):
        original(0.01)
        run.write("lease.json", json.dumps(elsewhere | {"renewed": elsewhere["renewed"] + 9}).encode())

    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(UserError, match="on far-away"), lease(run):
        pass


def test_of_two_at_once_one_gives_way(tmp_path, monkeypatch):
    run = Store(str(tmp_path))
    with lease(run):
        written = json.loads(run.read("lease.json"))
    other = json.dumps(written | {"token": "another"}).encode()
    monkeypatch.setattr(module.time, "sleep", lambda seconds: run.write("lease.json", other))
    with pytest.raises(UserError, match="this one gives way"), lease(run):
        pass
    assert json.loads(run.read("lease.json"))["token"] == "another"
