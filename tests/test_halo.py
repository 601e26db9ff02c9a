"""Patches that see a margin around them: windows of periodic fields, pairs, positions of their pixels, rollouts."""

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoFeatureExtractor, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import leviathan
from leviathan import FieldTokenizer, LeviathanConfig, LeviathanForCausalLM
from leviathan.decoding_leviathan import Decoder, Sampler
from leviathan.positions_leviathan import WindowRotaryEmbedding
from leviathan.tokenization_leviathan import stitch, to_windows
from tests.test_leviathan import spread_embeddings
from training.fields import FieldFile, PatchPairs
from training.turbulence import FlowSettings, write_fields

PATCH, MARGIN = 4, 2
WINDOW = PATCH + 2 * MARGIN


def make_model(layout="window", margin=MARGIN, **options):
    sizes = {"patch_size": PATCH, "patch_margin": margin} if layout == "window" else {}
    config = LeviathanConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=(PATCH + 2 * margin) ** 2 + PATCH**2,
        embedding_base=6,
        embedding_seed_dim=8,
        embedding_num_heads=2,
        embedding_rank=4,
        initializer_range=0.5,
        position_layout=layout,
        **sizes,
        **options,
    )
    model = LeviathanForCausalLM(config).eval()
    spread_embeddings(model.get_input_embeddings())
    return model


def make_tokenizer(margin=MARGIN, order="raster"):
    return FieldTokenizer(PATCH, num_bits=5, base=6, low=-2.0, high=2.0, margin=margin, order=order)


def make_fields(batch=2, height=8, width=12):
    return np.random.default_rng(0).normal(size=(batch, height, width)).clip(-2, 2).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- windows


@given(
    size=st.integers(1, 4),
    margin=st.integers(0, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    as_torch=st.booleans(),
)
def test_windows_are_what_a_tiled_field_shows(size, margin, rows, columns, as_torch):
    fields = np.arange(2 * rows * columns * size**2).reshape(2, rows * size, columns * size)
    if margin and min(rows, columns) * size < size + 2 * margin:
        with pytest.raises(ValueError, match="needs a periodic field of at least"):
            to_windows(fields, size, margin)
        return
    windows = np.asarray(to_windows(torch.from_numpy(fields) if as_torch else fields, size, margin))
    tiled = np.tile(fields, (1, 3, 3))
    wide = size + 2 * margin
    expected = [
        tiled[b, fields.shape[1] + x - margin :, fields.shape[2] + y - margin :][:wide, :wide]
        for b in range(2)
        for x in range(0, rows * size, size)
        for y in range(0, columns * size, size)
    ]
    assert np.array_equal(windows, np.stack(expected))
    inside = windows[:, margin : margin + size, margin : margin + size]
    assert np.array_equal(stitch(inside, fields.shape[1:]), fields)


@pytest.mark.parametrize("order", ["raster", "hilbert"])
@pytest.mark.parametrize("as_torch", [False, True])
def test_prefix_holds_the_patch_and_what_lies_around_it(order, as_torch):
    tokenizer, fields = make_tokenizer(order=order), make_fields()
    ids = tokenizer(fields, return_tensors="pt" if as_torch else "np")["input_ids"]
    prefix = tokenizer.prefix(ids, (8, 12))
    assert isinstance(prefix, type(ids))
    assert prefix.shape == (12, tokenizer.tokens_per_prefix) == (12, WINDOW**2)
    assert np.array_equal(prefix[:, tokenizer.centre()], ids)
    assert np.array_equal(prefix, tokenizer.window(to_windows(fields, PATCH, MARGIN)))


def test_without_a_margin_the_prefix_is_the_patch():
    tokenizer = make_tokenizer(margin=0)
    ids = tokenizer(make_fields())["input_ids"]
    assert tokenizer.prefix(ids, (8, 12)) is ids
    assert tokenizer.centre().tolist() == list(range(PATCH**2))


def test_margin_and_scale_are_saved(tmp_path):
    tokenizer = FieldTokenizer(PATCH, 5, 6, margin=MARGIN).fit(np.array([[3.0, -4.0]]))
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.margin, loaded.rms) == (MARGIN, pytest.approx(12.5**0.5))


@pytest.mark.parametrize("margin", [-1, PATCH + 1])
def test_bad_margin(margin):
    with pytest.raises(ValueError, match="margin"):
        make_tokenizer(margin=margin)


def test_bad_windows():
    with pytest.raises(ValueError, match=r"expected \(batch, 8, 8\)"):
        make_tokenizer().window(np.zeros((1, PATCH, PATCH)))
    with pytest.raises(ValueError, match="power of two"):
        FieldTokenizer(4, margin=1, order="hilbert")


# --------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("offsets", ["grid", "random"])
def test_pairs_have_the_margin_in_the_prior_state_alone(tmp_path, offsets):
    path = write_fields(tmp_path / "flow.hdf5", FlowSettings(num_trajectories=3, num_snapshots=3, num_grid=16))
    options = {"num_items": 20, "symmetries": True} if offsets == "random" else {}
    with FieldFile(path) as fields:
        plain = FieldTokenizer(PATCH, 8, 16).fit(fields.vorticity(0))
        wide = FieldTokenizer(PATCH, 8, 16, plain.low, plain.high, margin=MARGIN)
        with_margin = PatchPairs(fields, [0, 1, 2], wide, offsets=offsets, **options)
        without = PatchPairs(fields, [0, 1, 2], plain, offsets=offsets, **options)
        for i in (0, 7, 19):
            item, small = with_margin[i], without[i]
            prefix, target = item["input_ids"].split([WINDOW**2, PATCH**2])
            assert torch.equal(target, small["input_ids"][PATCH**2 :])
            assert torch.equal(prefix[wide.centre()], small["input_ids"][: PATCH**2])
            assert torch.equal(item["labels"], torch.cat([torch.full_like(prefix, -100), target]))
        assert with_margin.prefix_length == WINDOW**2
        wide = FieldTokenizer(8, 8, 16, plain.low, plain.high, margin=5)
        with pytest.raises(ValueError, match="margin of 5 exceed the grid 16 x 16"):
            PatchPairs(fields, [0], wide)


# ----------------------------------------------------------------------------------------------------------- positions


def test_same_pixel_is_equally_far_everywhere():
    rotary = make_model().model.rotary_emb
    assert isinstance(rotary, WindowRotaryEmbedding)
    places = rotary.places(torch.arange(WINDOW**2 + PATCH**2))
    centre = torch.from_numpy(make_tokenizer().centre())
    assert torch.equal(places[: WINDOW**2], torch.arange(WINDOW**2))
    assert torch.equal(places[WINDOW**2 :], centre + WINDOW**2)
    ids = torch.arange(5, WINDOW**2 + 3)[None]
    hidden = torch.zeros(1)
    expected = LlamaRotaryEmbedding.forward(rotary, hidden, places[ids])
    assert all(torch.equal(a, b) for a, b in zip(rotary(hidden, ids), expected, strict=True))


def test_without_a_margin_windows_are_sequences():
    model, plain = make_model(margin=0), make_model("sequence", margin=0)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(0, 32, (2, 2 * PATCH**2))
    with torch.no_grad():
        a, b = (m(ids, prefix_length=PATCH**2).logits for m in (model, plain))
    assert torch.equal(a, b)


def test_model_is_saved_and_knows_its_layout(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 32, (2, WINDOW**2 + PATCH**2))
    with torch.no_grad():
        a, b = (m(ids, prefix_length=WINDOW**2).logits for m in (model, again))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="position_layout = 'window' is not LLaMA's"):
        model.to_llama()


def test_generate_equals_the_decoder():
    model = make_model()
    prefix = torch.randint(0, 32, (2, WINDOW**2))
    decoder = Decoder(model, Sampler(model.output_head(), 32, "greedy"), PATCH**2)
    options = {"attention_mask": torch.ones_like(prefix), "max_new_tokens": PATCH**2, "do_sample": False}
    made = model.generate(prefix, prefix_length=WINDOW**2, **options)
    assert torch.equal(made[:, WINDOW**2 :], decoder(prefix))
    assert torch.equal(decoder(prefix), decoder.without_cache(prefix))


@pytest.mark.parametrize("options", [{}, {"patch_size": 0}, {"patch_size": 4, "patch_margin": -1}])
def test_windows_need_a_patch(options):
    with pytest.raises(StrictDataclassClassValidationError, match="position_layout = 'window' with patch_size"):
        LeviathanConfig(position_layout="window", **options)
    with pytest.raises(ValueError, match=r"prefix_length = 63; .* 64"):
        make_model()(torch.zeros(1, 80, dtype=torch.long), prefix_length=63)


# ------------------------------------------------------------------------------------------------------------- rollout


@pytest.mark.parametrize("layout", ["window", "sequence"])
@pytest.mark.parametrize("sampling", ["expectation", "sample"])
def test_rollout_with_a_margin_equals_the_plain_loop(layout, sampling):
    """State by state, window by window, token by token, without cache."""
    # In double precision: an expectation is rounded to a level, and single precision tips one that is about a half.
    model, tokenizer, fields = make_model(layout).double(), make_tokenizer(), make_fields()
    options = {"num_steps": 2, "sampling": sampling, "seed": 3, "progress": False}
    fast = leviathan.rollout(model, tokenizer, fields, **options)
    assert torch.equal(fast, leviathan.rollout(model, tokenizer, fields, **options, use_cache=False, batch_size=5))
    assert torch.equal(fast, leviathan.rollout(model, tokenizer, fields, **options, block_size=PATCH))
    if sampling == "sample":
        return
    state = fields
    for step in range(2):
        windows = to_windows(state, PATCH, MARGIN)
        patches = []
        for window in windows:
            sequence = torch.from_numpy(tokenizer.window(window[None]))
            for _ in range(PATCH**2):
                with torch.no_grad():
                    logits = model(sequence, prefix_length=WINDOW**2).logits[0, -1]
                expected = (logits.double().softmax(-1) @ torch.arange(32.0).double()).round().long()
                sequence = torch.cat([sequence, expected.view(1, 1)], 1)
            patches.append(sequence[0, WINDOW**2 :])
        state = np.asarray(tokenizer.decode(torch.stack(patches), field_shape=(8, 12)))
        assert np.array_equal(state, fast[:, step])


def test_a_neighbour_is_seen_through_the_margin_alone():
    model, tokenizer, fields = make_model(), make_tokenizer(), make_fields(1, 8, 16)
    out = leviathan.rollout(model, tokenizer, fields, num_steps=1, progress=False)
    for column, seen in ((6, True), (7, False), (9, False), (10, True)):  # patch at columns 0-3, margin 2, period 16
        changed = fields.copy()
        changed[0, :, {6: 4, 7: 6, 9: 13, 10: 15}[column]] *= -1
        again = leviathan.rollout(model, tokenizer, changed, num_steps=1, progress=False)
        assert torch.equal(out[0, 0, :PATCH, :PATCH], again[0, 0, :PATCH, :PATCH]) is not seen


def test_rollout_refuses_what_it_cannot_step():
    model, tokenizer = make_model(), make_tokenizer()

    def rolled(fields, model=model, tokenizer=tokenizer):
        return leviathan.rollout(model, tokenizer, fields, num_steps=1, progress=False)

    with pytest.raises(ValueError, match="a patch alone has nothing around it"):
        rolled(np.zeros((3, PATCH, PATCH)))
    with pytest.raises(ValueError, match="does not divide into patches"):
        rolled(np.zeros((1, 10, 8)))
    with pytest.raises(ValueError, match="need 80 positions"):
        rolled(make_fields(), make_model(margin=0))
    with pytest.raises(ValueError, match="with a margin of 2, the tokenizer's patches are of 4 with 0"):
        rolled(make_fields(), tokenizer=make_tokenizer(margin=0))
    scaled = make_tokenizer()
    scaled.rms = 30.0
    with pytest.raises(ValueError, match="another unit or normalisation"):
        rolled(make_fields(), tokenizer=scaled)
