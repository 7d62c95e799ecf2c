"""The audit: clean for runs that were cut, resumed and resized; and every way not to be clean is named."""

import dataclasses
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_scenes
from small_run import SMALL, job, train_on

from vlmo_ray.config import Phase
from vlmo_ray.data.manifest import chunk_table, write_manifest
from vlmo_ray.data.prepare.shards import write_shards
from vlmo_ray.data.read import ShardError
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs.audit import audit
from vlmo_ray.train.agree import Notice
from vlmo_ray.train.loop import train

CONFIG = dataclasses.replace(SMALL, phases=(Phase(20, 8),), checkpoint_every=2, audit=True)


def notice_once(after: int):
    asked = []

    def ask() -> Notice:
        asked.append(1)
        return Notice.STOP if len(asked) > after else Notice.NONE

    return ask


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory) -> Path:
    """Stopped twice, and with the newest checkpoint lost after the second time, so that steps were repeated."""
    folder = tmp_path_factory.mktemp("audited")
    config = dataclasses.replace(CONFIG, cluster=dataclasses.replace(CONFIG.cluster, notice_every=1))
    assert train(job(scenes, folder, config), notice=notice_once(7)).step == 7
    assert train(job(scenes, folder, config), notice=notice_once(6)).step == 13
    next((folder / "checkpoint-00000013").rglob("*.distcp")).unlink()
    assert train(job(scenes, folder, config)).step == 20
    return folder


def test_a_run_with_repeated_steps_is_clean(run, scenes):
    assert len(list((run / "audit").iterdir())) == 3
    found = audit(str(run), scenes)
    assert found.clean and found.steps == 20 and not found.problems
    assert found.sentences() == ["20 committed steps: every pair was consumed once an epoch"]
    rows = [epoch.rows for epoch in found.epochs]
    assert sum(rows) == 160 and len(rows) > 1 and all(epoch.complete for epoch in found.epochs[:-1])


@pytest.mark.slow
def test_the_number_of_workers_may_change(scenes, tmp_path):
    config = dataclasses.replace(CONFIG, cluster=dataclasses.replace(CONFIG.cluster, notice_every=1))
    assert train(job(scenes, tmp_path, config), notice=notice_once(9)).step == 9
    assert train_on(3, job(scenes, tmp_path, config))[0].step == 20
    assert audit(str(tmp_path), scenes).clean


def rewrite(run: Path, change) -> dict:
    """The record of one checkpoint, changed; gives back what to put where afterwards."""
    file = sorted((run / "audit").rglob("*.parquet"), key=lambda path: path.name)[1]
    before = file.read_bytes()
    out = io.BytesIO()
    pq.write_table(change(pq.read_table(io.BytesIO(before))), out)
    file.write_bytes(out.getvalue())
    return {file: before}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda table: table.slice(1), ["1 positions not consumed, the first in step", "missing: "]),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), ["1 positions consumed more than once"]),
        (
            lambda table: table.set_column(2, "id", pa.array(["stranger", *table.column("id").to_pylist()[1:]])),
            ["unknown: stranger", "missing: "],
        ),
    ],
)
def test_what_is_wrong_is_named(vlmo, run, scenes, change, words):
    undo = rewrite(run, change)
    try:
        found = audit(str(run), scenes)
        assert not found.clean
        said = "\n".join(found.sentences())
        assert all(word in said for word in words) and "NOT every pair" in said, said
        if "stranger" in said:
            done = vlmo("audit", str(run), "--data", scenes)
            assert done.returncode == 1 and "unknown: stranger" in done.stdout, done.stdout + done.stderr
    finally:
        for file, content in undo.items():
            file.write_bytes(content)


def test_masked_pairs_are_named(tmp_path, monkeypatch):
    """A blank caption, a record without an id, and a shard that is away for as long as the run lasts."""
    rows = list(small_scenes(4, 40))
    rows[3]["text"], rows[5]["id"] = " ", None
    data, run = tmp_path / "data", tmp_path / "run"
    chunks = write_shards(Store(str(data)), rows, "{}.parquet", rows_per_group=7, groups_per_shard=3)
    write_manifest(str(data), "parquet", chunk_table(chunks))
    (data / "1.parquet").rename(tmp_path / "elsewhere")
    config = dataclasses.replace(CONFIG, phases=(Phase(10, 8),))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, bad_shards="mask"))
    assert train(job(str(data), run, config)).step == 10  # two epochs

    found = audit(str(run), str(data))
    alone = {rows[3]["id"], f"{data}/0.parquet#0:5"}
    addresses = {f"{data}/1.parquet#{c.index}:{row}" for c in chunks[3:] for row in range(c.rows)}
    assert found.clean and [len(epoch.masked) for epoch in found.epochs] == [21, 21]
    assert all(set(epoch.masked) == alone | addresses for epoch in found.epochs)
    first, second, verdict = found.sentences()
    assert first == f"epoch 0, masked: {', '.join(found.epochs[0].masked[:10])} and 11 more"
    assert second.startswith("epoch 1, masked: ")
    assert verdict == "10 committed steps: every pair was consumed once an epoch, 42 of them masked"

    (tmp_path / "elsewhere").rename(data / "1.parquet")
    repaired = audit(str(run), str(data))
    assert repaired.clean
    ids = {row["id"] for row in rows[21:]}
    assert all(set(epoch.masked) == alone | ids for epoch in repaired.epochs)

    def refused(*args):
        raise ShardError("access denied")

    monkeypatch.setattr("vlmo_ray.data.reader.read_chunk", refused)
    with pytest.raises(ShardError, match="access denied"):
        audit(str(run), str(data))


def test_the_command_proves_it(vlmo, run, scenes):
    done = vlmo("audit", str(run), "--data", scenes, "--json-output")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clean"] is True


def test_what_cannot_be_audited_is_said(run, scenes, tmp_path):
    with pytest.raises(UserError, match="has no checkpoint"):
        audit(str(tmp_path), scenes)
    train(job(scenes, tmp_path, SMALL))
    with pytest.raises(UserError, match="train with --set audit=true"):
        audit(str(tmp_path), scenes)
