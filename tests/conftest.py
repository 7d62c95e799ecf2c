"""What several tests need: an S3 server and a Ray cluster, each started once, and made-up images."""

from __future__ import annotations

import gc
import io
import os
import string
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

# Before any library reads them: few threads on a shared machine, and no person's own S3 keys or Ray cluster.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A SeaweedFS server with the bucket `vlmo`; its AWS variables are set for the rest of the session."""
    from vlmo_ray.demo.local_s3 import local_s3

    with pytest.MonkeyPatch.context() as patch, local_s3(tmp_path_factory.mktemp("s3")) as env:
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        yield env


@pytest.fixture
def bucket(s3_server):
    """An address in the bucket under which nothing is yet."""
    return f"s3://vlmo/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "bucket"])
def places(request, tmp_path):
    """Addresses of a source and an OUT."""
    if request.param == "folder":
        return str(tmp_path / "source"), str(tmp_path / "out")
    uri = request.getfixturevalue("bucket")
    return f"{uri}/source", f"{uri}/out"


@pytest.fixture(scope="session")
def started_ray(s3_server):
    """Ray on this machine with 2 CPUs; after the S3 server, so that its workers have the AWS variables."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=300_000_000,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture
def ray_cluster(started_ray):
    """The one Ray cluster of the session; a test leaves both of its CPUs free."""
    import ray

    yield
    until = time.monotonic() + 20
    while (free := ray.available_resources().get("CPU", 0)) < 2:
        assert time.monotonic() < until, f"{2 - free:g} CPUs are still reserved"
        gc.collect()  # Ray ends the actors of a dataset that failed when Python has collected its objects
        time.sleep(0.2)


@pytest.fixture
def vlmo(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """The command `vlmo` in this process: `vlmo(*arguments, **environment)` gives its exit code and what it printed."""
    from vlmo_ray import cli

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["vlmo", *arguments])
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                cli.main()
                code = 0
            except SystemExit as end:
                code = end.code
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


def make_image(seed: int, format: str = "JPEG", size: tuple[int, int] = (24, 16)) -> bytes:
    """An encoded image of noise, [size[1], size[0], 3]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def make_records(n: int, first: int = 0) -> list[dict]:
    """Pairs as `write_dataset` takes them; every third has the image of the one before."""
    return [
        {
            "id": f"pair-{i}",
            "image_id": f"image-{i - (i % 3 == 2)}",
            "image": make_image(i - (i % 3 == 2)),
            "text": f"caption {i} \N{SNOWMAN}",
            "forbid": ["flip"] if i % 4 == 0 else [],
        }
        for i in range(first, first + n)
    ]


def write_unchecked(uri: str, rows: list[dict], rows_per_group: int, groups_per_shard: int = 16) -> None:
    """A data set of pairs, with some that `write_dataset` would refuse."""
    from vlmo_ray.data.manifest import chunk_table, write_manifest
    from vlmo_ray.data.prepare.shards import write_shards
    from vlmo_ray.data.store import open_store

    cut = {"rows_per_group": rows_per_group, "groups_per_shard": groups_per_shard}
    chunks = write_shards(open_store(uri, create=True), rows, "{:05d}.parquet", **cut)
    write_manifest(uri, "parquet", chunk_table(chunks))


def small_scenes(seed: int, count: int) -> Iterator[dict]:
    """Scenes of 16 px. Captions have one letter or digit in place of each word: token ids below 1100 are enough."""
    from vlmo_ray.demo.scenes.records import records

    letters = string.ascii_lowercase + string.digits
    for record in records(seed, count, image_size=16):
        words = (letters[zlib.crc32(word.encode()) % 36] for word in record["text"].split())
        yield record | {"text": " ".join(words)}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> str:
    """60 small scenes in chunks of 7; half of the captions' bans on augmentations are lifted, to have some."""
    from vlmo_ray.data.prepare.shards import write_dataset

    folder = str(tmp_path_factory.mktemp("scenes"))
    drawn = enumerate(small_scenes(4, 60))
    rows = [record | {"forbid": record["forbid"] if i % 2 else []} for i, record in drawn]
    write_dataset(folder, rows, rows_per_group=7, groups_per_shard=3)
    return folder
