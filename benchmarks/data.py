"""Pairs per second from an S3 server to training batches, compared with other loaders and with upper bounds.

    python benchmarks/data.py [--out FILE] [--plot FILE] [--peers DIR] [--repeats 3]

SeaweedFS on this machine serves JPEGs made for the benchmark. Every candidate runs in a fresh process, reads one epoch
and turns it into batches of uint8 images, token ids and masked token ids with labels. Two tables: the peers as their
documentation has them, with Pillow and torchvision's transforms of the same sizes and kinds; and all with our functions
to decode, tokenise and mask:

- ours: `Stream` with one worker; it also computes duplicate keys and a few more columns, which the others do not;
- webdataset (tars at presigned URLs), mosaicml-streaming (MDS), litdata: each in its own format, by its own writer;
- dataloader-local: torch's DataLoader on JPEG files on the local disk;
- decode-only: JPEGs in memory; read-only: one process that reads our chunks without decoding.

The result is pairs per CPU-second of the processes that read and decode. Needs the package's `demo` extra. The peers
are webdataset, mosaicml-streaming and litdata; `--peers` is a folder with those that are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import socketserver
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from report import publish, table

from vlmo_ray.config import DataConfig
from vlmo_ray.data.decode import decode_train
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.manifest import load_manifest
from vlmo_ray.data.order import Order, Schedule
from vlmo_ray.data.pipeline import Stream
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.read import read_chunk
from vlmo_ray.data.reader import Reader, Sources
from vlmo_ray.data.store import Store
from vlmo_ray.data.text import Tokenizer, mask_whole_words
from vlmo_ray.demo.local_s3 import local_s3

SIZE, TEXT_LEN, VOCABULARY, MLM_PROBABILITY, DATA = 224, 40, 30522, 0.15, DataConfig()
SHARD_BYTES = 16 << 20  # about a chunk of ours
BUCKET, LIMIT_S = "bench", 900
RAY = "Ray's own"  # Ray's processes that neither read nor decode


@dataclass(frozen=True)
class Trial:
    """What a candidate's process is told. `folder` holds the JPEGs and has room for a cache."""

    name: str
    folder: str
    pairs: int
    batch: int
    processes: int
    begin: int = 0  # batches before the clocks start
    end: int = 0  # batches before the clocks stop
    rate: float = 0.0  # pairs/s that the consumer takes; 0: as fast as they come
    documented: bool = False  # images by Pillow and torchvision

    def decode(self) -> Decode:
        return Documented() if self.documented else Decode()

    @property
    def steps(self) -> int:
        return self.pairs // self.batch

    @property
    def data_set(self) -> str:
        return f"s3://{BUCKET}/{'ours' if self.name == 'read-only' else self.name}"

    @property
    def cache(self) -> str:
        return tempfile.mkdtemp(dir=self.folder)

    def files(self) -> list[Path]:
        return sorted(Path(self.folder, "jpeg").iterdir())


# ---- the pairs --------------------------------------------------------------------------------------------


def make_picture(file: Path) -> int:
    """Writes a photo-like JPEG, noise of three scales seeded by the number in its name; returns its size in bytes."""
    generator = np.random.default_rng(int(file.stem))
    pixels = np.full((375, 500, 3), 127.5, np.float32)
    for width, height, contrast in ((6, 4, 1.0), (32, 24, 0.27), (125, 94, 0.24)):
        noise = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels += contrast * (np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) - 127.5)
    jpeg = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(jpeg, "JPEG", quality=90)
    return file.write_bytes(jpeg.getvalue())


def caption(file: Path) -> str:
    return f"A photo of number {int(file.stem)}, with two dogs that run over a green lawn."


class Decode:
    """JPEG and caption -> image, token ids and targets of masked language modelling; the same for all candidates."""

    def __init__(self):
        self._tokenizer, self._count = Tokenizer(TEXT_LEN), 0

    def image(self, image: bytes, draw: Draw) -> np.ndarray:
        return decode_train(image, SIZE, DATA, (), draw)

    def __call__(self, image: bytes, text: str | bytes) -> tuple[np.ndarray, ...]:
        self._count += 1
        draw = Draw(os.getpid(), self._count, 0)
        pixels = self.image(image, draw)
        ids, mask, word = self._tokenizer.encode(text if isinstance(text, str) else text.decode())
        return pixels, ids, mask, *mask_whole_words(ids, word, VOCABULARY, MLM_PROBABILITY, draw.generator("mlm"))


class Documented(Decode):
    """The images as the peers' documentation has it: Pillow, and torchvision's transforms with our settings."""

    def __init__(self):
        from torchvision import transforms
        from torchvision.transforms import InterpolationMode

        super().__init__()
        bicubic = InterpolationMode.BICUBIC
        steps = [
            transforms.RandomResizedCrop(SIZE, scale=DATA.crop_area, interpolation=bicubic),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(DATA.randaugment_ops, DATA.randaugment_magnitude),
            transforms.PILToTensor(),
        ]
        self._transform = transforms.Compose(steps)

    def image(self, image: bytes, draw: Draw) -> np.ndarray:
        return self._transform(Image.open(io.BytesIO(image)).convert("RGB")).numpy()


# ---- the candidates: how each writes its data set, and how it yields the number of pairs of each batch ----


def write_ours(files: list[Path], folder: Path) -> None:
    rows = ({"image": f.read_bytes(), "text": caption(f), "id": f.stem, "image_id": f.stem} for f in files)
    write_dataset(str(folder), rows)


def ours(trial: Trial) -> Iterator[int]:
    import ray

    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    # As many CPUs as a node has on which a worker trains beside its data tasks: Ray ends processes that are idle for a
    # second if there are more than CPUs, and starting them again costs two CPU-seconds each.
    ray.init(address="local", num_cpus=2 * trial.processes + 2, **quiet)
    with stream(trial) as batches:
        for batch in batches:
            assert batch.valid.all()
            yield len(batch)


def stream(trial: Trial) -> Stream:
    sources = Sources((load_manifest(trial.data_set),))
    encoder = MaskedPairs(SIZE, TEXT_LEN, DATA, VOCABULARY, MLM_PROBABILITY)
    schedule = Schedule(((trial.steps, trial.batch),), slice_size=min(trial.batch, 16))
    order = Order(sources.manifests[0].chunk_rows, 1, schedule, DATA.shuffle_steps)
    reader = Reader(sources.places, encoder, seed=1)
    return Stream(sources, reader, order, start=0, stop=trial.steps, tasks=trial.processes)


def read_only(trial: Trial) -> Iterator[int]:
    manifest = load_manifest(trial.data_set)
    store = Store(manifest.uri)
    for chunk in range(manifest.num_chunks):
        yield len(read_chunk(store, manifest.chunk(chunk)))


def decode_only(trial: Trial) -> Iterator[int]:
    """Uses as many processes as the others, since cores are slower when all are busy."""
    pairs = [(file.read_bytes(), caption(file)) for file in trial.files()]
    context = multiprocessing.get_context("fork")
    done = context.Queue(2 * trial.processes)  # as far ahead as a DataLoader
    for rank in range(trial.processes):
        context.Process(target=decode_share, args=(trial, pairs, rank, done), daemon=True).start()
    for _ in range(trial.steps):
        yield done.get()


def decode_share(trial: Trial, pairs: list[tuple[bytes, str]], rank: int, done) -> None:
    decode = trial.decode()
    for first in range(rank * trial.batch, trial.steps * trial.batch, trial.processes * trial.batch):
        rows = [decode(*pair) for pair in pairs[first : first + trial.batch]]
        images, *texts = map(np.stack, zip(*rows, strict=True))
        assert all(len(images) == len(text) for text in texts)
        done.put(len(images))


def dataloader_local(trial: Trial) -> Iterator[int]:
    from torch.utils.data import DataLoader, Dataset

    class Files(Dataset):
        files, decode = trial.files(), trial.decode()

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, i: int):
            return self.decode(self.files[i].read_bytes(), caption(self.files[i]))

    return _sizes(DataLoader(Files(), trial.batch, shuffle=True, num_workers=trial.processes))


def write_webdataset(files: list[Path], folder: Path) -> None:
    import webdataset

    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for f in files:
            writer.write({"__key__": f.stem, "jpg": f.read_bytes(), "txt": caption(f).encode()})


def webdataset_loader(trial: Trial) -> Iterator[int]:
    import boto3
    import webdataset
    from botocore.config import Config
    from torch.utils.data import default_collate

    decode = trial.decode()
    client = boto3.client("s3", config=Config(signature_version="s3v4"))
    keys = [{"Bucket": BUCKET, "Key": f"{trial.name}/{shard}"} for shard in Store(trial.data_set).list()]
    urls = [client.generate_presigned_url("get_object", Params=key) for key in keys]  # for curl
    rows = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(1000).to_tuple("jpg", "txt")
    batches = rows.map(lambda row: decode(*row)).batched(trial.batch, collation_fn=default_collate)
    return _sizes(webdataset.WebLoader(batches, batch_size=None, num_workers=trial.processes))


def write_mosaicml(files: list[Path], folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"image": "bytes", "text": "str"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for f in files:
            writer.write({"image": f.read_bytes(), "text": caption(f)})


def mosaicml(trial: Trial) -> Iterator[int]:
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    class Decoded(StreamingDataset):
        decode = trial.decode()

        def __getitem__(self, i: int):
            row = super().__getitem__(i)
            return self.decode(row["image"], row["text"])

    rows = Decoded(remote=trial.data_set, local=trial.cache, shuffle=True, batch_size=trial.batch)
    for stream in rows.streams:  # else forked workers share its open connection and receive each other's answers
        stream._downloader.clean_up()
    return _sizes(DataLoader(rows, trial.batch, num_workers=trial.processes))


def litdata_row(file: str) -> dict:
    return {"image": Path(file).read_bytes(), "text": caption(Path(file))}


def write_litdata(files: list[Path], folder: Path) -> None:
    import litdata

    inputs = [str(f) for f in files]
    litdata.optimize(litdata_row, inputs, str(folder), chunk_bytes=SHARD_BYTES, num_workers=1, verbose=False)


def litdata_loader(trial: Trial) -> Iterator[int]:
    import litdata.streaming.downloader

    litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # there is no option for it
    decode = trial.decode()
    rows = litdata.StreamingDataset(
        trial.data_set,
        cache_dir=trial.cache,
        shuffle=True,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
        transform=lambda row: decode(row["image"], row["text"]),
    )
    return _sizes(litdata.StreamingDataLoader(rows, batch_size=trial.batch, num_workers=trial.processes))


def _sizes(batches: Iterable) -> Iterator[int]:
    for images, *texts in batches:
        assert images.shape[1:] == (3, SIZE, SIZE) and len(texts) == 4
        assert all(text.shape == (len(images), TEXT_LEN) for text in texts)
        yield len(images)


WRITERS = {
    "ours": write_ours,
    "webdataset": write_webdataset,
    "mosaicml-streaming": write_mosaicml,
    "litdata": write_litdata,
}
READERS = {
    "ours": ours,
    "webdataset": webdataset_loader,
    "mosaicml-streaming": mosaicml,
    "litdata": litdata_loader,
    "dataloader-local": dataloader_local,
    "decode-only": decode_only,
    "read-only": read_only,
}
PEERS = [name for name in WRITERS if name != "ours"]


# ---- one candidate, in its own process --------------------------------------------------------------------


class Cpu:
    """CPU-seconds of this process and its descendants, from /proc, for each kind of process."""

    def __init__(self):
        self._seen: dict[int, tuple[str, float]] = {}

    def look(self) -> None:
        """Must be called often enough to see a Ray worker before it ends: the raylet does not wait for its children."""
        parent, seconds = {}, {}
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                values = file.read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            pid = int(file.parent.name)
            parent[pid] = int(values[1])
            ticks = sum(map(int, values[11:15]))  # includes children that were waited for
            seconds[pid] = ticks / os.sysconf("SC_CLK_TCK")
        tree = {os.getpid()}
        while more := {pid for pid, above in parent.items() if above in tree} - tree:
            tree |= more
        workers = {pid: seen for pid, seen in self._seen.items() if seen[0] == "Ray worker"}
        self._seen = workers | {pid: (self._kind(pid), seconds[pid]) for pid in tree}

    def _kind(self, pid: int) -> str:
        if pid == os.getpid():
            return "main process"
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:  # it has ended
            words = [""]
        starting = any(word.endswith("/default_worker.py") for word in words)  # it gets a title later
        if starting or (words[0].startswith("ray::") and "Agent" not in words[0]):
            return "Ray worker"
        return RAY if "Agent" in words[0] or any("/ray/" in word for word in words) else "subprocess"

    def seconds(self) -> dict[str, float]:
        """CPU-seconds by kind of process."""
        return {kind: sum(s for k, s in self._seen.values() if k == kind) for kind, _ in self._seen.values()}

    def count(self, kind: str) -> int:
        return sum(k == kind for k, _ in self._seen.values())

    def rest(self) -> tuple[float, dict[str, float]]:
        """Waits until reading ahead has stopped; returns when that was, and `seconds`."""
        while True:
            self.look()
            began, before = time.perf_counter(), sum(self.seconds().values())
            time.sleep(1)
            self.look()
            if sum(self.seconds().values()) - before < 0.2:  # idle processes still poll for work
                return began, self.seconds()


def measure(trial: Trial) -> dict:
    """Runs one candidate; the clocks run from the last row of batch `begin` to the last row of batch `end`."""
    cpu, rows, waits, rests = Cpu(), 0, [], []
    marks = [trial.begin * trial.batch, trial.end * trial.batch]
    batches = iter(READERS[trial.name](trial))
    asked = looked = time.perf_counter()
    while size := next(batches, 0):
        now = time.perf_counter()
        waits.append(now - asked)
        before, rows = rows, rows + size
        if trial.rate:
            time.sleep(size / trial.rate)
        elif any(before < mark <= rows for mark in marks):
            rests.append((rows, *cpu.rest()))
        elif now - looked > 1:  # a look takes 5 ms
            cpu.look()
            looked = now
        asked = time.perf_counter()
    if trial.rate:
        return {"waits": waits}
    (first_rows, began, before), (last_rows, ended, after) = rests
    spent = {kind: seconds - before.get(kind, 0.0) for kind, seconds in after.items()}
    ray = spent.pop(RAY, 0.0)
    total = sum(spent.values())
    counted = ", ".join(f"{cpu.count(kind)} x {kind} {spent[kind] / total:.2f}" for kind in sorted(spent))
    spans = {"measured": last_rows - first_rows, "wall": ended - began, "cpu": total, "ray": ray}
    return {"rows": rows, "counted": counted, **spans}


# ---- the server's side ------------------------------------------------------------------------------------


class Relay(socketserver.ThreadingTCPServer):
    """Forwards connections to the S3 server and counts the bytes that come back, in `received`."""

    daemon_threads, request_queue_size = True, 128

    def __init__(self, endpoint: str):
        super().__init__(("127.0.0.1", 0), None)
        host, _, port = endpoint.removeprefix("http://").partition(":")
        self._target, self._lock, self.received = (host, int(port)), threading.Lock(), 0
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def finish_request(self, request: socket.socket, client_address) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self._target) as server:
            threading.Thread(target=self._pump, args=(request, server, False), daemon=True).start()
            self._pump(server, request, True)

    def _pump(self, source: socket.socket, target: socket.socket, count: bool) -> None:
        try:
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := source.recv(1 << 18):
                if count:
                    with self._lock:
                        self.received += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # either side has hung up
            pass


class Bench:
    """Runs each trial in its own process, against the server."""

    def __init__(self, relay: Relay, env: dict[str, str], peers: str):
        self._relay = relay
        env = env | dict.fromkeys(("AWS_ENDPOINT_URL", "S3_ENDPOINT_URL"), relay.endpoint)
        self._env = os.environ | env | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        self._peers_env = self._env | {"PYTHONPATH": os.path.abspath(peers)} if peers else self._env

    def prepare(self, trial: Trial) -> str:
        """Makes the candidate write its data set and uploads it; returns the reason if it failed, else ""."""
        folder = Path(trial.folder, trial.name)
        folder.mkdir()
        failed = self._run(trial, "--write", str(folder)).get("failed", "")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            if not failed:
                Store(trial.data_set).upload(file, str(file.relative_to(folder)))
        return failed

    def run(self, trial: Trial) -> dict:
        before = self._relay.received
        result = self._run(trial)
        return result | {"received": self._relay.received - before}

    def _run(self, trial: Trial, *options: str) -> dict:
        command = [sys.executable, __file__, "--trial", json.dumps(asdict(trial)), *options]
        env = self._peers_env if trial.name in PEERS else self._env
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, env=env, start_new_session=True, **pipes) as child:
            try:
                out, errors = child.communicate(timeout=LIMIT_S)
            except BaseException as error:
                os.killpg(child.pid, signal.SIGKILL)  # its workers, too
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                return {"failed": f"not done after {LIMIT_S} s"}
        if child.returncode == 0:
            return json.loads(out.strip().splitlines()[-1])
        found = re.findall(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*", errors, re.MULTILINE)
        return {"failed": (found or [f"exit status {child.returncode}"])[-1][:160]}


# ---- the report -------------------------------------------------------------------------------------------


EXPLAINED = (
    "CPU-seconds and wall-clock time are measured from batch {begin} to batch {end} of {steps}, in the steady state. "
    "At both ends the consumer waits until the candidate has stopped reading ahead, so in between the candidate works "
    "on as many pairs as it delivers (our windows have full size from there on). CPU time is that of the candidate's "
    "process and its descendants (Ray Data's actors are Ray workers), with the fraction of each kind. Ray's own "
    "servers (raylet, GCS, agents, monitors) are not included; their CPU time is given as a fraction of it. The S3 "
    "server is in neither. read-only is one process. Read amplification is the bytes from the server in the whole run, "
    "HTTP headers included, as counted by a relay in front of it, over the bytes of the JPEGs and captions in batches."
)


def failure(runs: list[dict]) -> str:
    return next((run["failed"] for run in runs if "failed" in run), "")


def median(runs: list[dict], over: str, under: str) -> float:
    return statistics.median(run[over] / run[under] for run in runs)


def summary(name: str, runs: list[dict], ceiling: float) -> list[str]:
    """A row of the table: medians over the repeats, or the reason why there are none."""
    if failed := failure(runs):
        return [name, f"not run: {failed}", *[""] * 5]
    per_cpu = median(runs, "measured", "cpu")
    return [
        name,
        f"{per_cpu:,.0f}",
        f"{per_cpu / ceiling:.2f}",
        f"{median(runs, 'measured', 'wall'):,.0f}",
        f"{median(runs, 'received', 'used'):.2f}" if runs[0]["received"] else "",
        f"{median(runs, 'ray', 'cpu'):.2f}" if runs[0]["ray"] else "",
        runs[0]["counted"],
    ]


def bars(results: dict[str, list[dict]], targets: dict[str, float]) -> str:
    """The targets for ours, and whether they are met by the median of the ratios within each repeat."""
    lines, ours = [], results.get("ours", [])
    for name, bar in targets.items():
        verdict, others = "unknown", results.get(name, [])
        if ours and others and not failure(ours + others):
            pairs = [[run["measured"] / run["cpu"] for run in pair] for pair in zip(ours, others, strict=True)]
            ratios = [our / other for our, other in pairs]
            ratio = statistics.median(ratios)
            verdict = f"{ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            verdict += f", {'met' if ratio >= bar else 'NOT met'}"
        lines.append(f"- ours / {name}, target {bar} or more: {verdict}")
    return "\n".join(lines)


def waiting(run: dict, trial: Trial, file: str) -> str:
    """A sentence on how much of its time a steady consumer waits; plots every batch if `file` is given."""
    if "failed" in run:
        return f"Waiting time: not run: {run['failed']}"
    waits, starts = np.array(run["waits"]), windows(trial)
    steady = waits[starts[2] :]
    share = steady.sum() / (steady.sum() + len(steady) * trial.batch / trial.rate)
    if file:
        plot(waits, starts, file)
    return (
        f"A consumer of {trial.rate:,.0f} pairs/s ({len(waits)} batches) waits {100 * share:.2f} % of its time: "
        f"at most {1e3 * steady.max():,.0f} ms for one batch, {1e3 * np.median(steady):.2f} ms in the median, and more "
        f"than 0.1 s for {np.sum(steady > 0.1)} of {len(steady)} batches. This leaves out the first two windows "
        f"({starts[2]} batches), with {waits[0]:.1f} s for the first batch and {waits[starts[1]]:.1f} s for the first "
        f"batch of the second window. Later windows have up to {max(np.diff(starts))} batches."
        + (f" Every batch: {Path(file).name}." if file else "")
    )


def windows(trial: Trial) -> list[int]:
    """The first batch of each window of `Stream`."""
    return [window.steps.start for window in stream(trial).windows()]


def plot(waits: np.ndarray, starts: list[int], file: str) -> None:
    """Plots the waiting time of every batch, with a line at the start of each window."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(9, 3.5))
    for start in starts:
        axes.axvline(start, color="0.8", linewidth=1)
    axes.plot(1e3 * waits, ".", markersize=3)
    axes.set(yscale="log", xlabel="batch (lines: a window begins)", ylabel="waited for it, ms")
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(file, dpi=120, bbox_inches="tight")


def versions(peers: str) -> str:
    found = {d.name: d.version for d in importlib.metadata.distributions(path=[*sys.path, peers or "."])}
    return ", ".join(f"{name} {found[name]}" for name in ("ray", *PEERS) if name in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="")
    parser.add_argument("--plot", default="", help="a PNG of the waiting times")
    parser.add_argument("--peers", default="", help="a folder with the peers that are not installed")
    parser.add_argument("--pairs", type=int, default=18944)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2, help="processes that read and decode")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--wait-pairs", type=int, default=8704, help="pairs that the steady consumer takes")
    parser.add_argument("--busy", type=float, default=0.6, help="its rate, as a fraction of ours")
    parser.add_argument("--only", nargs="*", default=list(READERS), choices=list(READERS))
    parser.add_argument("--trial", help=argparse.SUPPRESS)  # these two are for a candidate's own process
    parser.add_argument("--write", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trial:
        trial = Trial(**json.loads(given.trial))
        if given.write:
            WRITERS[trial.name](trial.files(), Path(given.write))
        print(json.dumps({} if given.write else measure(trial)))
        return
    with tempfile.TemporaryDirectory() as folder, local_s3(Path(folder, "s3"), (BUCKET,)) as env:
        bench = Bench(Relay(env["AWS_ENDPOINT_URL"]), env, given.peers)
        os.environ.update(env)
        mean, text = run_all(bench, folder, given)
    publish(
        "From S3 to batches",
        f"{given.pairs:,} JPEGs of 500 x 375 pixels, with captions {mean / 1e3:.1f} kB on average, from SeaweedFS on "
        f"the same machine to batches of {given.batch}, uint8 at {SIZE} pixels with the official augmentation, and "
        "masked captions; reading "
        f"processes: {given.processes}; one epoch; repeats: {given.repeats} (medians); "
        f"each candidate in a fresh process. {versions(given.peers)}.\n\n{text}",
        given.out,
    )


def run_all(bench: Bench, folder: str, given: argparse.Namespace) -> tuple[float, str]:
    """Makes the data sets and runs every candidate; returns the mean bytes of a pair and the text of the report."""
    Path(folder, "jpeg").mkdir()
    files = [Path(folder, "jpeg", f"{i:06d}.jpg") for i in range(given.pairs)]
    with ProcessPoolExecutor(given.processes) as pool:
        total = sum(pool.map(make_picture, files, chunksize=50)) + sum(len(caption(file)) for file in files)
    mean = total / given.pairs
    base = Trial("ours", folder, given.pairs, given.batch, given.processes)
    written = [name for name in WRITERS if name in given.only or name == "ours"]
    unwritten = {name: bench.prepare(replace(base, name=name)) for name in written}
    starts = windows(base)
    sizes = np.diff([*starts, base.steps])
    full = [start for start, size in zip(starts, sizes, strict=True) if size == max(sizes)]
    assert len(full) > 3 and full[-1] == starts[-1], f"{given.pairs} pairs do not end with four full windows"
    begin, end = full[0], full[-3]  # ours reads ahead two windows beyond the current one
    trials = {name: replace(base, name=name, begin=begin, end=end) for name in given.only}
    documented = {f"{name}, as documented": replace(trials[name], documented=True) for name in PEERS if name in trials}
    results: dict[str, list[dict]] = {name: [] for name in trials | documented}
    for _ in range(given.repeats):
        for name, trial in (trials | documented).items():  # in turn, so a disturbance affects all of them
            failed = unwritten.get(trial.name)
            run = {"failed": failed} if failed else bench.run(trial)
            results[name].append(run if "failed" in run else run | {"used": run["rows"] * mean})
    figures = {name: median(runs, "measured", "cpu") for name, runs in results.items() if not failure(runs)}
    waited = ""
    if "ours" in figures:
        rate = given.busy * median(results["ours"], "measured", "wall")
        trial = replace(base, pairs=given.wait_pairs, rate=rate)
        waited = waiting(bench.run(trial), trial, given.plot)
    ceiling = figures.get("decode-only", math.nan)
    head = ["", "pairs per CPU-s", "of decode-only", "pairs/s", "read amplification", "Ray's own CPU", "counted"]
    first, second = (
        table(head, [summary(name, results[name], ceiling) for name in names])
        for names in ([*(name for name in ("ours",) if name in trials), *documented], trials)
    )
    as_they_are = bars(results, dict.fromkeys(documented, 1.15))
    alike = bars(results, {"decode-only": 0.8, **dict.fromkeys((name for name in PEERS if name in trials), 0.95)})
    explained = EXPLAINED.format(begin=begin, end=end, steps=base.steps)
    parts = ["## As users get them", first, as_they_are, "## All with our decoding", second, alike, explained, waited]
    return mean, "\n\n".join(parts)


if __name__ == "__main__":
    main()
