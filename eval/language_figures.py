"""Pictures of language models. Each `draw_*` fills a matplotlib figure or subfigure from records, so panels compose.

An arm is a model that is compared with others, trained once for each of its seeds: its records come as a list, one for
each seed. Lines and dots are means over seeds, bands and bars run from the least to the greatest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from torch import nn

from eval.figures import LOOKS, draw_curve, plain_ticks, principal_components, save

Curve = Mapping[str, Sequence[float]]
Band = Mapping[str, Any]

# Colours and line styles of eval.figures, dealt out to the arms in their order.
ARM_LOOKS = [
    {key: LOOKS[row][key] for key in ("color", "linestyle")} | {"marker": marker}
    for row, marker in zip(("expectation", "sample", "greedy", "top_k", "top_p", "truth"), "osD^vP", strict=True)
]
COSTS = {"step": "training step", "tokens": "training tokens", "seconds": "training time [s]"}
ABSENT = "#d9d9d9"
OUTLYING = (0.005, 0.995)  # shares below and above: a few tokens would take up the whole range of colours


def _looks(arms: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, line style, marker and label of each arm.

    Raises:
        ValueError: If there is no arm, an arm without a record, or more arms than can be told apart.
    """
    if not 1 <= len(arms) <= len(ARM_LOOKS) or not all(arms.values()):
        seeds = {arm: len(records) for arm, records in arms.items()}
        raise ValueError(f"arms and their seeds are {seeds}; expected 1 to {len(ARM_LOOKS)} arms, a seed each or more.")
    return {arm: look | {"label": arm.replace("_", " ")} for arm, look in zip(arms, ARM_LOOKS, strict=False)}


def _check_reference(arms: Mapping[str, Any], reference: str | None) -> None:
    if reference is not None and reference not in arms:
        raise ValueError(f"reference = {reference!r} is none of the arms; expected one of {', '.join(arms)}.")


def _stacked(arm: str, records: Sequence[Sequence[float]], what: str) -> np.ndarray:
    """Records of an arm's seeds as (seeds, entries) float64."""
    lengths = sorted({len(record) for record in records})
    if len(lengths) > 1 or lengths[0] == 0:
        raise ValueError(f"the seeds of {arm!r} have {lengths} {what}; expected one number, 1 or more.")
    return np.array(records, dtype=np.float64)


def draw_curves(figure: FigureBase, arms: Mapping[str, Sequence[Curve]], reference: str | None = None) -> None:
    """Validation loss of several arms over steps, tokens and seconds; below it the difference to a reference arm.

    Args:
        figure: What to fill.
        arms: For each arm and seed the columns "step", "tokens", "seconds" and "loss" (nats per token), an entry for
            each evaluation. The seeds of an arm are evaluated at the same steps. An evaluation at 0 has no place on
            a logarithmic axis and is left out.
        reference: The arm from which differences are drawn, at equal steps, tokens and seconds (its mean, linear in
            the logarithm between evaluations; nothing outside them). Their axis fits the last decade: the great
            differences of a start would flatten those of the end.

    Raises:
        ValueError: If seeds of an arm differ in their number of evaluations or there is none after step 0, or the
            reference is no arm.
    """
    looks = _looks(arms)
    _check_reference(arms, reference)
    loss = {arm: _stacked(arm, [curve["loss"] for curve in curves], "evaluations") for arm, curves in arms.items()}
    num_rows, late = (1 if reference is None else 2), []
    axes = figure.subplots(num_rows, len(COSTS), sharex="col", sharey="row", squeeze=False)
    for column, (cost, label) in zip(axes.T, COSTS.items(), strict=True):
        spent = {arm: _stacked(arm, [c[cost] for c in curves], "evaluations").mean(0) for arm, curves in arms.items()}
        for arm in arms:
            if spent[arm].max() <= 0:
                raise ValueError(f"{arm!r} has no evaluation after step 0, which a logarithmic axis needs.")
            _band(column[0], spent[arm], loss[arm], looks[arm])
        if reference is not None:
            at, base = (values[spent[reference] > 0] for values in (spent[reference], loss[reference].mean(0)))
            for arm in arms:
                shared = (spent[arm] >= at[0]) & (spent[arm] <= at[-1])
                level = np.interp(np.log(spent[arm][shared]), np.log(at), base)
                difference = loss[arm][:, shared] - level
                _band(column[1], spent[arm][shared], difference, looks[arm])
                late += difference[:, spent[arm][shared] >= at[-1] / 10].ravel().tolist()
        column[0].set_xscale("log")
        plain_ticks(column[-1].xaxis, lambda value: f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k")
        column[-1].set_xlabel(label)
    axes[0, 0].set_ylabel("validation loss [nat/token]")
    if reference is not None:
        axes[1, 0].set_ylabel(f"difference to {looks[reference]['label']} [nat/token]")
        margin = 0.1 * (max(late) - min(late)) or 0.01
        axes[1, 0].set_ylim(min(late) - margin, max(late) + margin)
    _legend(figure, axes[0, 0])


def _band(ax: Axes, x: np.ndarray, values: np.ndarray, look: dict[str, Any]) -> None:
    """The mean of `values` (seeds, entries) as a line over x > 0, and their range as a band."""
    shown = x > 0
    x, values = x[shown], values[:, shown]
    ax.plot(x, values.mean(0), **{key: entry for key, entry in look.items() if key != "marker"})
    ax.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0)


def draw_bands(figure: FigureBase, arms: Mapping[str, Sequence[Sequence[Band]]], reference: str | None = None) -> None:
    """Perplexity by how often the target token was seen in training, a dot for each arm in each band.

    Args:
        figure: What to fill.
        arms: For each arm and seed the bands that `eval.language.by_frequency` found, as in language.json. All are of
            one set of targets.
        reference: The arm by whose perplexity (of its mean loss over seeds) the others are divided. Without one the
            perplexities themselves are drawn, and an arm of one seed gets its interval over sequences as a bar.

    Raises:
        ValueError: If the records differ in their bands, or the reference is no arm.
    """
    looks = _looks(arms)
    _check_reference(arms, reference)
    records = [bands for seeds in arms.values() for bands in seeds]
    limits = [[(band["low"], band["high"], band["num_targets"]) for band in bands] for bands in records]
    if any(each != limits[0] for each in limits):
        raise ValueError("records have different bands or targets; expected those of one text and one set of edges.")
    shown = [index for index, (_, _, num_targets) in enumerate(limits[0]) if num_targets]
    ends = ("loss", "loss_low", "loss_high")
    found = {  # (seeds, bands, 3); an interval of None is NaN
        arm: np.array([[[bands[i][end] for end in ends] for i in shown] for bands in seeds], np.float64)
        for arm, seeds in arms.items()
    }
    level = 0.0 if reference is None else found[reference][..., 0].mean(0)
    ax = figure.subplots()
    for arm, shift in zip(arms, np.linspace(-0.3, 0.3, len(arms) + 2)[1:-1], strict=True):
        loss = found[arm][..., 0] - level
        low, high = loss.min(0), loss.max(0)
        if reference is None and len(loss) == 1:
            low, high = (np.where(np.isnan(end), loss[0], end) for end in found[arm][0, :, 1:].T)
        middle = np.exp(loss.mean(0))
        bars = [middle - np.exp(low), np.exp(high) - middle]
        style = {key: looks[arm][key] for key in ("color", "marker", "label")}
        ax.errorbar(np.arange(len(shown)) + shift, middle, bars, linestyle="none", capsize=3, markersize=5, **style)
    labels = [f"{span(*limits[0][i][:2])}\n{limits[0][i][2]:,} targets" for i in shown]
    ax.set_xticks(range(len(shown)), labels=labels, fontsize=9)
    ax.grid(visible=False, axis="x")
    ax.set(xlabel="times the target was seen in training", yscale="log", xlim=(-0.5, len(shown) - 0.5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"))
    if reference is None:
        ax.set_ylabel("perplexity")
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylabel(f"perplexity / that of {looks[reference]['label']}")
        plain_ticks(ax.yaxis, lambda value: f"{value:g}")
        ax.axhline(1, color=looks[reference]["color"], linewidth=0.8, zorder=1)
    if len(arms) > 1:
        _legend(figure, ax)


def span(low: int, high: int | None) -> str:
    """The counts of a band in words."""
    if high is None:
        return f"{low:,} or more"
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def draw_spectrum(figure: FigureBase, arms: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Share of the embeddings' variance in their first so many principal components.

    Args:
        figure: What to fill.
        arms: For each arm and seed the shares of `eval.language.explained_variance`, of all components.

    Raises:
        ValueError: If seeds of an arm differ in their number of components.
    """
    looks = _looks(arms)
    ax = figure.subplots()
    for arm, seeds in arms.items():
        shares = _stacked(arm, seeds, "components")
        _band(ax, np.arange(1, shares.shape[1] + 1), 100 * shares.cumsum(1), looks[arm])
    ax.set(xscale="log", ylim=(0, 102), xlabel="principal components", ylabel="variance explained [%]")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if len(arms) > 1:
        _legend(figure, ax)


def draw_grid(figure: FigureBase, values: Mapping[str, np.ndarray], base: int, order: np.ndarray | None = None) -> None:
    """Quantities of the tokens on the grid of their digits: a row for the high ones, a column for the low one.

    A generator of embeddings by digits gives the tokens of a row, and those of a column, a factor in common.

    Args:
        figure: What to fill, with a panel for each quantity.
        values: For each label an array (V,), entry i of token i; NaN, and places without a token, are grey.
        base: Places in a row.
        order: The place of each token, (V,); None is its id.

    Raises:
        ValueError: If base is less than 2, the arrays are not (V,) of one V, or one has no finite value.
    """
    arrays = {label: np.asarray(each, np.float64) for label, each in values.items()}
    size = next(iter(arrays.values())).size
    places = np.arange(size) if order is None else np.asarray(order)
    shapes = [each.shape for each in (*arrays.values(), places)]
    if base < 2 or set(shapes) != {(size,)} or not all(np.isfinite(each).any() for each in arrays.values()):
        raise ValueError(f"base = {base}, shapes {shapes}; expected 2 or more, and one (V,) with a number in each.")
    rows = int(places.max()) // base + 1
    axes = figure.subplots(1, len(values), squeeze=False, sharey=True)[0]
    colours = mpl.colormaps["viridis"].with_extremes(bad=ABSENT)
    for ax, (label, each) in zip(axes, arrays.items(), strict=True):
        grid = np.full(rows * base, np.nan)
        grid[places] = each
        grid = np.ma.masked_invalid(grid.reshape(rows, base))
        low, high = np.quantile(grid.compressed(), OUTLYING)
        picture = ax.imshow(grid, cmap=colours, vmin=low, vmax=high, interpolation="nearest", aspect="auto")
        ax.set(xlabel="low digit", title=label)
        ax.grid(visible=False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        figure.colorbar(picture, ax=ax, extend="both")
    axes[0].set_ylabel("high digits")


def draw_all(
    folder: Path, results: Mapping[str, Any], embedding: nn.Module, counts: np.ndarray | None, training: dict[str, Any]
) -> None:
    """Writes the pictures of one model that `eval.language` measured into `folder`.

    Without counts of the training there is nothing by frequency, without digits no grid, without its record no curve.
    """
    explained = results["embedding"]
    spectra = {"all tokens alike": [explained["explained"]]}
    if counts is not None:
        spectra["by count in training"] = [explained["explained_by_count"]]
        save(folder / "bands.png", (8, 4.2), lambda figure: draw_bands(figure, {"model": [results["bands"]]}))
    save(folder / "spectrum.png", (6, 4.4), lambda figure: draw_spectrum(figure, spectra))
    if hasattr(embedding, "base"):
        components = principal_components(embedding.weight, 1)
        values = {"first principal component of the embedding": components.coordinates[:, 0]}
        if counts is not None:
            values = {"log₁₀ of times seen in training": np.log10(np.where(counts > 0, counts, np.nan))} | values
        order = None if embedding.token_order is None else embedding.token_order.cpu().numpy()
        size = (5.5 * len(values), 4.8)
        save(folder / "grid.png", size, lambda figure: draw_grid(figure, values, embedding.base, order))
    if training.get("validation"):
        save(folder / "curve.png", (6, 4), lambda figure: draw_curve(figure, training))


def _legend(figure: FigureBase, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
