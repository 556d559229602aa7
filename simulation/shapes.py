"""Geometry of the objects, from their size alone: convex solids that collide and, where solids would look coarse, a
mesh that is drawn instead. Pure functions; lengths in m, each object's frame at its centre with z up.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from stereovla.processing.rotations import rpy_to_matrix

ASSETS = Path(__file__).parent / "assets"
SIDES = 20  # of round hulls and walls; a primitive cylinder creeps out of the grip
WALL_SIDES = 12
BAND_SHARE = 0.36  # of a bowl's height: the upright rim that the fingers hold
BOWL_FOOT_SHARE = 0.55  # of its radius
Mesh = tuple[np.ndarray, np.ndarray]  # vertices (n, 3) m, faces (m, 3) int
Half = tuple[float, float, float]  # half sizes of the bounding box of what the fingers hold


@dataclass(frozen=True)
class Solid:
    """A convex body: a box of half sizes `size`, a sphere of radius size[0], or the hull of `points` (n, 3)."""

    kind: str  # "box", "sphere", "hull"
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)
    position: tuple[float, float, float] = (0.0, 0.0, 0.0)
    rotation: np.ndarray | None = None  # (3, 3)
    points: np.ndarray | None = None


@dataclass(frozen=True)
class Geometry:
    """What collides, what is drawn (the solids, when there is no mesh), and dark marks, boxes that only are drawn."""

    solids: Sequence[Solid]
    mesh: Mesh | None = None
    marks: Sequence[Solid] = ()


def lathe(profile: Sequence[tuple[float, float]], sides: int = 28) -> Mesh:
    """Surface of revolution about z of a polyline of (radius, z); points on the axis close it. Each piece of the
    polyline has rings of its own, which keeps the edges between them sharp when normals are averaged.
    """
    angle = np.arange(sides) * (2 * np.pi / sides)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    vertices, faces = [], []
    for (low, low_z), (high, high_z) in zip(profile, profile[1:], strict=False):
        first = len(vertices) * sides
        vertices += [np.insert(circle * radius, 2, z, axis=1) for radius, z in ((low, low_z), (high, high_z))]
        for i in range(sides):
            j = (i + 1) % sides
            a, b, c, d = first + i, first + j, first + sides + i, first + sides + j
            if low > 0:
                faces.append((a, b, d))
            if high > 0:
                faces.append((a, d, c))
    used, faces = np.unique(np.array(faces), return_inverse=True)
    return np.concatenate(vertices)[used], faces.reshape(-1, 3)


def tube(path: np.ndarray, radius: float) -> Mesh:
    """A bent bar of six sides in the plane y = 0 along `path` (n, 3), open at its ends."""
    sides = 6
    direction = np.gradient(path, axis=0)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    across = np.array([0.0, 1.0, 0.0])
    vertices = [
        point + radius * (math.cos(a) * across + math.sin(a) * np.cross(along, across))
        for point, along in zip(path, direction, strict=True)
        for a in np.arange(sides) * (2 * np.pi / sides)
    ]
    faces = []
    for ring in range(len(path) - 1):
        for i in range(sides):
            j = (i + 1) % sides
            a, b, c, d = (ring * sides + k for k in (i, j, sides + i, sides + j))
            faces += [(a, b, d), (a, d, c)]
    return np.array(vertices), np.array(faces)


def merged(*meshes: Mesh) -> Mesh:
    """Several meshes as one."""
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in meshes[:-1]])
    return (
        np.concatenate([vertices for vertices, _ in meshes]),
        np.concatenate([faces + start for (_, faces), start in zip(meshes, starts, strict=True)]),
    )


def round_hull(sections: Sequence[tuple[float, float]], sides: int = SIDES) -> Solid:
    """Convex hull of circles of (radius, z)."""
    angle = np.arange(sides) * (2 * np.pi / sides)
    ring = np.stack([np.cos(angle), np.sin(angle), np.zeros(sides)], axis=1)
    return Solid("hull", points=np.concatenate([ring * radius + [0.0, 0.0, z] for radius, z in sections]))


def ring_of_boxes(
    low: tuple[float, float], high: tuple[float, float], thickness: float, sides: int, turn: float = 0.0
) -> list[Solid]:
    """A round wall between its outer circles `low` and `high`, each (radius, z), of one box per side; the first box
    stands at the angle `turn`.
    """
    slope, length = math.atan2(high[0] - low[0], high[1] - low[1]), math.hypot(high[0] - low[0], high[1] - low[1])
    middle, z = (low[0] + high[0]) / 2 - thickness / 2 * math.cos(slope), (low[1] + high[1]) / 2
    z += thickness / 2 * math.sin(slope)
    solids = []
    for angle in turn + np.arange(sides) * (2 * np.pi / sides):
        rotation = rpy_to_matrix(np.array([0.0, slope, angle]))
        position = (middle * math.cos(angle), middle * math.sin(angle), z)
        width = max(low[0], high[0]) * math.tan(math.pi / sides)
        solids.append(Solid("box", (thickness / 2, width, length / 2), position, rotation))
    return solids


def box(half: Half) -> Geometry:
    """Cube, bar."""
    return Geometry([Solid("box", half)])


def ball(half: Half) -> Geometry:
    """A sphere."""
    return Geometry([Solid("sphere", half)])


def can(half: Half) -> Geometry:
    """An upright cylinder."""
    radius, _, h = half
    return Geometry([round_hull([(radius, -h), (radius, h)])], lathe([(0, -h), (radius, -h), (radius, h), (0, h)]))


def bottle(half: Half) -> Geometry:
    """Body, shoulder and neck."""
    radius, _, h = half
    neck = 0.45 * radius
    outline = [(radius, -h), (radius, 0.3 * h), (neck, 0.62 * h)]
    visual = lathe([(0, -h), *outline, (neck, 0.86 * h), (1.25 * neck, 0.86 * h), (1.25 * neck, h), (0, h)])
    return Geometry([round_hull(outline), round_hull([(neck, 0.62 * h), (neck, h)], sides=8)], visual)


def bowl(half: Half) -> Geometry:
    """A foot, a sloped wall, and an upright rim that the fingers hold."""
    radius, _, h = half
    thickness, foot, edge = bowl_wall(radius), BOWL_FOOT_SHARE * radius, h - 2 * h * BAND_SHARE
    inner = radius - thickness
    visual = lathe(
        [(0, -h), (foot, -h), (radius, edge), (radius, h), (inner, h), (inner, edge), (foot, -h + thickness)]
        + [(0, -h + thickness)]
    )
    solids = [round_hull([(foot, -h), (foot, -h + thickness)], WALL_SIDES)]
    solids += ring_of_boxes((foot, -h), (radius, edge), thickness, WALL_SIDES)
    solids += ring_of_boxes((radius, edge), (radius, h), thickness, WALL_SIDES)
    return Geometry(solids, visual)


def bowl_wall(radius: float) -> float:
    """Thickness of a bowl's wall."""
    return 0.1 * radius


def mug(half: Half) -> Geometry:
    """A round cup; its handle stands out along x, so that the fingers close along y."""
    radius, _, h = half
    thickness = 0.11 * radius
    inner = radius - thickness
    angle = np.linspace(-np.pi / 2, np.pi / 2, 9)
    reach, rise = mug_reach(half) - radius - 0.003, 0.6 * h
    handle = np.stack([radius - 0.002 + reach * np.cos(angle), 0 * angle, rise * np.sin(angle)], axis=1)
    visual = lathe([(0, -h), (radius, -h), (radius, h), (inner, h), (inner, -h + thickness), (0, -h + thickness)])
    solids = [round_hull([(radius, -h), (radius, -h + thickness)], WALL_SIDES)]
    solids += ring_of_boxes((radius, -h + thickness), (radius, h), thickness, WALL_SIDES)
    bar = 0.003
    solids.append(Solid("box", (bar, bar, rise), (radius - 0.002 + reach, 0, 0)))
    solids += [Solid("box", (reach / 2, bar, bar), (radius + reach / 2, 0, s * (rise - bar))) for s in (-1, 1)]
    return Geometry(solids, merged(visual, tube(handle, bar + 0.0005)))


def mug_reach(half: Half) -> float:
    """From the mug's axis to the outside of its handle."""
    return 1.62 * half[0]


def pen(half: Half) -> Geometry:
    """Lies along x, with a pointed tip; six sides, so that it does not roll."""
    length, _, radius = half
    corner = radius / math.cos(math.pi / 6)
    outline = [(0, -length), (corner, -length), (corner, 0.75 * length), (0.2 * corner, length), (0, length)]
    vertices, faces = lathe(outline, 6)
    # z, the lathe's axis, becomes x; a flat side lies down
    vertices = vertices[:, [2, 0, 1]]
    return Geometry([Solid("hull", points=vertices)], (vertices, faces))


def nut(half: Half) -> Geometry:
    """A hexagonal ring, flat sides towards y."""
    _, flat, h = half
    corner, hole = flat / math.cos(math.pi / 6), 0.5 * flat
    visual = lathe([(hole, -h), (corner, -h), (corner, h), (hole, h), (hole, -h)], 6)
    return Geometry(ring_of_boxes((flat, -h), (flat, h), flat - hole, 6, turn=math.pi / 6), visual)


def dice(half: Half) -> Geometry:
    """A cube with pips: 1 on top, opposite sides add up to 7."""
    spot, s = 0.13 * half[0], 0.5 * half[0]
    corners = [(-s, -s), (s, s), (-s, s), (s, -s)]
    pips = {
        1: [(0, 0)],
        2: corners[:2],
        3: [(0, 0), *corners[:2]],
        4: corners,
        5: [(0, 0), *corners],
        6: [*corners, (-s, 0), (s, 0)],
    }
    marks = []
    for number, axis, side in ((1, 2, 1), (6, 2, -1), (2, 0, 1), (5, 0, -1), (3, 1, 1), (4, 1, -1)):
        for u, v in pips[number]:
            place, size = np.empty(3), np.full(3, spot)
            place[axis], place[(axis + 1) % 3], place[(axis + 2) % 3] = side * half[0], u, v
            size[axis] = 0.0002
            marks.append(Solid("box", tuple(size), tuple(place)))
    return Geometry([Solid("box", half)], marks=marks)


def domino(half: Half) -> Geometry:
    """A flat tile that lies, with a line across and pips on both halves."""
    x, y, z = half
    marks = [Solid("box", (0.02 * x, 0.85 * y, 0.0002), (0, 0, z))]
    marks += [Solid("box", (0.08 * x, 0.16 * y, 0.0002), (s * x, t * y, z)) for s, t in ((0.5, 0.0), (-0.3, -0.4))]
    marks.append(Solid("box", (0.08 * x, 0.16 * y, 0.0002), (-0.7 * x, 0.4 * y, z)))
    return Geometry([Solid("box", half)], marks=marks)


def from_asset(name: str, flat: float = 0.0) -> Callable[[Half], Geometry]:
    """Builder of an object whose mesh is in `assets/`, stretched to the bounding box; it collides as its hull. The
    lowest share `flat` of its height is pressed flat, so that a round one lies still.
    """

    def build(half: Half) -> Geometry:
        vertices, faces = read_obj(name)
        vertices = vertices.copy()
        vertices[:, 2] = (np.maximum(vertices[:, 2], 2 * flat - 1) - flat) / (1 - flat)
        vertices *= np.array(half)
        return Geometry([Solid("hull", points=vertices)], (vertices, faces))

    return build


@cache
def read_obj(name: str) -> Mesh:
    """Vertices within [-1, 1] and faces of `assets/object_{name}.obj`."""
    vertices, faces = [], []
    for line in (ASSETS / f"object_{name}.obj").read_text().splitlines():
        kind, *values = line.split()
        if kind == "v":
            vertices.append([float(value) for value in values])
        elif kind == "f":
            faces.append([int(value) - 1 for value in values])
    points = np.array(vertices)
    low, high = points.min(0), points.max(0)
    return (points - (low + high) / 2) / ((high - low) / 2), np.array(faces)


# thickness of a container's floor and walls; thin things that fall go through a floor of 4 mm now and then
FLOOR_M, SIDE_M = 0.006, 0.005


def open_box(half: Half) -> Geometry:
    """Tray, box: a floor and four walls."""
    x, y, z = half
    solids = [Solid("box", (x, y, FLOOR_M / 2), (0, 0, -z + FLOOR_M / 2))]
    solids += [Solid("box", (SIDE_M / 2, y, z), (s * (x - SIDE_M / 2), 0, 0)) for s in (-1, 1)]
    solids += [Solid("box", (x - SIDE_M, SIDE_M / 2, z), (0, s * (y - SIDE_M / 2), 0)) for s in (-1, 1)]
    return Geometry(solids)


def round_tub(half: Half) -> Geometry:
    """Basket: a floor and an upright round wall."""
    radius, _, h = half
    inner = radius - SIDE_M
    visual = lathe([(0, -h), (radius, -h), (radius, h), (inner, h), (inner, -h + FLOOR_M), (0, -h + FLOOR_M)], 36)
    solids = [round_hull([(radius, -h), (radius, -h + FLOOR_M)])]
    solids += ring_of_boxes((radius, -h + FLOOR_M), (radius, h), SIDE_M, 16)
    return Geometry(solids, visual)


def plate(half: Half) -> Geometry:
    """A flat disc with a low sloped rim."""
    radius, _, h = half
    foot = 0.72 * radius
    outline = [(0, -h), (foot, -h), (radius, h), (radius - SIDE_M, h), (foot, -h + FLOOR_M), (0, -h + FLOOR_M)]
    solids = [round_hull([(foot, -h), (foot, -h + FLOOR_M)])]
    solids += ring_of_boxes((foot, -h), (radius, h - 0.003), 0.8 * SIDE_M, 16)  # slanted boxes rise 3 mm more
    return Geometry(solids, lathe(outline, 36))
