"""Geometry of voxel cells: symmetry, the volume-preserving threshold, connectivity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from leviathan.janus.cells import (
    SYMMETRIES,
    bicontinuous,
    boundary_mask,
    is_connected,
    islands,
    orthant,
    percolates,
    symmetrise,
    threshold,
    voxel_orbits,
    whole_cell,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts(cells):
    return cells.flatten(1).sum(-1)


def periodic_components(cell):
    """By scipy: labels of one period, of which those that meet across a face are joined."""
    labels, count = ndimage.label(cell)
    joined = list(range(count + 1))

    def root(label):
        while joined[label] != label:
            label = joined[label]
        return label

    for axis in range(cell.ndim):
        for first, last in zip(labels.take(0, axis).flat, labels.take(-1, axis).flat, strict=True):
            if first and last:
                joined[root(first)] = root(last)
    return len({root(label) for label in range(1, count + 1)})


def links_faces(cell):
    labels, _ = ndimage.label(cell)
    return all(set(labels.take(0, axis).flat) & set(labels.take(-1, axis).flat) - {0} for axis in range(cell.ndim))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_orthant_of_a_mirrored_cell_is_where_it_came_from(dims):
    phase = random(3, *[4] * dims)
    cell = whole_cell(phase, "mirror")
    assert cell.shape == (3, *[8] * dims)
    assert torch.equal(orthant(cell), phase)
    for axis in range(1, dims + 1):
        assert torch.equal(cell.flip(axis), cell)
    assert whole_cell(phase, "none") is phase


@pytest.mark.parametrize(("dims", "sizes"), [(2, {1, 2}), (3, {1, 3, 6})])
def test_orbits_are_what_permutations_of_the_axes_exchange(dims, sizes):
    orbit, size = voxel_orbits(5, dims, "cubic")
    assert set(size.tolist()) == sizes
    assert torch.equal(orbit.bincount(), size)
    grid = orbit.view(1, *[5] * dims)
    for first in range(1, dims):
        assert torch.equal(grid.transpose(first, first + 1), grid)
    assert voxel_orbits(5, dims, "mirror")[1].eq(1).all()


def test_symmetrised_values_are_invariant_and_keep_the_mean():
    values = random(2, 4, 4, 4).double()
    mean = symmetrise(values, "cubic")
    torch.testing.assert_close(mean.transpose(1, 3), mean)
    torch.testing.assert_close(mean.flatten(1).mean(1), values.flatten(1).mean(1))
    torch.testing.assert_close(symmetrise(mean, "cubic"), mean)
    assert symmetrise(values, "mirror") is values


def test_the_boundary_is_where_an_index_is_0_and_of_a_whole_cell_the_last_too():
    octant = boundary_mask(4, 3, "mirror")
    assert int(octant.sum()) == 4**3 - 3**3
    assert octant[0].all()
    assert not octant[1:, 1:, 1:].any()
    assert int(boundary_mask(4, 2, "none").sum()) == 4**2 - 2**2


@settings(max_examples=60, deadline=None)
@given(
    dims=st.sampled_from([2, 3]),
    symmetry=st.sampled_from(SYMMETRIES),
    fractions=st.lists(st.floats(0.02, 0.98), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
)
def test_the_number_of_solid_voxels_is_exact(dims, symmetry, fractions, seed):
    m = 8
    cells = threshold(random(len(fractions), *[m] * dims, seed=seed), torch.tensor(fractions), symmetry)
    wanted = torch.tensor([round(fraction * m**dims) for fraction in torch.tensor(fractions).double().tolist()])
    assert torch.equal(counts(cells), wanted)
    if symmetry == "cubic":
        assert torch.equal(cells.transpose(1, dims), cells)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_of_small_cubic_cells_the_count_is_the_nearest_that_orbits_add_up_to(m):
    sizes = voxel_orbits(m, 3, "cubic")[1].tolist()
    sums = {0}
    for size in sizes:
        sums |= {total + size for total in sums}
    fractions = torch.arange(1, 40) / 40.5
    found = counts(threshold(random(len(fractions), m, m, m), fractions, "cubic"))
    for fraction, count in zip(fractions.double().tolist(), found.tolist(), strict=True):
        wanted = round(fraction * m**3)
        assert abs(count - wanted) == min(abs(total - wanted) for total in sums)


@pytest.mark.parametrize("symmetry", ["none", "mirror"])
def test_the_highest_scores_become_solid(symmetry):
    scores = random(5, 6, 6, 6)
    cells = threshold(scores, 0.3, symmetry)
    for score, cell in zip(scores, cells, strict=True):
        assert score[cell].min() > score[~cell].max()


def test_whole_orbits_with_the_highest_scores_become_solid_but_for_a_few_near_the_cut():
    scores = symmetrise(random(20, 8, 8, 8), "cubic")
    cells = threshold(scores, 0.5, "cubic")
    ranked = scores.flatten(1).argsort(descending=True)
    best = torch.zeros(20, 512, dtype=torch.bool).scatter_(1, ranked[:, :256], True).view_as(cells)
    assert (cells != best).flatten(1).sum(1).max() <= 24


@pytest.mark.parametrize("symmetry", ["none", "mirror"])
def test_more_volume_never_takes_a_voxel_away(symmetry):
    scores = random(1, 6, 6).expand(9, -1, -1)
    cells = threshold(scores, torch.arange(1, 10) / 10, symmetry)
    assert (cells[1:] | ~cells[:-1]).all()


def test_of_equal_scores_the_first_voxels_become_solid():
    cells = threshold(torch.zeros(2, 4, 4), torch.tensor([0.25, 0.5]))
    assert cells.flatten(1).long().tolist() == [[1] * 4 + [0] * 12, [1] * 8 + [0] * 8]
    cubic = threshold(torch.zeros(2, 6, 6, 6), 0.4, "cubic")
    assert torch.equal(cubic[0], cubic[1])
    assert counts(cubic).tolist() == [86, 86]


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_boundary_is_kept_and_the_rest_makes_up_for_it(symmetry):
    m = 8
    mask = boundary_mask(m, 3, symmetry)
    pattern = symmetrise(random(1, m, m, m, seed=1), "cubic")[0] > 0
    boundary = torch.where(mask, pattern.byte(), torch.tensor(2, dtype=torch.uint8))
    cells = threshold(symmetrise(random(6, m, m, m), symmetry), 0.5, symmetry, boundary)
    assert torch.equal(cells[:, mask], pattern[mask].expand(6, -1))
    assert counts(cells).tolist() == [m**3 // 2] * 6


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan"), [0.5, 0.5, 0.5]])
def test_other_volume_fractions_are_refused(fraction):
    with pytest.raises(ValueError, match="expected numbers between 0 and 1"):
        threshold(torch.zeros(2, 4, 4), torch.tensor(fraction))


def test_bad_scores_and_boundaries_are_refused():
    scores = torch.zeros(1, 4, 4, 4)
    solid = torch.full((4, 4, 4), 2, dtype=torch.uint8)
    solid[0] = 1
    with pytest.raises(ValueError, match=r"ask for a fraction from 0\.25 to 1"):
        threshold(scores, 0.2, "none", solid)
    with pytest.raises(ValueError, match="not invariant under permutations"):
        threshold(scores, 0.5, "cubic", solid)
    with pytest.raises(ValueError, match="the boundary has shape"):
        threshold(scores, 0.5, "none", solid[:2])
    with pytest.raises(ValueError, match="the boundary has values"):
        threshold(scores, 0.5, "none", solid + 5)
    with pytest.raises(ValueError, match="NaN"):
        threshold(torch.full_like(scores, float("nan")), 0.5)
    with pytest.raises(ValueError, match="equal edges"):
        threshold(torch.zeros(1, 4, 5), 0.5)
    with pytest.raises(ValueError, match="symmetry = 'round'"):
        threshold(scores, 0.5, "round")
    with pytest.raises(ValueError, match="even number"):
        orthant(torch.zeros(1, 3, 3))


@pytest.mark.parametrize(("dims", "n", "share"), [(3, 8, 0.4), (3, 6, 0.55), (3, 8, 0.8), (2, 12, 0.65), (2, 8, 0.75)])
def test_connectivity_is_scipys(dims, n, share):
    cells = torch.rand(100, *[n] * dims, generator=torch.Generator().manual_seed(0)) < share
    through = torch.tensor([bool(links_faces(cell)) for cell in cells.numpy()])
    single = torch.tensor([periodic_components(cell) == 1 for cell in cells.numpy()])
    assert torch.equal(percolates(cells), through)
    assert torch.equal(is_connected(cells), through & single)


@pytest.mark.parametrize("symmetry", ["mirror", "cubic"])
def test_an_orthant_tells_whether_its_cell_is_bicontinuous(symmetry):
    smooth = torch.nn.functional.avg_pool3d(random(200, 1, 10, 10, 10), 3, 1)[:, 0]
    phase = threshold(symmetrise(smooth, symmetry), 0.5, symmetry)
    cell = whole_cell(phase, symmetry)
    expected = is_connected(cell) & percolates(~cell)
    assert expected.any()
    assert not expected.all()
    assert torch.equal(bicontinuous(phase, symmetry), expected)
    assert torch.equal(bicontinuous(cell, "none"), expected)
    assert torch.equal(bicontinuous(phase.float(), symmetry), expected)


def test_a_path_through_the_periodic_face_alone_does_not_percolate():
    wall = torch.zeros(1, 6, 6, dtype=torch.bool)
    wall[:, 0] = True  # along the second axis only
    assert not percolates(wall)
    cross = wall.clone()
    cross[:, :, 3] = True
    assert percolates(cross)
    cut = cross.clone()
    cut[:, 3, 3] = False  # one component through the periodic face, but no path within the cell
    assert periodic_components(cut[0].numpy()) == 1
    assert not percolates(cut)
    assert not is_connected(cut)
    assert not is_connected(torch.zeros(1, 6, 6, dtype=torch.bool))


def test_a_winding_path_is_followed_to_its_end():
    maze = torch.zeros(1, 9, 9, dtype=torch.bool)
    maze[0, ::2] = True
    maze[0, 1::4, -1] = True
    maze[0, 3::4, 0] = True
    assert percolates(maze)
    maze[0, 3, 0] = False
    assert not percolates(maze)


@pytest.mark.parametrize("symmetry", ["none", "mirror"])
def test_islands_are_the_solid_apart_from_what_links_all_faces(symmetry):
    cells = torch.zeros(2, 6, 6, 6, dtype=torch.bool)
    cells[0, 3, 3], cells[0, 3, :, 3], cells[0, :, 3, 3] = True, True, True
    cells[1, 3, 3] = True  # links no face but along one axis: nothing says what floats
    linked = cells.clone()
    cells[:, 1, 1, 1] = True
    cells[:, 0, 2, 2] = cells[:, 0, 2, 3] = cells[:, 0, 3, 2] = True
    floating = islands(cells, symmetry)
    assert not floating[1].any()
    assert torch.equal(cells[0] & ~floating[0], linked[0] | cells[0] & (torch.arange(6) == 0).view(6, 1, 1))
    assert floating[0].nonzero().tolist() == [[1, 1, 1]]


def test_an_orbit_that_is_ruled_out_is_not_taken_to_make_a_count_exact():
    scores = symmetrise(random(4, 6, 6, 6), "cubic")
    line = torch.arange(6)
    scores[:, line, line, line] = -torch.inf
    cells = threshold(scores, 0.5, "cubic")
    assert not cells[:, line, line, line].any()
    assert counts(cells).tolist() == [108] * 4
    assert counts(threshold(scores, 109 / 216, "cubic")).tolist() == [108] * 4


def test_where_ruled_out_orbits_are_all_that_is_left_the_count_is_within_half_of_one():
    scores = symmetrise(random(8, 4, 4, 4), "cubic")
    scores = scores.masked_fill(symmetrise(random(8, 4, 4, 4, seed=1), "cubic") > 0, -torch.inf)
    for wanted in range(int(scores.isfinite().flatten(1).sum(1).max()) + 1, 64):
        cells = threshold(scores, wanted / 64, "cubic")
        assert (counts(cells) - wanted).abs().max() <= 3
        assert cells[scores.isfinite()].all()


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_void_that_is_closed_in_is_not_bicontinuous(symmetry):
    solid = torch.ones(2, 6, 6, 6, dtype=torch.bool)
    solid[:, 2:4, 2:4, 2:4] = False
    for ahead in ((slice(None), 2, 2), (2, slice(None), 2), (2, 2, slice(None))):
        solid[(1, *ahead)] = False  # a channel along every axis
    assert bicontinuous(solid, symmetry).tolist() == [False, True]
