"""The study of SPAN: what is missing is trained, then everything is summed up and drawn.

    python -m eval.span [--study training/configs/span_study.yaml] [--out runs/span] [--parts runs,offline,cost] \
        [--processes 2] [--finished] [--small]

Runs lie in a folder for each task, size, network, learning rate and seed; what is there is kept, so that a study that
was interrupted goes on. Writes span.json and pictures into the folder `study`. --finished trains nothing; --small tries
all of it, in the folder `small`, at sizes too small to say anything.
"""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import span_offline
from eval.span_agents import drive_frames, save_values
from eval.span_cost import cost_part, one_thread
from eval.span_figures import draw_all, write_gif
from eval.span_runs import SMALL_FLAGS, Job, Study, do, records_of, run_all, test_jobs, tuning_jobs
from eval.span_study import compact, summarise
from eval.span_targets import targets
from training.provenance import provenance, write_json
from training.span import folder_of

NAME = "span.json"
PARTS = ("runs", "offline", "cost")
STUDY = Path("training/configs/span_study.yaml")
NUM_RESAMPLES = 2000
PICTURED = {"pendulum": ("span", "mlp_tanh", "mlp_relu"), "waypoints": ("span",)}
FRAMES_PER_SECOND = 10
EXPERT_SEED = 1000


def run(
    study: Study,
    out: Path,
    *,
    parts: Sequence[str] = PARTS,
    num_processes: int = 1,
    train: bool = True,
    flags: Sequence[str] = (),
    small: bool = False,
) -> dict[str, Any]:
    """Trains what is missing of some parts, and writes span.json and pictures of all that is there.

    Args:
        study: What is compared.
        out: Folder of all runs.
        parts: Of ``PARTS``; others are taken from the record that is there.
        num_processes: Runs at one time, each on a core.
        train: Whether to train what is missing.
        flags: Settings over those of every task.
        small: Whether sizes are too small to say anything.

    Raises:
        ValueError: If a part is unknown, or there is no run.
    """
    if unknown := [name for name in parts if name not in PARTS]:
        raise ValueError(f"parts: {', '.join(unknown)} unknown; expected some of {', '.join(PARTS)}.")
    path = out / "study" / NAME
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if train and "runs" in parts:
        run_all(tuning_jobs(study), out, num_processes, flags)
        run_all(test_jobs(study, records_of(tuning_jobs(study), out)), out, num_processes, flags)
    tuned = records_of(tuning_jobs(study), out)
    # A test with a rate that more tuning runs have replaced stays on disk and out of the study.
    records = tuned + records_of(test_jobs(study, tuned), out)
    if not records:
        raise ValueError(f"{out} holds no run of the study; leave out --finished.")
    offline = known.get("offline")
    if "offline" in parts and study.offline:
        offline = offline_part(study, out, num_processes) if train else offline
    cost = known.get("cost")
    if "cost" in parts and (train or cost is None):
        one_thread()
        cost = {**cost_part(**(SMALL_COST if small else {})), "provenance": provenance(0)}
    summary = summarise(records, num_resamples=100 if small else NUM_RESAMPLES, seed=0)
    record = {
        "small": small,
        "study": dataclasses.asdict(study),
        "runs": [compact(each) for each in records],
        "summary": summary,
        "cost": cost,
        "offline": offline,
        "provenance": provenance(sorted({each["seed"] for each in records})),
    }
    record["targets"] = [dataclasses.asdict(each) for each in targets(record)]
    pictures(records, summary, out)
    write_json(path, record)
    draw_all(path.parent, record)
    return record


SMALL_COST: dict[str, Any] = {
    "tasks": (("PPO", "CartPole-v1", 300), ("SAC", "Pendulum-v1", 900)),
    "batch_size": 16,
    "repeats": 2,
}


def offline_part(study: Study, out: Path, num_processes: int) -> list[dict[str, Any]]:
    """Records data sets of the experts that the study names, and trains on them what is missing."""
    plan, root = study.offline, out / "datasets"
    names: list[str] = []
    for task in plan["tasks"]:
        expert, folder = expert_of(plan, task, out)
        names += span_offline.make_datasets(root, expert, folder, num_steps=plan["dataset_steps"], kinds=plan["kinds"])
    tuning = span_offline.run_all(span_offline.jobs(names, plan, root, out / "offline"), num_processes)
    rates = span_offline.chosen(tuning)
    records = span_offline.run_all(span_offline.jobs(names, plan, root, out / "offline", rates), num_processes)
    return [span_offline.told(each, plan["num_parameters"]) for each in records]


def expert_of(plan: Mapping[str, Any], task: str, out: Path) -> tuple[dict[str, Any], Path]:
    """The record and folder of the agent that a data set is recorded of: an MLP's, trained on its own."""
    job = Job(task, seed=EXPERT_SEED, purpose="expert", **plan["expert"])
    record = do(job, out / "experts", tuple(plan.get("expert_flags", {}).get(task, ())))
    return record, folder_of(out / "experts", task, vars(job))


def pictures(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], out: Path) -> None:
    """Writes the values of pendulum's states and a drive, of the first test seed's agents where they are there."""
    agents: dict[str, dict[str, Any]] = {task: {} for task in PICTURED}
    for each in records:
        if each["seed"] == 0 and each["network"] in PICTURED.get(each["task"], ()):
            folder = folder_of(out, each["task"], each)
            agents[each["task"]][each["network"]] = span_offline.load_agent(folder, each["algorithm"])
    study = out / "study"
    study.mkdir(parents=True, exist_ok=True)
    if agents["pendulum"]:
        save_values(study / "values.safetensors", agents["pendulum"])
    for agent in agents["waypoints"].values():
        write_gif(study / "drive.gif", drive_frames(agent), frames_per_second=FRAMES_PER_SECOND)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=STUDY, help="YAML file of what is compared")
    parser.add_argument("--out", type=Path, default=Path("runs/span"), help="folder of all runs")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--tasks", nargs="+", help="these of the study alone")
    parser.add_argument("--processes", type=int, default=1, help="runs at one time, each on a core")
    parser.add_argument("--finished", action="store_true", help="train nothing, and sum up what is there")
    parser.add_argument("--small", action="store_true", help="everything at sizes too small to say anything")
    known = parser.parse_args(arguments)
    try:
        study = Study.read(known.study)
        if known.tasks:
            study = study.of(known.tasks)
        flags: Sequence[str] = ()
        if known.small:
            study, flags = study.small(), SMALL_FLAGS
        record = run(
            study,
            known.out / "small" if known.small else known.out,  # its data sets would pass for those of the study
            parts=known.parts,
            num_processes=known.processes,
            train=not known.finished,
            flags=flags,
            small=known.small,
        )
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    for target in record["targets"]:
        print(told(target))
    return record


def told(target: Mapping[str, Any]) -> str:
    """A target as a line of text."""
    reached = {None: "open", True: "reached", False: "not reached"}[target["reached"]]
    measured = "" if target["measured"] is None else f" {target['measured']:.3g},"
    return f"{target['figure']} {target['asked']}:{measured} {reached}"


if __name__ == "__main__":
    main()
