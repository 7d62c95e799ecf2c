"""The order of rows: once per epoch, whatever the workers, the phases and the place where a run resumes.

The oracle is a plain loop over the whole stream, one dictionary entry per row (`slow_order`).
"""

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmo_ray import rng
from vlmo_ray.data.order import Order, Schedule, deal
from vlmo_ray.errors import UserError


@st.composite
def orders(draw) -> Order:
    chunk_rows = draw(st.lists(st.integers(0, 7), min_size=1, max_size=12).filter(any))
    slice_size = draw(st.integers(1, 4))
    phases = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=3))
    schedule = Schedule(tuple((steps, slices * slice_size) for steps, slices in phases), slice_size)
    seed = draw(st.integers(0, 3))
    return Order(np.array(chunk_rows, dtype=np.int32), seed, schedule, draw(st.integers(1, 5)))


def rows_of(order: Order, num_workers: int = 1, start: int = 0, stop: int | None = None) -> dict:
    """{(step, position): (epoch, chunk, row)} of the steps in `[start, stop)`, put together over workers."""
    stop = order.schedule.total_steps if stop is None else stop
    found = {}
    step = start
    while step < stop:
        span = order.span(step)
        for rank in range(num_workers):
            share = deal(order.schedule.num_slices(step), num_workers, rank)
            part = order.slice_rows(span, *share, start=start, stop=stop)
            assert np.all(np.lexsort((part.position, part.step)) == np.arange(len(part)))
            columns = (part.step, part.position, part.epoch, part.chunk, part.row)
            for t, q, *row in zip(*(c.tolist() for c in columns), strict=True):
                assert (t, q) not in found
                found[t, q] = tuple(row)
        step = span.stop
    return found


def slow_order(order: Order) -> dict:
    """The definition, one row at a time."""
    schedule, rows_in_epoch = order.schedule, int(order.chunk_rows.sum())
    cells, first_row = {}, 0  # (span, epoch) -> the places to fill
    step = 0
    for phase, (steps, batch) in enumerate(schedule.phases):
        last = phase == len(schedule.phases) - 1
        reach = -(-steps // order.shuffle_steps) * order.shuffle_steps if last else steps
        for i in range(reach):
            for q in range(batch):
                place = first_row + i * batch + q
                cell = (phase, i // order.shuffle_steps, place // rows_in_epoch)
                cells.setdefault(cell, []).append((place, step + i, q))
        step, first_row = step + steps, first_row + steps * batch
    found = {}
    for (_, _, epoch), places in cells.items():
        generator = np.random.Generator(np.random.Philox(key=rng.stream(order.seed, "chunks", epoch)))
        chunks = generator.permutation(len(order.chunk_rows))
        sequence = [(int(c), r) for c in chunks for r in range(order.chunk_rows[c])]
        sequence = sequence[places[0][0] - epoch * rows_in_epoch :]
        key = rng.stream(order.seed, "rows", epoch)
        dealt = sorted(places, key=lambda p: (p[2] // schedule.slice_size, rng.uniforms(key, [p[0]], 1)[0, 0]))
        for (_, t, q), row in zip(dealt, sequence, strict=False):
            if t < schedule.total_steps:
                found[t, q] = (epoch, *row)
    return found


@given(orders())
@settings(max_examples=60, deadline=None)
def test_equals_the_slow_definition_and_holds_every_row_once_per_epoch(order):
    found = rows_of(order)
    assert found == slow_order(order)
    schedule = order.schedule
    assert len(found) == schedule.rows_before(schedule.total_steps)
    assert set(found) == {(t, q) for t in range(schedule.total_steps) for q in range(schedule.batch_size(t))}
    everything = {(c, r) for c, n in enumerate(order.chunk_rows) for r in range(n)}
    by_epoch = {}
    for epoch, *row in found.values():
        by_epoch.setdefault(epoch, []).append(tuple(row))
    for rows in by_epoch.values():
        assert len(set(rows)) == len(rows)
    for epoch, rows in by_epoch.items():
        # the last span may hold rows back for steps after the run's end
        ends_with_span = schedule.total_steps == order.span(schedule.total_steps - 1).stop
        if ends_with_span and (epoch + 1) * order.num_rows <= len(found):
            assert set(rows) == everything


@given(orders(), st.integers(1, 7), st.data())
@settings(max_examples=60, deadline=None)
def test_workers_and_resuming_change_nothing(order, num_workers, data):
    whole = rows_of(order)
    assert rows_of(order, num_workers) == whole
    total = order.schedule.total_steps
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
    resumed = {}
    for i, (start, stop) in enumerate(pairwise(cuts)):
        order = pickle.loads(pickle.dumps(order))
        resumed |= rows_of(order, 1 + (num_workers + i) % 3, start, stop)
    assert resumed == whole


@given(orders())
@settings(max_examples=30, deadline=None)
def test_a_run_made_longer_keeps_what_came_before(order):
    *before, (steps, batch) = order.schedule.phases
    longer = Schedule((*before, (steps + 7, batch)), order.schedule.slice_size)
    longer = Order(order.chunk_rows, order.seed, longer, order.shuffle_steps)
    assert rows_of(longer, stop=order.schedule.total_steps) == rows_of(order)


@given(orders(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_worker_touches_few_chunks(order, num_workers):
    """Of one span and epoch, a worker's rows are one run of the sequence: only its end chunks are shared."""
    smallest = max(1, int(order.chunk_rows[order.chunk_rows > 0].min()))
    for step in range(order.schedule.total_steps):
        for rank in range(num_workers):
            share = deal(order.schedule.num_slices(step), num_workers, rank)
            part = order.slice_rows(order.span(step), *share)
            for epoch in np.unique(part.epoch):
                mine = part.epoch == epoch
                touched = len(np.unique(part.chunk[mine]))
                assert touched <= -(-mine.sum() // smallest) + 1


@given(st.integers(0, 40), st.integers(1, 12))
def test_deal_is_contiguous_and_even(num_slices, num_workers):
    shares = [deal(num_slices, num_workers, rank) for rank in range(num_workers)]
    assert [i for first, last in shares for i in range(first, last)] == list(range(num_slices))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1


def test_seeds_and_epochs_differ():
    schedule = Schedule(((30, 8),), 4)
    chunk_rows = np.array([5, 9, 3, 11, 4, 8, 10, 6, 7, 17])  # 80 rows: ten steps per epoch

    def batches(seed):
        found = rows_of(Order(chunk_rows, seed, schedule, 2))
        return [[found[t, q][1:] for q in range(8)] for t in range(30)]

    one, two = batches(1), batches(2)
    assert one == batches(1)
    assert sum(a == b for a, b in zip(one, two, strict=True)) == 0
    assert one[:10] != one[10:20] and one[10:20] != one[20:]


def test_neighbours_of_one_epoch_are_not_neighbours_of_the_next():
    """Of the pairs that share a batch in one epoch, about the chance share meets again in the next."""
    chunk_rows = np.array([13, 19] * 32)  # 1024 rows
    batch, shuffle_steps = 64, 4
    order = Order(chunk_rows, 5, Schedule(((32, batch),), 8), shuffle_steps)
    ends = np.cumsum(chunk_rows) - chunk_rows
    step_of = np.zeros((2, 1024), dtype=int)
    for (t, _), (epoch, chunk, row) in rows_of(order).items():
        step_of[epoch, ends[chunk] + row] = t
    same = [steps[:, None] == steps[None, :] for steps in step_of]
    pairs = np.triu(np.ones((1024, 1024), dtype=bool), 1)
    again = (same[0] & same[1] & pairs).sum() / (same[0] & pairs).sum()
    chance = (batch - 1) / 1023
    assert chance * 0.9 < again < chance * 1.35, (again, chance)
    # rows next to each other in a file meet in one batch of their span, not in one batch for sure
    adjacent = np.mean(step_of[0][1:] == step_of[0][:-1])
    assert adjacent < 1.3 / shuffle_steps, adjacent


def test_schedule_counts_and_refuses():
    schedule = Schedule(((3, 4), (2, 8)), 4)
    assert [schedule.rows_before(t) for t in range(6)] == [0, 4, 8, 12, 20, 28]
    assert schedule.rows_before(np.arange(6)).tolist() == [0, 4, 8, 12, 20, 28]
    assert [schedule.batch_size(t) for t in range(5)] == [4, 4, 4, 8, 8]
    assert [schedule.num_slices(t) for t in range(5)] == [1, 1, 1, 2, 2]
    assert schedule.total_steps == 5
    with pytest.raises(AssertionError):
        schedule.batch_size(5)
    for phases, size in [(((3, 6),), 4), (((0, 4),), 4), ((), 4), (((3, 4),), 0)]:
        with pytest.raises(UserError):
            Schedule(phases, size)
    with pytest.raises(UserError, match="no rows"):
        Order(np.zeros(3, dtype=int), 0, schedule, 2)


def test_spans_stop_at_a_phase_but_not_at_the_end_of_the_run():
    order = Order(np.array([5, 6]), 0, Schedule(((3, 4), (3, 8)), 4), 2)
    assert [order.span(t) for t in range(6)] == [range(0, 2)] * 2 + [range(2, 3)] + [range(3, 5)] * 2 + [range(5, 7)]


@pytest.mark.slow
def test_a_billion_rows_are_reached_in_a_second():
    import time

    order = Order(np.full(4_000_000, 250, dtype=np.int32), 1, Schedule(((200_000, 32768),), 256), 8)
    started = time.perf_counter()
    part = order.slice_rows(order.span(150_000), 0, 2)
    elapsed = time.perf_counter() - started
    assert len(part) == 8 * 2 * 256
    assert elapsed < 5, elapsed  # measured 0.5 s; the bound leaves room for a busy machine
    assert sum(array.nbytes for pair in order._epochs.values() for array in pair) < 200e6
