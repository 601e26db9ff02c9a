r"""From a problem to matrices of one axis each, in bases that satisfy its homogeneous conditions.

The solution is sought as u = w + g. The lift g is a sum of products that takes all boundary and initial data; w is zero
where they are given. Along each axis the functions of w are combinations of the axis's basis with the conditions built
in, orthonormal in L2 and orthogonal in the energy :math:`\int (\psi')^2`: in these bases norms are those of functions,
and preconditioners are diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from sna_core.axis import Axis
from sna_core.field import gauss
from sna_core.forms import Components
from sna_core.operators import Operator, Problem, Term, derivative

EXTRA_POINTS = 5  # of quadrature in a cell, for coefficients that are no constants
ROUNDING = 1e-12  # of the largest data: what counts as none
COMPATIBLE = 1e-3  # of the largest value of the data: what boundary and initial data may disagree by where they meet


class Space:
    """The functions along one axis, and those among them that satisfy its homogeneous conditions.

    Attributes:
        basis: All functions.
        points: Quadrature points (points,).
        weights: Their weights.
        conditions: The linear conditions as rows (num_conditions, num_basis).
        trial: Coefficients (num_basis, dimension) of the functions that satisfy all of them: orthonormal in L2,
            orthogonal in energy, smooth ones first.

    Raises:
        ValueError: If no function but zero satisfies the conditions.
    """

    def __init__(self, axis: Axis, conditions: Sequence[tuple[str, int]], is_zero: Sequence[bool] = ()):
        self.axis, self.basis, self._where = axis, axis.basis, tuple(conditions)
        self._is_zero = torch.tensor([*is_zero, *[False] * (len(conditions) - len(is_zero))], dtype=torch.bool)
        self.points, self.weights = gauss(self.basis, EXTRA_POINTS)
        none = torch.empty(0, self.basis.num_basis, dtype=torch.float64)
        self.conditions = torch.stack([self._row(*where) for where in self._where]) if conditions else none
        joined = torch.cat([self.conditions, self._periodic()])
        free = _null_space(joined)
        if not free.shape[1]:
            raise ValueError(
                f"axis {axis.name!r} has {len(joined)} conditions on {len(free)} functions; add cells or functions."
            )
        root = torch.linalg.cholesky(free.mT @ self.gram(0) @ free)
        energy = torch.linalg.solve_triangular(root, free.mT @ self.gram(1) @ free, upper=False)
        energy = torch.linalg.solve_triangular(root, energy.mT, upper=False)
        _, directions = torch.linalg.eigh((energy + energy.mT) / 2)
        self.trial = free @ torch.linalg.solve_triangular(root.mT, directions, upper=True)

    @property
    def dimension(self) -> int:
        """Number of functions that satisfy the conditions."""
        return self.trial.shape[1]

    def gram(self, order: int) -> Tensor:
        """Inner products (num_basis, num_basis) of all functions' derivatives of one order."""
        values = self.basis.dense(self.points, order)
        return (values.mT * self.weights) @ values

    def values(self, operator: Operator, points: Tensor | None = None) -> Tensor:
        """The operator's values of all functions at points, None for those of quadrature: (points, num_basis)."""
        points = self.points if points is None else points
        coefficients = operator.coefficients(points)
        return reduce(torch.add, [c.unsqueeze(-1) * self.basis.dense(points, n) for n, c in enumerate(coefficients)])

    def data(self, operator: Operator) -> Tensor:
        """The coefficients (num_basis,) nearest in L2 to a function, of those that take its values in the conditions.

        Where a condition says zero, values that are small beside the function's largest one count as that.
        """
        target = operator.values(self.points)
        right = self.basis.dense(self.points).mT @ (self.weights * target)
        if not self._where:
            return self.trial @ (self.trial.mT @ right)  # a periodic one on a periodic axis
        ends = target.new_zeros(len(self._where))
        for n, (end, order) in enumerate(self._where):
            composed = derivative(order) * operator if order else operator
            ends[n] = composed.coefficients(self._end(end))[0]
        scale = target.abs().amax() / (self.axis.high - self.axis.low) ** ends.new_tensor([o for _, o in self._where])
        return self._constrained(
            self.gram(0), right, torch.where(self._is_zero & (ends.abs() <= COMPATIBLE * scale), 0.0, ends)
        )

    def lifts(self) -> Tensor:
        """For each condition the smoothest function with one there and zero in the others: (conditions, num_basis).

        Of least energy of as high an order as there are conditions: the constant for one value, lines for two.
        """
        order = min(len(self._where) + sum(order for _, order in self._where), 3)
        order = order if self.axis.degree is None else min(order, self.axis.degree)
        energy = self.gram(order) / self.gram(order).diagonal().amax() + 1e-9 * self.gram(0) / self.gram(0).amax()
        zero = energy.new_zeros(len(energy))
        unit = torch.eye(len(self._where), dtype=torch.float64)
        return torch.stack([self._constrained(energy, zero, row) for row in unit])

    def _constrained(self, matrix: Tensor, right: Tensor, values: Tensor) -> Tensor:
        """The least of c^T matrix c / 2 - right^T c where conditions @ c = values."""
        particular = torch.linalg.lstsq(self.conditions, values.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        free = _null_space(self.conditions)
        rest = torch.linalg.solve(free.mT @ matrix @ free, free.mT @ (right - matrix @ particular))
        return particular + free @ rest

    def _end(self, end: str) -> Tensor:
        return torch.tensor([getattr(self.axis, end)], dtype=torch.float64)

    def _row(self, end: str, order: int) -> Tensor:
        return self.basis.dense(self._end(end), order, check=False)[0]

    def _periodic(self) -> Tensor:
        """Rows that make functions agree at both ends, and all their derivatives that are continuous inside."""
        if self.axis.ends != ("periodic", "periodic") or self.axis.kind == "fourier":
            return torch.empty(0, self.basis.num_basis, dtype=torch.float64)
        width = self.axis.high - self.axis.low
        orders = range(3 if self.axis.degree is None else max(self.axis.degree, 1))
        return torch.stack([(self._row("high", n) - self._row("low", n)) * width**n for n in orders])


def _null_space(rows: Tensor) -> Tensor:
    """An orthonormal basis (columns, dimension) of all c with rows @ c = 0."""
    if not len(rows):
        return torch.eye(rows.shape[1], dtype=rows.dtype)
    rows = rows / rows.norm(dim=1, keepdim=True)
    _, sizes, vectors = torch.linalg.svd(rows, full_matrices=True)
    return vectors[int((sizes > 1e-10).sum()) :].mT


class Discretisation:
    """A linear problem in the bases of its axes.

    Attributes:
        spaces: One for each axis.
        terms: Of the operator, with numbers for coefficients.
        num_own_terms: How many of them are the problem's own, which come first.
        source: Terms of the source.
        lift: g, in the axes' own bases.
        incompatibility: Largest disagreement of boundary and initial data where they meet, as a fraction of the largest
            of their values.

    Args:
        problem: Its nonlinear part is left out.
        extra: Terms of the operator beside the problem's.
        extra_source: Terms of the source beside the problem's.

    Raises:
        ValueError: If boundary and initial data are incompatible, an axis has too few functions, or a coefficient or
            the source does not compress.
    """

    def __init__(self, problem: Problem, extra: Sequence[Term] = (), extra_source: Sequence[Term] = ()):
        self.problem = problem
        self.spaces = [
            Space(axis, problem.conditions(axis), [not terms for terms in problem.data(axis)]) for axis in problem.axes
        ]
        own = problem.separated(problem.operator)
        self.terms, self.num_own_terms = [*own, *extra], len(own)
        self.source = [*problem.separated(problem.source), *extra_source]
        self.lift, self.incompatibility = self._lift()

    def components(self, terms: Sequence[Term]) -> Components:
        """Terms of functions alone in the axes' own bases."""
        factors = []
        for i, space in enumerate(self.spaces):
            cache: dict[Operator, Tensor] = {}
            columns = []
            for term in terms:
                operator = term.operators.get(space.axis.name, Operator())
                if operator not in cache:
                    cache[operator] = space.data(operator)
                columns.append(cache[operator] * (term.number if i == 0 else 1.0))
            factors.append(torch.stack(columns, 1) if columns else space.trial.new_zeros(space.basis.num_basis, 0))
        return Components(tuple(factors))

    def lift_norm(self) -> float:
        """Of g in L2 over the box."""
        roots = [torch.linalg.cholesky(space.gram(0)).mT for space in self.spaces]
        return Components(tuple(root @ g for root, g in zip(roots, self.lift.factors, strict=True))).norm()

    def _lift(self) -> tuple[Components, float]:
        """Axis by axis a lift of what is left of its data; then what is left of all."""
        data, jumps = [], []
        for i, space in enumerate(self.spaces):
            for n, given in enumerate(self.problem.data(space.axis)):
                terms = self.problem.separated(given)
                data.append((i, n, self.components(terms)))
                jumps += [(i, n, j, self._jump(j, terms, data[-1][2])) for j in self._periodic_axes()]
        lift = nothing = self.components(())
        scale = max([1e-300, *(self._size(i, self._rest(nothing, i, n, wanted)) for i, n, wanted in data)])
        for i, n, j, jump in jumps:
            if (size := self._size(i, self._rest(nothing, i, n, jump)) / scale) > COMPATIBLE:
                raise ValueError(
                    f"incompatible data: those of axis {self.spaces[i].axis.name!r} differ at both ends of the "
                    f"periodic axis {self.spaces[j].axis.name!r}, by {size:.2g} of their size; expected at most "
                    f"{COMPATIBLE:g}."
                )
        for i, space in enumerate(self.spaces):
            rests = [self._rest(lift, i, n, wanted) for j, n, wanted in data if j == i]
            for rest, function in zip(rests, space.lifts() if rests else (), strict=True):
                if self._size(i, rest) > ROUNDING * scale:
                    lift = lift + self._at(i, function, rest)
        worst, where = max(
            ((self._size(i, self._rest(lift, i, n, wanted)) / scale, i) for i, n, wanted in data), default=(0.0, 0)
        )
        if worst > COMPATIBLE:
            raise ValueError(
                f"incompatible data: the conditions on axis {self.spaces[where].axis.name!r} differ from those of the "
                f"other axes where they meet, by {worst:.2g} of the data's size; expected at most {COMPATIBLE:g}."
            )
        return lift, worst

    def _rest(self, lift: Components, i: int, n: int, wanted: Components) -> Components:
        """The data less what the lift takes in condition n of axis i; along that axis a factor of one number."""
        factors = list(lift.factors)
        factors[i] = self.spaces[i].conditions[n : n + 1] @ factors[i]
        given = list(wanted.factors)
        given[i] = _constant(self.spaces[i], given[i])
        return Components(tuple(given)) + -Components(tuple(factors))

    def _periodic_axes(self) -> list[int]:
        return [j for j, space in enumerate(self.spaces) if "periodic" in space.axis.ends]

    def _jump(self, j: int, terms: Sequence[Term], wanted: Components) -> Components:
        """What data differ by at both ends of axis j, as functions that are constant along it."""
        axis, factors = self.spaces[j].axis, list(wanted.factors)
        ends = torch.tensor([axis.low, axis.high], dtype=torch.float64)
        jumps = [
            term.operators.get(axis.name, Operator()).values(ends).diff() * (term.number if j == 0 else 1.0)
            for term in terms
        ]
        constant = self.spaces[j].data(Operator()).unsqueeze(-1)
        factors[j] = constant * torch.cat(jumps) if jumps else factors[j]
        return Components(tuple(factors))

    def _at(self, i: int, function: Tensor, rest: Components) -> Components:
        factors = list(rest.factors)
        factors[i] = function.unsqueeze(-1) * factors[i]
        return Components(tuple(factors))

    def _size(self, i: int, rest: Components) -> float:
        """The norm over the axes other than i, of components with a factor of one number along that."""
        total = rest.factors[i].mT @ rest.factors[i]
        for j, space in enumerate(self.spaces):
            if j != i:
                total = total * (rest.factors[j].mT @ space.gram(0) @ rest.factors[j])
        return total.sum().clamp(min=0).sqrt().item()


def _constant(space: Space, factors: Tensor) -> Tensor:
    """The value (1, rank) of functions that are constant along an axis."""
    middle = torch.tensor([(space.axis.low + space.axis.high) / 2], dtype=torch.float64)
    return space.basis.dense(middle) @ factors
