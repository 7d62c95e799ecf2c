"""Search against one large matrix product; queries; faiss; the contact sheet."""

import json

import numpy as np
import pytest
from conftest import small_scenes
from search_place import make_place
from small_run import SMALL, job

from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError
from vlmo_ray.search import index as module
from vlmo_ray.search.embed import shard_file
from vlmo_ray.search.index import Index, Queries
from vlmo_ray.search.sheet import sheet, thumbnail
from vlmo_ray.train.loop import train


@pytest.fixture(scope="module")
def place(scenes, tmp_path_factory) -> dict[str, str]:
    return make_place(scenes, tmp_path_factory.mktemp("search"))


def vectors(index: Index) -> tuple[np.ndarray, list[str]]:
    """All vectors, 0 for records that have none, and the ids."""
    tables = [index._read(shard, ["id", "vector"]).to_pydict() for shard in range(index.embedding.shards)]
    width = index.embedding.width
    rows = [np.zeros(width) if v is None else np.array(v) for table in tables for v in table["vector"]]
    return np.stack(rows).astype(np.float32), [name for table in tables for name in table["id"]]


@pytest.mark.parametrize("top", [1, 7, 100])
def test_exact_search_against_one_product(place, top):
    index = Index(place["image"])
    matrix, ids = vectors(index)
    random = np.random.default_rng(0)
    queries = np.concatenate([matrix[[9, 30]], random.normal(size=(4, index.embedding.width)).astype(np.float32)])
    found = index.search(queries, top)
    scores = queries @ matrix.T
    scores[:, [i for i, row in enumerate(matrix) if not row.any()]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, : min(top, 59)]
    for own, wanted, row in zip(found, order, scores, strict=True):
        assert [one.id for one in own] == [ids[i] for i in wanted]
        np.testing.assert_allclose([one.score for one in own], row[wanted], rtol=1e-5, atol=1e-6)
    assert found[0][0].id == ids[9]  # of two equal pictures, the one that comes first


def test_faiss_finds_the_same_among_few(place, tmp_path):
    index = Index(place["image"])
    matrix, _ = vectors(index)
    with pytest.raises(UserError, match=r"has no faiss.index; vlmo search INDEX QUERY --build-faiss makes it"):
        index.search_fast(matrix[:2], 5)
    assert index.build_fast().endswith("faiss.index")
    some = matrix[[1, 20, 40]]
    exact, fast = index.search(some, 8), index.search_fast(some, 8)
    for a, b in zip(exact, fast, strict=True):
        assert {one.id for one in a} == {one.id for one in b}
        np.testing.assert_allclose([one.score for one in a], [one.score for one in b], rtol=1e-5)


def test_faiss_lists(place, monkeypatch):
    """With lists, nearly the same: a vector always finds itself."""
    monkeypatch.setattr(module, "_LISTS_FROM", 10)
    index = Index(place["text"])
    index.build_fast()
    matrix, ids = vectors(index)
    exact, fast = index.search(matrix, 9), index.search_fast(matrix, 9)  # it looks into more lists than there are
    for a, b in zip(exact, fast, strict=True):
        np.testing.assert_allclose([one.score for one in a], [one.score for one in b], rtol=1e-5, atol=1e-6)
    assert {one.id for own in fast for one in own} <= set(ids)
    monkeypatch.setattr(module, "_PROBES", 1)
    index.build_fast()
    found = Index(place["text"]).search_fast(matrix, 1)
    assert all(own[0].score == pytest.approx(1.0, abs=1e-5) for own in found)  # its own list has the vector itself


def test_queries(place, tmp_path):
    index = Index(place["image"])
    queries = Queries(index)
    records = [index.record(found) for found in index.search(np.eye(1, index.embedding.width, dtype=np.float32), 3)[0]]
    matrix, ids = vectors(index)
    for record in records:  # a picture finds itself
        (tmp_path / "one.png").write_bytes(record.values["image"])
        vector, picture = queries.of(str(tmp_path / "one.png"))
        assert picture == record.values["image"]
        np.testing.assert_allclose(vector[0], matrix[ids.index(record.id)], atol=1e-5)
        # and a text its vector in the index of texts
        vector, picture = queries.of(record.values["text"])
        texts, names = vectors(Index(place["text"]))
        np.testing.assert_allclose(vector[0], texts[names.index(record.id)], atol=1e-5)
        assert picture == b""


def test_the_contact_sheet(place):
    index = Index(place["image"])
    results = index.search(vectors(index)[0][[9]], 5)[0]
    page = sheet(index, "<b>what", results)
    assert page.count("data:image/jpeg;base64,") == 5 and "&lt;b&gt;what" in page and "<b>what" not in page
    assert "&lt;i&gt;" in page  # the caption of the first
    assert sheet(index, "x", results, index.record(results[0]).values["image"]).count("data:image/jpeg;base64,") == 6
    assert thumbnail(b"no image") == b""
    texts = Index(place["text"])
    assert sheet(texts, "x", texts.search(np.zeros((1, 24), np.float32), 60)[0]).count("data:image") == 59


def test_by_the_command(place, vlmo, tmp_path):
    run = vlmo("search", place["image"], "a b c", "--top", "3", "--json-output", "--sheet", str(tmp_path / "s.html"))
    assert run.returncode == 0, run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    index = Index(place["image"])
    wanted = index.search(Queries(index).text("a b c"), 3)[0]
    assert [one["id"] for one in found] == [one.id for one in wanted] and (tmp_path / "s.html").stat().st_size > 1000
    run = vlmo("search", place["image"], "a b c", "--top", "2")
    assert run.stdout.count("score") == 1 and max(map(len, run.stdout.splitlines())) <= 80


def test_mistakes(place, vlmo, tmp_path, scenes):
    for arguments, words in (
        (("search", str(tmp_path), "x"), "holds no vectors"),
        (("search", place["image"], str(tmp_path / "none.png")), "does not exist; a text must not end in .png"),
        (("search", place["image"], "   "), "the query cannot be used"),
        (("search", place["image"], "x", "--top", "0"), "--top 0 must be at least 1"),
        (("search", place["image"], "x", "--model", str(tmp_path / "no-model")), "no-model"),
    ):
        run = vlmo(*arguments)
        assert run.returncode == 2 and words in run.stderr, run.stderr
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    run = vlmo("search", place["image"], str(tmp_path / "bad.jpg"))
    assert run.returncode == 2 and "the query cannot be used: not an image" in run.stderr
    train(job(scenes, tmp_path / "other", SMALL, seed=77))
    with pytest.raises(UserError, match="is another model than the one that made"):
        Queries(Index(place["image"]), str(tmp_path / "other"))
    partial = Store(str(tmp_path / "partial"))
    partial.write("embedding.json", Store(place["image"]).read("embedding.json"))
    partial.write(shard_file(0), Store(place["image"]).read(shard_file(0)))
    with pytest.raises(UserError, match="lacks 2 of 3 shards: give the same `vlmo embed` again"):
        Index(partial.uri)


def test_changed_data_are_noticed(place, tmp_path):
    index = Index(place["image"])
    found = index.search(np.zeros((1, 24), np.float32), 1)[0][0]
    other = str(tmp_path / "other")
    write_dataset(other, small_scenes(1, 10))
    object.__setattr__(index.embedding, "data", other)
    with pytest.raises(UserError, match="has changed since its vectors were made; embed it again"):
        index.record(found)
