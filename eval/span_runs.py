"""The runs of the SPAN study: tuning of learning rates, then tests with other seeds; what is there is kept."""

import json
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.span_study import choose
from training.settings import Settings, load_yaml, read_settings
from training.span import RECORD, SIZES, allowed_keys, folder_of, run, what_counts
from training.span_networks import FAMILIES
from training.span_offline import kept_record

CONFIGS = Path("training/configs")
FIRST_TUNING_SEED = 100  # and below it those of tests


@dataclass(frozen=True)
class Task:
    """What is run of a task.

    Attributes:
        networks: Keys of ``training.span_networks.FAMILIES``.
        seeds: Number of test runs of each network.
        tuning_seeds: Number of runs with each learning rate, with other seeds, that choose one.
    """

    networks: Sequence[str]
    seeds: int
    tuning_seeds: int = 1

    def __post_init__(self):
        if not (1 <= self.seeds <= FIRST_TUNING_SEED and self.tuning_seeds >= 1):
            raise ValueError(
                f"seeds, tuning_seeds = {self.seeds}, {self.tuning_seeds}; expected at least 1, and seeds at most "
                f"{FIRST_TUNING_SEED}."
            )


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        sizes: Of the tasks' configs.
        learning_rates: The grid of every network.
        tasks: What is run of each.
        offline: The plan of the offline part, as ``eval.span_offline.jobs`` takes it, with ``tasks``,
            ``dataset_steps``, and the ``expert`` that is recorded.
    """

    sizes: Sequence[str]
    learning_rates: Sequence[float]
    tasks: Mapping[str, "Task"]
    offline: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        networks = {network for task in self.tasks.values() for network in task.networks}
        for name, given, known in (("networks", networks, FAMILIES), ("sizes", self.sizes, SIZES)):
            if strange := [each for each in given if each not in known]:
                raise ValueError(f"{name}: {', '.join(strange)} unknown; expected some of {', '.join(known)}.")
        for task in self.tasks:
            if not (CONFIGS / f"span_{task}.yaml").is_file():
                raise ValueError(f"tasks: {task} has no {CONFIGS}/span_{task}.yaml.")

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Of a YAML file.

        Raises:
            ValueError: If a key is unknown or missing.
        """
        content = load_yaml(path)
        try:
            tasks = {name: Task(**task) for name, task in content.pop("tasks").items()}
            return cls(**content, tasks=tasks)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def of(self, tasks: Sequence[str]) -> "Study":
        """The study of some of its tasks.

        Raises:
            ValueError: If it has none of a name.
        """
        if strange := [task for task in tasks if task not in self.tasks]:
            raise ValueError(f"tasks: {', '.join(strange)} unknown; expected some of {', '.join(self.tasks)}.")
        return replace(self, tasks={task: self.tasks[task] for task in tasks})

    def small(self) -> "Study":
        """One seed of each, to see that everything runs."""
        names = ("cartpole", "pendulum", "waypoints")
        tasks = {name: replace(self.tasks[name], seeds=2, tuning_seeds=1) for name in names if name in self.tasks}
        plan = {**self.offline, "dataset_steps": 400, "num_steps": 4, "factors": [1], "seeds": 1, "tasks": ["pendulum"]}
        plan["expert_flags"] = {"pendulum": SMALL_FLAGS}
        return replace(
            self,
            sizes=self.sizes[:1],
            learning_rates=self.learning_rates[:2],
            tasks=tasks,
            offline=plan if self.offline else {},
        )


SMALL_FLAGS = ("--task.total_steps=64", "--task.num_evaluations=2", "--task.num_episodes=2")


@dataclass(frozen=True)
class Job:
    """One run."""

    task: str
    network: str
    size: str
    learning_rate: float
    seed: int
    purpose: str


def do(job: Job, out: Path, flags: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a run, which is trained if there is none yet.

    Args:
        job: The run.
        out: Folder of all runs.
        flags: Settings over those of the task's config.
    """
    import torch

    torch.set_num_threads(1)  # networks this small are slower on several
    warnings.filterwarnings("ignore", category=UserWarning, module="stable_baselines3")
    return run(settings_of(job, flags), job.task, out, progress=False)


def settings_of(job: Job, flags: Sequence[str] = ()) -> Settings:
    """Those of the task's config, and the run's own."""
    settings = read_settings(CONFIGS / f"span_{job.task}.yaml", flags, allowed_keys())
    settings["training"].update(
        network=job.network, size=job.size, learning_rate=job.learning_rate, seed=job.seed, purpose=job.purpose
    )
    return settings


def tuning_jobs(study: Study) -> list[Job]:
    """Every task, size, network and learning rate, a seed of all before the next."""
    return [
        Job(name, network, size, rate, FIRST_TUNING_SEED + seed, "tune")
        for seed in range(max(task.tuning_seeds for task in study.tasks.values()))
        for size in study.sizes
        for name, task in study.tasks.items()
        for network in task.networks
        for rate in study.learning_rates
        if seed < task.tuning_seeds
    ]


def test_jobs(study: Study, tuned: Sequence[Mapping[str, Any]]) -> list[Job]:
    """Every seed of a task, size and network, with the learning rate of its tuning runs; those without are left out."""
    jobs = []
    for seed in range(max(task.seeds for task in study.tasks.values())):
        for size in study.sizes:
            for name, task in study.tasks.items():
                for network in task.networks:
                    cell = {"task": name, "size": size, "network": network}
                    runs = [each for each in tuned if cell.items() <= each.items()]
                    if seed < task.seeds and runs:
                        jobs.append(Job(**cell, learning_rate=choose(runs)["learning_rate"], seed=seed, purpose="test"))
    return jobs


test_jobs.__test__ = False  # nothing for pytest


def run_all(jobs: Sequence[Job], out: Path, num_processes: int, flags: Sequence[str] = ()) -> None:
    """Trains what is missing, several runs at one time, each on one core.

    Raises:
        ValueError: If a run that is there is one of other settings.
    """

    def kept(job: Job) -> dict[str, Any] | None:
        return kept_record(folder_of(out, job.task, vars(job)), settings_of(job, flags), what_counts)

    missing = [job for job in jobs if kept(job) is None]
    work: Callable[[Job], Any] = partial(do, out=out, flags=tuple(flags))
    if num_processes == 1 or len(missing) < 2:
        for job in tqdm(missing, unit="run", disable=None):
            work(job)
        return
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        for _ in tqdm(pool.imap_unordered(work, missing), total=len(missing), unit="run", disable=None):
            pass


def record_key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a run from the others."""
    return tuple(record[name] for name in ("task", "size", "network", "learning_rate", "seed"))


def records_in(out: Path) -> list[dict[str, Any]]:
    """All records of a folder."""
    return list(_read(sorted(out.glob(f"*/*/*/*/{RECORD}"))))


def _read(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        record = json.loads(path.read_text(encoding="utf-8"))
        if "returns" in record:
            yield record


def records_of(jobs: Sequence[Job], out: Path) -> list[dict[str, Any]]:
    """The records of some runs among those of a folder."""
    wanted = {record_key(vars(job)) for job in jobs}
    return [each for each in records_in(out) if record_key(each) in wanted]
