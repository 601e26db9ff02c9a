"""The picture of the plan past one device: memory and throughput against the number of GPUs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from eval.figures import plain_ticks, save

Record = Mapping[str, Any]

PICTURE = "scaling.png"
# Okabe and Ito's palette; a line style besides, for print in grey.
LOOKS = {
    "ddp": ("#000000", "-", "DDP"),
    "zero1": ("#56B4E9", (0, (5, 1.5)), "ZeRO-1"),
    "zero2": ("#0072B2", (0, (3, 1, 1, 1)), "ZeRO-2"),
    "zero3": ("#009E73", "-.", "ZeRO-3"),
    "zero3_offload": ("#E69F00", ":", "ZeRO-3, offloaded"),
    "fsdp2": ("#D55E00", (0, (1, 1)), "FSDP2"),
    "tp2": ("#CC79A7", (0, (6, 2, 1, 2)), "TP 2 x DDP"),
    "tp4": ("#CC79A7", (0, (4, 2, 1, 2)), "TP 4 x DDP"),
    "tp8": ("#CC79A7", (0, (2, 2, 1, 2)), "TP 8 x DDP"),
}
DRAWN = ("ddp", "zero1", "zero2", "zero3_offload", "fsdp2", "tp2")
BANDS = ("ddp", "fsdp2", "tp2")


def named(strategy: str) -> str:
    """A strategy of a record for people."""
    return LOOKS[strategy][2]


def draw_plans(figure: FigureBase, record: Record) -> None:
    """A row a size, the least and the greatest of the published language models: memory, and tokens a second."""
    names = [name for name in record["sizes"] if name != "turbulence"]
    names = [names[0], names[-1]] if len(names) > 1 else list(record["sizes"])
    axes = figure.subplots(len(names), 2, squeeze=False, sharex=True)
    for (left, right), name in zip(axes, names, strict=True):
        size = record["sizes"][name]
        plans = {plan["strategy"]: plan for plan in size["plans"] if not plan["checkpointing"] and plan["devices"]}
        for strategy in DRAWN:
            if (plan := plans.get(strategy)) is not None:
                colour, style, _ = LOOKS[strategy]
                gigabytes = [number / 1e9 for number in plan["bytes"]]
                left.plot(plan["devices"], gigabytes, color=colour, linestyle=style)
        left.set(title=f"{name}: memory of a GPU", ylabel="GB", ylim=(0, None))
        ideal = plans["ddp"]
        tokens = size["tokens_of_step"]
        for strategy in BANDS:
            if (plan := plans.get(strategy)) is not None:
                colour, style, _ = LOOKS[strategy]
                ends = [[tokens / seconds for seconds in plan[f"seconds_{end}"]] for end in ("worst", "best")]
                right.fill_between(plan["devices"], *ends, color=colour, alpha=0.15, linewidth=0)
                for end in ends:
                    right.plot(plan["devices"], end, color=colour, linestyle=style, linewidth=1.1)
        first = tokens / ideal["seconds_best"][0] / ideal["devices"][0]
        linear = [first * count for count in ideal["devices"]]
        right.plot(ideal["devices"], linear, color="#7f7f7f", linewidth=0.8, linestyle="--", zorder=1)
        right.set(title=f"{name}: tokens a second, best to worst case", yscale="log", xscale="log")
        right.yaxis.set_major_formatter(FuncFormatter(_short))
        left.set_xscale("log")
        for ax in (left, right):
            _count_ticks(ax, record["devices"])
    for ax in axes[-1]:
        ax.set_xlabel("GPUs")
    handles = [Line2D([], [], color=c, linestyle=s, label=label) for c, s, label in (LOOKS[name] for name in DRAWN)]
    handles.append(Line2D([], [], color="#7f7f7f", linewidth=0.8, linestyle="--", label="DDP's best case, linear"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


def _count_ticks(ax: Axes, counts: list[int]) -> None:
    plain_ticks(ax.xaxis)
    ax.xaxis.set_major_locator(FixedLocator(counts[::3] if len(counts) > 6 else counts))
    ax.xaxis.set_minor_locator(NullLocator())


def _short(value: float, _: int = 0) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"


def draw_all(folder: Path, record: Record) -> None:
    """Writes the picture beside the record."""
    save(folder / PICTURE, (9.0, 6.6), lambda figure: draw_plans(figure, record))
