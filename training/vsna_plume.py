r"""A rotating plume in a box with cold walls: the six-dimensional reference of `training.vsna`.

.. math:: u_t + U \cdot \nabla u - D \Delta u = 0, \quad U = \omega\, (1/2 - y,\ x - 1/2,\ 0), \quad
          u(t = 0) = \exp(-|r - r_0|^2 / 2 s_0^2),

on the unit cube with u = 0 on its faces, for times, rates of rotation and diffusivities in ``PLUME_BOX``. The width
and the centre are ours (arXiv 2603.12244 gives none). The solution of free space is no reference: the walls matter.

The flow lies in the planes of constant z and the Gaussian is a product, so that u = v(x, y) w(z); w is a sum of sines
that decay. In time divided by t, v_s = -omega t R v + D t Laplace v for s in [0, 1], with R the advection of a unit
rate: v depends on the angle omega t and the spread D t alone. It is solved at the Gauss-Legendre nodes of these two by
a Legendre-Galerkin method and interpolated between them.
"""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from sna_core.bspline import check_inside, gauss_legendre
from sna_core.spectral import LegendreBasis

PLUME_WIDTH = 0.07
PLUME_CENTRE = (0.5, 0.65, 0.5)
PLUME_BOX = {
    **dict.fromkeys("xyz", (0.0, 1.0)),
    "t": (0.0, 1.0),
    "omega": (0.0, math.pi / 3),
    "D": (0.001, 0.01),
}
NUM_SINES = 40  # of a Gaussian this wide the next is below rounding
NUM_QUADRATURE = 200  # points for its coefficients
MAX_BLOCK = 1 << 21  # numbers in the largest array of a call

Rule = tuple[Tensor, Tensor]


def gauss_rule(num_points: int, low: float = 0.0, high: float = 1.0) -> Rule:
    """Gauss-Legendre points and weights (num_points,) on [low, high]."""
    nodes, weights = gauss_legendre(num_points)
    return low + (high - low) * (nodes + 1) / 2, (high - low) / 2 * weights


def plume_profile(x: Tensor, axis: int) -> Tensor:
    r"""The initial field's factor :math:`\exp(-(x - c)^2 / 2 s_0^2)` along axis 0, 1 or 2: (...) -> (...)."""
    return (-((x - PLUME_CENTRE[axis]) ** 2) / (2 * PLUME_WIDTH**2)).exp()


# ---------------------------------------------------------------------------------------------------------- the solver


def wall_functions(x: Tensor, num_modes: int, derivative: int = 0) -> Tensor:
    r"""Polynomials that vanish at 0 and 1, :math:`(P_k - P_{k+2}) / \sqrt{8 k + 12}`: (N,) -> (N, num_modes).

    Their derivatives are orthonormal on [0, 1]. J. Shen, SIAM J. Sci. Comput. 15 (1994), section 2.
    """
    legendre = LegendreBasis(num_modes + 2).dense(x, derivative)
    return (legendre[:, :-2] - legendre[:, 2:]) / (8 * torch.arange(num_modes, dtype=x.dtype) + 12).sqrt()


def _adams_weights(exponent: Tensor) -> list[Tensor]:
    r"""Weights of the three last slopes in a step of the exponential Adams-Bashforth method of order 3.

    :math:`\int_0^1 e^{z (1 - s)} \ell_j(s)\, ds` for the Lagrange polynomials of the nodes 0, -1, -2: M. Calvo and
    C. Palencia, Numer. Math. 102 (2006). As the stiff part is exact and the slopes are those of accurate values, walls
    do not lower its order, as they do that of Runge-Kutta methods with an integrating factor.
    """
    s, weights = gauss_rule(40)
    lagrange = ((s + 1) * (s + 2) / 2, -s * (s + 2), s * (s + 1) / 2)
    results = [torch.zeros_like(exponent) for _ in lagrange]
    for q, (point, weight) in enumerate(zip(s.tolist(), weights.tolist(), strict=True)):
        kernel = weight * (exponent * (1 - point)).exp()
        for result, polynomial in zip(results, lagrange, strict=True):
            result.add_(kernel, alpha=polynomial[q].item())
    return results


class _Galerkin:
    """The equation for v in products of functions of x and y that are orthonormal and diagonalise the diffusion.

    A state is (num_modes of x, spreads, num_modes of y), which makes the rotation four products of matrices.
    """

    def __init__(self, num_modes: int):
        x, weights = gauss_rule(num_modes + NUM_QUADRATURE)
        values, slopes = (wall_functions(x, num_modes, derivative) for derivative in (0, 1))
        mass = values.mT @ (weights[:, None] * values)
        lengths, vectors = torch.linalg.eigh(mass)  # the stiffness matrix is the identity
        self.to_functions = vectors / lengths.sqrt()
        values, slopes = values @ self.to_functions, slopes @ self.to_functions
        self.num_modes = num_modes
        self.decay = 1 / lengths[:, None, None] + 1 / lengths
        self.slope = values.mT @ (weights[:, None] * slopes)
        self.position = values.mT @ ((weights * (x - 0.5))[:, None] * values)
        first, second = (values.mT @ (weights * plume_profile(x, axis)) for axis in (0, 1))
        self.initial = first[:, None, None] * second

    def rotation(self, state: Tensor) -> Tensor:
        """The change of a state for a unit of angle: (y - 1/2) v_x - (x - 1/2) v_y, in the functions."""
        rows = state.view(self.num_modes, -1)
        slopes, positions = ((m @ rows).view(-1, self.num_modes) for m in (self.slope, self.position))
        return torch.addmm(slopes @ self.position, positions, self.slope).view_as(state)

    def solve(self, angle: float, spreads: Tensor, num_steps: int) -> Tensor:
        """Coefficients of v in the wall functions at one angle: (spreads, num_modes, num_modes)."""
        step = 1 / num_steps
        exponent = -step * spreads[:, None] * self.decay
        state = self.initial.expand_as(exponent).contiguous()
        slopes = [step * angle * self.rotation(state)]
        for _ in range(2):
            state = self._start(state, step * angle, exponent)
            slopes.insert(0, step * angle * self.rotation(state))
        weights, factor = _adams_weights(exponent), exponent.exp()
        for _ in range(num_steps - 2):
            state = factor * state
            for weight, slope in zip(weights, slopes, strict=True):
                state.addcmul_(weight, slope)
            slopes = [step * angle * self.rotation(state), *slopes[:2]]
        if not (energy := state.square().sum()) <= len(spreads) * self.initial.square().sum():
            raise ValueError(
                f"num_steps = {num_steps} is too few for {self.num_modes} functions: the field grew to an energy of "
                f"{energy:g}. Raise num_steps."
            )
        return torch.einsum("ki,isj,lj->skl", self.to_functions, state, self.to_functions)

    def _start(self, state: Tensor, angle: float, exponent: Tensor, num_parts: int = 8) -> Tensor:
        """One step of the Adams method by parts, each one of Runge and Kutta with an integrating factor."""
        half, angle = (exponent / (2 * num_parts)).exp(), angle / num_parts
        whole = half**2
        for _ in range(num_parts):
            first = angle * self.rotation(state)
            second = angle * self.rotation(half * (state + first / 2))
            third = angle * self.rotation(half * state + second / 2)
            fourth = angle * self.rotation(whole * state + half * third)
            state = whole * (state + first / 6) + half * (second + third) / 3 + fourth / 6
        return state


def solve_plume(
    num_modes: int = 52, *, num_angles: int = 14, num_spreads: int = 20, num_steps: int = 1000
) -> "PlumeReference":
    """Solves the plume for all times, rates of rotation and diffusivities. Takes seconds.

    Args:
        num_modes: Polynomials along x and along y.
        num_angles: Gauss-Legendre nodes of the angle of rotation omega t.
        num_spreads: Those of the spread D t.
        num_steps: Steps in time at the largest angle; smaller ones take fewer, down to a tenth.

    Raises:
        ValueError: If a number is below 1, or the steps are too few for so many polynomials.
    """
    sizes = {"num_modes": num_modes, "num_angles": num_angles, "num_spreads": num_spreads, "num_steps": num_steps}
    for name, size in sizes.items():
        least = 30 if name == "num_steps" else 1
        if not isinstance(size, int) or size < least:
            raise ValueError(f"{name} = {size!r}; expected an integer of at least {least}.")
    galerkin = _Galerkin(num_modes)
    angles, spreads = _nodes(num_angles, num_spreads)
    largest = PLUME_BOX["omega"][1] * PLUME_BOX["t"][1]
    solutions = [
        galerkin.solve(angle, spreads, math.ceil(num_steps * max(0.1, angle / largest)))
        for angle in tqdm(angles.tolist(), desc="plume", unit=" angles", disable=None)
    ]
    return PlumeReference(torch.stack(solutions))


def _nodes(num_angles: int, num_spreads: int) -> tuple[Tensor, Tensor]:
    """Nodes of the angles and of the spreads."""
    time, omega, diffusivity = (PLUME_BOX[name][1] for name in ("t", "omega", "D"))
    return gauss_rule(num_angles, 0.0, omega * time)[0], gauss_rule(num_spreads, 0.0, diffusivity * time)[0]


def _interpolation(nodes: Tensor, x: Tensor) -> Tensor:
    """Values at x (N,) of the Lagrange polynomials of nodes (n,), by the barycentric formula: (N, n)."""
    gaps = (nodes[:, None] - nodes) / (nodes.max() - nodes.min()).clamp(min=1e-300)
    weights = 1 / gaps.fill_diagonal_(1.0).prod(-1)
    terms = weights / (x[:, None] - nodes)
    values = terms / terms.sum(-1, keepdim=True)
    at_node = x[:, None] == nodes
    return torch.where(at_node.any(-1, keepdim=True), at_node.to(values.dtype), values)


# -------------------------------------------------------------------------------------------------------- the solution


@dataclass(frozen=True)
class PlumeSamples:
    """Points (N, 6) drawn evenly from the box, in the order of ``PLUME_BOX``, and the exact values (N,) there."""

    points: Tensor
    values: Tensor


@dataclass(frozen=True)
class PlumeReference:
    """The solution at any point of ``PLUME_BOX``.

    Args:
        coefficients: Of v in the products of wall functions (num_angles, num_spreads, num_modes, num_modes), at the
            Gauss-Legendre nodes of the angle omega t and the spread D t.
    """

    coefficients: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """The solution at points (N, 6), columns in the order of ``PLUME_BOX``: (N,). Differentiable in the points.

        Raises:
            ValueError: If the points are not (N, 6), or one lies outside the box.
        """
        if points.dim() != 2 or points.shape[-1] != len(PLUME_BOX):
            raise ValueError(
                f"points have shape {tuple(points.shape)}; expected (N, 6), columns {', '.join(PLUME_BOX)}."
            )
        low, high = torch.tensor(list(PLUME_BOX.values()), dtype=torch.float64).unbind(-1)
        points = points.to(torch.float64)
        check_inside(points.detach(), low, high, len(PLUME_BOX))
        num_modes = self.coefficients.shape[-1]
        size = max(1, MAX_BLOCK // num_modes**2)
        values = []
        for block in points.split(size):
            x, y, z, t, omega, diffusivity = block.unbind(-1)
            across, along = (wall_functions(axis, num_modes) for axis in (x, y))
            plane = self._at(omega * t, diffusivity * t)
            plane = torch.einsum("nkl,nk,nl->n", plane, across, along)
            values.append(plane * (_sines(z) * _decayed(diffusivity * t)).sum(-1))
        return torch.cat(values)

    def _at(self, angles: Tensor, spreads: Tensor) -> Tensor:
        """Coefficients (N, num_modes, num_modes) at angles (N,) and spreads (N,)."""
        num_angles, num_spreads, num_modes, _ = self.coefficients.shape
        angle_nodes, spread_nodes = _nodes(num_angles, num_spreads)
        first, second = _interpolation(angle_nodes, angles), _interpolation(spread_nodes, spreads)
        weights = (first[:, :, None] * second[:, None]).flatten(1)
        return (weights @ self.coefficients.flatten(2).flatten(0, 1)).view(-1, num_modes, num_modes)

    def samples(self, num_points: int, seed: int = 0) -> PlumeSamples:
        """Points drawn evenly from the box, and the values there.

        Raises:
            ValueError: If ``num_points`` is below 1.
        """
        if num_points < 1:
            raise ValueError(f"num_points = {num_points}; expected at least 1.")
        low, high = torch.tensor(list(PLUME_BOX.values()), dtype=torch.float64).unbind(-1)
        uniform = torch.rand(num_points, len(PLUME_BOX), dtype=low.dtype, generator=torch.Generator().manual_seed(seed))
        points = low + (high - low) * uniform
        return PlumeSamples(points, self(points))

    def grid(self, rules: Sequence[Rule] | None = None) -> "PlumeGrid":
        """The solution on a tensor grid, to measure errors over the box.

        A field with cells needs a rule that is aligned with its cells, ``basis.quadrature(num_points)`` along each axis
        that has them; with one rule for the whole interval the points may keep to where the error is small. Holds a
        number for each point of x, y, t, omega and D.

        Args:
            rules: Points and weights along each axis of ``PLUME_BOX``. None takes those of :func:`plume_rules`.

        Raises:
            ValueError: If there are not as many rules as axes, or points lie outside the box.
        """
        rules = plume_rules() if rules is None else tuple(rules)
        if len(rules) != len(PLUME_BOX):
            raise ValueError(f"rules has {len(rules)} entries; expected one for each axis, {', '.join(PLUME_BOX)}.")
        for (points, _), (low, high) in zip(rules, PLUME_BOX.values(), strict=True):
            check_inside(points, low, high)
        (x, _), (y, _), (z, _), (t, _), (omega, _), (diffusivity, _) = rules
        num_modes = self.coefficients.shape[-1]
        across, along = (wall_functions(axis, num_modes) for axis in (x, y))
        angles = (t[:, None] * omega)[:, :, None].expand(-1, -1, len(diffusivity))
        spreads = t[:, None] * diffusivity
        plane = [
            across @ self._at(angle.flatten(), spread.expand_as(angle).flatten()) @ along.mT
            for angle, spread in zip(angles, spreads, strict=True)
        ]
        values_xy = torch.stack(plane).view(len(t), len(omega), len(diffusivity), len(x), len(y))
        values_z = torch.stack([_decayed(spread) @ _sines(z).mT for spread in spreads])
        return PlumeGrid(rules, values_xy, values_z)

    def save(self, path: str | Path) -> None:
        """Writes the solution to a safetensors file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        save_file({"coefficients": self.coefficients}, partial, metadata={"plume": _statement()})
        partial.replace(path)


def load_plume(path: str | Path) -> PlumeReference:
    """Reads a solution that :meth:`PlumeReference.save` wrote.

    Raises:
        ValueError: If the file is none, or one of another plume.
        FileNotFoundError: If there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}; `solve_plume().save({str(path)!r})` makes one.")
    try:
        with safe_open(path, "pt") as file:
            statement, coefficients = (file.metadata() or {}).get("plume"), file.get_tensor("coefficients")
    except SafetensorError as error:
        raise ValueError(f"{path} is no solution of the plume ({error}); make it again.") from error
    if statement != _statement():
        raise ValueError(f"{path} is of the plume {statement}, not of {_statement()}; make it again.")
    return PlumeReference(coefficients)


def plume_reference(path: str | Path) -> PlumeReference:
    """The solution at the usual size: read from a file, or solved and written to it where there is none."""
    if Path(path).is_file():
        return load_plume(path)
    reference = solve_plume()
    reference.save(path)
    return reference


def _statement() -> str:
    return json.dumps({"width": PLUME_WIDTH, "centre": PLUME_CENTRE, "box": PLUME_BOX})


def _sines(z: Tensor) -> Tensor:
    return math.sqrt(2) * (math.pi * z[:, None] * torch.arange(1, NUM_SINES + 1)).sin()


def _decayed(spreads: Tensor) -> Tensor:
    """Coefficients (N, sines) of w at spreads (N,)."""
    z, weights = gauss_rule(NUM_QUADRATURE)
    initial = _sines(z).mT @ (weights * plume_profile(z, 2))
    rate = (math.pi * torch.arange(1, NUM_SINES + 1, dtype=torch.float64)) ** 2
    return initial * (-spreads[:, None] * rate).exp()


# ----------------------------------------------------------------------------------------------------------- its errors


def plume_rules(num_points: Sequence[int] = (64, 64, 48, 16, 8, 10)) -> tuple[Rule, ...]:
    """Gauss-Legendre rules for the axes of ``PLUME_BOX``.

    Raises:
        ValueError: If there are not as many numbers as axes.
    """
    if len(num_points) != len(PLUME_BOX):
        raise ValueError(
            f"num_points has {len(num_points)} entries; expected one for each axis, {', '.join(PLUME_BOX)}."
        )
    return tuple(gauss_rule(n, *interval) for n, interval in zip(num_points, PLUME_BOX.values(), strict=True))


@dataclass(frozen=True)
class PlumeGrid:
    r"""The solution on a tensor grid: :math:`u = v_{xy}[t, \omega, D]\, w_z[t, D]`.

    Args:
        rules: Points and weights along each of the six axes.
        values_xy: v (t, omega, D, x, y).
        values_z: w (t, D, z).
    """

    rules: tuple[Rule, ...]
    values_xy: Tensor
    values_z: Tensor

    @cached_property
    def _square(self) -> Tensor:
        """The integral of u^2 over space (t, omega, D)."""
        (_, wx), (_, wy), (_, wz) = self.rules[:3]
        across = torch.einsum("towxy,x,y->tow", self.values_xy.square(), wx, wy)
        return across * (self.values_z.square() @ wz)[:, None]

    def _mean(self, integrals: Tensor) -> float:
        (_, wt), (_, womega), (_, wd) = self.rules[3:]
        return torch.einsum("tow,t,o,w->", integrals, wt, womega, wd).item()

    @torch.no_grad()
    def relative_l2(self, evaluate: Callable[[int, int, int], Tensor]) -> float:
        r"""The error :math:`\|u - v\| / \|u\|` of a field v in L2 of the box.

        The difference is squared and summed, not the terms of its square, which would cancel.

        Args:
            evaluate: Takes the indices of t, omega and D, and returns v at the grid's (x, y, z).

        Raises:
            ValueError: If it returns another shape.
        """
        (_, wx), (_, wy), (_, wz) = self.rules[:3]
        integrals = torch.zeros_like(self._square)
        for t, omega, diffusivity in tqdm(
            list(itertools.product(*map(range, integrals.shape))), desc="error", unit=" nodes", disable=None
        ):
            difference = self.values_xy[t, omega, diffusivity][:, :, None] * self.values_z[t, diffusivity]
            values = evaluate(t, omega, diffusivity)
            if values.shape != difference.shape:
                raise ValueError(
                    f"evaluate returned shape {tuple(values.shape)}; expected (x, y, z) = {tuple(difference.shape)}."
                )
            integrals[t, omega, diffusivity] = wx @ (difference.sub_(values).square_() @ wz) @ wy
        return math.sqrt(self._mean(integrals) / self._mean(self._square))

    @torch.no_grad()
    def relative_l2_cp(self, tables: Sequence[Tensor]) -> float:
        r"""The error of :math:`v = \sum_r \prod_i F_i[\cdot, r]`, given the factors at the grid's points.

        Args:
            tables: F_i (n_i, rank) for each axis.

        Raises:
            ValueError: If the tables' shapes do not fit the grid.
        """
        expected = [len(points) for points, _ in self.rules]
        shapes = [tuple(table.shape) for table in tables]
        if [shape[0] for shape in shapes] != expected or len({shape[1:] for shape in shapes}) != 1:
            raise ValueError(f"the tables have shapes {shapes}; expected (n, rank) with n = {expected}.")
        x, y, z, t, omega, diffusivity = (table.to(torch.float64) for table in tables)
        plane = (x[:, None] * y).flatten(0, 1)  # (x y, rank)

        def evaluate(i: int, j: int, k: int) -> Tensor:
            return (plane @ (z * (t[i] * omega[j] * diffusivity[k])).mT).view(*expected[:3])

        return self.relative_l2(evaluate)
