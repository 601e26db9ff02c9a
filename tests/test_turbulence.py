"""The flow solver against conservation laws, exact flows and an independent solver; the files against interruption."""

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from training import turbulence
from training.turbulence import (
    FlowSettings,
    VorticitySolver,
    band_forcing,
    initial_vorticity,
    kolmogorov_forcing,
    simulate,
    time_step,
    write_fields,
)

SMALL = FlowSettings(num_trajectories=5, num_grid=32, num_snapshots=3, dt_save=0.01, viscosity=1e-3)


def solver64(num_grid, viscosity=0.0, dt=1e-3, **options):
    return VorticitySolver(num_grid, viscosity, dt, dtype=torch.float64, **options)


def energy(solver, vorticity):
    u, v = solver.velocity(vorticity)
    return (u**2 + v**2).mean((-2, -1)) / 2


def enstrophy(vorticity):
    return vorticity.square().mean((-2, -1)) / 2


def grid(num_grid, length=1.0):
    x = (torch.arange(num_grid, dtype=torch.float64) + 0.5) / num_grid * length
    return torch.meshgrid(x, x, indexing="ij")


def relative(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


def test_inviscid_flow_keeps_energy_and_enstrophy():
    solver = solver64(64, dt=5e-4)
    start, *_, end = simulate(solver, initial_vorticity(64, range(3)), dt_save=0.1, num_snapshots=6)
    assert (start - end).norm() > 0.5 * start.norm()  # it did move
    torch.testing.assert_close(energy(solver, end), energy(solver, start), rtol=1e-7, atol=0)
    torch.testing.assert_close(enstrophy(end), enstrophy(start), rtol=1e-6, atol=0)


def test_linear_terms_are_exact():
    length, viscosity, hyperviscosity, drag, time = 2.0, 3e-3, 2e-6, 0.4, 1.0
    x, y = grid(32, length)
    k = 2 * math.pi * 3 / length  # Taylor-Green: −u·∇ω vanishes, so the step may be as long as it likes
    vortices = torch.cos(k * x) * torch.cos(k * y)
    options = {"length": length, "hyperviscosity": hyperviscosity, "hyperviscosity_order": 2, "drag": drag}
    solver = solver64(32, viscosity, dt=0.25, **options)
    *_, end = simulate(solver, vortices[None], dt_save=0.5, num_snapshots=3)
    rate = viscosity * 2 * k**2 + hyperviscosity * (2 * k**2) ** 2 + drag
    torch.testing.assert_close(end[0], vortices * math.exp(-rate * time), rtol=0, atol=1e-13)


def test_forcing_balances_viscosity():
    x, y = grid(32)
    k = 2 * math.pi * 2
    vortices, viscosity = torch.cos(k * x) * torch.cos(k * y), 1e-2
    solver = solver64(32, viscosity, dt=2e-3, forcing=2 * k**2 * viscosity * vortices)
    *_, end = simulate(solver, vortices[None], dt_save=0.5, num_snapshots=3)
    assert relative(end[0], vortices) < 1e-9


def test_advection_is_the_direct_product():
    solver = solver64(48)
    vorticity = initial_vorticity(48, [3])
    spectrum = solver.spectrum(vorticity)
    u, v = solver.velocity(vorticity)
    k = 2j * math.pi * torch.fft.fftfreq(48, 1 / 48, dtype=torch.float64)
    by_x, by_y = solver.field(k[:, None] * spectrum), solver.field(k[:25].abs() * 1j * spectrum)
    assert relative(solver.tendency(spectrum), solver.spectrum(-u * by_x - v * by_y)) < 1e-13


def test_error_is_fourth_order_in_dt():
    start, ends = initial_vorticity(32, range(2)), {}
    for dt in (4e-3, 2e-3, 1e-3, 2.5e-4):
        solver = solver64(32, 1e-3, dt, drag=0.1, forcing=kolmogorov_forcing(32, 2.0, 3))
        ends[dt] = list(simulate(solver, start, dt_save=0.2, num_snapshots=2))[-1]
    errors = [relative(ends[dt], ends[2.5e-4]) for dt in (4e-3, 2e-3, 1e-3)]
    rates = [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]
    assert min(rates) > 3.7, rates


def test_a_step_can_be_differentiated():
    solver = solver64(16, 1e-3, 1e-2)
    start = initial_vorticity(16, [0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: solver.field(solver.advance(solver.spectrum(w), 1))[0, ::5, ::5], start)


def test_forced_flow_keeps_bounded_energy():
    forcing = band_forcing(32, amplitude=2.0, wavenumber=4, seed=1)
    solver = solver64(32, 2e-3, 2e-3, drag=1.0, forcing=forcing)
    flow = simulate(solver, initial_vorticity(32, range(2)), dt_save=0.2, num_snapshots=20, warm_up_time=4.0)
    energies = torch.stack([energy(solver, vorticity) for vorticity in flow])
    # d sqrt(2E) / dt <= rms(force) − μ sqrt(2E): the speed cannot settle above rms(force) / μ
    assert energies.max() < 2.0
    assert energies.min() > 1e-3
    early, late = energies[:10].mean(), energies[10:].mean()
    assert 0.5 < early / late < 2


def test_forcing_fields_are_curls_of_forces_of_the_stated_size():
    _x, y = grid(48)
    k = 2 * math.pi * 3
    force = 0.7 * torch.sin(k * y)
    curl = solver64(48).vorticity(force, torch.zeros_like(force))
    torch.testing.assert_close(kolmogorov_forcing(48, 0.7, 3), curl, rtol=0, atol=1e-12)
    fx, fy = solver64(48).velocity(band_forcing(48, 0.7, 5, seed=2))
    assert (fx**2 + fy**2).mean().sqrt() == pytest.approx(0.7, rel=1e-12)


@pytest.mark.parametrize("num_grid", [32, 33])
def test_velocity_and_vorticity_are_inverse(num_grid):
    solver = solver64(num_grid)
    vorticity = solver.field(solver.spectrum(torch.randn(2, num_grid, num_grid, dtype=torch.float64)))
    assert relative(solver.vorticity(*solver.velocity(vorticity)), vorticity) < 1e-12


def test_velocity_of_a_known_flow():
    x, y = grid(32, length=3.0)
    a, b = 2 * math.pi / 3, 4 * math.pi / 3
    stream = torch.sin(a * x) * torch.cos(b * y)
    u, v = solver64(32, length=3.0).velocity((a**2 + b**2) * stream)
    torch.testing.assert_close(u, -b * torch.sin(a * x) * torch.sin(b * y), rtol=0, atol=1e-13)
    torch.testing.assert_close(v, -a * torch.cos(a * x) * torch.cos(b * y), rtol=0, atol=1e-13)


def test_initial_fields_are_those_of_pdebench():
    fields = initial_vorticity(48, range(4), mean_speed=2.0)
    u, v = solver64(48).velocity(fields)
    torch.testing.assert_close(torch.hypot(u, v).mean((1, 2)), torch.full((4,), 2.0, dtype=torch.float64))
    n = torch.fft.fftfreq(48, 1 / 48, dtype=torch.float64)
    u_hat, v_hat = torch.fft.fft2(u), torch.fft.fft2(v)
    divergence = n[:, None] * u_hat + n * v_hat
    assert divergence.abs().max() < 1e-12 * (n[:, None] * v_hat).abs().max()
    present = torch.fft.fft2(fields).abs().amax(0) > 1e-9
    inside = (n.abs() >= 1) & (n.abs() <= 4)
    assert torch.equal(present, inside[:, None] & inside)
    # One trajectory's energy at |k| is random; over many it goes as |u_k|² ~ 1 / |k|, and half of it is divergence.
    many = torch.fft.fft2(initial_vorticity(16, range(3000))).abs().square().mean(0)
    assert (many[1, 1] / 2 * math.sqrt(2)) / (many[4, 4] / 32 * math.sqrt(32)) == pytest.approx(1, rel=0.1)


def test_initial_fields_do_not_depend_on_company_or_resolution():
    assert torch.equal(initial_vorticity(32, [7, 2])[1], initial_vorticity(32, range(3))[2])
    assert not torch.equal(initial_vorticity(32, [0], seed=1), initial_vorticity(32, [0], seed=2))
    coarse, fine = initial_vorticity(27, [0]), initial_vorticity(81, [0])[:, 1::3, 1::3]  # common cell centres
    assert relative(coarse, fine) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_does_not_change_a_bit(dtype):
    solver = VorticitySolver(48, 1e-4, 2e-3, dtype=dtype)
    start = initial_vorticity(48, range(7))
    together = torch.stack(list(simulate(solver, start, dt_save=0.1, num_snapshots=3)))
    for size in (1, 2, 3):
        flows = [simulate(solver, part, dt_save=0.1, num_snapshots=3) for part in start.split(size)]
        apart = torch.cat([torch.stack(list(flow)) for flow in flows], dim=1)
        assert torch.equal(together, apart), size


def test_warm_up_is_the_time_before_the_first_snapshot():
    solver, start = solver64(32, 1e-3), initial_vorticity(32, range(2))
    late = list(simulate(solver, start, dt_save=0.05, num_snapshots=2, warm_up_time=0.1))
    whole = list(simulate(solver, start, dt_save=0.05, num_snapshots=4))
    assert torch.allclose(torch.stack(late), torch.stack(whole[2:]), rtol=0, atol=1e-12)


def test_time_step_divides_the_save_interval():
    dt = time_step(0.05, 1 / 64, max_speed=4.0)
    assert round(0.05 / dt) * dt == pytest.approx(0.05, rel=1e-15)
    assert dt * 4.0 * 64 <= 0.5
    assert time_step(1e-5, 1 / 64, max_speed=4.0) == 1e-5


def test_agrees_with_torch_cfd():
    pytest.importorskip("torch_cfd")
    from torch_cfd.grids import Grid
    from torch_cfd.spectral import NavierStokes2DSpectral, RK4CrankNicolsonStepper

    # On this grid both programs keep the same wavenumbers; on some others torch-cfd's set of them is lopsided.
    num_grid, viscosity, dt, time = 112, 5e-4, 1e-3, 1.0
    start = initial_vorticity(num_grid, [0])
    *_, ours = simulate(solver64(num_grid, viscosity, dt), start, dt_save=time, num_snapshots=2)
    domain = Grid((num_grid, num_grid), domain=((0, 1), (0, 1)))
    other = NavierStokes2DSpectral(viscosity, domain, smooth=True, step_fn=RK4CrankNicolsonStepper()).double()
    with torch.no_grad():
        spectrum, _ = other(torch.fft.rfft2(start), dt, steps=round(time / dt))
    theirs = torch.fft.irfft2(spectrum)
    assert (ours - start).norm() > 0.5 * start.norm()
    assert relative(ours, theirs) < 1e-5


def contents(path):
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file} | {f"@{key}": file.attrs[key] for key in file.attrs}


def same(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[key], second[key]) for key in first)


def test_file_has_pdebenchs_layout(tmp_path):
    path = write_fields(tmp_path / "new" / "flow.hdf5", SMALL, progress=False)
    file = contents(path)
    for key in ("Vx", "Vy", "density", "pressure"):
        assert (file[key].shape, file[key].dtype) == ((5, 3, 32, 32), np.float32), key
    assert (file["density"] == 1).all()
    assert (file["pressure"] == 60).all()
    np.testing.assert_allclose(file["t-coordinate"], [0, 0.01, 0.02, 0.03], rtol=1e-6)
    np.testing.assert_allclose(file["x-coordinate"], (np.arange(32) + 0.5) / 32)
    np.testing.assert_array_equal(file["x-coordinate"], file["y-coordinate"])
    assert {"@eta", "@zeta", "@M", "@synthetic", "@dt_save", "@seed", "@dt", "@viscosity"} <= file.keys()
    assert file["@synthetic"]
    assert file["@eta"] == SMALL.viscosity
    assert "@num_finished" not in file

    flow = simulate(SMALL.solver(), initial_vorticity(32, range(5)), SMALL.dt_save, 3)
    u, v = SMALL.solver().velocity(torch.stack(list(flow), 1))
    np.testing.assert_allclose(file["Vx"], u, rtol=0, atol=1e-5)
    np.testing.assert_allclose(file["Vy"], v, rtol=0, atol=1e-5)


def interrupt(monkeypatch, after, error):
    """Lets `after` batches through, then raises in the middle of the next one."""
    calls = iter(range(100))

    def interrupted(*arguments):
        flow = simulate(*arguments)
        yield next(flow)
        if next(calls) == after:
            raise error
        yield from flow

    monkeypatch.setattr(turbulence, "simulate", interrupted)


def test_interrupted_generation_goes_on_to_the_same_file(tmp_path, monkeypatch):
    whole = write_fields(tmp_path / "whole.hdf5", SMALL, batch_size=5, progress=False)
    broken, partial = tmp_path / "broken.hdf5", tmp_path / "broken.hdf5.partial"
    interrupt(monkeypatch, after=1, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        write_fields(broken, SMALL, batch_size=2, progress=False)
    assert not broken.exists()
    assert contents(partial)["@num_finished"] == 2
    monkeypatch.undo()

    made = []
    monkeypatch.setattr(
        turbulence,
        "initial_vorticity",
        lambda n, which, **options: made.extend(which) or initial_vorticity(n, which, **options),
    )
    write_fields(broken, SMALL, batch_size=3, progress=False)
    assert made == [2, 3, 4]
    assert not partial.exists()
    assert same(contents(broken), contents(whole))


def test_finished_file_is_left_alone(tmp_path, monkeypatch):
    path = write_fields(tmp_path / "flow.hdf5", SMALL, progress=False)
    written = path.read_bytes()
    monkeypatch.setattr(turbulence, "simulate", None)
    write_fields(path, SMALL, batch_size=1, progress=False)
    with pytest.raises(ValueError, match=r"viscosity 0.001, not 0.01; seed 0, not 4: delete it"):
        write_fields(path, dataclasses.replace(SMALL, viscosity=0.01, seed=4), progress=False)
    assert path.read_bytes() == written


def test_partial_file_of_other_settings_is_refused_unless_empty(tmp_path, monkeypatch):
    path, other = tmp_path / "flow.hdf5", dataclasses.replace(SMALL, seed=1)
    interrupt(monkeypatch, after=1, error=MemoryError)
    with pytest.raises(MemoryError):
        write_fields(path, SMALL, batch_size=2, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"flow.hdf5.partial was made with seed 0, not 1"):
        write_fields(path, other, progress=False)
    (tmp_path / "flow.hdf5.partial").unlink()

    unstable = dataclasses.replace(SMALL, dt=0.1, dt_save=0.5)
    with pytest.raises(ValueError, match="smaller dt"):
        write_fields(path, unstable, progress=False)
    assert not path.exists()
    assert write_fields(path, SMALL, progress=False).exists()  # nothing was finished, so nothing is in the way


def test_damaged_partial_file_is_named(tmp_path):
    (tmp_path / "flow.hdf5.partial").write_bytes(b"not what it was")
    with pytest.raises(OSError, match=r"flow.hdf5.partial is damaged or in use"):
        write_fields(tmp_path / "flow.hdf5", SMALL, progress=False)


def test_command(tmp_path, capsys):
    out = tmp_path / "flow.hdf5"
    arguments = ["--out", str(out), "--num-trajectories", "2", "--num-grid", "32", "--num-snapshots", "3"]
    options = ["--forcing", "band", "--drag", "0.1", "--hyperviscosity", "1e-15", "--warm-up-time", "0.01"]
    turbulence.main([*arguments, *options])
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "2 flows, rms vorticity" in line
    assert "pixels per snapshot" in line
    attributes = contents(out)
    assert attributes["@forcing"] == b"band"  # of fixed length, see training.hdf5_files
    assert attributes["@warm_up_time"] == 0.01
    with pytest.raises(SystemExit) as caught:
        turbulence.main([*arguments, "--seed", "3"])
    assert caught.value.code == 1
    assert "error: " in capsys.readouterr().err


def test_unstable_flow_names_the_remedy():
    solver = VorticitySolver(32, 1e-5, 0.2)
    with pytest.raises(ValueError, match=r"no longer finite at snapshot 1: dt = 0.2 .* smaller dt"):
        list(simulate(solver, initial_vorticity(32, [0]), dt_save=10.0, num_snapshots=3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VorticitySolver(2, 0.1, 0.1), "num_grid = 2 must be at least 4"),
        (lambda: VorticitySolver(32, -1.0, 0.1), "viscosity = -1.0 must be finite and not negative"),
        (lambda: VorticitySolver(32, 0.1, math.nan), "dt = nan must be positive"),
        (lambda: VorticitySolver(32, 0.1, 0.1, drag=math.inf), "drag = inf must be finite"),
        (lambda: VorticitySolver(32, 0.1, 0.1, forcing=torch.zeros(8, 8)), r"forcing has shape \(8, 8\)"),
        (lambda: initial_vorticity(12, [0]), "num_grid = 12 must be more than 3"),
        (lambda: FlowSettings(num_snapshots=0), "num_snapshots = 0 must be positive"),
        (lambda: FlowSettings(seed=-1), "seed = -1 must be not negative"),
        (lambda: FlowSettings(k_tot=0), "k_tot = 0 must be at least 1"),
        (lambda: FlowSettings(forcing="wind"), "forcing = wind must be one of none, kolmogorov, band"),
        (
            lambda: FlowSettings(forcing="kolmogorov", forcing_wavenumber=30),
            "forcing_wavenumber = 30 must be between 1 and a third of 64",
        ),
        (lambda: next(simulate(VorticitySolver(32, 0.1, 0.03), torch.zeros(1, 32, 32), 0.1, 2)), "dt_save / n"),
        (lambda: write_fields("x", SMALL, batch_size=0), "batch_size = 0 must be at least 1"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_killed_before_its_first_flow_it_can_begin_again(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from training import turbulence as t;"
        "t.simulate = lambda *a: os._exit(9);"
        "flow = t.FlowSettings(num_trajectories=2, num_grid=16, num_snapshots=2);"
        "t.write_fields(Path(sys.argv[1]), flow, progress=False)"
    )
    path = tmp_path / "flow.hdf5"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code, str(path)], cwd=root, check=False).returncode == 9
    assert not path.exists()
    write_fields(path, FlowSettings(num_trajectories=2, num_grid=16, num_snapshots=2), progress=False)
    assert path.exists()
