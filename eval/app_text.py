"""The tab that continues a text, token by token as the model writes it."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import Empty

import gradio as gr
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from eval.app_manners import missing, number, on
from eval.generate import complete, encode_prompts, load
from eval.likelihood import max_length

MAX_PROMPT = 2000  # characters
MAX_NEW_TOKENS = 200
TEMPERATURES = (0.0, 2.0)
LONGEST_WAIT = 60.0  # seconds for one token
REMEDY = (
    "`make text TEXT=folder` makes a tokenizer and trains a small model on any folder of documents, in minutes on two "
    "cores. Then start the app again."
)


@dataclass(frozen=True, eq=False)
class Writer:
    """A language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class _Stop(StoppingCriteria):
    """Ends a generation from outside."""

    def __init__(self, *asked: threading.Event):
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), any(each.is_set() for each in self.asked), device=input_ids.device)


def write(
    writer: Writer,
    prompt: str,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int = 0,
    stop: threading.Event | None = None,
) -> Iterator[str]:
    """Yields the text so far, the prompt included, whenever the model has written more of it.

    Temperature 0 takes the likeliest token each time. Who stops reading, or sets ``stop``, stops the model.

    Raises:
        ValueError: If the prompt is empty or too long, or a number is out of its range.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("the prompt is empty; write something to continue.")
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"the prompt has {len(prompt):,} characters; expected at most {MAX_PROMPT:,}.")
    temperature = number("the temperature", temperature, *TEMPERATURES)
    top_p = number("top-p", top_p, 0.01, 1.0)
    count = number("the number of new tokens", max_new_tokens, 1, MAX_NEW_TOKENS, whole=True)
    seed = number("the seed", seed, 0, 2**31 - 1, whole=True)
    ids = encode_prompts(writer.model, writer.tokenizer, [prompt], count)
    sampling = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    streamer = TextIteratorStreamer(writer.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=LONGEST_WAIT)
    closed, failures = threading.Event(), []

    def run() -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                options = sampling | {
                    "max_new_tokens": count,
                    "stopping_criteria": StoppingCriteriaList([_Stop(closed, stop or closed)]),
                }
                list(complete(writer.model, writer.tokenizer, ids, streamer=streamer, **options))
        except Exception as error:  # raised where it is read, not lost in a thread
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    text = prompt
    try:
        yield text
        for piece in streamer:
            if piece:
                text += piece
                yield text
    except Empty as error:
        raise ValueError(f"the model has not written a token for {LONGEST_WAIT:g} s; try again.") from error
    finally:
        closed.set()
        thread.join()
    if failures:
        raise failures[0]


def tab(folder: Path) -> None:
    """Fills a tab of the app."""
    try:
        writer = Writer(*load(folder, "cpu", "auto"))
    except (ValueError, OSError) as error:
        gr.Markdown(missing("language model", str(error), REMEDY))
        return
    longest = min(MAX_NEW_TOKENS, max_length(writer.model) - 1)
    numbers = sum(each.numel() for each in writer.model.parameters())
    gr.Markdown(
        f"**Leviathan** continues your text. This one has {numbers:,} parameters and room for "
        f"{max_length(writer.model)} tokens: it shows the way, not the quality."
    )
    with gr.Row():
        with gr.Column(scale=1):
            prompt = gr.Textbox("Once upon a time", label="prompt", lines=3, max_length=MAX_PROMPT, elem_id="prompt")
            temperature = gr.Slider(*TEMPERATURES, value=0.8, step=0.05, label="temperature (0: the likeliest token)")
            top_p = gr.Slider(0.05, 1.0, value=0.95, step=0.05, label="top-p: share of probability kept")
            count = gr.Slider(1, longest, value=min(80, longest), step=1, label="new tokens")
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31 - 1)
            with gr.Row():
                button = gr.Button("Write", variant="primary", elem_id="text-go")
                halt = gr.Button("Stop")
        with gr.Column(scale=2):
            text = gr.Textbox(label="text", lines=20, interactive=False, elem_id="text")
            status = gr.Markdown(elem_id="text-status")

    # By session. Gradio's own cancelling would leave "Error" on the text and "Writing ..." below it.
    stops: dict[str | None, threading.Event] = {}

    def answer(
        prompt: str, temperature: float, top_p: float, count: float, seed: float, request: gr.Request
    ) -> Iterator[tuple[str, str]]:
        begin, session = time.perf_counter(), request.session_hash
        stop = stops[session] = threading.Event()
        try:
            for written in write(writer, prompt, temperature, top_p, count, seed, stop):
                yield written, "Writing ..."
            done = "Stopped after" if stop.is_set() else "Written in"
            yield written, f"{done} {time.perf_counter() - begin:.1f} s."
        finally:
            stops.pop(session, None)

    def halted(request: gr.Request) -> None:
        if (stop := stops.get(request.session_hash)) is not None:
            stop.set()

    on(button.click, answer, [prompt, temperature, top_p, count, seed], [text, status])
    halt.click(halted, api_visibility="private", queue=False)
