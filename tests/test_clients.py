"""What other libraries do with a Leviathan: adapters, fine-tuning, a pipeline, a server, a harness."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from eval import serve
from leviathan import LeviathanForCausalLM
from tests.test_leviathan import KINDS, PREFIX, tiny, tokens
from tests.test_likelihood import END, TEXT, bytes_tokenizer

pytestmark = pytest.mark.clients
ROOT = Path(__file__).parent.parent
BYTES = {"vocab_size": 300, "embedding_base": 18}
PROMPTS = ["The cat sat", "A dog, the cat's friend, sat there", "They"]
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]},
}


def train(model):
    """Losses before each of four steps on what ``model`` has left to train."""
    ids = tokens(4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, prefix_length=PREFIX, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@torch.no_grad()
def logits(model, prefix=PREFIX):
    return model.eval()(input_ids=tokens(2), prefix_length=prefix).logits


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [("separable", name) for name in ADAPTERS] + [("separable-tied", "all-linear"), ("digits", "all-linear")],
)
def test_an_adapter_is_trained_saved_loaded_and_merged(tmp_path, kind, adapter):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    tiny(**KINDS[kind]).save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    untrained = logits(model)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, **ADAPTERS[adapter]))
    torch.testing.assert_close(logits(adapted), untrained, rtol=0, atol=1e-5)  # an adapter starts as nothing
    losses = train(adapted.train())
    assert losses[-1] < losses[0]
    expected = logits(adapted)
    assert (expected - untrained).abs().max() > 0.1

    adapted.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*"))  # it names the model and does not hold it
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded.get_base_model(), LeviathanForCausalLM)
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), untrained, rtol=0, atol=1e-5)

    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, before[name])}
    assert all("proj" in name or (adapter == "embedding" and "embed_tokens" in name) for name in changed)
    assert any("embed_tokens" in name for name in changed) == (adapter == "embedding")
    if kind == "digits":
        return
    merged.save_pretrained(tmp_path / "llama", bake=True)  # adapter and embedding in the weights of a LLaMA
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert isinstance(llama, LlamaForCausalLM)
    with torch.no_grad():
        causal = llama(tokens(2)).logits
    torch.testing.assert_close(causal, logits(merged, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_trl_fine_tunes_it(tmp_path, with_adapter):
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=6,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        logging_steps=1,
        max_length=32,
        save_steps=3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        tiny(**BYTES).train(),
        settings,
        train_dataset=Dataset.from_dict({"text": [TEXT[i:] for i in range(0, 60, 5)]}),
        processing_class=bytes_tokenizer(),
        peft_config=LoraConfig(r=8, lora_alpha=64, target_modules="all-linear") if with_adapter else None,
    )
    assert trainer.args.gradient_checkpointing  # trl's default
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < 0.9 * losses[0]
    expected = logits(trainer.model)
    assert (expected - logits(tiny(**BYTES))).abs().max() > 0.1
    trainer.save_model(str(tmp_path / "last"))
    for folder in ("checkpoint-6", "last"):
        if with_adapter:
            saved = PeftModel.from_pretrained(tiny(**BYTES), tmp_path / folder)
        else:
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(logits(saved), expected, rtol=0, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    """A folder with a model and its tokenizer."""
    tiny(**BYTES).save_pretrained(tmp_path / "model")
    tokenizer = bytes_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = END, "left"
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def continuation(folder, prompt, num_tokens):
    """What `generate` goes on with greedily, for one prompt alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(
        given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=num_tokens, do_sample=False
    )
    return tokenizer.decode(ids[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_pipeline_of_padded_prompts_goes_on_as_each_alone(saved):
    write = pipeline("text-generation", str(saved), device="cpu")
    assert isinstance(write.model, LeviathanForCausalLM)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = [continuation(saved, prompt, 8) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    for batch_size in (1, 3):
        found = write(PROMPTS, batch_size=batch_size, **options)
        assert [answer["generated_text"] for (answer,) in found] == expected


def answer(url, **body):
    """The JSON that a server gives; with a body, to a POST of it."""
    data, headers = (json.dumps(body).encode(), {"Content-Type": "application/json"}) if body else (None, {})
    with DIRECTLY.open(urllib.request.Request(url, data, headers), timeout=60) as response:
        return json.load(response)


def test_the_server_answers_with_what_generate_writes(saved, tmp_path):
    pytest.importorskip("openai", reason="transformers' server needs openai's types")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "eval.serve", str(saved), *flags], cwd=ROOT, stdout=log, stderr=log
        )
    url = f"http://127.0.0.1:{port}"
    try:
        while server.poll() is None:
            try:
                answer(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        assert server.poll() is None, (tmp_path / "log").read_text()
        options = {"model": str(saved), "temperature": 0, "max_tokens": 8}
        for prompt in PROMPTS:
            completed = answer(f"{url}/v1/completions", prompt=prompt, **options)
            assert completed["choices"][0]["text"] == continuation(saved, prompt, 8)
        said = answer(f"{url}/v1/chat/completions", messages=[{"role": "user", "content": PROMPTS[0]}], **options)
        assert said["choices"][0]["message"]["content"] == continuation(saved, PROMPTS[0], 8)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM)
        assert "Application shutdown complete" in (tmp_path / "log").read_text()
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def test_without_the_servers_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="fastapi, openai, uvicorn is not installed; install the extra clients"):
        serve.main()


def test_the_harness_reads_what_generate_writes(saved, tmp_path):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    whole = [continuation(saved, prompt, 12) for prompt in PROMPTS]
    stop = whole[0][len(whole[0]) // 2]
    expected = [text.split(stop)[0] for text in whole]
    assert 0 < len(expected[0]) < len(whole[0])
    rows = [{"prompt": prompt, "answer": text} for prompt, text in zip(PROMPTS, expected, strict=True)]
    rows[1]["answer"] += "not this"
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "tasks" / "tiny_writing.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_writing",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [stop], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    data.with_suffix(".yaml").write_text(yaml.safe_dump(task))
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=str(saved), device="cpu", batch_size=2),
        tasks=["tiny_writing"],
        task_manager=TaskManager(include_path=str(data.parent), include_defaults=False),
        bootstrap_iters=0,
    )
    written = {sample["doc_id"]: sample["resps"][0][0] for sample in results["samples"]["tiny_writing"]}
    assert [written[i] for i in range(3)] == expected
    assert results["results"]["tiny_writing"]["exact_match,none"] == pytest.approx(2 / 3)
