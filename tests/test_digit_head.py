import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sna_core.digit_head import DigitHead

# (num_embeddings, base, num_digits): powers of the base and not, and bases with digits that no id has.
LAYOUTS = [
    (7, None, 1),
    (1, 2, 1),
    (64, 8, 2),
    (50, 8, 2),
    (27, 3, 3),
    (20, 3, 3),
    (16, 2, 4),
    (11, 2, 4),
    (5, 4, 3),
]


def small(num_embeddings=50, base=8, num_digits=2, dtype=torch.float64, hidden_size=6, rank=5):
    """A small head away from its initial values, with negative factors among the digits'."""
    head = DigitHead(hidden_size, num_embeddings, base, num_digits, rank, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter))
    return head


def hidden_for(head, *shape):
    return torch.randn(*shape, head.hidden_size, dtype=head.first_weight.dtype)


def brute_force(head, hidden, number):
    """The formula as written, for one hidden state and one id: the oracle of the head."""
    k, base = head.num_digits, head.base
    digits = [number // base ** (k - q) % base for q in range(1, k + 1)]
    pairs = [(q, p) for q in range(2, k + 1) for p in range(1, q)]
    table = dict(zip(pairs, head.digit_factors, strict=True)) if pairs else {}
    log_p = 0.0
    for q in range(1, k + 1):
        if q == 1:
            logits = head.first_weight @ hidden + head.first_bias
        else:
            components = head.hidden_weight[q - 2] @ hidden + head.hidden_bias[q - 2]
            for p in range(1, q):
                components = components * table[q, p][digits[p - 1]]
            logits = head.out_weight[q - 2] @ components + head.out_bias[q - 2]
        numbered = {v // base ** (k - q) for v in range(head.num_embeddings)}
        prefix = number // base ** (k - q + 1)
        allowed = [d for d in range(base) if prefix * base + d in numbered]
        log_p = log_p + logits[digits[q - 1]] - logits[allowed].logsumexp(0)
    return log_p


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_log_prob_and_forward_are_the_formula(layout):
    head = small(*layout)
    hidden = hidden_for(head, 3)
    expected = torch.stack([torch.stack([brute_force(head, h, v) for v in range(layout[0])]) for h in hidden])
    torch.testing.assert_close(head(hidden), expected)
    ids = torch.arange(layout[0]).expand(3, -1)
    states = hidden.unsqueeze(1).expand(-1, layout[0], -1)
    torch.testing.assert_close(head.log_prob(states, ids), expected)
    torch.testing.assert_close(head.expectation(hidden), (expected.exp() * ids).sum(-1))


@given(st.integers(1, 500), st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.integers(0, 2**31))
def test_probabilities_of_the_ids_sum_to_one(num_embeddings, num_digits, larger, rank, seed):
    torch.manual_seed(seed)
    least = DigitHead(1, num_embeddings, num_digits=num_digits).base
    head = small(num_embeddings, least + larger, num_digits, hidden_size=3, rank=rank)
    hidden = hidden_for(head, 2)
    log_p = head(hidden)
    assert log_p.shape == (2, num_embeddings)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, dtype=torch.float64))
    ids = torch.randint(0, num_embeddings, (2,))
    torch.testing.assert_close(head.log_prob(hidden, ids), log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1))


def test_leading_shapes_are_free():
    head = small(20, 3, 3)
    hidden, ids = hidden_for(head, 2, 4), torch.randint(0, 20, (2, 4), dtype=torch.int32)
    assert head(hidden).shape == (2, 4, 20)
    torch.testing.assert_close(head(hidden)[1, 2], head(hidden[1, 2]))
    torch.testing.assert_close(head.log_prob(hidden, ids)[1, 2], head.log_prob(hidden[1, 2], ids[1, 2]))
    assert head.expectation(hidden[0, 0]).shape == ()
    assert head.quantile(hidden, torch.rand(2, 4)).shape == (2, 4)
    for nothing in (head(hidden[:0]), head.log_prob(hidden[:0], ids[:0]), head.expectation(hidden[:0])):
        assert nothing.shape[:2] == (0, 4)


@pytest.mark.parametrize("layout", [(7, None, 1), (13, 4, 2), (20, 3, 3)], ids=str)
def test_gradients_are_those_of_finite_differences_and_of_forward(layout):
    head = small(*layout, hidden_size=3, rank=2)
    hidden, ids = hidden_for(head, 4).requires_grad_(), torch.randint(0, layout[0], (4,))
    names, parameters = zip(*head.named_parameters(), strict=True)

    def log_prob(hidden, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(Called(head, "log_prob"), add_prefix(state), (hidden, ids))

    def expectation(hidden, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(Called(head, "expectation"), add_prefix(state), (hidden,))

    torch.autograd.gradcheck(log_prob, (hidden, *parameters))
    torch.autograd.gradcheck(expectation, (hidden, *parameters))
    weight = torch.randn(4, dtype=torch.float64)
    inputs = (hidden, *parameters)
    direct = torch.autograd.grad((head.log_prob(hidden, ids) * weight).sum(), inputs)
    gathered = head(hidden).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    for a, b in zip(direct, torch.autograd.grad((gathered * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


class Called(torch.nn.Module):
    """Makes a method the forward, for functional_call."""

    def __init__(self, head, method):
        super().__init__()
        self.head, self.method = head, method

    def forward(self, *args):
        return getattr(self.head, self.method)(*args)


def add_prefix(state):
    return {f"head.{name}": value for name, value in state.items()}


def test_gradients_are_exact_where_a_factor_is_zero():
    head = small(27, 3, 3)
    with torch.no_grad():
        head.digit_factors[1, 2] = 0  # of digit 3 given the first digit 2
    hidden, ids = hidden_for(head, 1), torch.tensor([2 * 9 + 1 * 3 + 0])
    log_p = head.log_prob(hidden, ids)
    torch.testing.assert_close(log_p[0], brute_force(head, hidden[0], int(ids)))
    assert log_p.isfinite().all()
    (gradient,) = torch.autograd.grad(log_p.sum(), head.digit_factors)
    assert (gradient[1, 2] != 0).all()  # its own does not vanish
    assert (gradient[2] == 0).all()  # the other factor's does


def test_digits_that_number_no_id_have_no_probability_and_no_gradient():
    head = small(20, 8, 2)  # first digits 3 .. 7 and last digits 4 .. 7 under 2 number nothing
    hidden = hidden_for(head, 5)
    assert head.quantile(hidden, torch.full((5,), 1 - 2.0**-53, dtype=torch.float64)).max() < 20
    head(hidden).sum().backward()
    assert (head.first_weight.grad[3:] == 0).all()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_quantile_inverts_the_distribution_function(layout):
    head = small(*layout)
    hidden = hidden_for(head, 1).expand(2000, -1)
    probability = torch.rand(2000, dtype=torch.float64)
    upper = head(hidden[0]).exp().cumsum(0)
    away = (upper - probability.unsqueeze(-1)).abs().min(-1).values > 1e-9  # of ties
    expected = torch.searchsorted(upper, probability, right=True)
    found = head.quantile(hidden, probability)
    assert away.sum() > 1900
    assert (found == expected)[away].all()


def test_quantile_of_a_number_on_a_boundary_is_the_next_id():
    head = DigitHead(3, 16, 4, 2, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()  # uniform, with boundaries that floating point holds
    probability = torch.arange(16, dtype=torch.float64) / 16
    assert head.quantile(torch.zeros(16, 3), probability).tolist() == list(range(16))
    assert head.quantile(torch.zeros(16, 3), probability + (1 - 2.0**-49) / 16).tolist() == list(range(16))
    assert head.expectation(torch.zeros(3)).item() == 7.5


def test_quantile_cumulates_in_float64():
    head = DigitHead(3, 49, 7, 2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    ids = torch.arange(49)
    for inside in (1e-9, 1 - 1e-9):
        assert (head.quantile(torch.zeros(49, 3), (ids.double() + inside) / 49) == ids).all()


def test_uniform_numbers_become_samples():
    head, num_samples = small(50, 8, 2, dtype=torch.float32), 50_000
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(0.5)  # a flatter distribution, in which every id is expected to occur
    hidden = 0.5 * hidden_for(head, 1)
    ids = head.quantile(hidden.expand(num_samples, -1), torch.rand(num_samples, dtype=torch.float64))
    expected = num_samples * head(hidden[0]).exp().double()
    common = expected > 5
    assert common.sum() > 30
    statistic = ((ids.bincount(minlength=50) - expected) ** 2 / expected)[common].sum()
    degrees = common.sum() - 1
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


def test_expectation_does_not_lose_digits_over_many_ids():
    head = DigitHead(8, 65_536)
    hidden = 5 * torch.randn(4, 8)
    exact = copy.deepcopy(head).double()
    expected = (exact(hidden.double()).exp() * torch.arange(65_536)).sum(-1)
    found = head.expectation(hidden)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_compute_in_float32(half):
    head = DigitHead(32, 300, 7)
    low = copy.deepcopy(head).to(half)
    rounded = copy.deepcopy(low).float()
    hidden, ids = torch.randn(40, 32).to(half), torch.randint(0, 300, (40,))
    assert low(hidden).dtype == low.log_prob(hidden, ids).dtype == torch.float32
    torch.testing.assert_close(low(hidden), rounded(hidden.float()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low.log_prob(hidden, ids), rounded.log_prob(hidden.float(), ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(low(hidden), head(hidden.float()), rtol=0, atol=0.02)
    torch.testing.assert_close(low(hidden).exp().sum(-1), torch.ones(40))
    low.log_prob(hidden.requires_grad_(), ids).sum().backward()
    assert hidden.grad.dtype == low.first_weight.grad.dtype == half


def test_autocast_changes_nothing():
    head = small(300, 7, 3, dtype=torch.float32)
    hidden, ids, probability = hidden_for(head, 40), torch.randint(0, 300, (40,)), torch.rand(40, dtype=torch.float64)

    def results():
        return [
            head(hidden),
            head.log_prob(hidden, ids),
            head.expectation(hidden),
            head.quantile(hidden, probability),
        ]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    parameters = list(head.parameters())
    gradients = [torch.autograd.grad(log_p.sum(), parameters) for _, log_p, *_ in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_iter(out) if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("num_embeddings", [4096, 4000])
def test_log_prob_makes_nothing_of_tokens_times_ids(num_embeddings):
    head = DigitHead(16, num_embeddings, 64, 2, rank=8)
    hidden, ids = torch.randn(200, 16, requires_grad=True), torch.randint(0, num_embeddings, (200,))
    with LargestTensor() as largest:
        head.log_prob(hidden, ids).sum().backward()
        head.quantile(hidden, torch.rand(200))
    assert largest.numel == 200 * 64  # one digit's logits
    with LargestTensor() as largest:
        head(hidden)
    assert largest.numel >= 200 * num_embeddings


@pytest.mark.parametrize("layout", [(64, 8, 2), (20, 3, 3)], ids=str)
def test_compiled_equals_eager(layout):
    head = small(*layout)
    hidden, ids = hidden_for(head, 2, 5), torch.randint(0, layout[0], (2, 5))
    probability = torch.rand(2, 5, dtype=torch.float64)
    for method, args in [
        (head.forward, (hidden,)),
        (head.log_prob, (hidden, ids)),
        (head.expectation, (hidden,)),
        (head.quantile, (hidden, probability)),
    ]:
        compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), method(*args))
        if method != head.quantile:
            gradients = [torch.autograd.grad(f(*args).sin().sum(), head.out_weight) for f in (compiled, method)]
            torch.testing.assert_close(*gradients)


def test_meta_device():
    head = DigitHead(16, 65_536, device="meta")
    hidden, ids = torch.empty(3, 16, device="meta"), torch.zeros(3, dtype=torch.long, device="meta")
    assert head(hidden).shape == (3, 65_536)
    assert head.log_prob(hidden, ids).shape == head.quantile(hidden, head.log_prob(hidden, ids)).shape == (3,)
    head = head.to_empty(device="cpu")
    head.reset_parameters()
    torch.testing.assert_close(head(torch.randn(3, 16)).exp().sum(-1), torch.ones(3))


def test_every_initial_value_is_drawn_through_torch_init(monkeypatch):
    drawn = []
    for name in ("normal_", "zeros_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, **options: drawn.append(tensor))
    head = DigitHead(6, 50, 4, 3)
    assert {id(t) for t in drawn} == {id(p) for p in head.parameters()}


def test_at_the_start_every_digit_has_the_logits_of_a_dense_head():
    head, hidden = DigitHead(512, 200_376), torch.randn(64, 512)
    assert head.num_digits == 3
    for position in range(3):
        logits = head._logits(position, hidden, torch.zeros(64, dtype=torch.long))
        assert logits[logits > -torch.inf].std().item() == pytest.approx(0.02 * 512**0.5, rel=0.25)
    head.reset_parameters(std=1e-3)
    torch.testing.assert_close(head.log_prob(hidden, torch.arange(64)).exp() * 59**3, torch.ones(64), rtol=0.5, atol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_parameter_count(k):
    D, b, R = 10, 6, 7
    head = DigitHead(D, b**k - 1, b, k, rank=R)
    assert sum(p.numel() for p in head.parameters()) == (
        b * D + b + (k - 1) * (R * D + R + b * R + b) + k * (k - 1) // 2 * b * R
    )
    assert all(p.numel() for p in head.parameters())
    assert not list(head.buffers())


@pytest.mark.parametrize("layout", [(7, None, 1), (20, 3, 3)], ids=str)
def test_state_dict_round_trip(layout):
    head, other = small(*layout), small(*layout)
    other.load_state_dict(head.state_dict())
    hidden = hidden_for(head, 3)
    torch.testing.assert_close(other(hidden), head(hidden), rtol=0, atol=0)


def test_resize_changes_what_ids_there_are():
    head = small(50, 8, 2)
    hidden = hidden_for(head, 3)
    before, state = head(hidden), copy.deepcopy(head.state_dict())
    for size in (9, 64, 50):
        head.resize(size)
        log_p = head(hidden)
        assert log_p.shape == (3, size)
        torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(log_p, before, rtol=0, atol=0)
    torch.testing.assert_close(head.state_dict(), state, rtol=0, atol=0)
    with pytest.raises(ValueError, match="2 digits of base 8 number 64 ids at most"):
        head.resize(65)
    with pytest.raises(ValueError, match="num_embeddings = 0"):
        head.resize(0)
    assert head.num_embeddings == 50


@pytest.mark.parametrize("dependent", [True, False])
def test_it_learns_discretised_gaussians_which_independent_digits_cannot(dependent):
    """Means over the whole range and widths from 2 to 8 ids, given by smooth features of both."""
    ids = torch.arange(64.0)

    def batch(size):
        mean, width = 64 * torch.rand(size, 1), 2 + 6 * torch.rand(size, 1)
        bumps = (-(((mean - torch.linspace(-8, 72, 32)) / 5) ** 2)).exp()
        return torch.cat([bumps, bumps / width], -1), (-(((ids - mean) / width) ** 2) / 2).log_softmax(-1)

    def divergence(hidden, target):
        return (target.exp() * (target - head(hidden))).sum(-1).mean()

    head = DigitHead(64, 64, base=8, rank=16)
    if not dependent:
        torch.nn.init.ones_(head.digit_factors).requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in head.parameters() if p.requires_grad], lr=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=400)
    held_out = batch(1000)
    assert divergence(*held_out) > 1
    for _ in range(400):
        optimizer.zero_grad()
        divergence(*batch(256)).backward()
        optimizer.step()
        schedule.step()
    assert (divergence(*held_out) < 0.02) if dependent else (divergence(*held_out) > 0.08)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": 10, "num_digits": 2}, "2 digits of base 10 number 100 ids, fewer than num_embeddings = 300"),
        ({"base": 1}, "base = 1"),
        ({"num_digits": 0}, "num_digits = 0"),
        ({"rank": 0}, "rank = 0; expected at least 1"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"num_embeddings": 0}, "num_embeddings = 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DigitHead(**({"hidden_size": 10, "num_embeddings": 300} | options))


def test_bad_hidden_states_and_ids():
    head = small(50)
    hidden = hidden_for(head, 3)
    with pytest.raises(ValueError, match=r"hidden has shape \(3, 5\).*hidden_size = 6"):
        head.log_prob(hidden[:, 1:], torch.tensor([0, 1, 2]))
    for method in (head, head.expectation):
        with pytest.raises(ValueError, match="hidden has shape"):
            method(hidden[:, 1:])
        with pytest.raises(ValueError, match="int64; expected floating-point"):
            method(hidden.long())
    with pytest.raises(ValueError, match="float32; expected integers"):
        head.log_prob(hidden, torch.zeros(3))
    with pytest.raises(ValueError, match=r"ids have shape \(2,\); expected .* \(3,\)"):
        head.log_prob(hidden, torch.tensor([0, 1]))
    with pytest.raises(IndexError, match=r"id 50 lies outside \[0, num_embeddings = 50\)"):
        head.log_prob(hidden, torch.tensor([0, 50, 1]))
    with pytest.raises(IndexError, match=r"id -100 .* leave out tokens whose label says to ignore them"):
        head.log_prob(hidden, torch.tensor([0, -100, 1]))


def test_bad_probabilities():
    head = small(50)
    hidden = hidden_for(head, 3)
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"probability {wrong} lies outside \[0, 1\)"):
            head.quantile(hidden, torch.tensor([0.5, wrong, 0.1], dtype=torch.float64))
    with pytest.raises(ValueError, match="int64; expected floating-point"):
        head.quantile(hidden, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"probability has shape \(2,\)"):
        head.quantile(hidden, torch.rand(2))
    with pytest.raises(ValueError, match="hidden has shape"):
        head.quantile(hidden[:, 1:], torch.rand(3))
    with pytest.raises(ValueError, match="distribution of an id is NaN"):
        head.quantile(torch.full_like(hidden, torch.nan), torch.rand(3))


def test_repr_says_the_sizes():
    assert repr(small(50)) == "DigitHead(6, 50, base=8, num_digits=2, rank=5)"


@pytest.mark.gpu
def test_a_gpu_computes_what_the_cpu_does():
    head = small(300, 7, 3, dtype=torch.float32)
    hidden, ids = hidden_for(head, 40), torch.randint(0, 300, (40,))
    probability = torch.rand(40, dtype=torch.float64)
    expected = [head(hidden), head.log_prob(hidden, ids), head.expectation(hidden)]
    quantile = head.quantile(hidden, probability)
    head, hidden = head.cuda(), hidden.cuda()
    found = [head(hidden), head.log_prob(hidden, ids.cuda()), head.expectation(hidden)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
    assert (head.quantile(hidden, probability.cuda()).cpu() == quantile).float().mean() > 0.95
