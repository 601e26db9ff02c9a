"""One node of the graph against PyTorch's own operations and against the formula as written."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sna_core.squashed_product import squashed_product, squashed_product_reference

NAMES = ("x", "weight", "bias", "factors", "scale")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}
KINDS = ("shared", "own", "latent")  # x for all networks, x of each, x that is the coordinates


def arguments(
    kind="shared",
    degree=2,
    num_networks=2,
    *,
    latents=3,
    rank=2,
    num_cells=4,
    num_inputs=3,
    samples=7,
    scaled=True,
    dtype=torch.float64,
):
    """Arguments by name; tensors are leaves."""
    rows = num_networks * latents
    shapes = {"factors": (rows, num_cells + degree, rank)}
    if kind == "latent":
        shapes["x"] = (rows, samples)
    else:
        shapes["x"] = (num_inputs, samples) if kind == "shared" else (num_networks, num_inputs, samples)
        shapes |= {"weight": (rows, num_inputs), "bias": (rows, 1)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in sorted(shapes.items())}
    if scaled:
        tensors["scale"] = 0.5 + torch.rand(rows, 1, dtype=torch.float64)
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    counts = {"num_networks": num_networks, "num_cells": num_cells}
    return {**dict.fromkeys(NAMES), **tensors, **counts}


def leaves(given_arguments):
    return [each for each in given_arguments.values() if isinstance(each, torch.Tensor)]


def not_fused(**keywords):
    return squashed_product(**keywords, fused=False)


def value_and_gradients(function, given_arguments):
    product = function(**given_arguments)
    cotangent = torch.linspace(0.5, 1.5, product.numel(), dtype=product.dtype).view_as(product)
    return [product, *torch.autograd.grad(product, leaves(given_arguments), cotangent)]


def check_agreement(given_arguments):
    expected = value_and_gradients(squashed_product_reference, given_arguments)
    for function in (squashed_product, not_fused):
        for ours, oracle in zip(value_and_gradients(function, given_arguments), expected, strict=True):
            tolerance = TOLERANCE[ours.dtype]
            atol = tolerance * (oracle.abs().max().clamp(min=1).item() if oracle.numel() else 1)
            torch.testing.assert_close(ours, oracle, rtol=tolerance, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degree", range(6))
def test_values_and_gradients_equal_the_formula(degree, kind, dtype):
    for num_networks in (1, 2, 3):
        for scaled in (False, True):
            check_agreement(arguments(kind, degree, num_networks, scaled=scaled, dtype=dtype))


sizes = st.integers(1, 5)


@settings(max_examples=30)
@given(
    st.sampled_from(KINDS),
    st.integers(0, 5),
    sizes,
    st.fixed_dictionaries(
        {
            **dict.fromkeys(("latents", "rank", "num_cells", "num_inputs"), sizes),
            "samples": st.integers(0, 5),
            "scaled": st.booleans(),
        }
    ),
)
def test_shapes(kind, degree, num_networks, counts):
    torch.manual_seed(0)
    given_arguments = arguments(kind, degree, num_networks, **counts)
    assert squashed_product(**given_arguments).shape == (num_networks, counts["rank"], counts["samples"])
    check_agreement(given_arguments)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_zero", [1, 2, 3])
def test_gradient_where_factors_vanish(num_zero, dtype):
    given_arguments = arguments(dtype=dtype)
    with torch.no_grad():
        given_arguments["factors"][:num_zero] = 0.0
    check_agreement(given_arguments)
    of_factors = value_and_gradients(squashed_product, given_arguments)[1 + 3]
    if num_zero == 1:
        assert of_factors[0].abs().max() > 0.01  # the product of the others, not lost
        assert of_factors[1:3].abs().max() < 1e-15
    else:
        assert of_factors[:3].abs().max() < 1e-15
    assert of_factors[3:].abs().max() > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degree", [2, 4])
def test_gradcheck(kind, degree):
    given_arguments = arguments(kind, degree, samples=3)
    names = [name for name in NAMES if given_arguments[name] is not None]

    def f(*tensors):
        return squashed_product(**{**given_arguments, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(f, [given_arguments[name] for name in names])


def test_second_derivatives_without_fusion():
    given_arguments = arguments(degree=3, latents=2, samples=2, num_networks=1)

    def f(*tensors):
        return not_fused(**{**given_arguments, **dict(zip(NAMES, tensors, strict=True))})

    assert torch.autograd.gradgradcheck(f, [given_arguments[name] for name in NAMES])


def test_the_fused_node_says_that_it_has_one_derivative():
    given_arguments = arguments()

    def penalty():
        product = squashed_product(**given_arguments).sum()
        (slope,) = torch.autograd.grad(product, given_arguments["x"], create_graph=True)
        (product + slope.square().sum()).backward()  # without an error the second term would be taken for a constant

    with pytest.raises(RuntimeError, match="fused=False"):
        penalty()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_extreme_coordinates_are_the_ends_of_the_interval(dtype, fused):
    given_arguments = arguments("latent", scaled=False, num_networks=1, samples=2, dtype=dtype)
    with torch.no_grad():
        given_arguments["x"].copy_(torch.tensor([-1e4, 1e4], dtype=dtype).expand(3, 2))
    product, *gradients = value_and_gradients(lambda **a: squashed_product(**a, fused=fused), given_arguments)
    factors = given_arguments["factors"].detach()
    # A quadratic spline at a knot is the mean of two coefficients.
    expected = torch.stack([(0.5 * (factors[:, a] + factors[:, b])).prod(0) for a, b in ((0, 1), (-2, -1))], 1)
    torch.testing.assert_close(product[0], expected)
    assert all(each.isfinite().all() for each in gradients)
    assert not gradients[0].any()


@pytest.mark.parametrize("fused", [True, False])
def test_a_sample_that_is_not_a_number_spoils_itself_alone(fused):
    for kind, place, networks in (("shared", (0, 4), [0, 1]), ("own", (1, 0, 4), [1]), ("latent", (-1, 4), [1])):
        given_arguments = arguments(kind)
        with torch.no_grad():
            given_arguments["x"][place] = torch.nan
        is_nan = squashed_product(**given_arguments, fused=fused).isnan()
        expected = torch.zeros_like(is_nan)
        expected[networks, :, 4] = True
        assert torch.equal(is_nan, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_one_graph(kind, backend):
    given_arguments = arguments(kind)
    compiled = torch.compile(squashed_product, fullgraph=True, backend=backend)
    for ours, eager in zip(
        value_and_gradients(compiled, given_arguments),
        value_and_gradients(squashed_product, given_arguments),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(dtype):
    given_arguments = arguments(dtype=dtype)
    results = value_and_gradients(squashed_product, given_arguments)
    with torch.no_grad():
        results.append(squashed_product(**given_arguments))
    assert {each.dtype for each in results} == {dtype}
    assert torch.equal(results[0], results[-1])
    if dtype == torch.bfloat16:
        exact = squashed_product_reference(
            **{
                name: each.double() if isinstance(each, torch.Tensor) else each
                for name, each in given_arguments.items()
            }
        )
        torch.testing.assert_close(results[0].double(), exact, rtol=0.1, atol=0.1)


def test_half_precision_is_not_shifted():
    given_arguments = arguments(latents=6, rank=8, num_cells=8, samples=200, scaled=False)
    with torch.no_grad():
        given_arguments["factors"].mul_(0.3).add_(1.0)
        exact = squashed_product_reference(**given_arguments)
        halves = {k: each.half() if isinstance(each, torch.Tensor) else each for k, each in given_arguments.items()}
        error = squashed_product(**halves).double() / exact - 1
    assert error.mean().abs() < 2e-3  # 2 eps


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_precision(kind, fused):
    given_arguments = arguments(kind, dtype=torch.float32)
    expected = value_and_gradients(squashed_product, given_arguments)

    def automatic(x, **others):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return squashed_product(x=x, **others, fused=fused)

    for ours, exact in zip(value_and_gradients(automatic, given_arguments), expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_many_cotangents_at_one_time():
    given_arguments = arguments()
    product = squashed_product(**given_arguments)
    cotangents = torch.randn(3, *product.shape, dtype=product.dtype)
    found = torch.autograd.grad(product, leaves(given_arguments), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(product, leaves(given_arguments), cotangent, retain_graph=True)
        for ours, oracle in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[i], oracle)


def test_some_gradients_alone():
    given_arguments = arguments("own")
    expected = dict(zip(NAMES, value_and_gradients(squashed_product, given_arguments)[1:], strict=True))
    for name in NAMES:
        alone = {
            key: each.detach().requires_grad_(key == name) if isinstance(each, torch.Tensor) else each
            for key, each in given_arguments.items()
        }
        product = squashed_product(**alone)
        cotangent = torch.linspace(0.5, 1.5, product.numel(), dtype=product.dtype).view_as(product)
        (found,) = torch.autograd.grad(product, alone[name], cotangent)
        torch.testing.assert_close(found, expected[name])


@pytest.fixture
def fresh(monkeypatch):
    """The module as just imported, with no constants kept from other tests."""
    spec = importlib.util.find_spec("sna_core.squashed_product")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(globals(), "squashed_product", module.squashed_product)


def in_inference_mode(given_arguments):
    with torch.inference_mode():
        squashed_product(**given_arguments)


def in_an_export(given_arguments):
    class Module(torch.nn.Module):
        def forward(self, tensors):
            return squashed_product(**{**given_arguments, **tensors})

    tensors = {name: each.detach() for name, each in given_arguments.items() if isinstance(each, torch.Tensor)}
    exported = torch.export.export(Module(), (tensors,), strict=False).module()
    torch.testing.assert_close(exported(tensors), squashed_product_reference(**{**given_arguments, **tensors}))


def with_fake_tensors(given_arguments):
    mode = FakeTensorMode()
    fake = {
        name: mode.from_tensor(each.detach()) if isinstance(each, torch.Tensor) else each
        for name, each in given_arguments.items()
    }
    with mode:
        squashed_product(**fake)


@pytest.mark.parametrize("first_call", [in_inference_mode, in_an_export, with_fake_tensors])
def test_a_first_call_leaves_nothing_behind(first_call, fresh):
    given_arguments = arguments(degree=5, num_cells=2)
    first_call(given_arguments)
    check_agreement(given_arguments)
