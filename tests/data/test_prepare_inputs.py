"""Inputs from the world: every row of a table is a record or an error that names it; options have types."""

from __future__ import annotations

import bz2
import codecs
import io
import json
import tarfile

import pytest
from conftest import make_image
from sources import put, tar_of, tars

from vlmo_ray.data.prepare import _open_source, _typed
from vlmo_ray.data.prepare.parquet import Parquet
from vlmo_ray.data.prepare.webdataset import WebDataset
from vlmo_ray.data.schema import PAIRS, problem_of, problem_of_text
from vlmo_ray.data.store import open_store
from vlmo_ray.errors import UserError


def _texts(folder, name: str, data: bytes, **options) -> list[str | None]:
    """The captions of a table, or the problems of rows that have one."""
    put(str(folder), {f"{i}.jpg": make_image(i) for i in range(3)} | {name: data})
    source = _open_source("table", f"{folder}/{name}", options)
    records = [record for unit in source.units() for record in source.records(unit)]
    return [record.problem or record.values["text"] for record in records]


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t"])
def test_the_delimiter_is_found_whatever_the_name(tmp_path, delimiter, name):
    rows = [("path", "caption"), ("0.jpg", "a dog"), ("1.jpg", "cats")]
    data = "".join(f"{path}{delimiter}{text}\n" for path, text in rows).encode()
    assert _texts(tmp_path, name, data) == ["a dog", "cats"]
    assert _texts(tmp_path, name, data, delimiter=delimiter) == ["a dog", "cats"]
    bare = data.partition(b"\n")[2]
    assert _texts(tmp_path, name, bare, header="no") == ["a dog", "cats"]


def test_a_delimiter_inside_captions_is_not_taken(tmp_path):
    assert _texts(tmp_path, "t.csv", b"0.jpg;a, b\n1.jpg;c, d\n", header=False) == ["a, b", "c, d"]
    assert _texts(tmp_path, "t.csv", b'caption,path\n"a;b",0.jpg\n') == ["a;b"]


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("unit_bytes", [1, 1 << 20])
def test_an_unpaired_quotation_mark_costs_no_row(tmp_path, monkeypatch, row, unit_bytes):
    monkeypatch.setattr("vlmo_ray.data.prepare.table.UNIT_BYTES", unit_bytes)
    captions = ["one", "two", "three"]
    captions[row] = f'"{captions[row]}'
    rows = [("path", "caption"), *((f"{i}.jpg", c) for i, c in enumerate(captions))]
    assert _texts(tmp_path, "t.tsv", "\n".join(map("\t".join, rows)).encode()) == captions
    data = "\n".join(map(",".join, rows)).encode()
    assert _texts(tmp_path, "t.csv", data, quoting="no") == captions
    with pytest.raises(UserError, match=rf"after row {row}: .*quoting=False"):
        _texts(tmp_path, "t.csv", data)


def test_an_unpaired_quotation_mark_in_the_header_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"quoting=False"):
        _texts(tmp_path, "t.csv", b'path,"caption\n0.jpg,a\n1.jpg,b\n')


def test_a_line_break_inside_quotation_marks_is_told(tmp_path, caplog):
    assert _texts(tmp_path, "t.csv", b'path,caption\n0.jpg,x\n1.jpg,"a\nb"\n') == ["x", "a\nb"]
    assert "1 rows have a line break inside quotation marks, the first is row 1" in caplog.text


def test_byte_order_marks_and_utf16(tmp_path):
    assert _texts(tmp_path, "t.csv", codecs.BOM_UTF8 + b'"path","caption"\n0.jpg,a\n') == ["a"]
    assert _texts(tmp_path, "t.csv", codecs.BOM_UTF8 + b'"0.jpg","a, b"\n', header=False) == ["a, b"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        with pytest.raises(UserError, match="is UTF-16; convert it"):
            _texts(tmp_path, "t.csv", "path,caption\n0.jpg,a\n".encode(encoding))


def test_a_path_that_is_too_long_is_a_reason(tmp_path):
    data = f"path,caption\n0.jpg,a\n{'x' * 300}.jpg,b\n{'é' * 130}.jpg,c\n".encode()
    reason = "the image path is longer than a file name may be"
    assert _texts(tmp_path, "t.csv", data) == ["a", reason, reason]


@pytest.mark.parametrize("value", [False, "False", "false", "no", "0"])
def test_switches(tmp_path, value):
    assert _texts(tmp_path, "t.csv", b"a,0.jpg\n", header=value, image_column="1", text_column=0) == ["a"]


def test_options_have_types(tmp_path):
    for name, value in [("header", "nope"), ("header", 2), ("images", 2014), ("image_column", True)]:
        with pytest.raises(UserError, match=rf"{name}={value!r} is not (true or false|a text)"):
            _open_source("table", str(tmp_path), {name: value})
    for given in ("7", 7):
        assert _typed("at_least", given, int) == 7
    with pytest.raises(UserError, match="at_least='few' is not a number; write for example at_least=9"):
        _typed("at_least", "few", int)
    with pytest.raises(UserError, match=r"split=2014 is not a text; write for example split='name'"):
        _open_source("karpathy", str(tmp_path), {"split": 2014})


@pytest.mark.parametrize("text", ["\u200b", "\ufeff \u200d", "\u0301", "\x00"])
def test_an_invisible_caption_is_no_text(text):
    assert problem_of_text(text, "text") == "there is no text"
    assert problem_of_text(text + "é", "text") == ""


@pytest.mark.parametrize("image_id, expected", [(7.0, "7"), (7.5, "7.5"), (float("nan"), None), (None, None)])
def test_image_ids_of_parquet(tmp_path, image_id, expected):
    source = Parquet.__new__(Parquet)
    source.schema, source.store = PAIRS, open_store(str(tmp_path))
    make = lambda image, text: list(source._records({"image_id": image_id}, {"image": image, "text": text}, "f:0"))  # noqa: E731
    (record,), (equal,) = make(b"x", "a"), make({"bytes": b"x", "path": "p"}, "b")
    assert record.image_id == equal.image_id and (record.image_id == expected or (expected is None and record.image_id))
    assert record.image_id != "nan"
    assert [r.problem for r in make({"bytes": None, "path": "p"}, ["a", "b"])] == [
        "the image is a path without bytes"
    ] * 2
    assert [r.values["text"] for r in make(b"x", [])] == [None]


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file"):
        open_store(str(tmp_path / "file" / "out"), create=True)


def _tar_records(folder, data: bytes, name: str = "a.tar") -> list[str]:
    """The captions of a tar, or why a record of it is dropped."""
    put(str(folder), {name: data})
    source = _open_source("webdataset", str(folder), {})
    records = [record for unit in source.units() for record in source.records(unit)]
    return [problem_of(record, PAIRS) or record.values["text"] for record in records]


_PAIR = [("1.jpg", make_image(1)), ("1.txt", b"one")]


@pytest.mark.parametrize(
    "members, expected",
    [
        ([("1.gif", make_image(1, "GIF")), ("1.json", b'{"caption": "g"}')], ["g"]),
        ([("1.BMP", make_image(1, "BMP")), ("1.json", b'{"caption": "b"}')], ["b"]),
        ([("1.mp4", b"film"), ("1.json", b'{"caption": "f"}')], ["there is no image"]),
        ([*_PAIR, *_PAIR], ["one", "the key is there twice in a row"]),
        ([("1.jpg", b"x"), ("1.json", b'{"caption": ["a", "b"]}')], ["a", "b"]),
        ([_PAIR[0], ("._1.jpg", b"mac"), ("__MACOSX/._1.jpg", b"mac"), _PAIR[1]], ["one"]),
        (
            [("i.2024.01.jpg", b"x"), ("i.2024.02.jpg", b"x")],
            ["the name has further dots, and a key ends at the first"] * 2,
        ),
        ([("1.json", b"{}")], []),
    ],
)
def test_members_of_tars_are_read_or_counted(tmp_path, members, expected):
    assert _tar_records(tmp_path, tar_of(members)) == expected


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_tars_are_counted(tmp_path, kind):
    file = io.BytesIO(tar_of(_PAIR))
    with tarfile.open(fileobj=file, mode="a") as tar:
        info = tarfile.TarInfo("2.jpg")
        info.type, info.linkname = kind, "1.jpg"
        tar.addfile(info)
    assert _tar_records(tmp_path, file.getvalue()) == ["one", "a member is a link, which has no data in the tar"]


def test_packed_tars_and_upper_case_names(tmp_path):
    assert _tar_records(tmp_path, tar_of(_PAIR), "A.TAR") == ["one"]
    assert _tar_records(tmp_path, bz2.compress(tar_of(_PAIR)), "b.tar.bz2") == ["one", "one"]


def test_equal_pictures_in_tars_are_one_image(tmp_path):
    second = [("2.jpg", make_image(1)), ("2.txt", b"b"), ("3.jpg", make_image(2)), ("3.txt", b"c")]
    put(str(tmp_path), {"a.tar": tar_of([*_PAIR, *second])})
    source = _open_source("webdataset", str(tmp_path), {})
    one, two, three = (record.image_id for unit in source.units() for record in source.records(unit))
    assert one == two != three


def test_a_list_of_captions_in_a_tar_gives_a_pair_for_each(tmp_path):
    facts = json.dumps({"caption": ["a dog", "a cat"]}).encode(), json.dumps({"caption": []}).encode()
    members = [(f"{i}.{s}", data) for i in (0, 1) for s, data in (("jpg", make_image(i)), ("json", facts[i]))]
    put(str(tmp_path), {"a.tar": tar_of(members)})
    source = WebDataset(str(tmp_path))
    records = [record for unit in source.units() for record in source.records(unit)]
    told = [(r.id, r.values["text"], r.problem) for r in records]
    assert told[:2] == [("a.tar/0#0", "a dog", ""), ("a.tar/0#1", "a cat", "")]
    assert told[2][2] == "the list of captions is empty" and len(told) == 3
    assert records[0].image_id == records[1].image_id


def test_patterns_name_the_tars(tmp_path):
    source = str(tmp_path / "in")
    put(source, tars(4, 2))
    for pattern, count in (("{000..002}.tar", 3), ("00?.tar", 4), ("{001,003}.tar", 2), ("*.tar", 4)):
        assert len(WebDataset(f"{source}/{pattern}").units()) == count
    with pytest.raises(UserError, match=r"004\.tar does not exist, but {003..004}\.tar names it"):
        WebDataset(f"{source}/{{003..004}}.tar")
    with pytest.raises(UserError, match="after the last /"):
        WebDataset(f"{source}*/000.tar")
    put(source, {"more.tar.zst": b"?"})
    with pytest.raises(UserError, match=r"more\.tar\.zst is compressed in a way that is not read"):
        WebDataset(source)
