"""How far a solved field is from the solution: over the whole box, and at its worst point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor
from tqdm.auto import tqdm

from leviathan.vsna import VsnaModel
from training.elements import GridSolution, LaserElements
from training.laser import PowderBed
from training.vsna_plume import PlumeReference, plume_rules

NUM_POINTS = 200_000
NUM_LARGEST = 20_000  # points at which the plume's largest error is looked for: a value of the reference is costly
PER_CELL = 4  # Gauss points along x, y and z of the plume
NUM_OTHERS = (12, 6, 8)  # along t, omega and D, in which it is smooth
POINTS_PER_DRAW = 10  # of the laser, at one draw of its parameters
NUM_LASER_POINTS = 200
NEAR_BEAM = {"x": (-2.0, 1.0), "y": (0.0, 1.5), "z": (0.0, 1.5)}  # in beam radii: where the rise is large


@dataclass(frozen=True)
class FieldError:
    """The distance of a field from the solution.

    Attributes:
        relative_l2: Root mean square of the error, as a fraction of that of the solution.
        largest: Largest error, in the units of the solution.
        largest_of_peak: That, as a fraction of the largest value of the solution; of the laser, of the peak for the
            same parameters.
        num_points: At which the largest error was looked for.
        rule: How it was measured, in words.
    """

    relative_l2: float
    largest: float
    largest_of_peak: float
    num_points: int
    rule: str


@torch.no_grad()
def random_error(
    model: VsnaModel, *, reference: Callable[[Tensor], Tensor], num_points: int = NUM_POINTS, seed: int = 0
) -> FieldError:
    """The error at points that are drawn evenly from the model's box."""
    points = random_points(model, num_points, seed)
    exact = reference(points)
    error = model(points).double() - exact
    largest = error.abs().max().item()
    return FieldError(
        relative_l2=(error.norm() / exact.norm()).item(),
        largest=largest,
        largest_of_peak=largest / exact.abs().max().item(),
        num_points=num_points,
        rule=f"{num_points} points drawn evenly from the box",
    )


def random_points(model: VsnaModel, num_points: int, seed: int = 0) -> Tensor:
    """Points (num_points, num_axes) that are drawn evenly from the model's box, in float64.

    Raises:
        ValueError: If ``num_points`` is below 1.
    """
    if not isinstance(num_points, int) or num_points < 1:
        raise ValueError(f"num_points = {num_points!r}; expected an integer of at least 1.")
    low, high = torch.tensor([[a.low, a.high] for a in model.config.problem_axes], dtype=torch.float64).unbind(-1)
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(num_points, len(low), dtype=low.dtype, generator=generator)


# --------------------------------------------------------------------------------------------------------------- plume


@torch.no_grad()
def plume_error(
    model: VsnaModel, reference: PlumeReference, *, num_points: int = NUM_LARGEST, seed: int = 0
) -> FieldError:
    """The error of the plume in L2 by Gauss quadrature on the model's own cells, and the largest at random points.

    Args:
        model: Of the plume.
        reference: Its solution.
        num_points: At which to look for the largest error.
        seed: Of these.
    """
    bases = [axis.basis for axis in model.config.problem_axes]
    rules = [basis.quadrature(PER_CELL) for basis in bases[:3]]
    rules += plume_rules((1, 1, 1, *NUM_OTHERS))[3:]
    grid = reference.grid(rules)
    relative_l2 = grid.relative_l2(_on_grid(model, [points for points, _ in rules]))
    at_random = random_error(model, reference=reference, num_points=num_points, seed=seed)
    return replace(
        at_random,
        relative_l2=relative_l2,
        rule=f"relative L2 by {' x '.join(str(len(points)) for points, _ in rules)} Gauss points, along x, y and z "
        f"{PER_CELL} in each cell; the largest at {at_random.rule}",
    )


def _on_grid(model: VsnaModel, points: Sequence[Tensor]) -> Callable[[int, int, int], Tensor]:
    """A function of the numbers of the points along t, omega and D, that gives u on the grid of x, y and z."""
    order = model.config.core_order
    kept = [axis for axis in order if axis < 3]
    dense = [model.field.bases[order.index(axis)].dense(points[axis]) for axis in kept]

    def values(*node: int) -> Tensor:
        held = {order.index(3 + i): points[3 + i][n].item() for i, n in enumerate(node)}
        field = model.field.restrict(held)
        if field.is_train:
            tables = [torch.einsum("nb,rbs->rns", *pair) for pair in zip(dense, field.coefficients(), strict=True)]
            found = reduce(lambda a, b: torch.tensordot(a, b, 1), tables)[0, ..., 0]
        else:
            first, second, third = (b @ c for b, c in zip(dense, field.coefficients(), strict=True))
            found = (first[:, None] * second) @ third.mT
        return found.permute([kept.index(axis) for axis in range(3)])

    return values


# --------------------------------------------------------------------------------------------------------------- laser


class LaserReference:
    """The rise in K by finite elements, at points (N, 7) as of :func:`training.laser.laser_problem`.

    One factorisation for each speed and one solution for each power and shape, so that points should share these.
    """

    def __init__(self, bed: PowderBed | None = None):
        self.bed = bed or PowderBed()

    def solve(self, power: float, peclet: float, shape: float) -> GridSolution:
        """The field of x, y, z and t for one draw of the parameters."""
        return LaserElements(peclet, self.bed).solve(power, shape)

    def __call__(self, points: Tensor) -> Tensor:
        """(N, 7) -> (N,)."""
        found = points.new_zeros(len(points), dtype=torch.float64)
        draws, number = points[:, 4:].unique(dim=0, return_inverse=True)
        for i, draw in enumerate(draws.tolist()):
            at = number == i
            found[at] = torch.from_numpy(self.solve(*draw)(points[at, :4].numpy()))
        return found


@torch.no_grad()
def laser_error(
    model: VsnaModel, *, reference: LaserReference, num_points: int = NUM_LASER_POINTS, seed: int = 0
) -> FieldError:
    """The error at random points of the laser's box: of each draw of the parameters, ten of space and time.

    Half of these are drawn evenly from the slab, most of which stays cold, and half from :data:`NEAR_BEAM`.

    Args:
        model: Of the laser.
        reference: Its solution.
        num_points: A multiple of ten.
        seed: Of the points.

    Raises:
        ValueError: If ``num_points`` is no positive multiple of ten.
    """
    if not isinstance(num_points, int) or num_points < 1 or num_points % POINTS_PER_DRAW:
        raise ValueError(f"num_points = {num_points!r}; expected a positive multiple of {POINTS_PER_DRAW}.")
    points = random_points(model, num_points, seed)
    near = torch.arange(num_points) % 2 == 0
    for i, axis in enumerate(model.config.problem_axes[:3]):
        low, high = NEAR_BEAM[axis.name]
        share = (points[near, i] - axis.low) / (axis.high - axis.low)
        points[near, i] = low + (high - low) * share
    errors, exact, of_peak = [], [], []
    for part in tqdm(points.split(POINTS_PER_DRAW), desc="error", unit=" draws", disable=None):
        part[:, 4:] = part[0, 4:]
        solution = reference.solve(*part[0, 4:].tolist())
        exact.append(torch.from_numpy(solution(part[:, :4].numpy())))
        errors.append(model(part).double() - exact[-1])
        of_peak.append(errors[-1].abs().max().item() / solution.coefficients.max())
    error = torch.cat(errors)
    return FieldError(
        relative_l2=(error.norm() / torch.cat(exact).norm()).item(),
        largest=error.abs().max().item(),
        largest_of_peak=float(max(of_peak)),
        num_points=num_points,
        rule=f"{num_points} points, {POINTS_PER_DRAW} of space and time at each of {num_points // POINTS_PER_DRAW} "
        "random draws of power, speed and shape: one half drawn evenly from the slab, the other near the beam",
    )
