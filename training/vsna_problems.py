"""Problems that `training.vsna` solves, each with the solution that it is measured against.

A builder takes the sizes of the axes and what the problem leaves open, and gives a :class:`ReadyProblem`;
:data:`PROBLEMS` has them by name. Sizes are one number, or one for each of some axes by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from leviathan.vsna import VsnaModel
from sna_core.axis import Axis
from sna_core.graded import graded_breakpoints
from sna_core.operators import Operator, Problem, Product, Term, derivative, multiply
from training.laser import CELLS as LASER_CELLS
from training.laser import laser_problem
from training.vsna_errors import FieldError, LaserReference, laser_error, plume_error, random_error
from training.vsna_plume import PLUME_BOX, plume_profile, plume_reference
from training.vsna_references import (
    SHOCK_TIME,
    burgers_initial,
    heat,
    heat_initial,
    inviscid_burgers,
    poisson_ridge,
    poisson_ridge_source,
    poisson_sines,
    viscous_burgers,
)

Sizes = int | Mapping[str, int] | None
Measure = Callable[..., FieldError]

POISSON_AXES = ("x", "y", "z")
HEAT_CELLS = {"x": 32, "t": 24, "nu": 8}
BURGERS_CELLS = {"x": 48, "t": 24, "nu": 6}
INVISCID_CELLS = {"x": 64, "t": 24}
PLUME_CELLS = {"x": 32, "y": 32, "z": 32, "t": 8, "omega": 4, "D": 6}
PLUME_FILE = "runs/vsna/plume.safetensors"


@dataclass(frozen=True, eq=False)
class ReadyProblem:
    """A problem and what its solution is.

    Attributes:
        problem: To solve.
        reference: The solution at points (N, d), in the order of the problem's axes: (N,), float64. The plume's and the
            laser's are found when they are first asked for.
        origin: How it is known, in words.
        measure: Compares a model with it; takes the model, and ``num_points`` and ``seed`` by name.
    """

    problem: Problem
    reference: Callable[[Tensor], Tensor]
    origin: str
    measure: Measure


def build(name: str, **options: object) -> ReadyProblem:
    """The ready problem of that name.

    Raises:
        ValueError: If there is none, or it does not take an option.
    """
    if not isinstance(name, str) or name not in PROBLEMS:
        raise ValueError(f"problem.name = {name!r}; expected one of {', '.join(PROBLEMS)}.")
    if unknown := set(options) - set(OPTIONS[name]):
        raise ValueError(
            f"problem {name!r} has no option {', '.join(sorted(unknown))}; expected some of {', '.join(OPTIONS[name])}."
        )
    return PROBLEMS[name](**options)


def poisson(
    *, dimension: int = 2, source: str = "ridge", num_cells: Sizes = None, degree: Sizes = None
) -> ReadyProblem:
    r""":math:`-\Delta u = f` on the unit square or cube, zero on its faces.

    Args:
        dimension: 2 or 3.
        source: ``"sines"``, for a product of sines; or ``"ridge"``, for a ridge across the diagonal that is no short
            sum of products.
        num_cells: 24 if None.
        degree: 3 if None.
    """
    if dimension not in (2, 3):
        raise ValueError(f"dimension = {dimension!r}; expected 2 or 3.")
    if source not in POISSON_SOURCES:
        raise ValueError(f"source = {source!r}; expected one of {', '.join(POISSON_SOURCES)}.")
    names = POISSON_AXES[:dimension]
    cells, degrees = sizes(dict.fromkeys(names, 24), num_cells), sizes(dict.fromkeys(names, 3), degree)
    reference, right = POISSON_SOURCES[source]
    problem = Problem(
        axes=[Axis(name, 0, 1, num_cells=cells[name], degree=degrees[name], boundary="dirichlet") for name in names],
        operator=[Term(-1.0, **{name: derivative(2)}) for name in names],
        source=right(names),
    )
    return _exact(problem, reference, "in closed form")


def _sines_source(names: Sequence[str]) -> list[Term]:
    sine = multiply(lambda s: (math.pi * s).sin())
    return [Term(len(names) * math.pi**2, **dict.fromkeys(names, sine))]


def _ridge_source(names: Sequence[str]) -> Callable[..., Tensor]:
    def source_2d(x: Tensor, y: Tensor) -> Tensor:
        return poisson_ridge_source(torch.stack([x, y], -1))

    def source_3d(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return poisson_ridge_source(torch.stack([x, y, z], -1))

    return source_2d if len(names) == 2 else source_3d


POISSON_SOURCES = {"sines": (poisson_sines, _sines_source), "ridge": (poisson_ridge, _ridge_source)}


def heat_with_parameter(
    *, num_cells: Sizes = None, degree: Sizes = None, nu: tuple[float, float] = (1e-3, 1e-2)
) -> ReadyProblem:
    r""":math:`u_t = \nu u_{xx}` on [0, 1] for times from 0 to 1 and a range of diffusivities, from three sines.

    Args:
        num_cells: Those of ``HEAT_CELLS`` if None.
        degree: 5 along x and 3 along t and nu if None.
        nu: Lowest and highest diffusivity.
    """
    cells, degrees = sizes(HEAT_CELLS, num_cells), sizes({"x": 5, "t": 3, "nu": 3}, degree)
    low, high = interval("nu", nu)
    problem = Problem(
        axes=[
            Axis("x", 0, 1, num_cells=cells["x"], degree=degrees["x"], boundary="dirichlet"),
            Axis("t", 0, 1, num_cells=cells["t"], degree=degrees["t"]),
            Axis("nu", low, high, num_cells=cells["nu"], degree=degrees["nu"]),
        ],
        operator=[Term(t=derivative(1)), Term(-1.0, nu=_itself(), x=derivative(2))],
        initial={"t": [Term(x=multiply(heat_initial))]},
    )
    return _exact(problem, heat, "in closed form")


def burgers(
    *,
    num_cells: Sizes = None,
    degree: Sizes = None,
    nu: tuple[float, float] = (0.02, 0.1),
    finest: float = 0.4,
) -> ReadyProblem:
    r""":math:`u_t + u u_x = \nu u_{xx}` on [-1, 1] from :math:`-\sin \pi x`, for t from 0 to 1 and a range of nu.

    Args:
        num_cells: Those of ``BURGERS_CELLS`` if None; along x they are finest at the front, x = 0.
        degree: 5 along x and 3 along t and nu if None.
        nu: Lowest and highest viscosity.
        finest: Width of the cell at the front, as a fraction of an equal one.
    """
    cells, degrees = sizes(BURGERS_CELLS, num_cells), sizes({"x": 5, "t": 3, "nu": 3}, degree)
    low, high = interval("nu", nu)
    problem = Problem(
        axes=[
            _steep_axis(cells["x"], degrees["x"], finest),
            Axis("t", 0, 1, num_cells=cells["t"], degree=degrees["t"]),
            Axis("nu", low, high, num_cells=cells["nu"], degree=degrees["nu"]),
        ],
        operator=[Term(t=derivative(1)), Term(-1.0, nu=_itself(), x=derivative(2))],
        initial={"t": [Term(x=multiply(burgers_initial))]},
        nonlinear=[Product(Term(), Term(x=derivative(1)))],
    )
    return _exact(problem, viscous_burgers, "the transform of Cole and Hopf, by quadrature")


def burgers_inviscid(
    *, num_cells: Sizes = None, degree: Sizes = None, end_time: float = 0.25, finest: float = 0.25
) -> ReadyProblem:
    r""":math:`u_t + u u_x = 0` on [-1, 1] from :math:`-\sin \pi x`, before the shock at t = 1 / pi.

    Args:
        num_cells: Those of ``INVISCID_CELLS`` if None; along x they are finest where the shock will be, x = 0.
        degree: 5 if None.
        end_time: Below 1 / pi.
        finest: As of :func:`burgers`.
    """
    if not 0 < end_time < SHOCK_TIME:
        raise ValueError(f"end_time = {end_time}; expected a time above 0 and before the shock at {SHOCK_TIME:.4f}.")
    cells, degrees = sizes(INVISCID_CELLS, num_cells), sizes({"x": 5, "t": 5}, degree)
    problem = Problem(
        axes=[
            _steep_axis(cells["x"], degrees["x"], finest),
            Axis("t", 0, end_time, num_cells=cells["t"], degree=degrees["t"]),
        ],
        operator=[Term(t=derivative(1))],
        initial={"t": [Term(x=multiply(burgers_initial))]},
        nonlinear=[Product(Term(), Term(x=derivative(1)))],
    )
    return _exact(problem, inviscid_burgers, "along characteristics")


def _steep_axis(num_cells: int, degree: int, finest: float) -> Axis:
    edges = graded_breakpoints(-1.0, 1.0, num_cells, 0.0, finest * 2 / num_cells)
    return Axis("x", -1, 1, breakpoints=edges, degree=degree, boundary="dirichlet")


def plume(*, num_cells: Sizes = None, degree: Sizes = None, reference: str | Path = PLUME_FILE) -> ReadyProblem:
    r"""The rotating plume of :mod:`training.vsna_plume`: :math:`u_t + U \cdot \nabla u - D \Delta u = 0`, 6-D.

    Args:
        num_cells: Those of ``PLUME_CELLS`` if None.
        degree: 5 if None.
        reference: File of the solution that it is measured against, which is solved for where it is missing.
    """
    cells, degrees = sizes(PLUME_CELLS, num_cells), sizes(dict.fromkeys(PLUME_CELLS, 5), degree)
    axes = [
        Axis(
            name,
            low,
            high,
            num_cells=cells[name],
            degree=degrees[name],
            boundary="dirichlet" if name in "xyz" else "free",
        )
        for name, (low, high) in PLUME_BOX.items()
    ]
    off_centre = multiply(lambda s: s - 0.5)
    problem = Problem(
        axes=axes,
        operator=[
            Term(t=derivative(1)),
            Term(-1.0, omega=_itself(), y=off_centre, x=derivative(1)),
            Term(omega=_itself(), x=off_centre, y=derivative(1)),
            *(Term(-1.0, D=_itself(), **{name: derivative(2)}) for name in "xyz"),
        ],
        initial={
            "t": [Term(**{name: multiply(partial(plume_profile, axis=i)) for i, name in enumerate("xyz")})],
        },
    )

    @cache
    def solution():  # noqa: ANN202
        return plume_reference(reference)

    def measure(model: VsnaModel, **options: int) -> FieldError:
        return plume_error(model, solution(), **options)

    return ReadyProblem(
        problem, lambda points: solution()(points), "a Legendre-Galerkin method in x and y, sines in z", measure
    )


def laser(*, num_cells: Sizes = None, degree: int = 3) -> ReadyProblem:
    """Laser powder bed fusion in seven inputs, of :mod:`training.laser`, with its default slab and ranges.

    Args:
        num_cells: As there if None.
        degree: Of all axes but the power.
    """
    problem = laser_problem(num_cells=sizes(LASER_CELLS, num_cells), degree=degree)
    reference = LaserReference()
    return ReadyProblem(
        problem,
        reference,
        "quadratic finite elements (scikit-fem) at each speed",
        partial(laser_error, reference=reference),
    )


PROBLEMS: dict[str, Callable[..., ReadyProblem]] = {
    "poisson": poisson,
    "heat": heat_with_parameter,
    "burgers": burgers,
    "burgers_inviscid": burgers_inviscid,
    "plume": plume,
    "laser": laser,
}
"""The builders by name."""

OPTIONS = {name: tuple(builder.__kwdefaults__) for name, builder in PROBLEMS.items()}
"""What each of them takes."""


def sizes(defaults: Mapping[str, int], given: Sizes) -> dict[str, int]:
    """A size for each axis: the default, or the one that is given for all or for some by name.

    Raises:
        ValueError: If a name is no axis.
    """
    if given is None:
        return dict(defaults)
    if not isinstance(given, Mapping):
        return dict.fromkeys(defaults, given)
    if unknown := set(given) - set(defaults):
        raise ValueError(f"sizes are given for {sorted(unknown)}, which are no axes; the axes are {list(defaults)}.")
    return {**defaults, **given}


def interval(name: str, given: Sequence[float]) -> tuple[float, float]:
    """A lower and a higher number.

    Raises:
        ValueError: If it is none.
    """
    numbers = isinstance(given, Sequence) and len(given) == 2 and all(isinstance(n, int | float) for n in given)
    if not (numbers and given[0] < given[1]):
        raise ValueError(f"{name} = {given!r}; expected its lowest and highest value.")
    return float(given[0]), float(given[1])


def _itself() -> Operator:
    return multiply(lambda s: s)


def _exact(problem: Problem, reference: Callable[[Tensor], Tensor], origin: str) -> ReadyProblem:
    return ReadyProblem(problem, reference, origin, partial(random_error, reference=reference))
