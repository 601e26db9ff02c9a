r"""Two Poisson problems on a square, and the error of KHRONOS and its peers at equal numbers of parameters.

Both solve :math:`-\Delta u = f` on [-1, 1]^2. The first is that of the KAN paper (arXiv 2404.19756, section 3.4), whose
solution sin(pi x) sin(pi y^2) is one product; the second is the same function turned by 30 degrees, which is no finite
sum of products. Every method solves for the rest w = u - g that is left by the Coons lift g of the exact boundary
data: -lap w = f + lap g with w = 0 on the boundary. The lift belongs to the problem and has no parameters.

- KHRONOS: a CP of B-splines that minimises the Ritz energy by alternating least squares with exact block solves.
- pyinn: the functions of its interpolating networks in the same solver, since its own trainer fits data alone.
- scikit-fem: bilinear and biquadratic elements on rectangles, which err less here than triangles of as many nodes.
- pykan: a KAN trained by the physics-informed loss and the optimiser of pykan's own example.

`poisson_study` gives a row for each; `eval.khronos` writes and draws them.
"""

import contextlib
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sna_core.bspline import UniformBSpline
from sna_core.network import CPNetwork

ENDS = torch.tensor([-1.0, 1.0], dtype=torch.float64)  # of either axis
SIZES = (16, 32, 64, 128, 256, 512)
DEGREES = (2, 3, 4)
KAN_SIZES = (64, 256, 512)
KAN_CELLS = 5  # of each edge's spline, of degree 3, as in pykan's examples
KAN_SIDE = 21  # collocation points along each axis
PDE_WEIGHT = 0.01  # of the equation beside the boundary, as in pykan's example
KAN_STEPS = 10  # of L-BFGS, of up to 20 iterations each
SEEDS = (0, 1, 2)
INN_DEGREES = (1, 2)  # at 3 and 256 nodes rounding in pyinn's functions outgrows the error
MAX_SWEEPS = 200
TOLERANCE = 1e-12  # relative change of w in L2 over a sweep


@dataclass(frozen=True)
class Problem:
    r"""u = sin(pi x') sin(pi y'^2) on [-1, 1]^2, x' and y' the axes turned by an angle, and the rest w of its lift.

    The methods take points x and y whose shapes broadcast, so that what depends on one of them is computed once.

    Attributes:
        name: As it stands in a row.
        angle: In radians.
        ranks: Those of the sums of products that are tried; 1 alone where w is one product.
    """

    name: str
    angle: float
    ranks: tuple[int, ...]

    def exact(self, x: Tensor, y: Tensor) -> Tensor:
        """The solution u."""
        x, y = self._turned(x, y)
        return torch.sin(math.pi * x) * torch.sin(math.pi * y.square())

    def lift(self, x: Tensor, y: Tensor) -> Tensor:
        """g, the transfinite interpolation of u on the boundary (S. A. Coons, MIT MAC-TR-41, 1967)."""
        low, high = ENDS
        corners = _across(
            x,
            _across(y, self.exact(low, low), self.exact(low, high)),
            _across(y, self.exact(high, low), self.exact(high, high)),
        )
        along_x = _across(y, self.exact(x, low), self.exact(x, high))
        return _across(x, self.exact(low, y), self.exact(high, y)) + along_x - corners

    def solution(self, x: Tensor, y: Tensor) -> Tensor:
        """The rest w = u - g, zero on the boundary."""
        return self.exact(x, y) - self.lift(x, y)

    def source(self, x: Tensor, y: Tensor) -> Tensor:
        """Its source -lap w = -lap u + lap g; the corners' part of g is harmonic."""
        low, high = ENDS
        of_lift = _across(x, self._second(low, y)[1], self._second(high, y)[1]) + _across(
            y, self._second(x, low)[0], self._second(x, high)[0]
        )
        return of_lift - sum(self._second(x, y))

    def _turned(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        return cosine * x + sine * y, cosine * y - sine * x

    def _second(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The second derivatives of u in x and in y."""
        pi, cosine, sine = math.pi, math.cos(self.angle), math.sin(self.angle)
        x, y = self._turned(x, y)
        sin_x, sin_y, cos_y = torch.sin(pi * x), torch.sin(pi * y.square()), torch.cos(pi * y.square())
        along = -(pi**2) * sin_x * sin_y
        across = sin_x * (2 * pi * cos_y - (2 * pi * y).square() * sin_y)
        mixed = 2 * cosine * sine * torch.cos(pi * x) * 2 * pi**2 * y * cos_y
        return cosine**2 * along - mixed + sine**2 * across, sine**2 * along + mixed + cosine**2 * across


PROBLEMS = (Problem("kan", 0.0, ranks=(1,)), Problem("rotated", math.pi / 6, ranks=(1, 2, 3, 4, 6, 8, 12)))


@dataclass(frozen=True)
class PoissonRow:
    """A method on a problem at one size.

    Attributes:
        problem: Its name.
        method: "khronos", "pyinn", "scikit-fem" or "pykan".
        degree: Of the polynomials; None where nothing ran.
        size: The number of parameters that was asked for.
        rank: Of a sum of products, else None.
        num_parameters: All coefficients, those that the boundary fixes among them; None where nothing ran.
        squared_l2_error: Integral of (u_h - u)^2 over the square, the median over seeds; None where nothing finite.
        seconds: From the problem to the solution, the search for a rank included; the median over seeds.
        errors: The squared L2 error of each seed; empty where chance plays no part.
        note: What a reader must know beside.
    """

    problem: str
    method: str
    degree: int | None
    size: int
    rank: int | None = None
    num_parameters: int | None = None
    squared_l2_error: float | None = None
    seconds: float | None = None
    errors: tuple[float | None, ...] = ()
    note: str = ""


def poisson_study(
    sizes: Sequence[int] = SIZES,
    *,
    degrees: Sequence[int] = DEGREES,
    kan_sizes: Sequence[int] = KAN_SIZES,
    kan_steps: int = KAN_STEPS,
    seeds: Sequence[int] = SEEDS,
    progress: bool = True,
) -> list[PoissonRow]:
    """Solves both problems by every method at every size.

    Args:
        sizes: Numbers of parameters. KHRONOS and pyinn take no more, the others the nearest that they can have.
        degrees: Of KHRONOS' B-splines.
        kan_sizes: Of pykan, whose training is slow.
        kan_steps: Of pykan's L-BFGS, of up to 20 iterations each.
        seeds: Of pykan.
        progress: Show a progress bar.

    Returns:
        Rows in the order of problems, methods and sizes. A method whose library is missing has one row that says so.

    Raises:
        ValueError: If a size has no room for the smallest KHRONOS, or there are no seeds.
    """
    jobs = [("", partial(khronos_row, degree=degree), sizes) for degree in degrees]
    jobs += [("pyinn", partial(inn_row, degree=degree), sizes) for degree in INN_DEGREES]
    jobs += [("scikit-fem", partial(fem_row, degree=degree), sizes) for degree in (1, 2)]
    jobs += [("pykan", partial(kan_row, seeds=seeds, num_steps=kan_steps), kan_sizes)]
    tasks = [(problem, package, row, size) for problem in PROBLEMS for package, row, some in jobs for size in some]

    rows, missing = [], set()
    for problem, package, row, size in tqdm(tasks, desc="poisson", unit="row", disable=not progress):
        if (problem, package) in missing:
            continue
        try:
            rows.append(row(problem, size))
        except ModuleNotFoundError as error:
            missing.add((problem, package))
            note = f"not installed: no module {error.name}; pip install {package}"
            rows.append(PoissonRow(problem.name, package, None, size, note=note))
    return rows


# ------------------------------------------------------------------------------------- sums of products by their energy


@dataclass(frozen=True)
class LineBasis:
    """Functions of one variable on [-1, 1], at the points of a quadrature and at the ends.

    Attributes:
        points, weights: (Q,).
        values, slopes: (Q, n), each function and its derivative at the points.
        ends: (2, n), each function at -1 and at 1.
    """

    points: Tensor
    weights: Tensor
    values: Tensor
    slopes: Tensor
    ends: Tensor


@dataclass(frozen=True)
class RitzSolution:
    r"""The sum of products with the least energy that alternating least squares found.

    Attributes:
        factors: Coefficients (2, n, R) of the functions along each axis.
        energies: :math:`\int |\nabla w|^2 / 2 - f w` after each block solve, over all ranks on the way; never rising.
        converged: Whether the last sweep changed w by less than the tolerance.
    """

    factors: Tensor
    energies: tuple[float, ...]
    converged: bool


def solve_ritz(problem: Problem, basis: LineBasis, rank: int) -> RitzSolution:
    r"""Minimises :math:`E(w) = \int |\nabla w|^2 / 2 - f w` over sums of ``rank`` products that vanish on the boundary.

    In the eigenfunctions of the second derivative on either axis, mass is the identity and stiffness diag(mu), so that
    :math:`E = \sum_{ij} (\mu_i + \mu_j) W_{ij}^2 / 2 - F_{ij} W_{ij}` with W = U V^T. For given V only its span
    counts: with V orthonormal and V^T diag(mu) V = diag(lambda), the best U is
    :math:`(F V)_{ir} / (\mu_i + \lambda_r)`, all components at once. Components are added one by one, each fitted to
    what is left, then all are swept over.

    Args:
        problem: Its source is integrated by the basis' quadrature, its w is sought.
        basis: Of both axes.
        rank: R, from 1 to n - 2.

    Returns:
        The coefficients in the given basis, and what tells how they came.

    Raises:
        ValueError: If the rank is below 1, or above the number of functions that vanish at both ends.
    """
    num_basis = basis.values.shape[1]
    if not 1 <= rank <= num_basis - 2:
        raise ValueError(
            f"rank = {rank} with {num_basis} functions on each axis; expected 1 to {num_basis - 2}, since the boundary "
            "takes two of them. Take a lower rank or more cells."
        )
    inside = torch.linalg.svd(basis.ends)[2][2:].mT  # (n, n - 2), orthonormal, zero at both ends
    values, slopes = basis.values @ inside, basis.slopes @ inside
    weighted = basis.weights.unsqueeze(-1) * values
    cholesky = torch.linalg.cholesky(values.mT @ weighted)
    stiffness = slopes.mT @ (basis.weights.unsqueeze(-1) * slopes)
    halfway = torch.linalg.solve_triangular(cholesky, stiffness, upper=False)
    mu, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(cholesky, halfway.mT, upper=False))
    vectors = torch.linalg.solve_triangular(cholesky.mT, vectors, upper=True)  # columns are orthonormal in L2
    weighted = weighted @ vectors
    load = weighted.mT @ problem.source(basis.points.unsqueeze(-1), basis.points) @ weighted

    left, right, total = load.new_zeros(len(mu), 0), load.new_zeros(len(mu), 0), torch.zeros_like(load)
    energies: list[float] = []
    for _ in range(rank):
        rest = load - (mu.unsqueeze(-1) + mu) * total
        added = rest[rest.norm(dim=1).argmax()].unsqueeze(-1)
        for side in (rest, rest.mT, rest):
            _, added = _best_factor(side, mu, added)
        left = torch.cat([left, added], dim=1)
        for _ in range(MAX_SWEEPS):
            left, right = _best_factor(load.mT, mu, left)
            energies.append(-((load.mT @ left) * right).sum().item() / 2)
            right, left = _best_factor(load, mu, right)
            energies.append(-((load @ right) * left).sum().item() / 2)
            previous, total = total, left @ right.mT
            change = (total - previous).norm() / total.norm()
            if converged := bool(change < TOLERANCE):
                break
    factors = inside @ vectors @ torch.stack([left, right])
    return RitzSolution(factors, tuple(energies), converged)


def _best_factor(load: Tensor, mu: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Another basis (n, R) of the other factor's span, and the best factor (n, R) beside it."""
    other, _ = torch.linalg.qr(other)
    eigenvalues, turn = torch.linalg.eigh(other.mT @ (mu.unsqueeze(-1) * other))
    other = other @ turn
    return other, load @ other / (mu.unsqueeze(-1) + eigenvalues)


def squared_l2_error(problem: Problem, points: Tensor, weights: Tensor, found: Tensor) -> float:
    """Integral of (w_h - w)^2 by the quadrature's product, ``found`` (Q, Q) holding w_h at its points."""
    error = found - problem.solution(points.unsqueeze(-1), points)
    return (weights @ error.square() @ weights).item()


def spline_basis(spline: UniformBSpline) -> LineBasis:
    """B-splines on [-1, 1], with points enough that the source's integrals do not limit the error."""
    points, weights = spline.quadrature(spline.degree + 2 + 32 // spline.num_cells)
    return LineBasis(points, weights, spline.dense(points), spline.dense(points, 1), spline.dense(ENDS))


def solve_khronos(problem: Problem, *, rank: int, num_cells: int, degree: int) -> CPNetwork:
    """KHRONOS in float64 whose value is w: 2 rank (num_cells + degree) parameters, found by `solve_ritz`.

    Raises:
        ValueError: If the rank is not from 1 to num_cells + degree - 2.
    """
    network = CPNetwork(
        2, rank=rank, num_cells=num_cells, degree=degree, low=-1, high=1, unit_weights=True, dtype=torch.float64
    )
    with torch.no_grad():
        network.factors.copy_(solve_ritz(problem, spline_basis(network.splines[0]), rank).factors.unsqueeze(2))
    return network


def khronos_row(problem: Problem, size: int, degree: int) -> PoissonRow:
    """KHRONOS of at most ``size`` parameters.

    Raises:
        ValueError: If the size has no room for it.
    """
    return _row_of_least_energy(
        "khronos", problem, size, degree, lambda n: spline_basis(UniformBSpline(n - degree, degree, -1.0, 1.0))
    )


def inn_row(problem: Problem, size: int, degree: int) -> PoissonRow:
    """Interpolating network of at most ``size`` parameters; ``degree`` is its p, and its patch size s.

    Raises:
        ModuleNotFoundError: Without pyinn.
        ValueError: If the size has no room for it.
    """
    row = _row_of_least_energy("pyinn", problem, size, degree, partial(inn_basis, degree=degree))
    note = "pyinn fits data alone: its functions in the solver of KHRONOS, and seconds hold what JAX had to compile"
    return replace(row, note="; ".join(filter(None, (note, row.note))))


@cache
def inn_basis(num_basis: int, degree: int) -> LineBasis:
    """The functions of pyinn on ``num_basis`` uniform nodes: hats for degree 1, else convolution patches."""
    import jax
    import jax.numpy as jnp
    from pyinn.model import INN_linear, INN_nonlinear

    nodes = jnp.linspace(0.0, 1.0, num_basis, dtype=jnp.float64)  # pyinn's interval
    settings = {"s_patch": degree, "alpha_dil": 20, "p_order": degree}
    settings |= {"radial_basis": "cubicSpline", "INNactivation": "polynomial"}
    with contextlib.redirect_stdout(io.StringIO()):
        model = (INN_linear if degree == 1 else INN_nonlinear)(nodes, {"MODEL_PARAM": settings})

    def functions(x: jax.Array) -> jax.Array:  # the interpolant is linear in the nodal values
        return jax.jacrev(model.interpolate, argnums=1)(x, jnp.zeros(num_basis))

    # The splines of as many cells as there are between nodes have their quadrature.
    points, weights = UniformBSpline(num_basis - 1, 0, -1.0, 1.0).quadrature(degree + 2 + 32 // num_basis)
    at = jnp.asarray((points.numpy() + 1) / 2)
    values, slopes = jax.jit(jax.vmap(functions))(at), jax.jit(jax.vmap(jax.jacfwd(functions)))(at) / 2
    ends = np.eye(num_basis)[[0, -1]]  # the functions interpolate
    return LineBasis(points, weights, *(torch.from_numpy(np.array(each)) for each in (values, slopes, ends)))


def _row_of_least_energy(
    method: str, problem: Problem, size: int, degree: int, basis_of: Callable[[int], LineBasis]
) -> PoissonRow:
    """Tries every rank with as many functions as the size allows; the error plays no part in the choice."""
    start, best = time.perf_counter(), None
    for rank in problem.ranks:
        num_basis = size // (2 * rank)
        if num_basis < max(degree + 1, rank + 2):
            continue
        basis = basis_of(num_basis)
        found = solve_ritz(problem, basis, rank)
        if best is None or found.energies[-1] < best[1].energies[-1]:
            best = basis, found
    seconds = time.perf_counter() - start
    if best is None:
        raise ValueError(
            f"size = {size}: two factors of degree {degree} take at least {2 * max(degree + 1, 3)} parameters."
        )
    basis, found = best
    left, right = basis.values @ found.factors
    return PoissonRow(
        problem.name,
        method,
        degree,
        size,
        rank=found.factors.shape[-1],
        num_parameters=found.factors.numel(),
        squared_l2_error=squared_l2_error(problem, basis.points, basis.weights, left @ right.mT),
        seconds=seconds,
        note="" if found.converged else "the sweeps ended before the tolerance was met",
    )


# -------------------------------------------------------------------------------------------------------------- peers


def fem_row(problem: Problem, size: int, degree: int) -> PoissonRow:
    """Bilinear (degree 1) or biquadratic finite elements of scikit-fem with nearly ``size`` nodes, boundary included.

    Raises:
        ModuleNotFoundError: Without scikit-fem.
    """
    import skfem
    from skfem.helpers import dot, grad

    cells = [max(1, round((math.sqrt(size) - 1) / degree))]
    cells.append(max(1, round((size / (degree * cells[0] + 1) - 1) / degree)))

    @skfem.BilinearForm
    def stiffness(u, v, _):  # noqa: ANN001, ANN202
        return dot(grad(u), grad(v))

    @skfem.LinearForm
    def load(v, where):  # noqa: ANN001, ANN202
        return problem.source(*torch.from_numpy(where.x)).numpy() * v

    @skfem.Functional
    def error(where):  # noqa: ANN001, ANN202
        return (where["found"] - problem.solution(*torch.from_numpy(where.x)).numpy()) ** 2

    start = time.perf_counter()
    mesh = skfem.MeshQuad.init_tensor(*(np.linspace(-1, 1, n + 1) for n in cells))
    element = skfem.ElementQuad1() if degree == 1 else skfem.ElementQuad2()
    basis = skfem.Basis(mesh, element, intorder=2 * degree + 6)
    found = skfem.solve(*skfem.condense(stiffness.assemble(basis), load.assemble(basis), D=basis.get_dofs()))
    seconds = time.perf_counter() - start
    squared = error.assemble(basis, found=basis.interpolate(found)).item()
    return PoissonRow(
        problem.name, "scikit-fem", degree, size, num_parameters=int(basis.N), squared_l2_error=squared, seconds=seconds
    )


def kan_row(problem: Problem, size: int, seeds: Sequence[int] = SEEDS, num_steps: int = KAN_STEPS) -> PoissonRow:
    """A KAN of pykan with one hidden layer and nearly ``size`` parameters, trained once per seed.

    The loss is a weight times the mean squared residual of the equation on a mesh, and the mean square of w on the
    boundary; the optimiser is pykan's L-BFGS, and the grid of the splines follows the samples every fifth step, as in
    pykan's example of a partial differential equation.

    Raises:
        ModuleNotFoundError: Without pykan.
        ValueError: If there are no seeds.
    """
    if not seeds:
        raise ValueError("seeds is empty; expected at least one.")
    runs = [_train_kan(problem, size, seed, num_steps) for seed in seeds]
    errors = tuple(run.squared_l2_error for run in runs)
    finite = [error for error in errors if error is not None]
    return replace(
        runs[0],
        squared_l2_error=median(finite) if finite else None,
        seconds=median(run.seconds for run in runs),
        errors=errors,
        note=f"{num_steps} steps of L-BFGS" + f", {len(errors) - len(finite)} diverged" * (len(finite) < len(errors)),
    )


def _train_kan(problem: Problem, size: int, seed: int, num_steps: int) -> PoissonRow:
    from kan import KAN, LBFGS

    degree = 3
    width = max(1, round(size / (3 * (KAN_CELLS + degree + 2))))  # 3 edges to a hidden node; 2 scales beside a spline
    model = KAN([2, width, 1], grid=KAN_CELLS, k=degree, seed=seed, symbolic_enabled=False, auto_save=False).double()
    model.save_act = False
    line = torch.linspace(-1, 1, KAN_SIDE, dtype=torch.float64)
    inside = torch.cartesian_prod(line, line).requires_grad_()
    on_boundary = inside.detach()[(inside.detach().abs() == 1).any(-1)]
    source = problem.source(*inside.detach().mT)
    parameters = [p for layer in model.act_fun for p in layer.parameters() if p.requires_grad]
    never = {f"tolerance_{name}": 1e-32 for name in ("grad", "change", "ys")}
    optimizer = LBFGS(parameters, lr=1, history_size=10, line_search_fn="strong_wolfe", **never)

    def loss() -> Tensor:
        optimizer.zero_grad()
        (slopes,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
        laplacian = sum(torch.autograd.grad(slopes[:, i].sum(), inside, create_graph=True)[0][:, i] for i in range(2))
        value = PDE_WEIGHT * (laplacian + source).square().mean() + model(on_boundary).square().mean()
        value.backward()
        return value

    start = time.perf_counter()
    for step in range(num_steps):
        if step % 5 == 0 and step < 50:
            model.update_grid_from_samples(inside.detach())
        optimizer.step(loss)
    seconds = time.perf_counter() - start

    nodes, weights = UniformBSpline(64, 0, -1.0, 1.0).quadrature(3)
    with torch.no_grad():
        found = model(torch.cartesian_prod(nodes, nodes)).view(len(nodes), -1)
    squared = squared_l2_error(problem, nodes, weights, found)
    return PoissonRow(
        problem.name,
        "pykan",
        degree,
        size,
        num_parameters=sum(p.numel() for p in parameters),
        squared_l2_error=squared if math.isfinite(squared) else None,
        seconds=seconds,
    )


def _across(t: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The line through a value at t = -1 and one at t = 1."""
    return ((1 - t) * low + (1 + t) * high) / 2
