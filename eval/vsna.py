r"""The study of VSNA: convergence, sizes, peers, finite elements and a million queries of a laser, in one record.

    python -m eval.vsna [--out runs/vsna/study] [--parts convergence,frontier,plume,peers,speed,sweep,laser] \
        [--laser-model DIR] [--small]

Writes vsna.json, a part at a time: parts that are there are kept unless --parts names them, so that a run goes on where
it stopped; and pictures of those that the record holds. The models that parts share lie in the folder `models`. --small
tries all of it at sizes too small to say anything.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.vsna_comparison import PeerSizes, peers_part, speed_part
from eval.vsna_figures import draw_all
from eval.vsna_laser import laser_part, sweep_part
from eval.vsna_study import convergence_part, frontier_part, plain, plume_part
from eval.vsna_targets import targets
from training.provenance import provenance, write_json

NAME = "vsna.json"
_TINY = {"num_cells": 4, "max_sweeps": 3, "t": 1, "omega": 1, "D": 1}
_TINY_LASER = {"x": 6, "y": 3, "z": 3, "t": 3, "speed": 1, "shape": 1}
SMALL: dict[str, dict[str, Any]] = {
    "convergence": {"degrees": (2,), "cells": (4, 8), "heat_degrees": (), "heat_cells": (), "functions": (6, 8)},
    "frontier": {
        "ranks": {2: (1,), 4: (1, 2)},
        "tucker_ranks": (2,),
        "seeds": (0, 1),
        "repeated_up_to": 1,
        "cuts": (0.3,),
        "max_sweeps": 3,
        "t": 1,
        "omega": 1,
        "D": 1,
    },
    "plume": {**_TINY, "rank": 2, "num_points": 12, "num_stacked": 2},
    "peers": {
        "sizes": {
            "heat": PeerSizes({"x": 6, "t": 3, "nu": 1}, (1e-1,), (1e-1,), 10, (1, 2), 2, 0.2),
            "plume": PeerSizes(
                {**dict.fromkeys("xyz", 4), "t": 1, "omega": 1, "D": 1}, (0.9,), (0.9,), 4, (2,), 2, 0.2
            ),
        }
    },
    "speed": {
        **_TINY,
        "rank": 2,
        "heat_grids": {1: ((8, 4),), 2: ((8, 4),)},
        "plume_grids": {1: ((4, 2),)},
        "heat_rank": 3,
        "num_draws": 1,
    },
    "sweep": {
        "num_samples": 2000,
        "num_repeats": 2,
        "memory_samples": (2000,),
        "num_depths": 4,
        "num_cells": _TINY_LASER,
    },
    "laser": {
        "num_points": 10,
        "grids": {1: ((4, 2, 2),)},
        "num_draws": 1,
        "slice_points": 6,
        "elements": {"num_cells": (6, 3, 3), "num_steps": 4},
        "num_cells": _TINY_LASER,
    },
}
"""Arguments of each part for a trial."""


PARTS: dict[str, Callable[[Path, Path | None, Mapping[str, Any]], dict[str, Any]]] = {
    "convergence": lambda out, laser, sizes: convergence_part(**sizes),
    "frontier": lambda out, laser, sizes: frontier_part(out, **sizes),
    "plume": lambda out, laser, sizes: plume_part(out, **sizes),
    "peers": lambda out, laser, sizes: peers_part(out, **sizes),
    "speed": lambda out, laser, sizes: speed_part(out, **sizes),
    "sweep": lambda out, laser, sizes: sweep_part(out, laser, **sizes),
    "laser": lambda out, laser, sizes: laser_part(out, laser, **sizes),
}


def run(
    out: Path, parts: Sequence[str] | None = None, *, laser_model: Path | None = None, small: bool = False
) -> dict[str, Any]:
    """Measures the parts that ``out`` lacks, or those of ``parts``, and writes its record after each.

    Raises:
        ValueError: If a part is unknown, ``out`` holds a record of the other size, or ``laser_model`` no model.
    """
    if unknown := [name for name in parts or () if name not in PARTS]:
        raise ValueError(f"parts: {', '.join(unknown)} unknown; expected some of {', '.join(PARTS)}.")
    path = out / NAME
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"small": small}
    if record["small"] != small:
        raise ValueError(f"{path} was made {'with' if record['small'] else 'without'} --small; give another --out.")
    for name in parts if parts is not None else [name for name in PARTS if name not in record]:
        start = time.perf_counter()
        part = PARTS[name](out, laser_model, SMALL[name] if small else {})
        seconds = time.perf_counter() - start
        record[name] = {**part, "part_seconds": seconds, "provenance": provenance(part.get("seed", 0))}
        record["targets"] = plain(targets(record))
        write_json(path, record)
    return record


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/vsna/study"), help=f"folder of {NAME} and pictures")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        help=f"measure these, separated by commas, also if they are there: {','.join(PARTS)}",
    )
    parser.add_argument(
        "--laser-model", type=Path, help="folder that training.vsna wrote; without it, it is solved for"
    )
    parser.add_argument("--small", action="store_true", help="a trial at sizes too small to say anything")
    known = parser.parse_args(arguments)
    try:
        record = run(known.out, known.parts, laser_model=known.laser_model, small=known.small)
        draw_all(known.out, record)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for each in record["targets"]:
        told = {True: "reached", False: "not reached", None: "not measured"}[each["reached"]]
        measured = "-" if each["measured"] is None else f"{each['measured']:.3g}"
        print(f"{each['figure']}: {measured} ({each['asked']}), {told}")
    return record


if __name__ == "__main__":
    main()
