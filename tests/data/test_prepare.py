"""Every public format becomes the pairs that it holds, and every drop is counted with its reason."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_image
from PIL import Image
from sources import dropped, put, read_all, tar_of

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import decode_eval, image_problem
from vlmo_ray.data.prepare import Counts, prepare
from vlmo_ray.data.prepare.source import image_id_of, name_in
from vlmo_ray.data.prepare.stage import WORK
from vlmo_ray.data.store import Store
from vlmo_ray.errors import DecodeError, UserError

pytestmark = pytest.mark.ray
FLICKR = Path(__file__).parents[2].resolve().parent / "shared" / "data" / "flickr8k"


def test_karpathy(ray_cluster, places):
    source, out = places
    sentences = [{"sentid": 0, "raw": "first"}, {"sentid": 1, "raw": " "}, {"sentid": 2, "raw": "third"}]
    images = [
        {"filename": "a.jpg", "imgid": 0, "split": "train", "sentences": sentences},
        {"filename": "b.png", "imgid": 1, "split": "restval", "sentences": [{"sentid": 3, "raw": "b"}]},
        {"filename": "gone.jpg", "imgid": 2, "split": "train", "sentences": [{"sentid": 4, "raw": "c"}]},
        {"filename": "../a.jpg", "imgid": 3, "split": "train", "sentences": [{"sentid": 5, "raw": "d"}]},
        {"filename": "a.jpg", "imgid": 4, "split": "val", "sentences": [{"sentid": 6, "raw": "e"}]},
        {"filename": "text.jpg", "imgid": 5, "split": "train", "sentences": [{"sentid": 7, "raw": "f"}]},
        {"filename": "coco.jpg", "filepath": "val2014", "split": "train", "sentences": [{"sentid": 8, "raw": "g"}]},
    ]
    put(source, {"dataset_x.json": json.dumps({"images": images}).encode()})
    pictures = {"a.jpg": make_image(0), "b.png": make_image(1, "PNG"), "val2014/coco.jpg": make_image(2)}
    put(f"{source}/images", pictures | {"text.jpg": b"not an image"})
    counts = prepare("karpathy", source, out, split="train+restval")
    reasons = {
        "there is no text": 1,
        "the image file is missing": 1,
        "the image header is unreadable": 1,
        "the image path leads out of the image folder": 1,
    }
    assert counts == Counts(8, 4, reasons)
    assert "8 records read, 4 kept, 4 dropped" in str(counts)
    read = {r.id: (r.image_id, r.values["text"], r.values["image"]) for r in read_all(out)}
    assert read == {
        "a.jpg#0": ("a.jpg", "first", pictures["a.jpg"]),
        "a.jpg#2": ("a.jpg", "third", pictures["a.jpg"]),
        "b.png#3": ("b.png", "b", pictures["b.png"]),
        "coco.jpg#8": ("coco.jpg", "g", pictures["val2014/coco.jpg"]),
    }
    listed = dropped(out)
    assert sorted(entry["reason"] for entry in listed) == sorted(reasons)
    assert {"address": f"{source}/dataset_x.json#4", "id": "gone.jpg#4"}.items() <= listed[1].items()
    with pytest.raises(UserError, match=r"no split 'test'; it has restval, train, val"):
        prepare("karpathy", source, f"{out}2", split="test")
    with pytest.raises(UserError, match=r"none of 5 images .* images="):
        prepare("karpathy", source, f"{out}2", images=str(Path(__file__).parent))


def test_webdataset(ray_cluster, places):
    source, out = places
    good = [
        ("1.jpg", make_image(1)),
        ("1.json", b'{"caption": "one"}'),
        ("2.png", make_image(2, "PNG")),
        ("2.txt", b"two"),
        ("2.json", b'{"id": "my-2", "image_id": "im", "forbid": ["color"]}'),
    ]
    bad = [
        ("3.jpg", make_image(3)[:10]),
        ("3.txt", b"three"),
        ("4.txt", b"four"),
        ("5.jpg", make_image(5)),
        ("6.jpg", make_image(6)),
        ("6.txt", b"six"),
        ("6.json", b'{"id": "my-2"}'),
    ]
    put(source, {"a/00.tar": tar_of(good), "b.tgz": gzip.compress(tar_of(bad)), "notes.md": b"no tar"})
    counts = prepare("webdataset", source, out)
    assert counts == Counts(
        6,
        2,
        {
            "there is no text": 1,
            "the id is a duplicate": 1,
            "the image header is unreadable": 1,
            "there is no image": 1,
        },
    )
    read = {r.id: (r.image_id, r.values["text"], r.forbid) for r in read_all(out)}
    assert read == {"a/00.tar/1": (image_id_of(make_image(1)), "one", ()), "my-2": ("im", "two", ("color",))}
    duplicate = next(e for e in dropped(out) if "duplicate" in e["reason"])
    assert duplicate["address"] == f"{source}/b.tgz#6"  # the later one


def test_parquet(ray_cluster, places, tmp_path):
    source, out = places
    pictures = [make_image(i) for i in range(6)]
    struct = pa.array([{"bytes": p, "path": "x.jpg"} for p in pictures[:3]])
    tables = {
        "hf.parquet": {"image": struct, "caption": [["a", "b"], ["c"], []]},
        "sub/img2dataset.parquet": {"jpg": [*pictures[3:5], None], "caption": ["d", None, "f"], "key": [1, 2, 3]},
        "own.parquet": {"id": ["own"], "image_id": ["i"], "image": [pictures[5]], "text": ["g"], "forbid": [["crop"]]},
    }
    for name, columns in tables.items():
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, row_group_size=2)
        put(source, {name: file.getvalue()})
    counts = prepare("parquet", source, out)
    assert counts == Counts(8, 5, {"there is no text": 2, "there is no image": 1})
    read = {r.id: r for r in read_all(out)}
    assert {k: (r.values["text"], pictures.index(r.values["image"])) for k, r in read.items()} == {
        "hf.parquet:0#0": ("a", 0),
        "hf.parquet:0#1": ("b", 0),
        "hf.parquet:1#0": ("c", 1),
        "sub/img2dataset.parquet:0": ("d", 3),
        "own": ("g", 5),
    }
    assert read["hf.parquet:0#0"].image_id == read["hf.parquet:0#1"].image_id != read["hf.parquet:1#0"].image_id
    assert read["own"].image_id == "i" and read["own"].forbid == ("crop",)
    with pytest.raises(UserError, match=r"has no text column alt; it has .*text_column="):
        prepare("parquet", source, f"{out}2", text_column="alt")


def _table(rows: list[list[str]], **dialect) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue().encode()


def test_table(ray_cluster, places, monkeypatch):
    source, out = places
    monkeypatch.setattr("vlmo_ray.data.prepare.table.UNIT_BYTES", 2500)  # some rows per unit, cut in the driver
    put(source, {f"im/{i}.jpg": make_image(i) for i in range(12)})
    captions = [f'caption {i}, "quoted"\nand on a second line' for i in range(12)]
    rows = [["title", "n", "filepath"], *([c, str(i), f"im/{i}.jpg"] for i, c in enumerate(captions))]
    rows[4][2] = "im/none.jpg"
    rows[5][2] = f"{source}/im/5.jpg"  # complete addresses below the image folder will do
    put(source, {"t.csv": _table(rows) + b"\n" + b"too few\n" + b"\xff,1,im/1.jpg\n"})
    counts = prepare("table", f"{source}/t.csv", out)
    assert counts == Counts(
        14, 11, {"the caption is not UTF-8": 1, "the image file is missing": 1, "the row has too few columns": 1}
    )
    by_row = {int(r.id.removeprefix("t.csv:")): r for r in read_all(out)}
    assert {i: r.values["text"] for i, r in by_row.items()} == {i: c for i, c in enumerate(captions) if i != 3}
    assert by_row[2].image_id == "im/2.jpg" and by_row[2].values["image"] == make_image(2)
    assert Store(out).exists("prepare.json") and not Store(out).list(WORK)

    plain = "\n".join(f'images/{i}.jpg\t"{i} is open' for i in range(3)).encode()
    put(source, {"plain.tsv": plain} | {f"deep/images/{i}.jpg": make_image(i) for i in range(3)})
    options = {"header": False, "quoting": False, "images": f"{source}/deep"}
    assert prepare("table", f"{source}/plain.tsv", f"{out}2", **options).kept == 3
    assert {r.values["text"] for r in read_all(f"{out}2")} == {f'"{i} is open' for i in range(3)}
    with pytest.raises(UserError, match=r"has no image column .* it has title, n, filename;"):
        put(source, {"u.csv": b"title,n,filename\n"})
        prepare("table", f"{source}/u.csv", f"{out}3", image_column="file")


def test_image_problem():
    """Preparing refuses what training would: the same formats, sizes and damage."""
    good, grey = make_image(3, size=(64, 48)), io.BytesIO()
    Image.new("L", (4, 3)).save(grey, "PNG")
    cut = good[: len(good) // 2]
    assert image_problem(good, verify=True) == image_problem(cut, verify=False) == ""
    assert image_problem(cut, verify=True) == "the image cannot be decoded"
    assert image_problem(b"no image" + good, verify=True) == "the image header is unreadable"
    assert image_problem(grey.getvalue(), True, is_mask=True) == ""
    assert image_problem(good, False, is_mask=True) == "the mask has several channels"
    for format in ("GIF", "BMP", "WEBP"):
        assert image_problem(make_image(3, format), verify=True) == ""
    assert image_problem(make_image(3, "TIFF"), verify=False) == "the image header is unreadable"
    for width, height in ((8_001, 8_000), (30_001, 1), (100_000, 100_000)):
        large = bytearray(make_image(0, "PNG"))
        large[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        large[29:33] = zlib.crc32(bytes(large[12:29])).to_bytes(4, "big")
        assert image_problem(bytes(large), verify=False) == "the image size is outside the limits"
        with pytest.raises(DecodeError, match="outside the limits"):
            decode_eval(bytes(large), 16, DataConfig())


def test_name_in(tmp_path):
    folder, remote = Store(str(tmp_path)), Store("s3://b/p")
    assert name_in(folder, "a/./b.jpg") == name_in(folder, f"{tmp_path}/a/b.jpg") == "a/b.jpg"
    assert name_in(remote, "s3://b/p/x.jpg") == "x.jpg" and name_in(Store("/"), "/etc/x") == "etc/x"
    for path in ("../x", "/etc/x", "a/../../x", "", ".", "http://x/y.jpg", f"{tmp_path}-other/x"):
        assert name_in(folder, path) is None


@pytest.mark.skipif(not FLICKR.is_dir(), reason="the photos of Flickr8k are not here")
def test_real_photos(ray_cluster, tmp_path):
    entries = json.loads((FLICKR / "dataset_flickr8k.json").read_text())["images"]
    some = [e for e in entries if e["split"] == "val"][:30]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": some}))
    options = {"split": "val", "images": str(FLICKR / "images"), "verify": True}
    counts = prepare("karpathy", str(tmp_path), str(tmp_path / "out"), **options)
    assert counts == Counts(150, 150)
    read = read_all(str(tmp_path / "out"))
    assert {(r.image_id, r.values["text"]) for r in read} == {
        (e["filename"], s["raw"]) for e in some for s in e["sentences"]
    }
    for r in read[:10]:
        assert r.values["image"] == (FLICKR / "images" / r.image_id).read_bytes()
