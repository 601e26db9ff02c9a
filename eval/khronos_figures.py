"""Pictures of the study of KHRONOS, from the records of `eval.khronos` and `training.khronos_inconel`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray

from eval.figures import LOOKS, plain_ticks, save

Record = Mapping[str, Any]
Arrays = Mapping[str, NDArray]

OURS = "khronos"
OURS_COLOUR = "#D55E00"
# Okabe and Ito's palette, a colour and a marker for each peer; ours is apart from all.
PEERS = {
    "gaussian_process": ("#0072B2", "s"),
    "xgboost": ("#009E73", "^"),
    "hist_gradient_boosting": ("#56B4E9", "v"),
    "mlp": ("#CC79A7", "D"),
    "ridge": ("#7f7f7f", "P"),
    "logistic_regression": ("#7f7f7f", "P"),
    "pyinn": ("#0072B2", "s"),
    "scikit-fem": ("#009E73", "^"),
    "pykan": ("#CC79A7", "D"),
}
DEGREES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)))
BAND = {"color": OURS_COLOUR, "alpha": 0.2, "linewidth": 0}
# Of scalograms: where starts lie, or that they go on to the most probable solution.
SEARCHES = {
    "box": ("#0072B2", "from all over the box"),
    "normal": (OURS_COLOUR, "from near the data"),
    "prior": ("#009E73", "most probable"),
}
PROBLEMS = {"kan": "one product of functions (KAN paper)", "rotated": "the same, turned: no finite sum of products"}
NAMES = {
    OURS: "KHRONOS",
    "gaussian_process": "Gaussian process",
    "hist_gradient_boosting": "hist. gradient boosting",
    "kan": "KAN",
    "mlp": "MLP",
    "uts": "UTS",
    "xgboost": "XGBoost",
}
WIDE = 5  # a panel of a wider range has a logarithmic axis


def named(name: str) -> str:
    """A name of a record for people."""
    return NAMES.get(name, name.replace("_", " "))


def poisson_curves(rows: Sequence[Record], problem: str) -> dict[tuple[str, int], list[Record]]:
    """The rows of a problem that hold an error, by method and degree, in the order of parameters."""
    curves: dict[tuple[str, int], list[Record]] = {}
    for row in sorted(rows, key=lambda row: row["num_parameters"] or 0):
        if row["problem"] == problem and row["squared_l2_error"] is not None:
            curves.setdefault((row["method"], row["degree"]), []).append(row)
    return dict(sorted(curves.items(), key=lambda item: (item[0][0] != OURS, *item[0])))


def by_dataset(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The rows of each data set that could be had."""
    sets: dict[str, list[Record]] = {}
    for row in rows:
        if row["runs"]:
            sets.setdefault(row["dataset"], []).append(row)
    return sets


def error_name(row: Record) -> str:
    """What the error of a row of tables is: the root mean squared one, or that of classification."""
    return "RMSE" if "rmse" in row["mean"] else "share of wrong labels"


def error(scores: Record) -> float:
    """The error of a run, or the mean over runs."""
    return 1 - scores["accuracy"] if scores.get("rmse") is None else scores["rmse"]


def error_spread(row: Record) -> float:
    """Its standard deviation over runs."""
    return row["standard_deviation"]["rmse" if "rmse" in row["mean"] else "accuracy"]


def draw_poisson(figure: FigureBase, rows: Sequence[Record]) -> None:
    """Squared L2 error against parameters: a panel a problem, a colour a method, a line style a degree."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    axes = figure.subplots(1, len(problems), sharey=True, squeeze=False)[0]
    lines = {}
    for ax, problem in zip(axes, problems, strict=True):
        drawn: dict[str, int] = {}
        for (method, degree), curve in poisson_curves(rows, problem).items():
            colour, marker = _look(method)
            style = DEGREES[drawn.setdefault(method, 0) % len(DEGREES)]
            drawn[method] += 1
            (line,) = ax.loglog(
                [row["num_parameters"] for row in curve],
                [row["squared_l2_error"] for row in curve],
                color=colour,
                marker=marker,
                markersize=5,
                linestyle=style,
                linewidth=2.2 if method == OURS else 1.4,
            )
            lines[f"{named(method)}, degree {degree}"] = line
        ax.set(title=PROBLEMS.get(problem, problem), xlabel="parameters")
        plain_ticks(ax.xaxis)
        ax.yaxis.set_major_locator(LogLocator(numticks=10))
        ax.tick_params(labelleft=True)
    axes[0].set_ylabel("∫ (uₕ − u)²")
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=5)


def draw_tabular(figure: FigureBase, rows: Sequence[Record]) -> None:
    """Test error against parameters: a panel a data set, a mark a method with its spread over seeds; low is good."""
    sets = by_dataset(rows)
    axes = _grid(figure, len(sets), 4)
    handles = {}
    for ax, (dataset, methods) in zip(axes, sets.items(), strict=True):
        visible = []
        for row in methods:
            colour, marker = _look(row["method"])
            mean = error(row["mean"])
            mark = {"color": colour, "marker": marker, "markersize": 10 if row["method"] == OURS else 6}
            bar = ax.errorbar(row["mean"]["num_parameters"], mean, yerr=error_spread(row), elinewidth=1.4, **mark)
            # A linear model of labels stands where that of values does.
            handles.setdefault((colour, marker), (bar[0], named(row["method"])))
            visible.append(mean)
        if min(visible) > 0 and max(visible) > WIDE * min(visible):
            ax.set_yscale("log")
            plain_ticks(ax.yaxis)
        else:
            ax.yaxis.set_major_locator(MaxNLocator(5))
        if noise := methods[0]["noise"]:
            ax.axhline(noise, color="#7f7f7f", linestyle="--", linewidth=1, zorder=0)
            ax.annotate("noise", (1, noise), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        ax.set(title=named(dataset), xscale="log", ylabel=f"test {error_name(methods[0])}")
        ax.margins(0.12)
        ax.xaxis.set_major_locator(LogLocator())
        ax.xaxis.minorticks_off()
    _below(axes, "parameters", 4)
    bars, names = zip(*handles.values(), strict=True)
    figure.legend(bars, names, loc="outside lower center", ncols=len(names))


def draw_fit(figure: FigureBase, slices: Record) -> None:
    """Slices of a fit of two inputs: the data near them, the truth, the prediction and its band."""
    rows = slices["rows"]
    axes = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for ax, row in zip(axes, rows, strict=True):
        ax.plot(row["data_x"], row["data_y"], ".", color="#8a8a8a", markersize=4, label="data near the slice")
        band = f"{100 * slices['level']:g} % for a new observation"
        ax.fill_between(row["x"], row["lower"], row["upper"], **BAND, label=band)
        ax.plot(row["x"], row["truth"], **LOOKS["truth"], label="truth")
        ax.plot(row["x"], row["prediction"], color=OURS_COLOUR, linestyle="--", label="KHRONOS")
        ax.set(title=f"x₂ = {row['at']:g}", xlabel="x₁")
    axes[0].set_ylabel(slices["function"].replace("pi", "π").replace("x_1", "x₁").replace("x_2", "x₂"))
    figure.suptitle(f"{slices['num_parameters']:,} parameters fitted to {slices['num_points']:,} points")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def draw_convergence(figure: FigureBase, errors: Record, against: Record) -> None:
    """The objective over sweeps, test error against parameters, and training error against time beside gradients."""
    sweeps, sizes, times = figure.subplots(1, 3)
    rows = errors["rows"]
    largest = max(row["num_cells"] for row in rows)
    for row in rows:
        if row["num_cells"] == largest:
            shade = 0.35 + 0.65 * (row["rank"] / max(each["rank"] for each in rows))
            objective = row["objective"]
            sweeps.semilogy(range(1, len(objective) + 1), objective, color=OURS_COLOUR, alpha=shade)
            end = (len(objective), objective[-1])
            sweeps.annotate(f"rank {row['rank']}", end, xytext=(4, 0), textcoords="offset points", va="center")
    longest = max(len(row["objective"]) for row in rows)
    sweeps.xaxis.set_major_locator(MaxNLocator(integer=True))
    title = f"{errors['function']}, {_cells(largest)}"
    sweeps.set(xlabel="sweep", ylabel="objective, its penalty chosen on the way", title=title, xlim=(0, 1.25 * longest))

    for cells, style in zip(sorted({row["num_cells"] for row in rows}), DEGREES, strict=False):
        curve = [row for row in rows if row["num_cells"] == cells]
        look = {"color": OURS_COLOUR, "linestyle": style, "marker": "o", "markersize": 5}
        points = zip(*((row["num_parameters"], row["relative_error"]) for row in curve), strict=True)
        sizes.loglog(*points, **look, label=_cells(cells))
    plain_ticks(sizes.xaxis)
    plain_ticks(sizes.yaxis)
    sizes.legend(loc="best")
    title = f"{errors['function']}, {errors['num_points']:,} points, degree {errors['degree']}"
    sizes.set(xlabel="parameters", ylabel="test RMSE / standard deviation", title=title)

    for reached, mark in ((True, {"color": "#0072B2"}), (False, {"facecolor": "none", "edgecolor": "#0072B2"})):
        trials = [trial for trial in against["trials"] if trial["reached"] == reached]
        points = [[trial[key] for trial in trials] for key in ("seconds", "error")]
        label = "gradient, came down to it" if reached else "gradient, did not"
        times.scatter(*points, **mark, label=label)
    ours = {"color": OURS_COLOUR, "marker": "*", "s": 180, "zorder": 3}
    times.scatter(against["als_seconds"], against["als_error"], **ours, label="alternating least squares")
    times.axhline(against["als_error"], color=OURS_COLOUR, linewidth=0.8, zorder=0)
    times.set(xscale="log", yscale="log", xlabel="time [s]", ylabel="training RMSE / standard deviation")
    times.set_title(f"{against['num_points']:,} points, {against['num_inputs']} inputs")
    plain_ticks(times.xaxis)
    plain_ticks(times.yaxis)
    times.legend(loc="best")


def draw_parity(figure: FigureBase, rows: Sequence[Record], inconel: Record, arrays: Arrays) -> None:
    """Predictions against the truth: properties of Inconel 718 with each wall left out in turn, then test sets."""
    properties = inconel["properties"]
    tables = [row for row in rows if row["parity"]]
    axes = _grid(figure, len(properties) + len(tables), 4)
    for ax, (name, about) in zip(axes, properties.items(), strict=False):
        rival = next(each for each in about["verdicts"] if each["splits"] == "leave_one_wall_out")["rival"]
        measured = arrays[f"{name}.measured"]
        for method in (rival, OURS):
            colour, marker = _look(method)
            r2 = next(row for row in about["methods"] if row["method"] == method)["leave_one_wall_out"]["r2"]
            mark = {"color": colour, "marker": marker, "s": 14, "alpha": 0.65, "linewidth": 0}
            label = f"{named(method)}, R² {r2:.2f}"
            ax.scatter(measured, arrays[f"{name}.predicted.{method}"], **mark, label=label)
        ax.legend(loc="upper left", fontsize=8, handletextpad=0.1, borderpad=0)
        ax.set_title(f"{named(name)} [{about['unit']}], walls left out")
    for ax, row in zip(axes[len(properties) :], tables, strict=True):
        parity = row["parity"]
        mark = {"color": OURS_COLOUR, "s": 10, "alpha": 0.5, "linewidth": 0}
        ax.scatter(parity["true"], parity["predicted"], **mark, label=f"KHRONOS, R² {row['runs'][0]['r2']:.2f}")
        ax.legend(loc="upper left", fontsize=8, handletextpad=0.1, borderpad=0)
        ax.set_title(f"{named(row['dataset'])}, test points")
    for ax in axes:
        ends = min(ax.get_xlim()[0], ax.get_ylim()[0]), max(ax.get_xlim()[1], ax.get_ylim()[1])
        ax.plot(ends, ends, color="#555555", linewidth=0.8, zorder=0)
        ax.set(xlim=ends, ylim=ends, aspect="equal")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4))
    for ax in axes[::4]:
        ax.set_ylabel("predicted")
    _below(axes, "true", 4)


def draw_inversion(figure: FigureBase, inconel: Record, arrays: Arrays) -> None:
    """A row a property: envelopes of the solutions' curves over that of the point itself; its scalogram and solutions'.

    Of those searched for near the data are shown the ones whose curves are nearest to the point's, of median distance,
    and farthest.
    """
    inversions = inconel["inversions"]
    properties = list(dict.fromkeys(row["property"] for row in inversions))
    truth, picture = arrays["left_out.curve"], arrays["left_out.scalogram"]
    point = inconel["left_out"].replace("_", "-").upper()
    time = (np.arange(len(truth)) + 0.5) / len(truth)
    # Large values are few and at low frequencies.
    norm = PowerNorm(0.5, vmin=0, vmax=picture.max(), clip=True)
    grid = figure.add_gridspec(len(properties), 6, width_ratios=(3, 1, 1, 1, 1, 1))
    pictures = []
    for line, name in enumerate(properties):
        curves = figure.add_subplot(grid[line, 0])
        shown = {point: picture}
        for row in (row for row in inversions if row["property"] == name):
            unit, target, count = inconel["properties"][name]["unit"], row["target"], row["num_solutions"]
            curves.set(title=f"{named(name)} = {target:.1f} {unit}", ylabel="mean over frequencies")
            if not count:
                continue
            colour, words = SEARCHES[row["search"]]
            mean, low, high = arrays[f"{name}.{row['search']}.envelope"]
            label = words if count == 1 else f"{count} {words}"
            if count > 1:
                curves.fill_between(time, low, high, color=colour, alpha=0.2, linewidth=0)
                label += f": mean, {100 * (row['quantiles'][1] - row['quantiles'][0]):g} %"
            curves.plot(time, mean, color=colour, linestyle="--", label=label)
            solutions = arrays[f"{name}.{row['search']}.scalograms"]
            order = np.argsort(np.square(solutions.mean(-2) - truth).sum(-1))
            if row["search"] == "prior":
                shown["most probable"] = solutions[0]
            elif row["search"] == "normal":
                places = {"nearest": 0, "median": len(order) // 2, "farthest": -1}
                shown |= {words: solutions[order[place]] for words, place in places.items()}
        curves.plot(time, truth, **LOOKS["truth"], label=f"{point}, not fitted to")
        curves.set(xscale="log", xlim=(time[0], time[-1]))
        plain_ticks(curves.xaxis)
        curves.legend(loc="upper right", fontsize=8)
        for column, words in enumerate(shown, start=1):
            pictures.append(figure.add_subplot(grid[line, column]))
            image = pictures[-1].imshow(shown[words], norm=norm, cmap="viridis", aspect="auto")
            pictures[-1].set(title=words, xlabel="time →", xticks=[], yticks=[])
            pictures[-1].grid(visible=False)
            if column == 1:
                pictures[-1].set_ylabel("frequency →")
    curves.set_xlabel("time [share of the history]")
    figure.colorbar(
        image, ax=pictures, label="magnitude [share of the colour map]", aspect=40, pad=0.01, ticks=MaxNLocator(4)
    )
    figure.suptitle(f"Scalograms of which KHRONOS predicts the properties of {point}")


def draw_all(folder: Path, study: Record, inconel: Record | None = None, arrays: Arrays | None = None) -> None:
    """Writes a picture of every part that the records hold into `folder`, each whole or not at all."""
    poisson, tables = (study.get(name, {}).get("rows", []) for name in ("poisson", "tabular"))
    fits, against = study.get("fits"), study.get("speed", {}).get("als_against_gradient")
    pictures: dict[str, tuple[tuple[float, float], Callable[[FigureBase], None]]] = {}
    if poisson:
        pictures["poisson"] = (11, 5.2), lambda f: draw_poisson(f, poisson)
    if sets := len(by_dataset(tables)):
        pictures["tabular"] = (13, 2.9 * -(-sets // 4) + 0.6), lambda f: draw_tabular(f, tables)
    if fits:
        pictures["fit"] = (11, 3.9), lambda f: draw_fit(f, fits["slices"])
    if fits and against:
        pictures["convergence"] = (13, 4), lambda f: draw_convergence(f, fits["errors"], against)
    if inconel is not None and arrays is not None:
        panels = len(inconel["properties"]) + sum(row["parity"] is not None for row in tables)
        pictures["parity"] = (13, 3.3 * -(-panels // 4)), lambda f: draw_parity(f, tables, inconel, arrays)
        pictures["inversion"] = (14, 6.4), lambda f: draw_inversion(f, inconel, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (size, draw) in pictures.items():
        save(folder / f"{name}.png", size, draw)


def _look(method: str) -> tuple[str, str]:
    return (OURS_COLOUR, "o") if method == OURS else PEERS.get(method, ("#8c564b", "X"))


def _cells(count: int) -> str:
    return f"{count} cell{'s' * (count > 1)}"


def _grid(figure: FigureBase, num_panels: int, columns: int) -> list[Axes]:
    """As many panels, row after row; what is left of the last row stays empty."""
    columns = min(columns, num_panels)
    axes = figure.subplots(-(-num_panels // columns), columns, squeeze=False).flatten()
    for ax in axes[num_panels:]:
        ax.remove()
    return list(axes[:num_panels])


def _below(axes: Sequence[Axes], label: str, columns: int) -> None:
    """Labels the panels that have none beneath them."""
    for ax in axes[max(0, len(axes) - columns) :]:
        ax.set_xlabel(label)
