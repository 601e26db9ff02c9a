"""Pictures of a study of samplings (`eval.sampling`), drawn from its record."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from eval.figures import LOOKS, save
from eval.metrics import PAPER_METRICS
from eval.scoring import METRICS

Record = Mapping[str, Any]

SHADES = ("#08306b", "#2171b5", "#6baed6", "#bdd7e7")  # of what is ordered: steps, tolerances, temperatures
MARKERS = {"expectation": "o", "greedy": "s", "top_k": "DP", "top_p": "^", "sample": "vvvv"}


def draw_widths(figure: FigureBase, record: Record) -> None:
    """The paper's errors at the last step over the width of what each sampling keeps, in the unit of vorticity."""
    last, samplings = str(record["steps"][-1]), record["samplings"]
    axes = figure.subplots(2, 2, sharex=True)
    for ax, metric in zip(axes.flat, PAPER_METRICS, strict=True):
        for name, look in _looks(samplings).items():
            about = samplings[name]
            ax.plot(about["width"]["deviation"], about["metrics"][metric][last], linestyle="none", label=name, **look)
        ax.set_title(METRICS[metric][0])
        ax.margins(0.08)
        ax.set_ylim(0, None)
    for ax in axes[-1]:
        ax.set_xlabel("deviation of one step [1/time]")
    figure.suptitle(f"step {last}; the truth's rms is {record['true_rms']:.3g}", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _looks(samplings: Record) -> dict[str, dict[str, Any]]:
    """Colour by kind of sampling, markers or shades within a kind; the hotter, the darker."""
    looks, seen = {}, Counter()
    for name, about in samplings.items():
        kind = about["sampling"]
        index = seen[kind]
        seen[kind] += 1
        colour = SHADES[-1 - index] if kind == "sample" else LOOKS[kind]["color"]
        looks[name] = {"color": colour, "marker": MARKERS[kind][index], "markersize": 8, "markeredgecolor": "#333333"}
    return looks


def draw_ensemble(figure: FigureBase, record: Record) -> None:
    """Ranks of the truth in the ensemble, its spread and skill, and its CRPS."""
    ensemble, steps = record["ensemble"], record["steps"]
    ranks, crowd, score = figure.subplots(1, 3)
    shares = np.array(ensemble["rank_histogram"])
    edges = np.arange(shares.shape[1] + 1) - 0.5
    for step, shade in zip(steps, SHADES, strict=False):
        ranks.stairs(shares[step - 1], edges, baseline=None, color=shade, linewidth=1.8, label=f"step {step}")
    ranks.axhline(1 / shares.shape[1], **LOOKS["persistence"], label="reliable")
    ranks.set(xlabel="members below the truth", title="share of points", ylim=(0, None))
    times = np.arange(1, len(shares) + 1)
    crowd.plot(times, ensemble["skill"], color="#000000", marker="o", markersize=3, label="skill: rms error of mean")
    crowd.plot(times, ensemble["spread"], color=SHADES[1], marker="s", markersize=3, label="spread")
    crowd.set_title("spread and skill [1/time]")
    score.plot(times, ensemble["expectation_crps"], **LOOKS["expectation"], marker="o", markersize=3)
    score.plot(times, ensemble["crps"], **LOOKS["sample"], marker="s", markersize=3)
    score.set_title(METRICS["crps"][0])
    score.legend(["expectation", f"ensemble of {ensemble['num_members']}"], loc="best")
    for ax in (crowd, score):
        ax.set(xlabel="step", ylim=(0, None))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in (ranks, crowd):
        ax.legend(loc="best")


def draw_jacobi(figure: FigureBase, record: Record) -> None:
    """Passes of a patch alone for each block size and tolerance: the median, and a line up to the worst."""
    found = record["jacobi"]
    samplings = list(dict.fromkeys(row["sampling"] for row in found["rows"]))
    blocks, tolerances = (sorted({row[key] for row in found["rows"]}) for key in ("block_size", "tolerance"))
    axes = figure.subplots(1, len(samplings), sharey=True, squeeze=False)[0]
    for ax, sampling in zip(axes, samplings, strict=True):
        for i, tolerance in enumerate(tolerances):
            rows = [r for r in found["rows"] if r["sampling"] == sampling and r["tolerance"] == tolerance]
            passes = [row["alone"]["passes"] for row in rows]
            at = np.arange(len(blocks)) + 0.2 * (i - (len(tolerances) - 1) / 2)
            middle = np.array([each["median"] for each in passes])
            worst = np.array([each["worst"] for each in passes])
            look = {"color": SHADES[i], "marker": "osD"[i], "label": f"tolerance {tolerance}"}
            ax.errorbar(at, middle, (np.zeros(len(at)), worst - middle), linestyle="none", capsize=3, **look)
        ax.axhline(found["sequential_passes"], **LOOKS["persistence"], label="token by token")
        ax.set_xticks(range(len(blocks)), labels=map(str, blocks))
        ax.set(xlabel="block size [tokens]", title=sampling, ylim=(0, None))
    axes[0].set_ylabel("passes: median to worst patch")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(handles[1]))


def draw_all(folder: Path, record: Record) -> None:
    """Writes every picture into `folder`, each whole or not at all."""
    save(folder / "widths.png", (9, 7), lambda figure: draw_widths(figure, record))
    save(folder / "ensemble.png", (12, 3.8), lambda figure: draw_ensemble(figure, record))
    save(folder / "jacobi.png", (8, 4), lambda figure: draw_jacobi(figure, record))
