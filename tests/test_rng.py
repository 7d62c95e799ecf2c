"""Stateless draws: NumPy and torch agree bit for bit, rows depend on their position alone, values are uniform."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmo_ray.rng import Noise, generator, hash_text, stream, uniforms, uniforms_torch


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.integers(1, 9))
def test_numpy_and_torch_draw_the_same(key, positions, n):
    ours = uniforms(key, positions, n)
    theirs = uniforms_torch(key, torch.tensor(positions), n)
    assert np.array_equal(ours, theirs.double().numpy())
    assert (ours >= 0).all() and (ours < 1).all()


def test_first_skips_draws():
    positions = torch.tensor([3, 4])
    assert torch.equal(uniforms_torch(9, positions, 10)[:, 6:], uniforms_torch(9, positions, 4, first=6))


def test_a_row_depends_on_its_position_alone():
    assert np.array_equal(uniforms(5, [7, 8, 9], 3)[1], uniforms(5, [8], 3)[0])


def test_draws_are_uniform_and_uncorrelated():
    draws = uniforms(stream(0, "test"), np.arange(2000), 50)
    assert abs(draws.mean() - 0.5) < 0.005
    assert abs(draws.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.01
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - draws.size / 20) ** 2 / (draws.size / 20)).sum() < 43.8  # chi-square, 19 degrees, p = 0.001


@pytest.mark.parametrize("other", [(2, "a", 0), (1, "b", 0), (1, "a", 1)])
def test_streams_differ_in_each_part(other):
    assert stream(1, "a", 0) != stream(*other)
    assert not np.array_equal(uniforms(stream(1, "a", 0), [0], 4), uniforms(stream(*other), [0], 4))


def test_generator_and_text_hash_are_the_same_in_every_process():
    assert generator(1, "augment", 2, 3).random() == generator(1, "augment", 2, 3).random()
    assert generator(1, "augment", 2, 3).random() != generator(1, "augment", 2, 4).random()
    assert hash_text("a red circle") == 1934406655020654534
    assert 0 <= hash_text("x") < 2**63


def test_noise_keeps_passes_apart():
    positions = torch.arange(4)
    a, b = Noise(1, 2, "image", positions), Noise(1, 2, "text", positions)
    assert torch.equal(a.uniform("drop_path", 3), Noise(1, 2, "image", positions).uniform("drop_path", 3))
    assert not torch.equal(a.uniform("drop_path", 3), b.uniform("drop_path", 3))
