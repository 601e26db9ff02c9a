"""The tab that rolls turbulence out: a state in, the next ones out, beside the true flow and its spectrum."""

import base64
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure, FigureBase
from PIL import Image

import leviathan
from eval import metrics
from eval.app_manners import choice, film, load_as, missing, number, on, picture
from eval.figures import DIVERGING, LOOKS
from training.fields import FieldFile, data_record, split_trajectories
from training.turbulence import FlowSettings, initial_vorticity, simulate

SOURCES = ("a new flow, by the solver", "a flow held out from training")
SAMPLINGS = ("expectation", "greedy", "top_p", "sample")
MAX_STEPS = 40
MAX_TOKENS = 2**18  # of a rollout
MAX_SEED = 10_000
FRAMES_PER_SECOND = 4
UNIT = "vorticity ω [1/time]"
REMEDY = (
    "`make demo` makes flows and trains a small model on them, in minutes on two cores. Then start the app again. "
    "What an untrained model rolls out is noise, and is not shown."
)


@dataclass(frozen=True, eq=False)
class Flow:
    """A trained model, and where its flows come from.

    Attributes:
        model: Leviathan.
        tokenizer: That it was trained with.
        training: The record of its training.
        settings: Of the solver that made its training flows; None if they came from elsewhere.
        dt: Time from one state to the next.
        data: The file of these flows, if it lies beside the model.
    """

    model: leviathan.LeviathanForCausalLM
    tokenizer: leviathan.FieldTokenizer
    training: dict[str, Any]
    settings: FlowSettings | None
    dt: float
    data: Path | None

    @property
    def stride(self) -> int:
        """Snapshots of the file from one state to the next."""
        return self.training.get("stride", 1)

    @property
    def sources(self) -> tuple[str, ...]:
        """Which of ``SOURCES`` there are."""
        return tuple(s for s, there in zip(SOURCES, (self.settings, self.data), strict=True) if there is not None)


@dataclass(frozen=True, eq=False)
class Rollout:
    """States from one prior state, (states, X, Y) each; the first is the prior.

    Attributes:
        truth: Of the flow.
        generated: By the model.
        dt: Time from one state to the next.
        seconds: How long the model took.
    """

    truth: np.ndarray
    generated: np.ndarray
    dt: float
    seconds: float


def load(folder: Path) -> Flow:
    """The model of `make demo` in a folder, with its flows.

    Raises:
        ValueError: If there is none.
        OSError: If it cannot be read.
    """
    path = folder / "model"
    model = load_as(leviathan.LeviathanForCausalLM, path)
    record, data = path / "training.json", folder / "data.hdf5"
    training = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    about, settings = training.get("data_record"), None
    if data.is_file():
        with FieldFile(data) as fields:
            about = data_record(fields)
    if about is None:
        raise ValueError(f"the model at {path} has neither flows beside it, {data}, nor a record of how they were made")
    if about["attributes"].get("synthetic"):
        known = {field.name for field in dataclasses.fields(FlowSettings)}
        settings = FlowSettings(**{name: value for name, value in about["attributes"].items() if name in known})
    elif not data.is_file():
        raise ValueError(f"the flows that the model at {path} was trained on were not made here, and {data} is missing")
    tokenizer = leviathan.FieldTokenizer.from_pretrained(path)
    dt = about["dt_save"] * training.get("stride", 1)
    return Flow(model, tokenizer, training, settings, dt, data if data.is_file() else None)


def new_flow(flow: Flow, seed: int, num_steps: int) -> np.ndarray:
    """A flow of the training's kind that the training has not seen, (num_steps + 1, X, Y).

    Its random stream is that behind the last one of the training.

    Raises:
        ValueError: If a number is out of its range, or a rollout of it would be too large.
    """
    settings = flow.settings
    seed = number("the seed", seed, 0, MAX_SEED, whole=True)
    num_steps = _steps(num_steps, MAX_STEPS, (settings.num_grid, settings.num_grid))
    place = settings.num_trajectories
    start = initial_vorticity(settings.num_grid, [place], seed=seed, k_tot=settings.k_tot)
    count = num_steps * flow.stride + 1
    with torch.no_grad():
        states = simulate(settings.solver(), start, settings.dt_save, count, settings.warm_up_time)
        return np.stack([state[0].numpy() for i, state in enumerate(states) if i % flow.stride == 0])


def held_out(flow: Flow, which: int, start: int, num_steps: int) -> np.ndarray:
    """States of the which-th flow of the test split from a snapshot on, (num_steps + 1, X, Y).

    Raises:
        ValueError: If there is no such flow or there are not so many states.
    """
    with FieldFile(flow.data) as fields:
        split = flow.training.get("split", {})
        options = {key: tuple(value) if key == "fractions" else value for key, value in split.items()}
        trajectories = split_trajectories(fields.num_trajectories, **options).test
        which = number("the held-out flow", which, 0, len(trajectories) - 1, whole=True)
        start = number("the first snapshot", start, 0, fields.num_snapshots - 1 - flow.stride, whole=True)
        most = (fields.num_snapshots - 1 - start) // flow.stride
        num_steps = _steps(num_steps, min(MAX_STEPS, most), fields.grid)
        chosen = range(start, start + num_steps * flow.stride + 1, flow.stride)
        return fields.vorticity(int(trajectories[which]), chosen)


def _steps(num_steps: object, most: int, grid: tuple[int, int]) -> int:
    num_steps = number("the number of steps", num_steps, 1, most, whole=True)
    tokens = num_steps * grid[0] * grid[1]
    if tokens > MAX_TOKENS:
        allowed = MAX_TOKENS // (grid[0] * grid[1])
        raise ValueError(
            f"{num_steps} steps of {grid[0]} x {grid[1]} pixels are {tokens:,} tokens; ask for at most {allowed} steps."
        )
    return num_steps


def roll_out(flow: Flow, truth: np.ndarray, sampling: str, temperature: float, top_p: float, seed: int) -> Rollout:
    """What `leviathan.rollout` makes of the first of the true states, beside them.

    Raises:
        ValueError: If an option is out of its range, or the state is none that the model takes.
    """
    sampling = choice("the sampling", sampling, SAMPLINGS)
    temperature = number("the temperature", temperature, 0.05, 5.0)
    top_p = number("top-p", top_p, 0.01, 1.0)
    seed = number("the seed of the sampling", seed, 0, MAX_SEED, whole=True)
    begin = time.perf_counter()
    fields = leviathan.rollout(
        flow.model,
        flow.tokenizer,
        truth[:1],
        num_steps=len(truth) - 1,
        sampling=sampling,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    seconds = time.perf_counter() - begin
    return Rollout(truth, np.concatenate([truth[:1], fields[0].numpy()]), flow.dt, seconds)


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_film(figure: Figure, made: Rollout) -> Iterator[Callable[[], None]]:
    """True and generated state side by side and their spectra: a frame for each state."""
    states = {"truth": made.truth, "Leviathan": made.generated}
    spectra = {name: metrics.energy_spectrum(each) for name, each in states.items()}
    left, right = figure.subfigures(1, 2, width_ratios=(2, 1.05))
    axes = left.subplots(1, 2)
    images = [_show(ax, each[0], _limit(made)) for ax, each in zip(axes, states.values(), strict=True)]
    left.colorbar(images[0], ax=axes, label=UNIT, location="bottom", shrink=0.6, aspect=40, extend="both")
    for ax, name in zip(axes, states, strict=True):
        ax.set(title=name, xlabel="x")
    axes[0].set_ylabel("y")
    ax = right.subplots()
    k = np.arange(1, spectra["truth"].shape[-1] + 1)
    looks = {"truth": LOOKS["truth"], "Leviathan": LOOKS["expectation"]}
    lines = [ax.loglog(k, each[0], **looks[name], label=name)[0] for name, each in spectra.items()]
    top = max(each.max() for each in spectra.values())
    ax.set(ylim=(1e-7 * top, 3 * top), xlabel="wavenumber k [waves per side]", ylabel="energy E(k) [length²/time²]")
    ax.legend(loc="lower left")
    title = left.suptitle("")

    def change(i: int) -> None:
        for image, each in zip(images, states.values(), strict=True):
            image.set_data(each[i].T)
        for line, each in zip(lines, spectra.values(), strict=True):
            line.set_ydata(each[i])
        title.set_text(f"state {i} of {len(made.truth) - 1}, t = {i * made.dt:.3f}")

    for i in range(len(made.truth)):
        yield lambda i=i: change(i)


def draw_sheet(figure: FigureBase, made: Rollout) -> None:
    """The same states at rest: rows for truth and Leviathan, columns for times."""
    count = len(made.truth) - 1
    shown = sorted({0, 1, *(round(share * count) for share in (0.25, 0.5, 0.75, 1.0))})
    axes = figure.subplots(2, len(shown), squeeze=False)
    for line, name, each in zip(axes, ("truth", "Leviathan"), (made.truth, made.generated), strict=True):
        for ax, i in zip(line, shown, strict=True):
            image = _show(ax, each[i], _limit(made))
        line[0].set_ylabel(name)
    for ax, i in zip(axes[0], shown, strict=True):
        ax.set_title(f"t = {i * made.dt:.3f}" if i else "prior state")
    figure.colorbar(image, ax=axes, label=UNIT, shrink=0.8, extend="both")


def _show(ax, field: np.ndarray, limit: float):  # noqa: ANN001, ANN202
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(True)
    return ax.imshow(field.T, origin="lower", cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")


def _limit(made: Rollout) -> float:
    return float(np.quantile(np.abs(made.truth), 0.999))


def animation(made: Rollout) -> str:
    """The film of a rollout as an HTML image that holds its own data: no file is written, none has to be served."""
    frames = [Image.fromarray(frame) for frame in film((11.5, 4.3), lambda figure: draw_film(figure, made))]
    content = io.BytesIO()
    options = {"duration": 1000 // FRAMES_PER_SECOND, "loop": 0, "quality": 80, "method": 2}
    frames[0].save(content, "WEBP", save_all=True, append_images=frames[1:], **options)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="True and generated vorticity" style="width: 100%" src="data:image/webp;base64,{data}">'


def words(made: Rollout) -> str:
    """What the rollout reached, in words."""
    last = len(made.truth) - 1
    moved = np.repeat(made.truth[:1], last + 1, 0)

    def of(measure: Callable[..., np.ndarray], states: np.ndarray, i: int) -> float:
        return float(measure(states[i], made.truth[i]))

    rows = [
        f"| {i} | {of(metrics.nrmse, made.generated, i):.2f} | {of(metrics.nrmse, moved, i):.2f} | "
        f"{of(metrics.correlation, made.generated, i):.2f} | {of(metrics.enstrophy_error, made.generated, i):.3f} |"
        for i in sorted({1, max(1, last // 4), max(1, last // 2), last})
    ]
    head = "| state | nRMSE | nRMSE of standing still | correlation | enstrophy error |\n|--:|--:|--:|--:|--:|"
    return f"{last} states in {made.seconds:.1f} s.\n\n" + "\n".join([head, *rows])


# ----------------------------------------------------------------------------------------------------------------- tab


def tab(folder: Path) -> None:
    """Fills a tab of the app."""
    try:
        flow = load(folder)
    except (ValueError, OSError) as error:
        gr.Markdown(missing("turbulence model", str(error), REMEDY))
        return
    numbers = sum(each.numel() for each in flow.model.parameters())
    trained = f", trained for {flow.training['steps']:,} steps" if "steps" in flow.training else ""
    gr.Markdown(
        f"**Leviathan** reads one state of a two-dimensional flow as tokens and writes the next, and from that the one "
        f"after: a free rollout of {numbers:,} parameters{trained}. The true flow stands beside it."
    )
    with gr.Row():
        source = gr.Dropdown(list(flow.sources), value=flow.sources[0], label="prior state from")
        which = gr.Number(0, label="its seed or number", precision=0, minimum=0, maximum=MAX_SEED)
        start = gr.Number(0, label="first snapshot, if held out", precision=0, minimum=0)
        steps = gr.Slider(1, MAX_STEPS, value=12, step=1, label="states to generate", elem_id="steps")
    with gr.Row():
        sampling = gr.Dropdown(list(SAMPLINGS), value=SAMPLINGS[0], label="sampling")
        temperature = gr.Slider(0.1, 2.0, value=1.0, step=0.05, label="temperature")
        top_p = gr.Slider(0.05, 1.0, value=0.9, step=0.05, label="top-p")
        seed = gr.Number(0, label="seed of the sampling", precision=0, minimum=0, maximum=MAX_SEED)
        button = gr.Button("Roll out", variant="primary", elem_id="turbulence-go")
    shown = gr.HTML(elem_id="turbulence-film")
    text = gr.Markdown(elem_id="turbulence-text")
    sheet = gr.Image(show_label=False, format="png", interactive=False, elem_id="turbulence-sheet", buttons=[])

    def answer(
        source: str,
        which: float,
        start: float,
        steps: float,
        sampling: str,
        temperature: float,
        top_p: float,
        seed: float,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008 -- how gradio is asked for it
    ) -> tuple[str, str, np.ndarray]:
        source = choice("the source", source, flow.sources)
        truth = new_flow(flow, which, steps) if source == SOURCES[0] else held_out(flow, which, start, steps)
        made = roll_out(flow, truth, sampling, temperature, top_p, seed)
        return animation(made), words(made), picture((11.0, 3.5), lambda figure: draw_sheet(figure, made))

    on(button.click, answer, [source, which, start, steps, sampling, temperature, top_p, seed], [shown, text, sheet])
