"""Preparation: every format, every drop, one seeded global order, resume, refusal, and bounded memory."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import make_image, make_records

from vlmo_ray.data import prepare as package
from vlmo_ray.data.manifest import MANIFEST, load_manifest
from vlmo_ray.data.prepare import Counts, prepare, shuffle
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.prepare.source import Split, image_problem, name_in
from vlmo_ray.data.prepare.stage import WORK
from vlmo_ray.data.read import Record, read_chunk
from vlmo_ray.data.store import Store
from vlmo_ray.errors import UserError

pytestmark = pytest.mark.ray
FLICKR = Path(__file__).parents[2].resolve().parent / "shared" / "data" / "flickr8k"
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def read_all(uri: str) -> list[Record]:
    manifest = load_manifest(uri)
    store = Store(uri)
    records = [r for i in range(manifest.num_chunks) for r in read_chunk(store, manifest.chunk(i), retries=0)]
    assert all(r.problem == "" for r in records)
    return records


def ids(uri: str) -> list[str]:
    return [r.id for r in read_all(uri)]


def dropped(uri: str) -> list[dict]:
    return [json.loads(line) for line in Store(uri).read("dropped.jsonl").splitlines()]


def put(uri: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        Store(uri).write(name, data)


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def tars(num_tars: int, rows: int, extra: int = 0) -> dict[str, bytes]:
    """Tars named 000.tar, ...; `extra` random bytes after each image make them as large as wished."""
    noise = np.random.default_rng(0)
    return {
        f"{t:03d}.tar": tar_of(
            [
                (
                    f"{i:04d}.{s}",
                    make_image(i) + noise.bytes(extra) if s == "jpg" else f"text {t} {i}".encode(),
                )
                for i in range(rows)
                for s in ("jpg", "txt")
            ]
        )
        for t in range(num_tars)
    }


@pytest.fixture(params=["folder", "bucket"])
def places(request, tmp_path):
    """Addresses of a source and an OUT."""
    if request.param == "folder":
        return str(tmp_path / "source"), str(tmp_path / "out")
    uri = request.getfixturevalue("bucket")
    return f"{uri}/source", f"{uri}/out"


def test_karpathy(ray_cluster, places):
    source, out = places
    sentences = [
        {"sentid": 0, "raw": "first"},
        {"sentid": 1, "raw": " "},
        {"sentid": 2, "raw": "third"},
    ]
    images = [
        {"filename": "a.jpg", "imgid": 0, "split": "train", "sentences": sentences},
        {"filename": "b.png", "imgid": 1, "split": "restval", "sentences": [{"sentid": 3, "raw": "b"}]},
        {"filename": "gone.jpg", "imgid": 2, "split": "train", "sentences": [{"sentid": 4, "raw": "c"}]},
        {"filename": "../a.jpg", "imgid": 3, "split": "train", "sentences": [{"sentid": 5, "raw": "d"}]},
        {"filename": "a.jpg", "imgid": 4, "split": "val", "sentences": [{"sentid": 6, "raw": "e"}]},
        {"filename": "text.jpg", "imgid": 5, "split": "train", "sentences": [{"sentid": 7, "raw": "f"}]},
        {
            "filename": "coco.jpg",
            "filepath": "val2014",
            "split": "train",
            "sentences": [{"sentid": 8, "raw": "g"}],
        },
    ]
    put(source, {"dataset_x.json": json.dumps({"images": images}).encode()})
    pictures = {"a.jpg": make_image(0), "b.png": make_image(1, "PNG"), "val2014/coco.jpg": make_image(2)}
    put(f"{source}/images", pictures | {"text.jpg": b"not an image"})
    counts = prepare("karpathy", source, out, split="train+restval")
    reasons = {
        "the caption is empty": 1,
        "the image file is missing": 1,
        "the image header is unreadable": 1,
        "the image path leads out of the image folder": 1,
    }
    assert counts == Counts(8, 4, reasons)
    assert "8 pairs read, 4 kept, 4 dropped" in str(counts)
    read = {r.id: (r.image_id, r.text, r.image) for r in read_all(out)}
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
            "the caption is empty": 1,
            "the id is a duplicate": 1,
            "the image header is unreadable": 1,
            "there is no image": 1,
        },
    )
    read = {r.id: (r.image_id, r.text, r.forbid) for r in read_all(out)}
    assert read == {"a/00.tar/1": ("a/00.tar/1", "one", ()), "my-2": ("im", "two", ("color",))}
    duplicate = next(e for e in dropped(out) if "duplicate" in e["reason"])
    assert duplicate["address"] == f"{source}/b.tgz#6"  # the later one


def test_parquet(ray_cluster, places, tmp_path):
    source, out = places
    pictures = [make_image(i) for i in range(6)]
    struct = pa.array([{"bytes": p, "path": "x.jpg"} for p in pictures[:3]])
    tables = {
        "hf.parquet": {"image": struct, "caption": [["a", "b"], ["c"], []]},
        "sub/img2dataset.parquet": {
            "jpg": [*pictures[3:5], None],
            "caption": ["d", None, "f"],
            "key": [1, 2, 3],
        },
        "own.parquet": {
            "id": ["own"],
            "image_id": ["i"],
            "image": [pictures[5]],
            "text": ["g"],
            "forbid": [["crop"]],
        },
    }
    for name, columns in tables.items():
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, row_group_size=2)
        put(source, {name: file.getvalue()})
    counts = prepare("parquet", source, out)
    assert counts == Counts(7, 5, {"the caption is empty": 1, "there is no image": 1})
    read = {r.id: r for r in read_all(out)}
    assert {k: (r.text, pictures.index(r.image)) for k, r in read.items()} == {
        "hf.parquet:0#0": ("a", 0),
        "hf.parquet:0#1": ("b", 0),
        "hf.parquet:1#0": ("c", 1),
        "sub/img2dataset.parquet:0": ("d", 3),
        "own": ("g", 5),
    }
    assert (
        read["hf.parquet:0#0"].image_id == read["hf.parquet:0#1"].image_id != read["hf.parquet:1#0"].image_id
    )
    assert read["own"].image_id == "i" and read["own"].forbid == ("crop",)
    with pytest.raises(UserError, match=r"has no text column alt; it has .*text_column="):
        prepare("parquet", source, f"{out}2", text_column="alt")


def _table(rows: list[list[str]], **dialect) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, **dialect).writerows(rows)
    return file.getvalue().encode()


def test_table(ray_cluster, places, monkeypatch):
    source, out = places
    monkeypatch.setattr(
        "vlmo_ray.data.prepare.table.SPLIT_BYTES", 2500
    )  # some rows per split, cut in the driver
    put(source, {f"im/{i}.jpg": make_image(i) for i in range(12)})
    captions = [f'caption {i}, "quoted"\nand on a second line' for i in range(12)]
    rows = [["title", "n", "filepath"], *([c, str(i), f"im/{i}.jpg"] for i, c in enumerate(captions))]
    rows[4][2] = "im/none.jpg"
    rows[5][2] = f"{source}/im/5.jpg"  # complete addresses below the image folder will do
    put(source, {"t.csv": _table(rows) + b"\n" + b"too few\n" + b"\xff,1,im/1.jpg\n"})
    counts = prepare("table", f"{source}/t.csv", out)
    assert counts == Counts(
        14,
        11,
        {
            "the caption is not UTF-8": 1,
            "the image file is missing": 1,
            "the row has too few columns": 1,
        },
    )
    by_row = {int(r.id.removeprefix("t.csv:")): r for r in read_all(out)}
    assert {i: r.text for i, r in by_row.items()} == {i: c for i, c in enumerate(captions) if i != 3}
    assert by_row[2].image_id == "im/2.jpg" and by_row[2].image == make_image(2)
    assert Store(out).exists("prepare.json") and not Store(out).list(WORK)

    plain = "\n".join(f'images/{i}.jpg\t"{i} is open' for i in range(3)).encode()
    put(source, {"plain.tsv": plain} | {f"deep/images/{i}.jpg": make_image(i) for i in range(3)})
    options = {"header": False, "quoting": False, "images": f"{source}/deep"}
    assert prepare("table", f"{source}/plain.tsv", f"{out}2", **options).kept == 3
    assert {r.text for r in read_all(f"{out}2")} == {f'"{i} is open' for i in range(3)}
    with pytest.raises(UserError, match=r"has no image column .* it has title, n, filename;"):
        put(source, {"u.csv": b"title,n,filename\n"})
        prepare("table", f"{source}/u.csv", f"{out}3", image_column="file")


def test_one_seeded_order_however_it_is_cut(ray_cluster, tmp_path):
    source = str(tmp_path / "source")
    put(source, tars(num_tars=4, rows=150, extra=8000))
    outs = [str(tmp_path / name) for name in "abcd"]
    for out, options in zip(outs, [{}, {"memory": 1 << 20}, {"rows_per_group": 7}, {"seed": 1}], strict=True):
        assert prepare("webdataset", source, out, **options).kept == 600
    order = ids(outs[0])
    assert ids(outs[1]) == ids(outs[2]) == order != ids(outs[3])
    assert order == sorted(order, key=lambda id: shuffle.key_of(0, id))
    many, small = load_manifest(outs[1]), load_manifest(outs[2])
    assert len(many.shards) > 4 and len(load_manifest(outs[0]).shards) == 1
    assert set(small.chunk_rows[:-1].tolist()) == {7} and small.num_rows == 600
    # Every tenth of the order has pairs of every tar: about 15 of each.
    tar = np.array([int(id.split(".")[0]) for id in order]).reshape(10, 60)
    share = np.stack([(tar == t).sum(1) for t in range(4)])
    assert share.min() >= 5 and share.max() <= 27
    footer = pq.read_metadata(tmp_path / "a" / load_manifest(outs[0]).shards[0])
    assert footer.row_group(0).column(0).compression == "ZSTD"


def test_shards_of_the_wished_size(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, tars(num_tars=2, rows=100, extra=20_000))
    prepare("webdataset", source, out, shard_bytes=1 << 20, rows_per_group=8)
    sizes = [p.stat().st_size for p in tmp_path.glob("out/*-*.parquet")]
    assert len(sizes) == 4 and max(sizes) < 1.3 * (1 << 20) and min(sizes) > 0.5 * (1 << 20)


class Faulty:
    """40 pairs in each of 6 splits; the last three cannot be read while the file `fault` exists."""

    listing = "made up"

    def __init__(self, uri: str, rows: list[dict]) -> None:
        self.uri, self.rows = uri, rows

    def splits(self) -> list[Split]:
        return [Split(str(i), 400_000) for i in range(6)]

    def records(self, split: Split):
        with open(f"{self.uri}/log", "a") as log:
            log.write(split.name)
        for i, row in enumerate(self.rows):
            if i == 30 and int(split.name) >= 3 and os.path.exists(f"{self.uri}/fault"):
                raise UserError(f"injected into split {split.name}")
            id, text = f"{split.name}-{i}", "" if i == 5 else row["text"]
            yield Record(id, row["image_id"], row["image"], text, (), "", f"at {id}")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_resume_after_failures_in_both_passes(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "FORMATS", {"faulty": lambda uri: Faulty(uri, make_records(40))})
    source, out, calm = str(tmp_path), tmp_path / "out", tmp_path / "calm"

    def run(place):
        return prepare("faulty", source, str(place), memory=1 << 20)

    undisturbed = run(calm)
    assert undisturbed == Counts(240, 234, {"the caption is empty": 6})
    (tmp_path / "log").unlink()
    (tmp_path / "fault").touch()
    with pytest.raises(UserError, match=r"injected into split [345]"):
        run(out)
    done = {int(p.stem) for p in (out / WORK / "scatter").iterdir()}
    assert done <= {0, 1, 2} and done and not (out / MANIFEST).exists()
    (tmp_path / "log").unlink()
    (tmp_path / "fault").unlink()
    (out / "00001-000.parquet" / "in the way").mkdir(parents=True)
    with pytest.raises(UserError, match=r"00001-000\.parquet"):
        run(out)
    assert set((tmp_path / "log").read_text()) == {str(i) for i in range(6)} - {str(i) for i in done}
    (tmp_path / "log").unlink()
    shutil.rmtree(out / "00001-000.parquet")
    assert run(out) == undisturbed
    assert not (tmp_path / "log").exists()  # the source was not read again
    assert files(out) == files(calm) and len(files(calm)) > 4
    assert run(out) == undisturbed
    assert not any(name.startswith(WORK) for name in files(out))


def test_resume_after_the_driver_is_killed(ray_cluster, tmp_path):
    source, out, calm = str(tmp_path / "source"), tmp_path / "out", tmp_path / "calm"
    put(source, tars(num_tars=3, rows=100, extra=40_000))
    code = (
        "import sys\nfrom vlmo_ray.data.prepare import prepare\n"
        "prepare('webdataset', sys.argv[1], sys.argv[2], memory=1 << 20)"
    )
    command = [sys.executable, "-c", code, source, str(out)]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 90
        while not any(out.glob(f"{WORK}/gather/*.json")) and driver.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    time.sleep(1)  # its workers notice and end
    options = {"memory": 1 << 20}
    assert prepare("webdataset", source, str(out), **options) == Counts(300, 300)
    prepare("webdataset", source, str(calm), **options)
    assert files(out) == files(calm)


def test_refusals(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, tars(1, 5))
    prepare("webdataset", source, out)
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"another preparation \(seed was 0, is now 5\)"):
        prepare("webdataset", source, out, seed=5)
    put(source, {"001.tar": tars(1, 2)["000.tar"]})
    with pytest.raises(UserError, match="the source has changed"):
        prepare("webdataset", source, out)
    (tmp_path / "source" / "001.tar").unlink()
    assert files(tmp_path) == before
    put(str(tmp_path / "taken"), {"thesis.txt": b"dear"})
    cases = {
        r"thesis\.txt is in the way": ("webdataset", source, str(tmp_path / "taken"), {}),
        "lies inside of the source": ("webdataset", source, f"{source}/sub", {}),
        "'csv' is not a format; choose from karpathy": ("csv", source, out, {}),
        "'split' is not an option of webdataset": ("webdataset", source, out, {"split": "train"}),
        "say where": ("webdataset", source, None, {}),
        "only webdataset and parquet": ("table", f"{source}/000.tar", None, {"index": True}),
        "holds no Parquet files": ("parquet", source, out, {}),
        "forbid='spin'": ("webdataset", source, out, {"forbid": ("spin",)}),
        "at least 1 MiB": ("webdataset", source, out, {"memory": 5}),
        "choose a smaller memory": ("webdataset", source, f"{out}3", {"memory": 1 << 50}),
    }
    for message, (format, of, to, options) in cases.items():
        if format == "table":
            Path(of).with_suffix(".csv").write_text("0,1\n")
            options = options | {"header": False, "images": source, "image_column": 0}
            of = str(Path(of).with_suffix(".csv"))
            Path(of).write_text("000.tar,caption\n")
        with pytest.raises(UserError, match=message):
            prepare(format, of, to, **options)


def test_a_damaged_tar_stops_and_names_itself(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    made = tars(2, 9)
    put(source, made | {"001.tar": made["001.tar"][:5000]})
    with pytest.raises(UserError, match=rf"{source}/001\.tar: the tar is cut short"):
        prepare("webdataset", source, out)
    with pytest.raises(UserError, match=rf"{source}/001\.tar: the tar is cut short"):
        prepare("webdataset", source, index=True)
    assert not Path(source, MANIFEST).exists() and not Path(out, MANIFEST).exists()


def test_nothing_left_is_an_error(ray_cluster, tmp_path):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, {"a.tar": tar_of([("0.txt", b"no image")])})
    with pytest.raises(UserError, match=r"no pair .* is left(?s:.*)there is no image"):
        prepare("webdataset", source, out)


def test_long_lists_of_dropped_pairs_are_cut(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "MAX_LISTED", 3)
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    members = [(f"{i}.txt", b"no image") for i in range(8)]
    put(source, {"a.tar": tar_of([*members, ("9.jpg", make_image(9)), ("9.txt", b"x")])})
    assert prepare("webdataset", source, out) == Counts(9, 1, {"there is no image": 8})
    lines = dropped(out)
    assert [e.get("id") for e in lines] == ["a.tar/0", "a.tar/1", "a.tar/2", None]
    assert lines[-1] == {"note": "5 more were dropped and are not listed"}


@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_index_in_place(ray_cluster, places, format):
    source, _ = places
    if format == "webdataset":
        put(source, tars(3, 10))
    else:
        write_dataset(source, make_records(30), 4, groups_per_shard=3)
        Store(source).delete(MANIFEST)
    before = {name: Store(source).read(name) for name in Store(source).list()}
    counts = prepare(format, source, index=True, rows_per_group=4, forbid=("crop",))
    assert counts == Counts(30, 30)
    after = {name: Store(source).read(name) for name in Store(source).list()}
    assert set(after) - set(before) == {MANIFEST, "prepare.json"}
    assert {name: after[name] for name in before} == before
    order = ids(source)
    if format == "webdataset":
        assert order == [f"{t:03d}.tar/{i:04d}" for t in range(3) for i in range(10)]
        assert load_manifest(source).chunk_rows.tolist() == [4, 4, 2] * 3
    else:
        assert order == [f"pair-{i}" for i in range(30)]
    assert read_all(source)[1].forbid == ("crop",)
    assert prepare(format, source, index=True, rows_per_group=4, forbid=("crop",)) == counts
    with pytest.raises(UserError, match="rows_per_group was 4, is now 5"):
        prepare(format, source, index=True, rows_per_group=5, forbid=("crop",))
    with pytest.raises(UserError, match="leave out"):
        prepare(format, source, f"{source}-other", index=True)


def test_indexing_leaves_other_peoples_files_alone(ray_cluster, tmp_path, monkeypatch):
    source = str(tmp_path)
    own = {"_work/notes.txt": b"mine", "_work/x.tar": tars(1, 2)["000.tar"], "dropped.jsonl": b"mine too"}
    put(source, tars(1, 3) | own)
    assert prepare("webdataset", source, index=True) == Counts(5, 5)
    after = files(tmp_path)
    assert own.items() <= after.items() and "_work/x.tar/0001" in ids(source)

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            prepare("webdataset", source, index=True)
        assert f"delete {source}" not in str(caught.value) and "delete it" not in str(caught.value)
        assert own.items() <= files(tmp_path).items()

    put(source, {"001.tar": tars(1, 3)["000.tar"]})
    refused(r"the source has changed\); delete prepare\.json and manifest\.parquet there")
    for broken in (b"[1]", b"{"):
        put(source, {"prepare.json": broken})
        refused(r"prepare\.json that cannot be read; delete prepare\.json and manifest\.parquet")
    Store(source).delete("prepare.json")
    refused(r"manifest\.parquet is in the way.* move it")
    Store(source).delete(MANIFEST)
    put(source, {f"{WORK}/theirs": b"x"})
    refused(r"theirs is in the way")
    Store(source).delete_folder(WORK)
    assert prepare("webdataset", source, index=True).kept == 8


def test_a_failing_store_is_not_taken_for_damage(ray_cluster, tmp_path, monkeypatch):
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    put(source, tars(1, 3))
    prepare("webdataset", source, out)

    def down(*args, **kwargs):
        raise UserError("cannot reach the server")

    monkeypatch.setattr(Store, "read", down)
    with pytest.raises(UserError, match="^cannot reach the server$"):
        prepare("webdataset", source, out)


def test_image_problem():
    good = make_image(3, size=(64, 48))
    cut = good[: len(good) // 2]
    assert image_problem(good, verify=True) == image_problem(cut, verify=False) == ""
    assert image_problem(cut, verify=True) == "the image cannot be decoded"
    assert image_problem(None, False) == image_problem(b"", True) == "there is no image"
    assert image_problem(b"GIF89a" + good, False) == "the image header is unreadable"
    bomb = bytearray(make_image(0, "PNG"))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2  # width and height
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    assert image_problem(bytes(bomb), False) == "the image is too large"


def test_name_in(tmp_path):
    folder, remote = Store(str(tmp_path)), Store("s3://b/p")
    assert name_in(folder, "a/./b.jpg") == name_in(folder, f"{tmp_path}/a/b.jpg") == "a/b.jpg"
    assert name_in(remote, "s3://b/p/x.jpg") == "x.jpg" and name_in(Store("/"), "/etc/x") == "etc/x"
    for path in ("../x", "/etc/x", "a/../../x", "", ".", "http://x/y.jpg", f"{tmp_path}-other/x"):
        assert name_in(folder, path) is None


PEAKS = """
import sys, ray
from vlmo_ray.data.prepare import prepare
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
for name in ("small", "large"):
    print(name, flush=True)
    prepare("webdataset", f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/{name}-out", memory=8 << 20)
print("end", flush=True)
"""


def _anonymous_bytes(root: int) -> dict[int, int]:
    """Private memory of each process below `root`, itself included."""
    parent, size = {}, {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:  # it has just ended
            continue
        pid = int(fields["Pid"])
        parent[pid] = int(fields["PPid"])
        size[pid] = int(fields.get("RssAnon", "0 kB").split()[0]) * 1024

    def below(pid: int) -> bool:
        while pid and pid != root:
            pid = parent.get(pid, 0)
        return pid == root

    return {pid: size[pid] for pid in size if below(pid)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    """240 MB with an allowance of 8 MB: no process grows by more than a fraction of the data."""
    put(str(tmp_path / "small"), tars(2, 8, extra=100_000))
    put(str(tmp_path / "large"), tars(6, 400, extra=100_000))
    driver = subprocess.Popen(
        [sys.executable, "-c", PEAKS, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    os.set_blocking(driver.stdout.fileno(), False)
    peak, phase = {"start": 0, "small": 0, "large": 0, "end": 0}, "start"
    try:
        while driver.poll() is None:
            phase = ((driver.stdout.read() or b"").decode().split() or [phase])[-1]
            peak[phase] = max(peak[phase], *_anonymous_bytes(driver.pid).values(), 0)
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == 0 and load_manifest(str(tmp_path / "large-out")).num_rows == 2400
    assert peak["small"] > 20e6  # the measurement works
    assert peak["large"] - peak["small"] < 100e6, peak


@pytest.mark.skipif(not FLICKR.is_dir(), reason="the photos of Flickr8k are not here")
def test_real_photos(ray_cluster, tmp_path):
    entries = json.loads((FLICKR / "dataset_flickr8k.json").read_text())["images"]
    some = [e for e in entries if e["split"] == "val"][:30]
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps({"images": some}))
    options = {"split": "val", "images": str(FLICKR / "images"), "verify": True}
    counts = prepare("karpathy", str(tmp_path), str(tmp_path / "out"), **options)
    assert counts == Counts(150, 150)
    read = read_all(str(tmp_path / "out"))
    assert {(r.image_id, r.text) for r in read} == {
        (e["filename"], s["raw"]) for e in some for s in e["sentences"]
    }
    for r in read[:10]:
        assert r.image == (FLICKR / "images" / r.image_id).read_bytes()
