"""Values of a separable field at millions of points, from a table of each cell's polynomials."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sna_core.bspline import CELL_POLYNOMIALS, UniformBSpline
from sna_core.field import FieldBasis, SeparableField
from sna_core.graded import GradedBSpline
from sna_core.local_sum import check_points

CHUNK_NUMEL = 2**19  # values for one axis at one time, which the processor's cache holds


class FieldTable:
    r"""The functions :math:`\psi_i` of a field as polynomials on each cell, taken from its parameters as they are now.

    Calling it equals ``field(points)`` up to the rounding of ``dtype``, without autograd, on the CPU and in parts that
    its cache holds. A point reads degree + 1 rows of an axis's table and adds them with the powers of its place in the
    cell as weights, in one kernel that stores no row. Spectral bases are evaluated in full.

    Rounding is relative to the largest component: where components cancel, take float64.

    Args:
        field: In any of its forms.
        dtype: Of the table and the values.
    """

    @torch.no_grad()
    def __init__(self, field: SeparableField, dtype: torch.dtype = torch.float32):
        self.bases, self.is_train, self.dtype = field.bases, field.is_train, dtype
        self.axes: list[_PiecewiseAxis | _SpectralAxis] = []
        scale = torch.ones((), dtype=torch.float64)
        for basis, coefficient in zip(field.bases, field.coefficients(), strict=True):
            coefficient = coefficient.detach().to("cpu", torch.float64)
            # Tables of size one, so that no product leaves the range of float32; the sizes come in last.
            size = coefficient.abs().amax() if self.is_train else coefficient.abs().amax(0)
            size = size.where(size > 0, 1.0)
            scale = scale * size
            coefficient = coefficient / size
            if self.is_train:
                coefficient = coefficient.transpose(0, 1)
            if isinstance(basis, UniformBSpline | GradedBSpline):
                self.axes.append(_PiecewiseAxis(basis, coefficient, dtype))
            else:
                self.axes.append(_SpectralAxis(basis, coefficient, dtype))
        self.scale = scale.to(dtype).reshape(-1)  # (rank,), for a train (1,)
        self.chunk_size = max(1, CHUNK_NUMEL // max(axis.num_values for axis in self.axes))

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """Evaluates the field: (N, d) -> (N,) in the table's dtype.

        Points may be of any floating dtype. Their places in the cells are found in it, before rounding to the table's.

        Raises:
            ValueError: If a point is NaN or outside the box, or the points have another shape or no floating dtype.
        """
        if points.ndim != 2 or not points.is_floating_point():
            raise ValueError(
                f"points are {points.dtype} of shape {tuple(points.shape)}; expected floating-point values (N, "
                f"{len(self.bases)})."
            )
        check_points(points, self.bases, points.dtype)
        values = torch.empty(len(points), dtype=self.dtype)
        for part, out in zip(points.split(self.chunk_size), values.split(self.chunk_size), strict=True):
            columns = part.to("cpu").mT.contiguous()
            product = self.axes[0](columns[0])
            for axis, column in zip(self.axes[1:], columns[1:], strict=True):
                functions = axis(column)
                product = _row_times_matrix(product, functions) if self.is_train else product.mul_(functions)
            torch.mv(product, self.scale, out=out)
        return values


def _row_times_matrix(row: Tensor, matrix: Tensor) -> Tensor:
    """(n, r) and (n, r * q) -> (n, q): a weighted sum of rows as well, faster so than by batched small products."""
    index = torch.arange(row.numel(), dtype=torch.int32).view_as(row)
    rows = matrix.view(row.numel(), matrix.shape[1] // row.shape[1])
    return F.embedding_bag(index, rows, per_sample_weights=row, mode="sum")


class _SpectralAxis:
    """The functions of one axis by its whole basis: points (n,) -> (n, num_functions)."""

    def __init__(self, basis: FieldBasis, coefficient: Tensor, dtype: torch.dtype):
        self.basis, self.table = basis, coefficient.flatten(1).to(dtype)
        self.num_values = sum(self.table.shape)  # that a point needs at one time

    def __call__(self, x: Tensor) -> Tensor:
        return self.basis.dense(x, check=False).to(self.table.dtype) @ self.table


class _PiecewiseAxis:
    """The functions of one axis by a polynomial on each cell: points (n,) -> (n, num_functions)."""

    def __init__(self, basis: UniformBSpline | GradedBSpline, coefficient: Tensor, dtype: torch.dtype):
        self.low, self.num_cells, self.degree = basis.low, basis.num_cells, basis.degree
        if isinstance(basis, UniformBSpline):
            polynomials = coefficient.new_tensor(CELL_POLYNOMIALS[basis.degree, 0])  # (power, function of the cell)
        else:
            polynomials = basis.cell_polynomials
        windows = coefficient.flatten(1).unfold(0, basis.degree + 1, 1).mT  # (cells, function of the cell, functions)
        self.table = (polynomials @ windows).flatten(0, 1).to(dtype)  # (cells * powers, functions)
        self.num_values = self.table.shape[1] + 2 * (basis.degree + 1)  # a point's functions, weights and rows
        self.powers = torch.arange(basis.degree + 1, dtype=torch.int32)
        # Equal cells are found by arithmetic, but for a function that jumps rounding must not choose the cell.
        self.edges = None
        self.cells_per_unit = basis.num_cells / (basis.high - basis.low)
        if isinstance(basis, GradedBSpline) or basis.degree == 0:
            self.edges = basis.knots()[basis.degree : basis.degree + basis.num_cells + 1]

    def __call__(self, x: Tensor) -> Tensor:
        if self.edges is None:
            position = (x - self.low) * self.cells_per_unit
            cell = position.to(torch.int32).clamp_(0, self.num_cells - 1)
            u = position.sub_(cell)
        else:
            edges = self.edges.to(x)
            cell = torch.bucketize(x, edges[1:-1], right=True, out_int32=True)
            u = (x - edges[cell]) / edges.diff()[cell]
        weights = self.table.new_ones(len(x), self.degree + 1)
        u = u.to(weights.dtype)
        for k in range(self.degree):
            torch.mul(weights[:, k], u, out=weights[:, k + 1])
        rows = cell.unsqueeze(-1) * (self.degree + 1) + self.powers
        return F.embedding_bag(rows, self.table, per_sample_weights=weights, mode="sum")
