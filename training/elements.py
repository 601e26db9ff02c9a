r"""Reference solutions by finite elements, each for one set of parameters, on scikit-fem.

- :func:`poisson`: simplices of degree 1 or 2 on the unit square or cube.
- :func:`heat`: :math:`u_t = \nu u_{xx}` on [0, 1].
- :func:`plume`: :math:`u_t + U \cdot \nabla u - D \Delta u = 0` on the unit cube, U a rotation about its axis in z.
- :class:`LaserElements`: the powder bed of :mod:`training.laser`.

The last three use elements of degree 1 or 2 on a tensor grid (intervals, hexahedra), whose matrices are Kronecker
products of those of scikit-fem's line elements. Directions in which an operator is symmetric and its coefficients do
not vary are put in the eigenvectors of their line matrices (R. E. Lynch, J. R. Rice, D. H. Thomas, Numer. Math. 6
(1964)): what is left is a sparse matrix of independent blocks and a cheap LU, for exactly the equations of the 3-D
elements, at a small part of the cost of their general LU.
The time steps are those of an L-stable diagonally implicit Runge-Kutta method of order 4.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.linalg
import skfem
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline
from skfem.helpers import dot, grad
from torch import Tensor

from training.laser import PowderBed, beam_intensity

Array = NDArray[np.float64]
Function = Callable[..., Tensor]  # of coordinates, all of one shape

LASER_CELLS = (40, 14, 14)  # along x, y and z
LASER_STEPS = 24
START_UP = 4  # halvings of the first step
INTEGRATION_ORDER = 8  # of quadrature: sources are no polynomials
PROBE_CHUNK = 256  # points for which scikit-fem looks up simplices at once: it compares all with all candidates

# E. Hairer, G. Wanner, Solving Ordinary Differential Equations II (1996), table 6.5: stages of step 1/4, the last of
# which is the step itself.
RUNGE_KUTTA = np.array(
    [
        [1 / 4, 0, 0, 0, 0],
        [1 / 2, 1 / 4, 0, 0, 0],
        [17 / 50, -1 / 25, 1 / 4, 0, 0],
        [371 / 1360, -137 / 2720, 15 / 544, 1 / 4, 0],
        [25 / 24, -49 / 48, 125 / 16, -85 / 12, 1 / 4],
    ]
)


@skfem.BilinearForm
def _mass(u, v, _):  # noqa: ANN001, ANN202
    return u * v


@skfem.BilinearForm
def _stiffness(u, v, _):  # noqa: ANN001, ANN202
    return dot(grad(u), grad(v))


@skfem.BilinearForm
def _slope(u, v, _):  # noqa: ANN001, ANN202
    return grad(u)[0] * v


@skfem.BilinearForm
def _offset(u, v, where):  # noqa: ANN001, ANN202
    return (where.x[0] - 0.5) * u * v


# ------------------------------------------------------------------------------------------------------------ Poisson


@dataclass(frozen=True)
class SimplexSolution:
    """A field on triangles or tetrahedra.

    Attributes:
        basis: scikit-fem's.
        coefficients: (basis.N,).
        num_unknowns: Without those that the boundary fixes.
        seconds: From the mesh to the solution.
    """

    basis: skfem.CellBasis
    coefficients: Array
    num_unknowns: int
    seconds: float

    def __call__(self, points: ArrayLike) -> Array:
        """Values (N,) at points (N, dimension).

        Raises:
            ValueError: If the points have other columns, or one lies outside.
        """
        points = _checked(points, [(0.0, 1.0)] * self.basis.mesh.dim())
        chunks = np.array_split(points, max(1, -(-len(points) // PROBE_CHUNK)))
        interpolator = self.basis.interpolator(self.coefficients)
        return np.concatenate([interpolator(chunk.T) if len(chunk) else np.zeros(0) for chunk in chunks])


def poisson(
    dimension: int, num_cells: int, degree: int, *, source: Function, boundary: Function | None = None
) -> SimplexSolution:
    r"""Solves :math:`-\Delta u = f` on the unit square or cube with u = g on its boundary.

    Args:
        dimension: 2 (triangles) or 3 (tetrahedra).
        num_cells: Along each side, before each square is cut in two and each cube in six.
        degree: 1 or 2.
        source: f, of tensors x, y (, z).
        boundary: g, of the same; zero if None.

    Raises:
        ValueError: If a size is not one of these, or a function does not give one finite value for each point.
    """
    if dimension not in (2, 3):
        raise ValueError(f"dimension = {dimension!r}; expected 2 or 3.")
    _check_sizes(degree, num_cells=num_cells)
    start = time.perf_counter()
    mesh_class = skfem.MeshTri if dimension == 2 else skfem.MeshTet
    elements = {
        2: (skfem.ElementTriP1, skfem.ElementTriP2),
        3: (skfem.ElementTetP1, skfem.ElementTetP2),
    }
    mesh = mesh_class.init_tensor(*[np.linspace(0.0, 1.0, num_cells + 1)] * dimension)
    basis = skfem.Basis(mesh, elements[dimension][degree - 1](), intorder=2 * degree + 2)

    @skfem.LinearForm
    def load(v, where):  # noqa: ANN001, ANN202
        return _values(source, where.x) * v

    fixed = basis.get_dofs().all()
    given = np.zeros(basis.N)
    if boundary is not None:
        given[fixed] = _values(boundary, basis.doflocs[:, fixed])
    system = skfem.condense(_stiffness.assemble(basis), load.assemble(basis), x=given, D=fixed)
    return SimplexSolution(basis, skfem.solve(*system), basis.N - len(fixed), time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------------- tensor grids


@dataclass(frozen=True)
class GridSolution:
    """A field on a tensor grid of elements and steps in time, between which it is a cubic spline.

    Attributes:
        bases: scikit-fem's line elements along each direction of space.
        times: (num_steps + 1,).
        coefficients: (num_steps + 1, bases[0].N, ...).
        num_unknowns: At a time, without those that the boundary fixes.
        seconds: From the mesh to the solution, the factorisation included, also where several solutions share it.
    """

    bases: tuple[skfem.CellBasis, ...]
    times: Array
    coefficients: Array
    num_unknowns: int
    seconds: float

    def __call__(self, points: ArrayLike) -> Array:
        """Values (N,) at points (N, directions + 1), whose last column is time.

        Raises:
            ValueError: If the points have other columns, or one lies outside.
        """
        ends = [(basis.mesh.p.min(), basis.mesh.p.max()) for basis in self.bases]
        points = _checked(points, [*ends, (self.times[0], self.times[-1])])
        weights, index = np.ones((len(points), 1)), np.zeros((len(points), 1), dtype=np.int64)
        for basis, x in zip(self.bases, points.T, strict=False):
            probes = basis.probes(x[None]).tocsr()
            shape = (len(points), basis.Nbfun)
            weights = (weights[:, :, None] * probes.data.reshape(shape)[:, None]).reshape(len(points), -1)
            index = (index[:, :, None] * basis.N + probes.indices.reshape(shape)[:, None]).reshape(len(points), -1)
        steps = np.arange(len(points) + 1) * weights.shape[1]
        values = self.coefficients.reshape(len(self.times), -1).T
        matrix = scipy.sparse.csr_array((weights.ravel(), index.ravel(), steps), shape=(len(points), len(values)))
        spline = CubicSpline(self.times, np.eye(len(self.times)))(points[:, -1])
        return np.einsum("ns,ns->n", matrix @ values, spline)


@dataclass(frozen=True)
class _Line:
    """Line elements and their matrices, those of fixed ends left out."""

    basis: skfem.CellBasis
    free: NDArray[np.int64]

    def matrix(self, form: skfem.BilinearForm) -> scipy.sparse.csr_array:
        return scipy.sparse.csr_array(form.assemble(self.basis)[self.free][:, self.free])

    def modes(self) -> tuple[Array, Array]:
        """Eigenvalues (n,) of the stiffness and vectors (n, n) in which the mass is the identity."""
        return scipy.linalg.eigh(self.matrix(_stiffness).toarray(), self.matrix(_mass).toarray())

    def quadrature(self) -> tuple[Array, scipy.sparse.csr_array]:
        """Points (Q,), and the matrix (n, Q) that integrates values at the points against each function."""
        points, weights = np.asarray(self.basis.global_coordinates())[0], self.basis.dx  # (cells, points)
        functions = np.stack([np.broadcast_to(np.asarray(value[0]), points.shape) for value in self.basis.basis])
        rows = np.broadcast_to(self.basis.element_dofs[:, :, None], functions.shape)
        columns = np.broadcast_to(np.arange(points.size).reshape(points.shape), functions.shape)
        shape = (self.basis.N, points.size)
        whole = scipy.sparse.csr_array(((functions * weights).ravel(), (rows.ravel(), columns.ravel())), shape=shape)
        return points.ravel(), whole[self.free]


def _line(edges: Sequence[float], degree: int, *, fixed: Sequence[str]) -> _Line:
    element = skfem.ElementLineP1() if degree == 1 else skfem.ElementLineP2()
    mesh = skfem.MeshLine(np.asarray(edges))
    basis = skfem.Basis(mesh, element, intorder=INTEGRATION_ORDER)
    ends = {"low": mesh.p.min(), "high": mesh.p.max()}
    inside = np.all([basis.doflocs[0] != ends[end] for end in fixed], axis=0)
    return _Line(basis, np.flatnonzero(inside))


class _March:
    """Time steps of mass u' + operator u = load, with one factorisation for each length of a step.

    Args:
        mass: (unknowns, unknowns).
        operator: The same.
        times: Ascending, from 0 on (num_steps + 1,).
    """

    def __init__(self, mass: scipy.sparse.sparray, operator: scipy.sparse.sparray, times: Array):
        self.times, self.operator = times, operator.tocsr()
        lengths = np.diff(times) / times[-1]
        distinct, self.which = np.unique(lengths.round(9), return_inverse=True)  # equal ones differ by rounding
        self.factors = [
            scipy.sparse.linalg.splu((mass + length * times[-1] * RUNGE_KUTTA[0, 0] * operator).tocsc())
            for length in distinct
        ]

    def __call__(self, load: Array | float, first: Array) -> Array:
        """The solution at the times, from u = first: (num_steps + 1, unknowns)."""
        found = np.empty((len(self.times), len(first)))
        found[0] = first
        slopes = np.zeros((len(RUNGE_KUTTA), len(first)))
        for n, step in enumerate(np.diff(self.times)):
            for i, row in enumerate(RUNGE_KUTTA):
                rest = load - self.operator @ (found[n] + step * row[:i] @ slopes[:i])
                slopes[i] = self.factors[self.which[n]].solve(rest)
            found[n + 1] = found[n] + step * RUNGE_KUTTA[-1] @ slopes
        return found


def _solution(lines: Sequence[_Line], times: Array, found: Array, seconds: float) -> GridSolution:
    """Fills in the fixed ends, which are zero, around values (num_steps + 1, free unknowns along each direction)."""
    whole = np.zeros((len(times), *(line.basis.N for line in lines)))
    whole[np.ix_(np.arange(len(times)), *(line.free for line in lines))] = found
    return GridSolution(tuple(line.basis for line in lines), times, whole, found[0].size, seconds)


def heat(
    nu: float, *, initial: Function, num_cells: int, degree: int, num_steps: int, end_time: float = 1.0
) -> GridSolution:
    r"""Solves :math:`u_t = \nu u_{xx}` on [0, 1] with u = 0 at both ends.

    Args:
        nu: Diffusivity, above 0.
        initial: u at t = 0, of a tensor x; interpolated at the nodes.
        num_cells: Of equal width.
        degree: 1 or 2.
        num_steps: Equal ones.
        end_time: Above 0.

    Raises:
        ValueError: If a number is not one of these, or the function does not give one finite value for each point.
    """
    _check_sizes(degree, num_cells=num_cells, num_steps=num_steps)
    _check_positive(nu=nu, end_time=end_time)
    start = time.perf_counter()
    line = _line(np.linspace(0.0, 1.0, num_cells + 1), degree, fixed=("low", "high"))
    first = _values(initial, line.basis.doflocs[:, line.free])
    times = np.linspace(0.0, end_time, num_steps + 1)
    found = _March(line.matrix(_mass), nu * line.matrix(_stiffness), times)(0.0, first)
    return _solution([line], times, found, time.perf_counter() - start)


def plume(
    omega: float,
    diffusivity: float,
    *,
    initial: Function,
    num_cells: int,
    degree: int,
    num_steps: int,
    end_time: float = 1.0,
) -> GridSolution:
    r"""Solves :math:`u_t + U \cdot \nabla u - D \Delta u = 0` on the unit cube with u = 0 on its boundary.

    :math:`U = \omega\,(-(y - 1/2), x - 1/2, 0)`. Galerkin without upwinding: the cells must resolve u.

    Args:
        omega: Angular velocity.
        diffusivity: D, above 0.
        initial: u at t = 0, of tensors x, y, z; interpolated at the nodes.
        num_cells: Of equal width along each side.
        degree: 1 or 2.
        num_steps: Equal ones.
        end_time: Above 0.

    Raises:
        ValueError: If a number is not one of these, or the function does not give one finite value for each point.
    """
    _check_sizes(degree, num_cells=num_cells, num_steps=num_steps)
    _check_positive(diffusivity=diffusivity, end_time=end_time)
    if not np.isfinite(omega):
        raise ValueError(f"omega = {omega}; expected a finite number.")
    start = time.perf_counter()
    line = _line(np.linspace(0.0, 1.0, num_cells + 1), degree, fixed=("low", "high"))
    mass, stiffness, slope, offset = (line.matrix(form) for form in (_mass, _stiffness, _slope, _offset))
    eigenvalues, vectors = line.modes()  # along z

    kron = scipy.sparse.kron
    in_plane = omega * (kron(slope, offset) - kron(offset, slope)) + diffusivity * (
        kron(stiffness, mass) + kron(mass, stiffness)
    )  # (y, x)
    in_plane_mass, identity = kron(mass, mass), scipy.sparse.eye_array(len(eigenvalues))
    masses = kron(identity, in_plane_mass, format="csr")
    operator = kron(identity, in_plane) + kron(scipy.sparse.diags_array(diffusivity * eigenvalues), in_plane_mass)

    nodes = line.basis.doflocs[0, line.free]
    z, y, x = np.meshgrid(nodes, nodes, nodes, indexing="ij")
    first = np.tensordot(vectors.T @ mass, _values(initial, np.stack([x, y, z])), 1).ravel()  # (modes, y, x)
    times = np.linspace(0.0, end_time, num_steps + 1)
    found = _March(masses, operator, times)(0.0, first).reshape(-1, *[len(nodes)] * 3)
    found = np.einsum("zm,tmyx->txyz", vectors, found, optimize=True)
    return _solution([line] * 3, times, found, time.perf_counter() - start)


# -------------------------------------------------------------------------------------------------------------- laser


class LaserElements:
    """Elements for the powder bed at one speed, whose factorisation serves every power and beam shape.

    Args:
        peclet: The speed as Péclet number, at least 0.
        bed: The slab; the default one if None.
        num_cells: Along x, y and z, graded as :meth:`training.laser.PowderBed.breakpoints`.
        degree: 1 or 2.
        num_steps: Equal ones over the duration of the track, of which the first is halved several times: where the beam
            goes on the rise bends sharply.

    Raises:
        ValueError: If a number is not one of these.
    """

    def __init__(
        self,
        peclet: float,
        bed: PowderBed | None = None,
        *,
        num_cells: tuple[int, int, int] = LASER_CELLS,
        degree: int = 2,
        num_steps: int = LASER_STEPS,
    ):
        _check_sizes(degree, num_steps=num_steps, **dict(zip("xyz", num_cells, strict=True)))
        if not (np.isfinite(peclet) and peclet >= 0):
            raise ValueError(f"peclet = {peclet}; expected a finite number of at least 0.")
        start = time.perf_counter()
        self.bed = bed or PowderBed()
        self.lines = [
            _line(self.bed.breakpoints(name, n), degree, fixed=("high",))
            for name, n in zip("xyz", num_cells, strict=True)
        ]
        along = self.lines[0]
        mass = along.matrix(_mass)
        transport = along.matrix(_stiffness) - peclet * along.matrix(_slope)
        (across, self._y), (down, self._z) = (line.modes() for line in self.lines[1:])
        shifts = np.add.outer(across, down).ravel()
        identity = scipy.sparse.eye_array(len(shifts))
        kron = scipy.sparse.kron
        operator = kron(identity, transport) + kron(scipy.sparse.diags_array(shifts), mass)
        times = np.linspace(0.0, self.bed.intervals["t"][1], num_steps + 1)
        start_up = times[1] / 2.0 ** np.arange(START_UP, 0, -1)
        self._march = _March(kron(identity, mass), operator, np.insert(times, 1, start_up))
        self._seconds = time.perf_counter() - start

    def solve(self, power: float, shape: float) -> GridSolution:
        """The rise in K, of points (N, 4): x, y, z, t in the problem's units.

        Args:
            power: In W, finite.
            shape: Exponent s of the beam, above 0.

        Raises:
            ValueError: If a number is not one of these.
        """
        _check_positive(shape=shape)
        if not np.isfinite(power):
            raise ValueError(f"power = {power}; expected a finite number.")
        start = time.perf_counter() - self._seconds
        (x, along), (y, across), (z, down) = (line.quadrature() for line in self.lines)
        beam = beam_intensity(torch.from_numpy(x)[:, None], torch.from_numpy(y), shape).numpy()
        in_plane = self._y.T @ (across @ (along @ beam).T)  # (modes, x)
        depth = self._z.T @ (down @ self.bed.absorption(torch.from_numpy(z)).numpy())  # (modes,)
        load = (power * self.bed.heating * in_plane[:, None] * depth[:, None]).ravel()
        shape_of_found = (-1, self._y.shape[1], self._z.shape[1], len(self.lines[0].free))
        found = self._march(load, np.zeros_like(load)).reshape(shape_of_found)
        found = np.einsum("yj,zk,tjkx->txyz", self._y, self._z, found, optimize=True)
        return _solution(self.lines, self._march.times, found, time.perf_counter() - start)


# ------------------------------------------------------------------------------------------------------------- checks


def _values(function: Function, x: Array) -> Array:
    values = function(*(torch.from_numpy(np.ascontiguousarray(coordinate)) for coordinate in x))
    values = np.asarray(torch.as_tensor(values, dtype=torch.float64))
    if values.shape not in ((), x.shape[1:]):
        raise ValueError(f"a function has values of shape {values.shape}; expected {x.shape[1:]}, one for each point.")
    if not np.isfinite(values).all():
        raise ValueError("a function has values that are not finite; expected finite ones in the whole box.")
    return np.broadcast_to(values, x.shape[1:])


def _checked(points: ArrayLike, ends: Sequence[tuple[float, float]]) -> Array:
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != len(ends):
        raise ValueError(f"points has shape {points.shape}; expected (N, {len(ends)}).")
    low, high = np.transpose(ends)
    outside = ~((points >= low) & (points <= high))
    if outside.any():
        i, j = np.argwhere(outside)[0]
        raise ValueError(f"points[{i}, {j}] = {points[i, j]} lies outside [{low[j]}, {high[j]}].")
    return points


def _check_sizes(degree: int, **counts: int) -> None:
    if degree not in (1, 2):
        raise ValueError(f"degree = {degree!r}; expected 1 or 2.")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} = {count!r}; expected an integer of at least 1.")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (np.isfinite(number) and number > 0):
            raise ValueError(f"{name} = {number}; expected a finite number above 0.")
