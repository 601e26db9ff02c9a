"""Speed and memory of our fast paths against their plain twins, as ratios within one run.

    python -m eval.speed --out runs/speed.json [--device cuda] [--sections attention rollout]

Times are medians over repeats in which the compared things alternate, after a warm-up. Memory is the growth of the peak
by one run: on a CPU of the resident set of a process of its own, on CUDA of what PyTorch allocates. The roofline holds
times against the least work and what the device was measured to do at best. A section that cannot run says why.
"""

import argparse
import gc
import json
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from eval.speed.cells import homogenization
from eval.speed.embedding import embedding, embedding_batch, lookup
from eval.speed.imports import imports
from eval.speed.layers import attention, loss, splines
from eval.speed.measure import CannotRunError, Section, Setup, measured_ceilings, precision_of
from eval.speed.models import head, rollout, training_step
from training.provenance import provenance, write_json


def roofline(setup: Setup) -> Section:
    """The ceilings themselves; each section's own lines are beside its figures."""
    found = measured_ceilings(setup)
    return Section("the best of large copies and matrix products", {}, numbers=vars(found))


SECTIONS: dict[str, Callable[[Setup], Section]] = {
    each.__name__: each
    for each in (
        embedding,
        embedding_batch,
        lookup,
        training_step,
        attention,
        loss,
        head,
        rollout,
        splines,
        homogenization,
        imports,
        roofline,
    )
}


def measure(section: Callable[[Setup], Section], setup: Setup) -> dict[str, Any]:
    """What a section found, for JSON; `not_run` says why it could not."""
    try:
        found = section(setup).record(setup)
        json.dumps(found, allow_nan=False)  # what cannot be written must not stop the others
        return found
    except CannotRunError as error:
        return {"not_run": str(error)}
    except Exception as error:  # the others are to be measured all the same
        traceback.print_exc()
        return {"not_run": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()


def table(result: dict[str, Any]) -> str:
    """All sections in words: comparisons, what else was counted, the roofline, and what went wrong."""
    lines = [_aligned(_figure_rows(result)), ""]
    for name, found in result["sections"].items():
        remarks = [*_numbers(found.get("numbers", {})), *found.get("notes", [])]
        remarks += [
            f"extrapolated: {each['extrapolated']}" for each in found.get("figures", []) if each["extrapolated"]
        ]
        remarks += [
            f"NOT EQUAL: {check['what']}: {_short(check['difference'])}, expected {check['tolerance']:g} at most"
            for check in found.get("checks", [])
            if not check["equal"]
        ]
        if "not_run" in found:
            remarks.append(f"NOT RUN: {found['not_run']}")
        lines += [f"{name}: {remark}" for remark in remarks]
    floors = _aligned(_roofline_rows(result["sections"]))
    return "\n".join([*lines, "", floors]) if floors else "\n".join(lines)


def _figure_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    yield ["section", "what", "compared", "", "ratio", "quartiles", "target"]
    for name, found in result["sections"].items():
        for figure in found.get("figures", []):
            unit, values = next((u, figure[u]) for u in ("seconds", "mebibytes") if u in figure)
            first, second = (f"{each} {_quantity(values[each]['median'], unit)}" for each in figure["ratio_of"])
            low, high = (_short(each) for each in figure["ratio_quartiles"])
            yield [
                name,
                figure["what"],
                first,
                second,
                _short(figure["ratio"]),
                f"{low} .. {high}",
                _goal(figure, result),
            ]


def _goal(figure: dict[str, Any], result: dict[str, Any]) -> str:
    target = figure["target"]
    if target is None:
        return ""
    limit = f">= {target['at_least']:g}" if "at_least" in target else f"<= {target['at_most']:g}"
    if figure["reached"] is None:
        return f"{limit} at full sizes" if result["short"] else f"{limit} on {target['on']}"
    return f"{limit} {'reached' if figure['reached'] else 'NOT REACHED'}"


def _roofline_rows(sections: dict[str, Any]) -> Iterator[list[str]]:
    lines = [line for found in sections.values() for line in found.get("roofline", [])]
    if lines:
        yield ["roofline", "GFLOP", "MiB", "floor", "measured", "times the floor", "limit"]
    for line in lines:
        yield [
            line["what"],
            _short(line["flops"] / 1e9),
            _short(line["bytes"] / 2**20),
            _quantity(line["floor_seconds"], "seconds"),
            _quantity(line["seconds"], "seconds"),
            _short(line["times_the_floor"]),
            f"{line['limit']}, {line['precision']}",
        ]


def _numbers(numbers: dict[str, Any]) -> Iterator[str]:
    for name, value in numbers.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        yield f"{name.replace('_', ' ')}: " + ", ".join(f"{key} {_short(each)}".strip() for key, each in entries)


def _quantity(value: float, unit: str) -> str:
    if unit == "mebibytes":
        return f"{value:,.1f} MiB"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} us"


def _short(value: float | int | None) -> str:
    if value is None:
        return "not finite"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if 0.5 < abs(value) < 2 else f"{value:.3g}"


def _aligned(rows: Iterator[list[str]]) -> str:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command's arguments, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of attention, training and rollout; by default bfloat16 on cuda, float32 on cpu",
    )
    parser.add_argument("--sections", nargs="+", metavar="NAME", default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--repeats", type=int, default=5, help="timings of each; slow sections take fewer")
    parser.add_argument("--text", type=Path, help="UTF-8 file to take text from; by default Python's documentation")
    parser.add_argument("--short", action="store_true", help="tiny sizes, only to see that it runs")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"unknown section {', '.join(unknown)}; expected some of {', '.join(SECTIONS)}")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}; expected at least 1")
    if args.text is not None and not args.text.is_file():
        parser.error(f"there is no file {args.text}; --text takes a UTF-8 text file")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; leave out --device cuda")
    return args


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command: measures, writes JSON after every section, prints a table."""
    args = parse(arguments)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    setup = Setup(torch.device(args.device), getattr(torch, dtype), args.repeats, args.short, args.text)
    result = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "dtype": precision_of(setup.dtype),
        "repeats": args.repeats,
        "short": args.short,
        "complete": False,
        "sections": {},
        "provenance": provenance(),
    }
    names = [name for name in SECTIONS if name in args.sections]
    with tqdm(names, desc="speed", unit="section") as bar:
        for name in bar:
            bar.set_postfix_str(name)
            result["sections"][name] = measure(SECTIONS[name], setup)
            result["complete"] = name == names[-1]
            write_json(args.out, result)
    print(table(result))
    return result


if __name__ == "__main__":
    main()
