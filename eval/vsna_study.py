r"""Parts of the study of VSNA: convergence in cells and functions, the plume's error against size, and its pictures."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from eval.vsna_fields import PlumeError, SolvedField, TrainFits, relative_l2
from leviathan.vsna import VsnaConfig, VsnaModel
from sna_core.axis import Axis
from sna_core.operators import Problem, Term, derivative
from sna_core.solve import SolveReport
from training.provenance import write_json
from training.vsna_plume import PLUME_BOX, PlumeReference, plume_reference
from training.vsna_problems import build
from training.vsna_references import heat, poisson_ridge

TOLERANCE = 1e-12  # of solves whose error is to be that of the axes
COMPRESSION = 1e-12  # of their sources: the least that there is
MAX_RANK = 120
NUM_FITTED = 3  # sizes, the largest ones, that a slope is fitted to
ROUNDED = 1e-12  # errors below this are rounding, and tell no rate
RECORD = "record.json"  # beside a model
MAX_SWEEPS = 9  # of the plume's trains: two at each cut down to 1e-5, one at the next
CELLS, CP_RANK = 32, 160  # of the plume's sum of products
FORMS = ("cp", "tucker", "tensor_train")
FRONTIER_RANKS = {16: (10, 20), 24: (20, 40), 32: (80, 160)}
REFERENCE = "plume_reference.safetensors"
SLICES = "plume.safetensors"
SLICE_TIMES = (0.0, 0.5, 1.0)
DOMAIN = 2 * math.pi  # a period


# --------------------------------------------------------------------------------------------------------- convergence


@dataclass(frozen=True)
class ConvergenceRow:
    """One solve.

    Attributes:
        problem: Its name.
        kind: Of the axes' functions.
        degree: Of splines.
        size: Cells along the finest axis, or functions along each.
        num_parameters, rank: Of the train that was solved.
        relative_l2: Error over the box by Gauss quadrature in each cell.
        residual, stopped_by, seconds: As in the solver's report.
    """

    problem: str
    kind: str
    degree: int | None
    size: int
    num_parameters: int
    rank: int
    relative_l2: float
    residual: float
    stopped_by: str
    seconds: float


@dataclass(frozen=True)
class RateRow:
    """How fast the error falls.

    Attributes:
        problem, kind, degree: As of the rows.
        sizes: That it was fitted to.
        slope: Of splines, of log error over log cells; of spectral axes the decades per function.
        expected: Of splines, what is asked: -(degree + 1).
        theory: Of splines, what is known: the same, or -2 (degree - 1) if that is less of a fall and the squared
            residual of a second derivative is minimised.
        least_error: Of all sizes.
    """

    problem: str
    kind: str
    degree: int | None
    sizes: tuple[int, ...]
    slope: float
    expected: int | None
    theory: int | None
    least_error: float


def convergence_part(
    *,
    degrees: Sequence[int] = (1, 2, 3),
    cells: Sequence[int] = (8, 16, 32, 64),
    heat_degrees: Sequence[int] = (2, 3),
    heat_cells: Sequence[int] = (16, 24, 32, 48),
    functions: Sequence[int] = (6, 10, 14, 18, 22, 26),
) -> dict[str, Any]:
    """Error against cells on the Poisson and the heat equation, and against functions on spectral axes."""
    jobs: list[tuple[str, str, int | None, int, Problem, Callable[[Tensor], Tensor]]] = []
    for source in ("sines", "ridge"):
        for degree in degrees:
            for n in cells:
                ready = build("poisson", source=source, num_cells=n, degree=degree)
                jobs.append((f"poisson_{source}", "bspline", degree, n, ready.problem, ready.reference))
    for degree in heat_degrees:
        for n in heat_cells:
            problem = build("heat", num_cells={"x": n, "t": n // 2, "nu": n // 4}, degree=degree).problem
            jobs.append(("heat", "bspline", degree, n, problem, heat))
    ridge, warm = build("poisson", source="ridge").problem, build("heat").problem
    for n in functions:
        for kind in ("chebyshev", "legendre"):
            jobs.append(("poisson_ridge", kind, None, n, _spectral(ridge, kind, n), poisson_ridge))
        jobs.append(("heat", "legendre", None, n, _spectral(warm, "legendre", n), heat))
        jobs.append(("periodic", "fourier", None, n - n % 2 + 1, periodic_problem(n - n % 2 + 1), periodic_solution))
    rows = []
    for name, kind, degree, size, problem, exact in tqdm(jobs, desc="convergence", unit="solve"):
        model = VsnaModel(VsnaConfig.for_problem(problem, rank=MAX_RANK, decomposition="tensor_train"))
        report = model.solve(problem, tolerance=TOLERANCE, progress=False)
        error = relative_l2(SolvedField.of_model(model), exact)
        rest = (report.num_parameters, report.rank, error, report.residual, report.stopped_by, report.seconds)
        rows.append(ConvergenceRow(name, kind, degree, size, *rest))
    return {"rows": plain(rows), "rates": plain(rates(rows))}


def _spectral(problem: Problem, kind: str, num_basis: int) -> Problem:
    """The same problem with other functions along all axes."""
    axes = [Axis(a.name, a.low, a.high, boundary=a.boundary, kind=kind, num_basis=num_basis) for a in problem.axes]
    return dataclasses.replace(problem, axes=axes, compression=COMPRESSION)


def periodic_problem(num_basis: int) -> Problem:
    r""":math:`-\Delta u + u_x + u = f` for :func:`periodic_solution`, in Fourier series along both axes."""

    def source(x: Tensor, y: Tensor) -> Tensor:
        across, along = x.cos() * y.cos(), x.sin() * y.sin()
        s = x.sin() * y.cos()
        return s.exp() * (2 * s - across**2 - along**2 + across + 1)

    return Problem(
        axes=[Axis(name, 0, DOMAIN, kind="fourier", num_basis=num_basis, boundary="periodic") for name in "xy"],
        operator=[Term(-1.0, x=derivative(2)), Term(-1.0, y=derivative(2)), Term(x=derivative(1)), Term()],
        source=source,
        compression=COMPRESSION,
    )


def periodic_solution(points: Tensor) -> Tensor:
    r""":math:`e^{\sin x \cos y}`: (N, 2) -> (N,)."""
    return (points[:, 0].sin() * points[:, 1].cos()).exp()


def rates(rows: Sequence[ConvergenceRow]) -> list[RateRow]:
    """A row for each problem and kind of functions."""
    curves: dict[tuple[str, str, int | None], list[ConvergenceRow]] = {}
    for row in rows:
        curves.setdefault((row.problem, row.kind, row.degree), []).append(row)
    found = []
    for (problem, kind, degree), curve in curves.items():
        spectral = degree is None
        fitted = [row for row in curve if row.relative_l2 > ROUNDED]
        fitted = fitted if spectral else fitted[-NUM_FITTED:]
        sizes, errors = [row.size for row in fitted], [math.log10(row.relative_l2) for row in fitted]
        slope = fitted_slope(sizes if spectral else np.log10(sizes), errors)
        least = min(row.relative_l2 for row in curve)
        expected = theory = None
        if not spectral:
            expected = -degree - 1
            theory = max(expected, -2 * (degree - 1)) if problem == "heat" else expected
        found.append(RateRow(problem, kind, degree, tuple(sizes), slope, expected, theory, least))
    return found


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the line that is nearest in least squares."""
    return float(np.polyfit(x, y, 1)[0])


# ------------------------------------------------------------------------------------------------------------ frontier


@dataclass(frozen=True)
class FrontierRow:
    """One field of the plume.

    Attributes:
        form: ``"cp"``, ``"tucker"`` or ``"tensor_train"``.
        num_cells: Along x, y and z.
        rank: Components, that of the lift included; the largest inner rank of a train.
        num_parameters: Numbers that are kept.
        relative_l2: Error over the box.
        distance: From the train that was solved, or what was cut of it, as a fraction of its norm.
        seconds: From the problem to this field: the train's solve and the fit.
        fit_seconds: The latter.
        seed: Of the fit.
    """

    form: str
    num_cells: int
    rank: int
    num_parameters: int
    relative_l2: float
    distance: float
    seconds: float
    fit_seconds: float
    seed: int | None = None


@dataclass(frozen=True)
class Kept:
    """A model that parts of the study share.

    Attributes:
        problem: That it solves.
        model: Its solution.
        report: Of the solver, as in JSON.
    """

    problem: Problem
    model: VsnaModel
    report: Mapping[str, Any]


def keep(folder: Path, kept: Kept) -> Kept:
    """Writes it as `training.vsna` does, for :func:`read_kept`."""
    kept.model.save_pretrained(folder)
    write_json(folder / RECORD, {"solve": kept.report})
    return kept


def read_kept(folder: Path, problem: Problem) -> Kept | None:
    """What an earlier part kept; None if it did not, or of other axes."""
    if not (folder / RECORD).is_file():
        return None
    model = VsnaModel.from_pretrained(folder)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return Kept(problem, model, record["solve"]) if model.config.problem_axes == tuple(problem.axes) else None


def report_as_json(report: SolveReport) -> dict[str, Any]:
    """Of the solver."""
    return dataclasses.asdict(report) | {"residual_history": report.residual_history.tolist()}


def plume_train(out: Path, *, num_cells: int, max_sweeps: int = MAX_SWEEPS, **options: Any) -> Kept:
    """Solves for the plume in a train, or reads what an earlier part kept in ``out``."""
    problem = build("plume", num_cells=dict.fromkeys("xyz", num_cells) | options).problem
    folder = out / "models" / f"plume_{num_cells}"
    if kept := read_kept(folder, problem):
        return kept
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=MAX_RANK, decomposition="tensor_train"))
    report = model.solve(problem, tolerance=TOLERANCE, max_sweeps=max_sweeps)
    return keep(folder, Kept(problem, model, report_as_json(report)))


def cp_model(out: Path, *, num_cells: int = CELLS, rank: int = CP_RANK, **options: Any) -> Kept:
    """A sum of products fitted to :func:`plume_train`, as that keeps it."""
    train = plume_train(out, num_cells=num_cells, **options)
    folder = out / "models" / "plume_cp"
    if kept := read_kept(folder, train.problem):
        return kept
    fits, start = TrainFits(train.problem, train.model), time.perf_counter()
    fit = fits.components(rank, 0)
    return keep_cp(folder, train, fits.field(fit), time.perf_counter() - start)


def keep_cp(folder: Path, train: Kept, solved: SolvedField, fit_seconds: float) -> Kept:
    """Writes a fit to a train as a model."""
    model = VsnaModel(VsnaConfig.for_problem(train.problem, rank=solved.field.factors[0].shape[1]))
    model.field.load_state_dict(solved.field.state_dict())
    return keep(folder, Kept(train.problem, model, {"seconds": train.report["seconds"] + fit_seconds}))


def frontier_part(
    out: Path,
    *,
    ranks: Mapping[int, Sequence[int]] = FRONTIER_RANKS,
    tucker_ranks: Sequence[int] = (80, 240),
    seeds: Sequence[int] = (0, 1, 2),
    repeated_up_to: int = 20,
    cuts: Sequence[float] = (1e-2, 1e-3, 1e-4, 3e-5, 1e-5),
    max_sweeps: int = MAX_SWEEPS,
    **options: Any,
) -> dict[str, Any]:
    """Error of the plume against the size of fields, from one train for each number of cells.

    Args:
        out: Folder of the reference and the models, which later parts read.
        ranks: By cells along x, y and z, the components fitted to the train.
        tucker_ranks: Of fits that are cut to reduced bases, with the most cells.
        seeds: Of fits up to ``repeated_up_to`` components; larger ones have the first alone.
        repeated_up_to: See ``seeds``.
        cuts: Of trains.
        max_sweeps: Of each solve.
        **options: Cells along t, omega and D, if they are to be others.
    """
    reference = plume_reference(out / REFERENCE)
    rows, solves = [], []
    for num_cells, fitted in ranks.items():
        train = plume_train(out, num_cells=num_cells, max_sweeps=max_sweeps, **options)
        solves.append({"num_cells": num_cells, **train.report})
        sizes = _Sizes(num_cells, train, PlumeError(train.problem, reference))
        rows += sizes.trains(cuts)
        largest = num_cells == max(ranks)
        for rank in tqdm(sorted({*fitted, *(tucker_ranks if largest else ())}), desc=f"{num_cells} cells", unit="rank"):
            for seed in seeds if rank <= repeated_up_to else seeds[:1]:
                cp, tucker, field = sizes.components(rank, seed, reduce=largest and rank in tucker_ranks)
                rows += [cp] * (rank in fitted) + [tucker] * (tucker is not None)
                if largest and rank == max(fitted) and seed == seeds[0]:
                    keep_cp(out / "models" / "plume_cp", train, field, cp.fit_seconds)
    return {
        "rows": plain(rows),
        "solves": solves,
        "slopes": {form: frontier_slope([row for row in rows if row.form == form]) for form in FORMS},
        "seeds": list(seeds),
    }


class _Sizes:
    """Fields of several sizes from one train, with their errors."""

    def __init__(self, num_cells: int, train: Kept, error: PlumeError):
        self.num_cells, self.train, self.error = num_cells, train, error
        self.fits = TrainFits(train.problem, train.model)

    def trains(self, cuts: Sequence[float]) -> list[FrontierRow]:
        """The train itself and what is left of it after each cut."""
        rows = [self._row("tensor_train", SolvedField.of_model(self.train.model), self.train.report["rank"], 0.0, 0.0)]
        for cut in cuts:
            start = time.perf_counter()
            field = self.fits.rounded(cut)
            seconds = time.perf_counter() - start
            rows.append(
                self._row("tensor_train", field, max(core.shape[2] for core in field.field.cores), cut, seconds)
            )
        return rows

    def components(self, rank: int, seed: int, *, reduce: bool) -> tuple[FrontierRow, FrontierRow | None, SolvedField]:
        """A fit, the same in reduced bases if they are asked for, and the field of the former."""
        start = time.perf_counter()
        fit = self.fits.components(rank, seed)
        seconds = time.perf_counter() - start
        field = self.fits.field(fit)
        kept = field.field.factors[0].shape[1]
        cp = self._row("cp", field, kept, fit.distance, seconds, seed=seed)
        if not reduce:
            return cp, None, field
        start = time.perf_counter()
        fit = self.fits.reduced(fit)
        seconds += time.perf_counter() - start
        about = {"num_parameters": self.fits.reduced_size(fit), "seed": seed}
        return cp, self._row("tucker", self.fits.field(fit), kept, fit.distance, seconds, **about), field

    def _row(
        self,
        form: str,
        field: SolvedField,
        rank: int,
        distance: float,
        seconds: float,
        *,
        num_parameters: int | None = None,
        seed: int | None = None,
    ) -> FrontierRow:
        size = field.num_parameters if num_parameters is None else num_parameters
        total = self.train.report["seconds"] + seconds
        return FrontierRow(form, self.num_cells, rank, size, self.error(field), distance, total, seconds, seed)


def frontier(rows: Sequence[FrontierRow]) -> list[FrontierRow]:
    """Those with a lower error than all that are not larger."""
    kept: list[FrontierRow] = []
    for row in sorted(rows, key=lambda row: (row.num_parameters, row.relative_l2)):
        if not kept or row.relative_l2 < kept[-1].relative_l2:
            kept.append(row)
    return kept


def frontier_slope(rows: Sequence[FrontierRow]) -> float | None:
    """Of the frontier's log error over log parameters; None for less than two sizes."""
    best = frontier(rows)
    if len(best) < 2:
        return None
    return fitted_slope(*([math.log10(getattr(row, key)) for row in best] for key in ("num_parameters", "relative_l2")))


# -------------------------------------------------------------------------------------------------- slices of the plume


def plume_part(out: Path, *, num_points: int = 96, num_stacked: int = 4, **plume: Any) -> dict[str, Any]:
    """Slices of the sum of products that ``frontier`` kept, or of a new one, beside the exact plume.

    Over time at the middle of the parameters' intervals, and at the last time over both parameters.

    Args:
        out: Folder of the reference and the models, and of the slices that it writes.
        num_points: Along each side of a slice.
        num_stacked: Values of each parameter.
        **plume: Sizes of the field if there is none yet.
    """
    reference = plume_reference(out / REFERENCE)
    model = cp_model(out, **plume).model
    solved = SolvedField.of_model(model)
    middle = {name: (low + high) / 2 for name, (low, high) in PLUME_BOX.items()}
    over_time = [{**middle, "t": t} for t in SLICE_TIMES]
    omegas, diffusivities = (np.linspace(*PLUME_BOX[name], num_stacked).tolist() for name in ("omega", "D"))
    stacked = [{**middle, "t": 1.0, "omega": omega, "D": d} for d in diffusivities for omega in omegas]
    arrays = {}
    for name, places in (("time", over_time), ("stack", stacked)):
        field, exact = _slices(solved, reference, places, num_points)
        arrays |= {f"{name}.field": field, f"{name}.exact": exact}
    save_arrays(out / SLICES, arrays)
    errors = (arrays["stack.field"] - arrays["stack.exact"]).abs().amax((1, 2))
    return {
        "decomposition": model.config.decomposition,
        "rank": model.config.rank,
        "num_parameters": solved.num_parameters,
        "num_points": num_points,
        "times": list(SLICE_TIMES),
        "middle": middle,
        "omegas": omegas,
        "diffusivities": diffusivities,
        "largest_error_over_parameters": errors.max().item(),
    }


def _slices(
    solved: SolvedField, reference: PlumeReference, places: Sequence[Mapping[str, float]], num_points: int
) -> tuple[Tensor, Tensor]:
    """The field and the exact plume (places, y, x) at z, t, omega and D."""
    line = torch.linspace(0, 1, num_points, dtype=torch.float64)
    y, x = (each.flatten() for each in torch.meshgrid(line, line, indexing="ij"))
    found = []
    for place in places:
        points = torch.stack([x, y, *(torch.full_like(x, place[name]) for name in ("z", "t", "omega", "D"))], -1)
        found.append(torch.stack([solved(points), reference(points)]).view(2, num_points, num_points))
    return torch.stack(found).unbind(1)


def save_arrays(path: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes arrays in single precision, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: each.float().contiguous() for name, each in arrays.items()}, partial)
    partial.replace(path)


def plain(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Dataclasses as JSON has them."""
    return [dataclasses.asdict(row) for row in rows]
