"""A tensor train as a sum of terms, against the full tensor."""

import pytest
import torch

from sna_core.compression import Samples, _Fit, chain, terms_of_train
from sna_core.forms import distance_to
from sna_core.tensor_train import Train

SIZES = (5, 6, 7)


def random_train(ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edges = [1, *ranks, 1]
    shapes = zip(edges, SIZES, edges[1:], strict=False)
    return Train(tuple(torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes))


def random_factors(rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, rank, dtype=torch.float64, generator=generator) for n in SIZES]


def full_train(train):
    return torch.einsum("aib,bjc,ckd->ijk", *train.cores)


def full_terms(factors):
    return torch.einsum("ir,jr,kr->ijk", *factors)


def every_entry(tensor):
    """Samples at each entry of a tensor."""
    index = torch.cartesian_prod(*map(torch.arange, tensor.shape))
    tables = [torch.eye(n, dtype=torch.float64)[index[:, i]] for i, n in enumerate(tensor.shape)]
    return Samples(tables, tensor.flatten())


def test_samples_measure_the_largest_error():
    train, factors = random_train([2, 3]), random_factors(2)
    samples = every_entry(full_train(train))
    assert samples.train_errors(train).max() < 1e-13
    exact = (full_train(train) - full_terms(factors)).abs().max().item()
    assert samples.error(factors) == pytest.approx(exact)
    assert samples.joined(every_entry(full_terms(factors))).error(factors) == pytest.approx(exact)
    torch.testing.assert_close(
        chain([core[:, :5] for core in train.cores]), full_train(train)[range(5), range(5), range(5)]
    )


@pytest.mark.parametrize("size", [1.0, 1e-11])
def test_the_distance_of_nearly_equal_tensors_is_exact(size):
    factors = random_factors(3)
    moved = [factors[0] + size * random_factors(3, seed=2)[0], *factors[1:]]
    exact = full_terms([moved[0] - factors[0], *factors[1:]]).norm().item()
    train = Train.of_components(factors)
    assert _Fit(distance_to(train, SIZES, train.norm() ** 2), moved).value() ** 0.5 == pytest.approx(exact, rel=1e-3)


def test_terms_are_in_the_order_of_their_size():
    factors = random_factors(4)
    found = terms_of_train(
        Train.of_components(factors), every_entry(full_terms(factors)), tolerance=1e-9, goal=1e-9, max_rank=4
    )
    norms = torch.stack([factor.norm(dim=0) for factor in found])
    torch.testing.assert_close(norms, norms[:1].expand(3, -1))
    assert (norms[0].diff() <= 0).all()


def test_a_train_of_few_terms_becomes_these():
    exact = full_terms(random_factors(3))
    options = {"tolerance": 1e-9, "goal": 1e-9, "generator": torch.Generator().manual_seed(0)}
    found = terms_of_train(Train.of_components(random_factors(3)), every_entry(exact), max_rank=20, **options)
    assert found[0].shape == (5, 3)
    assert (full_terms(found) - exact).abs().max() <= 1e-9
    again = terms_of_train(
        Train.of_components(random_factors(3)), every_entry(exact), max_rank=20, start=found, **options
    )
    assert again[0].shape == (5, 3)
    with pytest.raises(ValueError, match=r"max_rank = 2 terms are too few: the tensor train of ranks \[3, 3\] has 9"):
        terms_of_train(Train.of_components(random_factors(3)), every_entry(exact), max_rank=2, **options)


def test_what_no_fit_shortens_is_written_out():
    train = random_train([2, 2])
    samples = every_entry(full_train(train))
    found = terms_of_train(train, samples, tolerance=1e-12, goal=1e-12, max_rank=4)
    assert found[0].shape[1] <= 4
    assert samples.error(found) <= 1e-12


def test_two_axes_have_as_many_terms_as_the_rank():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (6, 8))
    samples = every_entry(left @ right.mT)
    found = terms_of_train(Train.of_components([left, right]), samples, tolerance=1e-10, goal=1e-9, max_rank=3)
    assert found[0].shape == (6, 3)
    assert samples.error(found) <= 1e-10
