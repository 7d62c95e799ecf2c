"""One program at a time on a run: the second is refused, the dead one's place is taken, the replaced one is told."""

import dataclasses
import json
import queue
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from vlmo_ray.data.s3 import StorageBusy
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs import lease as module
from vlmo_ray.runs.lease import lease

HOLD = """
    import sys, time
    from vlmo_ray.data.store import Store
    from vlmo_ray.runs.lease import lease
    with lease(Store(sys.argv[1]), print):
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


@pytest.fixture
def cable(tmp_path):
    """A folder behind a cable: while that is `cut`, it is like a server that is away. It can be `cut_at_write`, too."""

    class Cable(Store):
        cut, cut_at_write, failures = threading.Event(), threading.Event(), threading.Semaphore(0)

        def write(self, name, data):
            if self.cut_at_write.is_set():
                self.cut.set()
            super().write(name, data)

        def patiently(self, name, attempt):
            def through_the_cable():
                if self.cut.is_set():
                    self.failures.release()
                    raise StorageBusy(f"{name} is away")
                return attempt()

            return super().patiently(name, through_the_cable)

    return Cable(str(tmp_path), retry_timeout_s=60)


@pytest.fixture
def often(monkeypatch):
    """Renewals follow each other closely."""
    monkeypatch.setattr(module, "_SETTLE_S", 0.01)
    monkeypatch.setattr(module, "RENEW_S", 0.05)


def holder_in(run: Store) -> dict:
    return json.loads(run.read("lease.json"))


def wait_until(condition) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_second_is_refused_and_takes_over_from_the_dead(tmp_path, holder):
    run = Store(str(tmp_path))
    with pytest.raises(UserError, match=rf"already being trained, by process {holder.pid} on .*another --name"):
        with lease(run, pytest.fail):
            pass
    holder.kill()
    holder.wait()
    with lease(run, pytest.fail):
        assert run.exists("lease.json")
    assert not run.exists("lease.json")


def test_another_machines_lease_lapses_unless_it_is_renewed(tmp_path, monkeypatch):
    run = Store(str(tmp_path))
    with lease(run, pytest.fail):
        written = holder_in(run)
    elsewhere = written | {"host": "far-away"}
    run.write("lease.json", json.dumps(elsewhere).encode())
    monkeypatch.setattr(module, "LAPSE_S", 0.3)
    original = module.time.sleep
    monkeypatch.setattr(module.time, "sleep", lambda seconds: original(0.05 * seconds))
    with lease(run, pytest.fail):  # nobody renewed it
        pass

    run.write("lease.json", json.dumps(elsewhere).encode())

    def sleep(seconds):
        original(0.01)
        run.write("lease.json", json.dumps(elsewhere | {"renewed": elsewhere["renewed"] + 9}).encode())

    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(UserError, match="on far-away"), lease(run, pytest.fail):
        pass


def test_of_two_at_once_one_gives_way(tmp_path, monkeypatch):
    run = Store(str(tmp_path))
    with lease(run, pytest.fail):
        written = holder_in(run)
    other = json.dumps(written | {"token": "another"}).encode()
    monkeypatch.setattr(module.time, "sleep", lambda seconds: run.write("lease.json", other))
    with pytest.raises(UserError, match="this one gives way"), lease(run, pytest.fail):
        pass
    assert holder_in(run)["token"] == "another"


def test_of_two_at_once_the_earlier_is_told_when_the_others_write_was_late(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SETTLE_S", 0.25)
    monkeypatch.setattr(module, "RENEW_S", 60.0)
    earlier_holds, later_writes, end, told = (threading.Event(), threading.Event(), threading.Event(), queue.Queue())

    class Late(Store):
        def write(self, name, data):
            later_writes.set()
            assert earlier_holds.wait(10)
            super().write(name, data)

    def later():
        with lease(Late(str(tmp_path)), lambda sentence: told.put(("later", sentence))):
            end.wait(10)

    thread = threading.Thread(target=later)
    thread.start()
    assert later_writes.wait(10)
    with lease(Store(str(tmp_path)), lambda sentence: told.put(("earlier", sentence))):
        earlier_holds.set()
        who, sentence = told.get(timeout=10)
        assert who == "earlier" and "both began at once" in sentence
    end.set()
    thread.join()
    assert told.empty()


@pytest.mark.parametrize("where", ["cut", "cut_at_write"])
def test_who_was_cut_off_and_replaced_is_told_and_leaves_the_lease_alone(tmp_path, cable, often, where):
    run, told = Store(str(tmp_path)), queue.Queue()
    with lease(cable, told.put):
        getattr(cable, where).set()
        assert cable.failures.acquire(timeout=10)
        other = holder_in(run) | {"token": "another", "pid": 4321, "host": "far-away"}
        run.write("lease.json", json.dumps(other).encode())
        cable.cut_at_write.clear()
        cable.cut.clear()
        sentence = told.get(timeout=10)
        assert sentence.startswith(f"{run.uri} was taken over by process 4321 on far-away while")
        wait_until(lambda: all(thread.name != "lease" for thread in threading.enumerate()))
        assert holder_in(run) == other
    assert told.empty()
    assert holder_in(run) == other


def test_renewing_survives_storage_that_is_away_and_a_lease_that_vanished(tmp_path, cable, often, capsys):
    run = Store(str(tmp_path))
    with lease(cable, pytest.fail):
        cable.cut.set()
        for _ in range(3):
            assert cable.failures.acquire(timeout=10)
        before = holder_in(run)
        cable.cut.clear()
        wait_until(lambda: holder_in(run)["renewed"] > before["renewed"])
        run.delete("lease.json")
        wait_until(lambda: run.exists("lease.json"))
        assert holder_in(run)["token"] == before["token"]
    assert not run.exists("lease.json")
    said = capsys.readouterr().out
    assert said == f"the lease of {run.uri} could not be renewed; retrying: lease.json is away\n"


def test_a_process_of_another_container_is_not_taken_for_dead(tmp_path, monkeypatch):
    run = Store(str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "readlink", lambda path: "pid:[1]")
        with lease(run, pytest.fail):
            there = holder_in(run) | {"process_start": "0"}  # none here has this id and began then
    run.write("lease.json", json.dumps(there).encode())
    original = time.sleep

    def sleep(seconds):
        original(0.01)
        run.write("lease.json", json.dumps(there | {"renewed": there["renewed"] + 9}).encode())

    monkeypatch.setattr(module.time, "sleep", sleep)
    with pytest.raises(UserError, match="already being trained"), lease(run, pytest.fail):
        pass


def test_a_worker_finds_out_that_the_run_is_another_drivers(tmp_path):
    run = Store(str(tmp_path))
    with lease(run, print) as token:
        module.check(run, token)
        with pytest.raises(UserError, match="taken over by process"):
            module.check(run, "another")
    module.check(run, token)  # its driver has ended: nobody has taken it over


def test_of_many_at_once_on_s3_one_gets_the_lease(bucket, monkeypatch):
    monkeypatch.setattr(module, "_SETTLE_S", 0.0)  # the conditional write alone decides
    run, start = Store(bucket), threading.Barrier(8)

    def attempt(results: queue.Queue) -> None:
        held = module._Lease(run)
        start.wait(10)
        try:
            held.take()
            results.put(held)
        except UserError as error:
            results.put(error)

    for _ in range(5):
        results: queue.Queue = queue.Queue()
        threads = [threading.Thread(target=attempt, args=(results,)) for _ in range(8)]
        [thread.start() for thread in threads]
        [thread.join(20) for thread in threads]
        holders = [result for result in list(results.queue) if isinstance(result, module._Lease)]
        assert len(holders) == 1 and holder_in(run)["token"] == holders[0].token
        holders[0].give_back()
        assert not run.exists("lease.json")


def test_on_s3_a_lease_that_changed_hands_is_neither_renewed_nor_deleted(bucket, monkeypatch):
    """The other program writes between this one's look and its own write."""
    run = Store(bucket)
    with lease(run, pytest.fail):
        other = holder_in(run) | {"token": "another", "pid": 4321}
    held = module._Lease(run)
    held.take()
    original = module._read

    def read_then_changed(store):
        found = original(store)
        run.write("lease.json", json.dumps(other).encode())
        return found

    for action in (held.renew, held.give_back):
        run.write("lease.json", json.dumps(dataclasses.asdict(held._holder)).encode())
        monkeypatch.setattr(module, "_read", read_then_changed)
        lost = action()
        monkeypatch.setattr(module, "_read", original)
        assert holder_in(run) == other
        assert action == held.give_back or lost.pid == 4321


def test_a_lost_answer_to_a_write_does_not_lose_the_lease(bucket, monkeypatch):
    """The server wrote, the answer was lost, the client repeats the request and is refused."""
    replace = Store.replace

    def repeated(self, *arguments):
        assert replace(self, *arguments)
        return replace(self, *arguments)

    monkeypatch.setattr(Store, "replace", repeated)
    with lease(Store(bucket), pytest.fail) as token:
        assert holder_in(Store(bucket))["token"] == token
