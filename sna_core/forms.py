"""Quadratic forms on sums of products, and the conjugate gradients that minimise them in part of the unknowns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sna_core.network import products_of_others


class Functional(Protocol):
    """A right-hand side."""

    def contractions(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """For each axis (dimension, rank): its products with all factors (dimension, rank) but those of that axis."""


@dataclass(frozen=True)
class Components:
    """A sum of products: ``factors[i]`` (size_i, rank) holds each component's coefficients along axis i."""

    factors: tuple[Tensor, ...]

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.factors[0].shape[1]

    def __add__(self, other: Components) -> Components:
        return Components(tuple(torch.cat(pair, 1) for pair in zip(self.factors, other.factors, strict=True)))

    def __neg__(self) -> Components:
        return Components((-self.factors[0], *self.factors[1:]))

    def contractions(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """As of a :class:`Functional`."""
        inner = torch.stack([b.mT @ f for b, f in zip(self.factors, factors, strict=True)])
        return [b @ o for b, o in zip(self.factors, products_of_others(inner), strict=True)]

    def norm(self) -> float:
        """Of the sum, in orthonormal bases; what cancels to less than a part in 10^8 is lost."""
        gram = reduce(torch.mul, (f.mT @ f for f in self.factors))
        return gram.sum().clamp(min=0).sqrt().item()


Right = TypeVar("Right", bound=Functional)


@dataclass(frozen=True)
class QuadraticForm(Generic[Right]):
    r"""What is minimised: :math:`J(w) = \langle w, A w \rangle - 2 \langle b, w \rangle + c`, A symmetric and positive.

    .. math::
        A = \sum_p a_p \bigotimes_i M^{(i)}_{s_i(p)}

    Attributes:
        matrices: M, for each axis (num_matrices, dimension, dimension), each different from the others.
        index: s, (terms, num_axes).
        coefficients: a, (terms,).
        right: b.
        constant: c.
    """

    matrices: tuple[Tensor, ...]
    index: Tensor
    coefficients: Tensor
    right: Right
    constant: float

    @property
    def sizes(self) -> list[int]:
        """Dimension of each axis."""
        return [m.shape[-1] for m in self.matrices]

    def permuted(self: QuadraticForm[Components], order: Sequence[int]) -> QuadraticForm[Components]:
        """The same with the axes in another order; the right-hand side must be a sum of products."""
        return QuadraticForm(
            tuple(self.matrices[i] for i in order),
            self.index[:, list(order)],
            self.coefficients,
            Components(tuple(self.right.factors[i] for i in order)),
            self.constant,
        )

    def by_matrix(self, axis: int, values: Tensor) -> Tensor:
        """Sums values (terms, ...) over the terms that share a matrix along an axis: (num_matrices, ...)."""
        weighted = values * self.coefficients.view(-1, *[1] * (values.ndim - 1))
        total = values.new_zeros(len(self.matrices[axis]), *values.shape[1:])
        return total.index_add_(0, self.index[:, axis], weighted)


def distance_to(target: Right, sizes: Sequence[int], squared_norm: float) -> QuadraticForm[Right]:
    """The squared distance to a function in L2, in orthonormal bases."""
    matrices = tuple(torch.eye(size, dtype=torch.float64).unsqueeze(0) for size in sizes)
    index = torch.zeros(1, len(matrices), dtype=torch.long)
    return QuadraticForm(matrices, index, torch.ones(1, dtype=torch.float64), target, squared_norm)


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    right: Tensor,
    start: Tensor | None = None,
    *,
    reduction: float,
    max_steps: int,
) -> Tensor:
    """Solves a symmetric positive system until the preconditioned residual's norm has fallen by a factor.

    Args:
        apply: The matrix.
        precondition: An approximate inverse, symmetric and positive.
        right: Right-hand side.
        start: None for zero.
        reduction: The factor.
        max_steps: At most so many.
    """
    x = torch.zeros_like(right) if start is None else start
    residual = right if start is None else right - apply(start)
    step = direction = precondition(residual)
    size = (residual * step).sum()
    goal = reduction**2 * size
    for _ in range(max_steps):
        if not size > goal:
            break
        image = apply(direction)
        curvature = (direction * image).sum()
        if not curvature > 0:  # nothing but rounding is left
            break
        x = x + (size / curvature) * direction
        residual = residual - (size / curvature) * image
        step = precondition(residual)
        size, before = (residual * step).sum(), size
        direction = step + (size / before) * direction
    return x
