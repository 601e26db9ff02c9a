"""Models as graphs for other runtimes: torch.export's programs and ONNX give what the models give."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from leviathan import (
    KhronosConfig,
    KhronosForClassification,
    KhronosModel,
    SnaConfig,
    SnaModel,
    SpanConfig,
    SpanModel,
    VsnaConfig,
    VsnaModel,
)
from sna_core import Axis, Problem, Term, derivative, multiply
from tests.test_leviathan import PREFIX, tiny, tokens

pytestmark = pytest.mark.clients
ENDS = {"input_low": [0.0, -1.0], "input_high": [1.0, 3.0]}
BOX = {**ENDS, "rank": 2, "num_cells": 4, "degree": 2}
INSIDE = torch.tensor([[0.0, -1.0], [1.0, 3.0], [0.25, 0.0], [0.3, 2.9], [0.999, -0.5], [0.5, 1.0], [0.7, 1.3]])
OUTSIDE = torch.tensor([[1.1, 0.0], [-0.2, 3.5], [0.5, -1.00001], [1e30, -1e30]])
BATCH = torch.export.Dim.DYNAMIC
MODELS = {
    "khronos": lambda: KhronosModel(KhronosConfig(**BOX, num_outputs=2)),
    "khronos-linear": lambda: KhronosModel(KhronosConfig(**BOX, extrapolate="linear")),
    "khronos-classification": lambda: KhronosForClassification(KhronosConfig(**BOX, num_labels=3)),
    "sna": lambda: SnaModel(SnaConfig(num_inputs=2, num_outputs=2, interaction_order=2, **ENDS)),
    "sna-train": lambda: SnaModel(SnaConfig(num_inputs=2, decomposition="tensor_train", basis="chebyshev", **ENDS)),
    "span": lambda: SpanModel(SpanConfig(num_inputs=2, num_outputs=3, num_blocks=2, normalization="layer")),
}
IN_A_BOX = [name for name in MODELS if name not in ("khronos-linear", "span")]
WITH_GRADIENT = ("khronos", "khronos-linear")


@functools.cache
def made(name):
    """A model, and what to call it with beside points."""
    model = MODELS[name]().eval()
    if isinstance(model, KhronosModel):
        model.output_scale.fill_(2.0)
        model.output_shift.fill_(-1.0)
    return model, {"output_gradient": True} if name in WITH_GRADIENT else {}


@functools.cache
def program(name):
    model, options = made(name)
    return torch.export.export(model, (INSIDE[:5],), options, dynamic_shapes=shapes(options))


def shapes(options):
    return {"x": {0: BATCH}, **dict.fromkeys(options)}


def close(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(torch.as_tensor(found[name]), value.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_program_is_saved_loaded_and_gives_the_same(tmp_path, name):
    model, options = made(name)
    torch.export.save(program(name), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for points in (INSIDE, INSIDE[:2]):  # of other sizes than the example
        close(loaded(points, **options), model(points, **options))
    if name == "khronos-linear":
        close(loaded(OUTSIDE[:3], **options), model(OUTSIDE[:3], **options))


@pytest.fixture
def in_onnx(tmp_path):
    """Exports a module of points to a file, and returns a function that runs that file in ONNX Runtime."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def export(module, example, options=None):
        path, options = tmp_path / "model.onnx", options or {}
        given = {"kwargs": options, "dynamic_shapes": shapes(options)}
        torch.onnx.export(module, (example,), path, dynamo=True, verbose=False, **given)
        session = onnxruntime.InferenceSession(path)
        (given,) = session.get_inputs()
        assert given.shape[1:] == list(example.shape[1:])
        assert isinstance(given.shape[0], str)  # a name: any number of points
        return lambda points: session.run(None, {given.name: points.numpy()})

    return export


@pytest.mark.parametrize("name", ["khronos", "sna", "span"])
def test_onnx_gives_the_same(in_onnx, name):
    model, options = made(name)
    run = in_onnx(model, INSIDE[:5], options)
    for points in (INSIDE, INSIDE[:2]):
        expected = model(points, **options)
        close(dict(zip(expected, run(points), strict=True)), expected)
    if name in IN_A_BOX:
        assert all(np.isnan(values).all() for values in run(OUTSIDE))


@pytest.mark.parametrize("name", IN_A_BOX)
def test_points_outside_the_box_are_nan_in_a_graph_which_cannot_raise(name):
    model, options = made(name)
    with pytest.raises(ValueError, match="lies outside"):
        model(OUTSIDE, **options)
    graph = program(name).module()
    some = torch.cat([INSIDE[:1], OUTSIDE, torch.full((1, 2), torch.nan), torch.full((1, 2), torch.inf)])
    for values in graph(some, **options).values():
        assert values[1:].isnan().all()
        assert values[0].isfinite().all()


def test_the_gradient_beside_the_value():
    model, options = made("khronos")
    output = model(INSIDE, **options)
    torch.testing.assert_close(output.prediction, model(INSIDE).prediction)
    torch.testing.assert_close(output.gradient, model.gradient(INSIDE))
    assert model(INSIDE).gradient is None
    assert output.gradient.requires_grad


def test_a_solution_is_a_program_as_well():
    x, t = Axis("x", 0, 1, num_cells=6, boundary="dirichlet"), Axis("t", 0, 1, num_cells=6)
    operator = [Term(t=derivative(1)), Term(-0.1, x=derivative(2))]
    heat = Problem([x, t], operator=operator, initial={"t": [Term(x=multiply(lambda x: torch.sin(torch.pi * x)))]})
    model = VsnaModel(VsnaConfig.for_problem(heat, rank=2)).eval()
    model.solve(heat, progress=False)
    points = torch.rand(5, 2)
    graph = torch.export.export(model, (points,), dynamic_shapes={"points": {0: BATCH}}).module()
    torch.testing.assert_close(graph(points[:3]), model(points[:3]))
    assert model(points).abs().max() > 0.1
    assert graph(points + 1).isnan().all()


class Actor(nn.Module):
    """What an agent does, without chance: all that is needed where it acts."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, x):
        return self.policy._predict(x, deterministic=True)


@pytest.mark.parametrize("algorithm", ["PPO", "SAC"])
def test_an_actor_acts_the_same(in_onnx, algorithm):
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    from leviathan.integrations import sb3

    policy = {"PPO": sb3.SpanActorCriticPolicy, "SAC": sb3.SpanSACPolicy}[algorithm]
    agent = getattr(stable_baselines3, algorithm)(policy, "Pendulum-v1", device="cpu")
    actor, seen = Actor(agent.policy).eval(), torch.randn(7, 3)
    if algorithm == "PPO":
        (found,) = in_onnx(actor, seen[:5])(seen)
    else:
        found = torch.export.export(actor, (seen[:5],), dynamic_shapes=shapes({})).module()(seen)
    with torch.no_grad():
        torch.testing.assert_close(torch.as_tensor(found), actor(seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "prefix"), [("baked", None), ("generated", PREFIX)])
def test_transformers_exports_a_language_model_to_onnx(tmp_path, kind, prefix):
    exporters = pytest.importorskip("transformers.exporters.base", reason="this transformers has no exporters")
    if not hasattr(exporters, "ExportedModel"):
        pytest.skip("the exporters of this transformers do not load what they saved")
    from transformers.exporters import OnnxConfig, OnnxExporter

    model = tiny(num_hidden_layers=1)
    model = model.to_llama() if kind == "baked" else model
    options = {} if prefix is None else {"prefix_length": prefix}
    given = {"input_ids": tokens(2, 9), "use_cache": False, **options}
    OnnxExporter().export(model, given, OnnxConfig(dynamic=True)).save_pretrained(tmp_path)
    loaded = exporters.ExportedModel.from_pretrained(tmp_path)
    for ids in (tokens(3, 12), tokens(1, 7)):
        with torch.no_grad():
            expected = model(ids, **options).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
