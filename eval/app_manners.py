"""What the tabs of the app share: limits on inputs, errors as plain sentences, pictures as arrays."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import gradio as gr
import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from transformers import AutoConfig, PreTrainedModel

import leviathan  # noqa: F401 -- registers the classes that AutoConfig looks up
from eval.figures import STYLE

Model = TypeVar("Model", bound=PreTrainedModel)
DPI = 110
DRAWING = threading.Lock()  # matplotlib is not made for several threads
HEAVY = "heavy"  # what takes seconds waits for one another; what follows a slider does not wait for it


def number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> float:
    """A number from a form, within its limits.

    A form's own limits are those of the page; whoever calls the server without it is held to them here, before
    anything is allocated.

    Raises:
        ValueError: If it is none, not finite, not whole where it has to be, or outside of [low, high].
    """
    wanted = f"expected a {'whole ' if whole else ''}number from {low:g} to {high:g}."
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} = {repr(value)[:40]}; {wanted}")
    if not low <= value <= high or (whole and value != int(value)):
        raise ValueError(f"{name} = {value:g}; {wanted}")
    return int(value) if whole else float(value)


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    """One of some words.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name} = {str(value)[:40]!r}; expected one of {', '.join(options)}.")
    return value


def plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, or generator, for a page: what a user can cause is shown as the sentence that tells of it."""

    @functools.wraps(function)
    def shown(*args: object) -> Any:
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            _show(error)

    @functools.wraps(function)
    def streamed(*args: object) -> Iterator[Any]:
        try:
            yield from function(*args)
        except (ValueError, OSError) as error:
            _show(error)

    return streamed if inspect.isgeneratorfunction(function) else shown


def _show(error: Exception) -> NoReturn:
    raise gr.Error(sentence(str(error)), title="That did not work", print_exception=False) from error


def sentence(text: str) -> str:
    """Text with a capital letter, where it begins with a word, and a full stop."""
    text = text.strip()
    if text.partition(" ")[0].isalpha():
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def live(
    app: gr.Blocks,
    answer: Callable[..., Any],
    triggers: Sequence[gr.Slider],
    inputs: Sequence[gr.Component],
    outputs: Sequence[gr.Component],
) -> None:
    """Answers when the page opens and whenever a trigger moves, without a veil; of many moves the last one counts."""
    events = [app.load, *(each.change for each in triggers)]
    options = {"show_progress": "hidden", "trigger_mode": "always_last", "api_visibility": "private"}
    gr.on(events, plainly(answer), list(inputs), list(outputs), **options)


def on(
    event: Callable[..., Any],
    answer: Callable[..., Any],
    inputs: Sequence[gr.Component],
    outputs: Sequence[gr.Component],
) -> Any:
    """Answers an event, such as ``button.click``, with what takes seconds: one such answer at a time, whoever asked."""
    options = {"concurrency_id": HEAVY, "concurrency_limit": 1, "api_visibility": "private"}
    return event(plainly(answer), list(inputs), list(outputs), **options)


def picture(size: tuple[float, float], draw: Callable[[Figure], None]) -> np.ndarray:
    """What ``draw`` draws on a figure of ``size`` inches, (height, width, 3) uint8."""

    def still(figure: Figure) -> Iterator[Callable[[], None]]:
        draw(figure)
        yield lambda: None

    return next(film(size, still))


def film(size: tuple[float, float], draw: Callable[[Figure], Iterable[Callable[[], None]]]) -> Iterator[np.ndarray]:
    """Frames of one figure, (height, width, 3) uint8 each: ``draw`` fills it and gives what changes it for each."""
    figure = Figure(figsize=size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06), facecolor="white")
    canvas = FigureCanvasAgg(figure)
    changes = iter(draw(figure))
    while True:
        with DRAWING, mpl.rc_context(STYLE):
            change = next(changes, None)
            if change is None:
                return
            change()
            canvas.draw()
            # The first drawing decides the layout: a frame that moved against the last one would flicker.
            figure.set_layout_engine("none")
            frame = np.asarray(canvas.buffer_rgba())[..., :3].copy()
        yield frame


def load_as(kind: type[Model], folder: Path) -> Model:
    """The model in a folder, for use, in the class that it is expected to have.

    Raises:
        ValueError: If there is none, or one of another class.
        OSError: If it cannot be read.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no model at {folder}")
    found, expected = AutoConfig.from_pretrained(folder).model_type, kind.config_class.model_type
    if found != expected:
        raise ValueError(f"the model at {folder} is a {found}; expected a {expected}")
    return kind.from_pretrained(folder).eval()


def missing(what: str, reason: str, remedy: str) -> str:
    """What a tab says in place of its controls where there is no model for it."""
    return f"### No trained {what}\n\n{sentence(reason)}\n\n{remedy}"
