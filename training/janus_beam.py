"""Designs a cantilever of unit cells with a trained Janus, and checks it by physics: cells, seams, deflection.

    python -m training.janus_beam --model runs/janus/model --out runs/janus/beam [--refine physics]
        [--num-candidates 16] [--config training/configs/janus_beam.yaml] [--section.key value ...]

Targets are those of :mod:`training.beam`. Every cell gets its own candidates: the cells of a column have one target and
are inverted with different seeds, each of which is one batch of all columns. Candidates of a column are pooled: it gets
the best distinct ones, by checked error, and repeats the best only if there are too few. Writes into the folder:

- `beam.json`: targets, errors of the cells and of the beam, seams, times; without refinement, and with it if asked for.
- `cells.safetensors`: the designs' octants and their homogenised stiffness.
- `beam.stl`: the closed surface, in edges of a cell. `beam.png`, `profile.png`: pictures. All of the last set.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from leviathan.janus import Design, SnaJanusModel
from leviathan.janus.cells import whole_cell
from leviathan.janus.physics import stiffness
from sna_core.network import check_counts
from training.beam import BeamTargets, FieldErrors, beam_targets, compare_beams
from training.provenance import provenance, relative, write_json
from training.settings import Settings, read_settings
from training.voxels import View, assemble, components, render, seam_mismatches, shade, surface, write_stl

CONFIG = Path(__file__).parent / "configs" / "janus_beam.yaml"
KEYS = {
    "target": ("num_cells", "stiffness", "volume_fraction"),
    "inversion": ("num_candidates", "prior_weight", "num_steps", "num_cycles", "num_refinements", "tolerance", "seed"),
    "beam": ("elements_per_cell",),
    "picture": ("azimuth", "elevation", "width", "samples"),
    "surface": ("write",),
}
LOOKS = {"unrefined": ("#56B4E9", "s"), "refined": ("#D55E00", "o")}  # Okabe and Ito's palette
BLOCK = 32  # voxels along an edge of the blocks that show targets
STIFFNESS, VOLUME = "C1111", "volume_fraction"

# ------------------------------------------------------------------------------------------------------------ designs


@dataclass(frozen=True, eq=False)
class Beam:
    """Cells that were chosen, and what physics says of them.

    Attributes:
        orthants: (X, Y, Z, m, m, m) of 0 and 1.
        solid: The voxels of the whole beam.
        stiffness: (X, Y, Z, 6, 6) in GPa.
        volume_fraction: (X, Y, Z).
        energy: Strain energy of each cell for a unit force at the tip (X, Y, Z).
        target_energy: That of the beam that was asked for.
        record: The errors and counts, for JSON.
    """

    orthants: NDArray[np.uint8]
    solid: NDArray[np.bool_]
    stiffness: NDArray[np.float64]
    volume_fraction: NDArray[np.float64]
    energy: NDArray[np.float64]
    target_energy: NDArray[np.float64]
    record: dict[str, Any]


def choose(designs: Sequence[Design]) -> list[tuple[int, int]]:
    """As many cells as there are designs of one target: the best distinct ones among all of their candidates.

    Candidates that are connected and whose check converged come first, then by error.

    Args:
        designs: Of one target.

    Returns:
        (design, candidate) for each cell; the best one repeatedly if there are too few sound and distinct ones.
    """
    pool = []
    for i, design in enumerate(designs):
        sound = (design.connected & design.converged).tolist()
        pool += [
            (not good, error, i, j) for j, (good, error) in enumerate(zip(sound, design.error.tolist(), strict=True))
        ]
    pool.sort()
    chosen, seen = [], set()
    for unsound, _, i, j in pool:
        voxels = designs[i].cells[j].cpu().numpy().tobytes()
        if voxels not in seen and not (unsound and chosen):
            seen.add(voxels)
            chosen.append((i, j))
    count = len(designs)
    return (chosen + chosen[:1] * count)[:count]


def homogenised(orthants: Tensor, model: SnaJanusModel) -> tuple[Tensor, Tensor]:
    """Stiffness (cells, 6, 6) in GPa of orthants, by the model's physics, and whether the solver converged (cells,)."""
    found = stiffness(orthants.float(), model.config.physics)
    return found.tensor, found.converged


def build(model: SnaJanusModel, targets: BeamTargets, settings: Settings, refine: str | None) -> Beam:
    """Inverts all targets, chooses cells, puts them together and measures the beam.

    Args:
        model: Of octants.
        targets: Of each column.
        settings: As of KEYS.
        refine: None, or "physics", which :meth:`SnaJanusModel.invert` takes.
    """
    counts = tuple(settings["target"]["num_cells"])
    start = time.perf_counter()
    asked = {STIFFNESS: targets.stiffness.tolist(), VOLUME: targets.volume_fraction.tolist()}
    options = {**settings["inversion"], "refine": refine, "progress": True}
    seed = options.pop("seed")
    rounds = [model.invert(asked, seed=seed + i, **options) for i in range(counts[1] * counts[2])]
    designs = [design for each in rounds for design in each]
    inverted = time.perf_counter()
    picked = [(column[i], j) for column in zip(*rounds, strict=True) for i, j in choose(column)]
    cells = torch.stack([design.cells[j] for design, j in picked])
    tensor, converged = homogenised(cells, model)
    checked = time.perf_counter()
    whole = whole_cell(cells.to(torch.uint8), model.config.symmetry).cpu().numpy()
    edge = whole.shape[-1]
    solid = assemble(whole.reshape(*counts, edge, edge, edge))
    mismatches, seams = seam_mismatches(solid, edge)
    parts, floating = components(solid)
    assembled = time.perf_counter()
    matrices = tensor.double().cpu().numpy().reshape(*counts, 6, 6)
    fractions = whole.reshape(*counts, -1).mean(-1)
    target, target_fraction = (
        np.broadcast_to(values[:, None, None], counts) for values in (targets.stiffness, targets.volume_fraction)
    )
    errors, beam_asked, beam_found = compare_beams(target, matrices, settings["beam"]["elements_per_cell"])
    bent = time.perf_counter()
    axial = matrices[..., 0, 0]
    record = {
        "stiffness": asdict(FieldErrors.of(target, axial)),
        "volume_fraction": asdict(FieldErrors.of(target_fraction, fractions)),
        "beam": asdict(errors),
        "cells": {
            "stiffness": axial.tolist(),
            "volume_fraction": fractions.tolist(),
            "energy": beam_found.energy.tolist(),
            "target_energy": beam_asked.energy.tolist(),
            "num_distinct": len({cell.tobytes() for cell in whole}),
            "num_unsound": sum(not bool(design.connected[j] & design.converged[j]) for design, j in picked),
            "num_not_converged": int((~converged).sum()),
            "mean_gap": float(np.mean([float(design.gap[STIFFNESS][j]) for design, j in picked])),
            "exchanged_voxels": [int(design.num_exchanged[j]) for design, j in picked],
        },
        "inversion": {
            "num_unreachable": sum(not design.reachable for design in designs),
            "num_rejected": sum(int(design.num_rejected) for design in designs),
            "num_candidates": sum(len(design.error) for design in designs),
        },
        "geometry": {
            "shape": list(solid.shape),
            "num_voxels": solid.size,
            "num_seams": seams,
            "seam_mismatches": mismatches,
            "num_components": parts,
            "floating_voxels": floating,
        },
        "seconds": {
            "inversion": inverted - start,  # with the checks of all candidates, and their refinement
            "check": checked - inverted,  # of the chosen cells, once more
            "assembly": assembled - checked,
            "beam": bent - assembled,
        },
    }
    orthants = cells.to(torch.uint8).cpu().numpy().reshape(*counts, *cells.shape[1:])
    return Beam(orthants, solid, matrices, fractions, beam_found.energy, beam_asked.energy, record)


# ---------------------------------------------------------------------------------------------------------------- job


def run(
    model: SnaJanusModel, settings: Settings, out: str | Path, refine: str | None = None, name: str = "a model"
) -> dict[str, Any]:
    """Builds the beam without refinement and, if asked, with it; writes and returns the record.

    Args:
        model: Of octants ("mirror" or "cubic") that predicts C1111.
        settings: As of KEYS.
        out: Folder for everything.
        refine: None or "physics".
        name: Of the model, for the record.

    Raises:
        ValueError: On a model of another kind, settings that do not fit, or a folder that holds a beam.
    """
    out = Path(out)
    if (out / "beam.json").exists():
        raise ValueError(f"{out} holds a beam already; choose another --out.")
    _check(model, settings, refine)
    view = View(**settings["picture"])
    target = settings["target"]
    targets = beam_targets(target["num_cells"][0], target["stiffness"], target["volume_fraction"])
    beams = {"unrefined": build(model, targets, settings, None)}
    if refine is not None:
        beams["refined"] = build(model, targets, settings, refine)
    last = list(beams.values())[-1]
    edge = last.solid.shape[0] // target["num_cells"][0]
    out.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    about = None
    if settings["surface"]["write"]:
        mesh = surface(last.solid, spacing=1 / edge)
        write_stl(out / "beam.stl", mesh)
        about = {"num_triangles": len(mesh.triangles), "volume": mesh.volume}
    meshed = time.perf_counter()
    _save_figure(out / "beam.png", (13.5, 16.5), lambda figure: draw_beam(figure, targets, last, view))
    _save_figure(out / "profile.png", (13, 4), lambda figure: draw_profile(figure, targets, beams))
    drawn = time.perf_counter()
    inversions = [beam.record["seconds"]["inversion"] for beam in beams.values()]
    arrays = {}
    for key, beam in beams.items():
        arrays |= {f"{key}.orthants": beam.orthants, f"{key}.stiffness": beam.stiffness}
    partial = out / "cells.safetensors.partial"
    save_file(arrays, partial)
    partial.replace(out / "cells.safetensors")
    record = {
        "model": name,
        "device": str(model.device),
        "settings": settings,
        "refine": refine,
        "targets": {
            key: each.tolist() if isinstance(each, np.ndarray) else each for key, each in vars(targets).items()
        },
        "sets": {key: beam.record for key, beam in beams.items()},
        "surface": about,
        "seconds": {
            "refinement": inversions[-1] - inversions[0],  # the same inversion without and with it
            "surface": meshed - start,
            "pictures": drawn - meshed,
        },
        "provenance": provenance(settings["inversion"]["seed"]),
    }
    write_json(out / "beam.json", record)
    return record


def _check(model: SnaJanusModel, settings: Settings, refine: str | None) -> None:
    config = model.config
    if not {STIFFNESS, VOLUME} <= set(config.property_names):
        raise ValueError(
            f"the model predicts {', '.join(config.property_names)}; the beam needs {STIFFNESS}, {VOLUME}."
        )
    if config.spatial_dims != 3 or config.symmetry == "none":
        words = f"{config.spatial_dims}-D cells of symmetry {config.symmetry!r}"
        raise ValueError(f"the model makes {words}; the beam needs octants, whose faces can be shared.")
    if refine not in (None, "physics"):
        raise ValueError(f"refine = {refine!r}; expected None or 'physics'.")
    needed = {**{section: KEYS[section] for section in ("target", "beam", "surface")}, "inversion": ("seed",)}
    missing = [f"{section}.{key}" for section, keys in needed.items() for key in keys if key not in settings[section]]
    if missing:
        raise ValueError(f"settings lack {', '.join(missing)}.")
    counts = settings["target"]["num_cells"]
    if not (
        isinstance(counts, list | tuple) and len(counts) == 3 and all(isinstance(n, int) and n > 0 for n in counts)
    ):
        raise ValueError(f"target.num_cells = {counts!r}; expected three integers above 0: along x, y and z.")
    check_counts(**{"beam.elements_per_cell": settings["beam"]["elements_per_cell"]})


def summary(record: Mapping[str, Any]) -> str:
    """A record as lines of text."""
    law = record["targets"]
    lines = [f"targets: C1111 = {law['solid_stiffness']:.1f} GPa x volume fraction^{law['exponent']:.3f}"]
    for name, each in record["sets"].items():
        field, beam, geometry, cells = (each[key] for key in ("stiffness", "beam", "geometry", "cells"))
        lines += [
            f"{name}: C1111 signed {field['signed']:+.2%}, MAE {field['mae']:.2%}, RMSE {field['rmse']:.2%}, "
            f"largest {field['largest']:.2%}, R2 {field['r2']:.4f}",
            f"  volume fraction off by {each['volume_fraction']['largest']:.2%} at most",
            f"  deflection {beam['relative_deflection']:+.2%} (C1111 alone: {beam['bending_deflection']:+.2%}); "
            f"energy: correlation {beam['energy_correlation']:.4f}, L1 {beam['energy_l1']:.2%}",
            f"  {geometry['num_voxels']:,} voxels, {geometry['seam_mismatches']} differ over {geometry['num_seams']} "
            f"seams, {geometry['num_components']} component(s), {cells['num_distinct']} distinct cells, "
            f"{cells['num_unsound']} unsound",
            "  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in each["seconds"].items()),
        ]
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- pictures


def draw_beam(figure: Figure, targets: BeamTargets, beam: Beam, view: View) -> None:
    """The cells' targets as blocks; the beam in the colours of its checked stiffness, and of its error."""
    counts = beam.energy.shape
    axial = beam.stiffness[..., 0, 0]
    target = np.broadcast_to(targets.stiffness[:, None, None], counts)
    error = axial / target - 1
    largest = max(0.01, float(np.abs(error).max()))
    warm = ScalarMappable(Normalize(0, max(target.max(), axial.max())), "viridis")
    signed = ScalarMappable(Normalize(-largest, largest), "coolwarm")
    shading = shade(beam.solid, counts, view)
    pictures = (
        (render(np.ones(BLOCK * np.array(counts), bool), _colours(warm, target), view), warm, "target C1111 [GPa]"),
        (shading.coloured(_colours(warm, axial)), warm, "checked C1111 [GPa]"),
        (shading.coloured(_colours(signed, error)), signed, "relative error of C1111"),
    )
    for ax, (picture, colours, words) in zip(figure.subplots(3, 1), pictures, strict=True):
        ax.imshow(picture, interpolation="antialiased")
        ax.set_axis_off()
        written = PercentFormatter(1.0) if colours is signed else None
        figure.colorbar(colours, ax=ax, label=words, format=written, shrink=0.75, aspect=18, pad=0.01)


def draw_profile(figure: Figure, targets: BeamTargets, beams: Mapping[str, Beam]) -> None:
    """Along the beam: volume fraction, C1111 and strain energy of every cell beside their targets."""
    axes = figure.subplots(1, 4)
    place = np.arange(len(targets.stiffness)) + 0.5
    values = (targets.volume_fraction, targets.stiffness)
    line = {"color": "#333333", "linewidth": 1.2, "label": "target", "zorder": 1}
    for ax, target in zip(axes, values, strict=False):
        ax.plot(place, target, **line)
    axes[2].axhline(0, color="#333333", linewidth=1.2)
    for i, (name, beam) in enumerate(beams.items()):
        colour, marker = LOOKS[name]
        count = beam.energy[0].size
        axial, fractions = (each.reshape(-1, count) for each in (beam.stiffness[..., 0, 0], beam.volume_fraction))
        share, asked = (each.reshape(-1, count).sum(1) / each.sum() for each in (beam.energy, beam.target_energy))
        shift = 0.22 * (i - (len(beams) - 1) / 2)
        x = np.broadcast_to(place[:, None] + shift, axial.shape).ravel()
        look = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none", "alpha": 0.7}
        axes[0].plot(x, fractions.ravel(), label=f"{name} cells", **look)
        axes[1].plot(x, axial.ravel(), label=f"{name} cells", **look)
        axes[2].plot(x, (axial / targets.stiffness[:, None] - 1).ravel(), label=name, **look)
        if name == list(beams)[-1]:
            axes[3].step(np.arange(len(share) + 1), [*asked, asked[-1]], where="post", **line)
        axes[3].plot(place + shift, share, label=name, **look)
    words = ("solid volume fraction", "C1111 [GPa]", "relative error of C1111", "share of strain energy")
    for ax, title in zip(axes, words, strict=True):
        ax.set(title=title, xlabel="place along the beam [cells]", xlim=(0, len(place)))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.grid(color="#e6e6e6", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    for ax in axes[2:]:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))


def _colours(colours: ScalarMappable, values: NDArray) -> NDArray[np.float64]:
    return colours.to_rgba(np.ascontiguousarray(values).ravel())[:, :3].reshape(*values.shape, 3)


def _save_figure(path: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Writes what `draw` draws on a figure of `size` inches as PNG, whole or not at all."""
    with mpl.rc_context({"font.size": 10, "savefig.facecolor": "white"}):
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        FigureCanvasAgg(figure)
        draw(figure)
        partial = path.with_name(path.name + ".partial")
        figure.savefig(partial, format="png", dpi=120)
    partial.replace(path)


# ------------------------------------------------------------------------------------------------------------ command


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    keys = "\n".join(f"  --{section}.{{{','.join(sorted(names))}}}" for section, names in KEYS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="settings, over those of the file:\n" + keys,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a trained SnaJanusModel")
    parser.add_argument("--out", required=True, type=Path, help="folder for record, surface and pictures")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file of settings")
    parser.add_argument("--refine", choices=("physics",), help="refine the designs too, and report both")
    parser.add_argument("--num-candidates", type=int, help="designs for each cell, of which the best is taken")
    known, flags = parser.parse_known_args(arguments)
    try:
        settings = read_settings(known.config, flags, KEYS)
        if known.num_candidates is not None:
            settings["inversion"]["num_candidates"] = known.num_candidates
        model = SnaJanusModel.from_pretrained(known.model).to("cuda" if torch.cuda.is_available() else "cpu")
        record = run(model, settings, known.out, known.refine, relative(known.model))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(summary(record))
    return record


if __name__ == "__main__":
    main()
