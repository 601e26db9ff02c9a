"""eval.app: what is behind each tab gives exact answers and refuses bad input; and the whole of it in a browser."""

import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import leviathan
from leviathan import FieldTokenizer, LeviathanConfig, LeviathanForCausalLM, SnaJanusConfig, SnaJanusModel
from training.fields import FieldFile, data_record
from training.turbulence import FlowSettings, write_fields
from training.vsna_references import heat

gradio = pytest.importorskip("gradio", reason="needs the extra app")

from eval import app, app_janus, app_khronos, app_manners, app_space, app_text, app_turbulence, app_vsna  # noqa: E402

SMALL_FLOW = FlowSettings(num_trajectories=3, num_grid=16, num_snapshots=6, viscosity=1e-3)
TINY = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"max_position_embeddings": 128, "embedding_seed_dim": 8, "embedding_num_heads": 2, "embedding_rank": 4},
}


def write_turbulence(folder):
    write_fields(folder / "data.hdf5", SMALL_FLOW, progress=False)
    FieldTokenizer(patch_size=8, num_bits=4, base=4, low=-90.0, high=90.0).save_pretrained(folder / "model")
    LeviathanForCausalLM(LeviathanConfig(vocab_size=16, embedding_base=4, **TINY)).save_pretrained(folder / "model")
    with FieldFile(folder / "data.hdf5") as fields:
        record = {"data_record": data_record(fields), "steps": 3, "stride": 2, "dt_save": 0.02}
    (folder / "model" / "training.json").write_text(json.dumps(record))


def write_text_model(folder):
    words = {word: i for i, word in enumerate(("<end>", "Once", "Ġupon", "Ġa", "Ġtime", "Ġthere", "Ġwas"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"pad_token": "<end>", "eos_token": "<end>", "model_input_names": ["input_ids"]}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    LeviathanForCausalLM(LeviathanConfig(vocab_size=len(words), **TINY)).save_pretrained(folder)


def write_janus(folder):
    statistics = {"property_mean": [150.0, 0.45], "property_std": [80.0, 0.1]}
    ranges = {"property_low": [5.0, 0.2], "property_high": [400.0, 0.8]}
    config = SnaJanusConfig(
        **{"resolution": 4, "channels": [4], "latent_dim": 4, "head_rank": 2},
        **{"property_names": ["C1111", "volume_fraction"], **statistics, **ranges},
    )
    SnaJanusModel(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder as make leaves it, with tiny models that nobody has trained."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    write_turbulence(folder / "demo")
    write_text_model(folder / "text/model")
    write_janus(folder / "janus/model")
    return folder


@pytest.fixture(scope="module")
def flow(runs):
    return app_turbulence.load(runs / "demo")


@pytest.fixture(scope="module")
def writer(runs):
    return app_text.Writer(*app_text.load(runs / "text/model", "cpu", "auto"))


@pytest.fixture(scope="module")
def janus(runs):
    return app_janus.load(runs / "janus/model")


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Models of fewer points and cells, which are fitted in a second."""
    patch = pytest.MonkeyPatch()
    patch.setattr(app_khronos, "NUM_POINTS", 1500)
    patch.setattr(app_khronos, "SIZES", {"rank": 5, "num_cells": 9, "degree": 3})
    rough = {"options": {"num_cells": {"x": 10, "t": 4, "nu": 2}}, "sizes": {"rank": 6}, "tolerance": 1e-4}
    patch.setitem(app_vsna.EQUATIONS, "heat", dataclasses.replace(app_vsna.EQUATIONS["heat"], **rough))
    yield
    patch.undo()


# ---------------------------------------------------------------------------------------------------------- turbulence


@pytest.mark.parametrize("sampling", app_turbulence.SAMPLINGS)
def test_a_rollout_is_that_of_the_library(flow, sampling):
    truth = app_turbulence.held_out(flow, 0, 1, 2)
    made = app_turbulence.roll_out(flow, truth, sampling, 0.7, 0.8, seed=3)
    options = {"sampling": sampling, "temperature": 0.7, "top_p": 0.8, "seed": 3, "progress": False}
    expected = leviathan.rollout(flow.model, flow.tokenizer, truth[0], num_steps=2, **options)[0]
    np.testing.assert_array_equal(made.generated[1:], expected.numpy())
    np.testing.assert_array_equal(made.generated[0], truth[0])
    assert made.dt == pytest.approx(0.02)  # two snapshots


def test_held_out_states_are_those_of_the_file(flow):
    with FieldFile(flow.data) as fields:
        test = app_turbulence.split_trajectories(3).test[0]
        expected = fields.vorticity(int(test), [1, 3, 5])
    np.testing.assert_array_equal(app_turbulence.held_out(flow, 0, 1, 2), expected)


def test_a_new_flow_is_of_the_same_kind_and_not_in_the_file(flow, tmp_path):
    more = dataclasses.replace(flow.settings, num_trajectories=4)
    with FieldFile(write_fields(tmp_path / "more.hdf5", more, progress=False)) as fields:
        expected = fields.vorticity(3, [0, 2, 4])  # the flow behind the last one of the file
    found = app_turbulence.new_flow(flow, seed=0, num_steps=2)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    assert not np.allclose(found, app_turbulence.new_flow(flow, seed=1, num_steps=2))


def test_a_model_without_its_file_still_makes_flows(runs, tmp_path):
    shutil.copytree(runs / "demo/model", tmp_path / "model")
    flow = app_turbulence.load(tmp_path)
    assert flow.sources == app_turbulence.SOURCES[:1]
    assert flow.settings == SMALL_FLOW


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: app_turbulence.new_flow(f, -1, 2), "the seed = -1"),
        (lambda f: app_turbulence.new_flow(f, 0, 1000), "the number of steps = 1000"),
        (lambda f: app_turbulence.held_out(f, 9, 0, 1), "the held-out flow = 9"),
        (lambda f: app_turbulence.held_out(f, 0, 5, 1), "the first snapshot = 5"),
        (lambda f: app_turbulence.held_out(f, 0, 0, 3), "the number of steps = 3"),
        (lambda f: app_turbulence.roll_out(f, np.zeros((2, 16, 16)), "best", 1, 1, 0), "the sampling = 'best'"),
        (lambda f: app_turbulence.roll_out(f, np.zeros((2, 16, 16)), "sample", 0, 1, 0), "the temperature = 0"),
    ],
)
def test_bad_rollouts_are_refused(flow, call, message):
    with pytest.raises(ValueError, match=message):
        call(flow)


def test_a_rollout_too_large_is_refused_before_it_is_made(flow, monkeypatch):
    monkeypatch.setattr(app_turbulence, "MAX_TOKENS", 600)
    monkeypatch.setattr(app_turbulence, "simulate", None)
    with pytest.raises(ValueError, match=r"3 steps of 16 x 16 pixels are 768 tokens; ask for at most 2 steps"):
        app_turbulence.new_flow(flow, 0, 3)


def test_a_film_has_a_frame_for_each_state_and_needs_no_file(flow):
    made = app_turbulence.roll_out(flow, app_turbulence.held_out(flow, 0, 0, 2), "greedy", 1.0, 1.0, 0)
    html = app_turbulence.animation(made)
    assert html.count("<img") == 1
    assert "base64," in html
    data = app_turbulence.base64.b64decode(html.split("base64,")[1].split('"')[0])
    assert app_turbulence.Image.open(app_turbulence.io.BytesIO(data)).n_frames == 3
    assert "2 states in" in app_turbulence.words(made)


# ---------------------------------------------------------------------------------------------------------------- text


def test_a_stream_ends_in_what_the_command_writes(writer):
    ids = app_text.encode_prompts(writer.model, writer.tokenizer, ["Once upon"], 6)
    (expected,) = app_text.complete(writer.model, writer.tokenizer, ids, do_sample=False, max_new_tokens=6)
    *_, last = app_text.write(writer, "Once upon", 0.0, 1.0, 6)
    assert last == "Once upon" + expected


def test_a_seed_decides_and_the_global_generator_is_left_alone(writer):
    before = torch.get_rng_state()
    first, again, other = ([*app_text.write(writer, "Once", 1.5, 1.0, 20, seed)][-1] for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), before)


def test_who_stops_reading_stops_the_model(writer):
    before = app_text.threading.active_count()
    stream = app_text.write(writer, "Once", 1.0, 1.0, 100)
    assert next(stream) == "Once"
    stream.close()
    assert app_text.threading.active_count() == before


def test_who_asks_for_it_stops_the_model(writer):
    stop = app_text.threading.Event()
    *_, whole = app_text.write(writer, "Once", 1.5, 1.0, 100, 1)
    stream = app_text.write(writer, "Once", 1.5, 1.0, 100, 1, stop)
    next(stream)
    stop.set()
    *_, cut = [None, *stream]
    assert cut is None or (whole.startswith(cut) and cut != whole)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((" ", 1.0, 1.0, 5), "the prompt is empty"),
        (("a " * 1001, 1.0, 1.0, 5), "2,002 characters; expected at most 2,000"),
        (("a", -1.0, 1.0, 5), "the temperature = -1"),
        (("a", 1.0, 0.0, 5), "top-p = 0"),
        (("a", 1.0, 1.0, 10**9), "the number of new tokens = 1e\\+09"),
        (("a", 1.0, 1.0, 127), "the model has 128 positions"),
        (("a", 1.0, 1.0, 5, -1), "the seed = -1"),
    ],
)
def test_bad_prompts_are_refused(writer, values, message):
    with pytest.raises(ValueError, match=message):
        next(app_text.write(writer, *values))


def test_what_fails_in_the_thread_is_raised_where_it_is_read(writer, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(app_text, "complete", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        list(app_text.write(writer, "Once", 1.0, 1.0, 5))


# ------------------------------------------------------------------------------------------------------------- khronos


@pytest.fixture(scope="module")
def plate(quick):
    return app_khronos.fitted()


@pytest.mark.parametrize(("target", "power"), [(40.0, 12.0), (55.0, 4.0), (25.5, 20.0)])
def test_found_places_have_the_target(plate, target, power):
    found = app_khronos.find(plate, target, power)
    assert len(found.x) > 20
    np.testing.assert_allclose(found.fitted, target, atol=1e-4)  # a millionth of the fit's range
    assert (found.x >= app_khronos.LOW[:2]).all()
    assert (found.x <= app_khronos.HIGH[:2]).all()
    again = plate.predict(np.column_stack([found.x, np.full(len(found.x), power)]))
    np.testing.assert_array_equal(found.fitted, again)
    assert f"**{len(found.x)} places in" in app_khronos.words(plate, found, target)


def test_a_target_out_of_reach_has_no_place_and_says_so(plate):
    found = app_khronos.find(plate, 90.0, 2.0)
    assert found.x.shape == (0, 2)
    assert found.reach[1] < 90
    assert "No place" in app_khronos.words(plate, found, 90.0)


def test_the_fit_tells_the_plate(plate):
    points = np.random.default_rng(9).uniform(app_khronos.LOW, app_khronos.HIGH, (2000, 3))
    error = plate.predict(points) - app_khronos.plate(points)
    assert np.sqrt(np.mean(error**2)) < 0.2 * app_khronos.plate(points).std()


@pytest.mark.parametrize(("target", "power"), [(1000.0, 5.0), (50.0, 0.0), (None, 5.0), (50.0, math.nan)])
def test_bad_targets_are_refused(plate, target, power):
    with pytest.raises(ValueError, match=r"expected a number from"):
        app_khronos.find(plate, target, power)


# ---------------------------------------------------------------------------------------------------------------- vsna


def test_a_profile_is_that_of_the_model_and_its_error_that_from_the_exact_solution(quick):
    model = app_vsna.solved("heat")
    shown = app_vsna.profile(model, "heat", 0.5, 0.004)
    points = torch.stack([torch.from_numpy(shown.x), torch.full((801,), 0.5), torch.full((801,), 0.004)], -1)
    np.testing.assert_allclose(shown.exact, heat(points).numpy(), rtol=1e-6, atol=1e-7)
    with torch.no_grad():
        np.testing.assert_allclose(shown.field, model(points.double()).numpy(), atol=1e-6)
    assert shown.error.max() < 0.02
    assert shown.start.max() > shown.exact.max()
    assert "801 values in" in app_vsna.words(model, "heat", shown)


@pytest.mark.parametrize(
    ("name", "t", "nu", "message"),
    [("heat", -1.0, 0.005, "t = -1"), ("heat", 2.0, 0.005, "t = 2"), ("heat", 0.5, "x", "ν = 'x'")],
)
def test_bad_queries_are_refused(quick, name, t, nu, message):
    with pytest.raises(ValueError, match=message):
        app_vsna.profile(app_vsna.solved("heat"), name, t, nu)


# --------------------------------------------------------------------------------------------------------------- janus


def test_a_design_is_that_of_the_model(janus):
    made = app_janus.design(janus, {"C1111": 200.0, "volume_fraction": 0.5}, 4)
    expected = janus.invert({"C1111": 200.0, "volume_fraction": 0.5}, num_candidates=4)
    assert torch.equal(made.cells, expected.cells)
    assert torch.equal(made.checked["C1111"], expected.checked["C1111"])
    table = app_janus.table(made)
    assert f"**{float(expected.checked['C1111'][0]):.4g}**" in table
    assert f"{100 * float(expected.gap['C1111'][0]):.2f} %" in table
    assert "best of 4 candidates" in app_janus.words(made, 1.0)
    image = app_manners.picture((8, 3), lambda figure: app_janus.draw(figure, made))
    assert image.std() > 10


@pytest.mark.parametrize(
    ("targets", "count", "message"),
    [
        ({"C1111": 1e9, "volume_fraction": 0.5}, 4, "stiffness C1111"),
        ({"C1111": 100.0, "volume_fraction": 0.99}, 4, "share of solid"),
        ({"C1111": 100.0, "volume_fraction": 0.5}, 10**6, "the number of candidates = 1e\\+06"),
    ],
)
def test_bad_designs_are_refused(janus, targets, count, message):
    with pytest.raises(ValueError, match=message):
        app_janus.design(janus, targets, count)


# ------------------------------------------------------------------------------------------------------------- the app


def test_tabs_without_their_models_say_how_to_make_them(tmp_path, quick):
    texts = [each.value or "" for each in app.build_app(tmp_path).blocks.values() if isinstance(each, gradio.Markdown)]
    for command, folder in (("demo", "demo/model"), ("text", "text/model"), ("janus", "janus/model")):
        assert any(f"`make {command}" in text and str(tmp_path / folder) in text for text in texts)


def test_a_model_of_something_else_is_named(runs):
    with pytest.raises(ValueError, match="is a leviathan; expected a sna_janus"):
        app_janus.load(runs / "text/model")


def test_bad_ports_are_refused(capsys):
    with pytest.raises(SystemExit):
        app.parse(["--port", "0"])
    assert "expected a number from 1 to 65535" in capsys.readouterr().err


@pytest.fixture
def connections(monkeypatch):
    """Where this process connects to, as (host, port)."""
    made, connect = [], socket.socket.connect

    def watched(self, address):
        made.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return made


@pytest.fixture
def served(runs, quick, connections):
    """An app over the tiny models that listens."""
    made = app.build_app(runs)
    app.launch(made, block=False)
    yield made
    made.close(verbose=False)


@pytest.fixture
def address(served):
    """Where it listens."""
    return served.local_url


def test_a_server_gives_no_file_and_no_share_link_and_calls_nobody(served, address, connections):
    jobs = [function for function in served.fns.values() if function.queue]
    heavy = [function for function in jobs if function.concurrency_id == app_manners.HEAVY]
    assert len(heavy) == 4  # a choice of an equation, and three buttons: one at a time, all others by kind
    assert {function.concurrency_limit for function in heavy} == {1}
    assert {function.concurrency_limit for function in jobs} == {1, "default"}
    assert served._queue.default_concurrency_limit == 1
    assert served._queue.max_size == app.MAX_WAITING
    assert address.startswith("http://127.0.0.1:")
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.loads(answer.read())
    assert config["analytics_enabled"] is False
    assert not config.get("is_sharing_on")
    for name in ("/etc/passwd", f"{Path.cwd()}/README.md", "README.md", "../../etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={name}")
        assert refused.value.code in (400, 403, 404)
    assert connections
    assert [host for host, *_ in connections if host not in ("127.0.0.1", "localhost", "::1")] == []


def slide(page, elem_id, value):
    """Writes a slider's number, as a user would."""
    field = page.locator(f"#{elem_id} input[type=number]")
    field.fill(str(value))
    field.press("Enter")


@pytest.mark.browser
def test_in_a_browser_every_tab_answers(address, tmp_path, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    problems, strangers = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else strangers.append(r.url))
        page.set_default_timeout(60_000)
        page.goto(address)
        says = playwright.expect
        says.set_options(timeout=60_000)

        says(page.locator("#khronos-text")).to_contain_text("places in")
        before = page.locator("#khronos-image img").get_attribute("src")
        slide(page, "target", 90)
        says(page.locator("#khronos-text")).to_contain_text("No place on the plate has 90.0 °C")
        says(page.locator("#khronos-image img")).not_to_have_attribute("src", before)
        page.screenshot(path=tmp_path / "khronos.png")

        page.get_by_role("tab", name="Query VSNA").click()
        says(page.locator("#vsna-text")).to_contain_text("801 values in")
        before = page.locator("#vsna-image img").get_attribute("src")
        slide(page, "time", 0.9)
        says(page.locator("#vsna-image img")).not_to_have_attribute("src", before)

        page.get_by_role("tab", name="Roll out turbulence").click()
        slide(page, "steps", 2)
        page.locator("#turbulence-go").click()
        says(page.locator("#turbulence-film img")).to_be_visible()
        says(page.locator("#turbulence-text")).to_contain_text("2 states in")

        page.get_by_role("tab", name="Write text").click()
        page.locator("#prompt textarea").fill("Once upon")
        page.locator("#text-go").click()
        says(page.locator("#text textarea")).to_have_value(re.compile(r"^Once upon \w+"))
        says(page.locator("#text-status")).to_contain_text("Written in")
        ask = app_text._Stop.__call__
        monkeypatch.setattr(app_text._Stop, "__call__", lambda *args, **kw: time.sleep(1) or ask(*args, **kw))
        page.locator("#text-go").click()
        says(page.locator("#text-status")).to_contain_text("Writing")
        page.get_by_role("button", name="Stop").click()
        says(page.locator("#text-status")).to_contain_text("Stopped after")
        says(page.get_by_text("Error", exact=True)).to_have_count(0)
        page.locator("#prompt textarea").fill("")
        page.locator("#text-go").click()
        says(page.locator(".toast-body")).to_contain_text("The prompt is empty; write something to continue.")

        page.get_by_role("tab", name="Design a Janus cell").click()
        page.locator("#janus-go").click()
        says(page.locator("#janus-text")).to_contain_text("the best of 16 candidates")
        page.screenshot(path=tmp_path / "janus.png")
        browser.close()
    assert problems == []
    assert strangers == []
    assert (tmp_path / "khronos.png").stat().st_size > 20_000


def test_a_space_holds_all_that_the_app_needs(runs, tmp_path):
    """Built in another process, from the copy alone: no checkout and no file of data is within its reach."""
    (runs / "janus/model/checkpoint-1").mkdir(exist_ok=True)
    taken = app_space.write_space(runs, tmp_path / "space")
    assert taken == ["demo/model", "text/model", "janus/model"]
    files = {path.relative_to(tmp_path / "space") for path in (tmp_path / "space").rglob("*") if path.is_file()}
    assert not [path for path in files if path.suffix in (".hdf5", ".pt") or "checkpoint-1" in path.parts]
    lines = (tmp_path / "space/requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in lines)
    assert any(line.startswith("scikit-image>=") for line in lines)
    assert not [line for line in lines if line.startswith(("gradio", "leviathan"))]
    about = (tmp_path / "space/README.md").read_text()
    assert f"sdk_version: {gradio.__version__}\n" in about
    assert "app_file: app.py\n" in about
    program = (
        "import sys; sys.path.insert(0, '.'); import eval.app, leviathan; print(eval.app.__file__, leviathan.__file__);"
        "from eval import app_turbulence as t; print(t.load(t.Path('runs/demo')).sources)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "space", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(str(tmp_path / "space")) == 2
    assert app_turbulence.SOURCES[0] in run.stdout
    with pytest.raises(ValueError, match="is there already"):
        app_space.write_space(runs, tmp_path / "space")
