import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.special import ive

from sna_core.bspline import UniformBSpline
from training.vsna_plume import (
    PLUME_BOX,
    PLUME_CENTRE,
    PLUME_WIDTH,
    gauss_rule,
    load_plume,
    plume_profile,
    plume_reference,
    plume_rules,
    solve_plume,
    wall_functions,
)
from training.vsna_references import (
    SHOCK_TIME,
    burgers_initial,
    heat,
    heat_initial,
    inviscid_burgers,
    poisson_ridge,
    poisson_ridge_source,
    poisson_sines,
    poisson_sines_source,
    viscous_burgers,
)

POISSON = [(poisson_sines, poisson_sines_source), (poisson_ridge, poisson_ridge_source)]
BASDEVANT = 0.01 / math.pi  # the viscosity of the usual test


def uniform(num_points, *intervals, seed=0):
    low, high = torch.tensor(intervals, dtype=torch.float64).unbind(-1)
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(num_points, len(intervals), dtype=torch.float64, generator=generator)


def derivatives(solution, points):
    """Values (N,), first derivatives (N, d) and second ones along each axis (N, d)."""
    points = points.clone().requires_grad_()
    values = solution(points)
    (first,) = torch.autograd.grad(values.sum(), points, create_graph=True)
    second = [torch.autograd.grad(f.sum(), points, retain_graph=True)[0][:, i] for i, f in enumerate(first.unbind(-1))]
    return values.detach(), first.detach(), torch.stack(second, -1)


def at(num_points, *columns):
    return torch.stack([torch.as_tensor(c, dtype=torch.float64).expand(num_points) for c in columns], -1)


# ------------------------------------------------------------------------------------------------------------- Poisson


@pytest.mark.parametrize("dimension", [1, 2, 3])
@pytest.mark.parametrize(("solution", "source"), POISSON)
def test_source_is_minus_the_laplacian(solution, source, dimension):
    points = uniform(50, *[(0, 1)] * dimension)
    laplacian = derivatives(solution, points)[2].sum(-1)
    torch.testing.assert_close(source(points), -laplacian, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("solution", [poisson_sines, poisson_ridge])
def test_poisson_is_zero_on_the_faces(solution, dimension):
    for axis in range(dimension):
        for end in (0.0, 1.0):
            points = uniform(20, *[(0, 1)] * dimension)
            points[:, axis] = end
            torch.testing.assert_close(solution(points), torch.zeros(20, dtype=torch.float64), rtol=0, atol=1e-15)


def test_only_the_ridge_is_not_separable():
    t = torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    grid = torch.cartesian_prod(t, t)
    ranks = [int(torch.linalg.matrix_rank(u(grid).view(40, 40), rtol=1e-9)) for u, _ in POISSON]
    assert ranks[0] == 1
    assert ranks[1] > 6


# ---------------------------------------------------------------------------------------------------------------- heat


def test_heat_solves_its_equation():
    points = uniform(100, (0, 1), (0, 1), (1e-3, 1e-2))
    _, first, second = derivatives(heat, points)
    torch.testing.assert_close(first[:, 1], points[:, 2] * second[:, 0], rtol=1e-11, atol=1e-11)
    x = torch.linspace(0, 1, 20, dtype=torch.float64)
    torch.testing.assert_close(heat(at(20, x, 0.0, 0.01)), heat_initial(x))
    for end in (0.0, 1.0):
        torch.testing.assert_close(heat(at(20, end, x, 0.01)), torch.zeros_like(x), rtol=0, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- Burgers


def test_viscous_burgers_solves_its_equation():
    points = uniform(100, (-1, 1), (0.01, 1), (BASDEVANT, 0.1))
    value, first, second = derivatives(viscous_burgers, points)
    residual = first[:, 1] + value * first[:, 0] - points[:, 2] * second[:, 0]
    assert residual.abs().max() < 1e-12 * second.abs().max()
    x = torch.linspace(-1, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(viscous_burgers(at(21, x, 0.0, 0.01)), burgers_initial(x), rtol=0, atol=1e-14)
    for end in (-1.0, 1.0):
        walls = viscous_burgers(at(21, end, x.abs(), 0.01))
        torch.testing.assert_close(walls, torch.zeros_like(x), rtol=0, atol=1e-13)


@given(nu=st.floats(0.05, 10.0), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_viscous_burgers_equals_its_series_of_bessel_functions(nu, seed):
    """J. Cole, Quart. Appl. Math. 9 (1951): the transform's numerator and denominator as Fourier series."""
    points = uniform(50, (-1, 1), (0, 2), (nu, nu), seed=seed)
    x, t, _ = points.numpy().T
    n, z = np.arange(1, 80)[:, None], 1 / (2 * math.pi * nu)
    terms = (-1.0) ** n * ive(n, z) * np.exp(-((n * math.pi) ** 2) * nu * t)
    below = ive(0, z) + 2 * (terms * np.cos(n * math.pi * x)).sum(0)
    expected = 4 * nu * math.pi * (n * terms * np.sin(n * math.pi * x)).sum(0) / below
    np.testing.assert_allclose(viscous_burgers(points), expected, rtol=0, atol=1e-12)


def test_viscous_burgers_equals_a_pseudospectral_solution():
    """Sines on [-1, 1] and the classical Runge-Kutta method with an integrating factor, past the birth of the front."""
    num_points, num_steps, time, nu = 512, 2000, 0.5, 0.02
    x = -1 + 2 * np.arange(num_points) / num_points
    wave = 1j * math.pi * np.arange(num_points // 2 + 1)
    step = time / num_steps
    half = np.exp(nu * (wave**2).real * step / 2)
    state = np.fft.rfft(-np.sin(math.pi * x))

    def slope(state):
        return -step * wave / 2 * np.fft.rfft(np.fft.irfft(state) ** 2)

    for _ in range(num_steps):
        first = slope(state)
        second = slope(half * (state + first / 2))
        third = slope(half * state + second / 2)
        fourth = slope(half * (half * state + third))
        state = half * (half * (state + first / 6) + (second + third) / 3) + fourth / 6
    ours = viscous_burgers(at(num_points, torch.from_numpy(x), time, nu))
    np.testing.assert_allclose(ours, np.fft.irfft(state), rtol=0, atol=1e-9)


def test_the_steepest_slope_is_that_of_the_literature():
    """Basdevant et al. 1986, table 1: -152.00516 at the origin, at the time 1.6037 / pi."""
    points = at(1, 0.0, 1.6037 / math.pi, BASDEVANT)
    assert derivatives(viscous_burgers, points)[1][0, 0].item() == pytest.approx(-152.00516, abs=1e-4)


@given(time=st.one_of(st.floats(0, 0.999 * SHOCK_TIME), st.just(math.nextafter(SHOCK_TIME, 0))), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_inviscid_burgers_is_constant_along_characteristics(time, seed):
    x = torch.cat([uniform(200, (-1, 1), seed=seed)[:, 0], torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 1.0])])
    u = inviscid_burgers(at(len(x), x, time))
    torch.testing.assert_close(u, burgers_initial(x - time * u), rtol=0, atol=1e-14)
    assert ((u * x) <= 1e-15).all()


def test_inviscid_burgers_is_the_limit_of_small_viscosity():
    points = uniform(100, (-1, 1), (0, 0.25))
    gaps = [
        (viscous_burgers(torch.cat([points, at(100, nu)], -1)) - inviscid_burgers(points)).abs().max().item()
        for nu in (4e-4, 2e-4, 1e-4)
    ]
    assert gaps[2] < 0.01
    for larger, smaller in pairwise(gaps):
        assert 1.7 < larger / smaller < 2.2  # of first order in nu


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: poisson_ridge(torch.zeros(3)), r"shape \(3,\); expected \(N, d\)"),
        (lambda: poisson_sines(torch.full((1, 2), 1.5)), r"x\[0, 0\] = 1\.5 lies outside"),
        (lambda: heat(torch.zeros(4, 2)), r"shape \(4, 2\); expected \(N, 3\), columns x, t, nu"),
        (lambda: heat(at(1, 0.5, -1.0, 0.1)), r"t = -1 lies outside \[0, inf\]"),
        (lambda: viscous_burgers(at(1, 0.5, 1.0, 1e-6)), r"nu = 1e-06 lies outside \[0\.0001, inf\]"),
        (lambda: viscous_burgers(at(1, math.nan, 1.0, 0.1)), r"x = nan lies outside \[-1, 1\]"),
        (lambda: inviscid_burgers(at(1, 0.5, 0.4)), r"t = 0\.4 lies outside \[0, 0\.31831\]"),
    ],
)
def test_bad_points_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_points_give_no_values():
    assert viscous_burgers(torch.zeros(0, 3)).shape == inviscid_burgers(torch.zeros(0, 2)).shape == (0,)


# --------------------------------------------------------------------------------------------------------------- plume


@pytest.fixture(scope="module")
def plume():
    return solve_plume(36, num_angles=11, num_spreads=14, num_steps=450)


def box_points(num_points, **fixed):
    points = uniform(num_points, *PLUME_BOX.values())
    for name, value in fixed.items():
        points[:, list(PLUME_BOX).index(name)] = value
    return points


def test_wall_functions_vanish_at_the_walls_and_have_orthonormal_slopes():
    x, weights = gauss_rule(40)
    slopes = wall_functions(x, 20, 1)
    torch.testing.assert_close(
        slopes.mT @ (weights[:, None] * slopes), torch.eye(20, dtype=x.dtype), rtol=0, atol=1e-12
    )
    assert wall_functions(torch.tensor([0.0, 1.0], dtype=x.dtype), 20).abs().max() < 1e-14


def test_plume_solves_its_equation(plume):
    points = box_points(300)
    _, first, second = derivatives(plume, points)
    x, y, _, _, omega, diffusivity = points.unbind(-1)
    advection = omega * ((0.5 - y) * first[:, 0] + (x - 0.5) * first[:, 1])
    diffusion = diffusivity * second[:, :3].sum(-1)
    residual = first[:, 3] + advection - diffusion
    assert residual.norm() < 1e-4 * diffusion.norm()


def test_plume_is_zero_at_the_walls_and_starts_as_a_gaussian(plume):
    for name in "xyz":
        for end in (0.0, 1.0):
            assert plume(box_points(100, **{name: end})).abs().max() < 1e-12
    start = box_points(200, t=0.0)
    gaussian = math.prod(plume_profile(start[:, axis], axis) for axis in range(3))
    torch.testing.assert_close(plume(start), gaussian, rtol=0, atol=5e-5)  # the Gaussian is 4e-6 at a wall


def test_plume_without_rotation_is_a_heat_kernel(plume):
    """Sines in all three axes, which is a solver of its own at omega = 0."""
    points = box_points(300, omega=0.0)
    z, weights = gauss_rule(300)
    wave = math.pi * torch.arange(1, 61, dtype=torch.float64)
    spread = points[:, 3] * points[:, 5]
    expected = 1.0
    for axis in range(3):
        initial = 2 * (z[:, None] * wave).sin().mT @ (weights * plume_profile(z, axis))
        initial = initial * (-spread[:, None] * wave**2).exp()
        expected = expected * ((points[:, axis, None] * wave).sin() * initial).sum(-1)
    assert (plume(points) - expected).norm() < 2e-6 * expected.norm()


def test_plume_turns_with_the_flow_and_depends_on_angle_and_spread(plume):
    # Far from the walls and before it has spread it is the Gaussian of free space about a centre that turns.
    points = box_points(2000, D=0.001)
    x, y, z, t, omega, diffusivity = points.unbind(-1)
    angle, variance = omega * t, PLUME_WIDTH**2 + 2 * diffusivity * t
    radius = PLUME_CENTRE[1] - 0.5
    square = (x - 0.5 + radius * angle.sin()) ** 2 + (y - 0.5 - radius * angle.cos()) ** 2 + (z - 0.5) ** 2
    free = (PLUME_WIDTH**2 / variance) ** 1.5 * (-square / (2 * variance)).exp()
    assert (plume(points) - free).norm() < 3e-4 * free.norm()
    # Half the time at twice the rates is the same field.
    slow = box_points(100, t=1.0, omega=0.4, D=0.004)
    fast = box_points(100, t=0.5, omega=0.8, D=0.008)
    torch.testing.assert_close(plume(slow), plume(fast), rtol=1e-12, atol=1e-14)


def test_plume_does_not_change_with_more_of_everything(plume):
    points = box_points(1000)
    coarser = solve_plume(32, num_angles=10, num_spreads=10, num_steps=300)
    assert (plume(points) - coarser(points)).norm() < 3e-5 * plume(points).norm()


def test_samples_are_drawn_from_the_box(plume):
    samples = plume.samples(500, seed=3)
    low, high = torch.tensor(list(PLUME_BOX.values()), dtype=torch.float64).unbind(-1)
    assert ((samples.points >= low) & (samples.points <= high)).all()
    assert torch.equal(samples.values, plume(samples.points))
    assert torch.equal(samples.points, plume.samples(500, seed=3).points)
    assert not torch.equal(samples.points, plume.samples(500, seed=4).points)


def test_grid_holds_the_solution_at_its_points(plume):
    grid = plume.grid(plume_rules((5, 6, 4, 3, 2, 3)))
    axes = [points for points, _ in grid.rules]
    expected = plume(torch.cartesian_prod(*axes)).view(*map(len, axes))
    values = torch.einsum("towxy,twz->xyztow", grid.values_xy, grid.values_z)
    torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-13)


def test_error_of_a_cp_field_is_that_of_its_values(plume):
    grid = plume.grid(plume_rules((5, 6, 4, 3, 2, 3)))
    generator = torch.Generator().manual_seed(0)
    tables = [torch.rand(len(points), 2, dtype=torch.float64, generator=generator) for points, _ in grid.rules]
    u = torch.einsum("towxy,twz->xyztow", grid.values_xy, grid.values_z)
    v = torch.einsum("xr,yr,zr,tr,or,wr->xyztow", *tables)
    weights = torch.einsum("x,y,z,t,o,w->xyztow", *(w for _, w in grid.rules))
    expected = ((weights * (u - v) ** 2).sum() / (weights * u**2).sum()).sqrt().item()
    assert grid.relative_l2_cp(tables) == pytest.approx(expected, rel=1e-12)
    assert grid.relative_l2(lambda t, o, w: v[:, :, :, t, o, w]) == pytest.approx(expected, rel=1e-12)
    assert grid.relative_l2(lambda t, o, w: u[:, :, :, t, o, w] * (1 + 1e-11)) == pytest.approx(1e-11, rel=1e-3)


def test_aligned_rules_agree_on_the_error_of_a_spline(plume):
    spline = UniformBSpline(16, 3)
    points, weights = spline.quadrature(10)
    rest = plume_rules((1, 1, 1, 2, 2, 2))[3:]
    fine = plume.grid((*[(points, weights)] * 3, *rest))
    errors = []
    for num_points in (5, 8):
        rule = spline.quadrature(num_points)
        project = spline.dense(rule[0]) @ torch.linalg.solve(spline.gram(), spline.dense(points).mT * weights)
        plane, across = project @ fine.values_xy @ project.mT, fine.values_z @ project.mT
        grid = plume.grid((rule, rule, rule, *rest))
        errors.append(grid.relative_l2(lambda t, o, w, p=plane, a=across: p[t, o, w][:, :, None] * a[t, w]))
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)
    assert 1e-4 < errors[0] < 1e-2


def test_a_saved_plume_is_the_same(plume, tmp_path):
    path = tmp_path / "references" / "plume.safetensors"
    plume.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert torch.equal(load_plume(path).coefficients, plume.coefficients)
    assert torch.equal(plume_reference(path).coefficients, plume.coefficients)


def test_bad_files_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"solve_plume\(\)\.save"):
        load_plume(tmp_path / "none")
    (path := tmp_path / "plume.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no solution of the plume"):
        load_plume(path)
    save_file({"coefficients": torch.zeros(1, 1, 1, 1)}, path, metadata={"plume": "another"})
    with pytest.raises(ValueError, match="is of the plume another"):
        load_plume(path)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="make it again"):
        load_plume(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p(torch.zeros(4, 3)), r"shape \(4, 3\); expected \(N, 6\), columns x, y, z, t, omega, D"),
        (lambda p: p(box_points(3, D=0.1)), r"x\[0, 5\] = 0\.1 lies outside input 5's interval \[0\.001, 0\.01\]"),
        (lambda p: p.samples(0), "num_points = 0"),
        (lambda p: p.grid(plume_rules()[:4]), "rules has 4 entries"),
        (lambda p: p.grid([gauss_rule(3)] * 6), r"lies outside the interval \[0\.001, 0\.01\]"),
        (lambda p: plume_rules((3, 3)), "num_points has 2 entries"),
        (
            lambda p: p.grid(plume_rules((2,) * 6)).relative_l2(lambda *_: torch.zeros(3)),
            r"evaluate returned shape \(3,\)",
        ),
        (lambda p: p.grid(plume_rules((2,) * 6)).relative_l2_cp([torch.zeros(3, 1)] * 6), "the tables have shapes"),
        (lambda p: solve_plume(0), "num_modes = 0; expected an integer of at least 1"),
        (lambda p: solve_plume(8, num_steps=3), "num_steps = 3; expected an integer of at least 30"),
        (lambda p: solve_plume(40, num_angles=3, num_spreads=2, num_steps=40), "Raise num_steps"),
    ],
)
def test_bad_calls_raise(plume, call, message):
    with pytest.raises(ValueError, match=message):
        call(plume)
