"""More inputs from the world, beside those of `test_prepare_inputs.py`: for each kind, some that are alike."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image
from PIL import Image
from sources import damaged_gzip, put, tar_of

from vlmo_ray.data.prepare import _open_source
from vlmo_ray.data.schema import PAIRS, problem_of
from vlmo_ray.errors import UserError


def _told(format: str, source: str, **options) -> list[str]:
    """The captions of a source, or why a record is left out."""
    opened = _open_source(format, source, options)
    records = [record for unit in opened.units() for record in opened.records(unit)]
    return [problem_of(record, PAIRS) or record.values["text"] for record in records]


def _table(folder, data: bytes, name: str = "t.csv", **options) -> list[str]:
    put(str(folder), {f"{i}.jpg": make_image(i) for i in range(3)} | {name: data})
    return _told("table", f"{folder}/{name}", **options)


MANY = "the row has too many columns; a caption with the delimiter in it needs quotation marks"
MISSING, OUTSIDE = "the image file is missing", "the image path leads out of the image folder"


@pytest.mark.parametrize(
    "data, expected",
    [
        # quotation marks
        (b'path,caption\n0.jpg,"a ""b"" c"\n1.jpg,d\n', ['a "b" c', "d"]),
        (b"path,caption\n0.jpg,'tis\n1.jpg,d\n", ["'tis", "d"]),
        (b'path,caption\n0.jpg,a 5" pipe\n1.jpg,d\n', ['a 5" pipe', "d"]),
        (b'path, caption\n0.jpg, "a, b"\n1.jpg, d\n', ["a, b", "d"]),
        # rows of another length
        (b"path,caption\n0.jpg,a, b\n1.jpg,d\n", [MANY, "d"]),
        (b"0.jpg,a\n1.jpg,b,c\n", ["a", MANY]),
        (b"path,caption\n0.jpg,a,,\n1.jpg\n", ["a", "the row has too few columns"]),
        # ends of lines
        (b"path,caption\r\n0.jpg,a\r\n\r\n1.jpg,d", ["a", "d"]),
        (b"path,caption\n0.jpg,a\rb\n1.jpg,d\n", ["a b", "d"]),
        ("path\tcaption\n0.jpg\ta\u2028b\x85c\x0b\n1.jpg\td\n".encode(), ["a\u2028b\x85c\x0b", "d"]),
        # encodings
        (b"path,caption\n0.jpg,caf\xe9\n1.jpg,b\n", ["the caption is not UTF-8", "b"]),
        # paths
        (b"path,caption\n0.jpg,a\n../x.jpg,b\n/etc/passwd,c\n0.jpg/1,d\n", ["a", OUTSIDE, OUTSIDE, MISSING]),
        (b"path,caption\n./0.jpg,a\n,b\n", ["a", "there is no image path"]),
        (
            b"path,caption\n0.jpg,a\nhttps://x.org/y.jpg,b\n",
            ["a", "the image is an address; fetch the images first, for example with img2dataset"],
        ),
    ],
)
def test_rows_of_tables_are_read_or_counted(tmp_path, data, expected):
    assert _table(tmp_path, data, header=data.startswith(b"path")) == expected


@pytest.mark.parametrize(
    "data, options, words",
    [
        (b"path,caption\r0.jpg,a\r1.jpg,d\r", {}, r"end in carriage returns alone; convert it: tr"),
        ("path,caption\n0.jpg,a\n".encode("utf-32"), {}, "is UTF-32; convert it: iconv -f UTF-32"),
        (gzip.compress(b"path,caption\n0.jpg,a\n"), {}, r"t\.csv is compressed; unpack it"),
        (b"", {}, r"t\.csv is empty"),
        (b"path,caption\n", {}, "has no rows below its header"),
        (b"path\n0.jpg\n", {}, "has no text column"),
        (b"path:caption\n0.jpg:a\n", {"delimiter": ":"}, "delimiter=':' is none of tab"),
        (b"0.jpg,a\n", {"header": False, "image_column": -1}, "image_column='-1' must be a number"),
        (b"0.jpg,a\n", {"header": False, "text_column": 0}, "column 0 cannot be both the image and the text"),
        (b"path,caption\n0.jpg,a\n", {"header": "on"}, "header='on' is not true or false"),
        (b"path,caption\n0.jpg,a\n", {"heder": "no"}, "'heder' is not an option of table; it has image_column"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, data, options, words):
    with pytest.raises(UserError, match=words):
        _table(tmp_path, data, **options)


def _encoded(format: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, format)
    return file.getvalue()


PHOTO = ("1.jpg", make_image(1))


@pytest.mark.parametrize(
    "members, expected",
    [
        # names
        ([("1.JPG", make_image(1)), ("1.TXT", b"one")], ["one"]),
        ([("./é 1.jpeg", make_image(1)), ("./é 1.txt", b"one")], ["one"]),
        (
            [("x/1.jpg", make_image(1)), ("x/1.txt", b"x"), ("y.z/1.jpg", make_image(1)), ("y.z/1.txt", b"y")],
            ["x", "y"],
        ),
        ([("Thumbs.db", b"x"), PHOTO, ("1.txt", b"one"), (".DS_Store", b"x")], ["there is no image", "one"]),
        ([PHOTO, ("1.caption", b"one")], ["there is no text"]),
        # members that lie apart
        ([PHOTO, ("2.jpg", make_image(2)), ("1.txt", b"1")], ["there is no text"] * 2 + ["there is no image"]),
        # pictures of all kinds
        ([("1.png", _encoded("PNG", "I;16")), ("1.txt", b"16 bits")], ["16 bits"]),
        ([("1.png", _encoded("PNG", "LA")), ("1.txt", b"alpha")], ["alpha"]),
        ([("1.jpg", _encoded("JPEG", "CMYK")), ("1.txt", b"for print")], ["for print"]),
        ([("1.tiff", _encoded("TIFF")), ("1.txt", b"scan")], ["scan"]),
        ([("1.jpg", b""), ("1.txt", b"one")], ["there is no image"]),
        ([("1.avif", b"?"), ("1.txt", b"one")], ["there is no image"]),
        # captions
        ([PHOTO, ("1.txt", b"\xef\xbb\xbfone")], ["one"]),
        ([PHOTO, ("1.txt", "one".encode("utf-16"))], ["the .txt member is not UTF-8"]),
        ([PHOTO, ("1.json", b'["one"]')], ["the .json member cannot be read"]),
        ([PHOTO, ("1.json", b'{"caption": 5}')], ["the text is not a string"]),
        ([PHOTO, ("1.json", b'{"caption": ["a", 5, ""]}')], ["a", "the text is not a string", "there is no text"]),
    ],
)
def test_members_of_tars_are_read_or_counted(tmp_path, members, expected):
    put(str(tmp_path), {"a.tar": tar_of(members)})
    assert _told("webdataset", str(tmp_path)) == expected


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.tar", b"", "is cut short"),
        ("a.tar", tar_of([PHOTO])[:1200], r"cut short in 1\.jpg, after byte 1200"),
        ("a.tar", gzip.compress(tar_of([PHOTO])), r"it is compressed; name it \.tar\.gz"),
        ("a.tar.gz", damaged_gzip(tar_of([PHOTO])), r"a\.tar\.gz: Error -3 .*; fetch or make this tar again"),
        ("a.zip", b"PK\3\4", "holds no tars"),
    ],
)
def test_tars_that_cannot_be_read(tmp_path, name, data, words):
    put(str(tmp_path), {name: data})
    with pytest.raises(UserError, match=words):
        _told("webdataset", str(tmp_path))


IMAGE = [{"bytes": make_image(1), "path": None}]


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"text": pa.array(["a"], pa.large_string())}, ["a"]),
        ({"text": pa.array(["a"]).dictionary_encode()}, ["a"]),
        ({"text": [b"a"]}, ["the text is not a string"]),
        ({"text": [[{"raw": "a"}]]}, ["the text is not a string"]),
        ({"text": [["a", None]]}, ["a", "there is no text"]),
        ({"text": ["a"], "image_id": [""]}, ["there is no id or no image_id"]),
        ({"text": ["a"], "image": [list(make_image(1))]}, ["the image is not bytes"]),
        ({"text": ["a"], "image": ["https://x.org/y.jpg"]}, ["the image is not bytes"]),
        ({"text": ["a"], "image": pa.array([make_image(1)], pa.large_binary())}, ["a"]),
    ],
)
def test_columns_of_parquet_are_read_or_counted(tmp_path, columns, expected):
    file = io.BytesIO()
    pq.write_table(pa.table({"image": IMAGE} | columns), file)
    put(str(tmp_path), {"a.parquet": file.getvalue()})
    assert _told("parquet", str(tmp_path)) == expected


def test_an_infinite_image_id_is_none(tmp_path):
    """As one that is missing: else all such images would be one."""
    file = io.BytesIO()
    images = [{"bytes": make_image(i), "path": None} for i in range(2)]
    pq.write_table(pa.table({"image": images, "text": ["a", "b"], "image_id": [float("inf")] * 2}), file)
    put(str(tmp_path), {"a.parquet": file.getvalue()})
    source = _open_source("parquet", str(tmp_path), {})
    one, two = (record.image_id for unit in source.units() for record in source.records(unit))
    assert one != two and "inf" not in (one, two)


@pytest.mark.parametrize("data", [b"", b"PAR1 and no more"])
def test_parquet_that_cannot_be_read(tmp_path, data):
    put(str(tmp_path), {"a.parquet": data})
    with pytest.raises(UserError, match=r"a\.parquet cannot be read as Parquet"):
        _told("parquet", str(tmp_path))


def test_a_table_that_changed_but_kept_its_size_is_another(tmp_path):
    """As a shard is: what was begun with the first does not go on with the second."""
    _table(tmp_path, b"path,caption\n0.jpg,a\n")
    before = _open_source("table", f"{tmp_path}/t.csv", {}).listing
    _table(tmp_path, b"path,caption\n0.jpg,b\n")
    assert _open_source("table", f"{tmp_path}/t.csv", {}).listing != before


def test_a_tar_that_changed_but_kept_its_size_is_another(tmp_path):
    versions = []
    for text in (b"a", b"b"):
        put(str(tmp_path), {"a.tar": tar_of([PHOTO, ("1.txt", text)])})
        source = _open_source("webdataset", str(tmp_path), {})
        versions.append((source.listing, source.versions))
    assert versions[0][0] == versions[1][0] and versions[0][1] != versions[1][1]
    assert json.loads(versions[0][0]) == {"a.tar": len(tar_of([PHOTO, ("1.txt", b"a")]))}
