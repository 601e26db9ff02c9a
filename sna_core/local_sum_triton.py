# ruff: noqa: ANN001, ANN202  (the arguments of kernels are pointers and tiles)
"""Evaluation of :mod:`sna_core.local_sum` as a Triton kernel: cell, polynomials and sum, with nothing stored between.

This module needs Triton, for which nothing else asks: importing it raises ``ImportError`` where there is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sna_core.bspline import CELL_POLYNOMIALS
from sna_core.generator_triton import is_available

TILE_NUMEL = 1024  # sums in one program
LARGEST_BLOCK_FUNCTIONS = 128


@triton.jit
def _divide(a, b):
    """The quotient rounded as PyTorch's, which in float32 the operator / is not: points on a knot must stay there."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _evaluate_kernel(
    x,  # (inputs, points)
    factors,  # (inputs, num_basis, functions)
    low,  # (inputs)
    width,  # (inputs)
    sums,  # (inputs, points, functions)
    num_points,
    num_functions,
    num_cells,
    DEGREE: tl.constexpr,
    DERIVATIVE: tl.constexpr,
    POLYNOMIALS: tl.constexpr,  # [k][m]: of u^(k - DERIVATIVE) in the m-th function of a cell
    BLOCK_POINTS: tl.constexpr,
    BLOCK_FUNCTIONS: tl.constexpr,
):
    """One program for a block of points, a block of functions and an input; ``bspline.local_bspline`` in its order."""
    points = tl.program_id(0) * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)
    functions = tl.program_id(1) * BLOCK_FUNCTIONS + tl.arange(0, BLOCK_FUNCTIONS)
    i = tl.program_id(2).to(tl.int64)  # offsets from here on may exceed 2^31
    dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    start, length = tl.load(low + i).to(dtype), tl.load(width + i).to(dtype)
    point = tl.load(x + i * num_points + points, mask=points < num_points, other=0.0).to(dtype)
    cells = tl.zeros_like(point) + num_cells

    position = _divide((point - start) * cells, length + tl.zeros_like(point))
    cell = tl.floor(position)
    if DERIVATIVE == DEGREE:  # piecewise constant: at a knot rounding must not choose the cell
        below = start + length * _divide(cell, cells)
        above = start + length * _divide(cell + 1, cells)
        cell = cell - (point < below).to(dtype) + (point >= above).to(dtype)
    cell = tl.where(cell >= 0, cell, 0.0)  # 0 for NaN, too: a row that exists, while u and the sum stay NaN
    cell = tl.where(cell < cells, cell, cells - 1)
    u = position - cell

    scale = tl.full(point.shape, 1.0, dtype)
    for _ in tl.static_range(DERIVATIVE):
        scale *= _divide(cells, length + tl.zeros_like(point))
    total = tl.zeros((BLOCK_POINTS, BLOCK_FUNCTIONS), dtype)
    is_sum = (points < num_points)[:, None] & (functions < num_functions)[None, :]
    first = i * (num_cells + DEGREE) + cell.to(tl.int32)
    for m in tl.static_range(DEGREE + 1):
        value = 0.0 * u + POLYNOMIALS[DEGREE - DERIVATIVE][m]
        for k in tl.static_range(1, DEGREE - DERIVATIVE + 1):
            value = value * u + POLYNOMIALS[DEGREE - DERIVATIVE - k][m]
        row = tl.load(factors + (first + m)[:, None] * num_functions + functions[None, :], mask=is_sum, other=0.0)
        total += (value * scale)[:, None] * row.to(dtype)
    offsets = (i * num_points + points)[:, None] * num_functions + functions[None, :]
    tl.store(sums + offsets, total.to(sums.dtype.element_ty), mask=is_sum)


def local_sum_triton(
    x: Tensor, factors: Tensor, low: Tensor, width: Tensor, num_cells: int, degree: int, derivative: int
) -> Tensor:
    r"""The sums :math:`\sum_b \alpha_{ibw} B_b^{(n)}(x_{ip})`, without gradient and without a look at the points.

    Computed in float64 for float64, else in float32. Points outside get the polynomial of the nearest cell.

    Shapes: x (inputs, points), factors (inputs, num_cells + degree, functions), low and width (inputs, 1) -> (inputs,
    points, functions), in the factors' dtype.
    """
    assert factors.shape[:2] == (x.shape[0], num_cells + degree), "local_sum checks what a user gives"
    num_inputs, num_points = x.shape
    num_functions = factors.shape[2]
    if derivative > degree:
        return factors.new_zeros(num_inputs, num_points, num_functions)
    sums = factors.new_empty(num_inputs, num_points, num_functions)
    if not sums.numel():
        return sums
    block_functions = min(LARGEST_BLOCK_FUNCTIONS, triton.next_power_of_2(num_functions))
    block_points = TILE_NUMEL // block_functions
    grid = (triton.cdiv(num_points, block_points), triton.cdiv(num_functions, block_functions), num_inputs)
    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        _evaluate_kernel[grid](
            *(t.contiguous() for t in (x, factors, low, width)),
            sums,
            num_points,
            num_functions,
            num_cells,
            DEGREE=degree,
            DERIVATIVE=derivative,
            POLYNOMIALS=tuple(map(tuple, CELL_POLYNOMIALS[degree, derivative])),
            BLOCK_POINTS=block_points,
            BLOCK_FUNCTIONS=block_functions,
            enable_fp_fusion=False,  # would round the knots otherwise than PyTorch
        )
    return sums


__all__ = ["is_available", "local_sum_triton"]
