"""The things on the table: shapes, sizes, colours, and where they may lie."""

from dataclasses import dataclass

import numpy as np

# sRGB; saturated, so that they stay apart in a 128 px picture under every light of the world
COLORS = {
    "red": (0.85, 0.07, 0.07),
    "green": (0.10, 0.62, 0.14),
    "blue": (0.10, 0.26, 0.90),
    "yellow": (0.96, 0.86, 0.08),
    "orange": (0.98, 0.48, 0.04),
    "purple": (0.52, 0.14, 0.72),
}
SHAPES = ("cube", "ball", "can", "bar")
# m; the width between the fingers is 2.5 to 4.7 cm
CUBE_EDGE = (0.030, 0.046)
BALL_DIAMETER = (0.034, 0.047)
CAN_DIAMETER, CAN_HEIGHT = (0.028, 0.042), (0.048, 0.060)
BAR_LENGTH, BAR_WIDTH = (0.075, 0.100), (0.025, 0.034)
# rad; beyond these the nearest of the symmetric grasps would jump between neighbouring pictures
YAW = {"cube": 0.6, "ball": 0.0, "can": 0.0, "bar": 0.9}
FINGER_REACH_M = 0.066  # outer side of an open finger from the tool centre
MIN_DISTANCE_M = 0.095  # between centres: an open hand then reaches every object (200/200 in the prototype)


@dataclass(frozen=True)
class TableObject:
    """One object: `half_size` (3,) of its bounding box in its own frame (m), start position on the table (2,) in the
    base frame and yaw (rad).
    """

    shape: str
    color: str
    rgb: tuple[float, float, float]
    half_size: tuple[float, float, float]
    xy: tuple[float, float]
    yaw: float

    @property
    def name(self) -> str:
        """What the instruction calls it, such as "red cube"."""
        return f"{self.color} {self.shape}"

    @property
    def radius(self) -> float:
        """Radius of its footprint's circumscribed circle in m."""
        return self.half_size[0] if self.shape in ("ball", "can") else float(np.hypot(*self.half_size[:2]))


def draw_half_size(shape: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """Random half sizes (3,) in m along the object's own axes; a bar's length is along its x, so at yaw 0 fingers
    opening along base y fit.
    """
    if shape == "cube":
        half = rng.uniform(*CUBE_EDGE) / 2
        return half, half, half
    if shape == "ball":
        half = rng.uniform(*BALL_DIAMETER) / 2
        return half, half, half
    if shape == "can":
        half = rng.uniform(*CAN_DIAMETER) / 2
        return half, half, rng.uniform(*CAN_HEIGHT) / 2
    width = rng.uniform(*BAR_WIDTH) / 2
    return rng.uniform(*BAR_LENGTH) / 2, width, width


def draw_kinds(
    count: int,
    shapes: tuple[str, ...],
    colors: tuple[str, ...],
    rng: np.random.Generator,
    distinct_colors: bool = False,
) -> list[tuple[str, str]]:
    """`count` different (shape, colour) pairs; each after the first shares its shape, its colour or neither with the
    first, one chance in three each. With `distinct_colors` no two share a colour.
    """
    if distinct_colors:
        drawn = rng.permutation(len(colors))[:count]
        return [(shapes[rng.integers(len(shapes))], colors[index]) for index in drawn]
    pairs = [(shapes[rng.integers(len(shapes))], colors[rng.integers(len(colors))])]
    while len(pairs) < count:
        shape, color = shapes[rng.integers(len(shapes))], colors[rng.integers(len(colors))]
        share = rng.integers(3)
        pair = (pairs[0][0] if share == 0 else shape, pairs[0][1] if share == 1 else color)
        if pair not in pairs:
            pairs.append(pair)
    return pairs


def draw_objects(
    count: int,
    shapes: tuple[str, ...],
    colors: tuple[str, ...],
    center: tuple[float, float],
    extent: tuple[float, float],
    rng: np.random.Generator,
    distinct_colors: bool = False,
) -> list[TableObject]:
    """`count` objects inside a rectangle of `extent` (x, y) m around `center`, far enough apart for an open hand to
    grasp each; the target is the first.
    """
    kinds = draw_kinds(count, shapes, colors, rng, distinct_colors)
    half_sizes = [draw_half_size(shape, rng) for shape, _ in kinds]
    for _ in range(2000):
        objects: list[TableObject] = []
        for (shape, color), half_size in zip(kinds, half_sizes, strict=True):
            xy = np.array(center) + rng.uniform(-0.5, 0.5, 2) * np.array(extent)
            yaw = float(rng.uniform(-1, 1) * YAW[shape])
            item = TableObject(shape, color, COLORS[color], half_size, (float(xy[0]), float(xy[1])), yaw)
            gaps = [
                np.hypot(*(xy - other.xy)) - max(MIN_DISTANCE_M, FINGER_REACH_M + max(item.radius, other.radius))
                for other in objects
            ]
            if gaps and min(gaps) < 0:
                break
            objects.append(item)
        else:
            return objects
    raise RuntimeError(
        f"no layout of {count} objects found in 2000 draws on {extent[0]:.2f} x {extent[1]:.2f} m: "
        "use fewer objects or a larger workspace"
    )
