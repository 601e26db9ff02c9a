"""Values and gradients of a CP network at few points, from a table of each cell's polynomials."""

from __future__ import annotations

import torch
from torch import Tensor

from sna_core.bspline import CELL_POLYNOMIALS, local_bspline
from sna_core.network import CPNetwork, products_of_others


class CellTable:
    """Every sub-atom as a polynomial on each cell, on the CPU, taken from a network's parameters as they are now.

    Calling it equals ``network.value_and_gradient(x, check=False)`` without autograd and with a fraction of its
    operations: one row of the table a sub-atom, and one Horner scheme for it and its derivative together. Made for
    iterations over few points, where time is the number of operations.

    Args:
        network: Without activation.
        dtype: Of the table.

    Raises:
        ValueError: If the network has an activation.
    """

    def __init__(self, network: CPNetwork, dtype: torch.dtype = torch.float64):
        network.check_derivable()
        factors, spline = network.factors.detach().to("cpu", dtype), network.splines[0]
        windows = factors.flatten(2).unfold(1, spline.degree + 1, 1)  # (inputs, cells, functions, degree + 1)
        to_powers = factors.new_tensor(CELL_POLYNOMIALS[spline.degree, 0])  # (power, function of the cell)
        self.table = (windows @ to_powers.mT).movedim(-1, 2).flatten(0, 1).contiguous()  # (rows, power, functions)
        self.low = factors.new_tensor(network.low).unsqueeze(-1)
        self.width = factors.new_tensor(network.high).unsqueeze(-1) - self.low
        self.cells_per_unit = spline.num_cells / self.width
        self.first = spline.num_cells * torch.arange(network.num_inputs).unsqueeze(-1)
        self.num_cells, self.degree, self.shape = spline.num_cells, spline.degree, factors.shape[2:]
        self.weights = None if network.weights is None else network.weights.detach().to("cpu", dtype)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(points, num_inputs) -> (points, num_outputs) and (points, num_outputs, num_inputs)."""
        position = (x.mT - self.low) * self.cells_per_unit  # (inputs, points)
        if self.degree < 2:  # a value or a slope jumps at knots: rounding must not choose the cell
            cell, _ = local_bspline(x.mT, self.low, self.width, self.num_cells, self.degree, self.degree)
        else:
            cell = position.long().clamp_(0, self.num_cells - 1)
        u = (position - cell).unsqueeze(-1)
        rows = self.table.index_select(0, (cell + self.first).flatten())
        *lower, psi = rows.view(*cell.shape, *rows.shape[1:]).unbind(2)  # each (inputs, points, functions)
        slope = torch.zeros_like(psi)
        for row in reversed(lower):
            slope, psi = torch.addcmul(psi, slope, u), torch.addcmul(row, psi, u)
        others = products_of_others(psi)
        terms = torch.cat([psi[:1] * others[:1], others * slope * self.cells_per_unit.unsqueeze(-1)])
        terms = terms.unflatten(-1, self.shape)
        if self.weights is not None:
            terms = terms * self.weights
        terms = terms.sum(-1).movedim(0, -1)
        return terms[..., 0], terms[..., 1:]
