"""The tab that designs a microstructure: two properties asked for, a cell, and what physics says of it."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import gradio as gr
import numpy as np
from matplotlib.figure import FigureBase

from eval.app_manners import load_as, missing, number, on, picture
from leviathan import SnaJanusModel
from leviathan.janus.inversion import Design
from training.voxels import View, render

STEPS = {"C1111": 1.0, "volume_fraction": 0.01}  # of the sliders
TARGETS = tuple(STEPS)
LABELS = {"C1111": "stiffness C1111 [GPa]", "volume_fraction": "share of solid [–]"}
MAX_CANDIDATES = 32
MAX_RESOLUTION = 32  # voxels along the edge of a model's arrays; beyond, a check takes minutes on a core
SOLID = (0.84, 0.62, 0.30)
LOOK = View(azimuth=-60.0, elevation=28.0, width=420, samples=2)
REMEDY = "`make janus` makes cells, a model of them and a beam, in half an hour on two cores. Then start the app again."


def load(folder: Path) -> SnaJanusModel:
    """A model whose cells this tab can design.

    Raises:
        ValueError: If there is none, or it is one of other cells or properties.
        OSError: If it cannot be read.
    """
    model = load_as(SnaJanusModel, folder)
    config = model.config
    if config.spatial_dims != 3 or not set(TARGETS) <= set(config.property_names):
        raise ValueError(f"the model at {folder} is one of {config.property_names} in {config.spatial_dims}-D")
    if config.resolution > MAX_RESOLUTION:
        raise ValueError(f"the model at {folder} has {config.resolution} voxels along an edge, above {MAX_RESOLUTION}")
    return model


def limits(model: SnaJanusModel) -> dict[str, tuple[float, float]]:
    """What may be asked for: the range of each target among the training cells, to whole steps of its slider."""
    config, ranges = model.config, {}
    for name, step in STEPS.items():
        place = config.property_names.index(name)
        low, high = config.property_low[place], config.property_high[place]
        ranges[name] = (math.ceil(low / step) * step, math.floor(high / step) * step)
    return ranges


def design(
    model: SnaJanusModel, targets: Mapping[str, float], num_candidates: int = 16, refine: bool = False
) -> Design:
    """Designs a cell, as `SnaJanusModel.invert` does.

    Raises:
        ValueError: If a number is out of its range, or cannot be had with the boundary that all cells share.
    """
    ranges = limits(model)
    targets = {name: number(LABELS[name], targets[name], *ranges[name]) for name in TARGETS}
    num_candidates = number("the number of candidates", num_candidates, 1, MAX_CANDIDATES, whole=True)
    return model.invert(targets, num_candidates=num_candidates, refine="physics" if refine else None)


def draw(figure: FigureBase, made: Design) -> None:
    """The best cell, eight of it side by side, the slice through its middle, and all candidates."""
    cell = made.whole()[0].numpy().astype(bool)
    looks, plots = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    one, many = looks.subplots(1, 2)
    for ax, solid, title in (
        (one, cell, f"the cell, {cell.shape[0]} voxels along an edge"),
        (many, np.tile(cell, (2, 2, 2)), "eight of it: they fit together"),
    ):
        ax.imshow(render(solid, np.full((1, 1, 1, 3), SOLID, np.float32), LOOK), interpolation="antialiased")
        ax.set_axis_off()
        ax.set_title(title)
    ax = plots.subplots()
    found = {name: made.checked[name].numpy() for name in TARGETS}
    guessed = {name: made.predicted[name].numpy() for name in TARGETS}
    x, y = TARGETS[1], TARGETS[0]
    for i in range(len(found[x])):
        ax.plot([guessed[x][i], found[x][i]], [guessed[y][i], found[y][i]], color="#bbbbbb", linewidth=0.8, zorder=1)
    ax.plot(guessed[x], guessed[y], "o", color="white", markeredgecolor="#0072B2", label="predicted by the model")
    ax.plot(found[x], found[y], "o", color="#D55E00", label="checked by homogenisation")
    ax.plot(found[x][0], found[y][0], "D", color="#D55E00", markersize=9, markeredgecolor="black", label="the best")
    ax.axhline(made.target[y], color="black", linewidth=0.8, linestyle="--")
    ax.axvline(made.target[x], color="black", linewidth=0.8, linestyle="--", label="asked for")
    ax.set(xlabel=LABELS[x], ylabel=LABELS[y], title=f"{len(found[x])} candidates")
    ax.margins(0.2)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def table(made: Design) -> str:
    """The best cell's properties as Markdown: asked for, predicted, checked, and the two errors."""
    lines = [
        "| | asked for | predicted | checked by physics | off the target | model's gap |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name in TARGETS:
        asked, guessed, found = made.target[name], float(made.predicted[name][0]), float(made.checked[name][0])
        lines.append(
            f"| {LABELS[name]} | {asked:.4g} | {guessed:.4g} | **{found:.4g}** | "
            f"{100 * abs(found - asked) / abs(asked):.2f} % | {100 * float(made.gap[name][0]):.2f} % |"
        )
    return "\n".join(lines)


def words(made: Design, seconds: float) -> str:
    """The verdict, in words."""
    verdict = "**Reached**, within 5 %" if made.reachable else "**Not reached** within 5 %; this is the nearest cell"
    rejected = f", {made.num_rejected} of them rejected as unsound" if made.num_rejected else ""
    return f"{verdict}: the best of {len(made.error)} candidates{rejected}, found and checked in {seconds:.1f} s."


def tab(folder: Path) -> None:
    """Fills a tab of the app."""
    try:
        model = load(folder)
    except (ValueError, OSError) as error:
        gr.Markdown(missing("Janus", str(error), REMEDY))
        return
    gr.Markdown(
        "**Janus** designs a cell of a metamaterial with the stiffness and the share of solid that you ask for; "
        "homogenisation then checks what the cell really has. Cells of all designs fit together."
    )
    with gr.Row():
        config, sliders = model.config, []
        for name, (low, high) in limits(model).items():
            typical = config.property_mean[config.property_names.index(name)]
            typical = round(typical / STEPS[name]) * STEPS[name]
            look = {"step": STEPS[name], "label": LABELS[name], "elem_id": name, "scale": 2}
            sliders.append(gr.Slider(low, high, value=min(max(typical, low), high), **look))
        candidates = gr.Slider(4, MAX_CANDIDATES, value=16, step=4, label="candidates", scale=2)
        refine = gr.Checkbox(value=False, label="refine (slower)", info="by physics, voxel by voxel", scale=1)
        button = gr.Button("Design a cell", variant="primary", elem_id="janus-go")
    text = gr.Markdown(elem_id="janus-text")
    image = gr.Image(show_label=False, format="png", interactive=False, elem_id="janus-image", buttons=[])
    properties = gr.Markdown()

    def answer(stiffness: float, fraction: float, count: float, refined: bool) -> tuple[str, np.ndarray, str]:
        begin = time.perf_counter()
        made = design(model, dict(zip(TARGETS, (stiffness, fraction), strict=True)), count, bool(refined))
        seconds = time.perf_counter() - begin
        return words(made, seconds), picture((12.5, 4.4), lambda figure: draw(figure, made)), table(made)

    on(button.click, answer, [*sliders, candidates, refine], [text, image, properties])
