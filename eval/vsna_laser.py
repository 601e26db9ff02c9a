"""Parts of the study of VSNA on the laser: a million queries, the melt pool under uncertainty, and its errors."""

import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from eval.vsna_comparison import queries
from eval.vsna_fields import SolvedField
from eval.vsna_study import RECORD, Kept, keep, plain, read_kept, report_as_json, save_arrays
from leviathan.vsna import VsnaConfig, VsnaModel
from training.elements import GridSolution, LaserElements
from training.laser import PowderBed, melt_pool_depth
from training.vsna_errors import LaserReference, laser_error, random_points
from training.vsna_problems import build

SLICES = "laser.safetensors"
RANK, TOLERANCE = 16, 1e-4  # of the train that is solved for where no model is given: a larger one is no better
NUM_BINS = 50
SPREAD = {"power": (150.0, 7.5), "speed": (0.5, 0.025), "shape": (1.5, 0.15)}  # mean and standard deviation: W, m/s, 1
SETTINGS = ({"power": 150.0, "speed": 0.3, "shape": 1.0}, {"power": 150.0, "speed": 0.7, "shape": 2.0})  # of slices
GRIDS = {
    1: ((20, 8, 16), (40, 14, 24), (60, 21, 32)),
    2: ((8, 4, 8), (12, 6, 10), (20, 8, 16)),
}  # cells along x, across, time steps
REACH = 2.0  # of slices, in beam radii


def laser_model(out: Path, given: Path | None, num_cells: Mapping[str, int] | None = None) -> Kept:
    """The model that `training.vsna` saved at ``given``; without one that of an earlier part, or a new solve.

    Raises:
        ValueError: If there is no model of the laser at ``given``.
    """
    problem = build("laser", num_cells=num_cells).problem
    if given is not None:
        if not (given / RECORD).is_file():
            raise ValueError(f"{given} holds no {RECORD}; make it by `python -m training.vsna` with vsna_laser.yaml.")
        model, record = VsnaModel.from_pretrained(given), json.loads((given / RECORD).read_text(encoding="utf-8"))
        if model.config.names != problem.names:
            raise ValueError(f"{given} has the axes {model.config.names}; expected {problem.names}.")
        return Kept(problem, model, record["solve"])
    folder = out / "models" / "laser"
    if kept := read_kept(folder, problem):
        return kept
    model = VsnaModel(VsnaConfig.for_problem(problem, rank=RANK, decomposition="tensor_train"))
    report = report_as_json(model.solve(problem, tolerance=TOLERANCE))
    return keep(folder, Kept(problem, model, report))


def sizes_of(kept: Kept) -> dict[str, Any]:
    """Of the model, for a record."""
    config = kept.model.config
    about = {name: kept.report[name] for name in ("residual", "stopped_by", "seconds")}
    sizes = {"decomposition": config.decomposition, "rank": config.rank, "train_ranks": config.train_ranks}
    return {**sizes, "num_parameters": kept.model.num_parameters(), **about}


# --------------------------------------------------------------------------------------------------------------- sweep


@dataclass(frozen=True)
class MemoryRow:
    """Memory of a sweep in a process of its own.

    Attributes:
        num_samples: How many.
        before_bytes: Resident before it, with the model read and a short sweep done.
        peak_bytes: The most that was resident after a block of its samples.
    """

    num_samples: int
    before_bytes: int
    peak_bytes: int


def sweep_part(
    out: Path,
    given: Path | None,
    *,
    num_samples: int = 1_000_000,
    num_repeats: int = 5,
    memory_samples: Sequence[int] = (1_000_000, 4_000_000, 16_000_000),
    num_depths: int = 4000,
    num_cells: Mapping[str, int] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Times and memory of sweeps over the whole box in single precision, and the depth of the melt pool.

    Args:
        out: Folder of the models.
        given: Folder of the laser's model, if there is one.
        num_samples: Queries of a sweep.
        num_repeats: Sweeps that are timed.
        memory_samples: Queries of those whose memory is measured.
        num_depths: Draws of the parameters.
        num_cells: Of the laser's axes where it is solved for.
        seed: Of all draws.
    """
    kept = laser_model(out, given, num_cells)
    results = [kept.model.sweep(None, num_samples, seed=seed) for _ in range(num_repeats)]
    points, table, times = random_points(kept.model, num_samples, seed).float(), kept.model.table(), []
    for _ in range(num_repeats):
        start = time.perf_counter()
        table(points)
        times.append(time.perf_counter() - start)
    last = results[-1]
    path = given or out / "models" / "laser"
    return {
        "model": sizes_of(kept),
        "num_samples": num_samples,
        "dtype": "float32",
        "sweep_seconds": [result.seconds for result in results],
        "median_seconds": statistics.median(result.seconds for result in results),
        "values_alone_seconds": statistics.median(times),
        "rise": {
            "unit": "K",
            **{name: getattr(last, name) for name in ("mean", "standard_deviation", "minimum", "maximum")},
            "levels": list(last.levels),
            "quantiles": list(last.quantiles),
        },
        "memory": plain(_memory_rows(path, memory_samples)),
        "depth": depths(kept.model, num_depths, seed),
        "seed": seed,
    }


def depths(model: VsnaModel, num_samples: int, seed: int) -> dict[str, Any]:
    """The melt pool's depth at the end of the track, in micrometres, for parameters that scatter as ``SPREAD`` says.

    Normal distributions, cut off at the ends of the model's intervals.
    """
    bed, generator = PowderBed(), torch.Generator().manual_seed(seed)
    axes = {axis.name: axis for axis in model.config.problem_axes}
    columns = [torch.full((num_samples,), axes["t"].high, dtype=torch.float64)]
    for name, (mean, deviation) in SPREAD.items():
        scale = bed.peclet(1.0) if name == "speed" else 1.0
        drawn = scale * (mean + deviation * torch.randn(num_samples, generator=generator, dtype=torch.float64))
        columns.append(drawn.clamp(axes[name].low, axes[name].high))
    counted, table = [0], model.table()

    def rise(points: Tensor) -> Tensor:
        counted[0] += len(points)
        return table(points)

    start = time.perf_counter()
    found = 1e6 * melt_pool_depth(rise, torch.stack(columns, 1), bed)
    seconds = time.perf_counter() - start
    counts, edges = torch.histogram(found.float(), NUM_BINS)
    levels = (0.05, 0.5, 0.95)
    return {
        "unit": "µm",
        "spread": {name: list(values) for name, values in SPREAD.items()},
        "num_samples": num_samples,
        "num_queries": counted[0],
        "seconds": seconds,
        "mean": found.mean().item(),
        "standard_deviation": found.std().item(),
        "levels": list(levels),
        "quantiles": found.quantile(found.new_tensor(levels)).tolist(),
        "counts": counts.long().tolist(),
        "edges": edges.tolist(),
    }


def _memory_rows(path: Path, counts: Sequence[int]) -> list[MemoryRow]:
    """Each in a process of its own."""
    rows = []
    for num_samples in counts:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(measure_memory, str(path), num_samples).result())
    return rows


def measure_memory(path: str, num_samples: int) -> MemoryRow:
    """Memory of a sweep in this process, which must have done no larger one before."""
    model = VsnaModel.from_pretrained(path)
    model.sweep(None, 1000)
    process, resident = psutil.Process(), []

    def noted(table: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
        values = table(points)
        resident.append(process.memory_info().rss)
        return values

    before = process.memory_info().rss
    model.sweep(None, num_samples, statistic=noted)
    return MemoryRow(num_samples, before, max(resident))


# --------------------------------------------------------------------------------------------------------------- errors


def laser_part(
    out: Path,
    given: Path | None,
    *,
    num_points: int = 200,
    grids: Mapping[int, Sequence[tuple[int, int, int]]] = GRIDS,
    num_draws: int = 3,
    slice_points: int = 80,
    elements: Mapping[str, Any] = {},
    num_cells: Mapping[str, int] | None = None,
    seed: int = 1,
) -> dict[str, Any]:
    """Errors of the laser's field against finite elements, its speed beside theirs, and slices, written to ``out``.

    Args:
        out: Folder of the models.
        given: Folder of the laser's model, if there is one.
        num_points: Of the error.
        grids: Of elements that the field's speed is compared with: by degree cells along x and across, and time steps.
        num_draws: Of parameters, for these.
        slice_points: Along the sides of slices.
        elements: Sizes of the elements that are the reference, if they are to be others.
        num_cells: Of the laser's axes where it is solved for.
        seed: Of points and draws.
    """
    kept = laser_model(out, given, num_cells)
    reference = _Reference(elements)
    error = laser_error(kept.model, reference=reference, num_points=num_points, seed=seed)
    solved = SolvedField.of_model(kept.model)
    offline = kept.report["seconds"]
    rows, speed_ups = queries("laser", solved, offline, reference, _elements, grids, num_draws, seed)
    slices = _slices(solved, reference, slice_points)
    save_arrays(out / SLICES, slices)
    return {
        "model": sizes_of(kept),
        "error": dataclasses.asdict(error),
        "rows": plain(rows),
        "speed_ups": plain(speed_ups),
        "settings": list(SETTINGS),
        "melting_rise": PowderBed().steel.melting_rise,
        "beam_radius": PowderBed().beam_radius,
        "seed": seed,
    }


class _Reference(LaserReference):
    """Elements of given sizes."""

    def __init__(self, sizes: Mapping[str, Any]):
        super().__init__()
        self.sizes = sizes

    def solve(self, power: float, peclet: float, shape: float) -> GridSolution:
        return LaserElements(peclet, self.bed, **self.sizes).solve(power, shape)


def _elements(parameters: Sequence[float], degree: int, along: int, across: int, num_steps: int) -> GridSolution:
    power, peclet, shape = parameters
    elements = LaserElements(peclet, num_cells=(along, across, across), degree=degree, num_steps=num_steps)
    return elements.solve(power, shape)


def _slices(solved: SolvedField, reference: LaserReference, num_points: int) -> dict[str, Tensor]:
    """By setting the rise at the end on the surface (y, x) and below the track (z, x), and there that of elements."""
    bed = PowderBed()
    intervals, arrays = bed.intervals, {}
    x = torch.linspace(*intervals["x"], 2 * num_points, dtype=torch.float64)
    side = torch.linspace(0, REACH, num_points, dtype=torch.float64)
    end = intervals["t"][1]
    for i, setting in enumerate(SETTINGS):
        parameters = (setting["power"], bed.peclet(setting["speed"]), setting["shape"])
        across, along = (each.flatten() for each in torch.meshgrid(side, x, indexing="ij"))
        still, last = torch.zeros_like(along), torch.full_like(along, end)
        given = [torch.full_like(along, value) for value in parameters]
        for name, place in (("surface", (along, across, still, last)), ("depth", (along, still, across, last))):
            arrays[f"{i}.{name}"] = solved(torch.stack([*place, *given], -1)).view(num_points, -1)
        depth = torch.from_numpy(reference.solve(*parameters)(torch.stack([along, still, across, last], -1).numpy()))
        arrays[f"{i}.elements"] = depth.view(num_points, -1)
    return arrays | {"x": x, "side": side}
