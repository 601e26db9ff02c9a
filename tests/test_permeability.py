from itertools import product
from math import pi

import pytest
import torch

from leviathan.janus.cells import symmetrise, whole_cell
from leviathan.janus.homogenization.permeability import permeability

EXACT = {"tolerance": 1e-10}
SHAPES = [(6, 6), (4, 4, 4)]
# Drag by solid fraction: over Stokes' 6 pi mu a U, simple cubic lattice, A. A. Zick & G. M. Homsy, J. Fluid Mech. 115,
# 1982, table 2; over mu U, square lattice, A. S. Sangani & A. Acrivos, Int. J. Multiphase Flow 8, 1982, table 1.
SPHERES = {0.064: 2.810, 0.125: 4.292, 0.343: 15.4}
CYLINDERS = {0.05: 15.56, 0.2: 51.53, 0.3: 102.90}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_cells(cells, shape, share=0.3, symmetry="none"):
    scores = symmetrise(torch.rand(cells, *shape, dtype=torch.float64), symmetry)
    return (scores <= scores.flatten(1).quantile(share, dim=1).view(-1, *(1,) * len(shape))).double()


def ball_orthant(m, dims, fraction):
    radius = (fraction * {2: 1, 3: 3 / 4}[dims] / pi) ** (1 / dims)
    centres = (torch.arange(m) + 0.5) / (2 * m)
    squares = sum(x**2 for x in torch.meshgrid(*[centres] * dims, indexing="ij"))
    return (squares < radius**2)[None], radius


def stokes_oracle(cell, resistance):
    """K of one cell in squared voxels, from the dense equations of momentum, mass and mean, face by face."""
    n, dims = cell.shape[0], cell.ndim
    voxels = list(product(range(n), repeat=dims))
    number = {(axis, *voxel): i for i, (axis, voxel) in enumerate(product(range(dims), voxels))}
    pressure = {voxel: len(number) + i for i, voxel in enumerate(voxels)}

    def moved(voxel, axis, step):
        return tuple((x + step * (a == axis)) % n for a, x in enumerate(voxel))

    size = len(number) + len(pressure)
    matrix = torch.zeros(size + dims, size + dims, dtype=torch.float64)
    for axis, voxel in product(range(dims), voxels):
        row = number[axis, *voxel]
        alpha = resistance * (cell[voxel] + cell[moved(voxel, axis, -1)]) / 2
        for other, step in product(range(dims), (-1, 1)):
            beside = moved(voxel, other, step)
            matrix[row, row] += 1
            matrix[row, number[axis, *beside]] -= 1
            if other != axis:
                alpha = alpha + cell[beside] * cell[moved(beside, axis, -1)]
        matrix[row, row] += alpha
        matrix[row, pressure[voxel]] += 1
        matrix[row, pressure[moved(voxel, axis, -1)]] -= 1
        matrix[row, size + axis] = -1  # the mean pressure gradient
        matrix[size + axis, row] = 1 / len(voxels)
        matrix[pressure[voxel], row] -= 1
        matrix[pressure[moved(voxel, axis, -1)], row] += 1
    right = torch.zeros(size + dims, dims, dtype=torch.float64)
    right[size:] = torch.eye(dims)
    found = torch.linalg.lstsq(matrix, right, driver="gelsd").solution  # the mean pressure is free
    assert torch.allclose(matrix @ found, right, atol=1e-9)
    return torch.linalg.inv(found[size:])


@pytest.mark.parametrize("shape", [(5, 5), (3, 3, 3)])
def test_permeability_is_that_of_the_dense_equations(shape):
    cells = torch.cat([random_cells(2, shape), torch.rand(1, *shape, dtype=torch.float64)])
    found = permeability(cells, edge=shape[0], resistance=200.0, **EXACT)
    for cell, tensor in zip(cells, found.tensor, strict=True):
        torch.testing.assert_close(tensor, stokes_oracle(cell, 200.0), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("gap", [1, 2, 4, 8])
@pytest.mark.parametrize("dims", [2, 3])
def test_a_channel_is_of_second_order(gap, dims):
    n = gap + 3
    cell = torch.zeros(1, *(n,) * dims, dtype=torch.float64)
    cell[..., gap:] = 1
    tensor = permeability(cell, edge=n, resistance=1e7, tolerance=1e-6).tensor[0]
    along = (gap**3 + 2 * gap) / (12 * n)
    assert along == pytest.approx(gap**3 / (12 * n) * (1 + 2 / gap**2))  # Poiseuille's, with an error of 2 / gap^2
    for axis in range(dims - 1):
        assert float(tensor[axis, axis]) == pytest.approx(along, rel=1e-5)
    assert 0 < float(tensor[-1, -1]) < 1e-5
    assert (tensor - tensor.diag().diag()).abs().max() < 1e-9


def test_drag_on_lattices_of_spheres_and_cylinders_is_the_published_one():
    cells, expected = [], []
    for fraction, drag in SPHERES.items():
        cell, radius = ball_orthant(16, 3, fraction)
        cells.append(cell)
        expected.append(1 / (6 * pi * radius * drag))
    found = permeability(torch.cat(cells), symmetry="cubic").tensor[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0.04, atol=0)
    cells = torch.cat([ball_orthant(32, 2, fraction)[0] for fraction in CYLINDERS])
    found = permeability(cells, symmetry="cubic").tensor[:, 0, 0]
    torch.testing.assert_close(found, 1 / torch.tensor(list(CYLINDERS.values())), rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_random_cells_have_symmetric_positive_definite_permeability(shape):
    found = permeability(random_cells(4, shape))
    torch.testing.assert_close(found.tensor, found.tensor.mT, rtol=1e-12, atol=1e-15)
    assert (torch.linalg.eigvalsh(found.tensor) > 0).all()
    assert found.converged.all()
    assert found.residual.max() <= 1e-4
    assert found.discretisation == "staggered"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("symmetry", ["mirror", "cubic"])
def test_orthants_are_worth_their_whole_cells(shape, symmetry):
    orthants = torch.cat(
        [random_cells(2, shape, symmetry=symmetry), symmetrise(torch.rand(1, *shape).double(), symmetry)]
    )
    results, gradients = [], []
    for is_whole in (False, True):
        phase = orthants.clone().requires_grad_()
        if is_whole:
            found = permeability(whole_cell(phase, symmetry), edge=2.0, **EXACT)
        else:
            found = permeability(phase, edge=2.0, symmetry=symmetry, **EXACT)
        found.tensor.diagonal(dim1=1, dim2=2).sum().backward()
        results.append(found.tensor.detach())
        gradients.append(phase.grad)
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(("dims", "symmetry"), [(2, "none"), (3, "none"), (2, "mirror"), (3, "mirror"), (3, "cubic")])
def test_gradients_are_those_of_finite_differences(dims, symmetry):
    size = {2: 4, 3: 3}[dims]
    phase = torch.rand(1, *(size,) * dims, dtype=torch.float64, requires_grad=True)

    def function(phase):
        phase = symmetrise(phase, symmetry)
        return permeability(phase, edge=size, symmetry=symmetry, tolerance=1e-12, resistance=20.0).tensor

    assert torch.autograd.gradcheck(function, phase, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_single_precision_is_enough_at_the_default_tolerance():
    phase = random_cells(2, (8, 8, 8))
    results = []
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        values = phase.to(dtype).requires_grad_()
        found = permeability(values, tolerance=tolerance)
        found.tensor.diagonal(dim1=1, dim2=2).sum().backward()
        assert found.tensor.dtype == values.grad.dtype == dtype
        results.append((found.tensor.detach().double(), values.grad.double()))
    (tensor, gradient), (exact_tensor, exact_gradient) = results
    assert (tensor - exact_tensor).abs().max() < 1e-4 * exact_tensor.abs().max()
    assert (gradient - exact_gradient).norm() < 1e-3 * exact_gradient.norm()


def test_batches_edges_shifts_and_turns():
    cells = random_cells(5, (5, 5, 5))
    found = permeability(cells, **EXACT).tensor
    one_by_one = torch.cat([permeability(cell[None], **EXACT).tensor for cell in cells])
    torch.testing.assert_close(found, one_by_one, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(permeability(cells, edge=3.0, **EXACT).tensor, 9 * found)
    shifted = permeability(cells.roll((2, 1, 3), (1, 2, 3)), **EXACT).tensor
    torch.testing.assert_close(shifted, found, rtol=1e-7, atol=1e-13)
    turned = permeability(cells.permute(0, 3, 1, 2), **EXACT).tensor
    torch.testing.assert_close(turned, found[:, [2, 0, 1]][:, :, [2, 0, 1]], rtol=1e-7, atol=1e-13)


def test_the_default_resistance_is_near_a_rigid_solid():
    cell = ball_orthant(8, 3, 0.45)[0].double()
    yielding, rigid = (permeability(cell, symmetry="cubic", resistance=r, **EXACT).tensor for r in (1e4, 1e7))
    assert 0 < float(yielding[0, 0, 0] / rigid[0, 0, 0]) - 1 < 2e-3


@pytest.mark.parametrize("symmetry", ["none", "mirror"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocked_and_solid_cells_seep(symmetry, dtype):
    cells = torch.zeros(3, 8, 8, 8, dtype=dtype)
    cells[0, 4:] = 1  # a wall across the first axis
    cells[1] = 1
    cells[2], cells[2, 3:5, 3:5, 3:5] = 1, 0  # a closed cavity
    phase = cells.clone().requires_grad_()
    voxels = 8 if symmetry == "none" else 16
    found = permeability(phase, edge=voxels, symmetry=symmetry)
    found.tensor.diagonal(dim1=1, dim2=2).sum().backward()
    assert (found.residual < (1e-2 if dtype == torch.float32 else 1e-4)).all()  # forces are large: rounding shows
    across, along, _ = found.tensor[0].detach().diagonal()
    assert float(across) == pytest.approx(2e-4, rel=1e-2)  # half is a wall of 1 / resistance
    assert along > 0.5
    torch.testing.assert_close(found.tensor[1].detach(), 1e-4 * torch.eye(3, dtype=dtype), rtol=1e-3, atol=1e-9)
    assert (found.tensor[2].diagonal() > 1e-4).all()
    assert (found.tensor[2].diagonal() < 1.2e-4).all()
    assert phase.grad.isfinite().all()


def test_a_solve_that_is_cut_short_says_so():
    found = permeability(random_cells(2, (8, 8)), max_iterations=2)
    assert found.num_iterations == 2
    assert not found.converged.any()
    assert (found.residual > 1e-4).all()


def test_the_residual_is_the_largest_of_the_axes():
    phase = random_cells(1, (6, 6))
    one, other = (permeability(p, symmetry="mirror", max_iterations=3).residual for p in (phase, phase.mT))
    torch.testing.assert_close(one, other)


def test_voxels_may_be_booleans_or_integers():
    cells = random_cells(2, (6, 6)).float()
    for dtype in (torch.bool, torch.uint8):
        assert torch.equal(permeability(cells.to(dtype)).tensor, permeability(cells).tensor)


@pytest.mark.parametrize(
    ("phase", "options", "message"),
    [
        (torch.zeros(2, 4, 4), {}, r"cells \[0, 1\] have no solid and infinite permeability"),
        (torch.ones(2, 4), {}, "expected"),
        (torch.ones(1, 4, 5), {}, "edges"),
        (torch.full((1, 4, 4), 1.5), {}, "from 0 to 1"),
        (torch.full((1, 4, 4), float("nan")), {}, "from 0 to 1"),
        (torch.ones(1, 4, 4), {"symmetry": "hexagonal"}, "symmetry"),
        (torch.eye(4).roll(1, 0)[None], {"symmetry": "cubic"}, "under permutations of the axes"),
        (torch.ones(1, 4, 4), {"edge": 0.0}, "edge = 0.0"),
        (torch.ones(1, 4, 4), {"resistance": float("inf")}, "resistance = inf"),
        (torch.ones(1, 4, 4), {"tolerance": 1.0}, "tolerance = 1.0"),
        (torch.ones(1, 4, 4), {"max_iterations": 0}, "max_iterations = 0"),
    ],
)
def test_what_cannot_be_computed_is_refused(phase, options, message):
    with pytest.raises(ValueError, match=message):
        permeability(phase, **options)
