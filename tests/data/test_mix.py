"""Several data sets in one run: each in an `Order` of its own, in fixed slices of every batch.

The oracle is a plain loop over steps and slices (`slow_mix`) that takes each slice from the data set's own order.
"""

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from conftest import make_records
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmo_ray.config import DataConfig
from vlmo_ray.data.encoders.pairs import MaskedPairs
from vlmo_ray.data.mix import Mix, pattern, shares
from vlmo_ray.data.order import Order, Schedule, deal
from vlmo_ray.data.pipeline import Stream
from vlmo_ray.data.prepare.shards import write_dataset
from vlmo_ray.data.reader import Reader, Sources
from vlmo_ray.errors import UserError

WEIGHTS = st.lists(st.sampled_from([0.1, 0.5, 1, 1.5, 2, 3, 7]), min_size=1, max_size=4)


@st.composite
def mixes(draw) -> tuple[Mix, dict]:
    """A mix, and the arguments that made it."""
    weights = draw(WEIGHTS)
    chunk_rows = [np.array(draw(st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any))) for _ in weights]
    size = draw(st.integers(1, 3))
    phases = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(len(weights), 7)), min_size=1, max_size=3))
    schedule = Schedule(tuple((steps, slices * size) for steps, slices in phases), size)
    arguments = {"chunk_rows": chunk_rows, "weights": weights, "seed": draw(st.integers(0, 3))}
    arguments |= {"schedule": schedule, "shuffle_steps": draw(st.integers(1, 4))}
    return Mix(**arguments), arguments


def rows_of(mix: Mix, num_workers: int = 1, start: int = 0, stop: int | None = None) -> dict:
    """{(step, position): (epoch, chunk, row)} of the steps in `[start, stop)`, put together over workers."""
    step, stop, found = start, mix.schedule.total_steps if stop is None else stop, {}
    while step < stop:
        span = mix.span(step)
        for rank in range(num_workers):
            first, last = deal(mix.schedule.num_slices(step), num_workers, rank)
            rows = mix.slice_rows(span, first, last, step, stop)
            assert np.array_equal(np.lexsort((rows.position, rows.step)), np.arange(len(rows)))
            columns = (rows.step, rows.position, rows.epoch, rows.chunk, rows.row)
            for t, q, *row in zip(*(column.tolist() for column in columns), strict=True):
                size = mix.schedule.slice_size
                assert first * size <= q < last * size and (t, q) not in found
                found[t, q] = tuple(row)
        step = span.stop
    return found


def sources_of_slices(num_slices: int, weights: list[float]) -> list[int]:
    """The data set of each slice: slice i of the n of a data set lies at (i + 1/2) / n of the batch."""
    counts = shares(num_slices, weights)
    places = [(Fraction(2 * i + 1, 2 * n), source) for source, n in enumerate(counts) for i in range(n)]
    return [source for _, source in sorted(places)]


def slow_mix(chunk_rows, weights, seed, schedule, shuffle_steps) -> dict:
    """The definition, one slice at a time."""
    size, first_chunk = schedule.slice_size, 0
    found = {}
    for source, rows in enumerate(chunk_rows):
        counts = [shares(batch // size, weights)[source] for _, batch in schedule.phases]
        phases = tuple((steps, n * size) for (steps, _), n in zip(schedule.phases, counts, strict=True))
        order = Order(rows, seed, Schedule(phases, size), shuffle_steps)
        for step in range(schedule.total_steps):
            slices = sources_of_slices(schedule.num_slices(step), weights)
            own = [i for i, owner in enumerate(slices) if owner == source]
            for k, place in enumerate(own):
                mine = order.slice_rows(order.span(step), k, k + 1, step, step + 1)
                for i in range(size):
                    row = (int(mine.epoch[i]), first_chunk + int(mine.chunk[i]), int(mine.row[i]))
                    found[step, place * size + i] = row
        first_chunk += len(rows)
    return found


@given(mixes())
@settings(max_examples=40, deadline=None)
def test_equals_the_slow_definition_and_fills_every_batch(mixed):
    mix, arguments = mixed
    found, schedule = rows_of(mix), mix.schedule
    assert found == slow_mix(**arguments)
    assert set(found) == {(t, q) for t in range(schedule.total_steps) for q in range(schedule.batch_size(t))}


@given(mixes())
@settings(max_examples=40, deadline=None)
def test_every_data_set_is_seen_once_per_epoch_of_its_own(mixed):
    mix, arguments = mixed
    schedule = mix.schedule
    whole_spans = schedule.total_steps == mix.span(schedule.total_steps - 1).stop
    sizes = [int(rows.sum()) for rows in arguments["chunk_rows"]]
    assert mix.num_rows == sum(sizes)
    ends = np.cumsum([len(rows) for rows in arguments["chunk_rows"]])
    seen: list[dict] = [{} for _ in sizes]  # of each data set: epoch -> how often each row came
    for epoch, chunk, row in rows_of(mix).values():
        source = int(np.searchsorted(ends, chunk, side="right"))
        assert row < np.concatenate(arguments["chunk_rows"])[chunk]
        seen[source].setdefault(epoch, Counter())[chunk, row] += 1
    for epochs, size in zip(seen, sizes, strict=True):
        assert sorted(epochs) == list(range(len(epochs)))
        assert all(set(rows.values()) == {1} for rows in epochs.values())
        if whole_spans:  # or else the last span holds rows back for steps after the run's end
            assert [len(epochs[epoch]) for epoch in range(len(epochs) - 1)] == [size] * (len(epochs) - 1)


@given(mixes(), st.integers(1, 7), st.data())
@settings(max_examples=40, deadline=None)
def test_workers_and_resuming_change_nothing(mixed, num_workers, data):
    mix, arguments = mixed
    whole, total = rows_of(mix), mix.schedule.total_steps
    assert rows_of(mix, num_workers) == whole
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    resumed = {}
    for i, (start, stop) in enumerate(pairwise(cuts)):
        resumed |= rows_of(Mix(**arguments), 1 + (num_workers + i) % 3, start, stop)
    assert resumed == whole


@given(WEIGHTS, st.integers(0, 60))
def test_shares_are_within_a_slice_of_the_weights(weights, more):
    num_slices = len(weights) + more
    found = shares(num_slices, weights)
    exact = [num_slices * weight / sum(weights) for weight in weights]
    assert sum(found) == num_slices and min(found) >= 1
    if min(exact) >= 1:
        assert all(abs(n - share) < 1 for n, share in zip(found, exact, strict=True))
    # where a weight asks for less than one slice, the others give of theirs, but a larger weight never gets less
    for a, b in zip(range(len(weights)), np.argsort(weights), strict=True):
        assert weights[a] <= weights[b] or found[a] >= found[b]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_slices_of_a_data_set_are_spread_evenly(counts):
    found = pattern(counts).tolist()
    assert Counter(found) == dict(enumerate(counts)) and found == sources_of_slices(sum(counts), counts)
    for source, count in enumerate(counts):
        places = [(i + 0.5) / len(found) for i, owner in enumerate(found) if owner == source]
        wanted = (np.arange(count) + 0.5) / count
        assert np.abs(places - wanted).max() <= len(counts) / len(found)


def test_the_documented_example():
    assert shares(6, [2, 1]) == [4, 2] and shares(4, [1000, 1, 1]) == [2, 1, 1] and shares(7, [1, 1]) == [4, 3]
    assert "".join("AB"[source] for source in pattern([4, 2])) == "ABAABA"


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1, 0], r"\[1, 0\] must all be above 0"),
        ([1, -2], "above 0"),
        ([1, float("nan")], "above 0"),
        ([1, float("inf")], "above 0"),
        ([1, 1, 1], "2 data sets have 3 weights"),
        ([1], "2 data sets have 1 weights"),
    ],
)
def test_bad_weights_are_refused(weights, words):
    with pytest.raises(UserError, match=words):
        Mix([np.array([3]), np.array([4])], weights, 0, Schedule(((4, 8),), 2), 2)


def test_more_data_sets_than_slices_and_empty_ones_are_refused():
    chunk_rows = [np.array([3])] * 3
    with pytest.raises(UserError, match="3 data sets do not fit into the 2 slices of a batch; lower slice_size"):
        Mix(chunk_rows, [1, 1, 1], 0, Schedule(((4, 8), (4, 4)), 2), 2)
    with pytest.raises(UserError, match="no rows"):
        Mix([*chunk_rows, np.array([0])], [1] * 4, 0, Schedule(((4, 8),), 2), 2)


def test_a_stream_gives_the_records_that_the_mix_says(tmp_path):
    manifests = [
        write_dataset(str(tmp_path / "small"), make_records(13), rows_per_group=4, groups_per_shard=2),
        write_dataset(str(tmp_path / "large"), make_records(31, first=100), rows_per_group=5),
    ]
    schedule = Schedule(((5, 8), (4, 12)), 2)
    mix = Mix([manifest.chunk_rows for manifest in manifests], [1, 2], 3, schedule, 2)
    first_row = np.cumsum([0, *np.concatenate([manifest.chunk_rows for manifest in manifests])])
    names = [f"pair-{i}" for i in (*range(13), *range(100, 131))]
    wanted = {place: names[first_row[chunk] + row] for place, (_, chunk, row) in rows_of(mix).items()}
    assert {i < 100 for i in (int(name[5:]) for name in wanted.values())} == {True, False}

    sources = Sources(tuple(manifests))
    reader = Reader(sources.places, MaskedPairs(16, 12, DataConfig(), 30522, 0.15), 3)
    for num_workers in (1, 2):
        found = {}
        for rank in range(num_workers):
            options = {"start": 0, "stop": 9, "rank": rank, "num_workers": num_workers, "in_process": True}
            with Stream(sources, reader, mix, part_rows=7, window_spans=2, **options) as stream:
                for step, batch in enumerate(stream):
                    assert batch.valid.all()
                    found |= {(step, q): name for q, name in zip(batch.position.tolist(), batch.ids, strict=True)}
        assert found == wanted
