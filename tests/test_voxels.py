import meshio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.voxels import (
    Surface,
    View,
    assemble,
    components,
    first_hits,
    render,
    seam_mismatches,
    shade,
    surface,
    write_stl,
)


def ball(edge, radius):
    middles = np.arange(edge) + 0.5 - edge / 2
    return (middles[:, None, None] ** 2 + middles[:, None] ** 2 + middles**2) < radius**2


def random_solid(seed, shape=(7, 6, 5), share=0.5):
    return np.random.default_rng(seed).random(shape) < share


# ------------------------------------------------------------------------------------------------------------- cells


def test_cells_lie_where_they_are_put():
    cells = np.random.default_rng(0).integers(0, 2, (3, 2, 2, 4, 4, 4))
    solid = assemble(cells)
    assert solid.shape == (12, 8, 8)
    for x, y, z in np.ndindex(3, 2, 2):
        there = solid[4 * x : 4 * x + 4, 4 * y : 4 * y + 4, 4 * z : 4 * z + 4]
        np.testing.assert_array_equal(there, cells[x, y, z].astype(bool))


def test_seams_of_cells_with_one_boundary_are_clean_and_a_planted_fault_is_counted():
    octants = np.random.default_rng(1).random((3, 2, 2, 4, 4, 4)) < 0.5
    shared = octants[0, 0, 0]
    for axis in range(3):
        at_face = (..., *[0 if a == axis else slice(None) for a in range(3)])
        octants[at_face] = shared[at_face]
    whole = octants
    for axis in (3, 4, 5):
        whole = np.concatenate([whole, np.flip(whole, axis)], axis)
    solid = assemble(whole)
    assert seam_mismatches(solid, 8) == (0, 2 * 4 + 3 * 2 + 3 * 2)
    solid[8, 3, 9] ^= True  # at one seam along x
    assert seam_mismatches(solid, 8)[0] == 1
    solid[16, 8, 2] ^= True  # at a seam along x and one along y
    assert seam_mismatches(solid, 8)[0] == 3
    solid[4, 4, 4] ^= True  # at none
    assert seam_mismatches(solid, 8)[0] == 3


def test_components_are_counted_by_faces():
    solid = np.zeros((6, 6, 6), bool)
    assert components(np.ones((2, 2, 2), bool)) == (1, 0)
    solid[:3, :3, :3] = True
    solid[3, 3, 3] = True  # touches with a corner alone
    solid[5, 5, 4:] = True
    assert components(solid) == (3, 3)
    assert components(np.zeros((2, 2, 2), bool)) == (0, 0)


# ----------------------------------------------------------------------------------------------------------- surfaces


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5, 0.9]))
def test_surfaces_are_closed_whatever_the_voxels(seed, share):
    solid = random_solid(seed, share=share)
    solid[0, 0, 0] = True
    mesh = surface(solid)
    assert mesh.num_open_edges == 0
    assert 0 < mesh.volume < solid.size


def test_a_box_loses_its_edges_alone_and_a_ball_has_its_volume():
    a, b, c = 9, 7, 5
    mesh = surface(np.ones((a, b, c), bool), spacing=0.5)
    np.testing.assert_allclose(mesh.vertices.min(0), 0, atol=1e-3)
    np.testing.assert_allclose(mesh.vertices.max(0), [4.5, 3.5, 2.5], atol=1e-3)
    # Along an edge a prism of 1/8 of a voxel is cut off; where three edges meet, 1/8 - 1/48 + 3/16 of one is.
    edges = 4 * ((a - 1) + (b - 1) + (c - 1)) / 8
    corners = 8 * (1 / 8 - 1 / 48)
    assert mesh.volume * 8 == pytest.approx(a * b * c - edges - corners, rel=2e-3)
    solid = ball(40, 15)
    assert surface(solid).volume == pytest.approx(solid.sum(), rel=0.01)


def test_an_open_surface_is_found():
    mesh = surface(ball(8, 3))
    assert Surface(mesh.vertices, mesh.triangles[1:]).num_open_edges == 3
    turned = np.concatenate([mesh.triangles[:1, ::-1], mesh.triangles[1:]])
    assert Surface(mesh.vertices, turned).num_open_edges == 3


def test_stl_is_what_other_programs_read(tmp_path):
    mesh = surface(random_solid(3), spacing=0.1)
    write_stl(tmp_path / "new" / "solid.stl", mesh)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["solid.stl"]
    read = meshio.read(tmp_path / "new" / "solid.stl")
    again = Surface(read.points.astype(np.float64), read.get_cells_type("triangle"))
    assert len(again.triangles) == len(mesh.triangles)
    assert again.volume == pytest.approx(mesh.volume, rel=1e-5)
    assert again.num_open_edges == 0
    with pytest.raises(ValueError, match="3 open edges"):
        write_stl(tmp_path / "open.stl", Surface(mesh.vertices, mesh.triangles[1:]))
    assert not (tmp_path / "open.stl").exists()


# ----------------------------------------------------------------------------------------------------------- pictures


def test_rays_meet_the_first_solid_voxel():
    """Against all voxels along each ray, from where it crosses the planes between voxels."""
    rng = np.random.default_rng(0)
    solid = random_solid(5, share=0.15)
    padded = np.pad(solid.astype(np.uint8), 1, constant_values=2)
    num_hits = 0
    for direction in (np.array([0.6, -0.5, 0.62]), np.array([-0.2, 0.9, -0.4]), np.array([0.0, 0.0, 1.0])):
        direction = direction / np.linalg.norm(direction)
        across = rng.normal(size=(60, 3)) * 2
        origins = np.array(solid.shape) / 2 + across - across @ direction[:, None] * direction - 12 * direction
        rays, places = first_hits(padded, origins, direction)
        distances = dict(zip(rays.tolist(), np.linalg.norm(places - origins[rays], axis=1), strict=True))
        assert len(distances) == len(rays)
        num_hits += len(rays)
        for ray, origin in enumerate(origins):
            planes = [(np.arange(n + 1) - o) / d for n, o, d in zip(solid.shape, origin, direction, strict=True) if d]
            crossings = np.sort(np.concatenate(planes))
            voxels = np.floor(origin + ((crossings[1:] + crossings[:-1]) / 2)[:, None] * direction).astype(int)
            inside = ((voxels >= 0) & (voxels < solid.shape)).all(1)
            met = np.flatnonzero(inside)[solid[tuple(voxels[inside].T)]]
            assert (ray in distances) == (len(met) > 0)
            if len(met):
                assert distances[ray] == pytest.approx(crossings[met[0]], abs=1e-9)
    assert 40 < num_hits < 160


def test_a_picture_shows_each_block_in_its_colour():
    solid = np.zeros((16, 8, 8), bool)
    solid[:, 1:7, 1:7] = True
    view = View(azimuth=-90, elevation=0, width=64, samples=1)
    shading = shade(solid, (2, 1, 1), view)
    picture = shading.coloured([[[[1, 0, 0]]], [[[0, 0, 1]]]])
    assert picture.shape == (32, 64, 3)
    assert picture.dtype == np.uint8
    left, right = picture[:, :31], picture[:, 33:]  # seen from -y, x runs to the right
    for half, channel in ((left, 0), (right, 2)):
        painted = half[(half != 255).any(-1)]
        assert len(painted) > 500
        assert painted[:, channel].min() > 50
        assert painted[:, [c for c in range(3) if c != channel]].max() == 0
    assert (picture[[0, -1]] == 255).all()
    np.testing.assert_array_equal(picture, render(solid, [[[[1, 0, 0]]], [[[0, 0, 1]]]], view))
    assert (shading.coloured(np.ones((2, 1, 1, 3))) > 50).all()


def test_up_is_up_and_the_camera_looks_from_where_it_stands():
    solid = np.zeros((8, 8, 8), bool)
    solid[2:6, 2:6, 4:] = True  # in the upper half
    view = View(azimuth=-90, elevation=0, width=32, samples=1)
    seen = shade(solid, (1, 1, 1), view).block >= 0
    assert seen[: len(seen) // 2].any()
    assert not seen[len(seen) // 2 :].any()
    solid = np.ones((8, 8, 8), bool)
    blocks = {azimuth: shade(solid, (2, 2, 2), View(azimuth, 0, 32, 1)).block for azimuth in (-90, 90, 0, 180)}
    met = {
        azimuth: set(np.unravel_index(block[block >= 0], (2, 2, 2))[1 if azimuth % 180 else 0].tolist())
        for azimuth, block in blocks.items()
    }
    assert met == {-90: {0}, 90: {1}, 0: {1}, 180: {0}}


def test_samples_smooth_edges_and_keep_the_size():
    solid = ball(16, 7)
    colours = np.full((1, 1, 1, 3), 0.5)
    rough, fine = (render(solid, colours, View(width=40, samples=samples)) for samples in (1, 3))
    assert rough.shape == fine.shape
    assert len(np.unique(fine)) > len(np.unique(rough))


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: assemble(np.zeros((2, 2, 4, 4, 4))), "expected \\(X, Y, Z, n, n, n\\)"),
        (lambda: assemble(np.zeros((1, 1, 1, 4, 4, 2))), "expected \\(X, Y, Z, n, n, n\\)"),
        (lambda: assemble(np.full((1, 1, 1, 2, 2, 2), 0.5)), "other values than 0 and 1"),
        (lambda: seam_mismatches(np.zeros((8, 8, 6)), 4), "do not divide"),
        (lambda: components(np.zeros((8, 8))), "expected \\(X, Y, Z\\)"),
        (lambda: surface(np.zeros((3, 3, 3))), "no voxel"),
        (lambda: surface(np.ones((3, 3, 3)), spacing=0.0), "spacing = 0.0"),
        (lambda: surface(np.full((3, 3, 3), 2)), "other values"),
        (lambda: render(np.ones((4, 4, 4)), np.zeros((3, 1, 1, 3)), View(width=8)), "do not divide"),
        (lambda: render(np.ones((4, 4, 4)), np.full((1, 1, 1, 3), 1.5), View(width=8)), "values in \\[0, 1\\]"),
        (lambda: render(np.ones((4, 4, 4)), np.zeros((1, 1, 1, 4)), View(width=8)), "colours have shape"),
        (lambda: shade(np.ones((4, 4, 4)), (1, 1), View(width=8)), "blocks"),
        (lambda: View(width=0), "no view"),
        (lambda: View(elevation=90), "no view"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
