"""The audit: clean for runs that were cut, resumed and resized; and every way not to be clean is named."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import small_scenes
from small_run import SMALL, job, train_on
from terminal import Terminal, attach, screen

from vlmo_ray.config import Phase
from vlmo_ray.data.manifest import chunk_table, write_manifest
from vlmo_ray.data.prepare.shards import write_shards
from vlmo_ray.data.read import _footer
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.runs import audit as audits
from vlmo_ray.runs.audit import audit
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.multisets import Multisets, keys_of
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
        (
            lambda table: table.set_column(1, "position", pa.array([1, *table.column("position").to_pylist()[1:]])),
            ["1 steps consumed some positions in place of others, the first in step 2"],
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
    assert audit(str(run), str(data)) == found  # repaired: each pair is named as the run knew it

    def refused(*args):
        raise UserError("access denied")

    monkeypatch.setattr("vlmo_ray.data.read._take", refused)
    _footer.cache_clear()
    with pytest.raises(UserError, match="access denied"):
        audit(str(run), str(data))


@pytest.fixture
def many_buckets(monkeypatch):
    """As in a large data set: most buckets have one id or none."""
    monkeypatch.setattr(audits, "_BUCKET_ROWS", 1)


def test_of_parquet_shards_only_the_ids_are_read(run, scenes, monkeypatch, many_buckets):
    def images(*args, **options):
        raise AssertionError("a whole chunk is read")

    monkeypatch.setattr("vlmo_ray.data.reader.read_chunk", images)
    found = audit(str(run), scenes)
    assert found.clean and [epoch.complete for epoch in found.epochs] == [True, True, False]


def records(run: Path) -> dict[Path, pa.Table]:
    """The record of the run's last attempt: from step 11 on, which is in its second epoch of 60 pairs."""
    last = Checkpoints(Store(str(run))).newest().attempt
    return {file: pq.read_table(file) for file in sorted((run / "audit" / last).iterdir())}


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_pair_in_place_of_another_is_found(run, scenes, tmp_path, many_buckets, epoch):
    """In an epoch that is complete, and in one of which two thirds are done."""
    shutil.copytree(run, tmp_path / "run")
    tables = records(tmp_path / "run")
    place = [
        (file, i)
        for file, table in tables.items()
        for i, (step, position) in enumerate(zip(table["step"].to_pylist(), table["position"].to_pylist(), strict=True))
        if (8 * step + position) // 60 == epoch
    ]
    (file, i), (other, k) = place[0], place[-1]
    gone, again = tables[file]["id"][i].as_py(), tables[other]["id"][k].as_py()
    ids = tables[file]["id"].to_pylist()
    ids[i] = again
    pq.write_table(tables[file].set_column(2, "id", pa.array(ids)), file)
    found = audit(str(tmp_path / "run"), scenes)
    assert not found.clean and not found.problems
    for audited in found.epochs:
        wrong = audited.epoch == epoch
        assert audited.missing == (gone,) * wrong and audited.doubled == (again,) * wrong and not audited.unknown


def test_what_is_too_much_to_be_named_is_counted(run, scenes, tmp_path, monkeypatch, many_buckets):
    shutil.copytree(run, tmp_path / "run")
    for file in list(records(tmp_path / "run"))[1:]:
        file.unlink()
    everything = audit(str(tmp_path / "run"), scenes)
    monkeypatch.setattr(audits, "_NAMED", 8)
    some = audit(str(tmp_path / "run"), scenes)
    lost = int(everything.problems[0].split()[0])
    assert some.problems[0] == everything.problems[0]  # of positions all are counted
    assert any("of the ids that differ, only" in problem for problem in some.problems)
    for few, all_of_them in zip(some.epochs, everything.epochs, strict=True):
        assert set(few.missing) <= set(all_of_them.missing) and few.seen == all_of_them.seen
    assert sum(len(epoch.missing) for epoch in everything.epochs) == lost > sum(len(e.missing) for e in some.epochs)


def test_multisets_are_equal_if_and_only_if_their_contents_are():
    names = pa.array(["", "a", "ab", "ba", "\0", "a\0", "\N{SNOWMAN}", *(f"pair-{i}" for i in range(40_000))])
    keys = keys_of(names)
    assert len(set(keys.tolist())) == len(names)
    assert (keys_of(names.slice(3, 20_000)) == keys[3:20_003]).all()
    found = Multisets(3, 8)
    for which, order in enumerate((keys, keys[::-1], np.append(keys[1:], keys[1]))):
        for part in np.array_split(order, 7):
            found.add(which, (part & np.uint64(7)).astype(np.int64), part)
    assert not found.differ(0, found, 1).any()
    assert np.flatnonzero(found.differ(0, found, 2)).tolist() == sorted({int(key & np.uint64(7)) for key in keys[:2]})


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


@pytest.mark.parametrize("stderr", [Terminal, io.StringIO])
def test_it_shows_how_far_it_is_on_a_terminal_alone(run, scenes, stderr, monkeypatch):
    shown = stderr()
    attach(monkeypatch)  # what a terminal needs in the environment
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", shown)
    assert audit(str(run), scenes).clean
    written = shown.getvalue()
    on_terminal = stderr is Terminal
    assert ("reading the run's record" in written and "reading the data's ids" in written) == on_terminal
    assert screen(written) == [""]
