import pytest
import torch

from sna_core.cell_table import CellTable
from sna_core.network import CPNetwork


@pytest.mark.parametrize("degree", range(6))
@pytest.mark.parametrize(
    ("low", "high", "num_cells"),
    [(0.1, 0.7, 6), (-1, 2, 7), (0, 1, 10), (0.3, 0.9, 11), (0, 0.3, 3), (1e3, 1e3 + 1, 49)],
)
def test_equals_the_network_at_knots(low, high, num_cells, degree):
    torch.manual_seed(0)
    net = CPNetwork(2, rank=2, num_cells=num_cells, degree=degree, low=low, high=high, dtype=torch.float64)
    knots = net.splines[0].knots()[degree : degree + num_cells + 1].clamp(low, high)
    beside = [knots.nextafter(knots.new_tensor(end)).clamp(low, high) for end in (low, high)]
    x = torch.cat([knots, *beside])
    x = torch.stack([x, x.flip(0)], -1)
    values, gradient = (t.detach() for t in net.value_and_gradient(x))
    found = CellTable(net)(x)
    torch.testing.assert_close(found[0], values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[1], gradient, rtol=1e-9, atol=1e-9)


def test_an_activation_is_refused():
    net = CPNetwork(2, rank=2, num_cells=5, activation="tanh")
    with pytest.raises(ValueError, match="activation=None; differentiate this network by autograd"):
        CellTable(net)


@pytest.mark.parametrize(
    "options", [{"unit_weights": True}, {}, {"shared_components": True}], ids=["unit", "weights", "shared"]
)
def test_equals_the_network_for_several_outputs(options):
    net = CPNetwork(3, 2, rank=4, num_cells=5, low=[-1, 0, 2], high=[1, 3, 2.5], dtype=torch.float64, **options)
    low, high = torch.tensor(net.low), torch.tensor(net.high)
    x = (low + (high - low) * torch.rand(30, 3)).double()
    torch.testing.assert_close(CellTable(net)(x), tuple(t.detach() for t in net.value_and_gradient(x)))
