"""Preconditioned conjugate gradients for many symmetric systems at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RESTARTS = 3  # single precision lets the residual of the recursion run ahead of the true one
Operator = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Solution:
    r"""What :func:`conjugate_gradient` found.

    Attributes:
        x: (systems, ...).
        residual: :math:`\lVert b - A x\rVert_P / \lVert b\rVert_P`, :math:`\lVert r\rVert_P^2 = r \cdot P r`, computed
            from x at the end, (systems,); 0 where b is zero.
        converged: Whether it is within the tolerance, (systems,).
        num_iterations: Products with A, of the slowest system.
    """

    x: Tensor
    residual: Tensor
    converged: Tensor
    num_iterations: int


def conjugate_gradient(
    apply: Operator, precondition: Operator, b: Tensor, tolerance: float, max_iterations: int, *, floor: float = 0.0
) -> Solution:
    """Solves A x = b for each system of a batch; systems that are done leave it.

    A and the preconditioner P are symmetric and positive semidefinite, b in the range of A.

    Args:
        apply: A: (systems, ...) and the numbers of these systems in the batch, (systems,), to (systems, ...).
        precondition: P, likewise.
        b: (systems, ...).
        tolerance: Of the relative residual in the norm of P.
        max_iterations: Products with A, at most.
        floor: Norm below which b is rounding, and x zero.
    """
    every = torch.arange(len(b), device=b.device)
    x, z = torch.zeros_like(b), precondition(b, every)
    scale = _dot(b, z).clamp_min(0.0).sqrt()
    scale = torch.where(scale > floor, scale, 0.0)
    residual = torch.where(scale > 0, 1.0, 0.0).to(b.dtype)
    num_iterations = 0
    for _ in range(RESTARTS):
        active = (residual > tolerance).nonzero()[:, 0]
        if not len(active) or num_iterations >= max_iterations:
            break
        num_iterations += _iterate(apply, precondition, b, x, scale, active, tolerance, max_iterations - num_iterations)
        rest = b[active] - apply(x[active], active)
        residual[active] = _dot(rest, precondition(rest, active)).clamp_min(0.0).sqrt() / scale[active]
    return Solution(x, residual, residual <= tolerance, num_iterations)


def _iterate(
    apply: Operator,
    precondition: Operator,
    b: Tensor,
    x: Tensor,
    scale: Tensor,
    active: Tensor,
    tolerance: float,
    max_iterations: int,
) -> int:
    """Improves x of the ``active`` systems in place, until the recursion takes each residual below the tolerance."""
    y = x[active]
    r = b[active] - apply(y, active) if y.any() else b[active].clone()
    z = precondition(r, active)
    p, rz = z.clone(), _dot(r, z)
    goal = (tolerance * scale[active]) ** 2
    num_iterations = 0
    while num_iterations < max_iterations:
        num_iterations += 1
        q = apply(p, active)
        curvature = _dot(p, q)
        # A system that has ended stands still until it leaves the batch.
        step = torch.where((rz > goal) & (curvature > 0), rz / curvature, 0.0)
        y.addcmul_(_fit(step, p), p)
        r.addcmul_(_fit(step, q), q, value=-1)
        z = precondition(r, active)
        before, rz = rz, _dot(r, z)
        going = (rz > goal) & (step > 0)
        if not going.any():
            break
        if going.sum() <= len(going) // 2:
            x[active] = y
            active, goal, before, rz = active[going], goal[going], before[going], rz[going]
            y, r, z, p = y[going], r[going], z[going], p[going]
        p.mul_(_fit(torch.where(before > 0, rz / before, 0.0), p)).add_(z)
    x[active] = y
    return num_iterations


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.vecdot(left.flatten(1), right.flatten(1))


def _fit(each: Tensor, like: Tensor) -> Tensor:
    return each.view(-1, *(1,) * (like.ndim - 1))
