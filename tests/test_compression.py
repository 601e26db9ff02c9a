"""A tensor train as a sum of terms, against the full tensor."""

import pytest
import torch

from sna_core.compression import Samples, _distance, _gauss_newton, balanced, chain, rounded, terms_of_train

SIZES = (5, 6, 7)


def random_train(ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edges = [1, *ranks, 1]
    shapes = zip(edges, SIZES, edges[1:], strict=False)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def random_factors(rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, rank, dtype=torch.float64, generator=generator) for n in SIZES]


def full_train(cores):
    return torch.einsum("aib,bjc,ckd->ijk", *cores)


def full_terms(factors):
    return torch.einsum("ir,jr,kr->ijk", *factors)


def train_of(factors):
    """The train of a sum of terms, with ranks as large as their number."""
    first, middle, last = factors
    return [first.unsqueeze(0), middle.mT.unsqueeze(-1) * torch.eye(len(first.mT)).unsqueeze(1), last.mT.unsqueeze(-1)]


def every_entry(tensor):
    """Samples at each entry of a tensor."""
    index = torch.cartesian_prod(*map(torch.arange, tensor.shape))
    tables = [torch.eye(n, dtype=torch.float64)[index[:, i]] for i, n in enumerate(tensor.shape)]
    return Samples(tables, tensor.flatten())


def test_rounding_stays_within_the_cut_at_least_ranks():
    cores = [torch.cat([core, 1e-6 * core.flip(1)], -1) for core in random_train([2, 3])[:1]]
    cores += [torch.cat([core, core.flip(1)]) for core in random_train([2, 3])[1:2]] + random_train([2, 3])[2:]
    exact = full_train(cores)
    assert [core.shape[-1] for core in rounded(cores, 1e-12)] == [4, 3, 1]
    coarse = rounded(cores, 1e-3)
    assert [core.shape[-1] for core in coarse] == [2, 3, 1]
    assert (full_train(coarse) - exact).norm() <= 1e-3
    for core in coarse[:-1]:
        columns = core.flatten(0, 1)
        torch.testing.assert_close(columns.mT @ columns, torch.eye(columns.shape[1]).double())


def test_samples_measure_the_largest_error():
    cores, factors = random_train([2, 3]), random_factors(2)
    samples = every_entry(full_train(cores))
    assert samples.train_errors(cores).max() < 1e-13
    exact = (full_train(cores) - full_terms(factors)).abs().max().item()
    assert samples.error(factors) == pytest.approx(exact)
    assert samples.joined(every_entry(full_terms(factors))).error(factors) == pytest.approx(exact)
    torch.testing.assert_close(chain([core[:, :5] for core in cores]), full_train(cores)[range(5), range(5), range(5)])


@pytest.mark.parametrize("size", [1.0, 1e-11])
def test_the_distance_of_nearly_equal_tensors_is_exact(size):
    factors = random_factors(3)
    moved = [factors[0] + size * random_factors(3, seed=2)[0], *factors[1:]]
    exact = full_terms([moved[0] - factors[0], *factors[1:]]).norm().item()
    assert _distance(train_of(factors), moved) == pytest.approx(exact, rel=1e-3)


def test_gauss_newton_equations_are_those_of_the_jacobian():
    cores, factors = random_train([2, 3]), random_factors(2)
    jacobian = torch.autograd.functional.jacobian(lambda *f: full_terms(f).flatten(), tuple(factors))
    jacobian = torch.cat([part.flatten(1) for part in jacobian], 1)
    matrix, right = _gauss_newton(cores, factors)
    torch.testing.assert_close(matrix, (jacobian.mT @ jacobian).tril() + matrix.triu(1))
    residual = (full_train(cores) - full_terms(factors)).flatten()
    torch.testing.assert_close(right.squeeze(-1), jacobian.mT @ residual)


def test_balancing_keeps_the_terms():
    factors = [factor * scale for factor, scale in zip(random_factors(4), (1e6, 1e-3, 1.0), strict=True)]
    factors[1][:, 2] = 0
    same = balanced(factors)
    torch.testing.assert_close(full_terms(same), full_terms(factors))
    norms = torch.stack([factor.norm(dim=0) for factor in same])
    assert (norms[:, :3] / norms[0, :3] - 1).abs().max() < 1e-12
    assert (norms.prod(0).diff() <= 0).all()


def test_a_train_of_few_terms_becomes_these():
    exact = full_terms(random_factors(3))
    options = {"tolerance": 1e-9, "goal": 1e-9, "generator": torch.Generator().manual_seed(0)}
    found = terms_of_train(train_of(random_factors(3)), every_entry(exact), max_rank=20, **options)
    assert found[0].shape == (5, 3)
    assert (full_terms(found) - exact).abs().max() <= 1e-9
    again = terms_of_train(train_of(random_factors(3)), every_entry(exact), max_rank=20, start=found, **options)
    assert again[0].shape == (5, 3)
    with pytest.raises(ValueError, match=r"max_rank = 2 terms are too few: the tensor train of ranks \[3, 3\] has 9"):
        terms_of_train(train_of(random_factors(3)), every_entry(exact), max_rank=2, **options)


def test_what_no_fit_shortens_is_written_out():
    cores = random_train([2, 2])
    samples = every_entry(full_train(cores))
    found = terms_of_train(cores, samples, tolerance=1e-12, goal=1e-12, max_rank=4)
    assert found[0].shape[1] <= 4
    assert samples.error(found) <= 1e-12


def test_two_axes_have_as_many_terms_as_the_rank():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (6, 8))
    samples = every_entry(left @ right.mT)
    found = terms_of_train([left.unsqueeze(0), right.mT.unsqueeze(-1)], samples, tolerance=1e-10, goal=1e-9, max_rank=3)
    assert found[0].shape == (6, 3)
    assert samples.error(found) <= 1e-10
