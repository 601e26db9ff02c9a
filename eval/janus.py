r"""The study of Janus: homogenisation, models with two heads, inversion, digits, conductivity, a beam, in one record.

    python -m eval.janus --data runs/janus/cells [--out runs/janus/study] [--beam runs/janus/beam] \
        [--parts homogenization,models,inversion,digits,conductivity,beam] [--models DIR] [--processes 2] [--small]

Writes janus.json, a part at a time: parts that are there are kept unless --parts names them, so that a run goes on
where it stopped; and pictures of those that the record holds. Within a part, models that were trained and what was
found with them are kept in folders too, as long as nothing that they depend on changes. --small tries all of it at
sizes too small to say anything, on cells that it makes itself if it is given none.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.janus_demonstrations import conductivity_part, digits_part
from eval.janus_figures import draw_all
from eval.janus_homogenization import homogenization_part
from eval.janus_inversion import inversion_part
from eval.janus_models import models_part
from eval.janus_targets import targets
from leviathan.janus.physics import Physics
from training.microstructures import make_set
from training.provenance import provenance, write_json

NAME = "janus.json"
DATA = Path("runs/janus/cells")
BEAM_PICTURES = ("beam.png", "profile.png")
HEADS, SEEDS = ("separable", "mlp"), (0, 1, 2, 3, 4)

STUDY: dict[str, dict[str, Any]] = {
    "homogenization": {
        "timed": (
            ("gyroid", "whole", 32, 1),
            ("schwarz_p", "whole", 32, 1),
            ("schwarz_p", "orthants", 32, 1),
            ("schwarz_p", "orthants", 32, 32),
        ),
        "num_repeats": 3,
        "drift_edges": (16, 32, 64),
        "gyroid_edges": (16, 32),
    },
    "models": {"heads": HEADS, "seeds": SEEDS, "flags": ()},
    "inversion": {
        "heads": HEADS,
        "seeds": SEEDS,
        "num_targets": 50,
        "num_candidates": 16,
        "prior_factors": (0, 1, 10),
        "num_resamples": 10_000,
        "options": {},
    },
    "digits": {"seeds": (0, 1, 2), "num_candidates": 16, "flags": ()},
    "conductivity": {
        "seeds": (0, 1, 2),
        "cells": {"num_cells": 2000, "resolution": 32, "seed": 0, "physics": Physics(void_conductivity=0.1)},
        "num_targets": 50,
        "num_candidates": 16,
        "flags": (),
    },
    "beam": {},
}
"""Arguments of each part."""

SMALL_CELLS = {"num_cells": 20, "resolution": 8, "seed": 18}  # none so light that few voxels cannot make it
SMALL_FLAGS = ("--training.epochs=2", "--model.channels=[8, 16]", "--model.latent_dim=8")
SMALL: dict[str, dict[str, Any]] = {
    "homogenization": {
        "timed": (("gyroid", "whole", 6, 1), ("schwarz_p", "whole", 6, 1), ("schwarz_p", "orthants", 6, 2)),
        "num_repeats": 3,
        "drift_edges": (4, 8),
        "gyroid_edges": (8,),
    },
    "models": {"heads": HEADS, "seeds": (0, 1), "flags": SMALL_FLAGS},
    "inversion": {
        "heads": HEADS,
        "seeds": (0, 1),
        "num_targets": 3,
        "num_candidates": 2,
        "prior_factors": (0, 1),
        "num_resamples": 50,
        "options": {"num_steps": 3, "num_cycles": 1, "num_refinements": 1},
    },
    "digits": {"seeds": (0,), "num_candidates": 2, "flags": SMALL_FLAGS},
    "conductivity": {
        "seeds": (0,),
        "cells": {"num_cells": 30, "resolution": 8, "seed": 0},
        "num_targets": 2,
        "num_candidates": 2,
        "flags": SMALL_FLAGS,
    },
    "beam": {},
}
"""The same for a trial."""


@dataclass(frozen=True)
class Places:
    """Where a study reads and writes.

    Attributes:
        out: Folder of the record and the pictures.
        data: Labelled set of cells.
        models: Folder of the trained models.
        beam: Folder that training.janus_beam wrote, or None.
        num_processes: That train at one time.
    """

    out: Path
    data: Path
    models: Path
    beam: Path | None
    num_processes: int


def beam_part(out: Path, beam: Path | None) -> dict[str, Any]:
    """The record of a beam, whose pictures are copied beside that of the study.

    Raises:
        ValueError: If there is none.
    """
    path = None if beam is None else beam / "beam.json"
    if path is None or not path.is_file():
        where = "no --beam was given" if beam is None else f"{beam} holds no beam.json"
        raise ValueError(f"{where}; make a beam with python -m training.janus_beam, and name its folder by --beam.")
    for name in BEAM_PICTURES:
        if (beam / name).is_file():
            shutil.copyfile(beam / name, out / name)
    return json.loads(path.read_text(encoding="utf-8"))


PARTS: dict[str, Callable[[Places, Mapping[str, Any]], dict[str, Any]]] = {
    "homogenization": lambda at, sizes: homogenization_part(**sizes),
    "models": lambda at, sizes: models_part(at.out, at.data, at.models, num_processes=at.num_processes, **sizes),
    "inversion": lambda at, sizes: inversion_part(at.out, at.data, at.models, **sizes),
    "digits": lambda at, sizes: digits_part(at.out, at.models, num_processes=at.num_processes, **sizes),
    "conductivity": lambda at, sizes: conductivity_part(at.out, at.models, num_processes=at.num_processes, **sizes),
    "beam": lambda at, sizes: beam_part(at.out, at.beam),
}


def run(
    out: Path,
    parts: Sequence[str] | None = None,
    *,
    data: Path | None = None,
    models: Path | None = None,
    beam: Path | None = None,
    num_processes: int = 1,
    small: bool = False,
) -> dict[str, Any]:
    """Measures the parts that ``out`` lacks, or those of ``parts``, and writes its record after each.

    Args:
        out: Folder of the record.
        parts: Names of PARTS; None for those that are missing, the beam only if its folder is given.
        data: A labelled set of cells; None is DATA, or cells that are made here if ``small``.
        models: Folder of models; None is one in ``out``.
        beam: Folder of a beam.
        num_processes: That train models at one time.
        small: Whether to use the sizes of SMALL.

    Raises:
        ValueError: If a part is unknown, ``out`` holds a record of the other size, or something that a part needs is
            not there.
    """
    if unknown := [name for name in parts or () if name not in PARTS]:
        raise ValueError(f"parts: {', '.join(unknown)} unknown; expected some of {', '.join(PARTS)}.")
    if num_processes < 1:
        raise ValueError(f"processes = {num_processes}; expected at least 1.")
    path = out / NAME
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"small": small}
    if record["small"] != small:
        raise ValueError(f"{path} was made {'with' if record['small'] else 'without'} --small; give another --out.")
    if parts is None:
        parts = [name for name in PARTS if name not in record and (name != "beam" or beam is not None)]
    out.mkdir(parents=True, exist_ok=True)
    if data is None:
        data = small_cells(out) if small else DATA
    at = Places(out, data, models or out / "models", beam, num_processes)
    for name in parts:
        sizes = (SMALL if small else STUDY)[name]
        start = time.perf_counter()
        part = PARTS[name](at, sizes)
        seconds = time.perf_counter() - start
        made = provenance(list(sizes.get("seeds", [0])))
        record[name] = {**part, "part_seconds": seconds, "provenance": part.get("provenance", made)}
        record["targets"] = [asdict(each) for each in targets(record)]
        write_json(path, record)
    return record


def small_cells(out: Path) -> Path:
    """A few labelled cells of few voxels."""
    folder = out / "cells"
    make_set(folder, **SMALL_CELLS)
    return folder


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/janus/study"), help=f"folder of {NAME} and pictures")
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        help=f"measure these, separated by commas, also if they are there: {','.join(PARTS)}",
    )
    parser.add_argument("--data", type=Path, help=f"labelled cells that training.microstructures wrote; {DATA}")
    parser.add_argument("--models", type=Path, help="folder of the trained models; without it, one in --out")
    parser.add_argument("--beam", type=Path, help="folder that training.janus_beam wrote; without it, no beam")
    parser.add_argument("--processes", type=int, default=1, help="models to train at one time, on a thread each")
    parser.add_argument("--small", action="store_true", help="a trial at sizes too small to say anything")
    known = parser.parse_args(arguments)
    places = {"data": known.data, "models": known.models, "beam": known.beam}
    try:
        record = run(known.out, known.parts, **places, num_processes=known.processes, small=known.small)
        draw_all(known.out, record)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for each in record.get("targets", []):
        told = {True: "reached", False: "not reached", None: "not measured"}[each["reached"]]
        measured = "-" if each["measured"] is None else f"{each['measured']:.3g}"
        print(f"{each['figure']}: {measured} ({each['asked']}), {told}")
    return record


if __name__ == "__main__":
    main()
