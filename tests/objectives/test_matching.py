"""Hard negatives: never a forbidden pair, drawn from the softmax, the same for any block size and workers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmo_ray.objectives.matching import hard_negatives, matching_loss, rows_to_match
from vlmo_ray.objectives.pairs import Pairs


def unit(rows, width=5, seed=0):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()), min_size=1, max_size=9),
    st.integers(1, 10),
    st.integers(0, 2**63),
    st.data(),
)
def test_never_a_forbidden_pair_and_the_same_for_any_block_size_and_workers(rows, block_size, key, data):
    image_key, text_key = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    valid = torch.tensor([row[2] for row in rows])
    count = len(rows)
    images, texts, scale = unit(count, seed=1), unit(count, seed=2), torch.tensor(1.0)
    whole = hard_negatives(images, texts, scale, Pairs(image_key, text_key, valid, 0, count), key, block_size=99)
    for i, j in enumerate(whole.tolist()):
        free = [
            k for k in range(count)
            if valid[i] and valid[k] and image_key[i] != image_key[k] and text_key[i] != text_key[k]
        ]  # fmt: skip
        assert (j in free) if free else j == -1
    first = data.draw(st.integers(0, count - 1))
    part = Pairs(image_key, text_key, valid, first, count - first)
    assert torch.equal(hard_negatives(images[first:], texts, scale, part, key, block_size=block_size), whole[first:])


def test_drawn_from_the_softmax_of_scaled_similarity():
    rows, draws = 6, 4000
    images, texts, log_scale = unit(rows, seed=3), unit(rows, seed=4), torch.tensor(math.log(2.5))
    pairs = Pairs(torch.tensor([0, 1, 2, 3, 4, 0]), torch.arange(rows), torch.ones(rows).bool(), 0, rows)
    counts = np.zeros((rows, rows))
    for key in range(draws):
        counts[np.arange(rows), hard_negatives(images, texts, log_scale, pairs, key * 7919).numpy()] += 1
    logits = (2.5 * images @ texts.T).masked_fill(~pairs.may_oppose(slice(0, rows), slice(0, rows)), -torch.inf)
    expected = torch.softmax(logits, dim=1).numpy() * draws
    for row in range(rows):
        possible = expected[row] > 0
        assert counts[row][~possible].sum() == 0
        chi_square = ((counts[row] - expected[row])[possible] ** 2 / expected[row][possible]).sum()
        assert chi_square < 20.5, (row, chi_square)  # 4 or fewer degrees of freedom, p = 0.0004


def test_local_mining_stays_in_a_rows_own_run_and_asked_rows_draw_the_same():
    rows, key = 12, 5
    images, texts, scale = unit(rows, seed=5), unit(rows, seed=6), torch.tensor([1.0])
    valid = torch.ones(rows).bool()
    valid[9] = False
    everyone = torch.arange(rows)
    pairs = Pairs(everyone, everyone, valid, 0, rows)
    local = hard_negatives(texts, images, scale, pairs, key, among=4)
    assert (local[valid] // 4 == everyone[valid] // 4).all() and (local != everyone).all() and local[9] == -1
    second = Pairs(everyone, everyone, valid, 4, 8)
    assert torch.equal(hard_negatives(texts[4:], images, scale, second, key, among=4, block_size=3), local[4:])
    asked = rows_to_match(4, 8, run=4, share=0.5)
    assert asked.tolist() == [0, 1, 4, 5]
    everywhere = hard_negatives(texts, images, scale, pairs, key)
    assert torch.equal(hard_negatives(texts[4:], images, scale, second, key, asked=asked), everywhere[4:][asked])
    assert rows_to_match(4, 8, run=4, share=1.0).tolist() == list(range(8))


def test_matching_loss_is_the_mean_over_kept_rows():
    logits = [torch.randn(4, 2, generator=torch.Generator().manual_seed(i), requires_grad=True) for i in range(3)]
    kept = torch.tensor([True, False, True, True])
    loss, right = matching_loss(*logits, kept, torch.tensor(5))
    joined = torch.cat([x[kept] for x in logits])
    target = torch.tensor([1] * 3 + [0] * 6)
    plain = torch.nn.functional.cross_entropy(joined, target, reduction="sum") / 15
    torch.testing.assert_close(loss, plain)
    assert right == (joined.argmax(1) == target).sum()
    loss.backward()
    assert all((x.grad[1] == 0).all() and (x.grad[0] != 0).any() for x in logits)


def test_nothing_kept_gives_zero():
    logits = torch.zeros(2, 2, requires_grad=True)
    loss, _ = matching_loss(logits, logits, logits, torch.zeros(2).bool(), torch.tensor(0))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_the_share_of_pairs_that_are_no_negatives():
    """Against all pairs one by one; invalid rows do not count, whatever their keys."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 2, 40):
        image, text = (torch.randint(0, 15, (rows,), generator=generator) for _ in "it")
        for valid in (torch.rand(rows, generator=generator) < 0.7, torch.zeros(rows, dtype=torch.bool)):
            pairs = Pairs(image, text, valid, 0, rows)
            number = int(valid.sum())
            opposed = int(pairs.may_oppose(slice(0, rows), slice(0, rows)).sum())
            wanted = 1 - opposed / (number * (number - 1)) if number > 1 else 0.0
            assert float(pairs.same_share()) == pytest.approx(wanted)
