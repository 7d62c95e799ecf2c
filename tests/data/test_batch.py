"""`Batch`: from NumPy columns, cut, joined and moved, also with no rows and with bad rows."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from vlmo_ray.config import DataConfig
from vlmo_ray.data.batch import Batch
from vlmo_ray.data.encoders.pairs import MaskedPairs


def columns(n: int, bad: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    random = np.random.default_rng(n)
    return {
        "image": random.integers(0, 256, (n, 3, 4, 4), dtype=np.uint8),
        **{name: random.integers(0, 9, (n, 5), dtype=np.int32) for name in ("text_ids", "mlm_ids", "mlm_labels")},
        "text_mask": random.random((n, 5)) < 0.5,
        **{name: random.integers(0, 2**62, n) for name in ("image_key", "text_key")},
        "valid": ~np.isin(np.arange(n), bad),
        "step": np.full(n, 3),
        "position": np.arange(n),
        "id": np.array([f"id{i}" for i in range(n)], dtype=object),
        "problem": np.array([f"address {i}: bad" if i in bad else "" for i in range(n)], dtype=object),
    }


def equal(a: Batch, b: Batch) -> bool:
    if a.columns.keys() != b.columns.keys() or (a.ids, a.problems) != (b.ids, b.problems):
        return False
    pairs = [(getattr(a, name), getattr(b, name)) for name in (*a.columns, "valid", "position")]
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def test_from_numpy_keeps_values_and_widens_integers():
    given = columns(7, bad=(2, 5))
    batch = Batch.from_numpy(given)
    assert len(batch) == 7 and batch.ids == [f"id{i}" for i in range(7)]
    assert [p for p in batch.problems if p] == ["address 2: bad", "address 5: bad"]
    for name in ("text_ids", "mlm_ids", "mlm_labels", "image_key", "text_key", "position"):
        assert getattr(batch, name).dtype == torch.int64
        assert np.array_equal(getattr(batch, name).numpy(), given[name])
    for name in ("image", "text_mask", "valid"):
        assert np.array_equal(getattr(batch, name).numpy(), given[name])
    assert batch.image.dtype == torch.uint8 and batch.text_mask.dtype == torch.bool


@pytest.mark.parametrize("cuts", [(0, 7), (0, 3, 7), (0, 0, 2, 6, 7, 7)])
def test_rows_and_concatenate_are_inverse(cuts):
    batch = Batch.from_numpy(columns(7, bad=(0, 2, 5)))
    pieces = [batch.rows(slice(a, b)) for a, b in pairwise(cuts)]
    assert equal(Batch.concatenate(pieces), batch)
    for piece in pieces:
        assert [bool(problem) for problem in piece.problems] == (~piece.valid).tolist()


def test_rows_by_their_indices():
    batch = Batch.from_numpy(columns(7, bad=(0, 2, 5)))
    order = torch.tensor([4, 0, 0, 6])
    picked = batch.rows(order)
    assert equal(picked, Batch.concatenate([batch.rows(slice(i, i + 1)) for i in order.tolist()]))
    assert picked.text_len.tolist() == batch.text_len[order].tolist()


def test_texts_are_cut_where_the_longest_one_ends():
    given = columns(6)
    given["text_mask"] = np.arange(5) < np.array([2, 4, 3, 1, 2, 3])[:, None]
    batch = Batch.from_numpy(given)
    assert batch.text_len.tolist() == [2, 4, 3, 1, 2, 3]
    trimmed = batch.trimmed()
    assert {name: trimmed.columns[name].shape[1] for name in ("text_ids", "text_mask", "mlm_ids", "mlm_labels")} == {
        "text_ids": 4, "text_mask": 4, "mlm_ids": 4, "mlm_labels": 4
    }  # fmt: skip
    assert torch.equal(trimmed.text_ids, batch.text_ids[:, :4]) and torch.equal(trimmed.image, batch.image)
    assert batch.rows(torch.tensor([3, 0])).trimmed().text_mask.tolist() == [[True, False], [True, True]]
    assert equal(batch.rows(slice(0, 0)).trimmed().trimmed(), batch.rows(slice(0, 0)).trimmed())
    unmasked = Batch.from_numpy({name: value for name, value in given.items() if name != "text_mask"})
    assert equal(unmasked.trimmed(), unmasked)  # nothing says what is padding
    without = Batch.from_numpy({name: value for name, value in given.items() if not name.startswith(("text", "mlm"))})
    assert without.text_len.tolist() == [0] * 6 and equal(without.trimmed(), without)


def test_problems_go_with_their_rows():
    batch = Batch.from_numpy(columns(7, bad=(0, 2, 5)))
    assert batch.rows(slice(1, 5)).problems == ["", "address 2: bad", "", ""]
    assert batch.rows(slice(None, None, 5)).problems == ["address 0: bad", "address 5: bad"]


def test_no_rows():
    empty = Batch.empty(MaskedPairs(4, 5, DataConfig(), 30522, 0.15).columns)
    assert len(empty) == 0 and equal(empty, Batch.from_numpy(columns(0)))
    batch = Batch.from_numpy(columns(3))
    assert equal(Batch.concatenate([empty, batch, empty]), batch)
    assert equal(empty.rows(slice(0, 2)), empty) and equal(empty.to("cpu"), empty)


def test_to_moves_every_tensor():
    moved = Batch.from_numpy(columns(3, bad=(1,))).to("meta")
    tensors = [*moved.columns.values(), moved.valid, moved.position]
    assert len(tensors) == 9 and all(t.device.type == "meta" for t in tensors)
    assert moved.ids == ["id0", "id1", "id2"] and moved.problems == ["", "address 1: bad", ""]
