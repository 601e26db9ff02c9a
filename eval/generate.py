"""Continues prompts with a trained language model.

    echo "Once upon a time" | python -m eval.generate --model PATH --temperature 0.8 --top-p 0.95
    python -m eval.generate --model PATH --prompts prompts.txt --batch-size 8 --out completions.jsonl

Prompts come one a line from a file or standard input; a .jsonl file holds one {"prompt": "..."} a line, which may have
several lines of text. Without --temperature, --top-k and --top-p every token is the likeliest one. As in training, a
text begins with the token that separates documents.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
    set_seed,
)

import leviathan  # noqa: F401 -- registers the classes that the Auto classes look up
from eval.likelihood import check_vocabulary, max_length
from training.text import separator_id


def read_prompts(path: Path | None) -> list[str]:
    """The prompts of a file, or of standard input if None; lines without text are left out.

    Raises:
        ValueError: If there is none, or a line of a .jsonl file is no object with a "prompt" of text.
        OSError: If the file cannot be read.
    """
    where = "standard input" if path is None else str(path)
    text = sys.stdin.read() if path is None else path.read_text(encoding="utf-8")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if path is not None and path.suffix == ".jsonl":
        prompts = [_prompt_of(line, f"{where}, line {i}") for i, line in lines]
    else:
        prompts = [line for _, line in lines]
    if not prompts:
        raise ValueError(f"{where} holds no prompt; give one a line.")
    return prompts


def _prompt_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON ({error}); give one object a line.") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'{where} holds {line[:80]!r}; expected an object with a text "prompt".')
    return prompt


def encode_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    separator: bool = True,
) -> list[list[int]]:
    """The token ids of each prompt, behind the separator of documents if there is to be one.

    Raises:
        ValueError: If a prompt has no token, or with `max_new_tokens` more than the model has positions, the tokenizer
            has ids that the model does not have, or no separator.
    """
    check_vocabulary(tokenizer, model)
    first = [separator_id(tokenizer)] if separator else []
    encoded = [first + tokenizer.encode(prompt, add_special_tokens=False, verbose=False) for prompt in prompts]
    for i, ids in enumerate(encoded, start=1):
        if not ids:
            raise ValueError(f"prompt {i} has no token; write something to continue.")
        if len(ids) + max_new_tokens > max_length(model):
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens, with {max_new_tokens} new ones {len(ids) + max_new_tokens}; the "
                f"model has {max_length(model)} positions. Shorten the prompt or ask for fewer new tokens."
            )
    return encoded


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    batch_size: int = 1,
    streamer: TextStreamer | None = None,
    **options: Any,
) -> Iterator[str]:
    """Yields the completion of each prompt, without special tokens, up to the model's (or else tokenizer's) end token.

    Shorter prompts of a batch are padded on the left, where attention does not look.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Token ids, as of `encode_prompts`.
        batch_size: Prompts continued at one time.
        streamer: Receives the tokens as they come (batch size 1 alone).
        **options: Of transformers' `generate`.
    """
    end = model.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    ends = set(end) if isinstance(end, list) else {end}
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        inputs = {
            "input_ids": [[padding] * (width - len(ids)) + ids for ids in batch],
            "attention_mask": [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch],
        }
        inputs = {name: torch.tensor(rows, device=model.device) for name, rows in inputs.items()}
        made = model.generate(**inputs, streamer=streamer, eos_token_id=end, pad_token_id=padding, **options)
        for row in made[:, width:].tolist():
            length = next((i for i, token in enumerate(row) if token in ends), len(row))
            yield tokenizer.decode(row[:length], skip_special_tokens=True)


def load(path: Path, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in evaluation mode, and tokenizer of a folder.

    Raises:
        FileNotFoundError: If the folder holds no model, or no tokenizer of text.
        ValueError: If the device does not have `dtype`.
        OSError: If model or tokenizer cannot be read.
    """
    for part, name in (("model", "config.json"), ("tokenizer of text", "tokenizer_config.json")):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"{path} holds no {part} (no {name}); give the folder of a training on text by `training.train`."
            )
    on_gpu = torch.device(device).type == "cuda"
    if dtype == "bfloat16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(f"{torch.cuda.get_device_name(device)} has no bfloat16; take --dtype float32.")
    tokenizer = AutoTokenizer.from_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval(), tokenizer


def run(args: argparse.Namespace) -> list[dict[str, str]]:
    """Does what the command says; returns the prompts with their completions."""
    prompts = read_prompts(args.prompts)
    model, tokenizer = load(args.model, args.device, args.dtype)
    sampling = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    given = {name: value for name, value in sampling.items() if value is not None}
    options = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": bool(given)}
    if given:
        options |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | given  # transformers' own top_k is 50
    streams = args.batch_size == 1 and args.num_beams == 1
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None
    set_seed(args.seed)
    encoded = encode_prompts(model, tokenizer, prompts, args.max_new_tokens, args.separator)
    completions = complete(model, tokenizer, encoded, args.batch_size, streamer, **options)
    records = []
    for prompt in prompts:
        if streams:
            print(prompt, end="", flush=True)
        records.append({"prompt": prompt, "completion": next(completions)})
        if not streams:
            print(prompt + records[-1]["completion"], flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_name(args.out.name + ".partial")
        partial.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
        partial.replace(args.out)
    return records


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a trained model with its tokenizer")
    add("--prompts", type=Path, help="file of prompts, one a line, or .jsonl; default: standard input")
    add("--no-separator", dest="separator", action="store_false", help="begin with the prompt itself")
    add("--max-new-tokens", type=int, default=100, help="default: %(default)s")
    add("--temperature", type=float, help="divides the logits")
    add("--top-k", type=int, help="samples among so many of the likeliest tokens")
    add("--top-p", type=float, help="samples among the likeliest tokens that hold this probability")
    add("--num-beams", type=int, default=1, help="beam search; default: none")
    add("--batch-size", type=int, default=1, help="prompts at one time; one is shown as it comes")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--out", type=Path, help="a .jsonl file for {prompt, completion}")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights; default: as saved")
    args = parser.parse_args(arguments)
    for name in ("max_new_tokens", "num_beams", "batch_size", "top_k"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if args.temperature is not None and not 0 < args.temperature < float("inf"):
        parser.error(f"--temperature {args.temperature}: expected a positive number; leave it out for the likeliest")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p}: expected a probability above 0")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    try:
        run(parse(arguments))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
