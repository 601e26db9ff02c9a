import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leviathan.janus.cells import whole_cell
from leviathan.janus.homogenization import Isotropic, conductivity, elastic_stiffness, mandel
from leviathan.janus.homogenization.conjugate_gradient import conjugate_gradient
from leviathan.janus.homogenization.elements import elastic_element
from leviathan.janus.homogenization.mirror import along_axes, modes, transform

SOLID = Isotropic(1.0, 0.3)
SCHEMES = ("rotated", "hexahedral")
EXACT = {"tolerance": 1e-9}


def isotropic(solid, scale=1.0):
    first, second = (scale * each for each in solid.lame)
    stiffness = torch.zeros(6, 6, dtype=torch.float64)
    stiffness[:3, :3] = first
    return stiffness + torch.diag(torch.tensor([2 * second] * 3 + [second] * 3, dtype=torch.float64))


def laminate(share=0.5, n=8):
    phase = torch.zeros(1, n, n, n, dtype=torch.float64)
    phase[:, : round(share * n)] = 1
    return phase


def schwarz(m, offset):
    """An octant of Schwarz's P surface: solid where the sum of cosines is above ``offset``."""
    x = torch.cos((torch.arange(m, dtype=torch.float64) + 0.5) / m * math.pi)
    return ((x[:, None, None] + x[:, None] + x) > offset).double()[None]


def symmetrised(phase):
    dims = phase.ndim - 1
    orders = [(0, 1), (1, 0)] if dims == 2 else [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    return sum(phase.permute(0, *(1 + axis for axis in order)) for order in orders) / len(orders)


class TestExactSolutions:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("grey", [1.0, 0.0, 0.4])
    def test_a_homogeneous_cell_is_its_material(self, scheme, grey):
        found = elastic_stiffness(torch.full((1, 4, 4, 4), grey, dtype=torch.float64), scheme=scheme, contrast=10.0)
        torch.testing.assert_close(found.tensor[0], isotropic(SOLID, grey + (1 - grey) / 10))
        assert found.num_iterations == 0
        assert found.converged.all()

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_a_laminate_of_stiff_and_soft_layers(self, scheme):
        # Backus: normal stiffness and out-of-plane shear are harmonic means, in-plane shear the arithmetic one.
        found = elastic_stiffness(laminate(), contrast=100.0, scheme=scheme, **EXACT).tensor[0]
        soft, (first, second) = 1 / 100.0, SOLID.lame
        modulus = first + 2 * second
        harmonic, arithmetic = 2 / (1 + 1 / soft), (1 + soft) / 2
        ratio = first / modulus
        assert found[0, 0] == pytest.approx(modulus * harmonic)
        assert found[0, 1] == pytest.approx(first * harmonic)
        plane = (modulus - first**2 / modulus) * arithmetic
        assert found[1, 1] == pytest.approx(plane + ratio**2 * modulus * harmonic)
        assert found[1, 2] == pytest.approx((first - first * ratio) * arithmetic + ratio**2 * modulus * harmonic)
        assert found[3, 3] == pytest.approx(second * arithmetic)
        assert found[4, 4] == pytest.approx(second * harmonic)

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("dims", [2, 3])
    def test_a_laminate_conducts_in_series_and_in_parallel(self, scheme, dims):
        phase = torch.zeros(1, *(8,) * dims, dtype=torch.float64)
        phase[:, :2] = 1
        found = conductivity(phase, solid=5.0, void=0.2, scheme=scheme, **EXACT).tensor[0]
        series, parallel = 1 / (0.25 / 5 + 0.75 / 0.2), 0.25 * 5 + 0.75 * 0.2
        torch.testing.assert_close(found, torch.diag(torch.tensor([series] + [parallel] * (dims - 1)).double()))

    def test_a_checkerboard_conducts_as_the_geometric_mean(self):
        # Keller's theorem: sqrt(k1 k2) in the limit of fine grids; the error falls with the grid.
        errors = []
        for n in (8, 16, 32):
            phase = torch.zeros(1, n, n, dtype=torch.float64)
            phase[:, : n // 2, : n // 2] = phase[:, n // 2 :, n // 2 :] = 1
            found = conductivity(phase, solid=4.0, void=1.0, scheme="hexahedral", **EXACT).tensor[0]
            errors.append(float(found[0, 0]) - 2.0)
        assert errors[0] > errors[1] > errors[2] > 0  # from above: elements bound the energy
        assert errors[2] < 0.05

    def test_the_contrast_may_be_below_one(self):
        soft = elastic_stiffness(laminate(0.25), contrast=0.1, **EXACT).tensor[0]
        assert soft[0, 0] == pytest.approx(isotropic(SOLID)[0, 0] / (0.25 + 0.75 * 0.1))


class TestBounds:
    @settings(max_examples=8)
    @given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.floats(0.2, 0.8))
    def test_stiffness_lies_between_voigt_and_reuss(self, seed, scheme, share):
        phase = (torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) < share).double()
        found = mandel(elastic_stiffness(phase, contrast=20.0, scheme=scheme, **EXACT).tensor[0])
        scale = phase + (1 - phase) / 20.0
        solid = mandel(isotropic(SOLID))
        upper, lower = solid * scale.mean(), solid / (1 / scale).mean()
        assert torch.linalg.eigvalsh(upper - found).min() > -1e-9
        assert torch.linalg.eigvalsh(found - lower).min() > -1e-9

    @pytest.mark.parametrize("offset", [-1.0, 0.0, 1.0])
    def test_cubic_cells_keep_to_hashin_and_shtrikman(self, offset):
        # Bulk modulus of a cubic cell, and the two shear moduli about their isotropic bound (Hashin & Shtrikman 1963).
        phase = schwarz(8, offset)
        found = elastic_stiffness(phase, contrast=50.0, symmetry="cubic", **EXACT).tensor[0]
        share, (first, second) = float(phase.mean()), SOLID.lame
        bulk, soft_bulk, soft_shear = first + 2 * second / 3, (first + 2 * second / 3) / 50, second / 50

        def bound(shear):
            return 1 / (share / (bulk + 4 * shear / 3) + (1 - share) / (soft_bulk + 4 * shear / 3)) - 4 * shear / 3

        assert bound(soft_shear) < (found[0, 0] + 2 * found[0, 1]) / 3 < bound(second)

    @pytest.mark.parametrize("offset", [-1.0, 0.5])
    def test_exact_integration_bounds_one_point(self, offset):
        one, full = (
            elastic_stiffness(schwarz(6, offset), symmetry="mirror", scheme=scheme, **EXACT).tensor[0]
            for scheme in SCHEMES
        )
        assert torch.linalg.eigvalsh(full - one).min() > -1e-9

    def test_schemes_come_together_on_finer_grids_from_above(self):
        # A sphere of voxels, refined: each exact-integration value bounds that of the same voxels cut into eight.
        coarse = schwarz(4, 0.0)
        values = []
        for _ in range(3):
            values.append(
                [
                    float(elastic_stiffness(coarse, contrast=20.0, symmetry="cubic", scheme=s).tensor[0, 0, 0])
                    for s in SCHEMES
                ]
            )
            for axis in (1, 2, 3):
                coarse = coarse.repeat_interleave(2, axis)
        gaps = [full - one for one, full in values]
        assert gaps[0] > gaps[1] > gaps[2] > 0
        assert values[0][1] > values[1][1] > values[2][1]


class TestSymmetry:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize(
        ("effective", "dims"), [(elastic_stiffness, 2), (elastic_stiffness, 3), (conductivity, 2), (conductivity, 3)]
    )
    def test_an_orthant_says_what_the_whole_cell_says(self, effective, dims, scheme):
        phase = torch.rand(2, *(4,) * dims, dtype=torch.float64).round()
        part = effective(phase, symmetry="mirror", scheme=scheme, **EXACT)
        whole = effective(whole_cell(phase, "mirror"), scheme=scheme, **EXACT)
        torch.testing.assert_close(part.tensor, whole.tensor, rtol=1e-9, atol=1e-12)
        assert part.num_iterations <= whole.num_iterations

    @pytest.mark.parametrize(("effective", "dims"), [(elastic_stiffness, 2), (elastic_stiffness, 3), (conductivity, 3)])
    def test_cubic_cells_need_fewer_loads(self, effective, dims):
        phase = symmetrised(torch.rand(2, *(4,) * dims, dtype=torch.float64))
        few = effective(phase, symmetry="cubic", **EXACT)
        torch.testing.assert_close(
            few.tensor, effective(phase, symmetry="mirror", **EXACT).tensor, rtol=1e-9, atol=1e-12
        )

    def test_major_symmetry_and_definiteness_of_any_cell(self):
        found = elastic_stiffness(torch.rand(2, 4, 4, 4, dtype=torch.float64).round(), **EXACT).tensor
        torch.testing.assert_close(found, found.mT)
        assert (torch.linalg.eigvalsh(found) > 0).all()
        assert (found[0].abs() > 1e-8).all()  # all 21 constants

    def test_three_constants_of_a_cubic_cell(self):
        found = elastic_stiffness(whole_cell(schwarz(4, 0.2), "cubic"), **EXACT).tensor[0]
        first, second, third = found[0, 0], found[0, 1], found[3, 3]
        expected = torch.zeros_like(found)
        expected[:3, :3] = second
        expected += torch.diag(torch.stack([first - second] * 3 + [third] * 3))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)

    def test_a_shifted_cell_is_the_same_material(self):
        phase = torch.rand(1, 4, 4, 4, dtype=torch.float64).round()
        torch.testing.assert_close(
            elastic_stiffness(phase, **EXACT).tensor, elastic_stiffness(phase.roll((1, 2), (1, 3)), **EXACT).tensor
        )


class TestGradient:
    @pytest.mark.parametrize("symmetry", ["none", "mirror"])
    @pytest.mark.parametrize("effective", [elastic_stiffness, conductivity])
    def test_against_finite_differences(self, effective, symmetry):
        phase = 0.1 + 0.8 * torch.rand(2, 3, 3, 3, dtype=torch.float64)
        towards, weights = torch.randn_like(phase), None

        def value(phase):
            nonlocal weights
            tensor = effective(phase, symmetry=symmetry, tolerance=1e-11).tensor
            weights = torch.randn_like(tensor) if weights is None else weights
            return (tensor * weights).sum()

        phase.requires_grad_()
        slope = (torch.autograd.grad(value(phase), phase)[0] * towards).sum()
        step = 1e-4
        with torch.no_grad():
            expected = (value(phase + step * towards) - value(phase - step * towards)) / (2 * step)
        assert float(slope) == pytest.approx(float(expected), rel=1e-5)

    def test_in_a_cubic_cell_along_its_symmetry(self):
        phase = symmetrised(0.1 + 0.8 * torch.rand(1, 3, 3, 3, dtype=torch.float64)).requires_grad_()
        weights = torch.randn(6, 6, dtype=torch.float64)
        few, all_loads = (
            torch.autograd.grad((elastic_stiffness(phase, symmetry=s, tolerance=1e-11).tensor * weights).sum(), phase)[
                0
            ]
            for s in ("cubic", "mirror")
        )
        torch.testing.assert_close(symmetrised(few), symmetrised(all_loads), rtol=1e-6, atol=1e-9)

    def test_no_graph_where_none_is_asked_for(self):
        assert not elastic_stiffness(laminate()).tensor.requires_grad


class TestSolver:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("n", [3, 4])
    def test_equals_a_dense_solve_of_the_assembled_equations(self, scheme, n):
        phase = torch.rand(1, n, n, n, dtype=torch.float64).round()
        found = elastic_stiffness(phase, scheme=scheme, contrast=10.0, **EXACT).tensor[0]
        element = elastic_element(3, scheme, SOLID.lame)
        shapes = [(3 * n**3, 3 * n**3), (3 * n**3, 6), (6, 6)]
        matrix, drive, energy = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        for voxel in itertools.product(range(n), repeat=3):
            scale = phase[(0, *voxel)] + (1 - phase[(0, *voxel)]) / 10.0
            nodes = [
                sum(((v + c) % n) * n ** (2 - axis) for axis, (v, c) in enumerate(zip(voxel, corner, strict=True)))
                for corner in itertools.product((0, 1), repeat=3)
            ]
            places = torch.tensor([component * n**3 + node for component in range(3) for node in nodes])
            matrix.index_put_((places[:, None], places), scale * element.matrix, accumulate=True)
            drive.index_put_((places,), scale * element.matrix @ element.loads.mT, accumulate=True)
            energy += scale * element.loads @ element.matrix @ element.loads.mT
        expected = (energy - drive.mT @ torch.linalg.pinv(matrix, rtol=1e-10, hermitian=True) @ drive) / n**3
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)

    def test_a_batch_is_its_cells_one_by_one(self):
        phase = torch.rand(5, 4, 4, 4, dtype=torch.float64).round()
        phase[2] = 1  # ends at once
        together = elastic_stiffness(phase, **EXACT)
        alone = torch.cat([elastic_stiffness(each[None], **EXACT).tensor for each in phase])
        torch.testing.assert_close(together.tensor, alone, rtol=1e-8, atol=1e-11)

    def test_single_precision_reaches_its_tolerance(self):
        phase = schwarz(8, 0.7)
        single = elastic_stiffness(phase.float(), symmetry="cubic")
        exact = elastic_stiffness(phase, symmetry="cubic", **EXACT)
        assert single.tensor.dtype == torch.float32
        assert single.converged.all()
        torch.testing.assert_close(single.tensor.double(), exact.tensor, rtol=2e-5, atol=1e-7)

    def test_autocast_does_not_matter(self):
        phase = laminate().float()
        expected = elastic_stiffness(phase).tensor
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(elastic_stiffness(phase).tensor, expected)

    def test_units_do_not_matter_to_single_precision(self):
        one, many = (elastic_stiffness(schwarz(4, 0.0).float(), solid=Isotropic(e, 0.3)).tensor for e in (1.0, 625e9))
        torch.testing.assert_close(many / 625e9, one)

    def test_says_when_it_has_not_converged(self):
        found = elastic_stiffness(schwarz(4, 1.0), max_iterations=3)
        assert not found.converged.any()
        assert (found.residual > 1e-4).all()
        assert found.num_iterations == 3

    def test_the_residual_is_the_largest_of_the_loads(self):
        phase = torch.rand(1, 4, 4, 4, dtype=torch.float64).round()
        options = {"symmetry": "mirror", "max_iterations": 3}
        every = [elastic_stiffness(phase, loads=[load], **options).residual for load in range(6)]
        torch.testing.assert_close(elastic_stiffness(phase, **options).residual, torch.stack(every).amax(0))

    def test_only_the_loads_that_are_asked_for(self):
        found = elastic_stiffness(schwarz(4, 0.0), symmetry="cubic", loads=[0]).tensor[0]
        every = elastic_stiffness(schwarz(4, 0.0), symmetry="cubic").tensor[0]
        assert found[0, 0] == pytest.approx(float(every[0, 0]))
        assert found.isnan().sum() == 35

    def test_bytes_and_truth_values_are_phases(self):
        phase = schwarz(4, 0.0)
        expected = elastic_stiffness(phase.float()).tensor
        torch.testing.assert_close(elastic_stiffness(phase.bool()).tensor, expected)
        torch.testing.assert_close(elastic_stiffness(phase.byte()).tensor, expected)

    def test_conjugate_gradients_solve_each_system_of_a_batch(self):
        root = torch.randn(3, 6, 6, dtype=torch.float64)
        matrices = root @ root.mT + torch.eye(6, dtype=torch.float64)
        b = torch.randn(3, 6, dtype=torch.float64)
        b[1] = 0
        found = conjugate_gradient(lambda x, i: (matrices[i] @ x[..., None])[..., 0], lambda r, i: r, b, 1e-12, 50)
        torch.testing.assert_close(found.x, torch.linalg.solve(matrices, b), rtol=1e-9, atol=1e-12)
        assert found.residual[1] == 0
        assert found.converged.all()


class TestTransforms:
    @pytest.mark.parametrize("kind", ["cos_nodes", "sin_nodes", "cos_centres", "sin_centres"])
    @pytest.mark.parametrize("m", [2, 5, 8])
    def test_are_orthonormal(self, kind, m):
        matrix = transform(kind, m)
        assert len(matrix) == len(modes(kind, m))
        torch.testing.assert_close(matrix @ matrix.mT, torch.eye(len(matrix), dtype=torch.float64))

    def test_go_along_each_axis(self):
        fields = torch.randn(3, 2, 4, 4, 4, dtype=torch.float64)
        matrices = torch.randn(3, 2, 4, 4, dtype=torch.float64)
        expected = torch.einsum("bcxyz,cix,cjy,ckz->bcijk", fields, *matrices)
        torch.testing.assert_close(along_axes(fields, matrices), expected)


class TestBadInput:
    @pytest.mark.parametrize("effective", [elastic_stiffness, conductivity])
    @pytest.mark.parametrize(
        ("phase", "message"),
        [
            (torch.zeros(4, 4), "has shape"),
            (torch.zeros(1, 4, 4, 5), "all edges"),
            (torch.zeros(0, 4, 4, 4), "has shape"),
            (torch.full((1, 4, 4, 4), 2.0), "shares of solid"),
            (torch.full((1, 4, 4, 4), float("nan")), "shares of solid"),
            (torch.zeros(1, 4, 4, 4, dtype=torch.float16), "float32 or float64"),
        ],
    )
    def test_no_cells(self, effective, phase, message):
        with pytest.raises(ValueError, match=message):
            effective(phase)

    @pytest.mark.parametrize(
        "options",
        [
            {"symmetry": "square"},
            {"scheme": "spectral"},
            {"tolerance": 0.0},
            {"max_iterations": 0},
            {"contrast": 0.0},
            {"loads": [6]},
            {"loads": []},
        ],
    )
    def test_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            elastic_stiffness(laminate(), **options)

    @pytest.mark.parametrize("effective", [elastic_stiffness, conductivity])
    def test_cells_that_are_not_cubic(self, effective):
        phase = torch.zeros(1, 4, 4, 4)
        phase[:, :2] = 1
        with pytest.raises(ValueError, match="under permutations of the axes"):
            effective(phase, symmetry="cubic")

    def test_materials(self):
        with pytest.raises(ValueError, match="poissons_ratio"):
            Isotropic(1.0, 0.5)
        with pytest.raises(ValueError, match="youngs_modulus"):
            Isotropic(0.0, 0.3)
        with pytest.raises(ValueError, match="void"):
            conductivity(laminate(), void=0.0)
