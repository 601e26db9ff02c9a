"""Pictures of an evaluation. Each `draw_*` fills a matplotlib figure or subfigure from results, so panels compose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from eval.metrics import PAPER_METRICS

Results = dict[str, Any]

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "white",
}
FLOOR = {"color": "#e2e2e2", "label": "below the noise floor", "zorder": 0}
BAND = {"color": "#f5edd8", "label": "band of the slope", "zorder": 0}
# Okabe and Ito's palette, which the colour-blind can tell apart; a line style besides, for print in grey.
LOOKS = {
    "truth": {"color": "#000000", "linestyle": "-", "linewidth": 2.2},
    "expectation": {"color": "#D55E00", "linestyle": "-"},
    "greedy": {"color": "#009E73", "linestyle": (0, (5, 1.5))},
    "sample": {"color": "#0072B2", "linestyle": (0, (3, 1, 1, 1))},
    "top_k": {"color": "#E69F00", "linestyle": "-."},
    "top_p": {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    "persistence": {"color": "#7f7f7f", "linestyle": "--"},
    "climatology": {"color": "#56B4E9", "linestyle": ":", "linewidth": 2},
    "quantise_only": {"color": "#b0a060", "linestyle": (0, (1, 1))},
}
DIVERGING = "RdBu_r"


def _look(row: str) -> dict[str, Any]:
    return LOOKS.get(row, {"color": "#8c564b"}) | {"label": row.replace("_", " ")}


@dataclass(frozen=True)
class PrincipalComponents:
    """Coordinates (V, C) of V vectors along their principal components, and the share of variance of each (C,)."""

    coordinates: np.ndarray
    explained: np.ndarray


def principal_components(vectors: torch.Tensor, num_components: int = 3) -> PrincipalComponents:
    """Principal component analysis by singular value decomposition of V centred vectors: (V, D) -> (V, C) and (C,).

    Raises:
        ValueError: If there are fewer vectors or dimensions than components.
    """
    if vectors.ndim != 2 or min(vectors.shape) < num_components:
        raise ValueError(f"vectors have shape {tuple(vectors.shape)}; expected (V, D), both at least {num_components}.")
    centred = vectors.detach().cpu().double()
    centred = centred - centred.mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    variance = values.square()
    explained = variance[:num_components] / variance.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return PrincipalComponents((left * values)[:, :num_components].numpy(), explained.numpy())


def draw_fields(figure: FigureBase, results: Results, examples: dict[str, np.ndarray]) -> None:
    """One flow: a row of pictures for truth, each sampling and persistence, a column for each step shown."""
    steps, dt = results["spectra"]["steps"], results["data"]["dt"]
    rows = ["truth", *_rows(results, "model"), "persistence"]
    limit = float(np.quantile(np.abs(examples["truth"]), 0.999))
    axes = figure.subplots(len(rows), len(steps), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for ax, step in zip(line, steps, strict=True):
            picture = ax.imshow(
                examples[row][step - 1].T,
                origin="lower",
                cmap=DIVERGING,
                vmin=-limit,
                vmax=limit,
                interpolation="nearest",
            )
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(True)
        line[0].set_ylabel(_look(row)["label"])
    for ax, step in zip(axes[0], steps, strict=True):
        ax.set_title(f"step {step}, t = {step * dt:.3g}")
    bar = {"location": "bottom", "shrink": 0.6, "aspect": 40, "extend": "both", "pad": 0.02}
    figure.colorbar(picture, ax=axes, label="vorticity ω [1/time]", **bar)


def draw_spectra(figure: FigureBase, results: Results, steps: Sequence[int], legend: bool = True) -> None:
    """E(k) of truth and rows, a panel for each step; the band of the slope is shaded."""
    spectra = results["spectra"]
    low, high = results["slope_band"]
    truth = np.array(spectra["rows"]["truth"])
    visible = truth[truth > 1e-9 * truth.max()]

    def panel(ax: Axes, index: int) -> None:
        ax.axvspan(low, high, **BAND)
        for row, curves in _truth_last(spectra["rows"]):
            energy = np.array(curves[index])
            ax.loglog(np.arange(1, len(energy) + 1), np.where(energy > 0, energy, np.nan), **_look(row))
        start = 3 * truth[index, low - 1]
        ax.loglog([low, high], [start, start * (high / low) ** -3.0], color="#555555", linewidth=1)
        middle = (np.sqrt(low * high), start * (high / low) ** -1.5)
        ax.annotate("k⁻³", middle, xytext=(4, 4), textcoords="offset points")
        ax.set(xlabel="wavenumber k [waves per side]", ylim=(visible.min() / 3, truth.max() * 10))
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= truth.shape[-1]]
        ax.set_xticks(ticks, labels=ticks)
        ax.minorticks_off()

    _by_step(figure, results, steps, panel, "energy E(k) [length²/time²]", legend)


def draw_pdf(figure: FigureBase, results: Results, steps: Sequence[int], legend: bool = True) -> None:
    """P(ω) of truth and rows, a panel for each step; bins are joined for the eye, not for the divergence."""
    pdf = results["pdf"]
    num_bins = len(pdf["rows"]["truth"][0])
    joined = max(1, num_bins // 64)
    width = (pdf["high"] - pdf["low"]) / num_bins * joined
    centres = pdf["low"] + width * (np.arange(num_bins // joined) + 0.5)

    def density(shares: list[float]) -> np.ndarray:
        return np.reshape(shares, (-1, joined)).sum(-1) / width

    truth = np.array([density(shares) for shares in pdf["rows"]["truth"]])
    reach = 1.15 * np.abs(centres[(truth > 0).any(0)]).max()

    def panel(ax: Axes, index: int) -> None:
        for row, curves in _truth_last(pdf["rows"]):
            values = density(curves[index])
            ax.semilogy(centres, np.where(values > 0, values, np.nan), **_look(row))
        limits = (truth[truth > 0].min() / 2, truth.max() * 3)
        ax.set(xlabel="vorticity ω [1/time]", xlim=(-reach, reach), ylim=limits)

    _by_step(figure, results, steps, panel, "density P(ω) [time]", legend)


def draw_metrics(
    figure: FigureBase, results: Results, names: Sequence[str] = PAPER_METRICS, legend: bool = True
) -> None:
    """Errors over steps: means, 95 % bootstrap intervals of the model's rows, and the noise floor in grey."""
    axes = figure.subplots(-(-len(names) // 2), 2, sharex=True, squeeze=False)
    floors = results["noise_floor"] or {}
    for ax, name in zip(axes.flat, names, strict=True):
        visible = list(floors.get(name, []))  # quantisation alone may lie far below
        for row, about in results["rows"].items():
            scores = about["metrics"][name]
            steps = np.arange(1, len(scores["mean"]) + 1)
            ax.plot(steps, scores["mean"], **_look(row), marker="o" if len(steps) == 1 else None)
            if scores["low"] and about["kind"] == "model":
                ax.fill_between(
                    steps, scores["low"], scores["high"], color=_look(row)["color"], alpha=0.15, linewidth=0
                )
            if row != "quantise_only":
                visible += scores["mean"]
        decades = np.log10([score for score in visible if score > 0] or [1e-3])
        ax.set_yscale("log")
        ax.set_ylim(10 ** np.floor(decades.min() - 0.1), 10 ** np.ceil(decades.max() + 0.1))
        if name in floors:
            ax.fill_between(steps, np.full(len(steps), 1e-30), floors[name], **FLOOR)
        ax.set_title(results["metrics"][name]["label"])
        ax.xaxis.set_major_locator(MaxNLocator(steps=[1, 5, 10], integer=True))
    for ax in axes[-1]:
        ax.set_xlabel("step")
    if legend:
        _legend(figure, axes.flat[0])


def draw_embeddings(figure: FigureBase, components: PrincipalComponents) -> None:
    """The vocabulary's embeddings in the space of their first three principal components, coloured by token id."""
    ax = figure.add_subplot(projection="3d")
    ids = np.arange(len(components.coordinates))
    if len(ids) <= 4096:  # a path through the ids shows whether neighbours stay neighbours
        ax.plot(*components.coordinates.T, color="#bbbbbb", linewidth=0.5, zorder=0)
    size = np.clip(2e4 / len(ids), 1, 18)
    points = ax.scatter(*components.coordinates.T, c=ids, cmap="viridis", s=size, depthshade=False, linewidth=0)
    ax.set(xlabel="component 1", ylabel="component 2", zlabel="component 3")
    ax.tick_params(labelsize=7, pad=0)
    ax.set_box_aspect(None, zoom=0.9)
    shares = " + ".join(f"{100 * share:.0f}" for share in components.explained)
    ax.set_title(f"embeddings of {len(ids)} ids\n{shares} = {100 * components.explained.sum():.0f} % of variance")
    figure.colorbar(points, ax=ax, label="token id (rising with ω)", shrink=0.7, pad=0.2)


def draw_curve(figure: FigureBase, training: Results) -> None:
    """Validation loss over training steps beside the marginal entropy, and nRMSE beside persistence if recorded."""
    validation = training["validation"]
    panels = [("loss", "validation loss [nat/token]", "marginal_entropy", "marginal entropy")]
    if "nrmse" in validation[-1]:
        panels.append(("nrmse", "teacher-forced nRMSE", "persistence_nrmse", "persistence"))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (key, label, reference, name) in zip(axes, panels, strict=True):
        points = [(row["step"], row[key]) for row in validation if key in row]
        ax.plot(
            *zip(*points, strict=True), color=LOOKS["expectation"]["color"], marker="o", markersize=3, label="model"
        )
        if training.get(reference) is not None:
            ax.axhline(training[reference], **LOOKS["persistence"], label=name)
        ax.set(xlabel="training step", title=label, ylim=(0, None))
        ax.legend(loc="best")


def draw_contact_sheet(
    figure: FigureBase,
    results: Results,
    examples: dict[str, np.ndarray],
    components: PrincipalComponents,
    training: Results,
) -> None:
    """The main panels on one page."""
    model, data = results["model"], results["data"]
    figure.suptitle(
        f"Leviathan, {model['num_parameters']:,} parameters, on {data['grid'][0]} x {data['grid'][1]} vorticity: "
        f"free rollout of {len(examples['truth'])} steps from one state",
        fontsize=14,
    )
    last = results["spectra"]["steps"][-1:]
    num_rows = 2 + len(_rows(results, "model"))
    montage, panels = figure.subfigures(1, 2, width_ratios=(max(1, min(1.3, 4.5 / num_rows)), 1.3))
    upper, middle, lower = panels.subfigures(3, 1, height_ratios=(1.6, 1.05, 1))
    draw_fields(montage, results, examples)
    draw_metrics(upper, results, legend=False)
    spectra, pdf = middle.subfigures(1, 2)
    draw_spectra(spectra, results, last, legend=False)
    draw_pdf(pdf, results, last, legend=False)
    if training.get("validation"):
        lower, curve = lower.subfigures(1, 2, width_ratios=(1, 1.25))
        draw_curve(curve, training)
    draw_embeddings(lower, components)
    lines = [Line2D([], [], **_look(row)) for row in results["spectra"]["rows"]]
    figure.legend(handles=[*lines, Patch(**FLOOR), Patch(**BAND)], loc="outside lower center", ncols=len(lines) + 2)


def draw_all(
    folder: Path, results: Results, examples: dict[str, np.ndarray], components: PrincipalComponents, training: Results
) -> None:
    """Writes every picture into `folder`, each whole or not at all."""
    shown = results["spectra"]["steps"]
    columns = len(shown)
    rows = 2 + len(_rows(results, "model"))
    pictures: dict[str, tuple[tuple[float, float], Callable[[FigureBase], None]]] = {
        "fields": ((2 * columns + 0.8, 2.15 * rows + 1), lambda f: draw_fields(f, results, examples)),
        "spectra": ((3.4 * columns + 0.6, 4.2), lambda f: draw_spectra(f, results, shown)),
        "pdf": ((3.4 * columns + 0.6, 4.2), lambda f: draw_pdf(f, results, shown)),
        "metrics": ((10, 7), lambda f: draw_metrics(f, results)),
        "embeddings": ((7, 6), lambda f: draw_embeddings(f, components)),
        "contact_sheet": (
            (17, max(10, 2.2 * rows)),
            lambda f: draw_contact_sheet(f, results, examples, components, training),
        ),
    }
    if training.get("validation"):
        pictures["curve"] = ((9, 3.6), lambda f: draw_curve(f, training))
    for name, (size, draw) in pictures.items():
        save(folder / f"{name}.png", size, draw)


def save(path: Path, size: tuple[float, float], draw: Callable[[FigureBase], None]) -> None:
    """Writes what `draw` draws on a figure of `size` inches as PNG, whole or not at all."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        FigureCanvasAgg(figure)
        draw(figure)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png", dpi=110)
    partial.replace(path)


def plain_ticks(axis: Axis, written: Callable[[float], str] = "{:g}".format) -> None:
    """Labels of a logarithmic axis at 1, 2 and 5 of each decade; the others would run into one another."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))
    axis.set_minor_formatter(NullFormatter())


def _rows(results: Results, kind: str) -> list[str]:
    return [row for row, about in results["rows"].items() if about["kind"] == kind]


def _truth_last(rows: dict[str, Any]) -> list[tuple[str, Any]]:
    return sorted(rows.items(), key=lambda item: item[0] == "truth")  # on top of the others


def _by_step(
    figure: FigureBase,
    results: Results,
    steps: Sequence[int],
    panel: Callable[[Axes, int], None],
    label: str,
    legend: bool,
) -> None:
    shown, dt = results["spectra"]["steps"], results["data"]["dt"]
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for ax, step in zip(axes, steps, strict=True):
        panel(ax, shown.index(step))
        ax.set_title(f"step {step}, t = {step * dt:.3g}")
    axes[0].set_ylabel(label)
    if legend:
        _legend(figure, axes[0])


def _legend(figure: FigureBase, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    columns = min(len(labels), 5 if len(labels) > 8 else 4)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
