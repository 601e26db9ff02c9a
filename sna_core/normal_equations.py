"""Normal equations of a CP network of splines: in the factors of one input, which are exact, and in all at once.

Shapes here: factors (num_inputs, num_basis, problems, rank), where a problem is an output or a restart of one, and
problem b has output ``b % num_outputs``; systems (problems, n, n) and right-hand sides (problems, n, 1), with
coefficients in the order (num_basis, rank) for one input and (num_inputs, num_basis, rank) for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sna_core.bspline import UniformBSpline
from sna_core.local_sum import check_points, local_sum
from sna_core.network import pairwise_product, products_of_others

DAMPING = 1e-2  # what a component pays for its own norm, beside that of f: components that cancel each other stay small


def smoothness_matrix(spline: UniformBSpline, smoothness: float) -> Tensor:
    r"""The matrix (num_basis, num_basis) of :math:`\int_0^1 \psi^2 + \theta ((\psi')^2 + (\psi'')^2) du`.

    u is the input scaled to [0, 1] and :math:`\theta` the smoothness. Derivatives above the degree are left out; degree
    0 has differences of neighbouring cells in their place.
    """
    unit = UniformBSpline(spline.num_cells, spline.degree)
    matrix = unit.gram()
    if spline.degree == 0:
        jumps = torch.eye(spline.num_basis, dtype=torch.float64).diff(dim=0)
        matrix = matrix + smoothness * spline.num_cells * jumps.mT @ jumps
    for order in range(1, min(spline.degree, 2) + 1):
        matrix = matrix + smoothness * unit.gram(order, order)
    return matrix


class Points:
    """Data on the CPU that are read in chunks, so that what is computed of them fits into ``max_memory`` bytes.

    Args:
        splines: One for each input.
        x: (points, num_inputs), in the box.
        y: (points, num_outputs).
        weight: (points,), not negative; None weighs all alike.
        max_memory: In bytes.

    Raises:
        ValueError: If shapes do not fit, a point is outside the box, or y or a weight is not finite.
    """

    def __init__(self, splines: Sequence[UniformBSpline], x: Tensor, y: Tensor, weight: Tensor | None, max_memory: int):
        if x.ndim != 2 or y.ndim != 2 or len(x) == 0 or len(y) != len(x):
            raise ValueError(
                f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; expected (points, {len(splines)}) and "
                "(points, num_outputs), at least one point."
            )
        if not x.is_floating_point() or not y.is_floating_point():
            raise ValueError(f"x is {x.dtype} and y is {y.dtype}; expected floating-point values.")
        check_points(x, splines, x.dtype)
        if not (finite := y.isfinite()).all():
            index = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"y{index} = {y[tuple(index)].item()} is not finite; drop the sample or fill in the value."
            )
        if weight is None:
            weight = x.new_ones(1).expand(len(x))
        elif weight.shape != x.shape[:1] or not (weight >= 0).all() or not 0 < weight.sum() < torch.inf:
            raise ValueError(f"sample_weight: expected {len(x)} finite values of at least 0, not all of them 0.")
        self.splines, self.max_memory = splines, max_memory
        self.x, self.y, self.weight = (t.detach().cpu() for t in (x, y, weight))
        self.weight_sum = self.weight.double().sum().item()
        self.power = self.weight.double() @ self.y.double().square()  # (num_outputs,)

    def on(self, splines: Sequence[UniformBSpline]) -> Points:
        """The same data for other splines on the same intervals."""
        other = copy(self)
        other.splines = splines
        return other

    def chunks(self, numel: int) -> list[Chunk]:
        """Chunks of which each point takes ``numel`` numbers in float64."""
        size = max(1, self.max_memory // (8 * numel))
        parts = [slice(start, start + size) for start in range(0, len(self.x), size)]
        return [Chunk(self.splines, self.x[part], self.y[part], self.weight[part]) for part in parts]

    def squares(self, factors: Tensor) -> Tensor:
        """Weighted sums of squared residuals (problems,)."""
        total = factors.new_zeros(factors.shape[2])
        for chunk in self.chunks(4 * factors[:, 0].numel()):
            values = pairwise_product(chunk.subatoms(factors)).sum(-1)
            total += chunk.weight.double() @ (values - chunk.targets(factors).mT).square()
        return total


@dataclass
class Chunk:
    """Some of the points, and what is kept of them from one block of factors to the next."""

    splines: Sequence[UniformBSpline]
    x: Tensor
    y: Tensor
    weight: Tensor
    kept: Tensor | None = None  # the sub-atoms of the factors as they are
    sorted: dict[int, tuple[Tensor, list[int], Tensor]] = field(default_factory=dict)

    def subatoms(self, factors: Tensor) -> Tensor:
        """(num_inputs, points, problems, rank)."""
        return local_sum(self.x.double(), factors, self.splines, check=False) if self.kept is None else self.kept

    def targets(self, factors: Tensor) -> Tensor:
        """The y of each problem: (problems, points)."""
        return self.y.double().mT.repeat(factors.shape[2] // self.y.shape[1], 1)

    def by_cell(self, i: int) -> tuple[Tensor, list[int], Tensor]:
        """The order of the points by their cell along input i, the number in each cell, and the functions there."""
        if i not in self.sorted:
            cell, values = self.splines[i].local(self.x[:, i].double(), check=False)
            order = cell.argsort(stable=True)
            found = order, cell.bincount(minlength=self.splines[i].num_cells).tolist(), values[order]
            if self.kept is None:
                return found
            self.sorted[i] = found
        return self.sorted[i]


def block_equations(chunks: Sequence[Chunk], factors: Tensor, i: int) -> tuple[Tensor, Tensor]:
    """The weighted normal equations of y in the factors of input i: matrix and right-hand side.

    Cell by cell, in which only degree + 1 functions are not zero.
    """
    _, n, problems, r = factors.shape
    gram, right = factors.new_zeros(problems, n, r, n, r), factors.new_zeros(problems, n, r)
    for chunk in chunks:
        order, counts, values = chunk.by_cell(i)
        subatoms = chunk.subatoms(factors)
        others = pairwise_product(torch.cat([subatoms[:i], subatoms[i + 1 :]])) if len(subatoms) > 1 else None
        product = values.new_ones(len(order), problems, r) if others is None else others
        product = product[order].movedim(1, 0)  # (problems, points, rank)
        targets = chunk.targets(factors)[:, order].unsqueeze(-1)
        weight = chunk.weight[order].double().unsqueeze(-1)
        start, width = 0, values.shape[-1]
        for cell, count in enumerate(counts):
            if not count:
                continue
            part, block = slice(start, start := start + count), slice(cell, cell + width)
            design = (values[part, :, None] * product[:, part, None]).flatten(2)  # (problems, count, width * rank)
            weighted = (design * weight[part]).mT
            gram[:, block, :, block] += (weighted @ design).view(-1, width, r, width, r)
            right[:, block] += (weighted @ targets[:, part]).view(-1, width, r)
    return gram.view(problems, n * r, n * r), right.view(problems, n * r, 1)


def tangent_equations(points: Points, factors: Tensor) -> tuple[Tensor, Tensor]:
    r"""The same in all factors at once, with J the derivative of f in them: :math:`J^T W J` and :math:`J^T W y`.

    f is homogeneous of degree d in the factors w, so that f = J w / d.
    """
    d, n, problems, r = factors.shape
    size = d * n * r
    gram, right = factors.new_zeros(problems, size, size), factors.new_zeros(problems, size, 1)
    for chunk in points.chunks(4 * problems * size):
        jacobian = tangent(chunk, factors)
        weighted = (jacobian * chunk.weight.double().unsqueeze(-1)).mT
        gram += weighted @ jacobian
        right += weighted @ chunk.targets(factors).unsqueeze(-1)
    return gram, right


def tangent(chunk: Chunk, factors: Tensor) -> Tensor:
    """The derivative of f in all factors: (problems, points, num_inputs * num_basis * rank)."""
    basis = torch.stack([s.dense(chunk.x[:, i].double(), check=False) for i, s in enumerate(chunk.splines)])
    others = products_of_others(chunk.subatoms(factors))
    by_input = basis[:, :, None, :, None] * others[:, :, :, None]  # (num_inputs, points, problems, num_basis, rank)
    return by_input.permute(2, 1, 0, 3, 4).flatten(2)


def inner_products(factors: Tensor, norm: Tensor) -> Tensor:
    """Of the sub-atoms along each input: (num_inputs, problems, rank, rank)."""
    by_problem = factors.permute(0, 2, 3, 1)  # (num_inputs, problems, rank, num_basis)
    return by_problem @ norm @ by_problem.mT


def block_penalty(factors: Tensor, norm: Tensor, i: int) -> Tensor:
    r"""The matrix of the squared norm of f in the factors of input i."""
    others = _damped(products_of_others(inner_products(factors, norm))[i])
    return torch.einsum("nm,brs->bnrms", norm, others).flatten(3, 4).flatten(1, 2)


def tangent_penalty(factors: Tensor, norm: Tensor) -> Tensor:
    r"""The matrix H of the inner product of the tangents of f, for which the squared norm of f is w^T H w / d^2."""
    d, n, problems, r = factors.shape
    inner = inner_products(factors, norm)
    same = torch.eye(d, dtype=torch.bool)[:, :, None, None, None]
    others = _damped(
        products_of_others(torch.where(same, torch.ones_like(inner), inner), dim=1)
    )  # (d, d, problems, r, r)
    along = (norm @ factors.flatten(2)).view_as(factors)  # each sub-atom's inner products with the basis
    # Row (i, n, r), column (k, m, s): the tangent of component r in input i and that of component s in input k.
    matrix = torch.einsum("inbs,kmbr,ikbrs->binrkms", along, along, others)
    for i in range(d):
        matrix[:, i, :, :, i] = torch.einsum("nm,brs->bnrms", norm, others[i, i])
    return matrix.reshape(problems, d * n * r, d * n * r)


def _damped(products: Tensor) -> Tensor:
    diagonal = products.diagonal(dim1=-2, dim2=-1)
    diagonal *= 1 + DAMPING
    return products


def flat(factors: Tensor) -> Tensor:
    """Factors as columns of coefficients: (problems, num_inputs * num_basis * rank, 1)."""
    return factors.permute(2, 0, 1, 3).flatten(1).unsqueeze(-1)


def unflat(columns: Tensor, factors: Tensor) -> Tensor:
    """The inverse of :func:`flat`, in the shape of ``factors``."""
    d, n, problems, r = factors.shape
    return columns.view(problems, d, n, r).permute(1, 2, 0, 3)


def size_directions(factors: Tensor) -> Tensor:
    """Orthonormal directions in which one factor of a component grows as another shrinks, and f stays as it is.

    (problems, num_inputs * num_basis * rank, (num_inputs - 1) * rank); zero for components that are zero.
    """
    num_inputs, _, problems, rank = factors.shape
    by_input = factors.permute(2, 0, 1, 3)  # (problems, num_inputs, num_basis, rank)
    # Column (k, r): the factors of component r along input k.
    columns = torch.einsum("bins,ik,sr->binskr", by_input, torch.eye(num_inputs).double(), torch.eye(rank).double())
    differences = columns[..., :-1, :] - columns[..., -1:, :]
    columns = differences.reshape(problems, num_inputs * factors.shape[1] * rank, (num_inputs - 1) * rank)
    lengths = columns.norm(dim=1, keepdim=True)
    left, values, _ = torch.linalg.svd(columns / torch.where(lengths > 0, lengths, 1.0), full_matrices=False)
    return left * (values > 1e-8).unsqueeze(1)
