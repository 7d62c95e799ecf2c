"""Texts for the language stage: every token of every document once, in records of equal length."""

from __future__ import annotations

import gzip
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import damaged_gzip, put, read_all

from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.prepare import Counts, _open_source, prepare
from vlmo_ray.data.prepare.text import Packer
from vlmo_ray.data.text import Tokenizer
from vlmo_ray.errors import UserError

TOKENIZER = Tokenizer(10_000)


def _tokens(text: str) -> list[int]:
    ids, mask, _ = TOKENIZER.encode(text)
    return ids[mask][1:-1].tolist()


def _told(uri: str, **options) -> list[str]:
    source = _open_source("text", uri, options)
    return [record.problem or record.values["text"] for unit in source.units() for record in source.records(unit)]


WORD = st.sampled_from(
    ["dog", "dalmatians", "a", "b-c", "Éléphant", "naïve", "中文字", "don't", "x" * 30, "!?", "\u00a0"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(WORD, min_size=1, max_size=40).map(" ".join), max_size=12), st.integers(3, 40))
def test_all_tokens_once_in_full_records(documents, length):
    documents = [document for document in documents if document.strip()]
    packer = Packer(length)
    texts = [text for document in documents for text in packer.add(document)] + list(packer.rest())
    assert [token for text in texts for token in _tokens(text)] == [t for text in documents for t in _tokens(text)]
    sizes = [len(_tokens(text)) for text in texts]
    longest = max((len(_tokens(word)) for text in documents for word in re.findall(r"\w+|\S", text)), default=0)
    for size, following in zip(sizes, texts[1:], strict=False):
        first, _ = TOKENIZER.words(following)
        assert size + first[0] > length - 2  # the next word had no room
    assert all(size <= max(length - 2, longest) for size in sizes)


LINES = [f"line {i} of a document with seven words" for i in range(50)]


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 1 << 20])
def test_cuts_between_units_lose_and_double_nothing(tmp_path, monkeypatch, unit_bytes):
    monkeypatch.setattr("vlmo_ray.data.prepare.text.UNIT_BYTES", unit_bytes)
    put(str(tmp_path), {"a.txt": "\n".join(LINES).encode(), "b.txt": b"last\r\n\r\n"})
    texts = _told(str(tmp_path), length=20)
    assert [t for text in texts for t in _tokens(text)] == [t for line in [*LINES, "last"] for t in _tokens(line)]


def test_every_kind_of_file(tmp_path):
    rows = [{"text": "one"}, {"text": "two", "more": 1}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["one", "two"], "id": [1, 2]}), table)
    files = {
        "a.txt": b"one\n\ntwo\n", "b.txt.gz": gzip.compress(b"one\ntwo"), "c.jsonl": lines,
        "d.jsonl.gz": gzip.compress(lines), "e.parquet": table.getvalue(), "notes.md": b"three",
    }  # fmt: skip
    put(str(tmp_path), files)
    assert _told(str(tmp_path)) == ["one\ntwo"] * 5
    for name in list(files)[:5]:
        assert _told(f"{tmp_path}/{name}") == ["one\ntwo"]


@pytest.mark.parametrize(
    "documents, expected",
    [("lines", ["a b", "c", "d e"]), ("paragraphs", ["a b\nc", "d e"]), ("files", ["a b\nc\n\n\nd e"])],
)
def test_what_a_document_is(tmp_path, documents, expected):
    put(str(tmp_path), {"a.txt": b"a b\nc\n\n\nd e\n"})
    source = _open_source("text", str(tmp_path), {"documents": documents})
    (unit,) = source.units()
    assert list(source._documents(*unit.content)) == expected


def test_documents_that_are_no_text_are_counted(tmp_path):
    put(str(tmp_path), {"a.txt": b"good\ncaf\xe9\n\xe2\x80\x8b\n", "b.jsonl": b'{"text": 5}\n[1]\n{\n{"text": ""}\n'})
    assert sorted(_told(str(tmp_path))) == sorted(
        [
            "good",
            "the text is not a string",
            "there is no text",
            *["the text is not a string"] * 2,
            *["there is no text"] * 2,
        ]
    )


@pytest.mark.parametrize(
    "files, options, words",
    [
        ({}, {}, "holds no texts"),
        ({"a.txt": b""}, {}, "holds no texts"),
        ({"a.txt": b"a"}, {"documents": "pages"}, "documents='pages' is none of lines, paragraphs, files"),
        ({"a.txt": b"a"}, {"length": 2}, "length=2 leaves no room"),
        ({"a.txt.gz": gzip.compress(b"a" * 99)[:-9]}, {}, r"a\.txt\.gz cannot be read to its end"),
        ({"a.txt.gz": damaged_gzip(b"one")}, {}, r"a\.txt\.gz cannot be read to its end: Error -3"),
        ({"a.parquet": b"PAR1"}, {}, r"a\.parquet cannot be read"),
    ],
)
def test_sources_that_cannot_be_read(tmp_path, files, options, words):
    put(str(tmp_path / "in"), {"README": b""} | files)
    with pytest.raises(UserError, match=words):
        _told(str(tmp_path / "in"), **options)


def test_a_column_that_is_missing_is_named(tmp_path):
    table = io.BytesIO()
    pq.write_table(pa.table({"content": ["one"]}), table)
    put(str(tmp_path), {"a.parquet": table.getvalue()})
    with pytest.raises(UserError, match="has no column 'text'; it has content; name it with column="):
        _told(str(tmp_path))
    assert _told(str(tmp_path), column="content") == ["one"]


@pytest.mark.ray
def test_prepare_text(ray_cluster, places):
    source, out = places
    put(source, {"a.txt": "\n".join([*LINES, "\u200b"]).encode()})
    counts = prepare("text", source, out, length=32)
    records = read_all(out)
    assert counts == Counts(len(records) + 1, len(records), {"there is no text": 1})
    assert load_manifest(out).schema.names == ("text",)
    found = [_tokens(r.values["text"]) for r in sorted(records, key=lambda r: int(r.id.partition("#")[2]))]
    assert [t for tokens in found for t in tokens] == [t for line in LINES for t in _tokens(line)]
    assert np.mean([len(tokens) for tokens in found]) > 27


@pytest.mark.ray
def test_prepare_images_alone(ray_cluster, places):
    from conftest import make_image

    source, out = places
    put(source, {"a/1.jpg": make_image(1), "2.jpg": make_image(2), "notes.txt": b"no image"})
    counts = prepare("folders", source, out, labels=False)
    assert counts == Counts(3, 2, {"the image header is unreadable": 1})
    assert {r.id: r.values for r in read_all(out)} == {
        n: {"image": make_image(k)} for n, k in (("a/1.jpg", 1), ("2.jpg", 2))
    }
    with pytest.raises(UserError, match="says nothing with labels=False"):
        prepare("folders", source, f"{out}2", labels=False, classes="x")
