"""Writes model_cards/trust.md, what was done to break the package, from the records of those commands.

    python -m eval.trust_card

Records lie in model_cards/trust; each is written by the command that its section names. One that is missing is said to.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.audit import summary
from eval.markdown import bullets, table
from training.provenance import write_text

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
Record = Mapping[str, Any]


def of_interruptions(record: Record) -> str:
    """Kills by the moment into which they fell, and whether the runs ended as the one that was left alone."""
    kills = Counter(kill["moment"] for kill in record["kills"])
    rows = [(moment, count) for moment, count in sorted(kills.items())]
    return f"""{len(record["kills"])} times SIGKILL to a training run on {record["settings"]["data"]["kind"]}, until \
{record["runs"]} runs were done. Runs whose model, log, record and checkpoints (weights, optimizer, schedule, random \
numbers, place in the data) equal those of the unbroken run to the bit: **{record["identical"]} of {record["runs"]}**.

{table(("killed during", "kills"), rows)}"""


def of_sharding(record: Record) -> str:
    """Samples that were lost or came twice, by ranks and workers."""
    totals: dict[tuple[str, int, int], list[int]] = {}
    for row in record["rows"]:
        data = row["data"] + (f", {row['offsets']} offsets" if "offsets" in row else "")
        total = totals.setdefault((data, row["ranks"], row["workers"]), [0, 0, 0])
        for place, name in enumerate(("samples", "lost", "doubled")):
            total[place] += row[name]
    lost, doubled = (sum(total[place] for total in totals.values()) for place in (1, 2))
    titles = ("data", "ranks", "workers", "samples", "lost", "doubled")
    return f"""Every sample of an epoch counted, over all ranks and workers, in one go and resumed in the middle: \
**{lost} lost, {doubled} doubled**.

{table(titles, ([*key, *total] for key, total in totals.items()))}"""


def of_fuzz(record: Record) -> str:
    """What became of inputs that are no good."""
    counts = ("inputs", "loaded", "refused", "upstream", "crashes", "hangs", "memory")
    rows = [(row["target"], row["engine"], *(f"{row[name]:,}" for name in counts)) for row in record["rows"]]
    totals = {name: sum(row[name] for row in record["rows"]) for name in counts}
    broken = totals["crashes"] + totals["hangs"] + totals["memory"]
    titles = ("loader", "inputs by", *counts[:-1], "memory blow-ups")
    return f"""Loaders fed with {totals["inputs"]:,} altered files: **{broken} crashes, hangs and memory blow-ups**. \
Refused is an error that the loader documents; upstream an ordinary exception that transformers' reader raises before \
any code of ours runs; a crash is any other, or a signal; a hang and a blow-up are beyond the limits of `eval/fuzz.py`.

{table(titles, rows)}"""


def of_conformance(record: Record) -> str:
    """What transformers tests of every model."""
    rows = [(model, *counts.values()) for model, counts in record["counts"].items()]
    titles = ("model", *(next(iter(record["counts"].values()))))
    cannot = sorted({f"`{row['test']}`: {row['message']}" for row in record["rows"] if row["outcome"] == "expected"})
    without = "" if record["generation_and_exporters"] else " (which lacks those of generation and of exporters)"
    return f"""The tests that transformers {record["transformers"]} ships in its source distribution{without}. \
Skipped are those that transformers skips for such a model or machine.

{table(titles, rows)}

Expected not to hold:

{bullets(cannot)}"""


def of_audit(record: Record) -> str:
    """Known vulnerabilities and licences of the dependencies."""
    return f"```text\n{summary(record)}\n```"


def of_imports(record: Record) -> str:
    """What importing the package costs."""
    rows = []
    for figure in record["sections"]["imports"]["figures"]:
        seconds = [f"{name} {figure['seconds'][name]['median']:.2f}" for name in figure["ratio_of"]]
        target = figure["target"]
        asked = f"<= {target['at_most']}" if target else ""
        rows.append((figure["what"], ", ".join(seconds), f"{figure['ratio']:.2f}", asked))
    return f"""Medians of {record["repeats"]} processes each, in seconds. `import leviathan` puts off what it can: \
models are imported and registered when somebody asks for an Auto class, which is the first use below.

{table(("", "seconds", "ratio", "asked"), rows)}"""


SECTIONS: dict[str, tuple[str, str, Callable[[Record], str]]] = {
    "interruptions": ("Killed and resumed", "python -m eval.interruptions", of_interruptions),
    "sharding": ("Data on several processes", "python -m eval.sharding", of_sharding),
    "fuzz": ("Broken and hostile files", "python -m eval.fuzz", of_fuzz),
    # Of the loaders that were changed by what the run before had found.
    "fuzz_documents": (
        "Broken documents, again",
        "python -m eval.fuzz --only jsonl.zst jsonl jsonl.gz documents",
        of_fuzz,
    ),
    "conformance": ("transformers' own tests", "python -m eval.conformance", of_conformance),
    "imports": ("Import", "python -m eval.speed --sections imports", of_imports),
    "audit": ("Dependencies", "python -m eval.audit", of_audit),
}


def trust_card(records: Mapping[str, Record]) -> str:
    """The card as Markdown; a function of the records alone."""
    parts = []
    for name, (title, command, told) in SECTIONS.items():
        if name not in records:
            parts.append(f"## {title}\n\nNot run: `{command}` left no record.")
            continue
        origin = records[name]["provenance"]
        made = f"Made on {origin['date'][:10]} by `{origin['command']}`, {origin['hardware']['processor']}, "
        made += f"{origin['hardware']['cores']} cores."
        parts.append(f"## {title}\n\n{told(records[name])}\n\n{made}")
    sections = "\n\n".join(parts)
    return f"""# What was done to break it

<!-- Written by `python -m eval.trust_card` from the records in trust/. Edit eval/trust_card.py, not this file. -->

{sections}
"""


if __name__ == "__main__":
    found = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in SECTIONS
        if (path := CARDS / "trust" / f"{name}.json").exists()
    }
    write_text(CARDS / "trust.md", trust_card(found))
