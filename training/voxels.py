"""Solids of voxels: cells put side by side and their seams, closed surfaces for STL, shaded pictures.

Arrays are indexed x, y, z; a voxel is a cube of edge 1 unless a spacing is given.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import meshio
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import gaussian_filter, label, map_coordinates
from skimage.measure import marching_cubes

Array = NDArray[np.float64]

VOID, SOLID, OUTSIDE = 0, 1, 2
RAYS_AT_ONCE = 2**17  # what a processor's cache holds

MARGIN = 4  # voxels of void around a solid, so that its outer faces have slopes too
NORMAL_WIDTH = 1.2  # voxels over which surfaces are smoothed to tell where they face
HOLLOW_DEPTH = 0.1  # of a block's edge: how far things stand in each other's light
LIGHT = np.array([-0.4, 0.6, -0.9])  # where it comes from: to the right, up, and away from the camera
AMBIENT, DIRECT = 0.4, 0.68  # brightness of what faces away from the light, and what is added for facing it
HIDDEN = 0.85  # of the brightness is lost in the deepest hollow

# ------------------------------------------------------------------------------------------------------------- cells


def assemble(cells: NDArray) -> NDArray[np.bool_]:
    """Puts cells side by side.

    Args:
        cells: (X, Y, Z, n, n, n) of 0 and 1: the cell at each place.

    Returns:
        (X n, Y n, Z n).

    Raises:
        ValueError: If the shape is another, or there are other values.
    """
    cells = np.asarray(cells)
    if cells.ndim != 6 or cells.size == 0 or len(set(cells.shape[3:])) != 1:
        raise ValueError(f"cells have shape {cells.shape}; expected (X, Y, Z, n, n, n).")
    if not np.isin(cells, (0, 1)).all():
        raise ValueError("cells hold other values than 0 and 1; threshold them first.")
    counts, edge = cells.shape[:3], cells.shape[3]
    return cells.astype(bool).transpose(0, 3, 1, 4, 2, 5).reshape([count * edge for count in counts])


def seam_mismatches(solid: NDArray, edge: int) -> tuple[int, int]:
    """Voxels that differ between the two layers that meet where cells of an edge of ``edge`` voxels touch.

    Returns:
        Their number over all seams, and the number of seams.

    Raises:
        ValueError: If the edge does not divide the solid's sides.
    """
    solid = _checked_solid(solid)
    counts = _blocks(solid.shape, edge)
    differing = sum(
        int((solid.take(place - 1, axis) != solid.take(place, axis)).sum())
        for axis in range(3)
        for place in range(edge, solid.shape[axis], edge)
    )
    seams = sum((counts[axis] - 1) * counts[axis - 1] * counts[axis - 2] for axis in range(3))
    return differing, seams


def components(solid: NDArray) -> tuple[int, int]:
    """Connected parts of the solid, and the voxels outside of the largest; neighbours are voxels that share a face."""
    parts, count = label(_checked_solid(solid))
    sizes = np.bincount(parts.ravel(), minlength=2)[1:]
    return int(count), int(sizes.sum() - sizes.max())


# ----------------------------------------------------------------------------------------------------------- surfaces


@dataclass(frozen=True, eq=False)
class Surface:
    """Triangles around a solid, seen counter-clockwise from outside.

    Attributes:
        vertices: (V, 3).
        triangles: (T, 3), indices of vertices.
    """

    vertices: Array
    triangles: NDArray[np.int64]

    @property
    def num_open_edges(self) -> int:
        """Edges that are not shared by two triangles that run along them in opposite directions; 0: it is closed."""
        edges = np.concatenate([self.triangles[:, [i, (i + 1) % 3]] for i in range(3)]).astype(np.int64)
        low, high = np.sort(edges, axis=1).T
        _, index = np.unique(low * len(self.vertices) + high, return_inverse=True)
        forward = np.bincount(index[edges[:, 0] == low], minlength=index.max() + 1)
        backward = np.bincount(index[edges[:, 0] != low], minlength=index.max() + 1)
        return int(((forward != 1) | (backward != 1)).sum())

    @property
    def volume(self) -> float:
        r"""Enclosed volume by the divergence theorem: :math:`\frac{1}{6} \sum a \cdot (b \times c)`."""
        a, b, c = (self.vertices[self.triangles[:, i]] for i in range(3))
        return float(np.einsum("ti,ti->", a, np.cross(b, c)) / 6)


def surface(solid: NDArray, spacing: float = 1.0) -> Surface:
    """The surface of a solid by marching cubes, closed where the solid meets the sides of its box.

    It runs through the middles between voxels of solid and void: planes lie where voxels end, edges are bevelled.

    Args:
        solid: (X, Y, Z) of 0 and 1.
        spacing: Edge of a voxel.

    Raises:
        ValueError: If there is no solid voxel, or the shape or values are others.
    """
    padded = np.pad(_checked_solid(solid), 1)
    if not padded.any():
        raise ValueError("the solid has no voxel; there is no surface.")
    if not spacing > 0:
        raise ValueError(f"spacing = {spacing!r}; expected a number above 0.")
    # At exactly 1/2 both ways to join the corners of a face are as good, and neighbours would choose differently.
    level = 0.5 - 1e-4
    vertices, triangles, _, _ = marching_cubes(padded.astype(np.float32), level, gradient_direction="ascent")
    return Surface((vertices.astype(np.float64) - 0.5) * spacing, triangles.astype(np.int64))


def write_stl(path: str | Path, mesh: Surface) -> None:
    """Writes a binary STL, whole or not at all.

    Raises:
        ValueError: If the surface is not closed.
    """
    if mesh.num_open_edges:
        raise ValueError(f"the surface has {mesh.num_open_edges} open edges; expected a closed one.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    content = meshio.Mesh(mesh.vertices, [("triangle", mesh.triangles)])
    content.write(os.fspath(partial), file_format="stl", binary=True)
    partial.replace(path)


# ----------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class View:
    """Where a picture is taken from, without perspective.

    Attributes:
        azimuth: Angle of the camera about z, from x, in degrees.
        elevation: Its angle above the plane of x and y, in degrees.
        width: Pixels.
        samples: Rays along each side of a pixel.

    Raises:
        ValueError: If an option is out of range.
    """

    azimuth: float = -65.0
    elevation: float = 25.0
    width: int = 1600
    samples: int = 2

    def __post_init__(self):
        if min(self.width, self.samples) < 1 or not -90 < self.elevation < 90:
            raise ValueError(
                f"{self} is no view; expected width and samples above 0 and an elevation within (-90, 90)."
            )

    def axes(self) -> tuple[Array, Array, Array]:
        """Unit vectors to the right, up, and away from the camera."""
        azimuth, elevation = np.radians([self.azimuth, self.elevation])
        right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
        away = -np.array([*(np.cos(elevation) * np.array([np.cos(azimuth), np.sin(azimuth)])), np.sin(elevation)])
        return right, np.cross(right, away), away


@dataclass(frozen=True, eq=False)
class Shading:
    """A picture without its colours.

    Attributes:
        brightness: (rows, columns), of each ray.
        block: (rows, columns): which block of the solid a ray meets, counted in C order, or -1.
        blocks: Their number along x, y and z.
        samples: Rays along each side of a pixel.
    """

    brightness: NDArray[np.float32]
    block: NDArray[np.int32]
    blocks: tuple[int, int, int]
    samples: int

    def coloured(self, colours: ArrayLike) -> NDArray[np.uint8]:
        """The picture (height, width, 3) on white, with colours (A, B, C, 3) in [0, 1] for the blocks.

        Raises:
            ValueError: If the shape or a value is another.
        """
        colours = np.asarray(colours, dtype=np.float32)
        if colours.shape != (*self.blocks, 3) or not ((colours >= 0) & (colours <= 1)).all():
            raise ValueError(f"colours have shape {colours.shape}; expected {(*self.blocks, 3)}, values in [0, 1].")
        table = np.concatenate([colours.reshape(-1, 3), np.ones((1, 3), np.float32)])  # the last, at -1: no block
        picture = np.clip(table[self.block] * self.brightness[..., None], 0, 1)
        rows, columns = (size // self.samples for size in self.block.shape)
        picture = picture.reshape(rows, self.samples, columns, self.samples, 3).mean((1, 3))
        return np.rint(255 * picture).astype(np.uint8)


def shade(solid: NDArray, blocks: tuple[int, int, int], view: View) -> Shading:
    """Looks at a solid: the first voxel along each ray, lit from the upper left, dark in its hollows.

    Args:
        solid: (X, Y, Z) of 0 and 1.
        blocks: How many equal blocks the solid is cut into along x, y and z: those that have a colour, such as cells.
        view: The camera. The height of the picture is what the solid needs.

    Raises:
        ValueError: If the blocks do not divide the solid.
    """
    solid = _checked_solid(solid)
    shape = np.array(solid.shape)
    if len(blocks) != 3 or min(blocks) < 1 or (shape % blocks).any():
        raise ValueError(f"{blocks} blocks do not divide a solid of {solid.shape} voxels.")
    edges = shape // blocks

    right, up, away = view.axes()
    corners = (np.indices((2, 2, 2)).reshape(3, -1).T - 0.5) * shape
    reach = 1.02 * np.abs(corners @ np.stack([right, up], axis=1)).max(0)
    pixel = 2 * reach[0] / view.width
    height = max(1, int(np.ceil(2 * reach[1] / pixel)))
    across, down = (
        (np.arange(view.samples * count) + 0.5 - view.samples * count / 2) * pixel / view.samples
        for count in (view.width, height)
    )
    start = shape / 2 - np.linalg.norm(shape) * away

    padded = np.pad(solid.astype(np.uint8), 1, constant_values=OUTSIDE)
    around = np.pad(solid.astype(np.float32), MARGIN)
    smooth = gaussian_filter(around, NORMAL_WIDTH, mode="constant", truncate=3)
    depth = float(edges.min()) * HOLLOW_DEPTH
    crowd = gaussian_filter(around, depth, mode="constant", truncate=3)
    light = LIGHT @ [right, up, away] / np.linalg.norm(LIGHT)

    brightness = np.ones((len(down), len(across)), dtype=np.float32)
    block = np.full(brightness.shape, -1, dtype=np.int32)
    rows = max(1, RAYS_AT_ONCE // len(across))
    for top in range(0, len(down), rows):
        heights = -down[top : top + rows]  # pictures begin at the top
        origins = start + (heights[:, None, None] * up + across[None, :, None] * right).reshape(-1, 3)
        rays, places = first_hits(padded, origins, away)
        if not len(rays):
            continue
        normals = _normals(smooth, places)
        hidden = np.clip(_sample(crowd, places + 2 * depth * normals), 0, 1)
        lit = np.clip(normals @ light, 0, None)
        brightness[top : top + rows].reshape(-1)[rays] = (AMBIENT + DIRECT * lit) * (1 - HIDDEN * hidden)
        inside = np.clip(np.floor(places + 1e-6 * away), 0, shape - 1).astype(np.int64) // edges
        block[top : top + rows].reshape(-1)[rays] = np.ravel_multi_index(tuple(inside.T), blocks)
    return Shading(brightness, block, tuple(blocks), view.samples)


def render(solid: NDArray, colours: ArrayLike, view: View) -> NDArray[np.uint8]:
    """A picture (height, width, 3) of a solid, whose equal blocks have colours (A, B, C, 3); see :func:`shade`."""
    return shade(solid, np.shape(colours)[:3], view).coloured(colours)


def first_hits(padded: NDArray[np.uint8], origins: Array, direction: Array) -> tuple[NDArray[np.int64], Array]:
    """Where parallel rays first meet a solid voxel, walking from voxel to voxel.

    The walk is that of J. Amanatides and A. Woo, "A Fast Voxel Traversal Algorithm for Ray Tracing" (1987).

    Args:
        padded: VOID and SOLID, with a border of one voxel OUTSIDE. The voxel [1, 1, 1] starts at the origin.
        origins: (R, 3), where the rays start.
        direction: (3,), of all rays.

    Returns:
        Which rays meet one (H,), and the places (H, 3).
    """
    shape = np.array(padded.shape) - 2
    direction = np.where(np.abs(direction) < 1e-12, 1e-12, direction)  # no division by zero
    walls = np.stack([-origins, shape - origins]) / direction  # distances to the sides of the box
    entry = np.maximum(walls.min(0).max(1), 0)
    rays = np.flatnonzero(entry < walls.max(0).min(1))
    origins, distance = origins[rays], entry[rays]
    voxel = np.clip(np.floor(origins + distance[:, None] * direction), 0, shape - 1).astype(np.int64)
    crossing = (voxel + (direction > 0) - origins) / direction  # distance to the next wall along each axis
    stride = np.array([padded.shape[1] * padded.shape[2], padded.shape[2], 1])
    steps, pace = np.where(direction > 0, stride, -stride), 1 / np.abs(direction)
    values, index = padded.ravel(), (voxel + 1) @ stride

    found, where = [], []
    while len(rays):
        value = values[index]
        if (value != VOID).any():
            hit, going = value == SOLID, value == VOID
            found.append(rays[hit])
            where.append(origins[hit] + distance[hit, None] * direction)
            rays, origins, distance = rays[going], origins[going], distance[going]
            crossing, index = crossing[going], index[going]
        axis = crossing.argmin(1)
        each = np.arange(len(rays))
        distance = crossing[each, axis]
        crossing[each, axis] += pace[axis]
        index = index + steps[axis]
    return np.concatenate([np.zeros(0, np.int64), *found]), np.concatenate([np.zeros((0, 3)), *where])


def _sample(volume: NDArray[np.float32], places: Array) -> NDArray[np.float32]:
    """Values of a volume with its margin, at places between voxels' middles."""
    return map_coordinates(volume, places.T + (MARGIN - 0.5), order=1, mode="grid-constant")


def _normals(smooth: NDArray[np.float32], places: Array) -> Array:
    """Unit vectors down the slope of a smoothed solid."""
    slope = np.stack([_sample(smooth, places - one) - _sample(smooth, places + one) for one in np.eye(3)], axis=1)
    return slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)


# ------------------------------------------------------------------------------------------------------------- checks


def _checked_solid(solid: NDArray) -> NDArray[np.bool_]:
    solid = np.asarray(solid)
    if solid.ndim != 3 or solid.size == 0:
        raise ValueError(f"the solid has shape {solid.shape}; expected (X, Y, Z) voxels.")
    if not np.isin(solid, (0, 1)).all():
        raise ValueError("the solid holds other values than 0 and 1; threshold it first.")
    return solid.astype(bool)


def _blocks(shape: tuple[int, ...], edge: int) -> list[int]:
    if edge < 1 or any(side % edge for side in shape):
        raise ValueError(f"cells of {edge} voxels do not divide a solid of {shape} voxels.")
    return [side // edge for side in shape]
