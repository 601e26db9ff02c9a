# Copyright 2026 The leviathan-sna authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The choice of a KHRONOS's rank, cells and degree by repeated cross-validation."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from .configuration import KhronosConfig
from .modeling import KhronosFit, KhronosModel
from .tables import TrainingData, training_data


@dataclass(frozen=True)
class SelectionRow:
    """One candidate.

    Attributes:
        rank: As in the config.
        num_cells: Likewise.
        degree: Likewise.
        num_fitted: Numbers that a fit takes from the data.
        error: Squared error on held-out points over the variance of y, both weighted: the mean over outputs, folds and
            repeats.
        standard_error: Of that mean, as if all folds were independent.
    """

    rank: int
    num_cells: int
    degree: int
    num_fitted: int
    error: float
    standard_error: float


@dataclass(frozen=True)
class Selection:
    """What :func:`select` found.

    Attributes:
        model: Of the chosen size, fitted to all points.
        fit: The result of that fit.
        chosen: The candidate of that size.
        rows: All candidates, the smallest error first.
    """

    model: KhronosModel
    fit: KhronosFit
    chosen: SelectionRow
    rows: tuple[SelectionRow, ...]

    @property
    def config(self) -> KhronosConfig:
        """The chosen model's."""
        return self.model.config


def select(
    x: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    *,
    ranks: Sequence[int] = (1, 2, 4, 8),
    num_cells: Sequence[int] = (2, 4, 8),
    degrees: Sequence[int] = (3,),
    num_folds: int = 5,
    num_repeats: int = 3,
    one_standard_error: bool = False,
    sample_weight: ArrayLike | Tensor | None = None,
    margin: float = 0.0,
    extrapolate: str = "raise",
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> Selection:
    """Chooses rank, cells and degree by repeated K-fold cross-validation, and fits that model to all points.

    All candidates see the same folds. The box is the range of all x, so that no held-out point lies outside of it.

    Args:
        x: Points (points, num_inputs).
        y: Values (points, num_outputs), for one output also (points,).
        ranks: To choose from.
        num_cells: To choose from.
        degrees: To choose from.
        num_folds: K, at least 2.
        num_repeats: Random divisions into folds.
        one_standard_error: Whether to take, in place of the least error, the fewest fitted numbers among the candidates
            whose error is at most one standard error above it (Breiman, Friedman, Olshen and Stone, Classification and
            Regression Trees, 1984, section 3.4.3).
        sample_weight: (points,), of the fits and the errors.
        margin: Of the box, as in :meth:`KhronosConfig.for_data`.
        extrapolate: As in the config.
        progress: Whether to show a bar.
        seed: Of the folds and the fits.
        **options: Those of [`sna_core.als.fit`] that :meth:`KhronosModel.fit` takes.

    Raises:
        ValueError: As the fit, and if there are no candidates, fewer than two folds or fewer points than folds.
    """
    # The config takes no numpy integers; what is no integer is left for it to refuse.
    sizes = ([int(n) if _is_whole(n) else n for n in each] for each in (ranks, num_cells, degrees))
    candidates = list(itertools.product(*sizes))
    if not candidates:
        raise ValueError("ranks, num_cells or degrees is empty; give at least one of each.")
    data = training_data(x, y, sample_weight)
    if not _is_whole(num_folds) or not 2 <= num_folds <= len(data.x):
        raise ValueError(
            f"num_folds = {num_folds!r}; expected an integer from 2 to {len(data.x)}, the number of points."
        )
    if not _is_whole(num_repeats) or num_repeats < 1:
        raise ValueError(f"num_repeats = {num_repeats!r}; expected an integer of at least 1.")

    def build(rank: int, num_cells: int, degree: int) -> KhronosModel:
        sizes = {"num_outputs": data.y.shape[1], "rank": rank, "num_cells": num_cells, "degree": degree}
        return KhronosModel(KhronosConfig.for_data(data.x, margin=margin, extrapolate=extrapolate, **sizes))

    mean = data.weight @ data.y / data.weight.sum()
    variance = data.weight @ (data.y - mean).square() / data.weight.sum()
    variance = torch.where(data.y.amin(0) < data.y.amax(0), variance, 1.0)
    folds = list(_folds(len(data.x), num_folds, num_repeats, seed))
    rows = []
    with tqdm(total=len(candidates) * len(folds), unit=" fits", disable=not progress) as bar:
        for size in candidates:
            errors = []
            for test in folds:
                model = build(*size)
                model.fit_checked(data.select(~test), seed=seed, **options)
                errors.append(_mean_squared_error(model, data.select(test)) / variance)
                bar.update()
            by_fold = torch.stack(errors).mean(-1)
            deviation = by_fold.std().item() / math.sqrt(len(folds))
            rank, cells, degree = size
            rows.append(SelectionRow(rank, cells, degree, model.num_fitted, by_fold.mean().item(), deviation))
    rows.sort(key=lambda row: row.error)
    chosen = rows[0]
    if one_standard_error:
        close = [row for row in rows if row.error <= rows[0].error + rows[0].standard_error]
        chosen = min(close, key=lambda row: row.num_fitted)
    model = build(chosen.rank, chosen.num_cells, chosen.degree)
    fit = model.fit_checked(data, seed=seed, **options)
    return Selection(model, fit, chosen, tuple(rows))


def _is_whole(number: Any) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


def _folds(num_points: int, num_folds: int, num_repeats: int, seed: int) -> Iterator[Tensor]:
    """For each fold of each repeat which points are held out, (points,)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_repeats):
        fold = torch.randperm(num_points, generator=generator) % num_folds
        for k in range(num_folds):
            yield fold == k


def _mean_squared_error(model: KhronosModel, data: TrainingData) -> Tensor:
    """Of each output, (num_outputs,), weighted."""
    prediction = torch.as_tensor(model.predict(data.x)).double().view_as(data.y)
    return data.weight @ (prediction - data.y).square() / data.weight.sum()


__all__ = ["Selection", "SelectionRow", "select"]
