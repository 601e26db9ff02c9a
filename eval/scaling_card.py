"""Words for the plan past one machine: the card, a function of the record of `python -m eval.scaling` alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from eval.card import commit, value
from eval.markdown import bullets, table
from eval.scaling_figures import PICTURE, named

Record = Mapping[str, Any]

SHOWN = (1, 8, 64, 512)  # numbers of GPUs in the tables
DAY = 86_400.0
NEAR = 0.02  # of one another: what two strategies cost alike


def scaling_card(record: Record, pictures: str) -> str:
    """The card as Markdown; ``pictures`` is where the picture lies, from the card."""
    sizes, made = record["sizes"], record["provenance"]
    plans = "\n\n".join(f"### {name}\n\n{plan_table(size)}" for name, size in sizes.items())
    return f"""# Leviathan past one machine

<!-- Written by `python -m eval.scaling` from scaling.json. Edit eval/scaling_card.py, not this file. -->

What training the published sizes takes on 1 to {max(record["devices"])} {record["device"]["name"]}: memory, step time
and days, by strategy. **No point was measured on an H200, nor on any GPU.** Parameters and FLOPs are counted; memory
follows from formulas that agree with counts on a CPU; times follow from these, data sheets and assumptions, so each is
a range from a best to a worst case.

{bullets(findings(record))}

![Memory and throughput against GPUs]({pictures}/{PICTURE})

## Sizes

{size_table(sizes)}

The paper publishes no layer tables: depth and width are those of the configs here, of which `pile_1b.yaml` stands for
its 1.2 billion. FLOPs are those of matrix products, two for a multiplication and an addition, with no layer computed
again; attention counts whole rectangles, also where a mask leaves half of one unused. {equality_words(sizes)}

## Days to train

Each run's own number of tokens, some 20 a parameter for text as in the paper (arXiv 2601.22040), without checkpointing:
by DDP, and by the strategy whose worst case is least. All strategies but DDP and tensor parallelism keep weights and
activations in bfloat16, which moves fewer bytes and is another arithmetic than that of the runs' configs.

{days_table(sizes, record["device"]["half_flops"])}

In brackets the share of the GPUs' dense bfloat16 peak that follows, of FLOPs as above.

## Plans

Memory of a GPU, time of a step and tokens a second of all GPUs, in the best and the worst case. GPUs share the
sequences of a step, which stay as many; a GPU takes as many at one time as the run's config says, or fewer where there
are not so many for each. "checkpointing": layers are computed again in backward. What is not there cannot be, and is
listed below the table.

{plans}

## The largest micro-batch

Sequences at one time (a power of two) that fit each of {record["device"]["devices_per_node"]} GPUs, the numbers of a \
step aside.

{largest_table(sizes)}

## Checked on a CPU

The same formulas, on models small enough for one thread of a CPU.

{bullets(memory_words(record["checks"]))}

Time, in milliseconds. Peaks measured here: {cpu_words(record["cpu"])}. Best and worst take the shares of these peaks
that are assumed of a GPU, not fitted to these points. Of the generator, whose blocks caches hold, the bandwidth of
copies says little. {time_words(record["checks"]["time"])}

{time_table(record["checks"]["time"])}

## Assumptions

{bullets(assumptions(record))}

## What was not measured

- Nothing on an H200 or another GPU: no memory, no step, no collective, no node.
- Strategies were not run at these sizes, tensor parallelism not at all.
- CUDA's own memory and fragmentation, input pipelines, evaluation, checkpoints, stragglers and failures.

## How it was made

`{value(made, "command")}`, commit {commit(made)}, {value(made, "date")}, on {value(made, "hardware.processor")}.
{", ".join(f"{name} {version}" for name, version in made["versions"].items())}.
"""


def findings(record: Record) -> list[str]:
    """What the plans say, compared by their numbers."""
    sizes, usable = record["sizes"], record["assumptions"]["usable"] * record["device"]["memory_bytes"]
    plain = {name: {p["strategy"]: p for p in size["plans"] if not p["checkpointing"]} for name, size in sizes.items()}
    alone = {name: plans["ddp"]["bytes"][0] for name, plans in plain.items()}
    fit = [name for name, held in alone.items() if held <= usable]
    most = max(alone, key=alone.get)
    whole = f"; the largest takes {alone[most] / 1e9:.0f} of {record['device']['memory_bytes'] / 1e9:.0f} GB ({most})"
    if len(fit) == len(sizes):
        found = [f"Every size fits on one GPU without sharding{whole}. None of them needs to be sharded."]
    else:
        found = [f"On one GPU without sharding fit: {', '.join(fit) or 'none'}{whole}."]
    for name, plans in plain.items():
        if kept := _kept_speeds(plans["ddp"]):
            found.append(f"{name}: DDP keeps, of a GPU's own speed, {'; '.join(kept)}.")
    for name in (next(iter(sizes)), max(sizes, key=lambda name: sizes[name]["counted"]["parameters"]["total"])):
        found.append(_sharding_words(name, plain[name]))
    found.append("FSDP2 and ZeRO-3 shard the head, which then computes its logits twice; DDP's fused loss does not.")
    return list(dict.fromkeys(found))


def _kept_speeds(ddp: Record) -> list[str]:
    """Speed of a GPU among others over that of one alone, worst case by worst case and best by best."""
    ends, kept = ("worst", "best"), []
    for i, count in enumerate(ddp["devices"]):
        if count > 1 and (count in SHOWN or count == ddp["devices"][-1]):
            shares = [ddp[f"seconds_{end}"][0] / (ddp[f"seconds_{end}"][i] * count) for end in ends]
            sequences = _count(ddp["rows"][i], "sequence")
            kept.append(f"{_percent(*sorted(shares))} on {count} ({sequences} at one time on each)")
    return kept


def _sharding_words(name: str, plans: Mapping[str, Record]) -> str:
    """How FSDP2 compares with DDP on eight GPUs, or on the most that both have below."""
    ddp, sharded = plans["ddp"], plans["fsdp2"]
    count = max(n for n in ddp["devices"] if n in sharded["devices"] and n <= 8)
    place, other = ddp["devices"].index(count), sharded["devices"].index(count)
    times = [sharded[f"seconds_{end}"][other] / ddp[f"seconds_{end}"][place] for end in ("best", "worst")]
    alike = all(abs(each - 1) <= NEAR for each in times)
    longer = "as long" if alike else f"{min(times):.2f} to {max(times):.2f} times as long"
    held = sharded["bytes"][other] / ddp["bytes"][place]
    return f"{name} on {_count(count, 'GPU')}: FSDP2 takes {held:.2f} of DDP's memory, and a step {longer}."


def size_table(sizes: Record) -> str:
    """Parameters, FLOPs and the run of each size."""
    rows = []
    for name, size in sizes.items():
        found, run, counts = size["counted"], size["run"], size["counted"]["parameters"]
        operations = found["flops_per_token"] * size["tokens_of_run"]
        rows.append(
            (
                *(name, f"`{size['config']}.yaml`", f"{counts['total']:,}"),
                *(f"{counts[part] / counts['total']:.0%}" for part in ("layers", "head", "embedding")),
                f"{found['flops_per_token'] / 1e9:.3g}",
                *(f"{run['sequences']} x {run['tokens']:,}", f"{size['tokens_of_run'] / 1e9:.3g}"),
                f"{operations:.2e}",
            )
        )
    titles = ["", "config", "parameters", "layers", "head", "generator", "GFLOP a token", "tokens of a step"]
    return table([*titles, "tokens of the run (10⁹)", "FLOPs of the run"], rows)


def equality_words(sizes: Record) -> str:
    """Whether counts and formulas agree."""
    wrong = [name for name, size in sizes.items() if not size["counted"]["is_equal"]]
    if wrong:
        return f"**Counted parameters or FLOPs of {', '.join(wrong)} differ from the formulas.**"
    apart = [name for name, size in sizes.items() if not size["counted"]["extrapolation_is_equal"]]
    rest = f"; not so for {', '.join(apart)}" if apart else ""
    return (
        f"Parameters and FLOPs counted on the models agree with the formulas of `eval/scaling_model.py` to the last "
        f"digit, for all {len(sizes)} sizes. Traffic and operations of all layers, from models of one and two layers "
        f"and rows, equal those counted at full depth{rest}."
    )


def days_table(sizes: Record, peak: float) -> str:
    """Time of each run by number of GPUs, by DDP and by the strategy that is fastest at worst."""
    rows = []
    for name, size in sizes.items():
        found = {
            count: [
                (plan["seconds_worst"][i], plan["seconds_best"][i], plan["strategy"])
                for plan, i in at_count(size, count)
                if not plan["checkpointing"] and plan["fits"][i]
            ]
            for count in SHOWN
        }

        def cell(count: int, choice: tuple[float, float, str], size: Record = size, names: bool = False) -> str:
            worst, best, strategy = choice
            flops = size["counted"]["flops_per_token"] * size["tokens_of_step"]
            shares = _percent(*(flops / (seconds * count * peak) for seconds in (worst, best)))
            times = f"{_time(best * size['run']['steps'])} to {_time(worst * size['run']['steps'])} ({shares})"
            return f"{named(strategy)}: {times}" if names else times

        ddp = {count: [each for each in plans if each[2] == "ddp"] for count, plans in found.items()}
        rows.append((f"{name}, DDP", *(cell(count, min(each)) if each else "" for count, each in ddp.items())))
        fastest = (cell(count, min(each), names=True) if each else "" for count, each in found.items())
        rows.append((f"{name}, fastest", *fastest))
    return table(["", *(_count(count, "GPU") for count in SHOWN)], rows)


def plan_table(size: Record) -> str:
    """Memory and step time by strategy and number of GPUs."""
    rows, missing = [], {}
    for plan in size["plans"]:
        title = named(plan["strategy"]) + ", checkpointing" * plan["checkpointing"]
        cells = []
        for count in SHOWN:
            if count not in plan["devices"]:
                cells.append("")
                continue
            i = plan["devices"].index(count)
            held = f"{plan['bytes'][i] / 1e9:.1f} GB" + " **too much**" * (not plan["fits"][i])
            if plan["host_bytes"][i]:
                held += f" (host {plan['host_bytes'][i] / 1e9:.2g} GB)"
            best, worst = plan["seconds_best"][i], plan["seconds_worst"][i]
            speed = _tokens(*(size["tokens_of_step"] / seconds for seconds in (worst, best)))
            cells.append(f"{held}; {_seconds(best)} to {_seconds(worst)}; {speed}")
        if any(cells):
            rows.append((title, *cells))
        for why, counts in plan["left_out"].items():
            shown = [count for count in counts if count in SHOWN]
            if shown and not plan["checkpointing"]:
                missing.setdefault((named(plan["strategy"]), why.split(" of a step")[0]), []).extend(shown)
    notes = [f"{strategy}: {why}" for strategy, why in missing if "multiple of" in why and "devices" not in why]
    copies = {count for (_, why), counts in missing.items() if "copies" in why for count in counts}
    if copies:
        least = min(copies)
        notes.append(f"{least} GPUs and more, without tensor parallelism: more than the sequences of a step")
    body = table(["", *(_count(count, "GPU") for count in SHOWN)], rows)
    return body + ("\n\n" + bullets(dict.fromkeys(notes)) if notes else "")


def largest_table(sizes: Record) -> str:
    """The most sequences at one time, with and without checkpointing."""
    strategies = list(dict.fromkeys(name for size in sizes.values() for name in size["largest_rows"]))
    plain = [name for name in strategies if " " not in name]

    def cell(size: Record, strategy: str) -> str:
        found = size["largest_rows"]
        if strategy not in found:
            return ""
        return f"{found[strategy]:,}; {found[f'{strategy} checkpointing']:,}"

    rows = [(name, *(cell(size, strategy) for strategy in plain)) for name, size in sizes.items()]
    return table(["without; with checkpointing", *map(named, plain)], rows)


def memory_words(checks: Record) -> list[str]:
    """How the formulas of memory compare with what was counted."""
    saved, peaks = checks["saved"], checks["peak"]
    equal = sum(point["counted"] == point["formula"] for point in saved)
    errors = [point["error"] for point in peaks]
    models = {point["model"] for point in saved}
    kept = f"{equal} of {len(saved)} equal to the byte" if equal < len(saved) else f"all {equal} equal to the byte"
    return [
        f"What a forward pass keeps for backward, counted by hooks on {len(models)} models in float32, under autocast "
        f"and in bfloat16: {kept}.",
        f"The most that a step takes, counted by PyTorch's memory tracker, with and without checkpointing: "
        f"{len(peaks)} points, errors of {min(errors):+.1%} to {max(errors):+.1%}.",
    ]


def time_words(points: Sequence[Record]) -> str:
    """How many of the measured steps lie within the range."""
    steps = [point for point in points if point["what"] == "whole step"]
    within = sum(point["is_within"] for point in steps)
    shares = [point["at_peaks"] / point["measured"] for point in steps]
    return (
        f"{within} of {len(steps)} whole steps lie between them; at the peaks, a step takes {min(shares):.0%} to "
        f"{max(shares):.0%} of what was measured."
    )


def time_table(points: Sequence[Record]) -> str:
    """Measured and predicted times."""
    rows = [
        (
            *(point["model"], point["what"], f"{point['num_parameters']:,}"),
            *(f"{1e3 * point[name]:.3g}" for name in ("measured", "at_peaks", "best", "worst")),
            _verdict(point),
        )
        for point in points
    ]
    return table(["model", "", "parameters", "measured", "at the peaks", "best", "worst", ""], rows)


def _verdict(point: Record) -> str:
    if point["is_within"]:
        return "within"
    bound = "best" if point["measured"] < point["best"] else "worst"
    return f"{point['measured'] / point[bound] - 1:+.0%} from the {bound} case"


def cpu_words(cpu: Record) -> str:
    """The peaks measured on the CPU."""
    return (
        f"{cpu['float_flops'] / 1e9:.0f} GFLOP/s in float32, {cpu['bytes_per_second'] / 1e9:.0f} GB/s, "
        f"{1e6 * cpu['launch_seconds']:.1f} µs an operation ({cpu['source'].removeprefix('measured: ')})"
    )


def assumptions(record: Record) -> list[str]:
    """What the plans rest on."""
    best, worst, device = record["assumptions"]["best"], record["assumptions"]["worst"], record["device"]

    def ends(name: str, form: Callable[[float], str]) -> str:
        return f"{form(best[name])} (best case) or {form(worst[name])} (worst)"

    def percent(share: float) -> str:
        return f"{share:.0%}"

    def micro(seconds: float) -> str:
        return f"{1e6 * seconds:g} µs"

    return [
        f"Peaks: {device['source']}. These are the makers' numbers, not measurements.",
        f"Matrix products reach {ends('products', percent)} of the peak; narrow models reach less than wide ones, "
        "which this does not know. The share of the peak in the table of days follows and is no assumption.",
        f"All other operations read and write memory at {ends('bandwidth', percent)} of its bandwidth. Their bytes are "
        "counted on the operations that PyTorch dispatches, none fused by a compiler.",
        f"An operation cannot start sooner than {ends('launch_seconds', micro)} after the last; a step is the longer "
        "of launching and computing. With few tokens on a GPU it is launching that counts.",
        f"Collectives are rings that reach {ends('link', percent)} of the links' bandwidth, with a latency of "
        f"{ends('hop_seconds', micro)} times the logarithm of the number of GPUs. In the best case they hide behind "
        "computation as far as it lasts: DDP's and ZeRO-1's behind the last backward pass, the others' behind both. In "
        "the worst case nothing hides.",
        f"{record['assumptions']['usable']:.0%} of a GPU's memory can be used.",
        "DDP and tensor parallelism keep float32 weights under autocast, as transformers' Trainer does; DeepSpeed and "
        "FSDP2 (as accelerate sets it) compute and communicate in bfloat16. DeepSpeed's buckets have their default "
        "sizes; by default, too, ZeRO-3 keeps gathered what is used again before 10⁹ other numbers: all of a model, "
        "but of the largest its head and its last layers alone.",
        "The generator computes in float32, for as many distinct ids as a micro-batch can hold; text repeats ids. Its "
        "kernels keep what they compute on the way in registers.",
        "Where the head's weight is sharded or divided, the loss is computed in chunks that are computed again in "
        "backward (`leviathan/loss_leviathan.py`); elsewhere it is fused.",
        "Tensor parallelism stays within a node, gathers the logits on each GPU and divides the traffic of a layer as "
        "what the layer keeps.",
    ]


def at_count(size: Record, count: int) -> Iterator[tuple[Record, int]]:
    """The plans that have this number of GPUs, and where in their columns it is."""
    for plan in size["plans"]:
        if count in plan["devices"]:
            yield plan, plan["devices"].index(count)


def _time(seconds: float) -> str:
    for unit, length in (("d", DAY), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _tokens(low: float, high: float) -> str:
    unit, size = ("M", 1e6) if high >= 1e6 else ("k", 1e3)
    return f"{low / size:.3g} to {high / size:.3g} {unit}/s"


def _percent(low: float, high: float) -> str:
    return f"{low:.0%}" if f"{low:.0%}" == f"{high:.0%}" else f"{100 * low:.0f} to {high:.0%}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
