"""The tab that queries VSNA: an equation solved once for all times and viscosities, and asked at any of them.

Beside each answer stands the exact solution, so that what is fast is also seen to be right.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import FigureBase

from eval.app_manners import choice, live, load_as, number, on, picture
from leviathan import VsnaConfig, VsnaModel
from training.vsna_problems import build

AXES = ("x", "t", "nu")
NUM_POINTS = 801  # of a profile
LEAST_ERROR = 1e-12  # of a logarithmic axis


@dataclass(frozen=True)
class Equation:
    """A problem of `training.vsna_problems`, and how it is solved and shown here.

    Attributes:
        name: Of the problem there, and of the folder in which `training.vsna` leaves its model.
        options: Of the problem: coarser than the configs, for a solve in seconds.
        sizes: Of the model's config.
        tolerance: Of the solve.
        duration: How long that takes, in words.
        formula: As text.
        axes: Labels of x and u, which have no units.
        limits: Of u in the picture.
    """

    name: str
    options: dict[str, Any]
    sizes: dict[str, Any]
    tolerance: float
    duration: str
    formula: str
    axes: tuple[str, str]
    limits: tuple[float, float]


EQUATIONS = {
    "heat": Equation(
        "heat",
        {"num_cells": {"x": 20, "t": 10, "nu": 3}},
        {"rank": 8},
        1e-7,
        "a second",
        "∂u/∂t = ν ∂²u/∂x² on [0, 1], zero at both ends",
        ("place x / length of the rod", "temperature u / u₀"),
        (-0.3, 1.6),
    ),
    "Burgers": Equation(
        "burgers",
        {"num_cells": {"x": 20, "t": 10, "nu": 3}, "degree": {"x": 4}, "nu": (0.05, 0.2)},
        {"rank": 14, "decomposition": "tensor_train"},
        1e-4,
        "half a minute",
        "∂u/∂t + u ∂u/∂x = ν ∂²u/∂x² on [−1, 1], from −sin πx",
        ("place x / half length", "velocity u / u₀"),
        (-1.25, 1.25),
    ),
}


LOCKS = {name: Lock() for name in EQUATIONS}


@dataclass(frozen=True, eq=False)
class Profile:
    """The solution along x at one time and viscosity, all (points,) float64.

    Attributes:
        x: Where.
        start: Exact solution at t = 0.
        field: The model's.
        exact: In closed form, or by quadrature.
        seconds: How long the model's took.
    """

    x: np.ndarray
    start: np.ndarray
    field: np.ndarray
    exact: np.ndarray
    seconds: float

    @property
    def error(self) -> np.ndarray:
        """Absolute difference of the model's and the exact solution."""
        return np.abs(self.field - self.exact)


def solved(name: str, folder: Path | None = None) -> VsnaModel:
    """The model of one of ``EQUATIONS``: that in the folder of `training.vsna`, or else solved when first asked for.

    Raises:
        ValueError: If the folder's model has other axes.
        OSError: If it cannot be read.
    """
    with LOCKS[name]:  # who asks meanwhile waits for this solve and does not start another
        return _solved(name, folder)


@cache
def _solved(name: str, folder: Path | None) -> VsnaModel:
    equation = EQUATIONS[name]
    if folder is not None and (path := folder / equation.name / "config.json").is_file():
        model = load_as(VsnaModel, path.parent).double()
        if model.config.names != list(AXES):
            raise ValueError(f"the model at {path.parent} has the axes {model.config.names}; expected {list(AXES)}.")
        return model
    problem = build(equation.name, **equation.options).problem
    model = VsnaModel(VsnaConfig.for_problem(problem, **equation.sizes))
    model.solve(problem, tolerance=equation.tolerance, progress=False)
    return model.eval()


def box(model: VsnaModel) -> dict[str, tuple[float, float]]:
    """Lowest and highest value of each axis."""
    return {axis.name: (axis.low, axis.high) for axis in model.config.problem_axes}


@torch.no_grad()
def profile(model: VsnaModel, name: str, t: float, nu: float) -> Profile:
    """Asks a model along x.

    Raises:
        ValueError: If a number is out of its range.
    """
    equation, ranges = EQUATIONS[name], box(model)
    t, nu = number("t", t, *ranges["t"]), number("ν", nu, *ranges["nu"])
    x = torch.linspace(*ranges["x"], NUM_POINTS, dtype=torch.float64)
    points = torch.stack([x, torch.full_like(x, t), torch.full_like(x, nu)], -1)
    begin = time.perf_counter()
    field = model(points)
    seconds = time.perf_counter() - begin
    reference = build(equation.name, **equation.options).reference
    start = reference(points * points.new_tensor([1.0, 0.0, 1.0]))
    return Profile(*(each.numpy() for each in (x, start, field, reference(points))), seconds)


def draw(figure: FigureBase, name: str, shown: Profile, t: float, nu: float) -> None:
    """The profile over the exact one, and below it their difference."""
    equation = EQUATIONS[name]
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    upper.plot(shown.x, shown.start, color="#b0b0b0", linestyle=":", label="at t = 0")
    upper.plot(shown.x, shown.exact, color="black", linewidth=5, alpha=0.22, label="exact solution")
    upper.plot(shown.x, shown.field, color="#D55E00", linewidth=1.8, label="VSNA")
    upper.set(ylabel=equation.axes[1], ylim=equation.limits, title=f"t = {t:.3f}, ν = {nu:.4f}")
    upper.legend(loc="upper right", ncols=3)
    lower.semilogy(shown.x, np.maximum(shown.error, LEAST_ERROR), color="#0072B2")
    lower.set(xlabel=equation.axes[0], ylabel="|VSNA − exact|", ylim=(LEAST_ERROR, 1), xlim=shown.x[[0, -1]])
    lower.set_yticks([1e-12, 1e-8, 1e-4, 1])


def words(model: VsnaModel, name: str, shown: Profile) -> str:
    """What the picture shows, in words."""
    return (
        f"{EQUATIONS[name].formula}. **{NUM_POINTS} values in {1e3 * shown.seconds:.1f} ms**, at most "
        f"{shown.error.max():.1e} from the exact solution. All solutions of the box are {model.num_parameters():,} "
        "numbers; nothing was solved just now."
    )


def tab(app: gr.Blocks, folder: Path) -> None:
    """Fills a tab of the app."""
    first, *_ = names = tuple(EQUATIONS)
    gr.Markdown(
        "**VSNA** has solved a differential equation once, for all times t and all diffusivities ν: they are axes, as "
        "x is. Move the sliders, and it is asked anew."
    )
    with gr.Row():
        name = gr.Radio(list(names), value=first, label="equation", elem_id="equation")
        t = gr.Slider(*box(solved(first, folder))["t"], value=0.35, step=0.005, label="time t", elem_id="time")
        nu = gr.Slider(label="diffusivity ν", **_slider(solved(first, folder)), elem_id="nu")
    text = gr.Markdown(elem_id="vsna-text")
    image = gr.Image(show_label=False, format="png", interactive=False, elem_id="vsna-image", buttons=[])

    def answer(name: str, t: float, nu: float) -> tuple[np.ndarray, str]:
        model = solved(choice("the equation", name, names), folder)
        shown = profile(model, name, t, nu)
        return picture((11.5, 4.9), lambda figure: draw(figure, name, shown, t, nu)), words(model, name, shown)

    def chosen(name: str) -> Iterator[tuple[Any, str]]:
        equation = EQUATIONS[choice("the equation", name, names)]
        yield gr.skip(), f"{equation.formula}. Solving it once, for all t and ν: {equation.duration} on a core ..."
        yield gr.Slider(**_slider(solved(name, folder))), equation.formula

    # No two equations share a middle of ν: the slider moves, and with it the answer.
    on(name.change, chosen, [name], [nu, text])
    live(app, answer, [t, nu], [name, t, nu], [image, text])


def _slider(model: VsnaModel) -> dict[str, float]:
    low, high = box(model)["nu"]
    return {"minimum": low, "maximum": high, "value": round((low + high) / 2, 9), "step": (high - low) / 180}
