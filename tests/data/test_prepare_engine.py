"""Preparation keeps one seeded global order, goes on where it stopped, refuses to mix, and bounds its memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from conftest import make_image, make_records
from sources import dropped, files, ids, put, tar_of, tars

from vlmo_ray.data import prepare as package
from vlmo_ray.data.manifest import MANIFEST, load_manifest
from vlmo_ray.data.prepare import STATE, Counts, prepare, shuffle
from vlmo_ray.data.prepare.source import WorkUnit
from vlmo_ray.data.prepare.stage import WORK
from vlmo_ray.data.schema import PAIRS, Record
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

pytestmark = pytest.mark.ray
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_one_seeded_order_however_it_is_cut(ray_cluster, tmp_path):
    source = str(tmp_path / "source")
    put(source, tars(num_tars=4, rows=150, extra=8000))
    outs = [str(tmp_path / name) for name in "abcd"]
    for out, options in zip(outs, [{}, {"memory": 1 << 20}, {"rows_per_group": 7}, {"seed": 1}], strict=True):
        assert prepare("webdataset", source, out, **options).kept == 600
    order = ids(outs[0])
    assert ids(outs[1]) == ids(outs[2]) == order != ids(outs[3])
    assert order == sorted(order, key=lambda id: shuffle.key_of(0, id))
    many, small = load_manifest(outs[1]), load_manifest(outs[2])
    assert len(many.shards) > 4 and len(load_manifest(outs[0]).shards) == 1
    assert set(small.chunk_rows[:-1].tolist()) == {7} and small.num_rows == 600
    # Every tenth of the order has pairs of every tar: about 15 of each.
    tar = np.array([int(id.split(".")[0]) for id in order]).reshape(10, 60)
    share = np.stack([(tar == t).sum(1) for t in range(4)])
    assert share.min() >= 5 and share.max() <= 27
    footer = pq.read_metadata(tmp_path / "a" / load_manifest(outs[0]).shards[0])
    assert footer.row_group(0).column(0).compression == "ZSTD"


def test_shards_of_the_wished_size(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, tars(num_tars=2, rows=100, extra=20_000))
    prepare("webdataset", source, out, shard_bytes=1 << 20, rows_per_group=8)
    sizes = [p.stat().st_size for p in tmp_path.glob("out/*-*.parquet")]
    assert len(sizes) == 4 and max(sizes) < 1.3 * (1 << 20) and min(sizes) > 0.5 * (1 << 20)


class Faulty:
    """40 pairs in each of 6 units; the last three cannot be read while the file `fault` exists."""

    format, schema, listing, versions = "faulty", PAIRS, "made up", ""

    def __init__(self, uri: str, rows: list[dict]) -> None:
        self.uri, self.rows = uri, rows

    def units(self) -> list[WorkUnit]:
        return [WorkUnit(str(i), 400_000) for i in range(6)]

    def records(self, unit: WorkUnit):
        with open(f"{self.uri}/log", "a") as log:
            log.write(unit.name)
        for i, row in enumerate(self.rows):
            if i == 30 and int(unit.name) >= 3 and os.path.exists(f"{self.uri}/fault"):
                raise UserError(f"injected into unit {unit.name}")
            id, text = f"{unit.name}-{i}", "" if i == 5 else row["text"]
            values = {"image": row["image"], "text": text}
            yield Record(id, row["image_id"], values, address=f"at {id}")


def test_resume_after_failures_in_both_passes(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "FORMATS", {"faulty": lambda uri: Faulty(uri, make_records(40))})
    source, out, calm = str(tmp_path), tmp_path / "out", tmp_path / "calm"

    def run(place):
        return prepare("faulty", source, str(place), memory=1 << 20)

    undisturbed = run(calm)
    assert undisturbed == Counts(240, 234, {"there is no text": 6})
    (tmp_path / "log").unlink()
    (tmp_path / "fault").touch()
    with pytest.raises(UserError, match=r"injected into unit [345]"):
        run(out)
    done = {int(p.stem) for p in (out / WORK / "scatter").iterdir()}
    assert done <= {0, 1, 2} and done and not (out / MANIFEST).exists()
    (tmp_path / "log").unlink()
    (tmp_path / "fault").unlink()
    (out / "00001-000.parquet" / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"00001-000\.parquet"):
        run(out)
    assert set((tmp_path / "log").read_text()) == {str(i) for i in range(6)} - {str(i) for i in done}
    (tmp_path / "log").unlink()
    shutil.rmtree(out / "00001-000.parquet")
    assert run(out) == undisturbed
    assert not (tmp_path / "log").exists()  # the source was not read again
    assert files(out) == files(calm) and len(files(calm)) > 4
    assert run(out) == undisturbed
    assert not any(name.startswith(WORK) for name in files(out))


def test_resume_after_the_driver_is_killed(ray_cluster, tmp_path):
    source, out, calm = str(tmp_path / "source"), tmp_path / "out", tmp_path / "calm"
    put(source, tars(num_tars=3, rows=100, extra=40_000))
    code = (
        "import sys\nfrom vlmo_ray.data.prepare import prepare\n"
        "prepare('webdataset', sys.argv[1], sys.argv[2], memory=1 << 20)"
    )
    command = [sys.executable, "-c", code, source, str(out)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 90
        while not any(out.glob(f"{WORK}/gather/*.json")) and driver.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    time.sleep(1)  # its workers notice and end
    options = {"memory": 1 << 20}
    assert prepare("webdataset", source, str(out), **options) == Counts(300, 300)
    prepare("webdataset", source, str(calm), **options)
    assert files(out) == files(calm)


def test_refusals(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, tars(1, 5))
    prepare("webdataset", source, out)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"another preparation \(seed was 0, is now 5\)"):
        prepare("webdataset", source, out, seed=5)
    put(source, {"001.tar": tars(1, 2)["000.tar"]})
    with pytest.raises(UserError, match="the source has changed"):
        prepare("webdataset", source, out)
    (tmp_path / "source" / "001.tar").unlink()
    assert files(tmp_path) == before
    shard = tmp_path / "source" / "000.tar"
    assert prepare("webdataset", source, out).kept == 5
    shard.write_bytes(shard.read_bytes().replace(b"caption", b"kaption"))  # of the same size
    with pytest.raises(UserError, match=r"another preparation \(the source has changed\)"):
        prepare("webdataset", source, out)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    del state["versions"]  # as an older program wrote it
    (tmp_path / "out" / STATE).write_text(json.dumps(state))
    assert prepare("webdataset", source, out).kept == 5
    before = files(tmp_path)
    put(str(tmp_path / "taken"), {"thesis.txt": b"dear"})
    cases = {
        r"thesis\.txt is in the way": ("webdataset", source, str(tmp_path / "taken"), {}),
        "is inside the source": ("webdataset", source, f"{source}/sub", {}),
        "'csv' is not a format; choose from ade20k, folders": ("csv", source, out, {}),
        "'split' is not an option of webdataset": ("webdataset", source, out, {"split": "train"}),
        "say where": ("webdataset", source, None, {}),
        "only parquet and webdataset": ("table", f"{source}/000.tar", None, {"index": True}),
        "holds no Parquet files": ("parquet", source, out, {}),
        "forbid='spin'": ("webdataset", source, out, {"forbid": ("spin",)}),
        "at least 1 MiB": ("webdataset", source, out, {"memory": 5}),
        "choose a smaller memory": ("webdataset", source, f"{out}3", {"memory": 1 << 50}),
    }
    for message, (format, of, to, options) in cases.items():
        if format == "table":
            Path(of).with_suffix(".csv").write_text("0,1\n")
            options = options | {"header": False, "images": source, "image_column": 0}
            of = str(Path(of).with_suffix(".csv"))
            Path(of).write_text("000.tar,caption\n")
        with pytest.raises(UserError, match=message):
            prepare(format, of, to, **options)


def test_a_damaged_tar_stops_and_names_itself(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    made = tars(2, 9)
    put(source, made | {"001.tar": made["001.tar"][:5000]})
    with pytest.raises(UserError, match=rf"{source}/001\.tar: the tar is cut short"):
        prepare("webdataset", source, out)
    with pytest.raises(UserError, match=rf"{source}/001\.tar: the tar is cut short"):
        prepare("webdataset", source, index=True)
    assert not Path(source, MANIFEST).exists() and not Path(out, MANIFEST).exists()


def test_nothing_left_is_an_error(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, {"a.tar": tar_of([("0.txt", b"no image")])})
    with pytest.raises(UserError, match=r"no record .* is left(?s:.*)there is no image"):
        prepare("webdataset", source, out)


def test_long_lists_of_dropped_pairs_are_cut(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_LISTED", 3)
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    members = [(f"{i}.txt", b"no image") for i in range(8)]
    put(source, {"a.tar": tar_of([*members, ("9.jpg", make_image(9)), ("9.txt", b"x")])})
    assert prepare("webdataset", source, out) == Counts(9, 1, {"there is no image": 8})
    lines = dropped(out)
    assert [e.get("id") for e in lines] == ["a.tar/0", "a.tar/1", "a.tar/2", None]
    assert lines[-1] == {"note": "5 more were dropped and are not listed"}


def test_a_failing_store_is_not_taken_for_damage(ray_cluster, tmp_path, monkeypatch):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, tars(1, 3))
    prepare("webdataset", source, out)

    def down(*args, **kwargs):
        raise UserError("cannot reach the server")

    monkeypatch.setattr(Store, "read", down)
    with pytest.raises(UserError, match=r"^cannot reach the server$"):
        prepare("webdataset", source, out)


PEAKS = """
import sys, ray
from vlmo_ray.data.prepare import prepare
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
for name in ("small", "large"):
    print(name, flush=True)
    prepare("webdataset", f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}-out", memory=8 << 20)
print("end", flush=True)
"""


def _anonymous_bytes(root: int) -> dict[int, int]:
    """Private memory of each process below `root`, itself included."""
    parent, size = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:  # it has just ended
            continue
        pid = int(fields["Pid"])
        parent[pid] = int(fields["PPid"])
        size[pid] = int(fields.get("RssAnon", "0 kB").split()[0]) * 1024

    def below(pid: int) -> bool:
        while pid and pid != root:
            pid = parent.get(pid, 0)
        return pid == root

    return {pid: size[pid] for pid in size if below(pid)}


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    """240 MB with an allowance of 8 MB: no process grows by more than a fraction of the data."""
    put(str(tmp_path / "small"), tars(2, 8, extra=100_000))
    put(str(tmp_path / "large"), tars(6, 400, extra=100_000))
    command = [sys.executable, "-c", PEAKS, str(tmp_path)]
    with open(tmp_path / "stderr", "wb") as stderr:
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    os.set_blocking(driver.stdout.fileno(), False)
    peak, phase = {"start": 0, "small": 0, "large": 0, "end": 0}, "start"
    try:
        while driver.poll() is None:
            phase = ((driver.stdout.read() or b"").decode().split() or [phase])[-1]
            peak[phase] = max(peak[phase], *_anonymous_bytes(driver.pid).values(), 0)
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0, (tmp_path / "stderr").read_text()[-3000:]
    assert load_manifest(str(tmp_path / "large-out")).num_rows == 2400
    assert peak["small"] > 20e6  # the measurement works
    assert peak["large"] - peak["small"] < 100e6, peak
