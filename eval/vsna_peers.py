r"""Peers of VSNA: torchTT's AMEn on the same linear system, and networks trained by the equation's residual.

:func:`solve_amen` takes a system that is a sum of Kronecker products, as `sna_core` solves it too. :func:`train_pinn`
trains a network of a given number of parameters, whose initial and boundary values are exact, on the same equation and
box; :func:`heat_pinn` and :func:`plume_pinn` are two such problems. `eval.vsna` measures both.
"""

import importlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from training.vsna_plume import PLUME_BOX, PLUME_CENTRE, PLUME_WIDTH, plume_profile

ROUNDING = 1e-14  # of the operator and the right-hand side, relative: what is left of equal terms
PRECONDITIONERS = {"none": None, "central": "c", "right": "r"}  # torchTT's letters

ADAM_SHARE = 0.3  # of the steps or the seconds; L-BFGS gets the rest
LBFGS_POINTS = 4  # times those of a step of Adam: L-BFGS keeps to its points for a round
LBFGS_ROUND = 100  # evaluations of the loss
CHECK_POINTS = 4  # times those of a step of Adam, to choose between rounds
NEAR = 1.5  # of points near the plume
CHUNK = 65_536  # points evaluated at once


# ---------------------------------------------------------------------------------------------------------------- AMEn


@dataclass(frozen=True, eq=False)
class AmenResult:
    r"""A tensor train :math:`u[i_1, \dots, i_d] = U_1[i_1] \cdots U_d[i_d]` from AMEn.

    Attributes:
        cores: Of each axis (rank, size, next rank), float64; the first and the last rank are 1.
        residual: :math:`\|A u - f\| / \|f\|`.
        converged: Whether the residual is at most the tolerance that was asked for.
        seconds: Of the solve, with the set-up of the operator.
        ranks: The d - 1 inner ranks.
        operator_ranks: Those of the operator.
        compiled: Whether torchTT's C++ part was used. Its Python part does the same in some more time.
    """

    cores: list[Tensor]
    residual: float
    converged: bool
    seconds: float
    ranks: tuple[int, ...]
    operator_ranks: tuple[int, ...]
    compiled: bool

    @property
    def num_parameters(self) -> int:
        """Numbers in the cores."""
        return sum(core.numel() for core in self.cores)


def solve_amen(
    matrices: Sequence[Sequence[Tensor]],
    right: Sequence[Sequence[Tensor]],
    *,
    tolerance: float = 1e-6,
    max_rank: int = 200,
    max_sweeps: int = 30,
    preconditioner: Literal["none", "central", "right"] = "central",
    seed: int = 0,
) -> AmenResult:
    r"""Solves a square system of Kronecker products in tensor trains by AMEn, as torchTT has it.

    .. math::
        \sum_k \bigotimes_i A_k^{(i)}\; u = \sum_q \bigotimes_i f_q^{(i)}

    The order of the axes is that of the train. Operator and right-hand side are rounded to their least ranks. AMEn
    measures the residual in the Euclidean norm, so that bases should be orthonormal: with a Gram matrix M = L L^T of an
    axis, pass :math:`L^{-1} A L^{-T}` and :math:`L^{-1} f`.

    Args:
        matrices: Of each term and axis (size, size).
        right: Of each term of the right-hand side and axis (size,).
        tolerance: Relative residual at which it stops.
        max_rank: Largest rank of the solution, apart from what its last sweep adds.
        max_sweeps: Largest number of sweeps.
        preconditioner: Of the local systems: a block of Jacobi for each pair of ranks, or for each left rank.
        seed: Of the random directions that it starts with.

    Returns:
        The train. torchTT does not tell whether it converged: ``converged`` compares the residual.

    Raises:
        ValueError: If the terms do not fit one another or are not finite, if the right-hand side is zero, or if AMEn
            breaks down, as it does on some singular systems.
        ImportError: If torchTT is not installed.

    Source: S. V. Dolgov and D. V. Savostyanov, SIAM J. Sci. Comput. 36 (2014).
    """
    torchtt = _torchtt()
    matrices = [[matrix.detach().double() for matrix in term] for term in matrices]
    right = [[vector.detach().double() for vector in term] for term in right]
    _check_system(matrices, right)
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(f"preconditioner is {preconditioner!r}; expected one of {', '.join(PRECONDITIONERS)}.")
    started = time.perf_counter()
    operator = torchtt.TT(_cores_of_sum(matrices)).round(ROUNDING)
    data = torchtt.TT(_cores_of_sum(right)).round(ROUNDING)
    if data.norm() <= ROUNDING * sum(math.prod(vector.norm().item() for vector in term) for term in right):
        raise ValueError("the right-hand side is zero, and so is the solution.")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            solution = torchtt.solvers.amen_solve(
                operator,
                data,
                nswp=max_sweeps,
                eps=tolerance,
                rmax=max_rank,
                preconditioner=PRECONDITIONERS[preconditioner],
            )
        seconds = time.perf_counter() - started
        residual = float((operator @ solution - data).norm() / data.norm())
    except RuntimeError as error:  # of a local system
        raise ValueError(f"AMEn broke down; is the system singular? torchTT says: {error}") from error
    if not math.isfinite(residual):
        raise ValueError("AMEn broke down: its solution is not finite; is the system singular?")
    return AmenResult(
        cores=[core.detach().clone() for core in solution.cores],
        residual=residual,
        converged=residual <= tolerance,
        seconds=seconds,
        ranks=tuple(int(rank) for rank in solution.R[1:-1]),
        operator_ranks=tuple(int(rank) for rank in operator.R[1:-1]),
        compiled=torchtt.cpp_enabled(),
    )


def _torchtt() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each of its files, where it has no C++ part
        try:
            return importlib.import_module("torchtt")
        except ImportError as error:
            raise ImportError('AMEn needs torchTT: PIP_CONSTRAINT=constraints.txt pip install -e ".[amen]".') from error


def _check_system(matrices: list[list[Tensor]], right: list[list[Tensor]]) -> None:
    if not matrices or not right:
        raise ValueError(f"{len(matrices)} terms of the operator and {len(right)} of the right-hand side; give some.")
    sizes = [len(vector) for vector in right[0]]
    if len(sizes) < 2:
        raise ValueError(f"{len(sizes)} axes; a tensor train needs at least 2.")
    for name, terms, expected in (
        ("matrices", matrices, [(size, size) for size in sizes]),
        ("right", right, [(size,) for size in sizes]),
    ):
        for k, term in enumerate(terms):
            shapes = [tuple(factor.shape) for factor in term]
            if shapes != expected:
                raise ValueError(f"{name}[{k}] has the shapes {shapes}; expected {expected}, one for each axis.")
            if not all(factor.isfinite().all() for factor in term):
                raise ValueError(f"{name}[{k}] is not finite.")


def _cores_of_sum(terms: list[list[Tensor]]) -> list[Tensor]:
    """Cores (rank, ..., next rank) of a sum of Kronecker products, with as many ranks as terms."""
    factors = [torch.stack(axis, -1) for axis in zip(*terms, strict=True)]  # (..., terms)
    middle = [factor.movedim(-1, 0).unsqueeze(-1) * _diagonal(factor) for factor in factors[1:-1]]
    return [factors[0].unsqueeze(0), *middle, factors[-1].movedim(-1, 0).unsqueeze(-1)]


def _diagonal(factor: Tensor) -> Tensor:
    """The identity (terms, 1, ..., 1, terms) between the ranks of a factor (..., terms)."""
    return torch.eye(factor.shape[-1], dtype=factor.dtype).view(-1, *[1] * (factor.dim() - 1), factor.shape[-1])


# ------------------------------------------------------------------------------------- networks trained by the residual

Function = Callable[[Tensor], Tensor]  # points (N, d) -> (N,)
Sampler = Callable[[int, torch.Generator], Tensor]  # number of points N -> points (N, d), float64


@dataclass(frozen=True, eq=False)
class PinnProblem:
    r"""An equation on a box, and fields that fulfil its initial and boundary conditions whatever the network says.

    .. math::
        u(x) = \mathrm{lift}(x) + \mathrm{vanish}(x)\, \mathrm{net}(x)

    Attributes:
        names: Of the d inputs.
        low: Lower ends of their intervals.
        high: Upper ends.
        sample: Draws points inside. Where they are dense the residual counts for more.
        lift: Fulfils the conditions.
        vanish: Zero where they hold.
        residual: Of points (N, d), which require gradients, and u there (N,): the residual (N,), by :func:`partials`.
    """

    names: tuple[str, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    sample: Sampler
    lift: Function
    vanish: Function
    residual: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PinnResult:
    """A trained network.

    Attributes:
        problem: What it was trained on.
        network: Of the inputs scaled to [-1, 1].
        num_parameters: Weights and biases of the network.
        width: Of its hidden layers.
        loss: Mean squared residual at points it was not trained on.
        start_loss: The same before training.
        num_steps: As many as were done.
        seconds: Of training.
    """

    problem: PinnProblem
    network: nn.Module
    num_parameters: int
    width: int
    loss: float
    start_loss: float
    num_steps: int
    seconds: float

    @torch.no_grad()
    def __call__(self, points: Tensor) -> Tensor:
        """The field u (N,) at points (N, d), in the network's dtype."""
        dtype = next(self.network.parameters()).dtype
        return torch.cat([_field(self.problem, self.network, chunk.to(dtype)) for chunk in points.split(CHUNK)])


def uniform_sampler(low: Sequence[float], high: Sequence[float]) -> Sampler:
    """Draws points that are uniform in a box."""
    low, high = (torch.tensor(end, dtype=torch.float64) for end in (low, high))
    return lambda count, generator: (
        low + (high - low) * torch.rand(count, len(low), generator=generator, dtype=torch.float64)
    )


def partials(values: Tensor, points: Tensor) -> Tensor:
    """First derivatives (N, d) of values (N,), each a function of its own point (N, d); differentiable in turn."""
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]


def pinn_width(num_inputs: int, num_layers: int, num_parameters: int) -> int:
    r"""The width w of hidden layers whose network comes nearest to a number of parameters.

    :math:`(d + 1) w + (L - 1)(w + 1) w + w + 1` of d inputs and L hidden layers, weights and biases.

    Raises:
        ValueError: If a network of width 1 is larger already.
    """
    if num_inputs < 1 or num_layers < 1:
        raise ValueError(f"{num_inputs} inputs and {num_layers} hidden layers; expected at least 1 of each.")
    if num_parameters < (least := _count(num_inputs, num_layers, 1)):
        raise ValueError(f"num_parameters is {num_parameters}; the smallest such network has {least}.")
    width = 1
    while _count(num_inputs, num_layers, width + 1) <= num_parameters:
        width += 1
    return min(width, width + 1, key=lambda w: abs(_count(num_inputs, num_layers, w) - num_parameters))


def _count(num_inputs: int, num_layers: int, width: int) -> int:
    return (num_inputs + 1) * width + (num_layers - 1) * (width + 1) * width + width + 1


def train_pinn(
    problem: PinnProblem,
    *,
    num_parameters: int,
    num_layers: int = 4,
    num_steps: int | None = None,
    seconds: float | None = None,
    num_points: int = 1024,
    learning_rate: float = 5e-3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: bool = True,
) -> PinnResult:
    r"""Trains a network with tanh by the mean squared residual at random points of the box.

    First Adam, with new points at every step and a learning rate that falls to zero as a cosine; then L-BFGS in rounds,
    with new points for each. A round is taken back if it raises the loss at points that are kept apart. The budget is
    a time or a number of steps, each the loss and its gradient at ``num_points`` points.

    Args:
        problem: The equation, its box and its conditions.
        num_parameters: Of the network, about.
        num_layers: Hidden layers.
        num_steps: About so many; an evaluation of L-BFGS has more points and counts as several.
        seconds: Time instead of ``num_steps``.
        num_points: Points of a step of Adam.
        learning_rate: That Adam starts with.
        dtype: Of network and points.
        seed: Of the start and the points.
        progress: Whether to show a bar on a terminal.

    Returns:
        The network as the best round left it.

    Raises:
        ValueError: If not exactly one budget is given, or it is not positive; if num_parameters is too small; if the
            loss stops being finite.
    """
    if (num_steps is None) == (seconds is None):
        raise ValueError(f"num_steps is {num_steps} and seconds is {seconds}; give one of the two.")
    budget = num_steps if seconds is None else seconds
    if not budget > 0:
        raise ValueError(f"the budget is {budget}; it must be positive.")
    width = pinn_width(len(problem.names), num_layers, num_parameters)
    network = _network(problem, width, num_layers, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    unit, spent, started = "steps" if seconds is None else "s", 0, time.perf_counter()
    bar = tqdm(total=round(budget), desc="network", unit=f" {unit}", disable=None if progress else True)

    def sample(count: int) -> Tensor:
        return problem.sample(count, generator).to(dtype)

    def share() -> float:
        return (spent if seconds is None else time.perf_counter() - started) / budget

    def loss_at(points: Tensor) -> Tensor:
        points = points.requires_grad_()
        return problem.residual(points, _field(problem, network, points)).square().mean()

    def step(points: Tensor) -> Tensor:
        nonlocal spent
        network.zero_grad()
        loss = loss_at(points)
        loss.backward()
        spent += len(points) // num_points
        bar.update(min(round(share() * budget), bar.total) - bar.n)
        return loss

    check = sample(CHECK_POINTS * num_points)
    start_loss = loss_at(check).item()
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    while (done := share() / ADAM_SHARE) < 1:
        optimizer.param_groups[0]["lr"] = learning_rate * (1 + math.cos(math.pi * done)) / 2
        if not step(sample(num_points)).isfinite():
            raise ValueError(f"the loss is not finite after {spent} steps; learning_rate {learning_rate} is too large.")
        optimizer.step()
    best, kept = loss_at(check).item(), _copy(network)
    while share() < 1:
        left = (1 - share()) * spent / share() / LBFGS_POINTS  # evaluations, from what those so far took
        most = max(1, min(LBFGS_ROUND, round(left)))
        optimizer = torch.optim.LBFGS(
            network.parameters(), max_iter=most, max_eval=most, history_size=50, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip
        points = sample(LBFGS_POINTS * num_points)
        optimizer.step(lambda points=points: step(points))
        if (now := loss_at(check).item()) < best:
            best, kept = now, _copy(network)
        else:
            network.load_state_dict(kept)
        bar.set_postfix(loss=f"{best:.1e}", refresh=False)
    bar.close()
    return PinnResult(
        problem=problem,
        network=network.requires_grad_(False),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        width=width,
        loss=best,
        start_loss=start_loss,
        num_steps=spent,
        seconds=time.perf_counter() - started,
    )


def _field(problem: PinnProblem, network: nn.Module, points: Tensor) -> Tensor:
    low, high = points.new_tensor(problem.low), points.new_tensor(problem.high)
    scaled = (2 * points - low - high) / (high - low)
    return problem.lift(points) + problem.vanish(points) * network(scaled).squeeze(-1)


def _network(problem: PinnProblem, width: int, num_layers: int, dtype: torch.dtype, seed: int) -> nn.Sequential:
    sizes = [len(problem.names)] + [width] * num_layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = [(nn.Linear(*pair, dtype=dtype), nn.Tanh()) for pair in itertools.pairwise(sizes)]
        network = nn.Sequential(*itertools.chain(*hidden), nn.Linear(width, 1, dtype=dtype))
        for layer in network[::2]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def heat_pinn(initial: Function | None = None, nu: tuple[float, float] = (1e-3, 1e-2)) -> PinnProblem:
    r"""The heat equation for every diffusivity: :math:`u_t = \nu u_{xx}`, x and t in [0, 1], zero at both ends.

    Inputs x, t, nu. u - initial vanishes with :math:`4 x (1 - x)\, t`.

    Args:
        initial: u at t = 0, a function of x (N,) that is zero at both ends; None takes :math:`\sin \pi x`.
        nu: The interval of the diffusivity.
    """
    initial = initial or (lambda x: (math.pi * x).sin())

    def residual(points: Tensor, u: Tensor) -> Tensor:
        first = partials(u, points)
        u_xx = partials(first[:, 0], points)[:, 0]
        return first[:, 1] - points[:, 2] * u_xx

    low, high = (0.0, 0.0, nu[0]), (1.0, 1.0, nu[1])
    return PinnProblem(
        names=("x", "t", "nu"),
        low=low,
        high=high,
        sample=uniform_sampler(low, high),
        lift=lambda points: initial(points[:, 0]),
        vanish=lambda points: _bubble(points[:, :1]) * points[:, 1],
        residual=residual,
    )


def plume_pinn() -> PinnProblem:
    r"""The rotating plume of `training.vsna_plume` for every rate of rotation and diffusivity.

    .. math::
        u_t - \omega (y - \tfrac12) u_x + \omega (x - \tfrac12) u_y - D \Delta u = 0

    Inputs x, y, z, t, omega, D; zero at the walls. At t = 0 it is the Gaussian there, from whose factors in x, y and z
    the straight lines between their values at the walls are taken, so that it is zero there, too; they are smaller than
    4e-6. Half of the points are drawn near the plume, which fills little of the box: from a Gaussian ``NEAR`` times as
    wide as it would be in free space.
    """
    low, high = zip(*PLUME_BOX.values(), strict=True)
    uniform = uniform_sampler(low, high)

    def sample(count: int, generator: torch.Generator) -> Tensor:
        points = uniform(count, generator)
        t, omega, diffusivity = points[:, 3:].unbind(-1)
        start = points.new_tensor(PLUME_CENTRE) - 0.5
        cos, sin = (omega * t).cos(), (omega * t).sin()
        x, y = cos * start[0] - sin * start[1], sin * start[0] + cos * start[1]
        centre = 0.5 + torch.stack([x, y, start[2].expand_as(t)], -1)
        spread = NEAR * (PLUME_WIDTH**2 + 2 * diffusivity * t).sqrt()
        near = centre + spread[:, None] * torch.randn(count, 3, generator=generator, dtype=points.dtype)
        chosen = ((near > 0) & (near < 1)).all(-1) & (torch.arange(count) % 2 == 0)
        points[:, :3] = torch.where(chosen[:, None], near, points[:, :3])
        return points

    def lift(points: Tensor) -> Tensor:
        ends = points.new_tensor([0.0, 1.0])
        product = points.new_ones(len(points))
        for axis, x in enumerate(points[:, :3].unbind(-1)):
            at_low, at_high = plume_profile(ends, axis)
            product = product * (plume_profile(x, axis) - (1 - x) * at_low - x * at_high)
        return product

    def residual(points: Tensor, u: Tensor) -> Tensor:
        first = partials(u, points)
        laplacian = sum(partials(first[:, i], points)[:, i] for i in range(3))
        x, y, _, _, omega, diffusivity = points.unbind(-1)
        wind = omega * ((x - 0.5) * first[:, 1] - (y - 0.5) * first[:, 0])
        return first[:, 3] + wind - diffusivity * laplacian

    return PinnProblem(
        names=tuple(PLUME_BOX),
        low=low,
        high=high,
        sample=sample,
        lift=lift,
        vanish=lambda points: _bubble(points[:, :3]) * points[:, 3],
        residual=residual,
    )


def _bubble(x: Tensor) -> Tensor:
    """Zero at both ends of [0, 1] of any input (N, inputs), 1 in the middle of all: (N,)."""
    return (4 * x * (1 - x)).prod(-1)
