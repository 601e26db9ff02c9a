r"""A cantilever of unit cells: what stiffness its bending moment asks for, and how it bends.

Cells are cubes of edge 1; x runs from the clamped root to the tip, where a unit force pulls in -z.

**Targets.** Under a force F at the tip the moment is :math:`M(x) = F (L - x)`. A section whose stiffness is in
proportion to its moment has the same curvature everywhere, and so the same strain at its surface. A material needs some
stiffness at the tip too, so the law is affine in the moment, and two given values fix it: those at the centres of the
first and the last column of cells. With :math:`x_i = i + 1/2`, i = 0 ... n - 1,

.. math:: C_{1111}(x_i) = C_{tip} + (C_{root} - C_{tip}) \frac{M(x_i) - M(x_{n-1})}{M(x_0) - M(x_{n-1})},

linear in x from column to column. The volume fraction is that of a power law (SIMP),
:math:`C_{1111} = C_{solid} V_f^p`, whose two constants follow from the volume fractions at the two ends. All cells of a
column have the same target.

**Macroscale.** Each cell is a homogeneous block with its homogenised stiffness matrix; triquadratic hexahedra of
scikit-fem.
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse
import skfem
from numpy.typing import ArrayLike, NDArray

from leviathan.janus.homogenization.elements import voigt_pairs

Array = NDArray[np.float64]

VOIGT = voigt_pairs(3)


@dataclass(frozen=True, eq=False)
class BeamTargets:
    """What each column of cells is to be, from root to tip.

    Attributes:
        stiffness: C1111 (columns,).
        volume_fraction: (columns,).
        exponent: p of the power law.
        solid_stiffness: C1111 at volume fraction 1 by that law, in the units of the stiffness.
    """

    stiffness: Array
    volume_fraction: Array
    exponent: float
    solid_stiffness: float


def beam_targets(num_columns: int, stiffness: ArrayLike, volume_fraction: ArrayLike) -> BeamTargets:
    """Targets by the law of this module.

    Args:
        num_columns: Cells along the beam.
        stiffness: C1111 of the first and the last column.
        volume_fraction: Of the first and the last column.

    Raises:
        ValueError: If there are fewer than two columns, or the ends do not fall from root to tip, above 0 and, for
            volume fractions, below 1.
    """
    if not isinstance(num_columns, int) or num_columns < 2:
        raise ValueError(f"{num_columns!r} cells along the beam; expected 2 or more.")
    ends = {}
    for name, given, limit in (("stiffness", stiffness, np.inf), ("volume_fraction", volume_fraction, 1.0)):
        ends[name] = np.asarray(given, dtype=np.float64)
        if ends[name].shape != (2,) or not limit > ends[name][0] > ends[name][1] > 0:
            words = "" if limit == np.inf else f"{limit:g} > "
            raise ValueError(f"{name} = {given!r} from root to tip; expected two values {words}root > tip > 0.")
    root, tip = ends["stiffness"]
    exponent = np.log(root / tip) / np.log(ends["volume_fraction"][0] / ends["volume_fraction"][1])
    solid = root / ends["volume_fraction"][0] ** exponent
    moment = num_columns - (np.arange(num_columns) + 0.5)
    field = tip + (root - tip) * (moment - moment[-1]) / (moment[0] - moment[-1])
    return BeamTargets(field, (field / solid) ** (1 / exponent), float(exponent), float(solid))


# --------------------------------------------------------------------------------------------------------- macroscale


@dataclass(frozen=True, eq=False)
class BeamResponse:
    """How a beam bends under a unit force at its tip.

    Attributes:
        deflection: Mean of the displacement over the tip's face along the force: twice the energy.
        energy: Strain energy of each cell (X, Y, Z).
        num_unknowns: Without those that the clamp fixes.
    """

    deflection: float
    energy: Array
    num_unknowns: int


def bend(stiffness: ArrayLike, elements_per_cell: int) -> BeamResponse:
    """Solves the beam: clamped at x = 0, a unit force as an even shear traction on the face at the tip.

    Args:
        stiffness: (X, Y, Z, 6, 6), Voigt 11, 22, 33, 23, 13, 12 with engineering shear: of each cell.
        elements_per_cell: Along each edge of a cell.

    Raises:
        ValueError: If the shape is another, or a matrix is not symmetric and positive definite.
    """
    stiffness = _checked_stiffness(stiffness)
    if not isinstance(elements_per_cell, int) or elements_per_cell < 1:
        raise ValueError(f"elements_per_cell = {elements_per_cell!r}; expected an integer of 1 or more.")
    counts = stiffness.shape[:3]
    mesh = skfem.MeshHex.init_tensor(*(np.linspace(0, count, count * elements_per_cell + 1) for count in counts))
    basis = skfem.Basis(mesh, skfem.ElementVector(skfem.ElementHex2()), intorder=4)

    # All elements are the same cube: strains of its functions at its points serve every stiffness.
    gradients = np.stack(
        [np.asarray(function[0].grad)[:, :, 0] for function in basis.basis]
    )  # (functions, 3, 3, points)
    strains = np.stack([gradients[:, i, j] + (i != j) * gradients[:, j, i] for i, j in VOIGT], axis=1)
    flat = stiffness.reshape(-1, 6, 6)
    weights = basis.dx[0]
    by_entry = np.einsum("ivq,jwq,q->vwij", strains, strains, weights, optimize=True)
    matrices = np.einsum("cvw,vwij->cij", flat, by_entry, optimize=True)

    middles = mesh.p[:, mesh.t].mean(1)  # (3, elements)
    cells = np.ravel_multi_index(tuple(np.floor(middles).astype(int)), counts)
    dofs = basis.element_dofs.T  # (elements, functions)
    rows, columns = (
        np.broadcast_to(index, (*dofs.shape, dofs.shape[1])) for index in (dofs[:, :, None], dofs[:, None])
    )
    system = scipy.sparse.coo_matrix((matrices[cells].ravel(), (rows.ravel(), columns.ravel()))).tocsr()

    tip = skfem.FacetBasis(mesh, basis.elem, facets=mesh.facets_satisfying(lambda x: np.isclose(x[0], counts[0])))
    load = _pull.assemble(tip) / (counts[1] * counts[2])
    fixed = basis.get_dofs(lambda x: np.isclose(x[0], 0)).all()
    moved = skfem.solve(*skfem.condense(system, load, D=fixed))

    local = moved[dofs]
    energies = np.einsum("ei,eij,ej->e", local, matrices[cells], local, optimize=True) / 2
    energy = np.bincount(cells, energies, minlength=len(flat)).reshape(counts)
    return BeamResponse(float(load @ moved), energy, int(basis.N) - len(fixed))


@skfem.LinearForm
def _pull(v: skfem.element.DiscreteField, _: object) -> Array:
    return -v[2]


def euler_bernoulli(stiffness: ArrayLike) -> float:
    r"""The deflection of the tip if sections stay plane and only C1111 counts: :math:`\int (L - x)^2 / (C I)(x) dx`.

    The bending stiffness C I of a section is taken about its axis weighted by stiffness.

    Args:
        stiffness: C1111 (X, Y, Z) of each cell.

    Raises:
        ValueError: If the shape is another, or a value is not above 0.
    """
    stiffness = np.asarray(stiffness, dtype=np.float64)
    if stiffness.ndim != 3 or not (np.isfinite(stiffness) & (stiffness > 0)).all():
        raise ValueError(f"C1111 has shape {stiffness.shape}; expected (X, Y, Z) with finite values above 0.")
    layers = stiffness.sum(1)  # (X, Z)
    height = np.arange(layers.shape[1]) + 0.5
    axis = (layers @ height / layers.sum(1))[:, None]
    bending = (layers * (1 / 12 + (height - axis) ** 2)).sum(1)
    arm = len(bending) - np.arange(len(bending) + 1)
    return float((-np.diff(arm**3) / 3 / bending).sum())


# --------------------------------------------------------------------------------------------------------- comparison


@dataclass(frozen=True)
class FieldErrors:
    """How a field of positive values keeps to its target; relative to the target of each cell, but for R2.

    Attributes:
        signed: Mean error.
        mae: Mean of the error's size.
        rmse: Root of its mean square.
        largest: Largest size.
        r2: Share of the target's variance over the cells that is not in the error.
    """

    signed: float
    mae: float
    rmse: float
    largest: float
    r2: float

    @classmethod
    def of(cls, target: ArrayLike, found: ArrayLike) -> "FieldErrors":
        """Compares two arrays of one shape."""
        target, found = np.asarray(target, dtype=np.float64), np.asarray(found, dtype=np.float64)
        if target.shape != found.shape or not (target > 0).all():
            raise ValueError(f"shapes {target.shape} and {found.shape}; expected one shape and targets above 0.")
        error = found / target - 1
        rest = ((found - target) ** 2).sum() / ((target - target.mean()) ** 2).sum()
        size = np.abs(error)
        values = (error.mean(), size.mean(), np.sqrt((error**2).mean()), size.max(), 1 - rest)
        return cls(*map(float, values))


@dataclass(frozen=True)
class BeamErrors:
    """How the whole beam keeps to the beam that was asked for, under the same load.

    Attributes:
        target_deflection: Of the beam that was asked for, in edges of a cell for a unit force.
        deflection: Of the beam that was found.
        relative_deflection: Its relative difference.
        bending_deflection: The same difference by Euler and Bernoulli, from C1111 alone.
        energy_correlation: Pearson's, of the cells' strain energies.
        energy_l1: Sum over the cells of the differences between their shares in the strain energy.
        num_unknowns: Of the elements.
    """

    target_deflection: float
    deflection: float
    relative_deflection: float
    bending_deflection: float
    energy_correlation: float
    energy_l1: float
    num_unknowns: int


def compare_beams(
    target: ArrayLike, stiffness: ArrayLike, elements_per_cell: int
) -> tuple[BeamErrors, BeamResponse, BeamResponse]:
    """Bends the beam that was asked for and the one that was found.

    The target says C1111 alone, so a cell of the beam that was asked for has the matrix that was found, times the
    ratio of the target's C1111 to the one found: every difference comes from the prescribed property.

    Args:
        target: C1111 (X, Y, Z).
        stiffness: What was found (X, Y, Z, 6, 6), as :func:`bend` takes it.
        elements_per_cell: Along each edge of a cell.

    Returns:
        The errors, and the responses asked for and found.

    Raises:
        ValueError: If the shapes do not fit, or a stiffness is not positive.
    """
    stiffness, target = _checked_stiffness(stiffness), np.asarray(target, dtype=np.float64)
    if target.shape != stiffness.shape[:3] or not (target > 0).all():
        raise ValueError(f"targets have shape {target.shape}; expected {stiffness.shape[:3]} with values above 0.")
    axial = stiffness[..., 0, 0]
    asked = bend(stiffness * (target / axial)[..., None, None], elements_per_cell)
    found = bend(stiffness, elements_per_cell)
    shares = [response.energy.ravel() / response.energy.sum() for response in (asked, found)]
    errors = BeamErrors(
        target_deflection=asked.deflection,
        deflection=found.deflection,
        relative_deflection=found.deflection / asked.deflection - 1,
        bending_deflection=euler_bernoulli(axial) / euler_bernoulli(target) - 1,
        energy_correlation=float(np.corrcoef(asked.energy.ravel(), found.energy.ravel())[0, 1]),
        energy_l1=float(np.abs(shares[0] - shares[1]).sum()),
        num_unknowns=found.num_unknowns,
    )
    return errors, asked, found


def _checked_stiffness(stiffness: ArrayLike) -> Array:
    stiffness = np.asarray(stiffness, dtype=np.float64)
    if stiffness.ndim != 5 or stiffness.shape[3:] != (6, 6) or stiffness.size == 0:
        raise ValueError(f"the stiffness has shape {stiffness.shape}; expected (X, Y, Z, 6, 6).")
    if not np.isfinite(stiffness).all():
        raise ValueError("the stiffness holds values that are not finite.")
    size = np.abs(stiffness).max()
    if not np.allclose(stiffness, stiffness.swapaxes(-1, -2), rtol=0, atol=1e-3 * size):
        raise ValueError("a stiffness matrix is not symmetric.")
    stiffness = (stiffness + stiffness.swapaxes(-1, -2)) / 2
    if not (np.linalg.eigvalsh(stiffness)[..., 0] > 0).all():
        raise ValueError("a stiffness matrix is not positive definite.")
    return stiffness
