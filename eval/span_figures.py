"""Pictures of the study of SPAN, from its record and the arrays beside it."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from safetensors.numpy import load_file

from eval.figures import save
from eval.span_study import OURS

Record = Mapping[str, Any]
Arrays = Mapping[str, NDArray]

VALUES = "values.safetensors"
# Okabe and Ito's palette; a line style besides, for print in grey.
LOOKS = {
    OURS: ("#D55E00", "-", "SPAN"),
    "mlp_tanh": ("#0072B2", (0, (5, 1.5)), "MLP, tanh"),
    "mlp_relu": ("#56B4E9", (0, (3, 1, 1, 1)), "MLP, ReLU"),
    "kan": ("#009E73", "-.", "KAN"),
}
OTHERS = ("#CC79A7", "#E69F00", "#7f7f7f", "#8c564b")
BARS = {
    "final": "IQM of the final score",
    "area": "IQM of the area under the curve",
    "success": "share of runs that succeed",
}
MAX_SPEED = 8.0  # radians a second: Pendulum-v1's bound


def look(network: str) -> tuple[str, Any, str]:
    """Colour, line style and name of a network, the same in every picture, also of one that `LOOKS` does not know."""
    return LOOKS.get(network, (OTHERS[sum(map(ord, network)) % len(OTHERS)], ":", network.replace("_", " ")))


def titled(task: str) -> str:
    """A task of a record for people."""
    return task.replace("_", " ")


def draw_curves(figure: FigureBase, summary: Record, size: str) -> None:
    """Learning curves of a size, a panel a task: interquartile means over runs and their bootstrap intervals."""
    rows = [row for row in summary["rows"] if row["size"] == size]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    across = columns(len(tasks))
    axes = figure.subplots(-(-len(tasks) // across), across, squeeze=False)
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, tasks, strict=False):
        about = summary["tasks"][task]
        low, high, threshold = (about["reference"][name] for name in ("low", "high", "threshold"))
        for row in (row for row in rows if row["task"] == task):
            colour, style, _ = look(row["network"])
            curve = row["curve"]
            on_top = 3 if row["network"] == OURS else 2
            ax.plot(about["steps"], curve["value"], color=colour, linestyle=style, zorder=on_top)
            if curve["low"] is not None:
                band = {"color": colour, "alpha": 0.15, "linewidth": 0}
                ax.fill_between(about["steps"], curve["low"], curve["high"], **band)
        ax.axhline((threshold - low) / (high - low), color="#555555", linewidth=0.9, linestyle=":", zorder=1)
        ax.set(title=f"{titled(task)}, {about['algorithm']}", xlim=(0, about["total_steps"]))
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_formatter(FuncFormatter(_thousands))
        ax.yaxis.set_major_locator(MaxNLocator(5))
    for ax in axes[:, 0]:
        ax.set_ylabel("normalised return")
    for ax in axes.flat[len(tasks) - across : len(tasks)]:  # the lowest of each column
        ax.set_xlabel("environment steps")
    handles = [_line(network) for network in dict.fromkeys(row["network"] for row in rows)]
    handles.append(Line2D([], [], color="#555555", linewidth=0.9, linestyle=":", label="threshold"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))


def draw_aggregates(figure: FigureBase, summary: Record) -> None:
    """Over all tasks, a row a size: scores and successes by network, and the chances that a run of SPAN is better."""
    by_size = {size: [row for row in summary["aggregates"] if row["size"] == size] for size in _sizes(summary)}
    heights = [len(rows) for rows in by_size.values()]
    axes = figure.subplots(
        len(by_size), len(BARS) + 1, squeeze=False, sharex="col", gridspec_kw={"height_ratios": heights}
    )
    for line, (size, rows) in zip(axes, by_size.items(), strict=True):
        most = max(len(row["tasks"]) for row in rows)
        labels = {}
        for row in rows:  # a mean over fewer tasks is another mean
            fewer = f"\n{len(row['tasks'])} of {most} tasks" * (len(row["tasks"]) < most)
            labels[row["network"]] = look(row["network"])[2] + fewer
        for ax, name in zip(line, BARS, strict=False):
            _bars(ax, {row["network"]: row[name] for row in rows}, labels if ax is line[0] else None)
        found = [each for each in summary["comparisons"] if each["size"] == size and each["against"] in labels]
        _bars(line[-1], {each["against"]: each["final_improvement"] for each in found}, labels)
        line[-1].set_visible(bool(found))
        line[-1].axvline(0.5, color="#555555", linewidth=0.9, linestyle=":")
        line[0].set_ylabel(f"size: {size}")
    for ax, title in zip(axes[0], (*BARS.values(), "P(final score of SPAN > …)"), strict=True):
        ax.set_title(title)
    for ax in axes[0, -2:]:
        ax.set_xlim(-0.03, 1.03)


def _bars(ax: Axes, estimates: Mapping[str, Record], labels: Mapping[str, str] | None) -> None:
    """An interval a network, and a tick at the value."""
    ax.use_sticky_edges = False
    for place, (network, estimate) in enumerate(estimates.items()):
        colour = look(network)[0]
        low, high = (estimate["value"] if estimate[end] is None else estimate[end] for end in ("low", "high"))
        ax.barh(place, high - low, left=low, height=0.6, color=colour, alpha=0.7)
        ax.plot([estimate["value"]] * 2, [place - 0.3, place + 0.3], color="black", linewidth=1.6, zorder=3)
        ax.plot(estimate["value"], place, color=colour, marker="o", markersize=5, markeredgecolor="black", zorder=4)
    ax.set_yticks(range(len(estimates)), labels=[] if labels is None else [labels[network] for network in estimates])
    ax.set_ylim(max(1, len(estimates)) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))


def value_grid(value: Callable[[NDArray, NDArray], ArrayLike], num_points: int = 101) -> dict[str, NDArray]:
    """Values of Pendulum's states on a grid, for `draw_values` and a safetensors file.

    Args:
        value: Of angles [rad] and angular velocities [rad/s], arrays of one shape (N,) -> (N,).
        num_points: Along each axis.

    Returns:
        angle (N,), velocity (N,) and value (N, N), whose rows are velocities, in float32.
    """
    angle, velocity = np.linspace(-np.pi, np.pi, num_points), np.linspace(-MAX_SPEED, MAX_SPEED, num_points)
    at = np.meshgrid(angle, velocity)
    values = np.asarray(value(*(axis.ravel() for axis in at))).reshape(num_points, num_points)
    grid = {"angle": angle, "velocity": velocity, "value": values}
    return {name: each.astype(np.float32) for name, each in grid.items()}


def draw_values(figure: FigureBase, arrays: Arrays) -> None:
    """Value functions of Pendulum's states, a panel a network, on one colour scale.

    Args:
        figure: To draw on.
        arrays: angle and velocity of `value_grid`, and a grid under the name of each network.
    """
    networks = [name for name in dict.fromkeys((*LOOKS, *arrays)) if name in arrays.keys() - {"angle", "velocity"}]
    levels = MaxNLocator(12).tick_values(*(end([end(arrays[name]) for name in networks]) for end in (np.min, np.max)))
    axes = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, networks, strict=True):
        at = arrays["angle"], arrays["velocity"], arrays[name]
        image = ax.pcolormesh(*at, cmap="viridis", rasterized=True, vmin=levels[0], vmax=levels[-1])
        ax.contour(*at, levels=levels, colors="white", linewidths=0.5, linestyles="solid")
        ax.set(title=look(name)[2], xlabel="angle from upright [rad]")
        ax.set_xticks([-np.pi, 0, np.pi], labels=["−π", "0", "π"])
        ax.grid(visible=False)
    axes[0].set_ylabel("angular velocity [rad/s]")
    figure.colorbar(image, ax=list(axes), label="value of the state", aspect=30)


def write_gif(path: Path, frames: Sequence[NDArray], *, frames_per_second: float) -> None:
    """Writes RGB frames (H, W, 3) of uint8 as an animation that repeats, whole or not at all.

    Raises:
        ValueError: If there are no frames, or they are not of this kind and of one size.
    """
    shapes = {(frame.shape, str(frame.dtype)) for frame in frames}
    if len(shapes) != 1 or frames[0].ndim != 3 or frames[0].shape[2] != 3 or frames[0].dtype != np.uint8:
        raise ValueError(f"frames are of {sorted(shapes)}; expected at least one, all (H, W, 3) of uint8 and one size.")
    if not frames_per_second > 0:
        raise ValueError(f"frames_per_second = {frames_per_second}; expected a positive number.")
    # One palette for all frames: with one each the background flickers.
    palette = Image.fromarray(np.concatenate(frames[:: max(1, len(frames) // 8)])).quantize(256)
    first, *rest = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    written = io.BytesIO()
    options = {"duration": round(1000 / frames_per_second), "loop": 0, "optimize": True}
    first.save(written, format="GIF", save_all=True, append_images=rest, **options)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(written.getvalue())
    partial.replace(path)


def columns(num_tasks: int) -> int:
    """Panels beside one another: at most four, in rows that are as even as can be."""
    return -(-num_tasks // -(-num_tasks // 4))


def pictures_of(folder: Path, record: Record) -> list[str]:
    """Names of the pictures that a record and the arrays beside it have, in the order of the card."""
    summary = record["summary"]
    sizes = _sizes(summary)
    names = ["aggregates"] * bool(sizes) + [f"curves_{size}" for size in sizes]
    return names + ["values"] * (folder / VALUES).is_file()


def draw_all(folder: Path, record: Record) -> None:
    """Writes the pictures of a record into `folder`, where `VALUES` may lie, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = record["summary"]
    for name in pictures_of(folder, record):
        if name == "aggregates":
            height = 1.2 + 0.48 * len(summary["aggregates"])
            save(folder / f"{name}.png", (13, height), lambda f: draw_aggregates(f, summary))
        elif name == "values":
            arrays = load_file(folder / VALUES)
            save(folder / f"{name}.png", (9, 3.9), lambda f, arrays=arrays: draw_values(f, arrays))
        else:
            size = name.removeprefix("curves_")
            tasks = {row["task"] for row in summary["rows"] if row["size"] == size}
            across = columns(len(tasks))
            inches = (max(6.5, 3.3 * across), 0.5 + 2.9 * -(-len(tasks) // across))
            save(folder / f"{name}.png", inches, lambda f, size=size: draw_curves(f, summary, size))


def _sizes(summary: Record) -> list[str]:
    return list(dict.fromkeys(row["size"] for row in summary["rows"]))


def _line(network: str) -> Line2D:
    colour, style, name = look(network)
    return Line2D([], [], color=colour, linestyle=style, label=name)


def _thousands(value: float, _: int) -> str:
    return "0" if value == 0 else f"{value / 1000:g}k"
