"""Recipes draw the curves that are stored: whatever changes a loss or a gradient is noticed.

`make_curves.py` beside this file makes the stored numbers.
"""

import pytest
from make_curves import RECIPES, curve, make_data, stored

from vlmo_ray.recipes import recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return make_data(tmp_path_factory.mktemp("curves") / "data")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("steps", [3, pytest.param(None, marks=pytest.mark.full, id="whole")])
def test_a_recipe_draws_its_stored_curve(data, tmp_path, name, steps):
    wanted = stored(name)
    assert len(wanted) == recipe(name).total_steps
    found = curve(name, data, tmp_path, steps)
    assert len(found) == (steps or len(wanted))
    for row, expected in zip(found, wanted, strict=False):
        assert row == pytest.approx(expected, rel=1e-9)
