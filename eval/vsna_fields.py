"""Fields of the study of VSNA: errors on tensor grids, and fits of fewer coefficients to a train that was solved."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from leviathan.vsna import VsnaModel
from sna_core.components import ComponentSolver, grow
from sna_core.discretisation import Discretisation
from sna_core.field import SeparableField, gauss
from sna_core.field_table import FieldTable
from sna_core.forms import QuadraticForm, distance_to
from sna_core.operators import Problem
from sna_core.tensor_train import Train
from training.vsna_plume import PlumeReference, plume_rules

Function = Callable[[Tensor], Tensor]  # points (N, d) -> (N,)

MAX_POINTS = 2**20  # of a grid at one time
EXTRA_POINTS = 2  # of quadrature in a cell, beyond those for products of two splines
PLUME_POINTS = 4  # in each cell along x, y and z
PLUME_NODES = (8, 5, 5)  # of Gauss-Legendre rules along t, omega and D, in which the plume is smooth
SAME = 1e-12  # relative: what a train's ranks are cut to when the lift is taken off
FINER = 1e-6  # of a train's norm: what frames leave out before a fit
NUM_POLISH = 20  # Gauss-Newton steps in reduced frames


@dataclass(frozen=True, eq=False)
class SolvedField:
    """A field, and the problem's axis of each of its parts."""

    field: SeparableField
    order: tuple[int, ...]

    @classmethod
    def of_model(cls, model: VsnaModel) -> "SolvedField":
        """Of a model that was solved."""
        return cls(model.field, tuple(model.config.core_order))

    @classmethod
    @torch.no_grad()
    def of_train(cls, discretisation: Discretisation, cores: Sequence[Tensor], order: Sequence[int]) -> "SolvedField":
        """From a train's cores in the trial bases; the lift is added."""
        spaces, lift = discretisation.spaces, discretisation.lift
        train = Train(tuple(cores)).mapped([spaces[i].trial for i in order])
        if lift.rank:
            train = train + Train.of_components([lift.factors[i] for i in order])
        field = SeparableField([spaces[i].basis for i in order], decomposition="tensor_train", rank=train.ranks)
        for parameter, core in zip(field.cores, train.cores, strict=True):
            parameter.copy_(core)
        return cls(field, tuple(order))

    @classmethod
    @torch.no_grad()
    def of_components(cls, discretisation: Discretisation, factors: Sequence[Tensor]) -> "SolvedField":
        """From factors (dimension, rank) in the trial bases, axis by axis of the problem; the lift is added."""
        spaces = discretisation.spaces
        own = [
            torch.cat([s.trial @ f, g], 1) for s, f, g in zip(spaces, factors, discretisation.lift.factors, strict=True)
        ]
        field = SeparableField([space.basis for space in spaces], rank=own[0].shape[1])
        for parameter, factor in zip(field.factors, own, strict=True):
            parameter.copy_(factor)
        return cls(field, tuple(range(len(spaces))))

    @property
    def num_parameters(self) -> int:
        """Coefficients that are kept."""
        return self.field.num_parameters()

    @cached_property
    def _table(self) -> FieldTable:
        return FieldTable(self.field, torch.float64)

    def __call__(self, points: Tensor) -> Tensor:
        """Values (N,) in float64 at points (N, d), whose columns are in the order of the problem's axes."""
        return self._table(points[:, list(self.order)])

    @torch.no_grad()
    def functions(self, points: Sequence[Tensor]) -> list[Tensor]:
        """Each part's functions at points (n,) of each of the problem's axes: (n, rank), of a train (r, n, r')."""
        pairs = zip(self.order, self.field.bases, self.field.coefficients(), strict=True)
        return [torch.einsum("nb,...br->...nr", basis.dense(points[i]), part) for i, basis, part in pairs]


@torch.no_grad()
def on_grid(functions: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Values on a tensor grid (n_1, ..., n_d), axis by axis of the problem, from :meth:`SolvedField.functions`."""
    is_train = functions[0].ndim == 3
    sizes = [values.shape[-2] for values in functions]
    # Two halves, of which one product of matrices is left: as few numbers as can be before it.
    cut = min(range(len(sizes) + 1), key=lambda k: math.prod(sizes[:k]) + math.prod(sizes[k:]))
    rank = 1 if is_train else functions[0].shape[1]
    left, right = functions[0].new_ones(1, rank), functions[0].new_ones(1, rank)  # (points, rank)
    for values in functions[:cut]:
        left = torch.tensordot(left, values, 1) if is_train else left.unsqueeze(1) * values
        left = left.flatten(0, 1)
    for values in functions[: cut - 1 if cut else None : -1]:
        if is_train:
            right = torch.einsum("rns,qs->nqr", values, right).flatten(0, 1)
        else:
            right = (values.unsqueeze(1) * right).flatten(0, 1)
    places = [order.index(axis) for axis in range(len(order))]
    return (left @ right.mT).view(sizes).permute(places)


@torch.no_grad()
def relative_l2(solved: SolvedField, exact: Function) -> float:
    """The error over the box, as a fraction of the exact solution, by Gauss points in each of the field's own cells.

    Args:
        solved: Of few axes: all points of a tensor grid are visited.
        exact: The solution.
    """
    rules = [gauss(solved.field.bases[solved.order.index(axis)], EXTRA_POINTS) for axis in range(len(solved.order))]
    points = [rule[0] for rule in rules]
    block = max(1, MAX_POINTS // math.prod(len(each) for each in points[1:]))
    sums = torch.zeros(2, dtype=torch.float64)
    for first, weight in zip(points[0].split(block), rules[0][1].split(block), strict=True):
        at = [first, *points[1:]]
        true = exact(torch.cartesian_prod(*at)).view([len(each) for each in at])
        squares = torch.stack([on_grid(solved.functions(at), solved.order) - true, true]).square()
        for weights in [*(rule[1] for rule in rules[:0:-1]), weight]:
            squares = squares @ weights
        sums += squares
    return math.sqrt(sums[0] / sums[1])


class PlumeError:
    """Errors of fields with the same cells against the plume, over the whole box.

    Args:
        problem: Whose cells the quadrature along x, y and z is aligned with.
        reference: The solution.
        num_nodes: Along t, omega and D.
    """

    def __init__(self, problem: Problem, reference: PlumeReference, num_nodes: Sequence[int] = PLUME_NODES):
        rules = [axis.basis.quadrature(PLUME_POINTS) for axis in problem.axes[:3]]
        self.grid = reference.grid([*rules, *plume_rules((1, 1, 1, *num_nodes))[3:]])

    def __call__(self, solved: SolvedField) -> float:
        """The relative error in L2."""
        functions, order = solved.functions([points for points, _ in self.grid.rules]), solved.order

        def values(*node: int) -> Tensor:
            at = dict(enumerate(node, start=3))
            parts = [f[..., at[axis], None, :] if axis in at else f for axis, f in zip(order, functions, strict=True)]
            return on_grid(parts, order)[..., 0, 0, 0]

        # One product of matrices for each node where the parts are matrices.
        return self.grid.relative_l2_cp(functions) if functions[0].ndim == 2 else self.grid.relative_l2(values)


# ---------------------------------------------------------------------------------- smaller fields than the one solved


@dataclass(frozen=True, eq=False)
class Fit:
    """Components that are near to a train, in its frames.

    Attributes:
        frames: (dimension, size) of each part of the train, in the trial bases.
        factors: (size, rank).
        distance: In L2 from the train, as a fraction of its norm.
    """

    frames: list[Tensor]
    factors: list[Tensor]
    distance: float


class TrainFits:
    """Sums of products, also in reduced bases, and trains of lower ranks, all near to a train that was solved once.

    Boundary and initial data stay exact: they are the lift, which is no part of the fits.

    Args:
        problem: That was solved.
        model: A train.
    """

    def __init__(self, problem: Problem, model: VsnaModel):
        self.discretisation = Discretisation(problem)
        spaces, lift, self.order = self.discretisation.spaces, self.discretisation.lift, model.config.core_order
        whole = Train(tuple(core.detach() for core in model.field.cores))
        if lift.rank:
            whole = whole + -Train.of_components([lift.factors[i] for i in self.order])
        self.train = whole.mapped([spaces[i].trial.mT @ spaces[i].gram(0) for i in self.order]).rounded(SAME)
        self.norm = self.train.norm()

    def components(self, rank: int, seed: int) -> Fit:
        """The nearest sum of so many products that was found."""
        frames, small = self.train.frames(FINER)
        form = self._distance(small)
        factors = grow(form, rank, generator=torch.Generator().manual_seed(seed))
        return Fit(frames, factors, self._relative(form, factors))

    def reduced(self, fit: Fit) -> Fit:
        """The same in frames that are no finer than the fit, improved in these."""
        frames, small = self.train.frames(fit.distance / 3)
        factors = [f.mT @ g @ c for f, g, c in zip(frames, fit.frames, fit.factors, strict=True)]
        form = self._distance(small)
        solver = ComponentSolver(form, factors)
        for _ in range(NUM_POLISH):
            solver.newton_step()
        return Fit(frames, solver.factors, self._relative(form, solver.factors))

    def field(self, fit: Fit) -> SolvedField:
        """The fit with the lift, in the axes' own bases."""
        whole = [frame @ factor for frame, factor in zip(fit.frames, fit.factors, strict=True)]
        return SolvedField.of_components(self.discretisation, self._by_axis(whole))

    def reduced_size(self, fit: Fit) -> int:
        """Numbers that are kept if frames and factors are: of an axis those of the lift's functions as well."""
        lift = self.discretisation.lift.factors
        sizes = [(len(g), m.shape[1] + g.shape[1]) for m, g in zip(self._by_axis(fit.frames), lift, strict=True)]
        rank = fit.factors[0].shape[1] + lift[0].shape[1]
        return sum(num_basis * size + size * rank for num_basis, size in sizes)

    def rounded(self, cut: float) -> SolvedField:
        """A train within that fraction of the norm."""
        return SolvedField.of_train(self.discretisation, self.train.rounded(cut).cores, self.order)

    def _by_axis(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [parts[self.order.index(axis)] for axis in range(len(self.order))]

    def _relative(self, form: QuadraticForm, factors: Sequence[Tensor]) -> float:
        return math.sqrt(max(0.0, ComponentSolver(form, factors).value())) / self.norm

    def _distance(self, small: Train) -> QuadraticForm:
        """With what the frames leave out."""
        return distance_to(small, [core.shape[1] for core in small.cores], self.norm**2)
