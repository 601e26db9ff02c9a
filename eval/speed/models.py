"""Speed of whole models: steps of training with one part against another, and the decoding of a state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import training
from eval.speed.measure import (
    Check,
    Figure,
    Section,
    Setup,
    Target,
    Work,
    alternate,
    difference,
    measured_ceilings,
    median_of,
    peak_mebibytes,
    precision_of,
)
from eval.speed.tokens import field_pairs, frequent_ids
from leviathan import LeviathanConfig, LeviathanForCausalLM
from leviathan.decoding_leviathan import Decoder, Sampler
from leviathan.loss_leviathan import chunked_loss, fused_cross_entropy
from sna_core import DigitHead
from training.settings import read_settings
from training.train import allowed_keys

TINY_MODEL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "embedding_seed_dim": 8,
    "embedding_num_heads": 2,
    "embedding_rank": 4,
}
CONFIGS = Path(training.__file__).parent / "configs"


def model_of(setup: Setup, **config: Any) -> LeviathanForCausalLM:
    """A model with random weights on the device; with `short`, tiny whatever the config says."""
    torch.manual_seed(0)
    config |= TINY_MODEL if setup.short else {}
    return LeviathanForCausalLM(LeviathanConfig(**config)).to(setup.device)


@torch.no_grad()
def spread_embeddings(model: LeviathanForCausalLM) -> LeviathanForCausalLM:
    """Gives every id an embedding of its own: at first generated ones are nearly alike, and greedy decoding repeats."""
    embedding = model.get_input_embeddings()
    embedding.splines.normal_()  # factors of both signs: a product without a mean
    embedding.norm_weight.fill_(3.0)
    embedding.out_weight.div_(embedding.weight.std(0).mean())
    return model


def model_section(name: str) -> dict[str, Any]:
    """The model that a training config describes."""
    return read_settings(CONFIGS / f"{name}.yaml", [], allowed_keys())["model"]


def fields_model(setup: Setup) -> dict[str, Any]:
    """A model of fields: the demo's on a CPU; on a GPU that of turbulence_64, cut to some 60 million parameters."""
    demo = model_section("turbulence_tiny_cpu")
    return setup.pick(short=demo, cpu=demo, cuda=model_section("turbulence_64") | {"num_hidden_layers": 9})


def step_of(setup: Setup, model: LeviathanForCausalLM, batch: dict[str, Any]) -> Callable[[], Tensor]:
    """A step of training: forward, backward and AdamW, in mixed precision where the setup says so."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with setup.autocast():
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def num_parameters(*modules: nn.Module) -> int:
    """All their parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def inference_models(setup: Setup) -> tuple[dict[str, LeviathanForCausalLM], Tensor, Tensor]:
    """One model twice, with a baked embedding and with its table; a batch (rows, tokens) and one of a token a row."""
    vocab_size, shape = setup.pick(short=(256, (2, 16)), cpu=(65_536, (4, 256)), cuda=(65_536, (16, 1024)))
    baked, plain = (
        model_of(setup, embedding_type=kind, **fields_model(setup) | {"vocab_size": vocab_size}).eval()
        for kind in ("separable", "lookup")
    )
    # Two in the same memory: where things lie would make more of a difference than what is compared.
    table = baked.get_input_embeddings().bake().weight
    plain.set_input_embeddings(nn.Embedding.from_pretrained(table))
    plain.lm_head, plain.model.layers, plain.model.norm = baked.lm_head, baked.model.layers, baked.model.norm
    ids = torch.randint(vocab_size, shape, device=setup.device)
    return {"baked": baked, "nn.Embedding": plain}, ids, ids[:, :1].contiguous()


def training_step(setup: Setup) -> Section:
    """What a generated embedding costs a step of training, against a table on the same backbone."""
    config = setup.pick(
        short={"vocab_size": 512, "output_head": "digits"},
        cpu={
            "vocab_size": 65_536,
            "hidden_size": 256,
            "intermediate_size": 704,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "output_head": "digits",  # a dense one would drown the difference
        },
        # 200 million parameters: the paper gives no layer table, and its head is a dense untied one
        cuda={
            "vocab_size": 200_376,
            "hidden_size": 640,
            "intermediate_size": 1728,
            "num_hidden_layers": 14,
            "num_attention_heads": 10,
            "max_position_embeddings": 2048,
            "loss_chunk_size": 4096,
        },
    )
    rows, length = setup.pick(short=(1, 32), cpu=(1, 1024), cuda=(16, 2048))
    ids = frequent_ids(config["vocab_size"], rows, length).to(setup.device)
    batch = {"input_ids": ids, "labels": ids}
    separable = model_of(setup, embedding_type="separable", **config)
    step = step_of(setup, separable, batch)
    figures, notes = [], ["ids drawn by Zipf's law, which gives more distinct ones than text does"]
    if setup.device.type == "cuda":
        figures.append(_generator_memory(setup, separable, ids, step))
    else:
        notes.append("the generator's share of the memory is measured on CUDA only")
    lookup = model_of(setup, embedding_type="lookup", **config)
    samples = alternate(setup, {"separable": step, "lookup": step_of(setup, lookup, batch)})
    # Measured before the table's model was there, and told after the time.
    cost = Figure(
        "training step over that with nn.Embedding",
        samples,
        ("separable", "lookup"),
        target=Target("a step costs <= 1.03 times that with nn.Embedding (H200)", at_most=1.03, on="cuda"),
    )
    embedding = separable.get_input_embeddings()
    return Section(
        "a step of a LeviathanForCausalLM with a separable embedding against one with nn.Embedding",
        config | {"batch": [rows, length], "dtype": precision_of(setup.dtype)},
        [cost, *figures],
        numbers={
            "parameters": {"separable": num_parameters(separable), "lookup": num_parameters(lookup)},
            "embedding_parameters": {
                "separable": num_parameters(embedding),
                "lookup": num_parameters(lookup.get_input_embeddings()),
            },
            "distinct_ids": ids.unique().numel(),
            "tokens_per_second": {name: ids.numel() / median_of(samples, name) for name in samples},
        },
        notes=notes,
    )


def _generator_memory(setup: Setup, model: LeviathanForCausalLM, ids: Tensor, step: Callable[[], Tensor]) -> Figure:
    """What generating the embeddings adds to the memory, forward and backward, beside all that a step takes."""
    embedding = model.get_input_embeddings()

    def generate(setup: Setup) -> Callable[[], Any]:
        gradient = torch.randn(*ids.shape, embedding.embedding_dim, device=setup.device)
        return lambda: torch.autograd.grad(embedding(ids), list(embedding.parameters()), gradient)

    step()  # the optimizer's states
    held = torch.cuda.memory_allocated(setup.device) / 2**20  # the model's weights, gradients and states
    memory = {
        "generator": [peak_mebibytes(setup, generate, (), ())],
        "step": [held + peak_mebibytes(setup, lambda _: step, (), ())],
    }
    return Figure(
        "generator's peak memory over the step's",
        memory,
        ("generator", "step"),
        unit="mebibytes",
        target=Target("generator peak memory <= 5 % of the step's (H200)", at_most=0.05, on="cuda"),
    )


def head(setup: Setup) -> Section:
    """A head of digits against a dense one over 65,536 levels: a step of training, and the head alone."""
    vocab_size, patch, grid, rows = setup.pick(
        short=(256, 4, 16, 1), cpu=(65_536, 16, 64, 8), cuda=(65_536, 64, 256, 4)
    )
    ids = field_pairs(rows, patch, grid, (vocab_size - 1).bit_length()).to(setup.device)
    prefix = patch**2
    labels = ids.clone()
    labels[:, :prefix] = -100
    batch = {"input_ids": ids, "prefix_length": prefix, "labels": labels}
    chunk_size = model_section("turbulence_64")["loss_chunk_size"]
    config = model_section("turbulence_tiny_cpu") | {"vocab_size": vocab_size, "loss_chunk_size": chunk_size}
    models = {kind: model_of(setup, **config | {"output_head": kind}) for kind in ("digits", "dense")}
    steps = alternate(setup, {kind: step_of(setup, model, batch) for kind, model in models.items()})

    hidden_size = models["dense"].config.hidden_size
    hidden = torch.randn(rows * prefix, hidden_size, device=setup.device, requires_grad=True)

    def alone(model: LeviathanForCausalLM) -> Callable[[], Any]:
        head, target, size = model.lm_head, ids[:, prefix:].flatten(), model.config.loss_chunk_size
        inputs = [hidden, *head.parameters()]

        def run() -> tuple[Tensor, ...]:
            with setup.autocast():
                if isinstance(head, DigitHead):
                    loss = chunked_loss(lambda some, its: -head.log_prob(some, its).sum(), hidden, target, size)
                else:
                    loss = fused_cross_entropy(hidden, head.weight, target, size)
            return torch.autograd.grad(loss, inputs)

        return run

    heads = alternate(setup, {kind: alone(model) for kind, model in models.items()})
    target = Target("training step at 65,536 levels >= 3 times faster on CPU at hidden size 128", at_least=3, on="cpu")
    tokens = rows * prefix
    digit_head: DigitHead = models["digits"].lm_head
    base, later, rank = digit_head.base, digit_head.num_digits - 1, digit_head.rank
    products = {
        "digits": base * hidden_size + later * rank * (hidden_size + base),
        "dense": vocab_size * hidden_size,
    }
    precisions = {"digits": "float32", "dense": precision_of(setup.dtype)}  # the digits' head leaves autocast
    return Section(
        'LeviathanForCausalLM with output_head="digits" against "dense"',
        models["dense"].config.to_diff_dict()
        | {"batch": list(ids.shape), "prefix_length": prefix, "dtype": precision_of(setup.dtype)},
        [
            Figure("training step", steps, ("dense", "digits"), target=target),
            Figure("head and loss alone, forward + backward", heads, ("dense", "digits")),
        ],
        work=[
            Work(
                f"{kind} head, forward + backward",
                median_of(heads, kind),
                6 * tokens * products[kind],
                4 * (3 * num_parameters(model.lm_head) + 4 * tokens * hidden_size),
                precisions[kind],
            )
            for kind, model in models.items()
        ],
        numbers={"parameters": {kind: num_parameters(model) for kind, model in models.items()}},
    )


def rollout(setup: Setup) -> Section:
    """Decoding of the next state of all patches of a field, against transformers' own `generate`."""
    vocab_size, rows, length, compared = setup.pick(
        short=(256, 2, 16, 16), cpu=(65_536, 16, 256, 32), cuda=(65_536, 64, 4096, 32)
    )
    config = fields_model(setup) | {"vocab_size": vocab_size, "max_position_embeddings": 2 * length}
    model = spread_embeddings(model_of(setup, **config)).to(setup.dtype).eval()
    model.get_input_embeddings().bake()
    prefix = torch.randint(vocab_size, (rows, length), device=setup.device)
    sampler = Sampler(model.output_head(), model.config.vocab_size, "greedy")
    with torch.no_grad():
        return _measure_rollout(setup, model, Decoder(model, sampler, length), prefix, min(length, compared))


def _measure_rollout(
    setup: Setup, model: LeviathanForCausalLM, decoder: Decoder, prefix: Tensor, compared: int
) -> Section:
    rows, length = prefix.shape
    name = "by_graphs" if setup.device.type == "cuda" else "one_by_one"
    decode = getattr(decoder, name)
    runs = {name: lambda: decode(prefix), "generate": lambda: generated(model, prefix, length).sequences[:, length:]}
    tokens = {each: run() for each, run in runs.items()}  # which also warms up
    repeats = min(setup.repeats, setup.pick(short=1, cpu=3, cuda=2))
    samples = alternate(setup, runs, repeats=repeats, warm_up={})
    agree = float((tokens["generate"] == tokens[name]).double().mean())
    checks = [
        Check("share of tokens that differ", 1 - agree, 0.0),
        Check(
            f"logits of the first {compared} tokens, over the largest", logits_difference(model, prefix, compared), 1e-2
        ),
    ]
    figures = [
        Figure(
            f"a state of {rows} patches of {length} tokens",
            samples,
            ("generate", name),
            target=Target(">= 5 times transformers' generate with dynamic cache (H200)", at_least=5, on="cuda"),
        )
    ]
    numbers = {
        "parameters": num_parameters(model),
        "tokens_per_second": {each: rows * length / median_of(samples, each) for each in samples},
        "equal_tokens": agree,
        "distinct_tokens": tokens[name].unique().numel(),
    }
    work = decoding_work(setup, model, prefix, median_of(samples, name))
    numbers["share_of_bandwidth"] = work.bytes / measured_ceilings(setup).bytes_per_second / work.seconds
    blocks = _measure_blocks(setup, model, decoder, prefix)
    return Section(
        f"Decoder.{name} against transformers' generate with dynamic cache; greedy, random weights, baked embedding",
        model.config.to_diff_dict() | {"rows": rows, "tokens": length, "dtype": precision_of(setup.dtype)},
        figures + blocks.figures,
        checks + blocks.checks,
        [work],
        numbers | blocks.numbers,
        blocks.notes,
    )


def generated(model: LeviathanForCausalLM, prefix: Tensor, tokens: int, **options: Any) -> Any:
    """Greedy generation by transformers, with its dynamic cache."""
    return model.generate(
        prefix,
        attention_mask=torch.ones_like(prefix),
        prefix_length=prefix.shape[1],
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )


def logits_difference(model: LeviathanForCausalLM, prefix: Tensor, tokens: int) -> float:
    """The largest difference of logits between the decoder and `generate` over the largest logit, as long as both read
    the same.
    """
    recorded = []

    def recording_head(hidden: Tensor) -> Tensor:
        recorded.append(head_of(hidden))
        return recorded[-1]

    head_of = model.output_head()
    ours = Decoder(model, Sampler(recording_head, model.config.vocab_size, "greedy"), tokens).one_by_one(prefix)
    theirs = generated(model, prefix, tokens, output_logits=True)
    equal = ours == theirs.sequences[:, prefix.shape[1] :]
    same_input = torch.cat([torch.ones_like(equal[:, :1]), equal[:, :-1].cumprod(-1).bool()], -1)  # (rows, tokens)
    a, b = (torch.stack(list(logits), 1)[same_input].float() for logits in (recorded, theirs.logits))
    return difference(a, b)


def _measure_blocks(setup: Setup, model: LeviathanForCausalLM, decoder: Decoder, prefix: Tensor) -> Section:
    """`by_blocks` on the first tokens of a state: with random weights it needs a pass for about every token."""
    tokens = min(prefix.shape[1], setup.pick(short=8, cpu=32, cuda=128))
    plain = Decoder(model, decoder.sampler, tokens)
    decoders = {
        f"blocks of {n}": Decoder(model, decoder.sampler, tokens, n)
        for n in setup.pick(short=(2,), cpu=(4, 16), cuda=(4, 16, 64))
    }
    runs = {"one_by_one": lambda: plain.one_by_one(prefix)}
    runs |= {name: lambda each=each: each.by_blocks(prefix) for name, each in decoders.items()}
    expected = runs["one_by_one"]()
    shares, passes = {}, {"one_by_one": tokens - 1}
    for name, each in decoders.items():
        shares[name] = float((runs[name]() != expected).double().mean())
        passes[name] = each.num_passes
    samples = alternate(setup, runs, repeats=min(setup.repeats, 3))
    return Section(
        "",
        {},
        [Figure(f"{tokens} tokens, {name}", samples, ("one_by_one", name)) for name in decoders],
        [Check(f"share of tokens that differ, {name}", share, 0.0) for name, share in shares.items()],
        numbers={
            "passes": passes,
            "seconds_a_pass": {name: median_of(samples, name) / count for name, count in passes.items()},
        },
        notes=[
            "random weights: by_blocks guesses next to nothing right, so that its passes say little about a trained "
            "model; its seconds a pass (prefix included) do"
        ],
    )


def decoding_work(setup: Setup, model: LeviathanForCausalLM, prefix: Tensor, seconds: float) -> Work:
    """Every token reads all weights but the embedding's, and the keys and values of all before it, in every row."""
    config, (rows, length) = model.config, prefix.shape
    layers, head_parameters = num_parameters(model.model.layers), num_parameters(model.lm_head)
    keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of one token
    cached = rows * keys_and_values * 1.5 * length  # on average over the tokens of the target
    size = model.dtype.itemsize
    return Work(
        "decoding of a state",
        seconds,
        2 * rows * (layers * 2 * length + head_parameters * length),
        size * length * (layers + head_parameters + cached),
        precision_of(model.dtype),
    )
