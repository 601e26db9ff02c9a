"""Pictures of the study of turbulence, as the paper's figures 5 and 6 have them, and an animation."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator
from PIL import Image

from eval.figures import BAND, DIVERGING, FLOOR, LOOKS, STYLE, plain_ticks, save
from eval.metrics import PAPER_METRICS

Results = dict[str, Any]
Looks = Mapping[str, dict[str, Any]]

# Okabe and Ito's palette and four more, dealt out to the arms in their order; line styles to the samplings of an arm.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8c564b", "#b0a060", "#5e3c99", "#7fbf7b")
STYLES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
GREYS = {"persistence": ("#7f7f7f", "--"), "climatology": ("#a9a9a9", ":"), "quantise_only": ("#c4c4c4", "-.")}
CURVES = (*PAPER_METRICS, "mean_log_ratio", "correlation")


def label(row: str, about: Mapping[str, Any]) -> str:
    """A row's name for people: the arm, and the sampling where there is one."""
    if about["kind"] == "reference":
        return row.replace("_", " ")
    arm, sampling = about["arm"].replace("_", " "), about["sampling"]
    return arm if sampling is None else f"{arm}, {sampling.replace('_', ' ')}"


def looks(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Colour and line style of every row: a colour an arm, a style a sampling, grey for references."""
    arms = list(dict.fromkeys(about["arm"] for about in rows.values() if about["kind"] == "model"))
    found: dict[str, dict[str, Any]] = {"truth": LOOKS["truth"] | {"label": "truth"}}
    for row, about in rows.items():
        if about["kind"] == "reference":
            colour, style = GREYS[row]
        else:
            before = [each for each in found if each in rows and rows[each].get("arm") == about["arm"]]
            again, place = divmod(arms.index(about["arm"]), len(COLOURS))
            colour, style = COLOURS[place], STYLES[(len(before) + again) % len(STYLES)]
        found[row] = {"color": colour, "linestyle": style, "label": label(row, about)}
    return found


def headlines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The first row of every arm."""
    first: dict[str, str] = {}
    for row, about in rows.items():
        if about["kind"] == "model":
            first.setdefault(about["arm"], row)
    return list(first.values())


def best_operator(results: Results) -> str | None:
    """The operator with the least mean rank by the paper's four metrics at the last step; None if there is none."""
    rows = [row for row, about in results["rows"].items() if about.get("is_operator")]
    if not rows:
        return None
    errors = [[results["rows"][row]["metrics"][name]["mean"][-1] for row in rows] for name in PAPER_METRICS]
    return rows[int(np.argsort(np.argsort(errors, axis=1), axis=1).mean(0).argmin())]


def draw_curves(figure: FigureBase, results: Results, names: Sequence[str] = CURVES) -> None:
    """Metrics over steps (figure 5 d): means of rows, 95 % intervals of arms' first rows, the noise floor in grey."""
    axes = figure.subplots(-(-len(names) // 3), 3, sharex=True, squeeze=False)
    shown, first = looks(results["rows"]), headlines(results["rows"])
    floors = results["noise_floor"] or {}
    for ax, name in zip(axes.flat, names, strict=True):
        visible = list(floors.get(name, []))
        for row, about in results["rows"].items():
            scores = about["metrics"][name]
            steps = np.arange(1, len(scores["mean"]) + 1)
            ax.plot(steps, scores["mean"], **shown[row], marker="o" if len(steps) == 1 else None)
            if scores["low"] and row in first:
                colour = {"color": shown[row]["color"], "alpha": 0.13, "linewidth": 0}
                ax.fill_between(steps, scores["low"], scores["high"], **colour)
            if row != "quantise_only":  # far below the others
                visible += scores["mean"]
        if name != "correlation":
            decades = np.log10([score for score in visible if score > 0] or [1e-3])
            ax.set(yscale="log", ylim=(10 ** (decades.min() - 0.2), 10 ** (decades.max() + 0.2)))
            plain_ticks(ax.yaxis)
        if name in floors:
            ax.fill_between(steps, np.full(len(steps), 1e-30), floors[name], **FLOOR)
        ax.set_title(results["metrics"][name]["label"])
        ax.xaxis.set_major_locator(MaxNLocator(steps=[1, 5, 10], integer=True))
    for ax in axes[-1]:
        ax.set_xlabel(f"step (of {results['data']['dt']:.3g} time)")
    _legend(figure, axes.flat[0])


def draw_distributions(figure: FigureBase, results: Results) -> None:
    """E(k) above, P(ω) below (figures 5 e, f) of truth and arms' first rows, a column for each step but the first."""
    spectra, pdf, dt = results["spectra"], results["pdf"], results["data"]["dt"]
    columns = [index for index, step in enumerate(spectra["steps"]) if step > 1] or [0]
    axes = figure.subplots(2, len(columns), sharex="row", sharey="row", squeeze=False)
    shown = looks(results["rows"])
    rows = [*headlines(results["rows"]), "persistence", "truth"]
    side = "patch" if results["windowed"] else "field"
    for (upper, lower), index in zip(axes.T, columns, strict=True):
        step = spectra["steps"][index]
        upper.set_title(f"step {step}, t = {step * dt:.3g}")
        _spectra(upper, {row: spectra["rows"][row][index] for row in rows}, shown, results["slope_band"])
        upper.set_xlabel(f"wavenumber k [waves per {side} side]")
        _densities(lower, {row: pdf["rows"][row][index] for row in rows}, shown, pdf["low"], pdf["high"])
        lower.set_xlabel("vorticity ω [1/time]")
    axes[0, 0].set_ylabel("energy E(k) [length²/time²]")
    axes[1, 0].set_ylabel("density P(ω) [time]")
    _legend(figure, axes[0, 0])


def _spectra(ax: Axes, curves: Mapping[str, Sequence[float]], shown: Looks, band: Sequence[int]) -> None:
    ax.axvspan(*band, **BAND)
    truth = np.array(curves["truth"])
    for row, energy in curves.items():
        energy = np.array(energy)
        ax.loglog(np.arange(1, len(energy) + 1), np.where(energy > 0, energy, np.nan), **shown[row])
    ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= len(truth)]
    ax.set_xticks(ticks, labels=ticks)
    ax.minorticks_off()
    ax.set_ylim(truth[truth > 1e-9 * truth.max()].min() / 10, truth.max() * 10)


def _densities(ax: Axes, shares: Mapping[str, Sequence[float]], shown: Looks, low: float, high: float) -> None:
    """Bins are joined for the eye, not for the divergence."""
    joined = max(1, len(shares["truth"]) // 64)
    width = (high - low) / len(shares["truth"]) * joined
    centres = low + width * (np.arange(len(shares["truth"]) // joined) + 0.5)
    density = {row: np.reshape(each, (-1, joined)).sum(-1) / width for row, each in shares.items()}
    for row, values in density.items():
        ax.semilogy(centres, np.where(values > 0, values, np.nan), **shown[row])
    truth = density["truth"]
    reach = 1.15 * np.abs(centres[truth > 0]).max()
    ax.set(xlim=(-reach, reach), ylim=(truth[truth > 0].min() / 3, truth.max() * 10))


def draw_scores(figure: FigureBase, results: Results) -> None:
    """The paper's four metrics at the last step, a point for each row with its 95 % interval, and the noise floor."""
    axes = figure.subplots(1, len(PAPER_METRICS), sharey=True, squeeze=False)[0]
    shown, floors = looks(results["rows"]), results["noise_floor"] or {}
    rows = [row for row in results["rows"] if row != "quantise_only"]  # far below the others
    for ax, name in zip(axes, PAPER_METRICS, strict=True):
        low = []
        for place, row in enumerate(rows):
            score = results["rows"][row]["metrics"][name]
            mean = score["mean"][-1]
            ends = [[mean - score["low"][-1]], [score["high"][-1] - mean]] if score["low"] else None
            ax.errorbar(mean, place, xerr=ends, fmt="o", color=shown[row]["color"], markersize=7, elinewidth=2)
            low.append(mean)
        if name in floors:
            ax.axvspan(1e-30, floors[name][-1], **FLOOR)
            low.append(floors[name][-1])
        ax.set(title=results["metrics"][name]["label"], xscale="log")
        ax.set_xlim(left=min([each for each in low if each > 0] or [1e-3]) / 2)
        plain_ticks(ax.xaxis)
        ax.tick_params(axis="x", labelsize=8)
    axes[0].set_yticks(range(len(rows)), labels=[shown[row]["label"] for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle(f"step {len(score['mean'])}; grey: below the noise floor, one true flow against another")


def draw_fields(figure: FigureBase, results: Results, examples: Mapping[str, np.ndarray]) -> None:
    """One flow (figure 6): a row of fields for truth and every arm's first row, a column for each step shown."""
    steps, dt = results["spectra"]["steps"], results["data"]["dt"]
    shown = looks(results["rows"])
    rows = ["truth", *headlines(results["rows"]), "persistence"]
    axes = figure.subplots(len(rows), len(steps), squeeze=False)
    limit = _limit(examples["truth"])
    for line, row in zip(axes, rows, strict=True):
        for ax, step in zip(line, steps, strict=True):
            picture = _field(ax, examples[row][step - 1], limit, results)
        line[0].set_ylabel(shown[row]["label"].replace(", ", ",\n"))
    for ax, step in zip(axes[0], steps, strict=True):
        ax.set_title(f"step {step}, t = {step * dt:.3g}")
    bar = {"location": "bottom", "shrink": 0.6, "aspect": 40, "extend": "both", "pad": 0.02}
    figure.colorbar(picture, ax=axes, label="vorticity ω [1/time]", **bar)


def _limit(truth: np.ndarray) -> float:
    return float(np.quantile(np.abs(truth), 0.999))


def _field(ax: Axes, field: np.ndarray, limit: float, results: Results) -> Any:
    """A field [x, y] as a picture; lines part patches that know nothing of one another."""
    span = {"vmin": -limit, "vmax": limit, "cmap": DIVERGING, "interpolation": "nearest"}
    picture = ax.imshow(field.T, origin="lower", **span)
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)
    if results["windowed"]:
        for at in range(results["patch_size"], field.shape[0], results["patch_size"]):
            ax.axvline(at - 0.5, color="black", linewidth=0.6)
            ax.axhline(at - 0.5, color="black", linewidth=0.6)
    return picture


def animate(path: Path, results: Results, examples: Mapping[str, np.ndarray], rows: Sequence[str]) -> None:
    """Writes an animated GIF of some rows side by side, a frame a step, whole or not at all."""
    shown, dt, limit = looks(results["rows"]), results["data"]["dt"], _limit(examples["truth"])
    frames = []
    with mpl.rc_context(STYLE):
        for step in range(1, len(examples["truth"]) + 1):
            figure = Figure(figsize=(2.6 * len(rows), 3), layout="constrained")
            FigureCanvasAgg(figure)
            for ax, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
                _field(ax, examples[row][step - 1], limit, results)
                ax.set_title(shown[row]["label"])
            figure.suptitle(f"vorticity, step {step}, t = {step * dt:.3f}")
            with io.BytesIO() as buffer:
                figure.savefig(buffer, format="png", dpi=80)
                frames.append(Image.open(buffer).convert("P", palette=Image.Palette.ADAPTIVE, colors=64))
    partial = path.with_name(path.name + ".partial")
    times = [250] * (len(frames) - 1) + [1500]  # milliseconds; the last one stays
    frames[0].save(partial, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    partial.replace(path)


def draw_all(folder: Path, setting: str, results: Results, examples: Mapping[str, np.ndarray]) -> None:
    """Writes every picture of a setting into `folder`, its name before theirs, each whole or not at all."""
    columns, first = len(results["spectra"]["steps"]), headlines(results["rows"])
    pictures = {
        "curves": ((13, 8), lambda f: draw_curves(f, results)),
        "distributions": ((3.6 * max(2, columns - 1) + 0.6, 7.5), lambda f: draw_distributions(f, results)),
        "scores": ((14, 0.32 * len(results["rows"]) + 1.4), lambda f: draw_scores(f, results)),
        "fields": ((2 * columns + 1, 2 * (len(first) + 2) + 1), lambda f: draw_fields(f, results, examples)),
    }
    for name, (size, draw) in pictures.items():
        save(folder / f"{setting}_{name}.png", size, draw)
    operator = best_operator(results)
    rows = ["truth", first[0], *([operator] if operator not in (None, first[0]) else [])]
    animate(folder / f"{setting}.gif", results, examples, rows)


def _legend(figure: FigureBase, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 5))
