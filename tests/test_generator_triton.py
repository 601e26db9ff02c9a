import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sna_core import generator
from sna_core.generator import separable_product, separable_product_reference

pytest.importorskip("triton", reason="Triton, which is optional and in the extra `test`, is not installed")
from sna_core import generator_triton
from sna_core.generator_triton import separable_product_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # interpreted
# Relative errors in the norm. Below float32 it is the rounding of the basis, and of gradients, a few times over.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def inputs(heads=2, tokens=37, seed=4, knots=6, rank=5, dtype=torch.float32, scaled=True, device=DEVICE):
    """Coordinates, splines of both signs in ``dtype`` and scale, as leaves."""
    coordinates = torch.rand(heads, tokens, seed)
    splines = torch.randn(heads, seed, knots, rank).to(dtype)
    scale = 0.8 + 0.3 * torch.rand(heads, seed)
    return [t.to(device).requires_grad_() for t in (coordinates, splines, scale)[: 2 + scaled]]


@contextmanager
def float32_precision(setting):
    """As transformers' Trainer sets it, after which torch.get_float32_matmul_precision raises."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def in_float64(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def value_and_gradients(product_of, tensors, normalize=True):
    scale = tensors[2] if len(tensors) > 2 else None
    product = product_of(tensors[0], tensors[1], scale, normalize)
    cotangent = torch.linspace(-1, 2, product.numel(), dtype=product.dtype, device=product.device)
    return [product.detach(), *torch.autograd.grad(product, tensors, cotangent.view_as(product))]


def assert_close(found, expected, tolerance):
    for ours, oracle in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        error = (ours.double() - oracle).norm() / oracle.norm().clamp(min=1e-9)
        assert error <= tolerance, f"{error:.1e}"


@dtypes
@given(data=st.data(), normalize=st.booleans(), scaled=st.booleans())
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_value_and_gradients_equal_the_plain_twin_in_float64(dtype, data, normalize, scaled):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    sizes = {"heads": (1, 2), "tokens": (1, 70), "seed": (1, 5), "knots": (2, 20), "rank": (1, 70)}
    sizes = {name: data.draw(st.integers(*bounds), label=name) for name, bounds in sizes.items()}
    tensors = inputs(**sizes, dtype=dtype, scaled=scaled)
    found = value_and_gradients(separable_product_triton, tensors, normalize)
    expected = value_and_gradients(separable_product, in_float64(tensors), normalize)
    assert found[0].dtype == torch.float32
    assert [g.dtype for g in found[1:]] == [t.dtype for t in tensors]
    assert_close(found, expected, TOLERANCE[dtype])
    with torch.no_grad():  # keeps nothing for backward
        assert torch.equal(separable_product_triton(*tensors, normalize=normalize), found[0])


@pytest.mark.parametrize("knots", [33, 128])
def test_many_knots_take_smaller_tiles(knots):
    tensors = inputs(1, 20, 2, knots, 40)
    found = value_and_gradients(separable_product_triton, tensors)
    assert_close(found, value_and_gradients(separable_product, in_float64(tensors)), TOLERANCE[torch.float32])


@pytest.mark.parametrize("normalize", [False, True])
def test_value_equals_the_reference(normalize):
    tensors = inputs()
    expected = separable_product_reference(*in_float64(tensors), normalize)
    assert_close([separable_product_triton(*tensors, normalize)], [expected], TOLERANCE[torch.float32])


@dtypes
@pytest.mark.parametrize("num_zero_rows", [1, 2])
def test_gradient_is_exact_where_factors_are_zero(dtype, num_zero_rows):
    tensors = inputs(1, 9, 5, dtype=dtype)
    with torch.no_grad():
        tensors[1][0, 1:3, :, 0] = 0  # two zero factors in one component of the rank, besides
        tensors[1][0, 2 : 2 + num_zero_rows] = 0
    found = value_and_gradients(separable_product_triton, tensors)
    expected = value_and_gradients(separable_product, in_float64(tensors))
    assert (found[0] == 0).all()
    assert torch.equal(found[2] == 0, expected[2] == 0)
    assert bool((found[2] != 0).any()) == (num_zero_rows == 1)
    assert_close(found, expected, TOLERANCE[dtype])


def test_a_point_that_no_basis_function_reaches_is_no_nan():
    coordinates = torch.full((1, 2, 3), 1.5 / 5, device=DEVICE).requires_grad_()  # midway between knots
    splines = torch.randn(1, 3, 6, 2, device=DEVICE).requires_grad_()
    scale = torch.full((1, 3), 4.0, device=DEVICE).requires_grad_()
    product, *gradients = value_and_gradients(separable_product_triton, [coordinates, splines, scale])
    assert (product == 0).all()
    assert all(g.isfinite().all() for g in gradients)


def test_a_nan_stays_one():
    tensors = inputs(1, 3, 4)
    with torch.no_grad():
        tensors[0][0, 1, 2] = torch.nan
    product = separable_product_triton(*tensors)
    assert product[0, 1].isnan().all()
    assert product[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"heads": 0}, {"rank": 0}])
def test_empty_inputs(sizes):
    tensors = inputs(**sizes)
    found = value_and_gradients(separable_product_triton, tensors)
    assert found[0].shape == (*tensors[0].shape[:2], tensors[1].shape[3])
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(found[1:], tensors, strict=True))


def test_strides_do_not_matter():
    coordinates, splines, scale = inputs()
    expected = value_and_gradients(separable_product_triton, [coordinates, splines, scale])
    strided = [
        coordinates.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_(),
        splines.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(),
        scale.detach().t().contiguous().t().requires_grad_(),
    ]
    product = separable_product_triton(*strided)
    cotangent = torch.linspace(-1, 2, product.numel(), device=DEVICE).view_as(product)
    cotangent = cotangent.transpose(1, 2).contiguous().transpose(1, 2)
    gradients = torch.autograd.grad(product, strided, cotangent)
    for ours, before in zip([product, *gradients], expected, strict=True):
        torch.testing.assert_close(ours.detach(), before)


def test_chunks_add_up_and_determinism_takes_one(monkeypatch):
    tensors = inputs(1, 150, 2, rank=3)
    monkeypatch.setattr(generator_triton, "CHUNK_TOKENS", 64)
    in_chunks = value_and_gradients(separable_product_triton, tensors)
    torch.use_deterministic_algorithms(True)  # also fills what is not written with NaN
    try:
        in_one, again = (value_and_gradients(separable_product_triton, tensors) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for chunked, whole, repeated in zip(in_chunks, in_one, again, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(whole, repeated)


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("ieee", torch.float32, 1e-5),
        ("tf32", torch.float32, 4e-3),
        ("ieee", torch.float16, 1e-3),
        ("ieee", torch.bfloat16, 8e-3),
    ],
)
def test_rounding_is_no_bias_that_many_factors_multiply(precision, dtype, tolerance):
    coordinates = torch.rand(1, 20, 64, device=DEVICE).requires_grad_()
    splines = (1 + 0.1 * torch.randn(1, 64, 16, 20, device=DEVICE)).to(dtype).requires_grad_()  # as at the start
    with float32_precision(precision):
        found = value_and_gradients(separable_product_triton, [coordinates, splines])
    expected = value_and_gradients(separable_product, in_float64([coordinates, splines]))
    assert_close(found, expected, tolerance)


def test_float32_products_are_exact_unless_pytorch_may_use_tf32():
    precisions = []
    for setting in ("ieee", "tf32"):
        with float32_precision(setting):
            precisions.append(generator_triton._settings(torch.empty(1, 1, 4, 4), True)["PRECISION"])
    assert precisions == ["ieee", "tf32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, s, c: (z.double(), s, c), r"coordinates: torch\.float64; expected float32, bfloat16 or float16"),
        (lambda z, s, c: (z, s.double(), c), r"splines: torch\.float64; .* in which the kernels compute"),
        (lambda z, s, c: (z, s, c.double()), r"scale: torch\.float64"),
        (lambda z, s, c: (z, s[:, 1:], c), r"splines: shape \(2, 3, 6, 5\); expected \(2, 4, 2 to 128 knots, rank\)"),
        (lambda z, s, c: (z, s[..., :1, :], c), r"2 to 128 knots"),
        (lambda z, s, c: (z, s.expand(30, 2, 4, 6, 5).movedim(0, 2).flatten(2, 3), c), r"2 to 128 knots"),
        (lambda z, s, c: (z, s, c[:1]), r"scale: shape \(1, 4\); expected \(2, 4\)"),
        (lambda z, s, c: (z, s.to("meta"), c), r"splines: on meta, and the coordinates on"),
    ],
)
def test_bad_arguments_raise(change, message):
    with pytest.raises(ValueError, match=message):
        separable_product_triton(*change(*inputs()))


def test_a_device_without_the_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(generator_triton, "INTERPRETED", False)
    assert not generator_triton.is_available(torch.empty(1))
    with pytest.raises(ValueError, match=r"do not run on cpu; they need a CUDA device of capability 8\.0"):
        separable_product_triton(*inputs(device="cpu"))


def test_the_cpu_takes_the_block_path_and_converts_splines(monkeypatch):
    monkeypatch.setattr(generator, "_kernels", lambda: pytest.fail("imported the kernels"))
    coordinates, splines, scale = inputs(dtype=torch.bfloat16, device="cpu")
    found = value_and_gradients(separable_product, [coordinates, splines, scale])
    expected = value_and_gradients(separable_product, [coordinates, splines.detach().float().requires_grad_(), scale])
    assert found[2].dtype == torch.bfloat16
    for ours, converted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, converted.to(ours.dtype))


def test_without_triton_there_are_no_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises ImportError
    monkeypatch.delitem(sys.modules, "sna_core.generator_triton")
    monkeypatch.delattr("sna_core.generator_triton")
    assert generator._kernels.__wrapped__() is None


def test_the_kernels_compile_for_a_gpu(compile_for_gpus):
    def variant(splines, pointers, counts, **constants):
        types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(counts, "i32") | {"num_zeros": "*i8"}
        settings = generator_triton._settings(splines, True) | {"INTERPRETED": False}
        return types | {"splines": "*bf16" if splines.dtype == torch.bfloat16 else "*fp32"}, settings | constants

    module = "sna_core.generator_triton"
    low, single = torch.empty(8, 128, 16, 64, dtype=torch.bfloat16), torch.empty(1, 1, 2, 1)
    names = ["coordinates", "scale", "product", "nonzero_product"], ["num_tokens", "seed_dim", "rank"]
    without = dict.fromkeys(["scale", "nonzero_product", "num_zeros"])
    ones = dict.fromkeys(names[1], 1)  # Triton makes constants of them
    compile_for_gpus(module, "_forward_kernel", [variant(low, *names), variant(single, *names, **without, **ones)])
    names = (
        ["coordinates", "scale", "weighted", "to_coordinates", "to_splines", "to_scale"],
        ["num_tokens", "chunk_tokens", "num_heads", "rank"],
    )
    without, ones = dict.fromkeys(["scale", "to_scale"]), dict.fromkeys(names[1], 1)
    variants = [variant(low, *names, ADD=True), variant(single, *names, ADD=False, **without, **ones)]
    compile_for_gpus(module, "_backward_kernel", variants)


@pytest.mark.gpu
@dtypes
def test_a_gpu_computes_what_the_plain_twin_does(dtype, monkeypatch):
    tensors = inputs(8, 5000, 16, 16, 64, dtype=dtype)  # several chunks, whose sums are added atomically
    with torch.no_grad():
        tensors[1][:, 3, :, 0] = 0
    found = value_and_gradients(separable_product_triton, tensors)
    assert_close(found, value_and_gradients(separable_product, in_float64(tensors)), TOLERANCE[dtype])
    calls = []
    fused = generator_triton.separable_product_triton
    monkeypatch.setattr(generator_triton, "separable_product_triton", lambda *a: calls.append(a) or fused(*a))
    separable_product(*tensors)
    separable_product(*in_float64(tensors))
    assert len(calls) == 1
