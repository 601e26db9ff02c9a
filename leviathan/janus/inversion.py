"""Inverse design: cells whose properties are as asked, found in the latent space of a Janus and checked by physics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from leviathan.janus.candidates import Candidates, Goal, is_binary, realise, shared_boundary
from leviathan.janus.cells import threshold, whole_cell
from leviathan.janus.latent_search import correct, residuals, search, starts
from leviathan.janus.physics import canonical, nearest_name
from leviathan.janus.refinement import exchange, steer

if TYPE_CHECKING:
    from leviathan.janus.configuration import SnaJanusConfig
    from leviathan.janus.modeling import SnaJanusModel

ROWS_AT_ONCE = 1024  # candidates
STEERED, EXCHANGED = 4, 2  # of each target the best so many candidates are refined in the latent space, by voxels
POSITIVE = ("C1111", "C2222", "C3333", "C2323", "C1313", "C1212", "K11", "K22", "K33", "permeability", "conductivity")

Target = float | str | Sequence[float] | Sequence[str]


@dataclass(frozen=True, eq=False)
class Design:
    """Candidates for one target, the best first and rejected ones last.

    Those whose volume fraction is not exactly the targeted one, because a voxel or two more would float, come after
    those where it is.

    Attributes:
        target: What was asked for, by the names of the model's properties; of a classification {"class": its number}.
        cells: Arrays of the candidates, bool, (candidates, m, ...): orthants unless ``symmetry`` is "none". Of a model
            of grey images the shares of solid.
        latents: Their codes, (candidates, d).
        predicted: All properties as predicted from the codes, (candidates,) each; of a classification the
            probabilities of the classes.
        checked: The targeted ones as homogenisation finds them in the cells, likewise; empty where nothing is checked.
        error: The largest relative error of a target, checked if there is a check, (candidates,).
        gap: Of each checked property |predicted - checked| / |checked|: how far latents mislead the predictor.
        connected: Whether solid and void percolate and the solid is one, (candidates,); in 2-D the solid alone counts,
            and a candidate is not rejected for it.
        converged: Whether the check has converged, (candidates,).
        distance: Mahalanobis distance of the codes from those of the training cells, (candidates,).
        num_exchanged: Voxels of each array that refinement made solid, as many as it made void, (candidates,).
        num_rejected: Candidates that are not connected or whose check has not converged.
        reachable: Whether a candidate that is not rejected is within the tolerance of every target.
        nearest: The targeted properties of the best candidate, checked if there is a check.
        message: All that in a sentence.
        symmetry: Of the cells.
    """

    target: dict[str, float]
    cells: Tensor
    latents: Tensor
    predicted: dict[str, Tensor]
    checked: dict[str, Tensor]
    error: Tensor
    gap: dict[str, Tensor]
    connected: Tensor
    converged: Tensor
    distance: Tensor
    num_exchanged: Tensor
    num_rejected: int
    reachable: bool
    nearest: dict[str, float]
    message: str
    symmetry: str

    @property
    def best(self) -> Tensor:
        """The array of the best candidate, (m, ...)."""
        return self.cells[0]

    def whole(self) -> Tensor:
        """The candidates' whole cells, (candidates, n, ...)."""
        return whole_cell(self.cells, self.symmetry)


@torch.inference_mode(False)  # which knows no Jacobians
def invert(
    model: SnaJanusModel,
    targets: Mapping[str, Target],
    *,
    num_candidates: int = 16,
    prior_weight: float = 1e-2,
    num_steps: int = 20,
    num_cycles: int = 2,
    check: bool = True,
    refine: Literal["physics"] | None = None,
    num_refinements: int = 4,
    tolerance: float = 0.05,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
    progress: bool = False,
) -> Design | list[Design]:
    r"""Designs cells whose properties are as asked.

    Each candidate starts from the code of a training cell whose predicted properties are near the targets and takes
    Levenberg-Marquardt steps to a maximum a posteriori near it (:mod:`leviathan.janus.latent_search`), whose objective
    is :math:`\sum_t w_t (p_t - y_t)^2 + \lambda \Delta^2 / d` with standardised predictions p and targets y and the
    Mahalanobis distance :math:`\Delta` from the start. It is decoded, given the shared boundary and cut where the
    volume fraction is the targeted one exactly, or the predicted one where none is targeted. The predictor sees the
    cell once more, and the target is shifted by what it finds. The cells are then checked: both phases are to percolate
    and homogenisation tells the properties; candidates are in the order of the checked errors.

    Refinement takes the best candidates closer to the target by physics and never away from it
    (:mod:`leviathan.janus.refinement`): in the latent space, and where that does not do by exchanging voxels of the
    surface, which the message says.

    A target out of reach is answered by the nearest candidates, and ``reachable`` is False.

    Args:
        model: Of cells and their properties.
        targets: Properties by name in physical units, one number or a sequence each; the numbers of a sequence are
            designs of one batch, and single numbers go with all of them. A classification has ``{"class": number}`` or
            ``{"label": name}``; nothing is cut or checked there.
        num_candidates: For each design.
        prior_weight: :math:`\lambda`, 0 or more.
        num_steps: Levenberg-Marquardt steps of a search.
        num_cycles: Times that the target is shifted by what the predictor finds in the decoded cell, at most.
        check: Whether to run the homogenisation; without it, errors are the predictor's.
        refine: ``"physics"`` or None.
        num_refinements: Rounds of it, at most, in the latent space, and as many times two by voxels.
        tolerance: Relative error up to which a target counts as reached; a target that can be of either sign is
            relative to its standard deviation in training if that is larger.
        seed: Of what the starts are jittered by. The same seed gives the same candidates, alone or in a sequence.
        weights: :math:`w_t` by name, 1 where there is none.
        progress: Whether to show a bar.

    Returns:
        One design, or a list where a target is a sequence.

    Raises:
        ValueError: If a name is unknown, a target is not finite or cannot be positive where it must, a volume fraction
            is not between 0 and 1 or cannot be had with the shared boundary, sequences differ in length, or an option
            is out of its range, or the model is in half precision.
    """
    _check_counts(1, num_candidates=num_candidates)
    _check_counts(0, num_steps=num_steps, num_cycles=num_cycles, num_refinements=num_refinements)
    _check_options(model, prior_weight, tolerance, check, refine)
    goal, is_single = _goal(model, targets, weights or {}, check)
    was_training = model.training
    model.eval()
    designs = []
    try:
        size = max(1, ROWS_AT_ONCE // num_candidates)
        # Physics needs the precision that an autocast around the call would take away.
        no_autocast = torch.autocast(model.device.type, enabled=False)
        with no_autocast, tqdm(total=len(goal.values), unit=" designs", disable=not progress) as bar:
            for first in range(0, len(goal.values), size):
                part = goal.rows(slice(first, first + size))
                z = starts(model, part, num_candidates, torch.Generator().manual_seed(seed)).flatten(0, 1)
                each = part.rows(torch.arange(len(part.values)).repeat_interleave(num_candidates))
                z = search(model, residuals(model, each), z, prior_weight, num_steps)
                binary = is_binary(model.config)
                if binary:
                    z = correct(model, each, z, prior_weight, num_steps, num_cycles)
                found = realise(model, each, z, check and binary)
                exchanged = torch.zeros_like(found.valid, dtype=torch.long)
                if refine:
                    rounds = (prior_weight, num_steps, num_refinements)
                    found, exchanged = _refine(model, each, found, num_candidates, *rounds)
                order = _order(found, num_candidates)
                designs += _designs(model, part, found.rows(order), exchanged[order], num_candidates, tolerance, check)
                bar.update(len(part.values))
    finally:
        model.train(was_training)
    return designs[0] if is_single else designs


def _order(found: Candidates, num_candidates: int) -> Tensor:
    """Rows of all candidates, the best of each design first."""
    order = found.error.view(-1, num_candidates).argsort(dim=-1, stable=True)
    for worse in (~found.exact, ~found.valid):
        worse = worse.view(-1, num_candidates).gather(-1, order)
        order = order.gather(-1, worse.byte().argsort(dim=-1, stable=True))
    return (order + num_candidates * torch.arange(len(order), device=order.device).unsqueeze(-1)).flatten()


def _best(found: Candidates, num_candidates: int, count: int) -> Tensor:
    """Rows of the best few candidates of each design, none of which has the same cell as another one if that can be."""
    order = _order(found, num_candidates).view(-1, num_candidates)
    # Cells that differ have other sums of random numbers over their solid voxels.
    flat = found.cells.flatten(1).double()
    numbers = torch.rand(flat.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = (flat * numbers.to(flat)).sum(-1)[order]
    seen = (sums.unsqueeze(-1) == sums.unsqueeze(-2)).tril(-1).any(-1)
    return order.gather(-1, seen.byte().argsort(dim=-1, stable=True))[:, :count].flatten()


def _refine(
    model: SnaJanusModel,
    goal: Goal,
    found: Candidates,
    num_candidates: int,
    prior_weight: float,
    num_steps: int,
    num_rounds: int,
) -> tuple[Candidates, Tensor]:
    """The candidates, of which the best of each design were refined, and the number of their exchanged voxels."""
    exchanged = torch.zeros_like(found.valid, dtype=torch.long)
    for best_of in (STEERED, EXCHANGED):
        best = _best(found, num_candidates, best_of)
        if best_of == STEERED:
            after = steer(model, goal.rows(best), found.rows(best), prior_weight, num_steps, num_rounds)
        else:
            after, exchanged[best] = exchange(model, goal.rows(best), found.rows(best), 2 * num_rounds)
        found = found.with_rows(best, torch.ones_like(best, dtype=torch.bool), after)
    return found, exchanged


@torch.no_grad()
def _designs(
    model: SnaJanusModel,
    goal: Goal,
    found: Candidates,
    exchanged: Tensor,
    num_candidates: int,
    tolerance: float,
    check: bool,
) -> list[Design]:
    config, binary = model.config, is_binary(model.config)
    prediction = model.predict(found.latents)
    offset = (found.latents - model.latent_mean).double()
    distance = ((offset @ model.latent_precision.double()) * offset).sum(-1).clamp(min=0).sqrt()
    designs = []
    for i, rows in enumerate(torch.arange(len(found.error)).split(num_candidates)):
        here, values = found.rows(rows), found.values[rows]
        predicted = dict(zip(config.property_names, prediction[rows].unbind(-1), strict=True))
        checked = dict(zip(goal.names, values.unbind(-1), strict=True)) if check and binary else {}
        target = dict(zip(goal.names, goal.values[i].tolist(), strict=True))
        nearest = dict(zip(goal.names, values[0].tolist(), strict=True))
        gap = {name: (predicted[name] - value).abs() / _units(config, name, value) for name, value in checked.items()}
        reachable = bool((here.valid & (here.error <= tolerance)).any())
        num_rejected = int((~here.valid).sum())
        message = _message(target, nearest, here, int(exchanged[rows][0]), reachable, tolerance, bool(checked))
        designs.append(
            Design(
                target=target if goal.columns else {"class": int(goal.values[i])},
                cells=here.cells,
                latents=here.latents,
                predicted=predicted,
                checked=checked,
                error=here.error,
                gap=gap,
                connected=here.connected,
                converged=here.converged,
                distance=distance[rows],
                num_exchanged=exchanged[rows],
                num_rejected=num_rejected,
                reachable=reachable,
                nearest=nearest,
                message=message,
                symmetry=config.symmetry,
            )
        )
    return designs


def _message(
    target: dict[str, float],
    nearest: dict[str, float],
    found: Candidates,
    exchanged: int,
    reachable: bool,
    tolerance: float,
    checked: bool,
) -> str:
    kind = "checked" if checked else "predicted"
    if "class" in target:
        what = f"class {int(target['class'])} has a probability of {nearest['class']:.3g}"
    else:
        what = ", ".join(f"{name} = {nearest[name]:.4g} for {value:.4g}" for name, value in target.items())
    rejected = int((~found.valid).sum())
    parts = [f"the best of {len(found.error)} candidates: {what} ({kind}, {100 * float(found.error[0]):.3g} % off)"]
    if rejected == len(found.error):
        parts.insert(0, "no candidate is sound, so that the targets may be out of reach")
    elif not reachable:
        parts.insert(0, f"no candidate is within {100 * tolerance:g} % of every target, which may be out of reach")
    if rejected:
        parts.append(f"{rejected} were rejected: not connected, or the check did not converge")
    if exchanged:
        parts.append(f"{exchanged} of the {found.cells[0].numel()} voxels of its array were exchanged to get there")
    return "; ".join(parts) + "."


def _goal(
    model: SnaJanusModel, targets: Mapping[str, Target], weights: Mapping[str, float], check: bool
) -> tuple[Goal, bool]:
    """The targets of all designs, and whether they are one design alone."""
    config = model.config
    if not targets:
        raise ValueError("no property is targeted; name at least one.")
    if config.property_kind == "classification":
        return _class_goal(model, targets, weights)
    columns = [_column(config.property_names, name) for name in targets]
    names = [config.property_names[column] for column in columns]
    if len(set(names)) < len(names):
        raise ValueError(f"targets {list(targets)} name a property twice; name it once.")
    values, is_single = _table({name: _numbers(name, value) for name, value in targets.items()})
    for column, name, given in zip(columns, names, values.T, strict=True):
        try:
            known = canonical(name)
        except ValueError as error:
            if check and is_binary(config):
                raise ValueError(f"target {name} cannot be checked; leave it out, or set check = False.") from error
            known = name
        if not given.isfinite().all():
            raise ValueError(f"target {name} = {given[~given.isfinite()][0]}; expected finite numbers.")
        if (known in POSITIVE or config.property_scale[column] == "log") and (given <= 0).any():
            raise ValueError(f"target {name} = {given.min():g}; expected a number above 0.")
        if name == "volume_fraction":
            if ((given <= 0) | (given >= 1)).any():
                raise ValueError(f"target volume_fraction = {given.tolist()}; expected numbers between 0 and 1.")
            if is_binary(config):  # says so if the boundary does not allow it
                threshold(torch.zeros(len(given), *config.shape), given, config.symmetry, shared_boundary(model))
    factors = {config.property_names[_column(config.property_names, name)]: w for name, w in weights.items()}
    if any(name not in names or not 0 < w < float("inf") for name, w in factors.items()):
        raise ValueError(f"weights = {dict(weights)}; expected positive numbers for some of the targets {names}.")
    device = model.latent_mean.device
    return Goal(
        names=names,
        columns=columns,
        values=values.to(device),
        units=torch.stack([_units(config, name, values[:, k]) for k, name in enumerate(names)], -1).to(device),
        weights=torch.tensor([factors.get(name, 1.0) for name in names], dtype=torch.float64, device=device),
    ), is_single


def _class_goal(model: SnaJanusModel, targets: Mapping[str, Target], weights: Mapping[str, float]) -> tuple[Goal, bool]:
    labels = model.config.property_names
    if len(targets) != 1 or (name := next(iter(targets))) not in ("class", "label") or weights:
        raise ValueError(f"targets = {dict(targets)}; expected a class's number or label alone, and no weights.")
    given = targets[name]
    if name == "label":
        wanted: list[Any] = [given] if isinstance(given, str | float | int) else list(given)
        for label in wanted:
            if label not in labels:
                raise ValueError(f"there is no label {label!r}; {nearest_name(str(label), labels)}")
        numbers = [labels.index(label) for label in wanted]
        given = numbers[0] if isinstance(given, str) else numbers
    values, is_single = _table({name: _numbers(name, given)})
    if not torch.isin(values, torch.arange(len(labels)).double()).all():
        raise ValueError(f"target {name} = {targets[name]}; expected whole numbers from 0 to {len(labels) - 1}.")
    values = values.to(model.latent_mean.device)
    return Goal(["class"], [], values, torch.ones_like(values), torch.ones(1, dtype=torch.float64)), is_single


def _column(names: Sequence[str], name: str) -> int:
    """The model's property of this name, in whatever spelling."""
    if name in names:
        return names.index(name)
    try:
        spellings = [canonical(known) for known in names]
        return spellings.index(canonical(name))
    except ValueError as error:
        raise ValueError(f"the model predicts no property {name!r}; {nearest_name(name, names)}") from error


def _numbers(name: str, given: Target) -> Tensor:
    try:
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"target {name} = {given!r}; expected a number or a sequence of numbers.") from error
    if values.ndim > 1 or not values.numel():
        raise ValueError(f"target {name} has shape {tuple(values.shape)}; expected a number or a sequence of some.")
    return values


def _table(columns: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """Targets of all designs, (designs, targets), and whether no target is a sequence."""
    lengths = {name: len(values) for name, values in columns.items() if values.ndim}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"sequences of targets have lengths {lengths}; expected the same for all.")
    count = next(iter(lengths.values()), 1)
    return torch.stack([values.expand(count) for values in columns.values()], -1), not lengths


def _units(config: SnaJanusConfig, name: str, values: Tensor) -> Tensor:
    """What errors are relative to: the size of the values, or the property's deviation where the sign may change."""
    column, sizes = config.property_names.index(name), values.abs()
    floor = sizes.clamp(min=config.property_std[column])
    return floor if config.property_low[column] < 0 else torch.where(values > 0, sizes, floor)


def _check_counts(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} = {value!r}; expected an integer of at least {least}.")


def _check_options(
    model: SnaJanusModel, prior_weight: float, tolerance: float, check: bool, refine: str | None
) -> None:
    if model.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the model is {model.dtype}; expected float32 or float64: call model.float() first.")
    if not (isfinite(prior_weight) and prior_weight >= 0):
        raise ValueError(f"prior_weight = {prior_weight!r}; expected a finite number, 0 or more.")
    if not (isfinite(tolerance) and tolerance > 0):
        raise ValueError(f"tolerance = {tolerance!r}; expected a number above 0.")
    if refine not in (None, "physics"):
        raise ValueError(f"refine = {refine!r}; expected 'physics' or None.")
    if refine and not (check and is_binary(model.config)):
        raise ValueError("refine = 'physics' needs check = True and a model of two-phase cells; leave one of them out.")


__all__ = ["Design", "invert"]
