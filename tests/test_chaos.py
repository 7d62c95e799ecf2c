"""A run that survives anything: workers, nodes, drivers and storage fail while it trains, and nothing is to be seen.

Every scenario runs the product's own command, `vlmo train`, on several raylets of this machine, with its data and
its run behind a proxy that can fail. The oracle is one undisturbed run in one process: in float64 every step's
figures and the final weights agree to 1e-9, and the audit is clean. What concerns bytes alone (damaged records,
checkpoints, a full disk) is tested on the loop, here and in `runs/test_checkpoints.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from chaos_run import EVERY, Command, Place, chaos_place, config_of
from conftest import write_unchecked
from PIL import Image
from safetensors.torch import load
from small_run import job

from vlmo_ray.config import Phase
from vlmo_ray.data.index import index_parquet
from vlmo_ray.data.manifest import chunk_table, load_manifest, write_manifest
from vlmo_ray.data.read import read_chunk
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.runs.audit import audit
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.loop import train

pytestmark = pytest.mark.slow


def raylets(test):
    """Each takes one to two minutes; `test_chaos_short.py` has the runs that `make test` can afford."""
    return pytest.mark.chaos(pytest.mark.full(test))


STEPS = 100
CONFIG = config_of(STEPS)


@pytest.fixture(scope="module")
def place(s3_server) -> Iterator[Place]:
    with chaos_place(s3_server["AWS_ENDPOINT_URL"], "s3://vlmo/chaos", STEPS) as here:
        yield here


@pytest.fixture
def command(place, request, tmp_path) -> Iterator[Command]:
    started = Command(place, request.node.name.removeprefix("test_"), tmp_path)
    yield started
    started.end()


@raylets
def test_a_worker_is_killed_and_a_second_run_of_the_name_refused(place, command):
    place.want_nodes(2)
    command.start("--set=cluster.cpus_per_worker=0", "--set=cluster.max_workers=2")  # both on one node
    reached = command.reach(2 * EVERY)
    assert "world_rank=1, local_rank=1" in command.output
    second = Command(place, command.name, command.folder)
    victim = command.workers()[-1]
    os.kill(victim, signal.SIGKILL)
    second.start()
    assert second.process.wait(60) == 2
    assert "is already being trained, by process" in second.lines[-1], second.output
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)
    command.finish()
    assert re.search(r"resumed at step (\d+) on 2 workers", command.output)
    assert all(step > reached for step in command.repeated())


@raylets
def test_nodes_come_and_go(place, command):
    """2 -> 1 -> 3 -> 2 workers: a node killed, two added, one drained with notice."""
    place.want_nodes(2)
    command.start()
    command.reach(EVERY)
    place.want_nodes(1)
    command.wait_for_workers(1)
    place.want_nodes(3)
    while len(command.workers()) < 3:
        command.rest_until_resized()
    command.wait_for_workers(3)
    before, node = command.resumed_where_ended(), place.running.pop()
    assert before >= 1 and "saved, to go on with more workers" in command.output  # perhaps by way of 2
    place.nodes.drain(node, 60)
    try:
        command.finish()
    finally:
        place.nodes.kill(node)
    assert [size for size in command.sizes() if size != 2] == [1, 3] and command.sizes()[-1] == 2
    assert command.resumed_where_ended() == before + 1  # at the very step
    assert "saved, to go on without the node that is being taken away" in command.output


READS_ON_A_DRAINING_NODE = """
import sys
import ray
from vlmo_ray.config import DataConfig
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.order import Order, Schedule
from vlmo_ray.data.pipeline import Stream
from vlmo_ray.data.reader import Reader, Sources

node, data = sys.argv[1:]
ray.init(log_to_driver=False)

@ray.remote(num_cpus=2, label_selector={"ray.io/node-id": node})
class Worker:
    def begin(self):
        sources = Sources((load_manifest(data),))
        reader = Reader(sources.places, MaskedPairs(16, 12, DataConfig(), 30522, 0.15), 1)
        order = Order(sources.manifests[0].chunk_rows, 1, Schedule(((60, 12),), 2), 3)
        stream = Stream(sources, reader, order, start=0, stop=60, window_spans=1)
        self.batches = iter(stream)
        next(self.batches)

    def rest(self):
        return sum(len(batch) for batch in self.batches)

worker = Worker.remote()
ray.get(worker.begin.remote())
print("ready", flush=True)
sys.stdin.readline()
print(ray.get(worker.rest.remote(), timeout=50), flush=True)
"""


@raylets
def test_a_worker_on_a_draining_node_still_gets_its_data(place):
    """The node takes no tasks any more, and all but the first windows are still to be read."""
    place.want_nodes(2)
    node = place.running.pop()
    script = [sys.executable, "-c", READS_ON_A_DRAINING_NODE, node, place.data]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    try:
        with subprocess.Popen(script, env=place.environment, **pipes) as reader:
            assert "ready" in iter(lambda: reader.stdout.readline().strip() or "ended", "ended")
            place.nodes.drain(node, 60)
            found, _ = reader.communicate("\n", timeout=60)
        assert found.split()[-1:] == [str(59 * 12)]
    finally:
        place.nodes.kill(node)


@raylets
def test_the_driver_is_stopped_and_killed_and_the_command_run_again(place, command):
    place.want_nodes(2)
    command.start()
    command.reach(2 * EVERY)
    command.process.terminate()
    assert command.process.wait(60) == 2, command.output
    assert "saved and ended on request; the same command goes on from here" in command.lines[-1]
    command.start()
    reached = command.reach(5 * EVERY)
    assert command.repeated() == []
    command.process.kill()
    command.process.wait()
    command.lines.clear()
    command.start()
    command.wait_for(lambda: "Attempting to start training" in command.output, "a reservation")
    command.process.kill()  # before it has workers
    command.process.wait()
    assert not re.search(r"worker \d+ of \d+: process", command.output)
    command.lines.clear()
    command.start()
    # what the dead had reserved is free again
    command.wait_for(lambda: "resumed at step" in command.output, "resumption", 60)
    command.finish()
    assert int(re.search(r"resumed at step (\d+)", command.output)[1]) >= reached


@raylets
def test_storage_is_busy_slow_cut_off_and_away(place, command):
    place.want_nodes(2)
    command.start()
    command.reach(EVERY)
    place.faults.busy, place.faults.slow, place.faults.cut, place.faults.delay_s = 0.3, 0.05, 0.2, 2.0
    try:
        command.reach(3 * EVERY)
        place.faults.away = True
        time.sleep(20)
        place.faults.away = False
        command.reach(4 * EVERY)
        struck = dict(place.faults.struck)
    finally:
        place.faults.busy = place.faults.slow = place.faults.cut = 0.0
        place.faults.away = False
    assert min(struck[kind] for kind in ("busy", "slow", "cut", "away")) > 0, struck
    command.finish()
    assert command.repeated() == []


def store_bytes_as_caption(data: Path, shard: str, row: int, caption: bytes) -> None:
    """Rewrites a shard with a caption that need not be UTF-8, and the manifest for it."""
    table = pq.read_table(data / shard)
    texts = table["text"].cast(pa.binary()).to_pylist()
    texts[row] = caption
    _, offsets, content = pa.array(texts, pa.binary()).buffers()
    unchecked = pa.StringArray.from_buffers(len(texts), offsets, content)
    table = table.set_column(table.schema.get_field_index("text"), "text", unchecked)
    pq.write_table(table, data / shard, row_group_size=10, write_page_checksum=True)
    chunks = index_parquet(Store(str(data)), load_manifest(str(data)).shards)
    write_manifest(str(data), "parquet", chunk_table(chunks))


def test_damaged_records_and_shards_are_masked_to_the_row(tmp_path, monkeypatch, capsys):
    """A corrupt JPEG, bytes for a caption, a blank one, 100 megapixels, a truncated shard, a flipped byte in a page."""
    monkeypatch.setitem(read_chunk.__kwdefaults__, "wait_s", 0.01)  # before a shard is tried again
    rows = list(records(7, 120, image_size=16))
    jpeg, huge = io.BytesIO(), io.BytesIO()
    Image.open(io.BytesIO(rows[3]["image"])).save(jpeg, "JPEG")
    rows[3]["image"] = jpeg.getvalue()[:-100]
    rows[33]["text"] = "  "
    Image.new("L", (10_000, 10_000)).save(huge, "PNG")
    rows[52]["image"] = huge.getvalue()
    folder, data = tmp_path / "data", str(tmp_path / "data")
    write_unchecked(data, rows, rows_per_group=10, groups_per_shard=2)
    store_bytes_as_caption(folder, "00001.parquet", 11, b"a caption \xff\xfe")  # row 31
    cut, flipped = folder / "00004.parquet", folder / "00005.parquet"
    cut.write_bytes(cut.read_bytes()[:-400])  # both of its groups, as it has no footer
    content = bytearray(flipped.read_bytes())
    content[300] ^= 1  # in the first of two groups
    flipped.write_bytes(content)
    config = dataclasses.replace(
        CONFIG, phases=(Phase(20, 12),), data=dataclasses.replace(CONFIG.data, bad_shards="mask")
    )
    outcome = train(job(data, tmp_path / "run", config))  # two epochs
    assert outcome.step == 20, outcome

    reasons = {
        f"{data}/00000.parquet#0:3": "damaged image: ",
        f"{data}/00001.parquet#1:1": "the column 'text' is not UTF-8",
        f"{data}/00001.parquet#1:3": "there is no text",
        f"{data}/00002.parquet#1:2": "image of 10000 x 10000 pixels",
    }
    chunks = {f"{cut}#0": "Parquet magic bytes", f"{cut}#1": "Parquet magic", f"{flipped}#0": "the checksum"}
    for chunk, reason in chunks.items():
        reasons |= {f"{chunk}:{row}": f"its chunk is masked: {chunk}: {reason}" for row in range(10)}
    told = [json.loads(line) for file in (tmp_path / "run" / "masked").rglob("*.jsonl") for line in file.open()]
    listed = [row["problem"].split(": ", 1) for row in told]
    assert Counter(address for address, _ in listed) == Counter(2 * list(reasons))  # once an epoch
    for address, reason in listed:
        assert reason.startswith(reasons[address]), (address, reason)
    printed = re.findall(r"^worker 0 masked (\d+) rows, ", capsys.readouterr().out, re.MULTILINE)
    assert sum(map(int, printed)) == len(told)

    found = audit(str(tmp_path / "run"), data)
    masked = {rows[i]["id"] for i in (3, 31, 33, 52)} | {a for a in reasons if a.rpartition(":")[0] in chunks}
    assert found.clean and [epoch.complete for epoch in found.epochs] == [True, True]
    for epoch in found.epochs:
        assert len(epoch.masked) == len(masked) and set(epoch.masked) == masked

    stopped = train(job(data, tmp_path / "strict", dataclasses.replace(config, data=CONFIG.data)))
    assert cut.name in stopped.stopped or flipped.name in stopped.stopped


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Makes `folder` one of 50 MB; how to fill it up, and how to free it.

    Where none can be mounted: no file of this process may be larger than 500 kB, a fraction of a checkpoint.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode == 0:

        def fill() -> None:
            with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
                while True:
                    filler.write(bytes(1 << 16))

        try:
            yield fill, (folder / "filler").unlink
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    else:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE)
        free = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield functools.partial(limit, (500_000, free[1])), functools.partial(limit, free)
        finally:
            limit(free)


def test_the_disk_is_full_while_checkpoints_are_written(scenes, tmp_path, monkeypatch, capsys):
    folder, config = (tmp_path / "small", dataclasses.replace(CONFIG, phases=(Phase(40, 12),), checkpoint_every=5))
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, notice_every=1))
    assert train(job(scenes, tmp_path / "undisturbed", config)).step == 40
    with small_disk(folder) as (fill, free):
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        asked = []

        def notice() -> Notice:
            asked.append(1)
            if len(asked) == 12:  # full at the checkpoints of steps 15 and 20
                fill()
            elif len(asked) == 23:
                free()
            return Notice.NONE

        assert train(job(scenes, tmp_path / "run", config), notice=notice).step == 40
    printed = capsys.readouterr().out
    assert printed.count(f"MB are free in {folder}") == printed.count("the run goes on") == 2, printed
    runs = [Store(str(tmp_path / run)) for run in ("run", "undisturbed")]
    np.testing.assert_allclose(*([m["loss"] for m in read_metrics(run)[0]] for run in runs), rtol=1e-9)
    found, wanted = (load(run.read("model/model.safetensors")) for run in runs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0.0)
    audited = audit(runs[0].uri, scenes)
    assert audited.clean, audited.sentences()
    shutil.rmtree(tmp_path / "run" / "checkpoint-00000040")
    assert Checkpoints(Store(str(tmp_path / "run"))).newest().step == 35
