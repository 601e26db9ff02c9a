"""KHRONOS: choosing its sizes by repeated cross-validation."""

import numpy as np
import pytest

from leviathan.khronos import select
from tests.test_khronos import points, smooth


def test_select_finds_the_rank():
    rng = np.random.default_rng(0)
    x = rng.random((120, 3))
    y = np.sin(3 * x[:, 0]) * x[:, 1] + np.exp(x[:, 1]) * x[:, 2] + 0.01 * rng.standard_normal(120)
    options = {"ranks": (1, 2), "num_cells": (2,), "degrees": (1, 3), "num_folds": 4, "num_repeats": 1}
    found = select(x, y, **options, progress=False, num_restarts=3, max_sweeps=40)
    assert (found.chosen.rank, found.chosen.degree) == (2, 3)
    assert [row.error for row in found.rows] == sorted(row.error for row in found.rows)
    assert len(found.rows) == 4
    assert found.chosen.error < 0.05
    assert found.config.rank == 2
    assert found.model.num_fitted == found.chosen.num_fitted
    assert found.fit.train_rmse.item() < 0.1 * y.std()


def test_one_standard_error_prefers_few_numbers():
    x = points(60)
    y = np.random.default_rng(0).standard_normal(60)
    options = {"ranks": (1, 2), "num_cells": (2,), "num_folds": 3, "num_repeats": 1, "progress": False}
    found = select(x, y, **options, num_restarts=1, one_standard_error=True)
    limit = found.rows[0].error + found.rows[0].standard_error
    assert found.chosen.num_fitted == min(row.num_fitted for row in found.rows if row.error <= limit)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": ()}, "is empty"),
        ({"num_folds": 1}, "num_folds = 1; expected an integer from 2 to 20"),
        ({"num_folds": 21}, "num_folds = 21"),
        ({"num_repeats": 0}, "num_repeats = 0"),
        ({"margin": -1.0}, "margin = -1.0"),
    ],
)
def test_bad_selections_raise(options, message):
    with pytest.raises(ValueError, match=message):
        select(points(20), smooth(points(20)), progress=False, **options)
