"""The batches of `Stream`: the same from Ray as from a plain loop, for any workers and any resume.

The oracle is `in_process=True` with one worker, itself compared with order, decoder and tokenizer.
"""

import io
import pickle
import re
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vlmo_ray import rng
from vlmo_ray.config import DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.decode import decode_eval, decode_train
from vlmo_ray.data.encoders import Draw
from vlmo_ray.data.encoders.pairs import MaskedPairs, Pairs
from vlmo_ray.data.index import index_parquet
from vlmo_ray.data.manifest import Manifest, chunk_table, write_manifest
from vlmo_ray.data.order import Order, Schedule
from vlmo_ray.data.pipeline import Stream, eval_dataset
from vlmo_ray.data.prefetch import Overlapped, Prefetch, user_error
from vlmo_ray.data.read import ShardError
from vlmo_ray.data.reader import Reader, Sources, make_part
from vlmo_ray.data.store import Store
from vlmo_ray.data.text import Tokenizer, mask_whole_words, normalise
from vlmo_ray.errors import UserError

SHARD_ROWS, GROUP_ROWS, CORRUPT = (23, 31, 17), 5, 40
NUM_ROWS = sum(SHARD_ROWS)  # 71: no batch size divides it
SCHEDULE = Schedule(((7, 12), (6, 24)), 4)  # 228 rows: 3.2 epochs
DATA = DataConfig(shuffle_steps=3)
SHAPE = {"image_size": 16, "max_text_len": 12, "vocab_size": 30522}


def record(i: int) -> dict:
    pixels = np.random.default_rng(i).integers(0, 256, (20, 25, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {
        "id": f"pair{i}",
        "image_id": f"image{i // 2}",
        "image": file.getvalue()[: 60 if i == CORRUPT else None],
        "text": f"A photo of number {i % 9}.",
        "forbid": ["flip"] if i % 3 == 0 else [],
    }


def make_data_set(folder: Path) -> Manifest:
    store, names, first = Store(str(folder)), [], 0
    kinds = {"id": pa.string(), "image_id": pa.string(), "image": pa.binary(), "text": pa.string()}
    schema = pa.schema({**kinds, "forbid": pa.list_(pa.string())})
    for n in SHARD_ROWS:
        table = pa.Table.from_pylist([record(i) for i in range(first, first + n)], schema)
        names.append(f"part-{first:02d}.parquet")
        with store.create(names[-1]) as file:
            pq.write_table(table, file, row_group_size=GROUP_ROWS, write_page_checksum=True)
        first += n
    return write_manifest(str(folder), "parquet", chunk_table(index_parquet(store, names)))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    return make_data_set(tmp_path_factory.mktemp("pairs"))


def train_reader(manifest: Manifest, data=DATA, seed=3, image_size=16, max_text_len=12, vocab_size=30522) -> Reader:
    encoder = MaskedPairs(image_size, max_text_len, data, vocab_size, 0.15)
    return Reader(Sources((manifest,)).places, encoder, seed)


def eval_reader(manifest: Manifest) -> Reader:
    return Reader(Sources((manifest,)).places, Pairs(16, 12, DATA))


def stream_of(
    manifest: Manifest, data: DataConfig, *, schedule: Schedule, seed: int, start: int, stop: int,
    image_size: int, max_text_len: int, vocab_size: int, **options,
) -> Stream:  # fmt: skip
    reader = train_reader(manifest, data, seed, image_size, max_text_len, vocab_size)
    order = Order(manifest.chunk_rows, seed, schedule, data.shuffle_steps)
    return Stream(Sources((manifest,)), reader, order, start=start, stop=stop, **options)


def batches(manifest: Manifest, start=0, stop=None, rank=0, num_workers=1, **options) -> list[Batch]:
    stop = SCHEDULE.total_steps if stop is None else stop
    options = {"in_process": True, "data": DATA, "schedule": SCHEDULE, "seed": 3} | SHAPE | options
    with stream_of(manifest, start=start, stop=stop, rank=rank, num_workers=num_workers, **options) as stream:
        return list(stream)


def global_batches(manifest: Manifest, num_workers: int, **options) -> list[Batch]:
    workers = [batches(manifest, rank=r, num_workers=num_workers, **options) for r in range(num_workers)]
    return [Batch.concatenate(parts) for parts in zip(*workers, strict=True)]


def assert_equal(found: list[Batch], wanted: list[Batch]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.columns.keys() == b.columns.keys() and (a.ids, a.problems) == (b.ids, b.problems)
        for name in (*a.columns, "valid", "position"):
            x, y = getattr(a, name), getattr(b, name)
            assert x.dtype == y.dtype and torch.equal(x, y), name


@pytest.fixture(scope="module")
def wanted(manifest) -> list[Batch]:
    return batches(manifest)


def test_rows_are_what_order_decoder_and_tokenizer_say(manifest, wanted):
    order = Order(manifest.chunk_rows, 3, SCHEDULE, DATA.shuffle_steps)
    first_row = np.cumsum(manifest.chunk_rows) - manifest.chunk_rows
    tokenizer = Tokenizer(SHAPE["max_text_len"])
    for step, batch in enumerate(wanted):
        rows = order.slice_rows(order.span(step), 0, SCHEDULE.num_slices(step), step, step + 1)
        assert batch.position.tolist() == list(range(SCHEDULE.batch_size(step)))
        for q, (chunk, row) in enumerate(zip(rows.chunk, rows.row, strict=True)):
            i = int(first_row[chunk] + row)
            source = record(i)
            assert batch.ids[q] == source["id"]
            if i == CORRUPT:
                assert not batch.valid[q]
                continue
            image = decode_train(source["image"], 16, DATA, source["forbid"], Draw(3, step, q))
            ids, mask, word = tokenizer.encode(source["text"])
            masked, labels = mask_whole_words(ids, word, 30522, 0.15, rng.generator(3, "mlm", step, q))
            assert batch.valid[q]
            assert np.array_equal(batch.image[q], image)
            assert batch.text_ids[q].tolist() == ids.tolist() and batch.text_mask[q].tolist() == mask.tolist()
            assert batch.mlm_ids[q].tolist() == masked.tolist() and batch.mlm_labels[q].tolist() == labels.tolist()
            assert batch.image_key[q] == rng.hash_text(source["image_id"])
            assert batch.text_key[q] == rng.hash_text(normalise(source["text"]))


def test_every_pair_once_per_epoch(manifest, wanted):
    order = Order(manifest.chunk_rows, 3, SCHEDULE, DATA.shuffle_steps)
    seen = {}
    for step, batch in enumerate(wanted):
        rows = order.slice_rows(order.span(step), 0, SCHEDULE.num_slices(step), step, step + 1)
        for epoch, name in zip(rows.epoch.tolist(), batch.ids, strict=True):
            seen.setdefault(epoch, []).append(name)
    everything = sorted(f"pair{i}" for i in range(NUM_ROWS))
    assert [sorted(seen[epoch]) == everything for epoch in range(4)] == [True, True, True, False]
    assert len(set(seen[3])) == len(seen[3]) == 228 - 3 * NUM_ROWS


def test_a_corrupt_record_is_masked_and_named(manifest, wanted):
    hits = [(batch, batch.ids.index(f"pair{CORRUPT}")) for batch in wanted if f"pair{CORRUPT}" in batch.ids]
    assert len(hits) >= 3
    for batch, q in hits:
        assert not batch.valid[q] and batch.valid.sum() == len(batch) - 1
        assert (batch.image[q] == 128).all() and (batch.mlm_labels[q] == -100).all()
        assert batch.text_ids[q].tolist() == [101, 102] + [0] * 10 and batch.text_mask[q].sum() == 2
        # row 40 is row 17 of the second shard, the third of its row group 3
        [problem] = filter(None, batch.problems)
        assert problem.startswith(f"{manifest.uri}/part-23.parquet#3:2: ")
        assert batch.text_key[q] == 0
    assert sum(bool(p) for batch in wanted for p in batch.problems) == len(hits)


@pytest.mark.parametrize("num_workers", [2, 3, 5])
def test_workers_and_parts_change_nothing(manifest, wanted, num_workers):
    """With 5 workers and 3 slices, some have no rows in the first phase."""
    found = global_batches(manifest, num_workers, part_rows=num_workers, window_spans=1)
    assert_equal(found, wanted)


@pytest.mark.parametrize("start", [1, 5, 7, 11, 13])
def test_resume_in_the_middle_of_a_span(manifest, wanted, start):
    assert_equal(batches(manifest, start=start, part_rows=9), wanted[start:])
    assert_equal(batches(manifest, stop=start), wanted[:start])


def test_a_window_reads_small_chunks_once_and_shares_large_ones_out(manifest):
    options = {"data": DATA, "schedule": Schedule(((24, 24),), 4), "seed": 3, "start": 2, "stop": 24} | SHAPE
    for rank, num_workers, part_rows in [(0, 1, 20), (1, 2, 30), (0, 1, 2)]:
        stream = stream_of(manifest, rank=rank, num_workers=num_workers, part_rows=part_rows, window_spans=3, **options)
        for window in stream.windows():
            sizes = [len(part) for part in window.parts]
            assert sum(sizes) == len(window.steps) * 24 // num_workers
            assert max(sizes) <= 1.5 * part_rows + 1
            assert [part.step[0] for part in window.parts] == sorted(part.step[0] for part in window.parts)
            chunks = [chunk for part in window.parts for chunk in part.chunks]
            if part_rows > 2:  # chunks have 5 rows
                assert len(chunks) == len(set(chunks))
                assert len(sizes) <= sum(sizes) / part_rows * 2 + 1
            else:  # two epochs of a window's 72 pairs have rows of a chunk of 5 up to 10 times
                assert len(chunks) > len(set(chunks)) and len(sizes) > len(set(chunks))


def test_steps_without_rows(manifest):
    """A worker beside a batch of one slice; windows without parts follow one another at once."""
    for in_process in (True, False):
        options = {"schedule": Schedule(((300, 16),), 16), "window_spans": 1, "in_process": in_process}
        found = batches(manifest, stop=300, num_workers=2, rank=0, **options)
        assert [len(batch) for batch in found] == [0] * 300


def test_a_window_has_no_more_rows_than_it_may_when_batches_grow(manifest):
    for phases, rank, num_workers in [([(100, 64), (40, 1024)], 0, 1), ([(3000, 16), (40, 2048)], 0, 2)]:
        stream = stream_of(
            manifest, DataConfig(), **SHAPE, seed=3, schedule=Schedule(tuple(phases), 16), start=0,
            stop=phases[0][0] + 40, rank=rank, num_workers=num_workers,
        )  # fmt: skip
        sizes = [(len(window.steps), sum(map(len, window.parts))) for window in stream.windows()]
        assert all(rows <= 4096 or steps <= 8 for steps, rows in sizes)
        assert sum(steps for steps, _ in sizes) == stream.stop


def test_windows_grow_with_the_tasks(manifest):
    def largest(image_size, tasks):
        options = {"data": DataConfig(), "seed": 3} | SHAPE | {"image_size": image_size}
        schedule = Schedule(((2000, 64),), 16)
        stream = stream_of(manifest, schedule=schedule, start=0, stop=2000, tasks=tasks, **options)
        windows = list(stream.windows())
        assert [len(window.steps) for window in windows[:3]] == [8, 16, 32]
        assert max(len(window.parts) for window in windows) >= 1.5 * tasks  # all have work until the next begins
        return max(len(window.steps) for window in windows) * 64

    assert largest(16, 1) == 4096 and largest(16, 16) == 8192
    assert largest(224, 4) == 2560 and largest(224, 16) == 8192


def test_a_missing_shard_stops_with_its_address(tmp_path):
    manifest = make_data_set(tmp_path)
    (tmp_path / "part-54.parquet").unlink()
    with pytest.raises(ShardError, match=r"part-54\.parquet#\d"):
        batches(manifest)


def test_prefetch_takes_everything_and_closes_its_source():
    made, closed = [], threading.Event()

    def source(n=3):
        try:
            for i in range(n):
                made.append(i)
                yield i
        finally:
            closed.set()

    ahead = Prefetch(source())
    assert closed.wait(5) and made == [0, 1, 2] == list(ahead)
    ahead._thread.join(5)
    assert not ahead._thread.is_alive()
    closed.clear()
    for _ in Prefetch(source(10**9)):
        break  # the dropped iterator ends the thread
    assert closed.wait(5)


def test_prefetch_raises_the_error_of_its_source_after_what_came_before():
    def source():
        yield 1
        raise UserError("the reason")

    ahead = Prefetch(source())
    assert next(ahead) == 1
    with pytest.raises(UserError, match="the reason"):
        next(ahead)
    assert list(ahead) == []


def test_who_waits_long_is_told(monkeypatch, caplog):
    go = threading.Event()
    ahead = Prefetch(go.wait(30) for _ in range(1))
    times = iter(range(0, 10**6, 40))
    clock = types.SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("vlmo_ray.data.prefetch.time", clock)
    threading.Timer(2.5, go.set).start()
    assert next(ahead)
    assert caplog.messages[0].startswith("no data for 80 s: ")


def test_overlapped_iterators_begin_when_the_one_before_is_nearly_done_and_few_wait():
    made, go = [], [threading.Event() for _ in range(5)]

    def make(nearly_done):
        i = len(made)
        made.append(i)

        def items():
            yield i, 0
            go[i].wait(30)
            nearly_done()
            yield i, 1

        return items()

    def comes_to(count):
        deadline = time.monotonic() + 5
        while len(made) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        return len(made) == count

    chain = Overlapped(make)
    first = chain.next()
    assert next(first) == (0, 0) and comes_to(1)  # it is not nearly done
    go[1].set()
    go[0].set()
    assert comes_to(3)  # the second was done at once
    go[2].set()
    assert comes_to(3)  # two wait
    assert list(first) == [(0, 1)]
    assert list(chain.next()) == [(1, 0), (1, 1)] and comes_to(4)
    chain.next()
    threading.Timer(0.3, go[3].set).start()
    chain.close()
    assert comes_to(4)


def test_user_error_is_found_in_a_chain():
    inner = UserError("the reason")
    outer = RuntimeError("wrapped")
    outer.__cause__ = inner
    assert str(user_error(outer)) == "the reason" and user_error(RuntimeError("other")) is None


@pytest.mark.ray
def test_ray_gives_the_same_batches(ray_cluster, manifest, wanted):
    found = batches(manifest, in_process=False, part_rows=9, window_spans=2, tasks=2)
    assert_equal(found, wanted)


@pytest.mark.ray
def test_two_workers_at_once_and_a_resume(ray_cluster, manifest, wanted):
    options = {"in_process": False, "start": 4, "stop": 11}
    results = {}

    def work(rank):
        results[rank] = batches(manifest, rank=rank, num_workers=2, **options)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    found = [Batch.concatenate(pair) for pair in zip(results[0], results[1], strict=True)]
    assert_equal(found, wanted[4:11])


@pytest.mark.ray
def test_large_blocks_that_ray_splits(ray_cluster, manifest, wanted):
    import ray.data

    context = ray.data.DataContext.get_current()
    before = context.target_max_block_size
    try:
        context.target_max_block_size = 10_000  # about ten rows
        assert_equal(batches(manifest, in_process=False, window_spans=3), wanted)
    finally:
        context.target_max_block_size = before
    assert not context.execution_options.preserve_order  # ours are set on the datasets, not here


@pytest.mark.ray
def test_a_missing_shard_stops_ray_with_the_same_sentence(ray_cluster, tmp_path):
    manifest = make_data_set(tmp_path)
    (tmp_path / "part-54.parquet").unlink()
    sentence = r"^/.*part-54\.parquet#\d: the shard does not exist; prepare it again$"
    with pytest.raises(ShardError, match=sentence):
        batches(manifest, in_process=False)
    with pytest.raises(Exception) as caught:
        list(eval_dataset(Sources((manifest,)), eval_reader(manifest)).iter_rows())
    found = user_error(caught.value)
    assert isinstance(found, ShardError) and re.match(sentence, str(found))


@pytest.mark.ray
def test_closing_early_ends_the_thread(ray_cluster, manifest):
    schedule = Schedule(((1000, 24),), 4)
    options = {"data": DATA, "schedule": schedule, "seed": 3, "tasks": 2, "window_spans": 2} | SHAPE
    stream = stream_of(manifest, start=0, stop=1000, **options)
    for _ in zip(range(5), stream, strict=False):
        pass
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 8
    assert not [t for t in threading.enumerate() if t.name == "data"]


@pytest.mark.ray
def test_data_needs_no_cpu_beside_its_worker(ray_cluster, manifest, wanted):
    import ray

    @ray.remote(num_cpus=2)
    class Greedy:
        def ready(self):
            pass

    greedy = Greedy.remote()
    ray.get(greedy.ready.remote())
    assert ray.available_resources().get("CPU", 0) == 0
    assert_equal(batches(manifest, in_process=False, tasks=2), wanted)
    ray.kill(greedy)


@pytest.mark.ray
def test_eval_dataset_is_every_row_in_order(ray_cluster, manifest):
    dataset = eval_dataset(Sources((manifest,)), eval_reader(manifest))
    rows = list(dataset.iter_rows())
    assert [row["id"] for row in rows] == [f"pair{i}" for i in range(NUM_ROWS)]
    tokenizer = Tokenizer(12)
    for i in (0, 30, 70):
        source, row = record(i), rows[i]
        assert np.array_equal(row["image"], decode_eval(source["image"], 16, DATA))
        assert row["image_key"] == rng.hash_text(source["image_id"]) and row["valid"]
        assert row["text_key"] == rng.hash_text(normalise(source["text"]))
        ids, mask, _ = tokenizer.encode(source["text"])
        assert row["text_ids"].tolist() == ids.tolist() and row["text_mask"].tolist() == mask.tolist()
    assert [i for i, row in enumerate(rows) if not row["valid"]] == [CORRUPT]
    assert rows[CORRUPT]["problem"].startswith(f"{manifest.uri}/part-23.parquet#3:2: ")
    places = [(chunk, row) for chunk, n in enumerate(manifest.chunk_rows) for row in range(n)]
    assert [(row["step"], row["position"]) for row in rows] == places


def test_a_data_task_needs_no_torch(manifest):
    """It would cost every data process seconds at its start and hundreds of megabytes."""
    code = """
import pickle, sys
import vlmo_ray.data.pipeline
readers, part = pickle.loads(sys.stdin.buffer.read())
assert all(len(reader(part)["image"]) for reader in readers)
sys.exit(", ".join({"torch", "ray"} & set(sys.modules)) or None)
"""
    readers = train_reader(manifest), eval_reader(manifest)
    order = Order(manifest.chunk_rows, 3, SCHEDULE, DATA.shuffle_steps)
    part = make_part(Sources((manifest,)), order.slice_rows(order.span(0), 0, 1))
    given = pickle.dumps((readers, part))
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
