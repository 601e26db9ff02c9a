import builtins
import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from eval import poisson
from eval.poisson import (
    PROBLEMS,
    fem_row,
    inn_basis,
    inn_row,
    kan_row,
    khronos_row,
    poisson_study,
    solve_khronos,
    solve_ritz,
    spline_basis,
    squared_l2_error,
)
from sna_core.bspline import UniformBSpline

KAN, ROTATED = PROBLEMS
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)


def rate(small, large):
    """Order in which the L2 error falls with the number of cells along an axis."""
    (cells_small, error_small), (cells_large, error_large) = small, large
    return math.log(error_small / error_large) / 2 / math.log(cells_large / cells_small)


def error_on_a_finer_grid(problem, network):
    points, weights = UniformBSpline(97, 0, -1.0, 1.0).quadrature(4)
    grid = torch.cartesian_prod(points, points)
    with torch.no_grad():
        return squared_l2_error(problem, points, weights, network(grid).view(len(points), -1))


# ----------------------------------------------------------------------------------------------------------- problems


@each_problem
def test_source_is_minus_the_laplacian_of_the_solution(problem):
    x, y = (2 * torch.rand(2, 50, dtype=torch.float64) - 1).requires_grad_()
    value = problem.solution(x, y)
    laplacian = 0
    for axis in (x, y):
        (slope,) = torch.autograd.grad(value.sum(), axis, create_graph=True)
        laplacian = laplacian + torch.autograd.grad(slope.sum(), axis, retain_graph=True)[0]
    torch.testing.assert_close(problem.source(x, y), -laplacian, rtol=1e-9, atol=1e-9)


@each_problem
def test_solution_is_zero_on_the_boundary_and_lifted_it_is_the_exact_one(problem):
    t = torch.linspace(-1, 1, 31, dtype=torch.float64)
    for end in (-torch.ones_like(t), torch.ones_like(t)):
        for x, y in ((t, end), (end, t)):
            torch.testing.assert_close(problem.solution(x, y), torch.zeros_like(t), rtol=0, atol=1e-14)
            torch.testing.assert_close(problem.lift(x, y), problem.exact(x, y))


def test_the_first_problem_is_that_of_the_kan_paper_and_the_second_is_turned_by_30_degrees():
    x, y = torch.tensor([0.3, -0.9], dtype=torch.float64), torch.tensor([0.7, 0.2], dtype=torch.float64)
    u = torch.sin(torch.pi * x) * torch.sin(torch.pi * y**2)
    torch.testing.assert_close(KAN.exact(x, y), u)
    half, root = 0.5, 3**0.5 / 2
    torch.testing.assert_close(ROTATED.exact(root * x - half * y, half * x + root * y), u)
    grid = torch.linspace(-0.9, 0.9, 20, dtype=torch.float64)
    ranks = [int(torch.linalg.matrix_rank(p.solution(grid[:, None], grid), rtol=1e-9)) for p in PROBLEMS]
    assert ranks[0] == 1
    assert ranks[1] > 8


# ------------------------------------------------------------------------------------------------------------- solver


@pytest.mark.parametrize("degree", [2, 3, 4])
def test_error_falls_as_the_spline_space_allows(degree):
    errors = [
        (cells, error_on_a_finer_grid(KAN, solve_khronos(KAN, rank=1, num_cells=cells, degree=degree)))
        for cells in (16, 32)
    ]
    assert rate(*errors) >= degree + 1 - 0.3


@pytest.mark.parametrize(("degree", "bound"), [(2, 1e-13), (3, 1e-16)])
def test_512_coefficients_reach_the_published_figure(degree, bound):
    row = khronos_row(KAN, 512, degree)
    assert (row.rank, row.num_parameters) == (1, 512)
    assert row.squared_l2_error <= bound


def test_the_row_has_the_error_of_the_network():
    row = khronos_row(KAN, 64, 3)
    network = solve_khronos(KAN, rank=1, num_cells=29, degree=3)
    assert network.factors.numel() == row.num_parameters == 64
    assert row.squared_l2_error == pytest.approx(error_on_a_finer_grid(KAN, network), rel=1e-3)


@each_problem
def test_boundary_conditions_hold_exactly(problem):
    network = solve_khronos(problem, rank=2, num_cells=9, degree=3)
    t = torch.linspace(-1, 1, 11, dtype=torch.float64)
    ends = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    sides = torch.cat([torch.cartesian_prod(t, ends), torch.cartesian_prod(ends, t)])
    torch.testing.assert_close(network(sides), torch.zeros(44, 1, dtype=torch.float64), rtol=0, atol=1e-12)


def test_energy_never_rises_and_is_the_integral():
    basis = spline_basis(UniformBSpline(12, 3, -1.0, 1.0))
    found = solve_ritz(ROTATED, basis, 4)
    falls = -np.diff(found.energies)
    assert falls.min() > -1e-12
    left, right = basis.values @ found.factors
    left_slope, right_slope = basis.slopes @ found.factors
    density = (left_slope @ right.mT).square() / 2 + (left @ right_slope.mT).square() / 2
    density -= ROTATED.source(basis.points.unsqueeze(-1), basis.points) * (left @ right.mT)
    assert found.energies[-1] == pytest.approx((basis.weights @ density @ basis.weights).item(), rel=1e-10)


def test_full_rank_is_the_galerkin_solution():
    basis = spline_basis(UniformBSpline(5, 2, -1.0, 1.0))  # 7 functions, 5 of them free
    found = solve_ritz(ROTATED, basis, 5)
    assert found.converged
    q = basis.weights.diag()
    mass, stiffness = basis.values.mT @ q @ basis.values, basis.slopes.mT @ q @ basis.slopes
    load = basis.values.mT @ q @ ROTATED.source(basis.points.unsqueeze(-1), basis.points) @ q @ basis.values
    free = torch.linalg.svd(basis.ends)[2][2:].mT
    mass, stiffness, load = (free.mT @ m @ free for m in (mass, stiffness, load))
    full = torch.linalg.solve(torch.kron(stiffness, mass) + torch.kron(mass, stiffness), load.flatten()).view(5, 5)
    torch.testing.assert_close(found.factors[0] @ found.factors[1].mT, free @ full @ free.mT, rtol=1e-8, atol=1e-10)


def test_error_of_the_turned_problem_falls_with_rank():
    errors = [
        error_on_a_finer_grid(ROTATED, solve_khronos(ROTATED, rank=rank, num_cells=24, degree=4))
        for rank in (1, 2, 4, 6, 8)
    ]
    assert all(after < before / 4 for before, after in pairwise(errors[1:]))
    assert errors[-1] < 1e-6


def test_the_rank_is_chosen_by_energy_within_the_budget():
    row = khronos_row(ROTATED, 256, 3)
    assert row.rank > 1
    assert row.num_parameters <= 256
    assert row.num_parameters % (2 * row.rank) == 0
    energies = {}
    for rank in ROTATED.ranks:
        if 256 // (2 * rank) >= rank + 2:
            found = solve_ritz(ROTATED, spline_basis(UniformBSpline(256 // (2 * rank) - 3, 3, -1.0, 1.0)), rank)
            energies[rank] = found.energies[-1]
    assert row.rank == min(energies, key=energies.get)


@pytest.mark.parametrize(("rank", "num_cells"), [(0, 8), (4, 3), (1, 1)])
def test_ranks_without_room_are_refused(rank, num_cells):
    degree = 1 if num_cells == 1 else 2
    with pytest.raises(ValueError, match=f"rank = {rank} with {num_cells + degree} functions .* more cells"):
        solve_ritz(KAN, spline_basis(UniformBSpline(num_cells, degree, -1.0, 1.0)), rank)


def test_sizes_without_room_are_refused():
    with pytest.raises(ValueError, match="size = 6: two factors of degree 3 take at least 8 parameters"):
        khronos_row(KAN, 6, 3)


# -------------------------------------------------------------------------------------------------------------- peers


@each_problem
@pytest.mark.parametrize("degree", [1, 2])
def test_finite_elements_converge_at_their_rate(problem, degree):
    rows = [fem_row(problem, (2 * cells + 1) ** 2, degree) for cells in (12, 24)]
    assert [row.num_parameters for row in rows] == [25**2, 49**2]
    cells = [24 // degree, 48 // degree]
    errors = [row.squared_l2_error for row in rows]
    assert rate(*zip(cells, errors, strict=True)) >= degree + 1 - 0.3


def test_finite_elements_count_all_nodes_near_the_size():
    for size in (16, 32, 64, 128, 256, 512):
        for degree in (1, 2):
            assert fem_row(KAN, size, degree).num_parameters == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("degree", [1, 2])
def test_functions_of_pyinn_interpolate_and_have_their_slopes(degree):
    basis = inn_basis(9, degree)
    nodes = torch.linspace(-1, 1, 9, dtype=torch.float64)
    for power in range(degree + 1):
        torch.testing.assert_close(basis.values @ nodes**power, basis.points**power, rtol=1e-6, atol=1e-6)
        slope = power * basis.points ** max(power - 1, 0)
        torch.testing.assert_close(basis.slopes @ nodes**power, slope, rtol=1e-5, atol=1e-5)


def test_pyinn_of_degree_1_has_the_error_of_hats():
    row = inn_row(KAN, 32, 1)
    hats = khronos_row(KAN, 32, 1)  # a B-spline of degree 1 is a hat
    assert row.squared_l2_error == pytest.approx(hats.squared_l2_error, rel=1e-6)
    assert "solver of KHRONOS" in row.note


def test_pykan_trains_and_keeps_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(poisson, "KAN_SIDE", 11)
    row = kan_row(KAN, 64, seeds=(0, 1), num_steps=2)
    assert row.num_parameters == 60
    assert len(row.errors) == 2
    assert row.errors[0] != row.errors[1]
    assert row.squared_l2_error == pytest.approx(sum(row.errors) / 2)
    assert row.squared_l2_error < 4  # the square's area: far below a field of ones
    assert "2 steps" in row.note
    assert not list(tmp_path.iterdir())


def test_pykan_that_diverges_has_no_error(monkeypatch):
    monkeypatch.setattr(poisson, "squared_l2_error", lambda *_: math.nan)
    monkeypatch.setattr(poisson, "KAN_SIDE", 5)
    row = kan_row(KAN, 30, seeds=(0,), num_steps=0)
    assert row.squared_l2_error is None
    assert row.errors == (None,)
    assert "1 diverged" in row.note


def test_no_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds is empty"):
        kan_row(KAN, 64, seeds=())


# -------------------------------------------------------------------------------------------------------------- study


def test_study_gives_rows_for_json_and_says_what_is_not_installed(monkeypatch):
    absent, found = {"kan", "pyinn.model"}, builtins.__import__

    def importing(name, *arguments, **options):
        if name in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, *arguments, **options)

    inn_basis.cache_clear()  # other tests may have filled it
    monkeypatch.setattr(builtins, "__import__", importing)
    rows = poisson_study((16, 32), degrees=(2,), kan_sizes=(64,), progress=False)
    assert json.loads(json.dumps([dataclasses.asdict(row) for row in rows], allow_nan=False))
    for problem in PROBLEMS:
        methods = [(row.method, row.size) for row in rows if row.problem == problem.name]
        assert methods == [
            *[("khronos", 16), ("khronos", 32)],
            ("pyinn", 16),
            *2 * [("scikit-fem", 16), ("scikit-fem", 32)],
            ("pykan", 64),
        ]
    for row in rows:
        if row.method in ("pyinn", "pykan"):
            assert row.squared_l2_error is None
            assert f"pip install {row.method}" in row.note
        else:
            assert row.seconds > 0
            assert math.isfinite(row.squared_l2_error)
