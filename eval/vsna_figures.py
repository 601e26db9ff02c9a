"""Pictures of the study of VSNA, from the record of `eval.vsna` and the slices beside it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, MaxNLocator
from numpy.typing import NDArray
from safetensors.numpy import load_file

from eval.figures import plain_ticks, save
from eval.vsna_targets import FIELDS, PUBLISHED_FRONTIER

Record = Mapping[str, Any]
Arrays = Mapping[str, NDArray]

# Okabe and Ito's palette; ours in its warm colours.
LOOKS = {
    "cp": ("#D55E00", "o", "VSNA, sum of products"),
    "tucker": ("#E69F00", "D", "VSNA, the same in reduced bases"),
    "tensor_train": ("#0072B2", "s", "VSNA, tensor train"),
    "train": ("#0072B2", "s", "VSNA, tensor train"),
    "amen": ("#009E73", "^", "torchTT, AMEn"),
    "pinn": ("#CC79A7", "v", "network (PINN) of equal parameters"),
    "greedy": ("#7f7f7f", "P", "greedy sum of products (PGD)"),
    "field": ("#D55E00", "*", "VSNA, the same nodes and times"),
    "scattered": ("#E69F00", "*", "VSNA, as many random points"),
    "P1": ("#56B4E9", "^", "scikit-fem, degree 1, one solve"),
    "P2": ("#009E73", "v", "scikit-fem, degree 2, one solve"),
}
DEGREES = {1: ("#56B4E9", "^"), 2: ("#009E73", "s"), 3: ("#D55E00", "o")}
KINDS = {"chebyshev": ("#D55E00", "-"), "legendre": ("#0072B2", (0, (4, 2))), "fourier": ("#009E73", "-")}
PROBLEMS = {
    "poisson_sines": "Poisson, a product of sines",
    "poisson_ridge": "Poisson, a ridge across the diagonal",
    "heat": "heat, for all diffusivities",
    "plume": "plume in six inputs",
    "laser": "laser in seven inputs",
    "periodic": "periodic advection-diffusion",
}
ERROR = "relative L2 error"


def named(name: str) -> str:
    """A problem of a record for people."""
    return PROBLEMS.get(name, name.replace("_", " "))


def draw_convergence(figure: FigureBase, part: Record) -> None:
    """Errors of splines against cells, a panel a problem with lines of the expected slopes; then of spectral axes."""
    splines, spectral = ([row for row in part["rows"] if (row["degree"] is None) == flag] for flag in (False, True))
    problems = list(dict.fromkeys(row["problem"] for row in splines))
    panels = figure.subplots(1, len(problems) + 1, squeeze=False)[0]
    rates = {(rate["problem"], rate["kind"], rate["degree"]): rate for rate in part["rates"]}
    for ax, problem in zip(panels, problems, strict=False):
        for degree, (colour, marker) in DEGREES.items():
            curve = [row for row in splines if (row["problem"], row["degree"]) == (problem, degree)]
            if not curve:
                continue
            sizes, errors = np.array([[row["size"], row["relative_l2"]] for row in curve]).T
            slope = rates[problem, "bspline", degree]["slope"]
            ax.loglog(sizes, errors, color=colour, marker=marker, label=f"degree {degree}: slope {_signed(slope)}")
            ideal = errors[-1] * (sizes / sizes[-1]) ** (-degree - 1.0)
            ax.loglog(sizes, ideal, color="#999999", linewidth=0.9, linestyle=":", zorder=0)
        ax.set(title=named(problem), xlabel="cells along x")
        ax.set_xticks(sorted({row["size"] for row in splines if row["problem"] == problem}), minor=False)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.minorticks_off()
        ax.legend(loc="lower left", title="dotted: −(degree + 1)", title_fontsize=8)
    for problem, kind in dict.fromkeys((row["problem"], row["kind"]) for row in spectral):
        curve = [row for row in spectral if (row["problem"], row["kind"]) == (problem, kind)]
        colour, style = KINDS[kind]
        points = zip(*((row["size"], row["relative_l2"]) for row in curve), strict=True)
        marker = "o" if problem == "poisson_ridge" else "s"
        words = f"{named(problem).partition(',')[0]}, {kind.capitalize()}"
        panels[-1].semilogy(*points, color=colour, linestyle=style, marker=marker, markersize=4, label=words)
    panels[-1].set(title="spectral axes", xlabel="functions along each axis")
    panels[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panels[-1].legend(loc="lower left", fontsize=7, handlelength=1.2)
    panels[0].set_ylabel(ERROR)


def draw_frontier(figure: FigureBase, part: Record) -> None:
    """Error of the plume against parameters by form and cells, the published line, and where fields were to be."""
    ax = figure.subplots()
    rows = part["rows"]
    sizes = [row["num_parameters"] for row in rows]
    cells = sorted({row["num_cells"] for row in rows})
    for form in ("cp", "tucker", "tensor_train"):
        colour, marker, words = LOOKS[form]
        slope = part["slopes"][form]
        label = words if slope is None else f"{words}: slope {_signed(slope)}"
        for num_cells in cells:
            curve = [row for row in rows if (row["form"], row["num_cells"]) == (form, num_cells)]
            shade = 0.3 + 0.7 * (cells.index(num_cells) + 1) / len(cells)
            points = zip(*sorted((row["num_parameters"], row["relative_l2"]) for row in curve), strict=True)
            look = {"color": colour, "marker": marker, "alpha": shade, "markersize": 5}
            if curve:
                ax.loglog(*points, **look, label=label if num_cells == cells[-1] else None)
    span = np.array([min(sizes) / 1.3, max(sizes) * 1.3])
    factor, slope = PUBLISHED_FRONTIER
    look = {"color": "#000000", "linestyle": "--", "label": f"published: {factor:g} N^{_signed(slope)}"}
    ax.loglog(span, factor * span**slope, **look)
    for form, (error, size, _) in FIELDS.items():
        ax.plot(size, error, marker="*", markersize=13, color=LOOKS[form][0], markeredgecolor="black", linestyle="none")
    ax.plot([], [], marker="*", markersize=11, color="white", markeredgecolor="black", linestyle="none", label="asked")
    title = f"plume in six inputs; pale: fewer cells ({', '.join(map(str, cells))} along x, y and z)"
    ax.set(xlabel="parameters N", ylabel=f"{ERROR} over the box", title=title)
    plain_ticks(ax.xaxis, "{:,.0f}".format)
    ax.yaxis.set_major_locator(LogLocator())
    ax.legend(loc="lower left")


def draw_peers(figure: FigureBase, part: Record) -> None:
    """A column a problem: error against time of all methods, and against the rank of sums of products."""
    problems = list(dict.fromkeys(row["problem"] for row in part["rows"]))
    axes = figure.subplots(2, len(problems), squeeze=False)
    handles = {}
    for column, problem in zip(axes.T, problems, strict=True):
        times, ranks = column
        for method in ("train", "cp", "amen", "greedy", "pinn"):
            rows = [row for row in part["rows"] if (row["problem"], row["method"]) == (problem, method)]
            rows = [row for row in rows if row["relative_l2"] is not None]
            colour, marker, words = LOOKS[method]
            if not rows:
                continue
            look = {"color": colour, "marker": marker, "markersize": 6}
            points = zip(*((row["seconds"], row["relative_l2"]) for row in rows), strict=True)
            (handles[words],) = times.loglog(*points, **look)
            if method in ("cp", "greedy"):
                ranks.loglog(*zip(*((row["rank"], row["relative_l2"]) for row in rows), strict=True), **look)
        times.set(title=named(problem), xlabel="time from the problem to the field [s]", ylabel=ERROR)
        ranks.set(xlabel="products of functions, the lift's included", ylabel=ERROR)
        for ax in column:
            plain_ticks(ax.xaxis)
            ax.yaxis.set_major_locator(LogLocator())
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)


def draw_speed(figure: FigureBase, rows: Sequence[Record]) -> None:
    """Error against the time of a query: a panel a problem; finite elements solve once, the field gives values."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    axes = figure.subplots(1, len(problems), squeeze=False)[0]
    handles = {}
    for ax, problem in zip(axes, problems, strict=True):
        for method in ("P1", "P2", "field", "scattered"):
            curve = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
            colour, marker, words = LOOKS[method]
            style = {"markersize": 6} if method in ("P1", "P2") else {"linestyle": "none", "markersize": 12}
            points = [[row[key] for row in curve] for key in ("seconds", "relative_l2")]
            (handles[words],) = ax.loglog(*points, color=colour, marker=marker, **style)
        ax.set(title=named(problem), xlabel="time of a query [s]")
        ax.margins(0.12)
        ax.xaxis.set_major_locator(LogLocator(numticks=6))
        ax.yaxis.set_major_locator(LogLocator(numticks=8))
    axes[0].set_ylabel(f"{ERROR} at random points")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)


def draw_plume(figure: FigureBase, part: Record, arrays: Arrays) -> None:
    """Left over time: the field, the exact plume and their difference at z = 1/2. Right, stacked, over parameters."""
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    field, exact = arrays["time.field"], arrays["time.exact"]
    errors = np.abs(field - exact)
    axes = left.subplots(3, len(part["times"]), squeeze=False)
    for line, pictures, words in zip(axes, (field, exact, errors), ("VSNA", "exact", "|difference|"), strict=True):
        largest = errors.max() if words == "|difference|" else exact.max()
        for ax, picture in zip(line, pictures, strict=True):
            image = _square(ax, picture, largest, "magma" if words == "|difference|" else "viridis")
        line[0].set_ylabel(f"{words}\ny")
        left.colorbar(image, ax=list(line), label="u", aspect=14, ticks=MaxNLocator(3), format="{x:.2g}")
    for ax, time in zip(axes[0], part["times"], strict=True):
        ax.set_title(f"t = {time:g}")
    for ax in axes[-1]:
        ax.set_xlabel("x")
    middle = part["middle"]
    left.suptitle(f"z = 0.5, ω = {middle['omega']:.3g}, D = {middle['D']:.3g}")
    omegas, diffusivities = part["omegas"], part["diffusivities"]
    axes = right.subplots(len(diffusivities), len(omegas), squeeze=False)
    stacked = arrays["stack.field"]
    for ax, picture in zip(axes.flat, stacked, strict=True):
        image = _square(ax, picture, stacked.max(), "viridis", PowerNorm(0.5, 0, stacked.max(), clip=True))
    for ax, omega in zip(axes[0], omegas, strict=True):
        ax.set_title(f"ω = {omega:.2f}")
    for ax, diffusivity in zip(axes[:, 0], diffusivities, strict=True):
        ax.set_ylabel(f"D = {diffusivity:.3f}")
    right.colorbar(image, ax=list(axes.flat), label="u at t = 1, z = 0.5", aspect=40, ticks=MaxNLocator(5))
    right.suptitle("VSNA over both parameters, t = 1")


def _square(ax: Axes, picture: NDArray, largest: float, colours: str, norm: PowerNorm | None = None) -> Any:
    limits = {"norm": norm} if norm else {"vmin": 0, "vmax": largest}
    image = ax.imshow(picture, origin="lower", extent=(0, 1, 0, 1), cmap=colours, **limits)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    return image


def draw_sweep(figure: FigureBase, part: Record) -> None:
    """The distribution of the melt pool's depth, with its quantiles."""
    depth = part["depth"]
    ax = figure.subplots()
    counts, edges = np.array(depth["counts"]), np.array(depth["edges"])
    density = counts / counts.sum() / np.diff(edges)
    ax.stairs(density, edges, fill=True, color=LOOKS["cp"][0], alpha=0.75)
    for level, value in zip(depth["levels"], depth["quantiles"], strict=True):
        ax.axvline(value, color="#333333", linewidth=1, linestyle="-" if level == 0.5 else "--")
        place = (value, 1.0)
        words = f"{100 * level:g} %\n{value:.1f} µm"
        ax.annotate(words, place, xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
    spread = depth["spread"]
    units = {"power": " W", "speed": " m/s", "shape": ""}
    words = ", ".join(f"{name} {mean:g} ± {deviation:g}{units[name]}" for name, (mean, deviation) in spread.items())
    ax.set(xlabel="depth of the melt pool [µm]", ylabel="density [1/µm]")
    figure.suptitle(
        f"{depth['num_samples']:,} draws, {depth['num_queries']:,} queries in {depth['seconds']:.1f} s\n{words}"
    )


def draw_laser(figure: FigureBase, part: Record, arrays: Arrays) -> None:
    """A row a setting: the rise on the surface and below the track at the end, and its difference from elements."""
    settings, radius = part["settings"], 1e6 * part["beam_radius"]
    x, side = radius * arrays["x"], radius * arrays["side"]
    axes = figure.subplots(len(settings), 3, squeeze=False)
    names = ("surface", "depth", "elements")
    rises = [[arrays[f"{i}.{name}"] for name in names] for i in range(len(settings))]
    hottest = max(rise.max() for line in rises for rise in line)
    peaks = [line[2].max() for line in rises]
    errors = [100 * np.abs(line[1] - line[2]) / peak for line, peak in zip(rises, peaks, strict=True)]
    largest = max(error.max() for error in errors)
    warm = {"cmap": "inferno", "norm": PowerNorm(0.5, 0, hottest, clip=True), "rasterized": True}
    for line, setting, rise, error in zip(axes, settings, rises, errors, strict=True):
        for ax, picture in zip(line, (rise[0], rise[1]), strict=False):
            hot = ax.pcolormesh(x, side, picture, **warm)
            if picture.max() > part["melting_rise"]:
                ax.contour(x, side, picture, levels=[part["melting_rise"]], colors="white", linewidths=1)
        wrong = line[2].pcolormesh(x, side, error, cmap="magma", vmin=0, vmax=largest, rasterized=True)
        for ax in line[1:]:
            ax.invert_yaxis()
        words = f"{setting['power']:g} W, {setting['speed']:g} m/s, shape {setting['shape']:g}"
        line[0].set(ylabel="y [µm]", title=f"surface: {words}")
        line[1].set(ylabel="z [µm]", title="below the track")
        line[2].set(ylabel="z [µm]", title="difference from elements")
        for ax in line:
            ax.grid(visible=False)
    for ax in axes[-1]:
        ax.set_xlabel("x behind and before the beam [µm]")
    label = "rise at the end [K]; white: melting"
    for image, columns, words, aspect in ((hot, axes[:, :2], label, 60), (wrong, axes[:, 2], "% of the peak", 30)):
        bar = {"location": "bottom", "ticks": MaxNLocator(4), "aspect": aspect}
        figure.colorbar(image, ax=list(columns.flat), label=words, **bar)


def _signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def draw_all(folder: Path, record: Record) -> None:
    """Writes a picture of every part that the record holds into `folder`, each whole or not at all."""
    pictures: dict[str, tuple[tuple[float, float], Callable[[FigureBase], None]]] = {}
    if part := record.get("convergence"):
        panels = 1 + len({row["problem"] for row in part["rows"] if row["degree"] is not None})
        pictures["convergence"] = (3.5 * panels, 4), lambda f: draw_convergence(f, record["convergence"])
    if "frontier" in record:
        pictures["frontier"] = (8, 5.5), lambda f: draw_frontier(f, record["frontier"])
    if "peers" in record:
        pictures["peers"] = (10, 7.5), lambda f: draw_peers(f, record["peers"])
    if rows := [row for name in ("speed", "laser") for row in record.get(name, {}).get("rows", [])]:
        pictures["speed"] = (max(8, 3.8 * len({row["problem"] for row in rows})), 4.2), lambda f: draw_speed(f, rows)
    if "sweep" in record:
        pictures["sweep"] = (7, 4.2), lambda f: draw_sweep(f, record["sweep"])
    for name, draw, size in (("plume", draw_plume, (14, 6.6)), ("laser", draw_laser, (13, 6))):
        if name in record:
            arrays = load_file(folder / f"{name}.safetensors")
            pictures[name] = size, lambda f, draw=draw, name=name, arrays=arrays: draw(f, record[name], arrays)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (size, draw) in pictures.items():
        save(folder / f"{name}.png", size, draw)
