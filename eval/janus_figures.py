"""Pictures of the study of Janus, from the record of `eval.janus` and the arrays beside it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray
from safetensors.numpy import load_file

from eval.figures import plain_ticks, principal_components, save
from eval.janus_targets import OURS, PUBLISHED, RIVAL
from leviathan.janus.cells import whole_cell
from training.voxels import View, render

Record = Mapping[str, Any]
Arrays = Mapping[str, NDArray]
Picture = tuple[tuple[float, float], Callable[[FigureBase], None]]

ARRAYS = "arrays.safetensors"
BEAM = ("beam", "profile")  # written by training.janus_beam
# Okabe and Ito's palette; a marker besides, for print in grey.
HEADS = {OURS: ("#D55E00", "o", "separable head"), RIVAL: ("#0072B2", "s", "MLP head")}
SCHEMES = {"rotated": ("#D55E00", "o", "-"), "hexahedral": ("#0072B2", "s", (0, (5, 1.5)))}
OTHERS = ("#009E73", "^", ":")
UNITS = {"permeability": "edge²", "conductivity": "of the solid's", "volume_fraction": ""}
PARITY = ("C1111", "C1122", "C2323", "permeability")
DRIFT = {"C1111": "C1111 / the solid's", "C2323": "C2323 / the solid's", "permeability": "permeability [edge²]"}
LEAST_ERROR = 1e-5  # of a logarithmic axis
ACROSS = 8  # cells in a line
LOOK = View(azimuth=-60.0, elevation=28.0, width=200, samples=2)
SOLID = (0.84, 0.62, 0.30)


def head_name(head: str) -> str:
    """A head of a record for people."""
    return HEADS[head][2] if head in HEADS else f"{head.replace('_', ' ')} head"


def spelled(name: str) -> str:
    """A property, a cell or a scheme of a record for people."""
    return {"schwarz_p": "Schwarz P"}.get(name, name.replace("_", " "))


def property_names(record: Record) -> list[str]:
    """Of the models, in the order of the arrays' columns."""
    models = record.get("models") or {}
    rows = models.get("rows") or [{}]
    return list(models.get("property_names") or rows[0].get("test", {}).get("r2", ()))


def draw_parity(figure: FigureBase, names: list[str], prediction: NDArray, label: NDArray) -> None:
    """Predictions against labels of held-out cells, a panel a property."""
    shown = [name for name in PARITY if name in names] or names[:4]
    for ax, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        found, true = (each[:, names.index(name)].astype(np.float64) for each in (prediction, label))
        ends = [min(found.min(), true.min()), max(found.max(), true.max())]
        if name == "permeability" and ends[0] > 0:
            ax.set(xscale="log", yscale="log")
        ax.plot(ends, ends, color="#555555", linewidth=0.9, linestyle=":", zorder=1)
        ax.plot(true, found, **_dots(OURS, 0.45))
        spread = ((true - true.mean()) ** 2).sum()
        title = spelled(name)
        if spread > 0:
            title += f": R² = {1 - ((found - true) ** 2).sum() / spread:.4f}"
        unit = UNITS.get(name, "GPa")
        ax.set(title=title, xlabel="homogenised" + f" [{unit}]" * bool(unit), box_aspect=1)
        if ax.get_xscale() == "log":
            decades(ax)
    figure.axes[0].set_ylabel("predicted")


def decades(ax: Axes) -> None:
    """Labels both logarithmic axes at powers of ten alone: more would not fit below a narrow panel."""
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_minor_formatter(NullFormatter())


def draw_latent(figure: FigureBase, codes: NDArray, stiffness: NDArray) -> None:
    """Latents of held-out cells along their first two principal components, coloured by stiffness."""
    components = principal_components(torch.from_numpy(codes), 2)
    ax = figure.subplots()
    points = ax.scatter(*components.coordinates.T, c=stiffness, cmap="viridis", s=14, linewidth=0)
    first, second = (
        f"component {i + 1}: {100 * share:.0f} % of variance" for i, share in enumerate(components.explained)
    )
    ax.set(xlabel=first, ylabel=second, title=f"latents of {len(codes):,} held-out cells, {codes.shape[1]} coordinates")
    figure.colorbar(points, ax=ax, label="C1111 [GPa]")


def draw_reconstructions(figure: FigureBase, cells: NDArray, logits: NDArray) -> None:
    """Mid-plane slices, a column a cell: the cell, the decoder's probability of solid, and the voxels that differ."""
    axes = figure.subplots(3, len(cells), squeeze=False)
    solid = cells > 0.5
    wrong = solid != (logits > 0)
    chance = 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -60, 60)))
    for line, pictures, colours in zip(axes, (solid, chance, wrong), ("Greys", "Greys", "Reds"), strict=True):
        for ax, picture in zip(line, mid_planes(pictures.astype(np.float32)), strict=True):
            _slice(ax, picture, colours)
    for ax, share in zip(axes[-1], wrong.reshape(len(cells), -1).mean(1), strict=True):
        ax.set_xlabel(f"{100 * share:.2f} %")
    for ax, words in zip(axes[:, 0], ("cell", "probability", "wrong voxels"), strict=True):
        ax.set_ylabel(words)
    figure.suptitle("Held-out cells at their mid-plane; below: share of wrong voxels of the whole cell")


def draw_inversion(figure: FigureBase, part: Record) -> None:
    """Errors of the best candidates by head, predicted and checked; target by target; and the ratio of their means."""
    heads = [head for head in HEADS if any(row["head"] == head for row in part["rows"])]
    strips, pairs, ratios = figure.subplots(1, 3, width_ratios=(1.35, 1, 0.8))
    kinds = {
        "predicted_error": "best candidate,\npredicted",
        "checked_error": "best candidate,\nchecked",
        "mean_checked_error": "mean of candidates,\nchecked",
    }
    jitter = np.random.default_rng(0)
    for place, (key, _) in enumerate(kinds.items()):
        for i, head in enumerate(heads):
            values = np.array([row[key] for row in part["rows"] if row["head"] == head and row.get(key) is not None])
            if not len(values):
                continue
            shift = place + 0.4 * (i - (len(heads) - 1) / 2)
            x = shift + jitter.uniform(-0.13, 0.13, len(values))
            strips.plot(x, np.maximum(values, LEAST_ERROR), **_dots(head, 0.3), zorder=2)
            low, middle, high = np.maximum(np.quantile(values, [0.25, 0.5, 0.75]), LEAST_ERROR)
            strips.plot([shift] * 2, [low, high], color="black", linewidth=2.5, zorder=3)
            strips.plot(shift, middle, marker="_", markersize=17, markeredgewidth=2.5, color="black", zorder=4)
    strips.set(
        yscale="log", xlim=(-0.5, len(kinds) - 0.5), title="a point: a target and a seed\nblack: median and quartiles"
    )
    strips.set_ylabel("relative error of C1111")
    strips.set_xticks(range(len(kinds)), labels=kinds.values())
    strips.grid(visible=False, axis="x")
    for head in heads:
        strips.plot([], [], **_dots(head, 1.0), label=head_name(head))
    strips.legend(loc="upper left")
    _draw_pairs(pairs, part)
    _draw_ratios(ratios, part)


def _draw_pairs(ax: Axes, part: Record) -> None:
    errors = {(row["head"], row["seed"], row["index"]): row["checked_error"] for row in part["rows"]}
    keys = [key[1:] for key in errors if key[0] == OURS and errors.get((RIVAL, *key[1:])) is not None]
    points = [(errors[RIVAL, *key], errors[OURS, *key]) for key in keys if errors[OURS, *key] is not None]
    ax.set_visible(bool(points))
    if not points:
        return
    x, y = np.maximum(np.array(points), LEAST_ERROR).T
    ends = [min(x.min(), y.min()) / 1.3, 1.3 * max(x.max(), y.max())]
    ax.loglog(ends, ends, color="#555555", linewidth=0.9, linestyle=":")
    ax.loglog(x, y, **_dots(OURS, 0.5))
    title = f"checked error, target by target:\n{100 * (y < x).mean():.0f} % below the line"
    ax.set(xlabel="MLP head", ylabel="separable head", title=title, xlim=ends, ylim=ends, box_aspect=1)
    decades(ax)


def _draw_ratios(ax: Axes, part: Record) -> None:
    rows = {"best\ncandidate": part.get("ratio") or {}, "mean of\ncandidates": part.get("ratio_candidates") or {}}
    rows = {name: ratio for name, ratio in rows.items() if ratio.get("value") is not None}
    ax.set_visible(bool(rows))
    if not rows:
        return
    ax.axhspan(*PUBLISHED["ratio"], color="#f5edd8", zorder=0)
    ax.axhline(1, color="#555555", linewidth=0.9, linestyle=":")
    for height, words, side in (
        (PUBLISHED["ratio"][1], "published, over design points", "top"),
        (1, "equal", "bottom"),
    ):
        ax.text(0.02, height, words, transform=ax.get_yaxis_transform(), va=side, fontsize=8, color="#555555")
    for place, ratio in enumerate(rows.values()):
        if None not in (ratio["low"], ratio["high"]):
            ax.plot([place] * 2, [ratio["low"], ratio["high"]], color="black", linewidth=2.5)
        ax.plot(place, ratio["value"], color=HEADS[OURS][0], marker="D", markersize=7, markeredgecolor="black")
    ax.set(yscale="log", xlim=(-0.6, len(rows) - 0.4), title="mean checked error:\nMLP head / separable head")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.8), max(high, 1.25))
    ax.yaxis.set_minor_locator(NullLocator())
    plain_ticks(ax.yaxis)
    ax.set_xticks(range(len(rows)), labels=rows)
    ax.grid(visible=False, axis="x")


def draw_gallery(figure: FigureBase, cells: NDArray, targets: NDArray, checked: NDArray) -> None:
    """The best cell of each target: looks at the first of them with their mid-planes, mid-planes of the others."""
    order = np.argsort(-targets[:, 0], kind="stable")
    seen = np.unique(np.linspace(0, len(order) - 1, min(ACROSS, len(order))).round().astype(int))
    rest = np.delete(order, seen)
    rows = 2 + -(-len(rest) // ACROSS)
    axes = figure.subplots(rows, len(seen), squeeze=False)
    solid = torch.from_numpy(cells[order[seen]].astype(np.uint8))
    for ax, whole, index in zip(axes[0], whole_cell(solid, "mirror").numpy(), order[seen], strict=True):
        ax.imshow(render(whole.astype(bool), np.full((1, 1, 1, 3), SOLID, np.float32), LOOK))
        ax.set_axis_off()
        ax.set_title(f"C1111 {targets[index, 0]:.0f} GPa\nsolid {100 * targets[index, 1]:.1f} %", fontsize=9)
    planes = mid_planes(cells.astype(np.float32))
    for ax, index in zip(axes[1:].flat, [*order[seen], *rest], strict=False):
        _slice(ax, planes[index], "Greys")
        error = checked[index] / targets[index, 0] - 1
        words = f"{checked[index]:.1f} of {targets[index, 0]:.1f} GPa\n({100 * error:+.2f} %)"
        ax.set_xlabel(words.replace("-", "−"), fontsize=8)
    for ax in axes[1:].flat[len(order) :]:
        ax.set_visible(False)
    figure.suptitle("Cells found for targets, and their mid-planes (black: solid); below: C1111 by homogenisation")


def draw_digits(figure: FigureBase, images: NDArray, part: Record | None) -> None:
    """Candidates of each class, a column a class, and the share of them that the outside classifier recognises."""
    shares: dict[int, list[float]] = {}
    for row in (part or {}).get("rows", []):
        for each in row["classes"]:
            shares.setdefault(each["class"], []).append(each["recognised"])
    shown = images[:, :ACROSS]
    axes = figure.subplots(shown.shape[1], len(shown), squeeze=False)
    for digit, column in enumerate(shown):
        for ax, picture in zip(axes[:, digit], column, strict=True):
            ax.imshow(picture, cmap="Greys", interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
        found = shares.get(digit)
        axes[0, digit].set_title(f"{digit}" + (f"\n{100 * np.mean(found):.0f} %" if found else ""))
    words = "; share that another classifier recognises" * bool(shares)
    figure.suptitle(f"Images found for each class, best candidates first{words}")


def draw_drift(figure: FigureBase, rows: list[Record]) -> None:
    """Effective properties against resolution, a column a property, a row a cell."""
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    shown = [key for key in DRIFT if any(row.get(key) is not None for row in rows)]
    axes = figure.subplots(len(cells), len(shown), squeeze=False)
    for line, cell in zip(axes, cells, strict=True):
        for ax, key in zip(line, shown, strict=True):
            known = [row for row in rows if row["cell"] == cell and row.get(key) is not None]
            ax.set_visible(bool(known))
            if key == "permeability":  # has no scheme
                ax.plot(
                    *zip(*sorted({(row["edge"], row[key]) for row in known}), strict=True), color="#333333", marker="o"
                )
            for scheme in dict.fromkeys(row["scheme"] for row in known if key != "permeability"):
                points = sorted((row["edge"], row[key]) for row in known if row["scheme"] == scheme)
                colour, marker, style = SCHEMES.get(scheme, OTHERS)
                ax.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=style, label=spelled(scheme))
            ax.set_xscale("log", base=2)
            ax.set_xticks(sorted({row["edge"] for row in rows}), labels=sorted({row["edge"] for row in rows}))
            ax.minorticks_off()
            ax.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3), useMathText=True)
            solid = known[0]["volume_fraction"] if known else 0
            ax.set(title=f"{spelled(cell)}, solid {solid:g}", ylabel=DRIFT[key])
            if known and key != "permeability":
                ax.legend(loc="best", fontsize=8)
    for ax in axes[-1]:
        ax.set_xlabel("voxels along an edge")


def mid_planes(orthants: NDArray) -> NDArray:
    """Whole slices (cells, n, n) through the middle of mirror-symmetric cells, from their octants (cells, m, m, m)."""
    return whole_cell(torch.from_numpy(np.ascontiguousarray(orthants[:, :, :, -1])), "mirror").numpy()


def _slice(ax: Axes, picture: NDArray, colours: str) -> None:
    ax.imshow(picture.T, origin="lower", cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)
    ax.spines[:].set_visible(True)


def _dots(head: str, alpha: float) -> dict[str, Any]:
    colour, marker, _ = HEADS[head]
    return {
        "color": colour,
        "marker": marker,
        "markersize": 4,
        "linestyle": "none",
        "markeredgewidth": 0,
        "alpha": alpha,
    }


def pictures(record: Record, arrays: Arrays) -> Iterator[tuple[str, Picture]]:
    """Name, size and drawing of each picture that a record and its arrays have, in the order of the card."""

    def have(*names: str) -> list[NDArray] | None:
        return [arrays[name] for name in names] if all(name in arrays for name in names) else None

    names = property_names(record)
    found = have("parity.prediction", "parity.label")
    if found and names and len(names) == found[0].shape[1]:
        panels = sum(name in names for name in PARITY) or min(4, len(names))
        yield "parity", ((3.3 * panels, 3.7), lambda f, found=found: draw_parity(f, names, *found))
    if found := have("latent.codes", "latent.C1111"):
        yield "latent", ((6.4, 4.8), lambda f, found=found: draw_latent(f, *found))
    if found := have("reconstruction.cells", "reconstruction.logits"):
        size = (max(6.5, 1.3 * len(found[0]) + 0.4), 5.0)
        yield "reconstructions", (size, lambda f, found=found: draw_reconstructions(f, *found))
    if part := record.get("inversion"):
        yield "inversion", ((13, 4.6), lambda f: draw_inversion(f, part))
    if found := have("gallery.cells", "gallery.targets", "gallery.checked"):
        count = len(found[0])
        rows = 2 + -(-max(0, count - ACROSS) // ACROSS)
        yield (
            "gallery",
            (
                (max(8.5, 1.65 * min(ACROSS, count) + 0.3), 2.05 * rows + 0.7),
                lambda f, found=found: draw_gallery(f, *found),
            ),
        )
    if found := have("digits.images"):
        size = (10.0, 0.95 * min(ACROSS, found[0].shape[1]) + 1.1)
        yield "digits", (size, lambda f, found=found: draw_digits(f, *found, record.get("digits")))
    if rows := (record.get("homogenization") or {}).get("drift"):
        panels = sum(any(row.get(key) is not None for row in rows) for key in DRIFT)
        size = (3.9 * panels, 0.4 + 2.9 * len({row["cell"] for row in rows}))
        yield "drift", (size, lambda f: draw_drift(f, rows))


def arrays_of(folder: Path) -> Arrays:
    """The arrays beside a record; none where there is no file."""
    path = folder / ARRAYS
    return load_file(path) if path.is_file() else {}


def pictures_of(folder: Path, record: Record) -> list[str]:
    """Names of the pictures that the card of a record can show, those of the beam among them."""
    names = [name for name, _ in pictures(record, arrays_of(folder))]
    return names + [name for name in BEAM if (folder / f"{name}.png").is_file()]


def draw_all(folder: Path, record: Record) -> None:
    """Writes the pictures of a record and of the arrays beside it into `folder`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (size, draw) in pictures(record, arrays_of(folder)):
        save(folder / f"{name}.png", size, draw)
