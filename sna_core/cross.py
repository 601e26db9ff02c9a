r"""Functions of several variables as sums of separable terms, from few of their values: cross approximation.

.. math::
    f(x_1, \dots, x_d) \approx \sum_{r=1}^{R} \prod_{i=1}^{d} g_i^r(x_i)

with polynomials :math:`g_i^r` given by their values at Chebyshev-Lobatto nodes. In steps:

1. Nodes are doubled along each axis until polynomials through them resolve f on lines through the box (as in Aurentz
   and Trefethen, ACM Trans. Math. Softw. 43 (2017)).
2. On the grid of nodes, which is never formed, f is interpolated as a tensor train from its values on crosses
   (Oseledets and Tyrtyshnikov, Linear Algebra Appl. 432 (2010)). Points at which the train is most wrong join the
   crosses, until none is wrong by more than the tolerance (as in Dolgov and Savostyanov, Comput. Phys. Commun. 246
   (2020)).
3. The train is rounded and written out as a sum of terms, of which there are as many as its rank for two variables;
   for three and more, fewer are fitted to it (:mod:`sna_core.compression`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite, pi

import torch
from torch import Tensor

from sna_core.bspline import check_inside
from sna_core.compression import Samples, chain, terms_of_train
from sna_core.network import by_blocks, check_counts, pairwise_product
from sna_core.spectral import ChebyshevBasis
from sna_core.tensor_train import Train

FIRST_NODES = 9
NUM_LINES = 16  # through random points, and as many through the largest values: on these the nodes are chosen
NUM_PROBES = 16  # points of each line, between the nodes
NUM_SAMPLES = 4096  # random points of the box, and as many near pivots, that decide which sum is accurate enough
NEAREST = 0.1  # spread of those that are nearest to a pivot, in widths of the box; of the others it reaches to 1
BLOCK = 2**18  # points in one call of the function
MAX_BLOCK = 2**24  # values of a cross along one axis
MAX_SWEEPS = 40  # an even number: the last is along the axes backwards
LEAST_GROWTH = 4  # points that join the crosses after a sweep; half the rank, where that is more
RESOLVED = 0.05  # of the tolerance: what nodes and crosses may leave
MARGIN = 0.5  # of the tolerance: at other points the largest error will be somewhat larger
NUM_CHECKS = 3  # rounds in which the points of a check that failed join the samples
LEAST_TOLERANCE = 1e-12
REMEDIES = "raise max_rank, max_nodes or tolerance, or split the box at a kink or a jump"


@dataclass(frozen=True)
class SeparableSum:
    r"""The sum :math:`\sum_r \prod_i g_i^r(x_i)` in float64, made by :func:`separate`.

    Attributes:
        low: Left end of each axis's interval.
        high: Right ends.
        factors: For each axis the values of its functions at :func:`chebyshev_nodes`, (num_nodes_i, rank). Terms are in
            the order of their size; the functions of a term have equal norms.
        error: Largest error at random points that had no part in making the sum (in the box, at its faces and where f
            changes fast), relative to the largest value of f that was seen.
        tolerance: What was asked for.
        num_evaluations: Number of points at which f was computed.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    factors: tuple[Tensor, ...]
    error: float
    tolerance: float
    num_evaluations: int

    @property
    def rank(self) -> int:
        """Number of terms."""
        return self.factors[0].shape[1]

    @cached_property
    def _bases(self) -> tuple[ChebyshevBasis, ...]:
        sizes = [len(factor) for factor in self.factors]
        return tuple(ChebyshevBasis(*basis) for basis in zip(sizes, self.low, self.high, strict=True))

    @cached_property
    def _coefficients(self) -> tuple[Tensor, ...]:
        return tuple(chebyshev_coefficients(factor) for factor in self.factors)

    def functions(self, i: int, x: Tensor) -> Tensor:
        """The functions of axis i, one for each term: (n,) -> (n, rank), differentiable in x any number of times.

        Raises:
            ValueError: If there is no axis i, or a point is NaN or outside its interval.
        """
        _check_index("axis", i, len(self.factors))
        check_inside(x, self.low[i], self.high[i])
        return self._functions(i, x.double(), self._coefficients[i])

    def component(self, r: int, i: int) -> Callable[[Tensor], Tensor]:
        """The function of term r along axis i, which maps (n,) to (n,) and is differentiable.

        Raises:
            ValueError: If there is no such term or axis; the function: if a point is NaN or outside its interval.
        """
        _check_index("term", r, self.rank)
        _check_index("axis", i, len(self.factors))
        column = self._coefficients[i][:, r : r + 1]

        def function(x: Tensor) -> Tensor:
            check_inside(x, self.low[i], self.high[i])
            return self._functions(i, x.double(), column).squeeze(-1)

        return function

    def _functions(self, i: int, x: Tensor, coefficients: Tensor) -> Tensor:
        basis = self._bases[i]

        def values(x: Tensor) -> Tensor:
            return basis.dense(x.squeeze(-1), check=False) @ coefficients

        return by_blocks(values, x.unsqueeze(-1), basis.num_basis)

    def __call__(self, points: Tensor) -> Tensor:
        """The sum: (..., d) -> (...), differentiable.

        Raises:
            ValueError: If the points have another number of columns, or one is NaN or outside the box.
        """
        d = len(self.factors)
        if points.shape[-1:] != (d,):
            raise ValueError(f"points have shape {tuple(points.shape)}; expected (..., {d}), a column for each axis.")
        points = points.double()
        check_inside(points, points.new_tensor(self.low), points.new_tensor(self.high), d)
        columns = enumerate(points.unbind(-1))
        return pairwise_product(torch.stack([self._functions(i, x, self._coefficients[i]) for i, x in columns])).sum(-1)


def chebyshev_nodes(num_nodes: int, low: float, high: float) -> Tensor:
    """The Chebyshev-Lobatto nodes (num_nodes,) of an interval in ascending order, both ends among them."""
    t = (pi * torch.linspace(-0.5, 0.5, num_nodes, dtype=torch.float64)).sin()  # symmetric to rounding
    return ((1 + t) * high + (1 - t) * low) / 2


def chebyshev_coefficients(values: Tensor) -> Tensor:
    """Coefficients of T_0, T_1, ... from values at :func:`chebyshev_nodes`, along the first dimension."""
    n = len(values) - 1
    k = torch.arange(n + 1)
    ends = torch.ones(n + 1, dtype=torch.float64)
    ends[[0, -1]] = 0.5
    cosine = (pi / n * (k.unsqueeze(-1) * (n - k) % (2 * n)).double()).cos()
    return (2 / n * ends.unsqueeze(-1) * ends * cosine) @ values


def separate(
    function: Callable[..., Tensor],
    low: Sequence[float],
    high: Sequence[float],
    *,
    tolerance: float = 1e-8,
    max_rank: int = 200,
    max_nodes: int = 1025,
    generator: torch.Generator | None = None,
) -> SeparableSum:
    r"""Compresses a function of d variables on a box to a sum of separable terms.

    The largest error at random points is at most ``tolerance`` times the largest \|f\| that was seen. Smooth functions
    need few terms; what turns on in a small part of the box may be missed, as by any method that samples.

    Args:
        function: Takes d tensors (n,) in float64, the coordinates of n points; returns the values (n,).
        low: Left end of each axis's interval.
        high: Right ends.
        tolerance: Relative to the largest \|f\|.
        max_rank: At most so many terms, and so large ranks on the way.
        max_nodes: At most so many nodes along an axis.
        generator: Of the random points; None draws the same ones each time.

    Raises:
        ValueError: If the tolerance was not reached (the message has the error, the rank and what to do), f is not
            finite at a point, returns another shape, or an option is out of its range.
    """
    low, high = tuple(map(float, low)), tuple(map(float, high))
    _check_options(low, high, tolerance, max_rank, max_nodes)
    f = _Watched(function, low, high, torch.Generator().manual_seed(0) if generator is None else generator)
    points = f.random_points()
    values = f(points)
    if f.largest == 0:
        zeros = tuple(torch.zeros(2, 1, dtype=torch.float64) for _ in low)
        return SeparableSum(low, high, zeros, 0.0, tolerance, f.num_evaluations)

    centers = torch.cat([points[values.abs().topk(NUM_LINES).indices], points[:NUM_LINES]])
    sizes = _resolve(f, [min(FIRST_NODES, max_nodes)] * len(low), centers, tolerance, max_nodes)
    for _ in range(NUM_CHECKS):
        grid = _Grid(f, tuple(chebyshev_nodes(*axis) for axis in zip(sizes, low, high, strict=True)))
        cores, pivots = _cross(grid, centers, tolerance, max_rank)
        points, largest = f.random_points(pivots), f.largest
        # Entries in units of the largest value, with weights that make sums of squares mean squares.
        scales = [_root_weights(n) / largest ** (1 / len(low)) for n in sizes]
        train = Train(tuple(core * scale.unsqueeze(-1) for core, scale in zip(cores, scales, strict=True)))
        samples = Samples(_tables(f, scales, points), f(points))
        worst = samples.train_errors(train).topk(NUM_LINES).indices
        centers = torch.cat([pivots, points[worst]])
        finer = _resolve(f, sizes, centers, tolerance, max_nodes)
        if finer == sizes:
            break
        sizes = finer

    factors, goal = None, MARGIN * tolerance * largest
    for _ in range(NUM_CHECKS):
        factors = terms_of_train(
            train, samples, tolerance=tolerance, goal=goal, max_rank=max_rank, start=factors, generator=f.generator
        )
        points, num_terms = f.random_points(pivots), factors[0].shape[1]
        fresh = Samples(_tables(f, scales, points), f(points))
        error = fresh.error(factors) / largest
        if error <= tolerance:
            factors = tuple(factor / scale.unsqueeze(-1) for factor, scale in zip(factors, scales, strict=True))
            return SeparableSum(low, high, factors, error, tolerance, f.num_evaluations)
        samples = samples.joined(fresh)
    raise ValueError(
        f"{num_terms} terms are off by {error:.1e} of the largest value, beyond the tolerance "
        f"{tolerance:g}; {REMEDIES}."
    )


def _root_weights(num_nodes: int) -> Tensor:
    """Square roots of the weights (num_nodes,) of Gauss-Chebyshev-Lobatto quadrature, which sum to one."""
    weights = torch.full((num_nodes,), 1 / (num_nodes - 1), dtype=torch.float64)
    weights[[0, -1]] /= 2
    return weights.sqrt()


def _tables(f: _Watched, scales: Sequence[Tensor], points: Tensor) -> list[Tensor]:
    """For each axis what maps values at the nodes, times the scale, to values at the points: (points, num_nodes)."""
    axes = zip(scales, f.low.tolist(), f.high.tolist(), points.unbind(-1), strict=True)
    return [
        ChebyshevBasis(len(scale), low, high).dense(x) @ chebyshev_coefficients((1 / scale).diag())
        for scale, low, high, x in axes
    ]


def _check_index(what: str, index: int, number: int) -> None:
    if not isinstance(index, int) or not 0 <= index < number:
        raise ValueError(f"{what} {index!r} does not exist; expected an integer from 0 to {number - 1}.")


def _check_options(
    low: tuple[float, ...], high: tuple[float, ...], tolerance: float, max_rank: int, max_nodes: int
) -> None:
    check_counts(max_rank=max_rank, max_nodes=max_nodes)
    if max_nodes < 2:
        raise ValueError(f"max_nodes = {max_nodes}; expected at least 2, the ends of the interval.")
    if not low or len(low) != len(high):
        raise ValueError(f"low has {len(low)} values and high {len(high)}; give one of each for every axis.")
    for i, (left, right) in enumerate(zip(low, high, strict=True)):
        if not (isfinite(left) and isfinite(right) and left < right):
            raise ValueError(f"axis {i}: [low, high] = [{left}, {right}]; expected finite ends with low < high.")
    if not LEAST_TOLERANCE <= tolerance < 1:
        raise ValueError(f"tolerance = {tolerance}; expected a number from {LEAST_TOLERANCE:g} to 1.")


class _Watched:
    """A function of d variables whose every value is checked and counted."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        low: Sequence[float],
        high: Sequence[float],
        generator: torch.Generator,
    ):
        self.function, self.generator = function, generator
        self.low, self.high = (torch.tensor(ends, dtype=torch.float64) for ends in (low, high))
        self.num_evaluations, self.largest = 0, 0.0

    def random_points(self, centers: Tensor | None = None) -> Tensor:
        """(NUM_SAMPLES, d): a half uniform in the box, the others denser at its faces; and as many near the centers.

        At faces and where f changes fast errors are largest.
        """
        unit = torch.rand(NUM_SAMPLES, len(self.low), dtype=torch.float64, generator=self.generator)
        unit[::2] = (pi / 2 * unit[::2]).sin().square()
        points = self.low + (self.high - self.low) * unit
        if centers is None:
            return points
        chosen = torch.randint(len(centers), (NUM_SAMPLES,), generator=self.generator)
        distance = NEAREST ** torch.rand(NUM_SAMPLES, 1, dtype=torch.float64, generator=self.generator)
        away = torch.randn(points.shape, dtype=torch.float64, generator=self.generator) * distance
        near = (centers[chosen] + (self.high - self.low) * away).clamp(self.low, self.high)
        return torch.cat([points, near])

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """(..., d) -> (...)."""
        parts = [self._values(part) for part in points.reshape(-1, len(self.low)).split(BLOCK)]
        return torch.cat(parts).view(points.shape[:-1])

    def _values(self, points: Tensor) -> Tensor:
        values = self.function(*points.mT.contiguous().unbind())
        if not isinstance(values, Tensor) or values.shape != points.shape[:1] or values.is_complex():
            found = f"{values.dtype} {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"the function returned {found} for {points.shape[1]} tensors of shape ({len(points)},); expected a "
                "real tensor of that shape, a value for each point."
            )
        values = values.to("cpu", torch.float64)
        if not (finite := values.isfinite()).all():
            worst = int((~finite).nonzero()[0])
            at = ", ".join(f"{x:.9g}" for x in points[worst].tolist())
            raise ValueError(
                f"the function is {values[worst].item()} at ({at}); move the box away from the singularity, or give "
                "the limit there."
            )
        self.num_evaluations += len(points)
        self.largest = max(self.largest, values.abs().max().item())
        return values


def _resolve(f: _Watched, sizes: Sequence[int], centers: Tensor, tolerance: float, max_nodes: int) -> list[int]:
    """Numbers of nodes, at least ``sizes``, that resolve f on the lines through ``centers`` along each axis.

    The first half of the centers move to the largest values on their lines, where the function is least like elsewhere.
    """
    centers, sizes = centers.clone(), list(sizes)
    for i, (low, high) in enumerate(zip(f.low.tolist(), f.high.tolist(), strict=True)):
        at_centers = f(centers)
        probes = low + (high - low) * torch.rand(NUM_PROBES, dtype=torch.float64, generator=f.generator)
        at_probes = f(_lines(centers, i, probes))  # (centers, probes)
        while True:
            nodes, basis = chebyshev_nodes(sizes[i], low, high), ChebyshevBasis(sizes[i], low, high)
            values = f(_lines(centers, i, nodes))
            coefficients = chebyshev_coefficients(values.mT)
            errors = [basis.dense(probes) @ coefficients - at_probes.mT]
            errors.append((basis.dense(centers[:, i]) * coefficients.mT).sum(-1) - at_centers)
            error = max(e.abs().max().item() for e in errors)
            tail = coefficients[3 * len(nodes) // 4 :].abs().max().item()
            if max(error, tail) <= RESOLVED * tolerance * f.largest:
                break
            if sizes[i] == max_nodes:
                if error <= tolerance * f.largest:
                    break
                raise ValueError(
                    f"along axis {i} the function is off by {error / f.largest:.1e} of its largest value on "
                    f"{max_nodes} nodes, beyond the tolerance {tolerance:g}; split the box at a kink or a jump, or "
                    "raise max_nodes or tolerance."
                )
            sizes[i] = min(2 * sizes[i] - 1, max_nodes)
        moving = len(centers) // 2
        centers[:moving, i] = nodes[values[:moving].abs().argmax(1)]
    return sizes


def _lines(centers: Tensor, i: int, x: Tensor) -> Tensor:
    """Points (centers, len(x), d) on the lines along axis i."""
    points = centers.unsqueeze(1).repeat(1, len(x), 1)
    points[..., i] = x
    return points


@dataclass(frozen=True)
class _Grid:
    """The function on a tensor grid, by indices of nodes."""

    f: _Watched
    nodes: tuple[Tensor, ...]
    is_flipped: bool = False  # whether the axes are counted from the last

    def points(self, indices: Tensor) -> Tensor:
        """Indices (..., d) as points (..., d), in the order of the function's arguments."""
        columns = [nodes[index] for nodes, index in zip(self.nodes, indices.unbind(-1), strict=True)]
        return torch.stack(columns[::-1] if self.is_flipped else columns, -1)

    def block(self, heads: Tensor, tails: Tensor) -> Tensor:
        """Values (r, n, c) for indices (r, k) of the axes before k, all nodes of axis k and indices of the axes behind.

        Raises:
            ValueError: If there are more than MAX_BLOCK.
        """
        k, n, c = heads.shape[1], len(self.nodes[heads.shape[1]]), len(tails)
        if len(heads) * n * c > MAX_BLOCK:
            raise ValueError(
                f"a cross of ranks {len(heads)} and {c} on {n} nodes does not fit into memory; raise tolerance, lower "
                "max_rank or max_nodes, or make the box smaller."
            )
        inner = torch.arange(n).view(1, n, 1, 1)

        def values(part: Tensor) -> Tensor:
            r = len(part)
            parts = [part.view(r, 1, 1, k), inner, tails.view(1, 1, c, -1)]
            return self.f(self.points(torch.cat([p.expand(r, n, c, p.shape[-1]) for p in parts], -1)))

        return torch.cat([values(part) for part in heads.split(max(1, BLOCK // (n * c)))])

    def flipped(self) -> _Grid:
        """The same with the axes in the opposite order."""
        return _Grid(self.f, self.nodes[::-1], not self.is_flipped)


def _cross(grid: _Grid, centers: Tensor, tolerance: float, max_rank: int) -> tuple[list[Tensor], Tensor]:
    """The train that interpolates f on the grid, a core (r, n, r') for each axis, and the points (p, d) of pivots."""
    d = len(grid.nodes)
    nearest = [(x.unsqueeze(-1) - nodes).abs().argmin(-1) for x, nodes in zip(centers.mT, grid.nodes, strict=True)]
    tails = [torch.stack(nearest[k:], -1).unique(dim=0) for k in range(1, d)]
    pivots, goal = [centers], RESOLVED * tolerance
    for _ in range(MAX_SWEEPS):
        cores, heads = _sweep(grid, tails, goal, max_rank)
        error, worst = _worst(grid, cores, goal)
        rank = max(core.shape[-1] for core in cores)
        pivots.append(grid.points(worst))
        grid, cores = grid.flipped(), [core.permute(2, 1, 0) for core in cores[::-1]]
        if not grid.is_flipped and (error <= goal or rank == max_rank):
            break
        added = [worst[:, :k] for k in range(1, d)]
        tails = [torch.cat(pair).flip(-1).unique(dim=0) for pair in zip(heads, added, strict=True)][::-1]
    if error > tolerance:
        raise ValueError(
            f"a tensor train of rank {rank} is off by {error:.1e} of the largest value, beyond the tolerance "
            f"{tolerance:g}; {REMEDIES}."
        )
    return cores, torch.cat(pivots)


def _worst(grid: _Grid, cores: Sequence[Tensor], goal: float) -> tuple[float, Tensor]:
    """The largest error of a train at random nodes, in units of f's largest, and indices (p, d) of the worst of all."""
    number, generator = NUM_SAMPLES // 2, grid.f.generator
    samples = [torch.randint(len(nodes), (number,), generator=generator) for nodes in grid.nodes]
    found = chain([core[:, index] for core, index in zip(cores, samples, strict=True)])
    samples = torch.stack(samples, -1)
    errors = (grid.f(grid.points(samples)) - found).abs() / grid.f.largest
    rank = max(core.shape[-1] for core in cores)
    largest, order = errors.topk(min(number, max(LEAST_GROWTH, rank // 2)))
    return largest[0].item(), samples[order[largest > goal]]


def _sweep(grid: _Grid, tails: Sequence[Tensor], goal: float, max_rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """From the first axis to the last; ``tails`` holds indices (c, d - k) of the axes from k on, for k = 1, 2, ...

    Returns:
        The cores, and indices (r, k) of the axes before k at which the train is exact, for k = 1, 2, ...
    """
    nothing = torch.zeros(1, 0, dtype=torch.long)
    cores, heads = [], [nothing]
    for tail in tails:
        block = grid.block(heads[-1], tail)
        r, n, _ = block.shape
        left, sizes, _ = torch.linalg.svd(block.flatten(0, 1), full_matrices=False)
        rank = min(max_rank, max(1, int((sizes > goal * grid.f.largest).sum())))
        rows, core = _maximal_rows(left[:, :rank])
        cores.append(core.view(r, n, rank))
        heads.append(torch.cat([heads[-1][rows // n], (rows % n).unsqueeze(-1)], 1))
    return [*cores, grid.block(heads[-1], nothing)], heads[1:]


def _maximal_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows I of an orthonormal matrix Q with a large determinant, and Q Q[I]^-1, whose entries are hardly above one.

    Gaussian elimination, then swaps (Goreinov et al., How to find a good submatrix, 2010).
    """
    _, swaps = torch.linalg.lu_factor(matrix)
    order = torch.arange(len(matrix))
    for i, j in enumerate((swaps - 1).tolist()):
        order[[i, j]] = order[[j, i]]
    rows = order[: matrix.shape[1]]
    for _ in range(100):
        quotient = torch.linalg.solve(matrix[rows], matrix, left=False)
        row, column = divmod(quotient.abs().argmax().item(), matrix.shape[1])
        if quotient[row, column].abs() <= 1.1:
            break
        rows[column] = row
    return rows, quotient
