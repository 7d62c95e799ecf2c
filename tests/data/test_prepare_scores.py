"""Filtering by scores: what is dropped is counted by reason, and nothing else changes."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image, small_scenes
from small_run import SMALL
from sources import put, read_all, tar_of

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare import Counts, prepare
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.evaluate import evaluate
from vlmo_ray.model.vlmo import VLMo, init_weights
from vlmo_ray.runs.evaluations import keep
from vlmo_ray.runs.load import load_all
from vlmo_ray.weights.folder import save_model


def scores_of(folder, **scores: float) -> str:
    file = io.BytesIO()
    pq.write_table(pa.table({"id": [f"a.tar/{key[1:]}" for key in scores], "score": list(scores.values())}), file)
    put(str(folder), {"scores.parquet": file.getvalue()})
    return f"{folder}/scores.parquet"


def source_of(folder) -> str:
    members = [(f"{i}.{s}", data) for i in range(5) for s, data in (("jpg", make_image(i)), ("txt", f"t{i}".encode()))]
    members[-1] = ("4.txt", b"")
    put(str(folder), {"a.tar": tar_of(members)})
    return str(folder)


@pytest.mark.ray
def test_records_below_are_dropped_and_counted(ray_cluster, tmp_path):
    source, scores = source_of(tmp_path / "in"), scores_of(tmp_path, _0=0.5, _1=0.25, _2=0.249, _4=0.9, _9=1.0)
    counts = prepare("webdataset", source, str(tmp_path / "out"), scores=scores, keep_above=0.25)
    reasons = {"it has no score": 1, "its score is below 0.25": 1, "there is no text": 1}
    assert counts == Counts(5, 2, reasons)
    assert {record.id for record in read_all(str(tmp_path / "out"))} == {"a.tar/0", "a.tar/1"}
    assert prepare("webdataset", source, str(tmp_path / "out"), scores=scores, keep_above=0.25) == counts
    with pytest.raises(UserError, match="holds another preparation"):
        prepare("webdataset", source, str(tmp_path / "out"), scores=scores, keep_above=0.3)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"scores": "scores.parquet"}, "scores='scores.parquet' and keep_above=None go together"),
        ({"keep_above": 0.0}, "go together"),
        ({"scores": "none.parquet", "keep_above": 0.1}, r"none\.parquet does not exist"),
        ({"scores": "bad.parquet", "keep_above": 0.1}, r"bad\.parquet cannot be read as Parquet"),
        ({"scores": "other.parquet", "keep_above": 0.1}, r"other\.parquet has no column 'score'"),
        ({"scores": "empty.parquet", "keep_above": 0.1}, r"empty\.parquet has no rows"),
        ({"scores": "scores.parquet", "keep_above": 0.1, "index": True}, "can leave nothing out"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, options, words):
    source = source_of(tmp_path / "in")
    scores_of(tmp_path, _0=0.5)
    other = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"]}), other)
    none = io.BytesIO()
    pq.write_table(pa.table({"id": pa.array([], pa.string()), "score": pa.array([], pa.float32())}), none)
    put(str(tmp_path), {"bad.parquet": b"PAR1", "other.parquet": other.getvalue(), "empty.parquet": none.getvalue()})
    monkeypatch.chdir(tmp_path)
    out = None if options.get("index") else str(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        prepare("webdataset", source, out, **options)


@pytest.mark.ray
def test_the_scores_of_an_evaluation_are_cosines_and_filter(ray_cluster, tmp_path):
    rows = list(small_scenes(3, 30))
    data = str(tmp_path / "data")
    write_dataset(data, rows, rows_per_group=7)
    model = VLMo(SMALL.model)
    init_weights(model, 1)
    save_model(model, tmp_path / "model")
    result = evaluate(load_all(str(tmp_path / "model")), data, "similarity", num_workers=2)
    run = Store(str(tmp_path / "run"))
    keep(run, 5, result)
    found = dict(zip(*(result.predictions[name].to_pylist() for name in ("id", "score")), strict=True))
    assert found.keys() == {row["id"] for row in rows} and all(-1 <= value <= 1 for value in found.values())
    assert result["similarity"] == pytest.approx(np.mean(list(found.values())), abs=1e-6)
    middle = result["similarity_p50"]
    (name,) = [name for name in run.list("evaluations/") if name.endswith(".parquet")]
    counts = prepare("parquet", data, str(tmp_path / "out"), scores=run.address(name), keep_above=middle)
    assert {record.id for record in read_all(str(tmp_path / "out"))} == {k for k, v in found.items() if v >= middle}
    assert counts.kept == load_manifest(str(tmp_path / "out")).num_rows == 15
