r"""Parts of the study of VSNA that have peers: solvers of the same equations, and finite elements for each query."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.vsna_fields import MAX_POINTS, PlumeError, SolvedField, TrainFits, on_grid, relative_l2
from eval.vsna_peers import PinnProblem, heat_pinn, plume_pinn, solve_amen, train_pinn
from eval.vsna_study import MAX_RANK, REFERENCE, cp_model, plain
from leviathan.vsna import VsnaConfig, VsnaModel
from sna_core.assembly import least_squares
from sna_core.components import grow
from sna_core.discretisation import Discretisation
from sna_core.operators import Operator, Problem
from training import elements
from training.vsna_plume import plume_profile, plume_reference
from training.vsna_problems import build
from training.vsna_references import heat, heat_initial

GOALS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)  # relative errors, to which times are compared
NUM_POINTS = 4000  # of space and time, for each draw of parameters, at which errors of queries are measured
NUM_TIMED = 3
NUM_PARAMETERS = {"heat": 1, "plume": 2, "laser": 3}  # the last axes: what a finite element solve takes one value of

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PeerRow:
    """One field of one method.

    Attributes:
        problem: ``"heat"`` or ``"plume"``.
        method: ``"train"`` and ``"cp"`` are ours; ``"greedy"`` is our control; ``"amen"``, ``"pinn"``.
        setting: What was asked of it.
        num_parameters: Numbers that it keeps.
        rank: Components, or the largest inner rank.
        relative_l2: Error over the box; of a network at random points.
        seconds: From the problem to the field.
        note: What else there is to say.
    """

    problem: str
    method: str
    setting: str
    num_parameters: int | None = None
    rank: int | None = None
    relative_l2: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclass(frozen=True)
class GoalRow:
    """How soon methods come down to an error.

    Attributes:
        problem: Its name.
        goal: The relative error.
        seconds: By method, the fastest of its fields with at most that error; methods without one are missing.
    """

    problem: str
    goal: float
    seconds: dict[str, float]


@dataclass(frozen=True)
class PeerSizes:
    """How much is done of one problem.

    Attributes:
        num_cells: Of its axes; None for those of the ready problem.
        tolerances: Residuals at which our solves stop.
        amen: Tolerances of AMEn.
        amen_rank: Its largest rank.
        ranks: Of sums of products.
        greedy_rank: Components of the greedy ones.
        pinn_seconds: Of the longer training.
    """

    num_cells: Mapping[str, int] | None
    tolerances: tuple[float, ...]
    amen: tuple[float, ...]
    amen_rank: int
    ranks: tuple[int, ...]
    greedy_rank: int
    pinn_seconds: float


PEER_SIZES = {
    "heat": PeerSizes(
        num_cells=None,
        tolerances=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
        amen=(1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8),
        amen_rank=60,
        ranks=(1, 2, 3, 4, 6, 8),
        greedy_rank=16,
        pinn_seconds=60.0,
    ),
    "plume": PeerSizes(
        num_cells=dict.fromkeys("xyz", 24),
        tolerances=(6e-2, 1e-2, 2e-3, 1.35e-3),
        amen=(1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5),
        amen_rank=100,
        ranks=(5, 10, 20, 40, 80),
        greedy_rank=40,
        pinn_seconds=60.0,
    ),
}


def peers_part(
    out: Path, *, sizes: Mapping[str, PeerSizes] = PEER_SIZES, num_samples: int = 100_000, seed: int = 0
) -> dict[str, Any]:
    """Errors and times of VSNA and its peers on the same two problems, and how soon each comes down to an error.

    Args:
        out: Folder of the plume's reference.
        sizes: By problem.
        num_samples: Points at which a network's error is measured.
        seed: Of all random starts and points.
    """
    rows = []
    for name, size in sizes.items():
        options = {"reference": out / REFERENCE} if name == "plume" else {}
        problem = build(name, num_cells=size.num_cells, **options).problem
        if name == "plume":
            reference = plume_reference(out / REFERENCE)
            error = PlumeError(problem, reference)
            exact, network = reference, plume_pinn()
        else:
            exact, network = heat, heat_pinn(heat_initial)

            def error(solved: SolvedField) -> float:
                return relative_l2(solved, heat)

        rows += _solved(name, problem, size, error, seed)
        cp = max((row for row in rows if (row.problem, row.method) == (name, "cp")), key=lambda row: row.rank)
        rows += _networks(name, network, exact, cp, size.pinn_seconds, num_samples, seed)
    return {"rows": plain(rows), "goals": plain(goals(rows)), "num_samples": num_samples, "seed": seed}


def _solved(
    name: str, problem: Problem, size: PeerSizes, error: Callable[[SolvedField], float], seed: int
) -> list[PeerRow]:
    """Rows of ours, of AMEn and of the greedy sum of products: all in the same bases."""
    rows, report = [], None
    for tolerance in size.tolerances:
        model = VsnaModel(VsnaConfig.for_problem(problem, rank=MAX_RANK, decomposition="tensor_train"))
        report = model.solve(problem, tolerance=tolerance, seed=seed)
        solved = SolvedField.of_model(model)
        about = (f"residual {tolerance:g}", solved.num_parameters, report.rank, error(solved), report.seconds)
        rows.append(PeerRow(name, "train", *about, note="" if report.stopped_by == "tolerance" else report.message))
    fits = TrainFits(problem, model)
    for rank in tqdm(size.ranks, desc=f"{name}, sums of products", unit="rank"):
        start = time.perf_counter()
        fit = fits.components(rank, seed)
        seconds = report.seconds + time.perf_counter() - start
        solved = fits.field(fit)
        kept = solved.field.factors[0].shape[1]
        rows.append(PeerRow(name, "cp", f"{rank} fitted", solved.num_parameters, kept, error(solved), seconds))
    return [*rows, *_amen(name, problem, size, error, fits.order, seed), *_greedy(name, problem, size, error, seed)]


def _amen(
    name: str,
    problem: Problem,
    size: PeerSizes,
    error: Callable[[SolvedField], float],
    order: Sequence[int],
    seed: int,
) -> list[PeerRow]:
    """AMEn of torchTT on Galerkin's equations in space, time and parameters, in the order of axes that ours chose."""
    rows = []
    for tolerance in size.amen:
        setting = f"tolerance {tolerance:g}"
        start = time.perf_counter()
        discretisation = Discretisation(problem)
        matrices, right = galerkin_system(discretisation, order)
        assembled = time.perf_counter() - start
        try:
            found = solve_amen(matrices, right, tolerance=tolerance, max_rank=size.amen_rank, seed=seed)
        except ImportError:
            return [PeerRow(name, "amen", "", note="torchTT is not installed")]
        except ValueError as failure:
            rows.append(PeerRow(name, "amen", setting, note=str(failure)))
            continue
        solved = SolvedField.of_train(discretisation, found.cores, order)
        rank = max(core.shape[2] for core in solved.field.cores)
        note = "" if found.converged else f"residual {found.residual:.2g}, not {tolerance:g}"
        if not found.compiled:
            note = "; ".join(filter(None, [note, "without torchTT's C++ part"]))
        seconds = assembled + found.seconds
        rows.append(PeerRow(name, "amen", setting, solved.num_parameters, rank, error(solved), seconds, note))
    return rows


def galerkin_system(
    discretisation: Discretisation, order: Sequence[int]
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    r"""Galerkin's equations :math:`\langle \psi, L w \rangle = \langle \psi, f - L g \rangle` as Kronecker products.

    Args:
        discretisation: Of a linear problem; its trial functions are orthonormal and test the equation as well.
        order: The axes, the first of a train first.

    Returns:
        Matrices of each term of the operator and axis (dimension, dimension), and vectors of each term of the
        right-hand side and axis (dimension,).
    """
    matrices: list[list[Tensor]] = [[] for _ in discretisation.terms]
    lift = discretisation.lift
    right: list[list[Tensor]] = [[] for _ in range(len(discretisation.source) + len(matrices) * lift.rank)]
    for place, i in enumerate(order):
        space = discretisation.spaces[i]
        tests = (space.basis.dense(space.points) @ space.trial).mT * space.weights

        def along(term: Any, space: Any = space) -> Operator:
            return term.operators.get(space.axis.name, Operator())

        columns = [
            (1.0 if place else term.coefficient) * (tests @ along(term).values(space.points))
            for term in discretisation.source
        ]
        for k, term in enumerate(discretisation.terms):
            scale = 1.0 if place else term.coefficient
            applied = tests @ space.values(along(term))
            matrices[k].append(scale * applied @ space.trial)
            columns += [*((scale if place else -scale) * applied @ lift.factors[i]).mT]
        for term, column in zip(right, columns, strict=True):
            term.append(column)
    return matrices, right


def _greedy(
    name: str, problem: Problem, size: PeerSizes, error: Callable[[SolvedField], float], seed: int
) -> list[PeerRow]:
    """One product after another, each left as it is: the proper generalised decomposition of least squares."""
    times: list[float] = []
    start = time.perf_counter()
    discretisation = Discretisation(problem)
    form, _ = least_squares(discretisation)
    factors = grow(
        form,
        size.greedy_rank,
        greedy=True,
        generator=torch.Generator().manual_seed(seed),
        on_step=lambda rank, value: times.append(time.perf_counter() - start),
    )
    rows = []
    for rank in sorted({*(2**k for k in range(size.greedy_rank.bit_length())), size.greedy_rank}):
        solved = SolvedField.of_components(discretisation, [factor[:, :rank] for factor in factors])
        kept = solved.field.factors[0].shape[1]
        about = (solved.num_parameters, kept, error(solved), times[rank - 1])
        rows.append(PeerRow(name, "greedy", f"{rank} added", *about))
    return rows


def _networks(
    name: str,
    problem: PinnProblem,
    exact: Function,
    cp: PeerRow,
    longer: float,
    num_samples: int,
    seed: int,
) -> list[PeerRow]:
    """Networks of as many parameters as our largest sum of products, trained as long as it took, and longer."""
    low, high = (torch.tensor(ends, dtype=torch.float64) for ends in (problem.low, problem.high))
    generator = torch.Generator().manual_seed(seed)
    points = low + (high - low) * torch.rand(num_samples, len(low), generator=generator, dtype=torch.float64)
    true = exact(points)
    rows = []
    for words, budget in (("as long as the sum of products", cp.seconds), ("longer", longer)):
        trained = train_pinn(problem, num_parameters=cp.num_parameters, seconds=budget, seed=seed)
        wrong = ((trained(points).double() - true).norm() / true.norm()).item()
        setting = f"{words}, {trained.num_steps:,} steps"
        rows.append(PeerRow(name, "pinn", setting, trained.num_parameters, None, wrong, trained.seconds))
    return rows


def goals(rows: Sequence[PeerRow]) -> list[GoalRow]:
    """The times at which each method has come down to each of ``GOALS`` that any of them reaches."""
    found = []
    for problem in dict.fromkeys(row.problem for row in rows):
        for goal in GOALS:
            seconds: dict[str, float] = {}
            for row in rows:
                if row.problem == problem and row.relative_l2 is not None and row.relative_l2 <= goal:
                    seconds[row.method] = min(row.seconds, seconds.get(row.method, math.inf))
            if seconds:
                found.append(GoalRow(problem, goal, seconds))
    return found


# --------------------------------------------------------------------------------------------------- speed of a query


@dataclass(frozen=True)
class QueryRow:
    """One way to get the field of space and time for one set of parameters.

    Attributes:
        problem: Its name.
        method: ``"P1"`` or ``"P2"`` of scikit-fem, ``"field"`` on the nodes and times of these, or ``"scattered"``, the
            field at as many random points.
        size: In words.
        num_points: Of space and time at which a query gives values: all nodes at all times.
        relative_l2: Error at random points of space and time, over all draws of parameters.
        seconds: Of a query, the median.
    """

    problem: str
    method: str
    size: str
    num_points: int
    relative_l2: float
    seconds: float


@dataclass(frozen=True)
class SpeedUp:
    """The field against finite elements of its accuracy, or of the best that were tried.

    Attributes:
        problem, method, size, num_points: Of the finite elements.
        element_error, field_error: Relative.
        element_seconds: Of a solve.
        field_seconds: Of values on their nodes at all times, which the field has by products of matrices.
        scattered_seconds: Of values at as many random points.
        ratio: Of the elements' time to the field's.
        offline_seconds: Of the field's solve.
        break_even: Queries from which on the field has cost less; None if it never does.
    """

    problem: str
    method: str
    size: str
    num_points: int
    element_error: float
    field_error: float
    element_seconds: float
    field_seconds: float
    scattered_seconds: float
    ratio: float
    offline_seconds: float
    break_even: int | None


HEAT_GRIDS = {1: ((32, 8), (128, 16), (512, 32), (1024, 48)), 2: ((16, 8), (32, 16), (64, 32), (128, 48), (256, 64))}
PLUME_GRIDS = {1: ((16, 8), (24, 12), (48, 24)), 2: ((12, 10), (16, 12), (24, 16), (32, 20))}


def speed_part(
    out: Path,
    *,
    heat_grids: Mapping[int, Sequence[tuple[int, ...]]] = HEAT_GRIDS,
    plume_grids: Mapping[int, Sequence[tuple[int, ...]]] = PLUME_GRIDS,
    heat_rank: int = 8,
    num_draws: int = 3,
    seed: int = 0,
    **plume: Any,
) -> dict[str, Any]:
    """Times of a query: one whole solve by finite elements, or the field's values at as many points of space and time.

    Args:
        out: Folder of the plume's reference and of the model that ``frontier`` kept.
        heat_grids: By degree, cells and time steps.
        plume_grids: Likewise; cells along each side.
        heat_rank: Components of the heat equation's field.
        num_draws: Of parameters.
        seed: Of draws and points.
        **plume: Sizes of the plume's field if there is none yet.
    """
    problem = build("heat").problem
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=heat_rank))
    report = model.solve(problem, tolerance=1e-9, seed=seed)
    warm = SolvedField.of_model(model)
    rows, speed_ups = queries("heat", warm, report.seconds, heat, _heat_elements, heat_grids, num_draws, seed)
    reference, kept = plume_reference(out / REFERENCE), cp_model(out, **plume)
    solved, offline = SolvedField.of_model(kept.model), kept.report["seconds"]
    more, other = queries("plume", solved, offline, reference, _plume_elements, plume_grids, num_draws, seed)
    return {"rows": plain([*rows, *more]), "speed_ups": plain([*speed_ups, *other]), "seed": seed}


Solver = Callable[..., elements.GridSolution]  # of parameters, degree, cells and time steps


def _heat_elements(parameters: Sequence[float], degree: int, num_cells: int, num_steps: int) -> elements.GridSolution:
    return elements.heat(*parameters, initial=heat_initial, num_cells=num_cells, degree=degree, num_steps=num_steps)


def _plume_elements(parameters: Sequence[float], degree: int, num_cells: int, num_steps: int) -> elements.GridSolution:
    def initial(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return plume_profile(x, 0) * plume_profile(y, 1) * plume_profile(z, 2)

    return elements.plume(*parameters, initial=initial, num_cells=num_cells, degree=degree, num_steps=num_steps)


def queries(
    name: str,
    solved: SolvedField,
    offline: float,
    exact: Function,
    solve: Solver,
    grids: Mapping[int, Sequence[tuple[int, ...]]],
    num_draws: int,
    seed: int,
) -> tuple[list[QueryRow], list[SpeedUp]]:
    """Finite elements of growing size until they are as accurate as the field, and the field's time beside theirs.

    Args:
        name: Of the problem: a key of ``NUM_PARAMETERS``.
        solved: The field, whose last axes are the parameters.
        offline: Seconds that its solve took.
        exact: The solution.
        solve: Of the parameters, the degree and a size of ``grids``.
        grids: By degree, cells and, last, time steps.
        num_draws: Of parameters.
        seed: Of draws and points.
    """
    bases = [solved.field.bases[solved.order.index(axis)] for axis in range(len(solved.order))]
    low, high = torch.tensor([[basis.low, basis.high] for basis in bases], dtype=torch.float64).unbind(-1)
    generator, points = torch.Generator().manual_seed(seed), []
    inputs = len(bases) - NUM_PARAMETERS[name]
    for _ in range(num_draws):
        drawn = low + (high - low) * torch.rand(NUM_POINTS, len(bases), generator=generator, dtype=torch.float64)
        drawn[:, inputs:] = drawn[0, inputs:].clone()
        points.append(drawn)
    true = torch.cat([exact(each) for each in points])

    def wrong(values: Sequence[Tensor]) -> float:
        return ((torch.cat(values) - true).norm() / true.norm()).item()

    own = wrong([solved(each) for each in points])
    rows, speed_ups = [], []
    for degree, sizes in grids.items():
        for *cells, num_steps in tqdm(sizes, desc=f"{name}, P{degree}", unit="size"):
            found = [solve(each[0, inputs:].tolist(), degree, *cells, num_steps) for each in points]
            error = wrong([torch.from_numpy(f(p[:, :inputs].numpy())) for f, p in zip(found, points, strict=True)])
            seconds = statistics.median(each.seconds for each in found)
            size = f"{' x '.join(map(str, cells))} cells, {num_steps} steps"
            peer = QueryRow(name, f"P{degree}", size, found[0].coefficients.size, error, seconds)
            rows.append(peer)
            if error <= own:
                break
        nodes = [torch.from_numpy(basis.doflocs[0]).sort().values for basis in found[0].bases]
        grid = [*nodes, torch.from_numpy(found[0].times), *points[0][:1, inputs:].mT]
        own_seconds = _median_seconds(lambda grid=grid: on_grid(solved.functions(grid), solved.order))
        scattered = _scattered_seconds(solved, torch.cat(points), peer.num_points)
        for method, taken in (("field", own_seconds), ("scattered", scattered)):
            rows.append(QueryRow(name, method, f"as many points as {peer.method}", peer.num_points, own, taken))
        gained = peer.seconds - own_seconds
        about = (peer.relative_l2, own, peer.seconds, own_seconds, scattered, peer.seconds / own_seconds, offline)
        even = math.ceil(offline / gained) if gained > 0 else None
        speed_ups.append(SpeedUp(name, peer.method, peer.size, peer.num_points, *about, even))
    return rows, speed_ups


def _median_seconds(task: Callable[[], Any]) -> float:
    times = []
    for _ in range(NUM_TIMED):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _scattered_seconds(solved: SolvedField, points: Tensor, count: int) -> float:
    """Of values at so many points, in parts, as they would not all be kept."""
    sizes = [MAX_POINTS] * (count // MAX_POINTS) + [count % MAX_POINTS]
    points = points.repeat(-(-max(sizes) // len(points)), 1)
    return _median_seconds(lambda: [solved(points[:size]) for size in sizes])
