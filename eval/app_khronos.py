"""The tab that inverts KHRONOS: where is a plate exactly this warm, for every position of a slider.

A table of temperatures is fitted once; afterwards the inputs that give a target are found from the fit in milliseconds.
"""

import time
from dataclasses import dataclass

import gradio as gr
import numpy as np
from matplotlib.figure import FigureBase

from eval.app_manners import live, number, picture
from leviathan import KhronosConfig, KhronosModel

LOW, HIGH = (0.0, 0.0, 2.0), (12.0, 8.0, 20.0)  # x and y in cm, the power of the middle heater in W
AMBIENT = 20.0  # degrees Celsius
# Place, widths along and across, angle, and degrees at its power; the middle one's are for each watt.
HEATERS = ((2.5, 5.8, 1.3, 1.3, 0.0, 42.0), (6.3, 3.6, 2.6, 1.3, 0.7, 3.5), (10.2, 1.9, 1.5, 1.1, 0.0, 55.0))
SIZES = {"rank": 8, "num_cells": 16, "degree": 3}
NUM_POINTS, NOISE = 4000, 0.05  # measurements, and their standard deviation in degrees
TARGETS = (25.0, 90.0)  # degrees Celsius
NUM_FOUND = 160  # points of a level set
GRID = 121  # points of the picture along x


@dataclass(frozen=True, eq=False)
class Found:
    """Inputs that give a target.

    Attributes:
        x: Places on the plate in cm, (points, 2); none where the target is out of reach.
        fitted: Temperature of the fitted model there, (points,).
        true: That of the plate itself, (points,).
        seconds: How long finding them took.
        reach: Lowest and highest temperature on the plate at this power, of the fit.
    """

    x: np.ndarray
    fitted: np.ndarray
    true: np.ndarray
    seconds: float
    reach: tuple[float, float]


def plate(points: np.ndarray) -> np.ndarray:
    r"""Temperature of a plate with three heaters, :math:`T = T_0 + \sum_h a_h \exp(-u^2/w_h^2 - v^2/q_h^2)`.

    Args:
        points: x and y in cm, and the power of the middle heater in W, (points, 3).

    Returns:
        Degrees Celsius, (points,).
    """
    x, y, power = points.T
    warmth = np.full(len(points), AMBIENT)
    for i, (at_x, at_y, along, across, angle, size) in enumerate(HEATERS):
        u = np.cos(angle) * (x - at_x) + np.sin(angle) * (y - at_y)
        v = np.cos(angle) * (y - at_y) - np.sin(angle) * (x - at_x)
        warmth += size * (power if i == 1 else 1.0) * np.exp(-((u / along) ** 2) - (v / across) ** 2)
    return warmth


def fitted() -> KhronosModel:
    """KHRONOS of a table of noisy temperatures at random places and powers."""
    rng = np.random.default_rng(0)
    points = rng.uniform(LOW, HIGH, (NUM_POINTS, 3))
    temperature = plate(points) + rng.normal(scale=NOISE, size=NUM_POINTS)
    model = KhronosModel(KhronosConfig(input_low=list(LOW), input_high=list(HIGH), **SIZES))
    model.fit(points, temperature, num_restarts=1)
    return model.double()  # which tells 1e-6 of a degree


def find(model: KhronosModel, target: float, power: float) -> Found:
    """All over the plate the places with a temperature, at a power of the middle heater.

    Raises:
        ValueError: If a number is out of its range.
    """
    target = number("the target temperature", target, *TARGETS)
    power = number("the power", power, LOW[2], HIGH[2])
    start = time.perf_counter()
    level = model.level_set(target, NUM_FOUND, fixed={2: power})
    seconds = time.perf_counter() - start
    points = level.x.numpy()
    surface = model.predict(_grid(power)[2])
    fit = model.predict(points) if len(points) else np.empty(0)
    return Found(points[:, :2], fit, plate(points), seconds, (float(surface.min()), float(surface.max())))


def _grid(power: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = np.linspace(LOW[0], HIGH[0], GRID)
    y = np.linspace(LOW[1], HIGH[1], round(GRID * HIGH[1] / HIGH[0]))
    places = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    return x, y, np.column_stack([places, np.full(len(places), power)])


def draw(figure: FigureBase, model: KhronosModel, found: Found, target: float, power: float) -> None:
    """The fitted plate from above, and as a surface, with the places that were found."""
    x, y, points = _grid(power)
    surface = model.predict(points).reshape(len(y), len(x))
    limits = {"cmap": "inferno", "vmin": AMBIENT, "vmax": TARGETS[1] + 5}
    flat, solid = figure.subfigures(1, 2, width_ratios=(1.35, 1))
    ax = flat.subplots()
    image = ax.pcolormesh(x, y, surface, shading="gouraud", **limits)
    dots = {"color": "#35e0ff", "linestyle": "none", "marker": "o"}
    ax.plot(*found.x.T, **dots, markersize=4.5, markeredgecolor="black", markeredgewidth=0.5)
    ax.set(xlabel="x [cm]", ylabel="y [cm]", aspect="equal", xlim=(LOW[0], HIGH[0]), ylim=(LOW[1], HIGH[1]))
    ax.grid(visible=False)
    ax.set_title(f"{len(found.x)} places found with T = {target:.1f} °C at {power:.1f} W")
    flat.colorbar(image, ax=ax, label="temperature T [°C]", location="bottom", shrink=0.7, aspect=40)
    ax = solid.add_subplot(projection="3d")
    ax.plot_surface(*np.meshgrid(x, y), surface, rcount=50, ccount=75, linewidth=0, alpha=0.85, **limits)
    ax.plot(*found.x.T, found.fitted, **dots, markersize=3, zorder=10)
    ax.set(xlabel="x [cm]", ylabel="y [cm]", title="temperature T [°C]", zlim=(AMBIENT, TARGETS[1] + 5))
    ax.view_init(elev=34, azim=-62)
    ax.set_box_aspect((HIGH[0], HIGH[1], 6), zoom=1.05)
    ax.tick_params(labelsize=8, pad=0)


def words(model: KhronosModel, found: Found, target: float) -> str:
    """What was found, in words."""
    size = f"{model.network.factors.numel():,} numbers fitted to {NUM_POINTS:,} measurements"
    if not len(found.x):
        low, high = found.reach
        return (
            f"**No place on the plate has {target:.1f} °C** at this power: the fit goes from {low:.1f} to "
            f"{high:.1f} °C. ({size}; {1e3 * found.seconds:.0f} ms)"
        )
    return (
        f"**{len(found.x)} places in {1e3 * found.seconds:.0f} ms.** The fit gives the target there to "
        f"{np.abs(found.fitted - target).max():.1e} °C, the plate itself to {np.abs(found.true - target).max():.2f} °C "
        f"({size})."
    )


def tab(app: gr.Blocks) -> None:
    """Fills a tab of the app."""
    model = fitted()
    gr.Markdown(
        "**KHRONOS** has fitted T(x, y, P) to a table of measurements: the temperature of a plate with three heaters, "
        "of which the middle one has the power P. Ask for a temperature, and it finds the places that have it."
    )
    with gr.Row():
        target = gr.Slider(*TARGETS, value=48.0, step=0.5, label="target temperature T [°C]", elem_id="target")
        power = gr.Slider(LOW[2], HIGH[2], value=12.0, step=0.5, label="power P of the middle heater [W]")
    text = gr.Markdown(elem_id="khronos-text")
    image = gr.Image(show_label=False, format="png", interactive=False, elem_id="khronos-image", buttons=[])

    def answer(target: float, power: float) -> tuple[np.ndarray, str]:
        found = find(model, target, power)
        shown = picture((11.5, 4.9), lambda figure: draw(figure, model, found, target, power))
        return shown, words(model, found, target)

    live(app, answer, [target, power], [target, power], [image, text])
