r"""The two ways to pose a discretised problem as a minimum: least squares of the residual, and Galerkin's energy.

Least squares, :math:`J(w) = \|L w - (f - L g)\|^2` in L2 over the box, take any linear equation. Galerkin's energy,
:math:`J(w) = a(w, w) - 2 \ell(w) + 2 a(g, w)` after an integration by parts, takes the symmetric coercive ones: it asks
for half the smoothness, and its condition number is the root of the other's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from sna_core.discretisation import Discretisation, Space
from sna_core.forms import Components, QuadraticForm
from sna_core.operators import Operator, Term

ROUNDING = 1e-12
POSITIVE = 1e-12  # smallest eigenvalue of Galerkin's form, as a fraction of its largest, that is more than rounding
SAME = 1e-12  # relative: matrices that differ by less are one


@dataclass(frozen=True)
class Residual:
    r"""The residual :math:`F - \sum_k \bigotimes_i L^{(i)}_{s_i(k)} w`, in orthonormal bases of what it can be.

    Attributes:
        operators: L, for each axis (num_operators, tests, dimension).
        index: s, (terms, num_axes).
        right: :math:`F = f - L g`.
        scale: The norm of the largest part of F: of the source, or of a term of the operator at g.
    """

    operators: tuple[Tensor, ...]
    index: Tensor
    right: Components
    scale: float

    @classmethod
    def of_equations(cls, form: QuadraticForm[Components]) -> Residual:
        """What is left of A w = b, for a form whose right-hand side is a sum of products; the largest is the scale."""
        first = form.coefficients[:, None, None] * form.matrices[0][form.index[:, 0]]
        index = form.index.clone()
        index[:, 0] = torch.arange(len(index))
        sizes = torch.stack([factor.norm(dim=0) for factor in form.right.factors]).prod(0)
        return cls((first, *form.matrices[1:]), index, form.right, sizes.amax().item() if len(sizes) else 1.0)

    def of_train(self, cores: Sequence[Tensor], order: Sequence[int]) -> float:
        """Its norm for a tensor train over the axes in some order, as a fraction of the scale.

        All parts together are a train, whose norm is that of its last core once those before are orthogonal: nothing
        is squared, and nothing cancels.
        """
        root = torch.ones(1, len(self.index) + self.right.rank, dtype=torch.float64)
        for position, (axis, core) in enumerate(zip(order, cores, strict=True)):
            operators, data = self.operators[axis], self.right.factors[axis]
            rank = core.shape[0]
            image = torch.einsum("utm,rms->urts", operators, core)[self.index[:, axis]]  # (terms, r, tests, s)
            if not position:
                image = -image
            before = root[:, : len(image) * rank].view(len(root), len(image), rank)
            grown = torch.einsum("qkr,krts->qtks", before, image).flatten(2)
            grown = torch.cat([grown, root[:, None, len(image) * rank :] * data], 2)  # (q, tests, terms * s + parts)
            if position == len(order) - 1:
                return grown.sum(2).norm().item() / self.scale
            root = torch.linalg.qr(grown.flatten(0, 1), mode="r")[1]
        raise AssertionError("a train has at least one core")


def least_squares(discretisation: Discretisation) -> tuple[QuadraticForm[Components], Residual]:
    """The squared residual as a form, and the residual itself.

    Raises:
        ValueError: If an axis's functions are not smooth enough for the residual to be square integrable.
    """
    residual = _residual(discretisation)
    rows, columns = (n.flatten() for n in torch.meshgrid(*[torch.arange(len(residual.index))] * 2, indexing="ij"))
    matrices, index, right = [], [], []
    for i, operators in enumerate(residual.operators):
        unique, number = _unique(torch.einsum("atm,btn->abmn", operators, operators).flatten(0, 1))
        number = number.view(len(operators), -1)[residual.index[rows, i], residual.index[columns, i]]
        used, number = number.unique(return_inverse=True)
        matrices.append(unique[used])
        index.append(number)
        right.append(torch.cat([operators[n].mT @ residual.right.factors[i] for n in residual.index[:, i]], 1))
    index, counts = torch.stack(index, 1).unique(dim=0, return_counts=True)
    constant = residual.right.norm() ** 2
    return QuadraticForm(tuple(matrices), index, counts.double(), Components(tuple(right)), constant), residual


def galerkin(discretisation: Discretisation) -> QuadraticForm[Components]:
    """The energy of a symmetric problem.

    Raises:
        ValueError: If the form is not symmetric or not positive, or an axis with second derivatives has a free end, at
            which integration by parts leaves something over.
    """
    matrices, index, lifted, source = [], [], [], []
    for i, space in enumerate(discretisation.spaces):
        weak = [_weak(space, operator) for operator in _operators(discretisation.terms, space)]
        weak = _weighted(discretisation.terms, weak, i)
        unique, number = _unique(torch.stack([space.trial.mT @ matrix @ space.trial for matrix in weak]))
        if (unique - unique.mT).abs().amax() > 1e-8 * unique.abs().amax():
            raise ValueError(
                f"the operator is not symmetric along axis {space.axis.name!r}; solve it by method='least_squares'."
            )
        matrices.append((unique + unique.mT) / 2)
        index.append(number)
        lifted.append(torch.cat([space.trial.mT @ matrix @ discretisation.lift.factors[i] for matrix in weak], 1))
        tests = (space.trial.mT @ space.basis.dense(space.points).mT) * space.weights
        source.append(tests @ _source(discretisation.source, space, i))
    lowest, highest = reduce(torch.add, [_ends_of_spectrum(matrices, term) for term in torch.stack(index, 1)])
    floor = _rounding(discretisation, matrices, torch.stack(index, 1))
    right = _unless_rounding(Components(tuple(source)) + -Components(tuple(lifted)), floor)
    index, counts = torch.stack(index, 1).unique(dim=0, return_counts=True)
    if not lowest > POSITIVE * highest:
        raise ValueError(
            "the form is not positive: its terms' smallest eigenvalues add up to "
            f"{lowest:.2g}; check the signs (-lap u = f), give an axis a 'dirichlet' end, or use "
            "method='least_squares'."
        )
    return QuadraticForm(tuple(matrices), index, counts.double(), right, 0.0)


def _ends_of_spectrum(matrices: Sequence[Tensor], term: Tensor) -> Tensor:
    """The ends (2,) of the spectrum of a product of matrices of one axis each: products of ends of their spectra."""
    ends = torch.ones(1, dtype=torch.float64)
    for stack, s in zip(matrices, term, strict=True):
        ends = torch.outer(ends, torch.linalg.eigvalsh(stack[s])[[0, -1]]).flatten().aminmax()
        ends = torch.stack(ends)
    return ends


def _operators(terms: Sequence[Term], space: Space) -> list[Operator]:
    """Of each term along an axis."""
    return [term.operators.get(space.axis.name, Operator()) for term in terms]


def _weighted(terms: Sequence[Term], matrices: Sequence[Tensor], axis: int) -> list[Tensor]:
    """Each term's coefficient belongs to its matrix along the first axis."""
    return [t.number * m if axis == 0 else m for t, m in zip(terms, matrices, strict=True)]


def _source(terms: Sequence[Term], space: Space, axis: int) -> Tensor:
    """Values of the source's functions at the quadrature points: (points, parts)."""
    values = [operator.values(space.points) for operator in _operators(terms, space)]
    none = space.points.new_zeros(len(space.points), 0)
    return torch.stack(_weighted(terms, values, axis), 1) if values else none


def _weak(space: Space, operator: Operator) -> Tensor:
    r"""The matrix of :math:`\int v A u`, of which second derivatives leave one derivative to v."""
    name, tests, sign = space.axis.name, space.basis.dense(space.points), 1.0
    at_ends = 0.0
    if operator.order == 2 and isinstance(operator.factors[0], int):
        if "free" in space.axis.ends:
            raise ValueError(f"axis {name!r} has a free end, at which integration by parts leaves a term over.")
        first, *rest = operator.factors
        operator, sign = Operator((*((1,) if first == 2 else ()), *rest)), -1.0
        tests = space.basis.dense(space.points, 1)
        ends = tests.new_tensor([space.axis.low, space.axis.high])
        outward = tests.new_tensor([-1.0, 1.0])
        at_ends = (space.basis.dense(ends).mT * outward) @ space.values(operator, ends)  # of Neumann data, in the lift
    elif operator.order:
        raise ValueError(
            f"the operator has {operator.describe(name)} along axis {name!r}; Galerkin's form takes second derivatives "
            "as derivative(2) or derivative(1) * multiply(a) * derivative(1). Use method='least_squares'."
        )
    return sign * (tests.mT * space.weights) @ space.values(operator) + at_ends


def _residual(discretisation: Discretisation) -> Residual:
    terms, source, lift = discretisation.terms, discretisation.source, discretisation.lift
    operators, index, parts = [], [], []
    for i, space in enumerate(discretisation.spaces):
        _check_smooth(space, max(operator.order for operator in _operators(terms, space)))
        root = space.weights.sqrt().unsqueeze(-1)
        values: dict[Operator, Tensor] = {}
        for operator in _operators(terms, space):
            if operator not in values:
                values[operator] = root * space.values(operator)
        data = root * _source(source, space, i)
        tests = _orthonormal([*values.values(), data])
        weighted = _weighted(terms, [tests.mT @ values[operator] for operator in _operators(terms, space)], i)
        unique, number = _unique(torch.stack(weighted))
        operators.append(unique @ space.trial)
        index.append(number)
        parts.append([tests.mT @ data, *(matrix @ lift.factors[i] for matrix in weighted)])
    signed = [[part if k == 0 or i else -part for k, part in enumerate(axis)] for i, axis in enumerate(parts)]
    own = 1 + discretisation.num_own_terms  # those of a linearisation cancel each other
    largest = max(Components(tuple(axis[k] for axis in signed)).norm() for k in range(own))
    index = torch.stack(index, 1)
    floor = _rounding(discretisation, operators, index)
    right = _unless_rounding(Components(tuple(torch.cat(axis, 1) for axis in signed)), floor)
    return Residual(tuple(operators), index, right, max(largest, floor) or 1.0)


def _rounding(discretisation: Discretisation, matrices: Sequence[Tensor], index: Tensor) -> float:
    """What a lift that solves the equation by itself may leave of it."""
    norms = [torch.linalg.matrix_norm(stack, 2)[index[:, i]] for i, stack in enumerate(matrices)]
    return ROUNDING * torch.stack(norms).prod(0).amax().item() * discretisation.lift_norm()


def _unless_rounding(right: Components, floor: float) -> Components:
    """A right-hand side; none where it is no more than rounding."""
    return right if right.norm() > floor else Components(tuple(factor[:, :0] for factor in right.factors))


def _check_smooth(space: Space, order: int) -> None:
    axis = space.axis
    if axis.degree is not None and order > axis.degree:
        raise ValueError(
            f"the residual has a derivative of order {order} along axis {axis.name!r}, which splines of degree "
            f"{axis.degree} do not carry; raise the degree to {order}, or use method='galerkin' if the problem is "
            "symmetric."
        )


def _orthonormal(blocks: Sequence[Tensor]) -> Tensor:
    """An orthonormal basis (points, tests) of all columns; each block counts alike, however small its values."""
    sizes = [block.norm() for block in blocks]
    scaled = torch.cat([block / size for block, size in zip(blocks, sizes, strict=True) if size > 0], 1)
    vectors, values, _ = torch.linalg.svd(scaled, full_matrices=False)
    return vectors[:, values > 1e-14 * values[0]]


def _unique(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Those that differ by more than rounding, and which of them each one is."""
    probe = torch.randn(matrices[0].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    marks, order = (matrices.flatten(1) @ probe).sort()
    size = matrices.flatten(1).norm(dim=1)[order]
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = marks.diff() > SAME * torch.minimum(size[1:], size[:-1])  # a second derivative dwarfs the identity
    number = torch.empty_like(order)
    number[order] = new.cumsum(0) - 1
    return matrices[order[new]], number
