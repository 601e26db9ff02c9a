import pytest
import torch

from sna_core import local_sum as module
from sna_core.bspline import UniformBSpline
from sna_core.local_sum import local_sum, local_sum_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the kernel runs, on a CPU interpreted
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
INTERVALS = ((0.0, 1.0), (-1.0, 2.5))
degrees = pytest.mark.parametrize("degree", range(6))
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def splines(num_cells=7, degree=3):
    return [UniformBSpline(num_cells, degree, *interval) for interval in INTERVALS]


def inputs(num_cells=7, degree=3, functions=(3,), num_points=20, dtype=torch.float64, device="cpu"):
    """Points inside the intervals, away from the knots, and factors, as leaves."""
    cells = torch.randint(num_cells, (num_points, 2)) + 0.1 + 0.8 * torch.rand(num_points, 2, dtype=torch.float64)
    low, high = torch.tensor(INTERVALS, dtype=torch.float64).unbind(1)
    x = low + (high - low) * cells / num_cells
    factors = torch.randn(2, num_cells + degree, *functions)
    return [t.to(device, dtype).requires_grad_() for t in (x, factors)]


def with_knots(x, num_cells):
    """The points, and every knot of each interval, as PyTorch rounds it."""
    steps = torch.arange(num_cells + 1, dtype=x.dtype, device=x.device) / num_cells
    return torch.cat([x.detach(), torch.stack([low + (high - low) * steps for low, high in INTERVALS], -1)])


def assert_close(ours, oracle, tolerance=None):
    tolerance = tolerance or TOLERANCE[ours.dtype]
    atol = tolerance * max(1.0, oracle.abs().max().item())
    torch.testing.assert_close(ours, oracle, rtol=tolerance, atol=atol)


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="Triton, which is optional and in the extra `test`, is not installed")
    from sna_core import local_sum_triton

    return local_sum_triton


@pytest.fixture(params=["pytorch", "triton"])
def path(request, monkeypatch):
    """Either way of evaluation, whose derivatives are the same code."""
    if request.param == "triton":
        kernels = request.getfixturevalue("kernels")
        monkeypatch.setattr(module, "_uses_kernels", lambda x: kernels.is_available(x))
    return request.param


@dtypes
@degrees
@pytest.mark.parametrize("num_cells", [1, 7])
def test_equals_the_plain_twin_at_every_order(num_cells, degree, dtype):
    x, factors = inputs(num_cells, degree, functions=(2, 3), dtype=dtype)
    x = with_knots(x, num_cells).reshape(1, -1, 2)
    for derivative in range(degree + 2):
        found = local_sum(x, factors, splines(num_cells, degree), derivative, check=False)
        assert found.shape == (2, *x.shape[:-1], 2, 3)
        assert_close(found, local_sum_reference(x, factors, splines(num_cells, degree), derivative, check=False))


@pytest.mark.parametrize("points", [(), (0,), (5,), (2, 0, 3), (2, 3)])
@pytest.mark.parametrize("functions", [(), (1,), (2, 3), (0,)])
def test_shapes(points, functions):
    x, factors = torch.rand(*points, 2), torch.rand(2, 10, *functions)
    found = local_sum(x, factors, splines())
    assert found.shape == (2, *points, *functions)
    torch.testing.assert_close(found, local_sum_reference(x, factors, splines()))


@pytest.mark.parametrize("degree", [0, 1, 3])
@pytest.mark.parametrize("derivative", [0, 1])
def test_derivatives_of_any_order_in_either_mode(degree, derivative):
    tensors = inputs(2, degree, functions=(2,), num_points=2)

    def f(x, factors):
        return local_sum(x, factors, splines(2, degree), derivative, check=False)

    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, tensors, check_fwd_over_rev=True)


@dtypes
@pytest.mark.parametrize("derivative", [0, 1])
def test_gradients_equal_those_of_the_plain_twin(derivative, dtype, path):
    tensors = inputs(functions=(2, 3), dtype=dtype, device=DEVICE if path == "triton" else "cpu")
    cotangent = torch.randn(2, 20, 2, 3).to(tensors[0])
    results = []
    for f in (local_sum, local_sum_reference):
        y = f(*tensors, splines(), derivative)
        results.append([y, *torch.autograd.grad(y, tensors, cotangent)])
    for ours, oracle in zip(*results, strict=True):
        assert_close(ours, oracle)


def test_the_derivative_in_x_is_the_next_order():
    x, factors = inputs()
    result = local_sum(x, factors, splines())
    for derivative in range(1, 6):  # the fourth and the fifth are zero, not missing
        (slope,) = torch.autograd.grad(result.sum((0, -1)).sum(), x, create_graph=True)
        expected = local_sum_reference(x, factors, splines(), derivative).sum(-1).mT
        assert_close(slope, expected)
        result = slope.mT.unsqueeze(-1)


def scalar(x, factors):
    """A function of one point that is not linear in the factors."""
    return local_sum(x, factors, splines(), check=False).square().sum(-1).prod()


def reference_scalar(x, factors):
    return local_sum_reference(x, factors, splines(), check=False).square().sum(-1).prod()


@pytest.mark.parametrize("batched", [(0, None), (None, 0), (0, 0), (1, -1)], ids=str)
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: torch.func.grad(f, (0, 1)),
        lambda f: torch.func.jacfwd(f, (0, 1)),
        lambda f: torch.func.hessian(f),
        lambda f: torch.func.jacrev(torch.func.jacrev(f), 1),
        lambda f: torch.func.jacfwd(torch.func.grad(f, 1), 1),
    ],
    ids=["value", "grad", "jacfwd", "hessian", "mixed", "hessian in factors"],
)
def test_transforms(transform, batched, path):
    x_dim, factors_dim = batched
    x, factors = (t.detach() for t in inputs(functions=(2,), num_points=3))
    x = x[0] if x_dim is None else x.movedim(0, x_dim)
    factors = factors if factors_dim is None else torch.stack([factors, -factors, 2 * factors], factors_dim)
    found = torch.func.vmap(transform(scalar), batched)(x, factors)
    expected = torch.func.vmap(transform(reference_scalar), batched)(x, factors)
    torch.testing.assert_close(found, expected)


def test_nested_batches():
    x, factors = (t.detach() for t in inputs(num_points=6))
    x, factors = x.view(2, 3, 2), torch.stack([factors, -factors])
    found, expected = (
        torch.func.vmap(torch.func.vmap(torch.func.grad(f, 1), (0, None)), (0, 0))(x, factors)
        for f in (scalar, reference_scalar)
    )
    torch.testing.assert_close(found, expected)


def test_compiles_to_one_graph_with_its_gradient():
    tensors = inputs()

    def f(x, factors):
        return local_sum(x, factors, splines(), check=False).square().sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(f(*tensors), tensors), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, f, s: (x[:, :1], f, s), r"x has shape \(20, 1\); expected \(\.\.\., 2\), a column for each input\."),
        (lambda x, f, s: (x.float(), f, s), r"x is torch\.float32 and the factors are torch\.float64; convert with"),
        (lambda x, f, s: (x, f[:, 1:], s), r"factors have shape \(2, 9, 3\); expected \(2, 10, \.\.\.\)"),
        (lambda x, f, s: (x, f[:1], s), r"factors have shape \(1, 10, 3\)"),
        (lambda x, f, s: (x, f, [s[0], UniformBSpline(8, 2)]), "the splines differ in num_cells or degree"),
        (lambda x, f, s: (x, f, s, -1), "derivative = -1; expected an integer of at least 0"),
        (lambda x, f, s: (x - 3, f, s), r"x\[0, 0\] = .* lies outside input 0's interval \[0, 1\]"),
        (lambda x, f, s: (x * torch.nan, f, s), r"x\[0, 0\] = nan is not a number"),
    ],
)
def test_bad_arguments_raise(change, message):
    x, factors = inputs()
    with pytest.raises(ValueError, match=message):
        local_sum(*change(x, factors, splines()))


def by_kernel(kernels, x, factors, of, derivative=0):
    low = x.new_tensor([[s.low] for s in of])
    width = x.new_tensor([[s.high - s.low] for s in of])
    return kernels.local_sum_triton(x.mT, factors, low, width, of[0].num_cells, of[0].degree, derivative)


@dtypes
@degrees
@pytest.mark.parametrize("num_cells", [1, 7])
def test_the_kernel_equals_the_plain_twin(kernels, num_cells, degree, dtype):
    x, factors = inputs(num_cells, degree, dtype=dtype, device=DEVICE)
    x = with_knots(x, num_cells)
    for derivative in range(degree + 2):
        of = splines(num_cells, degree)
        found = by_kernel(kernels, x, factors, of, derivative)
        assert_close(found, local_sum_reference(x, factors, of, derivative, check=False))


@pytest.mark.parametrize("num_functions", [1, 5, 150])
def test_the_kernel_takes_several_blocks(kernels, num_functions, monkeypatch):
    monkeypatch.setattr(kernels, "TILE_NUMEL", 256)
    x, factors = inputs(functions=(num_functions,), num_points=300 // num_functions + 1, device=DEVICE)
    found = by_kernel(kernels, x, factors, splines())
    assert_close(found, local_sum_reference(x, factors, splines()))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_kernel_computes_in_float32_for_less(kernels, half):
    x, factors = inputs(dtype=half, device=DEVICE)
    found = by_kernel(kernels, x, factors, splines())
    assert found.dtype == half
    expected = local_sum_reference(x.double(), factors.double(), splines(), check=False)
    assert_close(found.double(), expected, tolerance=1e-2)


def test_the_kernel_reads_no_row_for_a_nan(kernels):
    x, factors = inputs(device=DEVICE)
    x = x.detach()
    x[3, 0], x[4, 1] = torch.nan, torch.inf
    found = by_kernel(kernels, x, factors, splines())
    assert found[0, 3].isnan().all()
    assert found[0, [0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("sizes", [{"num_points": 0}, {"functions": (0,)}])
def test_the_kernel_takes_nothing(kernels, sizes):
    x, factors = inputs(**sizes, device=DEVICE)
    assert by_kernel(kernels, x, factors, splines()).shape == (2, x.shape[0], factors.shape[2])


def test_the_kernel_compiles_for_a_gpu(kernels, compile_for_gpus):
    def variant(dtype, degree, derivative, **constants):
        pointers = dict.fromkeys(["x", "factors", "low", "width", "sums"], dtype)
        counts = dict.fromkeys(["num_points", "num_functions", "num_cells"], "i32")
        polynomials = tuple(map(tuple, kernels.CELL_POLYNOMIALS[degree, derivative]))
        settings = {"DEGREE": degree, "DERIVATIVE": derivative, "POLYNOMIALS": polynomials}
        return pointers | counts, settings | {"BLOCK_POINTS": 128, "BLOCK_FUNCTIONS": 8} | constants

    ones = dict.fromkeys(["num_points", "num_functions", "num_cells"], 1)  # Triton makes constants of them
    variants = [variant("*fp32", 3, 0), variant("*fp64", 3, 3), variant("*bf16", 2, 1), variant("*fp32", 0, 0, **ones)]
    compile_for_gpus("sna_core.local_sum_triton", "_evaluate_kernel", variants)


@pytest.mark.gpu
@dtypes
def test_a_gpu_computes_what_the_plain_twin_does(dtype, kernels, monkeypatch):
    tensors = inputs(functions=(2, 40), num_points=5000, dtype=dtype, device="cuda")
    calls = []
    kernel = kernels.local_sum_triton
    monkeypatch.setattr(kernels, "local_sum_triton", lambda *a: calls.append(a) or kernel(*a))
    for derivative in range(4):
        cotangent = torch.randn(2, 5000, 2, 40, dtype=dtype, device="cuda")
        results = []
        for f in (local_sum, local_sum_reference):
            y = f(*tensors, splines(), derivative)
            results.append([y, *torch.autograd.grad(y, tensors, cotangent)])
        for ours, oracle in zip(*results, strict=True):
            assert_close(ours, oracle, 10 * TOLERANCE[dtype])
    assert len(calls) == 8
