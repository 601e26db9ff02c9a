"""Two smaller things that Janus inverts in its study: digits of a class, and 2-D cells of asked-for conductivities."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor
from tqdm import tqdm

from eval.janus_models import add_arrays, load_model, responses, settings_of, test_errors, train_all
from leviathan.janus import SnaJanusModel
from leviathan.janus.inversion import Design
from training.janus import digits
from training.microstructure_data import load_set
from training.microstructures import make_set

DIGITS, CONDUCTIVITY = "janus_digits.yaml", "janus_conductivity.yaml"
HEAD = "separable"
CONDUCTIVITIES = ("K11", "K22")  # that are asked for
KERNEL = "rbf"  # of the classifier that looks at the digits


# -------------------------------------------------------------------------------------------------------------- digits


def digits_part(
    out: Path, models: Path, *, seeds: Sequence[int], num_candidates: int, num_processes: int, flags: Sequence[str]
) -> dict[str, Any]:
    """Asks models of handwritten digits for each class; a classifier that is none of theirs looks at what they give.

    Args:
        out: Folder of the record: images of the first seed.
        models: Folder of the runs, which are kept.
        seeds: Of the models.
        num_candidates: For each class.
        num_processes: As of ``models_part``.
        flags: Settings over those of the config.
    """
    runs = {models / f"digits-{seed}": settings_of(None, HEAD, seed, flags, DIGITS) for seed in seeds}
    train_all(runs, num_processes)
    splits = digits().splits
    classifier = SVC(kernel=KERNEL).fit(*_table(splits["train"]))
    rows = []
    for seed, folder in zip(seeds, runs, strict=True):
        model = load_model(folder)
        classes = list(range(len(model.config.property_names)))
        designs = model.invert({"class": classes}, num_candidates=num_candidates, seed=seed)
        rows.append(
            {
                "seed": seed,
                "test_accuracy": accuracy(model, *splits["test"]),
                "classes": [recognised(classifier, design, number) for number, design in enumerate(designs)],
            }
        )
        if seed == seeds[0]:
            add_arrays(out, {"digits.images": torch.stack([design.cells.float() for design in designs])})
    return {
        "rows": rows,
        "num_candidates": num_candidates,
        "classifier": type(classifier).__name__,
        "classifier_accuracy": classifier.score(*_table(splits["test"])),
    }


def _table(split: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pixels and their classes, as scikit-learn has them."""
    images, classes = split
    return images.flatten(1).numpy(), classes.numpy()


@torch.no_grad()
def accuracy(model: SnaJanusModel, images: Tensor, classes: Tensor) -> float:
    """Share of images whose most probable class is theirs."""
    return (model.predict(model.encode(images)).argmax(-1) == classes).double().mean().item()


def recognised(classifier: SVC, design: Design, number: int) -> dict[str, Any]:
    """What share of a class's candidates the classifier takes for it, and whether the best one is among these."""
    found = classifier.predict(design.cells.float().flatten(1).numpy()) == number
    return {"class": number, "recognised": float(found.mean()), "best_recognised": bool(found[0])}


# -------------------------------------------------------------------------------------------------------- conductivity


def conductivity_part(
    out: Path,
    models: Path,
    *,
    seeds: Sequence[int],
    cells: Mapping[str, Any],
    num_targets: int,
    num_candidates: int,
    num_processes: int,
    flags: Sequence[str],
) -> dict[str, Any]:
    """Asks models of 2-D cells without symmetry for both conductivities of held-out cells.

    Args:
        out: Folder of the record; the set is made in ``conductivity`` in it, if it is not there.
        models: Folder of the runs, which are kept.
        seeds: Of the models.
        cells: Of the set, as ``training.microstructures.make_set`` takes it.
        num_targets: At most, as there are test cells.
        num_candidates: For each target.
        num_processes: As of ``models_part``.
        flags: Settings over those of the config.
    """
    data = out / "conductivity"
    make_set(data, kind="conductivity", processes=num_processes, **cells)
    runs = {models / f"conductivity-{seed}": settings_of(data, HEAD, seed, flags, CONDUCTIVITY) for seed in seeds}
    train_all(runs, num_processes)
    held_out = load_set(data).split("test")
    columns = [held_out.property_names.index(name) for name in CONDUCTIVITIES]
    labels = held_out.labels[:num_targets, columns].double()
    targets = {name: column.tolist() for name, column in zip(CONDUCTIVITIES, labels.mT, strict=True)}
    rows = []
    for seed, folder in tqdm(list(zip(seeds, runs, strict=True)), desc="conductivity", unit="model", disable=None):
        model = load_model(folder)
        designs = model.invert(targets, num_candidates=num_candidates, seed=seed)
        rows.append(
            {
                "seed": seed,
                "test": asdict(test_errors(model, held_out)),
                "inversion": {"num_targets": len(labels), **inversion_errors(model, designs)},
            }
        )
    return {"rows": rows, "num_candidates": num_candidates, "asked": list(CONDUCTIVITIES)}


def inversion_errors(model: SnaJanusModel, designs: Sequence[Design]) -> dict[str, float]:
    """Means over designs, of the best candidate of each: the largest relative error of a target, predicted and checked.

    Beside them the share of pixels that change when the candidate is encoded and decoded once more.
    """
    best = torch.stack([design.best for design in designs]).float()
    again = responses(model, best)[1] > 0  # log-odds
    found = {
        f"{kind}_error": torch.stack([_largest(design.target, getattr(design, kind)) for design in designs])
        for kind in ("predicted", "checked")
    }
    means = {name: errors.mean().item() for name, errors in found.items()}
    return {**means, "pixel_error": (again != (best > 0.5)).double().mean().item()}


def _largest(target: Mapping[str, float], values: Mapping[str, Tensor]) -> Tensor:
    errors = [(values[name][0].double() - asked).abs() / abs(asked) for name, asked in target.items()]
    return torch.stack(errors).max()
