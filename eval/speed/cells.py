"""Speed of homogenisation: voxel cells by their octants, as mirror planes and cubic symmetry allow, and as wholes."""

import torch
from torch import Tensor

from eval.speed.measure import Check, Figure, Section, Setup, alternate, difference
from leviathan.janus.cells import whole_cell
from leviathan.janus.homogenization import elastic_stiffness, permeability

VOLUME_FRACTIONS = (0.3, 0.6)  # of the solid, from the first cell to the last
ROUNDING = 1e-3  # of results at the default tolerance, against their largest


def octants(num_cells: int, m: int, device: torch.device) -> Tensor:
    """Octants (cells, m, m, m) of Schwarz's P surface, of one volume fraction after another."""
    waves = torch.cos(torch.pi * (torch.arange(m, device=device) + 0.5) / m)
    scores = waves[:, None, None] + waves[:, None] + waves
    cuts = torch.quantile(scores.flatten(), 1 - torch.linspace(*VOLUME_FRACTIONS, num_cells, device=device))
    return (scores > cuts.view(-1, 1, 1, 1)).float()


def homogenization(setup: Setup) -> Section:
    """Stiffness and permeability of cubic cells: of octants with fewer loads against whole cells with all."""
    num_cells, m = setup.pick(short=(2, 4), cpu=(4, 16), cuda=(16, 32))
    parts = octants(num_cells, m, setup.device)
    wholes = whole_cell(parts, "cubic")
    figures, checks = [], []
    for effective in (elastic_stiffness, permeability):
        runs = {
            "octants": lambda effective=effective: effective(parts, symmetry="cubic").tensor,
            "whole cells": lambda effective=effective: effective(wholes).tensor,
        }
        what = effective.__name__.replace("_", " ")
        checks.append(Check(what, difference(runs["octants"](), runs["whole cells"]()), ROUNDING))
        samples = alternate(setup, runs, repeats=min(setup.repeats, 3))
        figures.append(Figure(what, samples, ("whole cells", "octants")))
    sizes = {"cells": num_cells, "edge": 2 * m}
    return Section("homogenisation of octants against whole cells", sizes, figures, checks)
