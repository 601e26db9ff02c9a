r"""Sums of products that minimise a quadratic form: alternation over the axes, growth, and Gauss-Newton steps in all.

With all factors but those of one axis held, the form is quadratic in these, and their minimum is a linear system
(G. Beylkin and M. J. Mohlenkamp, SIAM J. Sci. Comput. 26 (2005)). Alternation crawls where components cancel; damped
Gauss-Newton steps in all factors do not (L. Sorber, M. Van Barel and L. De Lathauwer, SIAM J. Optim. 23 (2013)). They
are taken by conjugate gradients on products of small matrices, linear in the number of axes. New components are first
fitted to what the others leave over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from sna_core.forms import QuadraticForm, conjugate_gradients
from sna_core.network import products_of_others

RIDGE = 1e-10  # of a block's mean diagonal: components that are alike
WHOLE_UP_TO = 400  # unknowns of a block that is factorised whole
NUM_SWEEPS = 20  # that new components are fitted by to what the others leave
FIRST_RANK = 10  # of growth by doubling


class ComponentSolver:
    """The factors of all axes, and the steps that lower the form.

    Args:
        form: What to minimise.
        factors: The start, (dimension, rank) for each axis.
    """

    def __init__(self, form: QuadraticForm, factors: Sequence[Tensor]):
        self.form, self.factors, self.damping = form, balanced(factors), 1e-3

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.factors[0].shape[1]

    def value(self) -> float:
        """The form."""
        return self.value_of(self.factors)

    def sweep(self) -> None:
        """Minimises in the factors of each axis in turn."""
        images = [self._images(i, factor) for i, factor in enumerate(self.factors)]
        grams = torch.stack([self._gram(i, factor, images[i]) for i, factor in enumerate(self.factors)])
        for i, factor in enumerate(self.factors):
            others = torch.cat([grams[:i], grams[i + 1 :]]).prod(0)
            block = self.form.by_matrix(i, others)
            right = self.form.right.contractions(self.factors)[i]
            self.factors[i] = self._solve_block(i, block, right, factor)
            grams[i] = self._gram(i, self.factors[i], self._images(i, self.factors[i]))
        self.factors = balanced(self.factors)

    def newton_step(self, *, reduction: float = 0.1, max_steps: int = 60) -> None:
        """A damped Gauss-Newton step in all factors; the damping follows how well the form's model held."""
        self.factors = balanced(self.factors)
        factors, value = self.factors, self.value()
        images = [self._images(i, factor) for i, factor in enumerate(factors)]
        grams = torch.stack([self._gram(i, factor, images[i]) for i, factor in enumerate(factors)])
        blocks = [self.form.by_matrix(i, others) for i, others in enumerate(products_of_others(grams))]
        rights = self.form.right.contractions(factors)
        slope = _joined([right - _weighted(*pair) for right, *pair in zip(rights, images, blocks, strict=True)])

        def product(step: Tensor) -> Tensor:
            parts = _split(step, factors)
            moved = [self._images(i, part) for i, part in enumerate(parts)]
            crossed = torch.stack([self._gram(i, factor, moved[i]) for i, factor in enumerate(factors)])
            found = []
            for i, others in enumerate(_tangents_of_others(grams, crossed)):
                found.append(_weighted(moved[i], blocks[i]) + _weighted(images[i], self.form.by_matrix(i, others)))
            return _joined(found) + damping * step

        traces = [
            (b.diagonal(dim1=1, dim2=2).sum(1) * m.diagonal(dim1=1, dim2=2).sum(1)).sum()
            for b, m in zip(blocks, self.form.matrices, strict=True)
        ]
        scale = reduce(torch.add, traces) / len(slope)
        while self.damping < 1e8:
            damping = self.damping * scale
            inverses = [self._preconditioner(i, block, damping) for i, block in enumerate(blocks)]

            def precondition(residual: Tensor, inverses: list[Callable[[Tensor], Tensor]] = inverses) -> Tensor:
                parts = _split(residual, factors)
                return _joined([inverse(part) for inverse, part in zip(inverses, parts, strict=True)])

            step = conjugate_gradients(product, precondition, slope, reduction=reduction, max_steps=max_steps)
            trial = [f + s for f, s in zip(factors, _split(step, factors), strict=True)]
            gain = (value - self.value_of(trial)) / max(float(slope @ step), 1e-300)
            if gain > 0:
                self.factors = trial
                self.damping = max(1e-12, self.damping * (0.2 if gain > 0.75 else 1.0 if gain > 0.25 else 4.0))
                return
            self.damping *= 10
        self.damping = 1e-3  # nothing but rounding is left to gain

    def value_of(self, factors: Sequence[Tensor]) -> float:
        """The form at other factors; what cancels to less than a part in 10^16 of the constant is lost."""
        grams = [self._gram(i, factor, self._images(i, factor)) for i, factor in enumerate(factors)]
        quadratic = self.form.coefficients @ torch.stack(grams).prod(0).sum((1, 2))
        linear = (factors[0] * self.form.right.contractions(factors)[0]).sum()
        return (quadratic - 2 * linear).item() + self.form.constant

    def _images(self, axis: int, factor: Tensor) -> Tensor:
        """(num_matrices, dimension, rank)."""
        return self.form.matrices[axis] @ factor

    def _gram(self, axis: int, factor: Tensor, images: Tensor) -> Tensor:
        """Products of all components along an axis, for each term of the form: (terms, rank, rank)."""
        return (factor.mT @ images)[self.form.index[:, axis]]

    def _solve_block(self, axis: int, block: Tensor, right: Tensor, start: Tensor) -> Tensor:
        matrices = self.form.matrices[axis]
        if len(matrices) > 1 and right.numel() <= WHOLE_UP_TO:
            whole = torch.einsum("uab,urs->arbs", matrices, block).reshape(right.numel(), right.numel())
            whole = _lifted((whole + whole.mT) / 2)
            return torch.cholesky_solve(right.reshape(-1, 1), torch.linalg.cholesky(whole)).view_as(right)
        inverse = self._preconditioner(axis, block, 0.0)
        if len(matrices) == 1:
            return inverse(right)
        found = conjugate_gradients(
            lambda x: _weighted(matrices @ x.view_as(right), block).flatten(),
            lambda x: inverse(x.view_as(right)).flatten(),
            right.flatten(),
            start.flatten(),
            reduction=1e-3,
            max_steps=10,
        )
        return found.view_as(right)

    def _preconditioner(self, axis: int, block: Tensor, damping: float | Tensor) -> Callable[[Tensor], Tensor]:
        """The inverse of the form in an axis's factors, its matrices cut to their diagonals; exact for the identity."""
        diagonals = self.form.matrices[axis].diagonal(dim1=1, dim2=2)
        if len(diagonals) == 1 and torch.equal(diagonals, torch.ones_like(diagonals)):
            root = torch.linalg.cholesky(_lifted(block[0], damping))
            return lambda x: torch.cholesky_solve(x.mT, root).mT
        by_function = torch.einsum("ua,urs->ars", diagonals, block)
        roots = torch.linalg.cholesky(_lifted((by_function + by_function.mT) / 2, damping))
        return lambda x: torch.cholesky_solve(x.unsqueeze(-1), roots).squeeze(-1)


class _Rest:
    """What factors leave over of a form's right-hand side."""

    def __init__(self, form: QuadraticForm, factors: Sequence[Tensor]):
        self.form, self.factors = form, factors
        self.images = [m @ f for m, f in zip(form.matrices, factors, strict=True)]

    def contractions(self, factors: Sequence[Tensor]) -> list[Tensor]:
        index = self.form.index
        crossed = torch.stack(
            [(image.mT @ f)[index[:, i]] for i, (image, f) in enumerate(zip(self.images, factors, strict=True))]
        )  # (axes, terms, old rank, new rank)
        found = []
        for i, others in enumerate(products_of_others(crossed)):
            taken = torch.einsum("uao,uor->ar", self.images[i], self.form.by_matrix(i, others))
            found.append(taken)
        return [a - b for a, b in zip(self.form.right.contractions(factors), found, strict=True)]


def extended(
    form: QuadraticForm,
    factors: Sequence[Tensor],
    count: int,
    generator: torch.Generator | None = None,
    *,
    num_sweeps: int = NUM_SWEEPS,
) -> list[Tensor]:
    """With ``count`` more components, fitted to what the others leave over by alternation from a random start."""
    rest = replace(form, right=_Rest(form, factors))
    starts = [torch.randn(size, count, generator=generator, dtype=torch.float64) for size in form.sizes]
    added = ComponentSolver(rest, [start / start.norm(dim=0) for start in starts])
    for _ in range(num_sweeps):
        added.sweep()
    return [torch.cat(pair, 1) for pair in zip(factors, added.factors, strict=True)]


def grow(
    form: QuadraticForm,
    rank: int,
    *,
    tolerance: float = 0.0,
    num_newton_steps: int = 40,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[Tensor]:
    """Factors of at most ``rank`` components that make the form small.

    The rank doubles from a few. New components are fitted to what the others leave over, by alternation from a random
    start; then all together are improved by Gauss-Newton steps, until these bring little.

    Args:
        form: With a constant that makes its least value zero, or near it.
        rank: Largest number of components, at least 1.
        tolerance: Ends growth once the form is below this fraction, squared, of its constant.
        num_newton_steps: After each growth, at most.
        greedy: Whether to add one component after another and leave it as it is (the proper generalised
            decomposition), for comparison.
        generator: Of the random starts.
        on_step: Called after each step with the rank and the root of the form's fraction of its constant.

    Returns:
        (dimension, rank) for each axis.
    """
    goal = tolerance**2 * form.constant
    scale = form.constant or 1.0

    def note(solver: ComponentSolver, value: float) -> None:
        if on_step is not None:
            on_step(solver.rank, (max(value, 0.0) / scale) ** 0.5)

    solver = ComponentSolver(form, [torch.zeros(size, 0, dtype=torch.float64) for size in form.sizes])
    value = form.constant
    while solver.rank < rank and (not solver.rank or value > goal):
        count = 1 if greedy else min(max(solver.rank, min(FIRST_RANK, rank)), rank - solver.rank)
        solver = ComponentSolver(form, extended(form, solver.factors, count, generator))
        value = solver.value()
        note(solver, value)
        for _ in range(0 if greedy else num_newton_steps):
            before = value
            solver.newton_step()
            value = solver.value()
            note(solver, value)
            if value <= goal or before - value < 1e-3 * before:
                break
    return solver.factors


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """Each component's size shared equally among its factors."""
    norms = torch.stack([factor.norm(dim=0) for factor in factors]).clamp(min=1e-150)
    mean = norms.log().mean(0).exp()
    return [factor * (mean / norm) for factor, norm in zip(factors, norms, strict=True)]


def _tangents_of_others(grams: Tensor, moved: Tensor) -> list[Tensor]:
    """For each axis the derivative of the product of all other axes' grams, each moved in turn."""
    one, zero = torch.ones_like(grams[0]), torch.zeros_like(grams[0])
    before, behind = [(one, zero)], [(one, zero)]
    for side, order in ((before, range(len(grams) - 1)), (behind, range(len(grams) - 1, 0, -1))):
        for k in order:
            product, tangent = side[-1]
            side.append((product * grams[k], tangent * grams[k] + product * moved[k]))
    return [a[1] * b[0] + a[0] * b[1] for a, b in zip(before, behind[::-1], strict=True)]


def _weighted(images: Tensor, block: Tensor) -> Tensor:
    """Sum over matrices of images (num_matrices, dimension, rank) times blocks (num_matrices, rank, rank)."""
    return (images @ block.mT).sum(0)


def _lifted(matrices: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """With a little more on the diagonals."""
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    lift = (RIDGE * mean + damping + 1e-300).expand(matrices.shape[:-1])
    return matrices + lift.diag_embed()


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [v.view_as(f) for v, f in zip(vector.split([f.numel() for f in like]), like, strict=True)]
