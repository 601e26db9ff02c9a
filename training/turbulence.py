"""A pseudo-spectral solver for two-dimensional periodic turbulence; writes its flows in PDEBench's layout.

The vorticity ω = ∂v/∂x − ∂u/∂y of an incompressible flow on the periodic square [0, L)² obeys

    ∂ω/∂t + u·∇ω = ν ∇²ω − ν_h (−∇²)^p ω − μ ω + f,      (u, v) = (∂ψ/∂y, −∂ψ/∂x),      ∇²ψ = −ω.

The linear terms are integrated exactly (integrating factor), the rest by the classical fourth-order Runge-Kutta method;
products are free of aliasing by the 2/3 rule (Orszag, J. Atmos. Sci. 28, 1971). Arrays are indexed [x, y], as
PDEBench's are.

    python -m training.turbulence --out turbulence.hdf5 --num-trajectories 48
"""

import argparse
import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from training.fields import FieldFile
from training.hdf5_files import attributes, text

# PDEBench's background state: ρ = 1 and p = ρ c² / γ with γ = 5/3 and sound speed c = 1 / M. An incompressible flow has
# no use for either; they are written, as constants, for the programs that expect them.
MACH, DENSITY, PRESSURE = 0.1, 1.0, 60.0


class VorticitySolver:
    """Advances the vorticity equation above by steps of `dt`; holds no state, so one solver serves any batch.

    Fields are real tensors `(..., num_grid, num_grid)`; spectra are their `rfft2`, of which only the wavenumbers
    below `num_grid / 3` along each axis are kept. The mean vorticity and the mean velocity are zero.

    Args:
        num_grid: Points along each axis.
        viscosity: ν, in length² / time.
        dt: Time step. The method is stable while `dt * max|u| / dx` stays below about 1.
        length: L, the side of the square.
        hyperviscosity: ν_h, in length^(2p) / time.
        hyperviscosity_order: p.
        drag: μ, in 1 / time.
        forcing: f, `(num_grid, num_grid)` or one field for each trajectory, in 1 / time²; constant in time.
        dtype: Real type of the computation.
        device: Where to compute.

    Raises:
        ValueError: if a setting is out of range, or `forcing` does not have the grid's shape.
    """

    def __init__(
        self,
        num_grid: int,
        viscosity: float,
        dt: float,
        *,
        length: float = 1.0,
        hyperviscosity: float = 0.0,
        hyperviscosity_order: int = 4,
        drag: float = 0.0,
        forcing: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        _require(num_grid >= 4, "num_grid", num_grid, "at least 4")
        for name, value in (("dt", dt), ("length", length), ("hyperviscosity_order", hyperviscosity_order)):
            _require(0 < value < math.inf, name, value, "positive and finite")
        for name, value in (("viscosity", viscosity), ("hyperviscosity", hyperviscosity), ("drag", drag)):
            _require(0 <= value < math.inf, name, value, "finite and not negative")
        if forcing is not None and forcing.shape[-2:] != (num_grid, num_grid):
            raise ValueError(f"forcing has shape {tuple(forcing.shape)}; expected (..., {num_grid}, {num_grid})")
        self.num_grid, self.dt, self.dtype, self.device = num_grid, dt, dtype, torch.device(device)

        # Tables are made in float64, since k^(2p) overflows float32 for quite ordinary p, and rounded once.
        index = torch.fft.fftfreq(num_grid, 1 / num_grid, dtype=torch.float64)
        kx, ky = (2 * math.pi / length * n for n in (index[:, None], index[: num_grid // 2 + 1].abs()))
        square = kx**2 + ky**2
        resolved = (3 * index.abs()[:, None] < num_grid) & (3 * index.abs()[: num_grid // 2 + 1] < num_grid)
        resolved &= square > 0
        decay = viscosity * square + hyperviscosity * square**hyperviscosity_order + drag
        self._resolved = resolved.to(self.device, dtype)
        self._half_decay = torch.exp(-decay * dt / 2).to(self.device, dtype)
        # ω -> (u, v), (u, v) -> ω, and (u² − v², uv) -> −u·∇ω: pairs of tables (2, X, Y // 2 + 1)
        rotation = 1j * resolved * torch.stack([ky + 0 * kx, -kx + 0 * ky])
        self._velocity_table = (rotation / square.clamp(min=square[0, 1])).to(self.device, dtype.to_complex())
        self._vorticity_table = -rotation.to(self.device, dtype.to_complex())
        self._advection_table = (resolved * torch.stack([-kx * ky, kx**2 - ky**2])).to(self.device, dtype)
        self._forcing = 0.0 if forcing is None else self.spectrum(forcing)

    def spectrum(self, field: Tensor) -> Tensor:
        """The resolved part of a field's Fourier transform: `(..., X, Y)` -> `(..., X, Y // 2 + 1)`, complex."""
        return torch.fft.rfft2(field.to(self.device, self.dtype)) * self._resolved

    def field(self, spectrum: Tensor) -> Tensor:
        """The field `(..., X, Y)` of a spectrum `(..., X, Y // 2 + 1)`."""
        return torch.fft.irfft2(spectrum, s=(self.num_grid, self.num_grid))

    def velocity(self, vorticity: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence-free velocity (u, v) of a vorticity field, each `(..., X, Y)`, in length / time."""
        u, v = self.field(self.spectrum(vorticity).unsqueeze(-3) * self._velocity_table).unbind(-3)
        return u, v

    def vorticity(self, u: Tensor, v: Tensor) -> Tensor:
        """ω = ∂v/∂x − ∂u/∂y `(..., X, Y)` of a velocity field, in 1 / time; any divergent part drops out."""
        return self.field((self.spectrum(torch.stack([u, v], -3)) * self._vorticity_table).sum(-3))

    def tendency(self, spectrum: Tensor) -> Tensor:
        """The spectrum of −u·∇ω + f.

        For a divergence-free flow −u·∇ω = ∂²(u² − v²)/∂x∂y − (∂²/∂x² − ∂²/∂y²) uv, which costs four transforms where
        the direct product costs five (Basdevant, J. Comput. Phys. 50, 1983).
        """
        u, v = self.field(spectrum.unsqueeze(-3) * self._velocity_table).unbind(-3)
        products = torch.fft.rfft2(torch.stack([(u - v) * (u + v), u * v], -3))
        return (products * self._advection_table).sum(-3) + self._forcing

    def advance(self, spectrum: Tensor, num_steps: int) -> Tensor:
        """Takes `num_steps` steps of `dt` from the spectrum of the vorticity, and returns the last one's."""
        dt, half = self.dt, self._half_decay
        for _ in range(num_steps):
            decayed = half * spectrum
            k1 = self.tendency(spectrum)
            k2 = self.tendency(decayed + dt / 2 * half * k1)
            k3 = self.tendency(decayed + dt / 2 * k2)
            k4 = self.tendency(half * (decayed + dt * k3))
            spectrum = half * (decayed + dt / 6 * half * k1 + dt / 3 * (k2 + k3)) + dt / 6 * k4
        return spectrum


def initial_vorticity(
    num_grid: int, trajectories: Sequence[int], *, seed: int = 0, k_tot: int = 4, mean_speed: float = 1.0
) -> Tensor:
    """Random initial vorticity fields in the manner of PDEBench's turbulence set, on the unit square.

    PDEBench sums sine waves of random phase, u_k ~ |k|^(−1/2), over the wavenumbers 0 < |k_x|, |k_y| <= k_tot, for
    each component of the velocity, takes away the divergent part, and scales the mean speed to u_0 (Takamoto et al.,
    2022; in its generator that projection is off by one wavenumber). A projection leaves the vorticity as it is, so
    the vorticity of the waves is summed directly, and its velocity is free of divergence by construction.

    Args:
        num_grid: Points along each axis, at the cell centres (i + 1/2) / num_grid.
        trajectories: Which fields to make: field i depends on `seed` and i alone, not on what is made beside it. On
            another grid it is the same function of x and y, but for the rounding of the mean speed.
        seed: Seed of the whole set.
        k_tot: Largest wavenumber along each axis.
        mean_speed: u_0, the spatial mean of |u|.

    Returns:
        `(len(trajectories), num_grid, num_grid)`, float64.

    Raises:
        ValueError: if the grid does not resolve `k_tot` after dealiasing.
    """
    _require(num_grid > 3 * k_tot, "num_grid", num_grid, f"more than 3 * k_tot = {3 * k_tot}")
    index = np.concatenate([np.arange(-k_tot, 0), np.arange(1, k_tot + 1)])
    waves = np.exp(2j * np.pi * np.outer((np.arange(num_grid) + 0.5) / num_grid, index))  # (X, wavenumbers)
    kx, ky = 2 * np.pi * index[:, None], 2 * np.pi * index[None, :]
    square = kx**2 + ky**2
    fields = np.empty((len(trajectories), num_grid, num_grid))
    for field, trajectory in zip(fields, trajectories, strict=True):
        phase_u, phase_v = np.exp(2j * np.pi * np.random.default_rng((seed, trajectory)).random((2, *square.shape)))
        amplitude = square**-0.25 * (kx * phase_v - ky * phase_u)
        u = (waves @ (1j * ky / square * amplitude) @ waves.T).real
        v = (waves @ (-1j * kx / square * amplitude) @ waves.T).real
        field[:] = (waves @ amplitude @ waves.T).real * (mean_speed / np.hypot(u, v).mean())
    return torch.from_numpy(fields)


def kolmogorov_forcing(num_grid: int, amplitude: float, wavenumber: int) -> Tensor:
    """The curl of the body force A sin(2πky) x̂ on the unit square: −2πkA cos(2πky), `(num_grid, num_grid)` float64."""
    y = (torch.arange(num_grid, dtype=torch.float64) + 0.5) / num_grid
    k = 2 * math.pi * wavenumber
    return (-k * amplitude * torch.cos(k * y)).expand(num_grid, num_grid)


def band_forcing(num_grid: int, amplitude: float, wavenumber: int, seed: int = 0) -> Tensor:
    """The curl of a steady body force of rms A, of random waves with ||k| − k_f| <= 1/2, as a field like the above."""
    index = torch.fft.fftfreq(num_grid, 1 / num_grid, dtype=torch.float64)
    k = torch.hypot(index[:, None], index[: num_grid // 2 + 1])
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((num_grid, num_grid)))
    curl = torch.fft.rfft2(noise) * ((k - wavenumber).abs() <= 0.5)
    force = torch.fft.irfft2(curl / (2 * math.pi * k.clamp(min=1)), s=noise.shape)  # as large as the body force
    return torch.fft.irfft2(curl, s=noise.shape) * (amplitude / force.square().mean().sqrt())


def time_step(dt_save: float, dx: float, max_speed: float, courant: float = 0.5) -> float:
    """The largest whole fraction of `dt_save` with `dt * max_speed / dx <= courant`."""
    return dt_save / math.ceil(dt_save * max_speed / (courant * dx))


def simulate(
    solver: VorticitySolver, vorticity: Tensor, dt_save: float, num_snapshots: int, warm_up_time: float = 0.0
) -> Iterator[Tensor]:
    """Yields `num_snapshots` vorticity fields, `dt_save` apart; the first is the given one after `warm_up_time`.

    Args:
        solver: The solver; its `dt` must divide `dt_save`.
        vorticity: Initial fields `(B, X, Y)`; what the solver does not resolve is dropped.
        dt_save: Time between two snapshots.
        num_snapshots: How many to yield.
        warm_up_time: Time before the first, to the nearest whole step.

    Yields:
        Fields `(B, X, Y)` of the solver's dtype.

    Raises:
        ValueError: if `dt` does not divide `dt_save`, or if a field is not finite: the step was too long.
    """
    steps = round(dt_save / solver.dt)
    if steps < 1 or not math.isclose(steps * solver.dt, dt_save, rel_tol=1e-6):
        raise ValueError(f"dt_save = {dt_save:g} is not a multiple of dt = {solver.dt:g}; choose dt = dt_save / n")
    # One at a time, here and below: FFT libraries may round the last field of an odd batch otherwise than the rest, and
    # a trajectory must not depend on its neighbours. The steps transform pairs (u, v), an even number always.
    spectrum = torch.stack([solver.spectrum(field) for field in vorticity])
    for snapshot in range(num_snapshots):
        spectrum = solver.advance(spectrum, steps if snapshot else round(warm_up_time / solver.dt))
        if not spectrum.isfinite().all():
            raise ValueError(
                f"the flow is no longer finite at snapshot {snapshot}: dt = {solver.dt:g} is too long a step for its "
                "speed, or the initial field was not finite; use a smaller dt (--dt, or a larger --max-speed)"
            )
        yield torch.stack([solver.field(each) for each in spectrum])


def _setting(default: object, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """All that decides the numbers in a file of trajectories on the unit square; each field is a flag of the command.

    Raises:
        ValueError: if a setting is out of range.
    """

    num_trajectories: int = _setting(48, "flows, each from its own initial field")
    num_grid: int = _setting(64, "points along each axis of the unit square")
    viscosity: float = _setting(1e-4, "ν")
    dt_save: float = _setting(0.01, "time between snapshots; the mean initial speed is 1")
    num_snapshots: int = _setting(21, "snapshots of each flow")
    seed: int = _setting(0, "seed; flow i depends on the seed and i alone")
    k_tot: int = _setting(4, "largest wavenumber of the initial field along each axis")
    # Not made from the flow itself: a trajectory would then depend on its neighbours in the batch.
    dt: float | None = _setting(None, "time step; if not given, made from --max-speed")
    max_speed: float = _setting(4.0, "the speed that the time step must stand")
    hyperviscosity: float = _setting(0.0, "ν_h")
    hyperviscosity_order: int = _setting(4, "p of ν_h (−∇²)^p")
    drag: float = _setting(0.0, "μ")
    forcing: Literal["none", "kolmogorov", "band"] = _setting("none", "steady body force: one wave, or a random band")
    forcing_amplitude: float = _setting(1.0, "amplitude (kolmogorov) or rms (band) of the body force")
    forcing_wavenumber: int = _setting(4, "its waves along the side of the square")
    warm_up_time: float = _setting(0.0, "time from the initial field to the first snapshot")
    precision: Literal["float32", "float64"] = _setting("float32", "type to compute in; the file is float32")

    def __post_init__(self):
        for name in ("num_trajectories", "num_snapshots", "dt_save", "max_speed"):
            _require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "positive and finite")
        _require(0 <= self.warm_up_time < math.inf, "warm_up_time", self.warm_up_time, "finite and not negative")
        _require(self.seed >= 0, "seed", self.seed, "not negative")
        _require(self.k_tot >= 1, "k_tot", self.k_tot, "at least 1")
        # A band reaches half a wave beyond its wavenumber.
        reach = self.forcing_wavenumber + (0.5 if self.forcing == "band" else 0)
        resolved = self.forcing == "none" or 0 < 3 * reach < self.num_grid
        _require(resolved, "forcing_wavenumber", self.forcing_wavenumber, f"between 1 and a third of {self.num_grid}")
        for name in ("forcing", "precision"):
            choices = typing.get_args(type(self).__annotations__[name])
            _require(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")
        if self.dt is None:
            object.__setattr__(self, "dt", time_step(self.dt_save, 1 / self.num_grid, self.max_speed))

    def solver(self, device: torch.device | str = "cpu") -> VorticitySolver:
        """The solver that these settings describe."""
        options = {name: getattr(self, name) for name in ("hyperviscosity", "hyperviscosity_order", "drag")}
        wave = (self.num_grid, self.forcing_amplitude, self.forcing_wavenumber)
        if self.forcing == "kolmogorov":
            options["forcing"] = kolmogorov_forcing(*wave)
        elif self.forcing == "band":
            options["forcing"] = band_forcing(*wave, seed=self.seed)
        dtype = getattr(torch, self.precision)
        return VorticitySolver(self.num_grid, self.viscosity, self.dt, **options, dtype=dtype, device=device)


def write_fields(
    path: str | Path, settings: FlowSettings, *, batch_size: int = 8, device: str = "cpu", progress: bool = True
) -> Path:
    """Simulates `settings.num_trajectories` flows and writes them in the layout of PDEBench's turbulence file.

    `Vx`, `Vy`, `density`, `pressure` are `(N, T, X, Y)` float32, `x-coordinate` and `y-coordinate` the cell centres;
    `t-coordinate` has T + 1 entries as PDEBench's has, starting at 0 for the first snapshot. Attributes: PDEBench's
    `eta`, `zeta`, `M`, then `synthetic` and every setting. The work is done in `<path>.partial`, renamed when whole:
    an interrupted call is continued by the next one, and a file that is already there is left as it is. Neither an
    interruption nor `batch_size` changes a number in the file, on a CPU; a GPU's own transforms may round otherwise.

    `batch_size` flows are simulated at once, on `device`. Returns the path.

    Raises:
        ValueError: if the file, or the partial one, was made with other settings; if a flow is not finite.
        OSError: if the partial file is damaged or in use.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    _require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    if path.exists():
        with FieldFile(path) as fields:
            _check_settings(path, fields.attributes, settings)
        return path
    solver = settings.solver(device)
    with _open_partial(partial, settings) as file, torch.no_grad():
        num_fields = settings.num_trajectories * settings.num_snapshots
        finished = file.attrs.get("num_finished", settings.num_trajectories)
        done = int(finished) * settings.num_snapshots
        with tqdm(total=num_fields, initial=done, desc="flows", unit="field", disable=not progress) as bar:
            for start in range(finished, settings.num_trajectories, batch_size):
                stop = min(start + batch_size, settings.num_trajectories)
                initial = initial_vorticity(
                    settings.num_grid, range(start, stop), seed=settings.seed, k_tot=settings.k_tot
                )
                flow = simulate(solver, initial, settings.dt_save, settings.num_snapshots, settings.warm_up_time)
                for t, vorticity in enumerate(flow):
                    for trajectory, field in enumerate(vorticity, start):
                        u, v = solver.velocity(field)
                        file["Vx"][trajectory, t], file["Vy"][trajectory, t] = u.cpu().numpy(), v.cpu().numpy()
                    bar.update(stop - start)
                file.attrs["num_finished"] = stop
                file.flush()
        file.attrs.pop("num_finished", None)
    partial.replace(path)
    return path


def _open_partial(path: Path, settings: FlowSettings) -> h5py.File:
    """Opens the partial file to go on with it, or makes a new one if it has no finished flow."""
    if path.exists():
        try:
            file = h5py.File(path, "r+")
        except OSError as error:
            raise OSError(f"{path} is damaged or in use by another run ({error}); wait for it, or delete it") from error
        if file.attrs.get("num_finished") != 0:
            _check_settings(path, attributes(file), settings)
            return file
        file.close()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = h5py.File(path, "w")
    shape = (settings.num_trajectories, settings.num_snapshots, settings.num_grid, settings.num_grid)
    # Constants are never written, only declared as what unwritten data reads as: they take no room on disk.
    for key, constant in (("Vx", 0.0), ("Vy", 0.0), ("density", DENSITY), ("pressure", PRESSURE)):
        file.create_dataset(key, shape, np.float32, fillvalue=constant)
    file["t-coordinate"] = (np.arange(settings.num_snapshots + 1) * settings.dt_save).astype(np.float32)
    centres = (np.arange(settings.num_grid) + 0.5) / settings.num_grid
    file["x-coordinate"] = file["y-coordinate"] = centres.astype(np.float32)
    file.attrs.update(eta=settings.viscosity, zeta=0.0, M=MACH, synthetic=True, num_finished=0)
    file.attrs.update({name: text(value) for name, value in dataclasses.asdict(settings).items()})
    file.flush()  # what is killed before its first flow is finished leaves a file that opens
    return file


def _check_settings(path: Path, recorded: Mapping[str, Any], settings: FlowSettings) -> None:
    wanted = dataclasses.asdict(settings).items()
    different = [
        f"{key} {recorded.get(key, '(none)')}, not {value}" for key, value in wanted if recorded.get(key) != value
    ]
    if different:
        raise ValueError(f"{path} was made with {'; '.join(different)}: delete it or choose another name")


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} = {value} must be {expected}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: writes the file, then prints one line about it."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    parser.add_argument("--out", type=Path, required=True, help="HDF5 file to write")
    parser.add_argument("--batch-size", type=int, default=8, help="flows simulated at once")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    for field in dataclasses.fields(FlowSettings):
        choices = typing.get_args(field.type) if typing.get_origin(field.type) is Literal else None
        kind = str if choices else float if field.name == "dt" else field.type
        flag, meaning = "--" + field.name.replace("_", "-"), field.metadata["help"]
        parser.add_argument(flag, type=kind, choices=choices, default=field.default, help=meaning)
    given = vars(parser.parse_args(arguments))
    out, batch_size, device = (given.pop(name) for name in ("out", "batch_size", "device"))
    try:
        write_fields(out, FlowSettings(**given), batch_size=batch_size, device=device)
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")
    with FieldFile(out) as fields:
        sample, times = range(min(16, fields.num_trajectories)), range(fields.num_snapshots)
        rms = np.sqrt(np.mean([np.square(fields.vorticity(trajectory)).mean() for trajectory in sample]))
        speed = np.mean([np.hypot(*fields.velocity(trajectory, t)).mean() for trajectory in sample for t in times])
        pixels = speed * fields.dt_save / fields.spacing[0]
        print(f"{out}: {given['num_trajectories']} flows, rms vorticity {rms:.4g}, {pixels:.3g} pixels per snapshot")


if __name__ == "__main__":
    main()
