import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sna_core.bspline import UniformBSpline
from sna_core.field import DECOMPOSITIONS, SeparableField, gauss, gram
from sna_core.field_table import FieldTable
from sna_core.graded import GradedBSpline, graded_breakpoints
from sna_core.spectral import ChebyshevBasis, FourierBasis, LegendreBasis, MLPAtoms

BASES = (
    UniformBSpline(5, 3, -1.0, 2.0),
    GradedBSpline(graded_breakpoints(-4.0, 2.0, 9, 0.0, 0.3), 2),
    ChebyshevBasis(6, 0.0, 2.0),
    FourierBasis(5, 0.0, 1.5),
    LegendreBasis(4, 1.0, 3.0),
    UniformBSpline(4, 0, 0.0, 0.7),
)
each_form = pytest.mark.parametrize("form", DECOMPOSITIONS)
each_basis = pytest.mark.parametrize("basis", BASES, ids=lambda basis: type(basis).__name__)


def field_of(form, bases=BASES, rank=3, seed=0, dtype=torch.float64):
    """A field with random parameters."""
    options = {"rank": rank}
    if form == "tucker":
        options["frame_sizes"] = [min(3 + i % 2, basis.num_basis) for i, basis in enumerate(bases)]
    if form == "tensor_train":
        options["rank"] = [rank + i % 2 for i in range(len(bases) - 1)]
    field = SeparableField(bases, decomposition=form, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return field


def points_in(bases, *shape, dtype=torch.float64):
    columns = [b.low + (b.high - b.low) * torch.rand(shape, dtype=torch.float64) for b in bases]
    ends = [(x.new_tensor(b.low), x.new_tensor(b.high)) for x, b in zip(columns, bases, strict=True)]
    return torch.stack([x.clamp(*pair) for x, pair in zip(columns, ends, strict=True)], -1).to(dtype)


def tensor_grid(bases, num_extra=0):
    """All points of the bases' quadrature rules, and their weights."""
    rules = [gauss(basis, num_extra) for basis in bases]
    points = torch.cartesian_prod(*[rule[0] for rule in rules]).view(-1, len(bases))
    weights = torch.cartesian_prod(*[rule[1] for rule in rules]).view(-1, len(bases)).prod(-1)
    return points, weights


@each_form
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (0,)])
def test_equals_the_formula(form, shape):
    field, points = field_of(form), points_in(BASES, *shape)
    assert field(points).shape == shape
    torch.testing.assert_close(field(points), field.reference_forward(points), rtol=1e-12, atol=1e-12)


def test_the_forms_are_those_of_their_formulas():
    points = points_in(BASES, 5)
    dense = [basis.dense(points[:, i]) for i, basis in enumerate(BASES)]
    for form in DECOMPOSITIONS:
        field = field_of(form)
        expected = []
        for p in range(5):
            values = [table[p] for table in dense]
            if form == "tensor_train":
                row = torch.ones(1, dtype=torch.float64)
                for core, value in zip(field.cores, values, strict=True):
                    row = sum(value[b] * (row @ core[:, b]) for b in range(len(value)))
                expected.append(row.item())
            else:
                if form == "tucker":
                    values = [value @ frame for value, frame in zip(values, field.frames, strict=True)]
                products = [value @ factor for value, factor in zip(values, field.factors, strict=True)]
                expected.append(torch.stack(products).prod(0).sum().item())
        torch.testing.assert_close(field(points), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-11)


def test_a_tucker_field_is_a_cp_field_and_starts_at_zero():
    tucker = field_of("tucker")
    cp = SeparableField(BASES, rank=3)
    assert torch.equal(cp(points_in(BASES, 3)), torch.zeros(3, dtype=torch.float64))
    with torch.no_grad():
        for factor, coefficient in zip(cp.factors, tucker.coefficients(), strict=True):
            factor.copy_(coefficient)
    points = points_in(BASES, 20)
    torch.testing.assert_close(cp(points), tucker(points), rtol=1e-11, atol=1e-11)
    assert cp.num_parameters() == 3 * sum(basis.num_basis for basis in BASES)
    assert cp.inner(tucker).item() == pytest.approx(tucker.norm().item() ** 2, rel=1e-11)


@each_form
def test_gradient_equals_autograd(form):
    field = field_of(form)
    points = points_in(BASES, 4, 6).requires_grad_()
    expected = torch.autograd.grad(field(points).sum(), points)[0]
    value, gradient = field.value_and_gradient(points)
    torch.testing.assert_close(value, field(points), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(field.gradient(points), gradient)
    smooth = BASES[:5]
    field, points = field_of(form, smooth), points_in(smooth, 3).requires_grad_()
    parameters = list(field.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: field(x), (points, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x, *_: field.gradient(x), (points, *parameters), fast_mode=True)


@each_basis
def test_quadrature_is_exact_for_products(basis):
    points, weights = gauss(basis)
    more, their_weights = gauss(basis, 7)
    assert len(more) > len(points)
    dense, denser = basis.dense(points), basis.dense(more)
    exact = denser.mT @ (their_weights[:, None] * denser)
    torch.testing.assert_close(gram(basis), exact, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(weights @ dense, their_weights @ denser, rtol=1e-12, atol=1e-13)
    assert weights.sum().item() == pytest.approx(basis.high - basis.low)
    if isinstance(basis, UniformBSpline | GradedBSpline):
        torch.testing.assert_close(gram(basis), basis.gram(), rtol=1e-12, atol=1e-15)


def test_gram_matrices_of_orthogonal_functions():
    width = 2.0
    expected = [width / (2 * b + 1) for b in range(4)]
    torch.testing.assert_close(gram(BASES[4]), torch.tensor(expected, dtype=torch.float64).diag(), rtol=0, atol=1e-13)
    expected = [1.5, *[0.75] * 4]
    torch.testing.assert_close(gram(BASES[3]), torch.tensor(expected, dtype=torch.float64).diag(), rtol=0, atol=1e-13)


@each_form
@pytest.mark.parametrize("axes", [(0,), (5,), (2, 3), (0, 2, 5), (1, 3, 4, 5), (0, 1, 2, 3, 4)])
def test_restriction_is_the_field_on_a_slice(form, axes):
    field, points = field_of(form), points_in(BASES, 8)
    values = {i: points[0, i].item() for i in axes}
    points[:, list(axes)] = points[0, list(axes)]
    kept = [i for i in range(6) if i not in axes]
    slice_ = field.restrict(values)
    assert (slice_.bases, slice_.decomposition) == (tuple(BASES[i] for i in kept), form)
    torch.testing.assert_close(slice_(points[:, kept]), field(points), rtol=1e-11, atol=1e-11)


@each_form
@pytest.mark.parametrize("axes", [(0,), (5,), (1, 3), (2, 3, 4)])
def test_integration_is_exact(form, axes):
    field = field_of(form)
    kept = [i for i in range(6) if i not in axes]
    nodes, weights = tensor_grid([BASES[i] for i in axes])
    points = points_in([BASES[i] for i in kept], 3)
    full = torch.empty(3, len(nodes), 6, dtype=torch.float64)
    full[..., kept], full[..., list(axes)] = points.unsqueeze(1), nodes
    torch.testing.assert_close(field.integrate(axes)(points), field(full) @ weights, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("left", DECOMPOSITIONS)
@pytest.mark.parametrize("right", DECOMPOSITIONS)
def test_inner_products_are_exact(left, right):
    bases = (BASES[1], BASES[2], BASES[3])
    first, second = field_of(left, bases), field_of(right, bases, rank=2, seed=1)
    points, weights = tensor_grid(bases)
    u, v = first(points).detach(), second(points).detach()
    assert first.inner(second).item() == pytest.approx((weights * u * v).sum().item(), rel=1e-11)
    assert first.norm().item() == pytest.approx((weights * u * u).sum().sqrt().item(), rel=1e-11)
    assert first.integral().item() == pytest.approx((weights * u).sum().item(), rel=1e-10, abs=1e-11)


@each_form
def test_a_single_axis(form):
    bases = (BASES[1],)
    field, points = field_of(form, bases), points_in(bases, 9)
    torch.testing.assert_close(field(points), field.reference_forward(points))
    nodes, weights = gauss(bases[0])
    values = field(nodes.unsqueeze(-1)).detach()
    assert field.integral().item() == pytest.approx((weights @ values).item())
    assert field.norm().item() == pytest.approx((weights @ values**2).sqrt().item())
    torch.testing.assert_close(FieldTable(field, torch.float64)(points), field(points).detach())


def test_fields_are_saved_and_moved_to_another_dtype():
    for form in DECOMPOSITIONS:
        field, other = field_of(form), field_of(form, seed=1)
        other.load_state_dict(field.state_dict())
        points = points_in(BASES, 4)
        assert torch.equal(field(points), other(points))
        assert other.float().dtype == torch.float32
        assert other.restrict({0: 0.5}).dtype == torch.float32
        assert form in repr(field)


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_equals_the_field(form, dtype):
    field = field_of(form)
    ends = torch.tensor([[basis.low, basis.high] for basis in BASES], dtype=torch.float64).mT
    points = torch.cat([points_in(BASES, 3000), ends])
    table = FieldTable(field, dtype)
    table.chunk_size = 700
    expected = field(points).detach()
    values = table(points)
    assert values.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (values.double() - expected).abs().max() <= tolerance * expected.abs().max()
    if dtype == torch.float32:  # points rounded before they are placed
        lower, upper = ends.float()
        rounded = points.float().clamp(lower, upper)
        inside = ((rounded.double() >= ends[0]) & (rounded.double() <= ends[1])).all(-1)
        expected = field(rounded[inside].double()).detach()
        assert (table(rounded)[inside].double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert table(points[:0]).shape == (0,)


@given(
    degree=st.integers(0, 5),
    num_cells=st.integers(1, 40),
    low=st.floats(-5, 5),
    width=st.floats(0.1, 10),
    is_graded=st.booleans(),
)
def test_the_table_equals_the_field_at_knots(degree, num_cells, low, width, is_graded):
    basis = UniformBSpline(num_cells, degree, low, low + width)
    if is_graded:
        finest = width / num_cells / 5
        basis = GradedBSpline(graded_breakpoints(low, low + width, num_cells, low + width / 3, finest), degree)
    field = field_of("cp", (basis, basis), rank=2)
    knots = basis.knots()[degree : degree + num_cells + 1].clamp(basis.low, basis.high)
    x = torch.cat([knots, *[knots.nextafter(knots.new_tensor(end)) for end in (basis.low, basis.high)]])
    points = torch.stack([x, x.flip(0)], -1)
    expected = field(points).detach()
    values = FieldTable(field, torch.float64)(points)
    assert (values - expected).abs().max() <= 1e-11 * expected.abs().max()


@each_form
def test_the_table_keeps_factors_of_any_size(form):
    bases = BASES[:2] * 4
    field = field_of(form, bases)
    tensors = field.cores if form == "tensor_train" else field.factors
    points = points_in(bases, 500)
    plain = field(points).detach()
    with torch.no_grad():
        for i, tensor in enumerate(tensors):
            tensor *= 1e-18 if i < 4 else 1e18
    values = FieldTable(field)(points)
    assert (values.double() - plain).abs().max() <= 1e-5 * plain.abs().max()
    with torch.no_grad():
        tensors[0].zero_()
    assert torch.equal(FieldTable(field)(points), torch.zeros(500))


UNIT = (UniformBSpline(3, 2), UniformBSpline(4, 1), LegendreBasis(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SeparableField([], rank=2), "bases is empty"),
        (lambda: SeparableField([UNIT[0], MLPAtoms(3)], rank=2), r"bases\[1\] is a MLPAtoms; expected one of"),
        (lambda: SeparableField(UNIT, decomposition="hosvd", rank=2), "decomposition = 'hosvd'; expected one of"),
        (lambda: SeparableField(UNIT, rank=0), "rank = 0; expected an integer of at least 1"),
        (lambda: SeparableField(UNIT, rank=[2, 2]), r"rank = \[2, 2\]; expected an integer"),
        (lambda: SeparableField(UNIT, rank=2, frame_sizes=[2, 2, 2]), "'tucker' takes one for each axis"),
        (lambda: SeparableField(UNIT, decomposition="tucker", rank=2), "frame_sizes = None with decomposition"),
        (lambda: SeparableField(UNIT, decomposition="tucker", rank=2, frame_sizes=[2, 2]), "for 3 axes; expected one"),
        (
            lambda: SeparableField(UNIT, decomposition="tucker", rank=2, frame_sizes=[2, 2, 4]),
            r"frame_sizes\[2\] = 4; expected at most the 3 functions",
        ),
        (
            lambda: SeparableField(UNIT, decomposition="tucker", rank=2, frame_sizes=[2, 0, 2]),
            r"frame_sizes\[1\] = 0; expected an integer",
        ),
        (lambda: SeparableField(UNIT, decomposition="tensor_train", rank=[2]), "for 3 axes; expected 2 inner ranks"),
        (lambda: SeparableField(UNIT, decomposition="tensor_train", rank=[2, 0]), r"rank\[1\] = 0"),
        (lambda: SeparableField(UNIT, rank=2)(torch.rand(4, 2).double()), r"shape \(4, 2\); expected \(\.\.\., 3\)"),
        (lambda: SeparableField(UNIT, rank=2)(torch.rand(4, 3)), r"convert with x\.to\(torch\.float64\)"),
        (
            lambda: SeparableField(UNIT, rank=2)(torch.tensor([[0.5, 0.5, 1.25]]).double()),
            r"x\[0, 2\] = 1\.25 lies outside input 2's interval \[0, 1\]",
        ),
        (
            lambda: SeparableField(UNIT, rank=2).gradient(torch.tensor([0.5, math.nan, 0.5]).double()),
            "is not a number",
        ),
        (lambda: SeparableField(UNIT, rank=2).restrict({1: 1.5}), r"x\[1\] = 1\.5 lies outside input 1's interval"),
        (lambda: SeparableField(UNIT, rank=2).restrict({3: 0.5}), "axis 3 is unknown; expected an index from 0 to 2"),
        (lambda: SeparableField(UNIT, rank=2).restrict({"x": 0.5}), "axis 'x' is unknown"),
        (lambda: SeparableField(UNIT, rank=2).restrict({0: 0.5, 1: 0.5, 2: 0.5}), "call the field at the point"),
        (lambda: SeparableField(UNIT, rank=2).integrate([0, 1, 2]), "integrate was given all 3 axes; .*integral"),
        (lambda: SeparableField(UNIT, rank=2).integrate([-1]), "axis -1 is unknown"),
        (lambda: SeparableField(UNIT, rank=2).restrict({}), "restrict was given no axis"),
        (lambda: SeparableField(UNIT, rank=2).inner(SeparableField(UNIT[:2], rank=2)), "different bases"),
        (lambda: gauss(UNIT[0], -1), "num_extra = -1"),
        (lambda: FieldTable(SeparableField(UNIT, rank=2))(torch.rand(3)), r"shape \(3,\); expected .* \(N, 3\)"),
        (lambda: FieldTable(SeparableField(UNIT, rank=2))(torch.ones(2, 3, dtype=torch.int64)), "torch.int64"),
        (
            lambda: FieldTable(SeparableField(UNIT, rank=2))(torch.tensor([[0.5, 0.5, -0.25]])),
            r"x\[0, 2\] = -0\.25 lies outside input 2's interval",
        ),
        (
            lambda: FieldTable(SeparableField(UNIT, rank=2))(torch.tensor([[0.5, math.nan, 0.25]])),
            "is not a number",
        ),
    ],
)
def test_bad_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
