"""Vectors of a data set: each record once, whatever is killed; the same for any number of workers."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import small_scenes
from small_run import SMALL, job

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader, chunk_ids
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.load import load
from vlmo_ray.search.embed import Embedding, _items, embed, shard_file, write_shard
from vlmo_ray.search.vectors import encoder_of, fingerprint
from vlmo_ray.tasks.retrieval import Retrieval
from vlmo_ray.train.loop import train


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> str:
    where = str(tmp_path_factory.mktemp("embed") / "run")
    assert train(job(scenes, where, SMALL)).step == 10
    return where


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """60 pairs in three shards; two images cannot be decoded."""
    folder = str(tmp_path_factory.mktemp("embed") / "data")
    rows = list(small_scenes(6, 60))
    rows[5]["image"] = rows[33]["image"] = b"no image"
    write_dataset(folder, rows, rows_per_group=7, groups_per_shard=3)
    return folder


def table(out: str) -> dict[str, list]:
    """All rows of an index in the order of the data set."""
    parts = [pq.read_table(path).to_pydict() for path in sorted(Path(out, "vectors").iterdir())]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def all_ids(data: str) -> dict[str, str]:
    manifest = load_manifest(data)
    found = {}
    for chunk in range(manifest.num_chunks):
        found |= chunk_ids(manifest, chunk)
    return found


@pytest.mark.ray
def test_each_record_has_one_row_and_the_vector_of_the_model(ray_cluster, run, data, tmp_path, vlmo):
    outs = [str(tmp_path / "by-command"), str(tmp_path / "by-two")]
    answer = vlmo("embed", run, "--data", data, "--out", outs[0], "--workers", "1")
    assert answer.returncode == 0 and "60 rows; now 3 shards in " in answer.stdout, answer.stderr
    assert "2 of their rows without a vector" in answer.stdout
    done = embed(run, data, outs[1], num_workers=2)
    assert (done.rows, done.unreadable, done.shards) == (60, 2, 3)
    tables = [table(out) for out in outs]
    assert tables[0] == tables[1]  # bit for bit
    assert dict(zip(tables[0]["address"], tables[0]["id"], strict=True)) == all_ids(data) and len(tables[0]["id"]) == 60
    unreadable = [i for i, vector in enumerate(tables[0]["vector"]) if vector is None]
    assert [bool(problem) for problem in tables[0]["problem"]] == [i in unreadable for i in range(60)]
    assert len(unreadable) == 2 and "not an image" in tables[0]["problem"][unreadable[0]]
    # against the evaluation of retrieval
    model = load(run).eval()
    from vlmo_ray.report.gallery import first_rows

    columns = first_rows(data, Retrieval(model).encoder(), 60)
    from vlmo_ray.data.batch import Batch

    with torch.inference_mode():
        wanted = Retrieval(model).rows(Batch.from_numpy(columns))
    place = {name: i for i, name in enumerate(columns["id"])}
    for name, vector in zip(tables[0]["id"], tables[0]["vector"], strict=True):
        if vector is not None:
            np.testing.assert_allclose(vector, wanted["image_feature"][place[name]], rtol=0, atol=1e-6)
    done = embed(run, data, outs[0])  # a second time there is nothing to do
    assert (done.shards, done.rows) == (0, 60) and table(outs[0]) == tables[0]
    text = str(tmp_path / "texts")
    assert embed(run, data, text, "text").unreadable == 0
    found = table(text)
    for name, vector in zip(found["id"], found["vector"], strict=True):
        if name in place:
            np.testing.assert_allclose(vector, wanted["text_feature"][place[name]], rtol=0, atol=1e-6)


@pytest.mark.ray
def test_what_is_there_is_not_done_again_and_other_vectors_are_refused(ray_cluster, run, data, scenes, tmp_path):
    out = str(tmp_path / "index")
    embed(run, data, out)
    before = table(out)
    middle = Path(out, shard_file(1))
    stamps = {path: path.stat().st_mtime_ns for path in middle.parent.iterdir() if path != middle}
    middle.unlink()
    assert embed(run, data, out).shards == 1 and table(out) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    with pytest.raises(UserError, match=r"holds image vectors of .* another kind. Give another --out"):
        embed(run, data, out, "text")
    with pytest.raises(UserError, match="another data"):
        embed(run, scenes, out)
    other = str(tmp_path / "run")
    train(job(scenes, other, dataclasses.replace(SMALL, seed=9)))
    with pytest.raises(UserError, match="another weights"):
        embed(other, data, out)


def test_a_shard_is_written_in_the_order_of_its_records(run, data, tmp_path):
    """Without Ray, with several threads that read ahead."""
    model, manifest = load(run).eval(), load_manifest(data)
    reader = Reader(((manifest.uri, manifest.schema),), encoder_of(model, "image"))
    items = list(_items(manifest))
    assert [item["shard"] for item in items] == [0, 1, 2] and sum(len(item["chunks"]) for item in items) == 9
    with ThreadPoolExecutor(3) as pool:
        bad = [write_shard(model, "image", reader, pool, Store(str(tmp_path)), **item) for item in items]
    assert sum(bad) == 2
    found = table(str(tmp_path))
    assert found["address"] == list(all_ids(data))
    assert [(c, r) for c, r in zip(found["chunk"], found["row"], strict=True)] == [
        (chunk, row) for chunk in range(9) for row in range(manifest.chunk_rows[chunk])
    ]


def test_the_fingerprint_is_of_all_weights(run):
    model = load(run)
    before = fingerprint(model)
    assert fingerprint(load(run)) == before
    with torch.no_grad():
        model.norm.bias[3] += 1e-7
    assert fingerprint(model) != before


def test_what_cannot_be_embedded(run, tmp_path, scenes):
    model = load(run)
    model.itc = None
    with pytest.raises(UserError, match=r"no contrastive head \('itc'\), which gives the vectors"):
        encoder_of(model, "image")
    assert Embedding.read(Store(str(tmp_path))) is None


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.full
def test_killed_half_way(run, tmp_path):
    """The command is killed with all of its processes once some shards are there; the same command completes them."""
    data, out = str(tmp_path / "data"), str(tmp_path / "index")
    write_dataset(data, small_scenes(8, 2400), rows_per_group=20, groups_per_shard=3)
    command = [sys.executable, "-m", "vlmo_ray", "embed", run, "--data", data, "--out", out, "--workers", "1"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL) as first:
        until = time.monotonic() + 120
        while not Path(out, "vectors").is_dir() or len(list(Path(out, "vectors").glob("*.parquet"))) < 3:
            assert first.poll() is None and time.monotonic() < until, "it wrote nothing, or was over too soon"
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
    there = {path.name: path.stat().st_mtime_ns for path in Path(out, "vectors").glob("*.parquet")}
    assert 3 <= len(there) < 40
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    shards = int(re.search(r"2,400 rows; now (\d+) shards", again.stdout)[1])
    assert shards >= 40 - len(there) - 1
    now = {path.name: path.stat().st_mtime_ns for path in Path(out, "vectors").glob("*.parquet")}
    assert len(now) == 40 and all(now[name] == stamp for name, stamp in there.items())
    found = table(out)
    assert sorted(found["id"]) == sorted(all_ids(data).values()) and len(set(found["id"])) == 2400
    assert json.loads(Path(out, "embedding.json").read_text())["rows"] == 2400
