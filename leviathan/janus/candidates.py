"""Targets of a batch of designs, and the candidates for them: decoded, made exact in volume, and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leviathan.janus.cells import FREE, SOLID, VOID, bicontinuous, islands, threshold
from leviathan.janus.physics import properties

if TYPE_CHECKING:
    from leviathan.janus.configuration import SnaJanusConfig
    from leviathan.janus.modeling import SnaJanusModel

CELLS_AT_ONCE = 128  # through the encoder or decoder
ISLAND_ROUNDS = 32  # of taking floating solid away: the voxels on a diagonal come one by one


@dataclass(frozen=True, eq=False)
class Goal:
    """What each row of a batch, a design or a candidate for one, shall reach.

    Attributes:
        names: Of the properties that are targeted.
        columns: Of these among the model's properties. Of a classification there is none.
        values: Targets in physical units, (rows, targets), float64; of a classification the number of the class.
        units: What the errors of these are relative to, likewise.
        weights: Of the squared errors of standardised properties, (targets,).
    """

    names: list[str]
    columns: list[int]
    values: Tensor
    units: Tensor
    weights: Tensor

    def rows(self, index: Tensor | slice) -> Goal:
        """Of some rows, or of rows several times."""
        return replace(self, values=self.values[index], units=self.units[index])

    def errors(self, values: Tensor) -> Tensor:
        """Relative errors of properties (rows, targets); infinite where a value is not finite."""
        return ((values - self.values).abs() / self.units).nan_to_num(nan=torch.inf)

    def is_exact(self, cells: Tensor) -> Tensor:
        """Whether binary cells (rows, m, ...) have as many solid voxels as are targeted, (rows,); True if none are."""
        if self.volume is None:
            return torch.ones(len(cells), dtype=torch.bool, device=cells.device)
        flat = cells.flatten(1)
        return flat.sum(-1) == (self.values[:, self.volume] * flat.shape[1]).round()

    @property
    def volume(self) -> int | None:
        """Which of the targets is the volume fraction."""
        return self.names.index("volume_fraction") if "volume_fraction" in self.names else None


@dataclass(frozen=True, eq=False)
class Candidates:
    """Cells that were found, one for each row.

    Attributes:
        latents: (rows, d).
        scores: Whose threshold the cells are, (rows, m, ...): the decoder's logits, at first.
        cells: Bool, (rows, m, ...); of grey images the decoder's probabilities.
        connected: Whether they are bicontinuous, (rows,).
        exact: Whether the number of solid voxels is the targeted one, if there is one, (rows,).
        values: Checked values of the targets, or predicted ones where nothing is checked, (rows, targets), float64.
        converged: Whether the check has converged, (rows,).
        error: The largest relative error of a target, (rows,).
    """

    latents: Tensor
    scores: Tensor
    cells: Tensor
    connected: Tensor
    exact: Tensor
    values: Tensor
    converged: Tensor
    error: Tensor

    @property
    def valid(self) -> Tensor:
        """Whether a row counts, (rows,). The solid of a plane need not be connected."""
        return (self.connected if self.cells.ndim == 4 else torch.ones_like(self.connected)) & self.converged

    def rows(self, index: Tensor) -> Candidates:
        """Some of them."""
        return Candidates(**{name: value[index] for name, value in vars(self).items()})

    def with_rows(self, index: Tensor, better: Tensor, other: Candidates) -> Candidates:
        """Replaces those of the rows ``index`` where the other ones are better."""
        merged = {name: value.clone() for name, value in vars(self).items()}
        for name, value in merged.items():
            value[index[better]] = getattr(other, name)[better].to(value)
        return Candidates(**merged)


def is_binary(config: SnaJanusConfig) -> bool:
    """Whether decoded cells are made of two phases, which a threshold separates."""
    return config.property_kind == "regression" and config.two_phases


def standardise(config: SnaJanusConfig, columns: list[int], values: Tensor) -> Tensor:
    """Physical values of these properties (..., columns) in the units of the model's loss."""
    parts = []
    for k, i in enumerate(columns):
        value = values[..., k].log() if config.property_scale[i] == "log" else values[..., k]
        parts.append((value - config.property_mean[i]) / config.property_std[i])
    return torch.stack(parts, -1)


@torch.no_grad()
def decode(model: SnaJanusModel, z: Tensor) -> Tensor:
    """Logits (rows, m, ...), not many rows at a time."""
    return torch.cat([model.decode(part) for part in z.split(CELLS_AT_ONCE)])


@torch.no_grad()
def encode(model: SnaJanusModel, cells: Tensor) -> Tensor:
    """Codes (rows, d) of cells, not many at a time."""
    return torch.cat([model.encode(part.to(model.latent_mean)) for part in cells.split(CELLS_AT_ONCE)])


def shared_boundary(model: SnaJanusModel) -> Tensor | None:
    """The boundary that all cells of this model have in common; None where every voxel is free."""
    return model.boundary if (model.boundary != FREE).any() else None


def cut(model: SnaJanusModel, scores: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and cells with the shared boundary and these volume fractions, whose solid does not float.

    In 3-D floating solid is ruled out, by a score of minus infinity, and the threshold moves to where the volume is as
    it was, or the nearest that can be had without: of a cubic cell the voxels on the diagonal, which alone can make
    some counts exact, may all float.
    """
    symmetry, boundary = model.config.symmetry, shared_boundary(model)
    cells = threshold(scores, fractions, symmetry, boundary)
    for _ in range(ISLAND_ROUNDS if cells.ndim == 4 else 0):
        floating = islands(cells, symmetry)
        if boundary is not None:
            floating &= boundary == FREE
        rows = floating.flatten(1).any(-1)
        if not rows.any():
            break
        scores = scores.masked_fill(floating, -torch.inf)
        cells[rows] = threshold(scores[rows], fractions[rows], symmetry, boundary)
    return scores, cells


def binarise(model: SnaJanusModel, goal: Goal, z: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`cut`, at the targeted volume fractions exactly.

    Where none is targeted it is the predicted one, or that of the logits if the model predicts none.
    """
    names, boundary = model.config.property_names, shared_boundary(model)
    if goal.volume is not None:
        return cut(model, logits, goal.values[:, goal.volume])
    if "volume_fraction" in names:
        fractions = model.predict(z)[:, names.index("volume_fraction")].double()
    else:
        fractions = logits.sigmoid().flatten(1).mean(-1).double()
    voxels = logits[0].numel()
    solid, void = (0 if boundary is None else int((boundary == kind).sum()) for kind in (SOLID, VOID))
    return cut(model, logits, fractions.clamp((solid + 1) / voxels, 1 - (void + 1) / voxels))


@torch.no_grad()
def predicted(model: SnaJanusModel, goal: Goal, z: Tensor) -> Tensor:
    """Predicted values of the targets, (rows, targets), float64; of a classification the class's probability."""
    values = model.predict(z).double()
    return values[:, goal.columns] if goal.columns else values.gather(-1, goal.values.long())


@torch.no_grad()
def evaluate(model: SnaJanusModel, goal: Goal, z: Tensor, scores: Tensor, cells: Tensor, check: bool) -> Candidates:
    """Connectivity, properties and errors of cells."""
    if check:
        checked = properties(cells, goal.names, model.config.physics)
        values = torch.stack([checked.values[name] for name in goal.names], -1).double()
        converged = checked.converged
    else:
        values, converged = predicted(model, goal, z), torch.ones(len(z), dtype=torch.bool, device=z.device)
    connected = bicontinuous(cells, model.config.symmetry) if is_binary(model.config) else torch.ones_like(converged)
    wanted = goal if goal.columns else replace(goal, values=torch.ones_like(goal.units))
    error = wanted.errors(values).amax(-1)
    return Candidates(z, scores, cells, connected, goal.is_exact(cells), values, converged, error)


def realise(model: SnaJanusModel, goal: Goal, z: Tensor, check: bool) -> Candidates:
    """Decodes the rows and evaluates their cells."""
    scores = decode(model, z)
    if is_binary(model.config):
        scores, cells = binarise(model, goal, z, scores)
    else:
        cells = scores.sigmoid()
    return evaluate(model, goal, z, scores, cells, check)
