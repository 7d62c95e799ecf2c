"""A run on several data sets: each exactly once an epoch of its own, on any number of workers, through a resume."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import SMALL, begin_at, train_on

from vlmo_ray.data.mix import load_data
from vlmo_ray.data.order import Schedule
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.schema import Field, Schema
from vlmo_ray.data.store import Store
from vlmo_ray.demo.scenes.records import records
from vlmo_ray.errors import UserError
from vlmo_ray.runs.audit import audit, table
from vlmo_ray.runs.checkpoints import Checkpoints
from vlmo_ray.runs.consumed import Log
from vlmo_ray.runs.metrics import read_metrics
from vlmo_ray.train.build import RunSpec
from vlmo_ray.train.loop import train

CONFIG = dataclasses.replace(
    SMALL,
    model=dataclasses.replace(SMALL.model, width=8, vocab_size=30522),
    data=dataclasses.replace(SMALL.data, weights=(2.0, 1.0)),
    audit=True,
    precision="float64",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """37 and 11 pairs."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, seed, count in (("large", 1, 37), ("small", 2, 11)):
        rows = [row | {"id": f"{name}-{row['id']}"} for row in records(seed, count, image_size=16)]
        write_dataset(str(folder / name), rows, rows_per_group=4, groups_per_shard=2)
    return f"{folder}/large,{folder}/small"


def spec_of(data: str, run, config=CONFIG, **changes) -> RunSpec:
    config = dataclasses.replace(config, **changes)
    fingerprint = load_data(data, config.data.weights).fingerprint
    return RunSpec(config, data, str(run), fingerprint, in_process_data=True)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("alone")
    assert train(spec_of(data, run)).step == 10
    return run


def consumed(run) -> list[list[str]]:
    """The ids of each step, by position."""
    store = Store(str(run))
    state = Checkpoints(store).newest()
    rows = [
        (int(step), int(position), name)
        for block in Log(store, state.attempts, state.step).read()
        for step, position, name in zip(block.step, block.position, block.names.to_pylist(), strict=True)
    ]
    return [[name for s, _, name in sorted(rows) if s == step] for step in range(state.step)]


def curve(run) -> np.ndarray:
    return np.array([[m["loss"], m["grad_norm"]] for m in read_metrics(Store(str(run)))[0]])


def test_each_batch_has_its_shares_and_each_data_set_its_epochs(data, alone):
    steps = consumed(alone)
    # 4 and then 6 slices of 2 rows: by largest remainder 3 and 1, then 4 and 2
    shares = [Counter(name.partition("-")[0] for name in step) for step in steps]
    assert shares == [{"large": 6, "small": 2}] * 6 + [{"large": 8, "small": 4}] * 4
    for name, count in (("large", 37), ("small", 11)):
        sequence = [n for step in steps for n in step if n.startswith(name)]
        epochs = [set(sequence[i : i + count]) for i in range(0, len(sequence), count)]
        assert len(sequence) > count and all(len(epoch) == count for epoch in epochs[:-1])
    found = audit(str(alone), data)
    assert found.clean and [(e.data.rpartition("/")[2], e.rows, e.complete) for e in found.epochs] == [
        ("large", 37, True), ("large", 31, False), ("small", 11, True), ("small", 11, True), ("small", 6, False)
    ]  # fmt: skip
    assert [column.header for column in table(found).columns][:2] == ["data", "epoch"]


@pytest.mark.slow
def test_workers_and_a_resume_change_nothing(data, alone, tmp_path):
    outcomes = train_on(2, spec_of(data, tmp_path / "two", micro_batch=2))
    assert [outcome.step for outcome in outcomes] == [10, 10], outcomes
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(alone), rtol=1e-9)
    assert consumed(tmp_path / "two") == consumed(alone)
    begin_at(tmp_path / "resumed", alone / "checkpoint-00000004")
    assert train(spec_of(data, tmp_path / "resumed")).step == 10
    assert np.array_equal(curve(tmp_path / "resumed"), curve(alone)[4:])


def test_a_row_that_was_not_consumed_is_found_in_its_data_set(data, alone, tmp_path):
    """The log of a run that lost a row of the small data set, and took another one twice."""
    shutil.copytree(alone, tmp_path / "run")
    (file,) = list((tmp_path / "run" / "audit").rglob("00000000-*.parquet"))
    rows = pq.read_table(file)
    ids = rows.column("id").to_pylist()
    lost = next(i for i, name in enumerate(ids) if name.startswith("small"))
    other = next(i for i, name in enumerate(ids) if name.startswith("small") and i != lost)
    name, ids[lost] = ids[lost], ids[other]
    pq.write_table(rows.set_column(rows.column_names.index("id"), "id", pa.array(ids)), file)
    found = audit(str(tmp_path / "run"), data)
    assert not found.clean
    (wrong,) = [epoch for epoch in found.epochs if not epoch.clean]
    assert wrong.data.endswith("/small") and wrong.missing == (name,) and wrong.doubled == (ids[other],)
    assert any(f"of {wrong.data}, missing: {name}" in sentence for sentence in found.sentences())


def test_without_weights_all_epochs_are_alike(data):
    sets = load_data(data)
    assert sets.weights == (37.0, 11.0) and sets.num_rows == 48
    mix = sets.order(1, Schedule(((4, 96),), 2), 2)
    assert [order.schedule.phases for order in mix.orders] == [((4, 74),), ((4, 22),)]


def test_mistakes(data, tmp_path):
    large, small = data.split(",")
    with pytest.raises(UserError, match=r"data\.weights has 2 weights for 1 data sets"):
        load_data(large, (2, 1))
    with pytest.raises(UserError, match="/no/such does not exist"):
        load_data(f"{large}, /no/such")
    for wrong in (f"{large},", "", f",{small}"):
        with pytest.raises(UserError, match="lacks a name beside a comma"):
            load_data(wrong)
    with pytest.raises(UserError, match=r"names .*large twice; name it once"):
        load_data(f"{large},{small}, {large}")
    texts = [{"id": "1", "image_id": "", "text": "a"}]
    write_dataset(str(tmp_path / "texts"), texts, schema=Schema((Field("text", "text"),)))
    with pytest.raises(UserError, match=r"texts has other columns than .*large: text and image, text"):
        load_data(f"{large},{tmp_path}/texts")
    with pytest.raises(UserError, match="2 data sets do not fit into the 1 slices"):
        load_data(data).order(1, Schedule(((4, 8),), 8), 2)
    assert load_data(large).fingerprint != load_data(data).fingerprint != load_data(data, (1, 1)).fingerprint
    assert load_data(f"{small},{large}").fingerprint != load_data(data).fingerprint


def test_other_data_sets_are_not_resumed(data, alone, tmp_path):
    begin_at(tmp_path, alone / "checkpoint-00000004")
    large, small = data.split(",")
    with pytest.raises(UserError, match="data"):
        train(spec_of(f"{small},{large}", tmp_path))
