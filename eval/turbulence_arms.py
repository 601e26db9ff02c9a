"""The arms of a study of turbulence: read from its file, matched in size, each tuned and trained with one budget."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from eval.study import best_of, seconds_of, settings_flags
from leviathan.decoding_leviathan import DETERMINISTIC, RANDOM
from training.fields import FieldFile, data_record
from training.provenance import relative, write_json
from training.settings import Settings, load_yaml, read_settings
from training.sizes import VARY, count_parameters, flags_of, match_parameters, model_options
from training.train import allowed_keys, differences, run

# patches: in isolation, as in the paper; whole: periodic fields; halo: patches that see what lies around them.
SETTINGS = ("patches", "whole", "halo")
TRAINED = "arm.json"  # beside an arm's models
EVALUATIONS = 10  # of the final training, over its steps
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Arm:
    """A model under study.

    Attributes:
        name: Of the arm.
        config: Base config of its trainings.
        flags: Settings over it, `--section.key value`.
        tune: The key that is tuned, and its values.
        is_operator: A map from field to field, rather than a model of tokens.
    """

    name: str
    config: Path
    flags: list[str]
    tune: tuple[str, list[str]]
    is_operator: bool

    def data(self) -> dict[str, Any]:
        """The settings that decide which flows it is trained on, and which are left for the test."""
        section = read_settings(self.config, self.flags, allowed_keys())["data"]
        return {name: section.get(name) for name in ("path", "fractions", "split_seed", "stride", "symmetries")}

    def tokenizer(self) -> dict[str, Any]:
        """The settings of its tokenizer."""
        return read_settings(self.config, self.flags, allowed_keys())["tokenizer"]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The section `evaluation` of a study.

    Attributes:
        split: Which trajectories.
        num_trajectories: The first so many of them; None for all.
        num_steps: States to generate.
        seeds: Of what is random; one is enough for the rest.
        patch_size: Side of the patches across whose borders jumps are measured, also of fields that have none.
        crop: In the setting `patches`, only the first crop x crop pixels of a field; None for all.
        samplings: Of an arm of tokens, by name; the first is its headline. `expectation` where nothing is said.
        decoding: Further options of `leviathan.rollout`.
    """

    split: str = "test"
    num_trajectories: int | None = None
    num_steps: int = 20
    seeds: Sequence[int] = (0, 1, 2)
    patch_size: int
    crop: int | None = None
    samplings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study as its file says.

    Attributes:
        settings: Arms of each setting by name, the headline's first.
        steps: Of a training.
        tune_steps: Of a training that only finds the best value of an arm's `tune`.
        training_seed: Of initial values and pairs.
        evaluation: How arms are rolled out.
    """

    settings: Mapping[str, Mapping[str, Arm]]
    steps: int
    tune_steps: int
    training_seed: int
    evaluation: EvaluationSettings


def read_study(path: Path) -> Study:
    """Reads and checks a study; sizes that are to match are found.

    Raises:
        ValueError: On something that is no such study; it says what was expected.
        OSError: If a file cannot be read.
    """
    content = _section(load_yaml(path), str(path), [each.name for each in fields(Study)] + ["tune"])
    if missing := {"settings", "steps", "tune", "tune_steps", "evaluation"} - content.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    names = [each.name for each in fields(EvaluationSettings)]
    evaluation = _section(content["evaluation"], f"{path}: evaluation", names)
    if "patch_size" not in evaluation:
        raise ValueError(f"{path}: evaluation lacks patch_size, the side of the patches whose borders are measured.")
    _check_counts(path, content)
    sections = _section(content["tune"], f"{path}: tune").items()
    tunes = {config: _tune(keys, f"{path}: tune of {config}") for config, keys in sections}
    study = Study(
        settings={
            name: _read_arms(_section(setting, f"{path}: {name}", ("shared", "arms")), tunes, f"{path}: {name}")
            for name, setting in _section(content["settings"], f"{path}: settings", SETTINGS).items()
        },
        steps=content["steps"],
        tune_steps=content["tune_steps"],
        training_seed=content.get("training_seed", 0),
        evaluation=EvaluationSettings(**evaluation),
    )
    _check_samplings(path, study)
    return study


def _check_counts(path: Path, content: Mapping[str, Any]) -> None:
    """Refuses before hours of training what the rollouts after them would."""
    chosen = content["evaluation"]

    def is_count(value: Any, least: int = 1) -> bool:
        return type(value) is int and value >= least

    counts = {name: content[name] for name in ("steps", "tune_steps")}
    counts |= {name: chosen[name] for name in ("patch_size", "num_steps") if name in chosen}
    counts |= {name: chosen[name] for name in ("num_trajectories", "crop") if chosen.get(name) is not None}
    for name, value in counts.items():
        if not is_count(value):
            raise ValueError(f"{path}: {name} = {value!r}; expected a whole number, 1 or more.")
    if not is_count(content.get("training_seed", 0), 0):
        raise ValueError(f"{path}: training_seed = {content['training_seed']!r}; expected a whole number, 0 or more.")
    seeds, split = chosen.get("seeds", [0]), chosen.get("split", "test")
    whole = isinstance(seeds, list) and all(is_count(seed, 0) for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds = {seeds!r}; expected a list of different whole numbers, 0 or more.")
    if split not in SPLITS:
        raise ValueError(f"{path}: split = {split!r}; expected one of {', '.join(SPLITS)}.")


def _check_samplings(path: Path, study: Study) -> None:
    tokens = {name for arms in study.settings.values() for name, arm in arms.items() if not arm.is_operator}
    samplings = study.evaluation.samplings
    if not isinstance(samplings, dict) or not isinstance(study.evaluation.decoding, dict):
        raise ValueError(f"{path}: evaluation: samplings and decoding: expected keys and values.")
    for arm, names in samplings.items():
        if arm not in tokens:
            raise ValueError(
                f"{path}: samplings of {arm!r}; expected an arm of tokens, {', '.join(sorted(tokens)) or 'none here'}."
            )
        if not isinstance(names, list) or not names or not all(map(_is_sampling, names)):
            raise ValueError(
                f"{path}: samplings of {arm} are {names!r}; expected a list of {', '.join(DETERMINISTIC + RANDOM)}, or "
                "top_5 and the like, of so many levels."
            )


def _is_sampling(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    options = sampling_options(name)
    return options["sampling"] in DETERMINISTIC + RANDOM and options.get("top_k") != 0


def sampling_options(name: str) -> dict[str, Any]:
    """The options of `leviathan.rollout` for a sampling by name; `top_5` keeps five levels."""
    kind, _, count = name.rpartition("_")
    return {"sampling": "top_k", "top_k": int(count)} if kind == "top" and count.isdecimal() else {"sampling": name}


def _section(content: Any, where: str, names: Collection[str] | None = None) -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{where}: expected keys and values, not {content!r}.")
    if unknown := [name for name in content if names is not None and name not in names]:
        raise ValueError(f"{where}: unknown {', '.join(map(str, unknown))}; expected some of {', '.join(names)}.")
    return dict(content)


def _tune(keys: Any, where: str) -> tuple[str, list[str]]:
    pairs = list(_section(keys, where).items())
    if len(pairs) > 1 or not isinstance(pairs[0][1], list) or not pairs[0][1]:
        raise ValueError(f"{where} is {keys!r}; expected one key and a list of values.")
    return pairs[0][0], [json.dumps(value) for value in pairs[0][1]]


def _read_arms(setting: dict[str, Any], tunes: Mapping[str, Any], where: str) -> dict[str, Arm]:
    arms, matched = {}, {}
    shared = setting.get("shared") or {}  # YAML gives None where nothing stands
    if not isinstance(shared, dict):
        raise ValueError(f"{where}: shared is {shared!r}; expected keys and values, or nothing.")
    for name, content in _section(setting.get("arms"), f"{where}: arms").items():
        given = shared | _section(content, f"{where}: {name}")
        config, other, vary = (given.pop(key, None) for key in ("config", "same_parameters_as", "vary"))
        if config not in tunes:
            raise ValueError(f"{where}: {name} has config {config!r}; expected one that `tune` has a key for.")
        flags = settings_flags(given)
        kind = read_settings(Path(config), flags, allowed_keys())["data"].get("kind", "fields")
        arms[name] = Arm(name, Path(config), flags, tunes[config], kind == "operators")
        tune, headline = tunes[config], next(iter(arms.values()))
        if len(tune[1]) < len(headline.tune[1]):
            raise ValueError(
                f"{where}: {name} is tuned over {len(tune[1])} values, {headline.name} over "
                f"{len(headline.tune[1])}; give no arm less than the first, whose rivals they are."
            )
        if other is not None:
            matched[name] = other, [vary] if isinstance(vary, str) else vary or VARY
    for name, (other, vary) in matched.items():
        if other not in arms or arms[other].is_operator:
            tokens = ", ".join(each.name for each in arms.values() if not each.is_operator)
            raise ValueError(
                f"{where}: {name} is to match {other!r}; expected an arm of tokens, {tokens or 'none here'}."
            )
        arms[name].flags.extend(_size_flags(arms[name], arms[other], vary))
    data = {name: arm.data() for name, arm in arms.items()}
    if lacking := [name for name, section in data.items() if not section["path"]]:
        raise ValueError(f"{where}: {', '.join(lacking)}: no data.path, the file of fields; give one to the config.")
    if odd := [name for name in data if data[name] != next(iter(data.values()))]:
        raise ValueError(f"{where}: {', '.join(odd)}: other data than {next(iter(data))} has; all arms need the same.")
    return arms


def _size_flags(arm: Arm, other: Arm, vary: Sequence[str]) -> list[str]:
    target = count_parameters(model_options(other.config, other.flags))
    if arm.is_operator:
        return ["--model.num_parameters", str(target)]
    options = model_options(arm.config, arm.flags)
    return flags_of(match_parameters(target, options, vary), options)


def train_arm(study: Study, arm: Arm, folder: Path) -> dict[str, Any]:
    """Trains an arm below `folder`, or goes on, or finds it trained; what there is to say of it.

    Every value of `arm.tune` gets `study.tune_steps` steps; that of the least validation loss then gets `study.steps`
    from the start, in `folder/model`.

    Raises:
        ValueError: If every value diverged, or the folder holds another training.
        OSError: If the data cannot be read.
    """
    (key, values), of = arm.tune, made_of(study, arm)
    if (known := trained(folder)) and known["of"] == of:
        return known

    def run_with(value: str, steps: int, evaluations: int, where: Path) -> dict[str, Any]:
        more = {"training.output_dir": str(where), "training.resume_from_checkpoint": True}
        return run(_settings(study, arm, steps, evaluations, [f"--{key}", value, *settings_flags(more)]))

    def loss(value: str) -> float | None:
        return run_with(value, study.tune_steps, 1, folder / f"tune-{value}")["validation"][-1]["loss"]

    tuning = {value: loss(value) for value in values}
    best = best_of(tuning)
    if tuning[best] is None:
        raise ValueError(f"{arm.name}: training diverged with every {key} of {', '.join(values)}; add a smaller one.")
    report = run_with(best, study.steps, EVALUATIONS, folder / "model")
    run_record = json.loads((folder / "model" / "run.json").read_text(encoding="utf-8"))
    training = run_record["settings"]["training"]
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    made = ("commit", "changed_since_commit", "hardware", "date")
    record = {
        "of": of,
        "tuning": tuning,
        "best": best,
        "validation": [{name: row.get(name) for name in ("step", "loss", "nrmse")} for row in report["validation"]],
        "num_parameters": report["num_parameters"],
        "seconds": seconds_of(report),
        "pairs": study.steps * (training.get("sequences_per_step") or batch * run_record["num_processes"]),
        "provenance": {name: report["provenance"][name] for name in made},
    }
    write_json(folder / TRAINED, record)
    return record


def _settings(study: Study, arm: Arm, steps: int, evaluations: int, more: Sequence[str] = ()) -> Settings:
    """The settings of one training of an arm, with further flags."""
    own = {"max_steps": steps, "eval_steps": max(1, steps // evaluations), "seed": study.training_seed}
    flags = settings_flags({f"training.{name}": number for name, number in own.items()})
    return read_settings(arm.config, [*arm.flags, *flags, *more], allowed_keys())


def made_of(study: Study, arm: Arm) -> dict[str, Any]:
    """What an arm's training follows from, for JSON: settings, what is tuned, budget, and what tells its data.

    Settings are those of the final training but for the tuned key, and for where it is written and whether it resumes,
    which no number follows from.

    Raises:
        ValueError: If the data is no file of fields.
        OSError: If it cannot be read.
    """
    key, values = arm.tune
    settings = _settings(study, arm, study.steps, EVALUATIONS)
    with FieldFile(settings["data"]["path"]) as file:
        data = data_record(file)
    left_out = {"training.output_dir", "training.resume_from_checkpoint", key}
    return {
        "settings": {
            section: {
                name: relative(value) if isinstance(value, str) else value
                for name, value in entries.items()
                if f"{section}.{name}" not in left_out
            }
            for section, entries in settings.items()
        },
        "tune": key,
        "values": values,
        "tune_steps": study.tune_steps,
        "steps": study.steps,
        "seed": study.training_seed,
        "data_record": data,
    }


def check_trained(study: Study, arm: Arm, folder: Path) -> None:
    """Refuses a trained arm that follows from something else than what the study says now.

    Raises:
        ValueError: It names the arm and what differs.
    """
    if differ := differences(trained(folder)["of"], made_of(study, arm)):
        raise ValueError(
            f"{arm.name} in {folder} was trained with other settings or data ({', '.join(differ)}) than the study has "
            "now; restore them, or run the study without --finished to train it again."
        )


def trained(folder: Path) -> dict[str, Any] | None:
    """What `train_arm` left of an arm; None if it is not trained to the end."""
    record = folder / TRAINED
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
