"""The command that continues prompts: its completions against loops by hand, its files, its refusals."""

import io
import json
import sys

import pytest
import torch
from transformers import TextStreamer

from eval import generate
from tests.test_leviathan import tiny
from tests.test_leviathan_generate import by_hand
from tests.test_likelihood import bytes_tokenizer, words_tokenizer

PROMPTS = ["The cat", "A dog, the cat's friend, sat", "日本 day"]
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny(vocab_size=300, embedding_base=18).save_pretrained(path)
    bytes_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def command(folder, monkeypatch):
    """Runs the command on the saved model with prompts on standard input; the completions."""

    def run(*flags, prompts=PROMPTS):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(prompts)))
        flags = ["--model", folder, "--device", "cpu", "--max-new-tokens", NEW, *flags]
        return [record["completion"] for record in generate.run(generate.parse([*map(str, flags)]))]

    return run


def chosen(folder, choose, prompts=PROMPTS):
    """Completions token by token, of one prompt after the other."""
    model, tokenizer = generate.load(folder, "cpu", "auto")
    with torch.no_grad():
        ids = [torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(prompt)]]) for prompt in prompts]
        made = [by_hand(model, each, NEW, choose)[0, each.shape[1] :] for each in ids]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in made]


def test_without_options_every_token_is_the_likeliest(command, folder, capsys):
    expected = chosen(folder, lambda scores, _: scores.argmax(-1))
    assert command() == expected
    shown = "".join(f"{prompt}{completion}\n" for prompt, completion in zip(PROMPTS, expected, strict=True))
    assert capsys.readouterr().out == shown
    for size in (2, 3, 8):
        assert command("--batch-size", size) == expected
        assert capsys.readouterr().out == shown
    assert command("--top-k", 1) == expected


@pytest.mark.parametrize("begins", [False, True])
def test_a_text_begins_with_the_separator(folder, begins):
    """As documents in training, once, also if the tokenizer itself would write it; a bos token before an eos token."""
    model, _ = generate.load(folder, "cpu", "auto")
    tokenizer = bytes_tokenizer(begins)
    plain = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    encoded = generate.encode_prompts(model, tokenizer, [*PROMPTS, ""], NEW)
    assert encoded == [[tokenizer.eos_token_id, *ids] for ids in plain] + [[tokenizer.eos_token_id]]
    assert generate.encode_prompts(model, tokenizer, PROMPTS, NEW, separator=False) == plain
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(7)
    assert generate.encode_prompts(model, tokenizer, PROMPTS, NEW)[0] == [7, *plain[0]]
    tokenizer.bos_token = tokenizer.eos_token = None
    assert generate.encode_prompts(model, tokenizer, PROMPTS, NEW, separator=False) == plain
    with pytest.raises(ValueError, match="neither a bos nor an eos token"):
        generate.encode_prompts(model, tokenizer, PROMPTS, NEW)


def test_the_separator_can_be_left_out(command, folder, tmp_path):
    assert generate.parse(["--model", "m"]).separator
    model, tokenizer = generate.load(folder, "cpu", "auto")
    ids = torch.tensor([tokenizer.encode(PROMPTS[0])])
    with torch.no_grad():
        made = by_hand(model, ids, NEW, lambda scores, _: scores.argmax(-1))[0, ids.shape[1] :]
    bare = command("--no-separator", prompts=PROMPTS[:1])
    assert bare == [tokenizer.decode(made, skip_special_tokens=True)]
    assert bare != command(prompts=PROMPTS[:1])


def test_tokens_are_shown_as_they_come(command, tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    words_tokenizer().save_pretrained(tmp_path)
    pieces, original = [], TextStreamer.on_finalized_text
    monkeypatch.setattr(
        TextStreamer,
        "on_finalized_text",
        lambda self, text, stream_end=False: (pieces.append(text), original(self, text, stream_end)),
    )
    (completion,) = command("--model", tmp_path, prompts=["w3 w4"])
    assert "".join(pieces) == completion
    assert len(completion.split()) > NEW / 2
    assert len([piece for piece in pieces if piece]) > NEW / 2


def test_a_temperature_alone_samples_from_all_ids(command, folder):
    def choose(scores, _):
        return torch.multinomial((scores / 9.0).softmax(-1), 1).squeeze(-1)

    torch.manual_seed(3)
    expected = chosen(folder, choose)
    assert command("--temperature", 9.0, "--seed", 3) == expected
    assert command("--temperature", 9.0, "--seed", 4) != expected
    assert command("--temperature", 9.0, "--top-p", 1e-6) == chosen(folder, lambda scores, _: scores.argmax(-1))


def test_beams_are_those_of_transformers(command, folder):
    model, tokenizer = generate.load(folder, "cpu", "auto")
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(PROMPTS[1])]])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, num_beams=3, do_sample=False, max_new_tokens=NEW, eos_token_id=0)
    expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    for size in (1, 3):
        assert command("--num-beams", 3, "--batch-size", size)[1] == expected


@pytest.mark.parametrize("by_model", [True, False])
def test_a_completion_ends_at_its_end_token(folder, by_model):
    """That of the model, or else of the tokenizer; it is no text, nor is what pads the row while others go on."""
    model, tokenizer = generate.load(folder, "cpu", "auto")
    encoded = generate.encode_prompts(model, tokenizer, PROMPTS, NEW)
    options = {"max_new_tokens": NEW, "do_sample": False}
    whole = [by_hand(model, torch.tensor([ids]), NEW, lambda s, _: s.argmax(-1))[0, len(ids) :] for ids in encoded]
    end = int(whole[0][3])
    if by_model:
        model.generation_config.eos_token_id = [end, 299]
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    completions = list(generate.complete(model, tokenizer, encoded, batch_size=3, **options))
    for row, completion in zip(whole, completions, strict=True):
        stop = row.tolist().index(end) if end in row else NEW
        assert completion == tokenizer.decode(row[:stop], skip_special_tokens=True)
    assert completions[0] != completions[1]


def test_prompts_and_completions_in_files(command, folder, tmp_path):
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("The cat\n\n   \nA dog \n")
    assert generate.read_prompts(lines) == ["The cat", "A dog "]
    texts = ["The cat\nsat", "日本"]
    records.write_text("\n".join(json.dumps({"id": i, "prompt": text}) for i, text in enumerate(texts)))
    assert generate.read_prompts(records) == texts
    out = tmp_path / "new" / "out.jsonl"
    expected = command("--prompts", records, "--out", out)
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert written == [{"prompt": p, "completion": c} for p, c in zip(texts, expected, strict=True)]
    assert "日本" in out.read_text(encoding="utf-8")
    assert list(out.parent.iterdir()) == [out]


def test_weights_in_bfloat16(folder):
    assert generate.load(folder, "cpu", "bfloat16")[0].dtype == torch.bfloat16
    assert generate.load(folder, "cpu", "auto")[0].dtype == torch.float32
    assert not generate.load(folder, "cpu", "auto")[0].training


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt holds no prompt"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.jsonl", "\n", "a.jsonl holds no prompt"),
        ("a.jsonl", '{"prompt": "a"}\nThe cat', "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", '\n{"text": "a"}', 'line 2 holds .*expected an object with a text "prompt"'),
        ("a.jsonl", '{"prompt": 3}', "line 1 holds"),
        ("a.jsonl", '["prompt"]', "line 1 holds"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        generate.read_prompts(tmp_path / name)


def test_bad_input_is_refused_before_anything_is_written(command, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match=r"prompt 2 has 60 tokens, with 8 new ones 68; the model has 64 positions"):
        command("--out", out, prompts=["The cat", "\x7f" * 59])
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        command("--no-separator", "--prompts", _written(tmp_path / "a.jsonl", '{"prompt": ""}'), "--out", out)
    larger = bytes_tokenizer()
    larger.add_tokens(["[one]", "[two]"])
    monkeypatch.setattr(generate.AutoTokenizer, "from_pretrained", lambda path: larger)
    with pytest.raises(ValueError, match="301 ids and the model 300"):
        command("--out", out)
    assert not out.exists()
    assert capsys.readouterr().out == ""


def _written(path, text):
    path.write_text(text)
    return path


def test_folders_without_a_model_or_a_tokenizer_are_refused(folder, tmp_path, monkeypatch):
    for flags, message in (
        (["--model", str(tmp_path / "none")], r"error: .*none holds no model \(no config.json\)"),
        (["--model", str(tmp_path)], "no tokenizer of text"),
        (["--model", str(folder), "--prompts", str(tmp_path / "none")], "No such file"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("The cat"))
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(SystemExit, match=message):
            generate.main(flags)


def test_a_device_without_bfloat16_is_named(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old card")
    with pytest.raises(ValueError, match="Old card has no bfloat16"):
        generate.load(folder, "cuda", "bfloat16")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("--max-new-tokens", 0), ("--num-beams", 0), ("--batch-size", -1), ("--top-k", 0)],
        *[("--top-p", 1.5), ("--top-p", 0), ("--temperature", 0), ("--temperature", "inf"), ("--temperature", "nan")],
    ],
)
def test_options_out_of_range_are_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--model", "model", flag, str(value)])
    assert flag in capsys.readouterr().err.splitlines()[-1]
