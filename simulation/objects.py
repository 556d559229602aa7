"""The library of things on the table: names, sizes, colours, how the fingers hold them, and what containers hold."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stereovla.simulation import shapes
from stereovla.simulation.shapes import Geometry, Half

# sRGB; saturated, so that they stay apart in a 128 px picture under every light of the world
COLORS = {
    "red": (0.85, 0.07, 0.07),
    "green": (0.10, 0.62, 0.14),
    "blue": (0.10, 0.26, 0.90),
    "yellow": (0.96, 0.86, 0.08),
    "orange": (0.98, 0.48, 0.04),
    "purple": (0.52, 0.14, 0.72),
}
NATURAL = {"lemon": (0.93, 0.80, 0.12), "bread": (0.72, 0.45, 0.20)}  # sRGB of things that come in one colour
MAX_GRASP_M = 0.070  # of the 8 cm between open fingers
MIN_SIDE_M, MAX_SIDE_M = 0.009, 0.105  # of a scaled object; a pen is 9 mm thick
MIN_LONGEST_M = 0.015  # an object's longest side


@dataclass(frozen=True)
class Kind:
    """One entry of the library.

    Attributes:
        low, high: range of the half sizes in m along the object's own axes, before scaling; the fingers close along y.
            Equal ranges of two axes are drawn together.
        grip: how the fingers may close on it when it stands: "box" on any two parallel sides, whatever lies up;
            "round" from everywhere; a number n on pairs of sides n-fold symmetric about its upright axis.
        geometry: what collides and is drawn, from the half sizes.
        yaw: rad; start angles lie within +- this, unless the world's are `any_yaw`. Beyond, the nearest of the
            symmetric grasps would jump between neighbouring pictures.
        grip_height: where the fingers hold it when it stands, as a share of half[2] over its centre.
        rolls: ball-like: torsional and rolling friction keep it where it was put.
        reach: footprint's radius over half[0] where that is not the circle around the half sizes.
    """

    name: str
    low: Half
    high: Half
    grip: Literal["box", "round"] | int
    geometry: Callable[[Half], Geometry]
    yaw: float = 0.0
    rolls: bool = False
    reach: float | None = None
    grip_height: float = 0.0

    def draw_half_size(self, rng: np.random.Generator, scale: tuple[float, float] = (1.0, 1.0)) -> Half:
        """Random half sizes (3,) in m times a factor within `scale`, narrowed to what the fingers can hold; the factor
        is 1 where no part of `scale` can be held.
        """
        half, drawn = [], {}
        for limits in zip(self.low, self.high, strict=True):
            if limits not in drawn:
                drawn[limits] = float(rng.uniform(*limits))
            half.append(drawn[limits])
        width = 2 * min(half[:2]) if self.grip == "box" else 2 * half[1]
        least = max(scale[0], MIN_SIDE_M / (2 * min(half)), MIN_LONGEST_M / (2 * max(half)))
        most = min(scale[1], MAX_GRASP_M / width, MAX_SIDE_M / (2 * max(half)))
        share = rng.uniform()
        factor = least + share * (most - least) if least <= most else 1.0
        return tuple(factor * value for value in half)


def _h(*sizes: float) -> Half:
    """Half sizes from full sizes in m."""
    return tuple(size / 2 for size in sizes)


_LEMON = shapes.from_asset("lemon", flat=0.03)
# cubes, balls, cans and bars: the width between the fingers is 2.5 to 4.7 cm
_LIBRARY = (
    Kind("cube", _h(0.030, 0.030, 0.030), _h(0.046, 0.046, 0.046), "box", shapes.box, yaw=0.6),
    Kind("ball", _h(0.034, 0.034, 0.034), _h(0.047, 0.047, 0.047), "round", shapes.ball, rolls=True, reach=1.0),
    Kind("can", _h(0.028, 0.028, 0.048), _h(0.042, 0.042, 0.060), "round", shapes.can, reach=1.0),
    Kind("bar", _h(0.075, 0.025, 0.025), _h(0.100, 0.034, 0.034), "box", shapes.box, yaw=0.9),
    Kind("dice", _h(0.015, 0.015, 0.015), _h(0.020, 0.020, 0.020), "box", shapes.dice, yaw=0.6),
    Kind("nut", _h(0.024, 0.024, 0.012), _h(0.032, 0.032, 0.015), 6, shapes.nut, yaw=0.4, reach=1.16),
    Kind("pen", _h(0.075, 0.009, 0.009), _h(0.080, 0.011, 0.011), "box", shapes.pen, yaw=0.9),
    Kind("domino", _h(0.044, 0.020, 0.010), _h(0.052, 0.026, 0.013), "box", shapes.domino, yaw=0.9),
    Kind("bowl", _h(0.058, 0.058, 0.032), _h(0.066, 0.066, 0.038), 12, shapes.bowl, reach=1.0, grip_height=0.64),
    Kind("mug", _h(0.046, 0.046, 0.055), _h(0.054, 0.054, 0.068), 2, shapes.mug, yaw=1.2, reach=1.62),
    Kind("bottle", _h(0.030, 0.030, 0.070), _h(0.040, 0.040, 0.080), "round", shapes.bottle, reach=1.0),
    Kind("lemon", _h(0.046, 0.038, 0.038), _h(0.056, 0.046, 0.046), "box", _LEMON, 0.9, rolls=True, reach=1.0),
    Kind("bread", _h(0.050, 0.040, 0.048), _h(0.060, 0.050, 0.056), "box", shapes.from_asset("bread"), 0.6),
    Kind("milk", _h(0.028, 0.028, 0.070), _h(0.034, 0.034, 0.080), "box", shapes.from_asset("milk"), 0.6),
    Kind("cereal", _h(0.048, 0.022, 0.070), _h(0.056, 0.026, 0.080), "box", shapes.from_asset("cereal"), 0.9),
)
_CONTAINERS = (
    Kind("tray", _h(0.165, 0.125, 0.020), _h(0.180, 0.140, 0.025), "box", shapes.open_box, yaw=0.25),
    Kind("box", _h(0.120, 0.120, 0.040), _h(0.135, 0.135, 0.050), "box", shapes.open_box, yaw=0.25),
    Kind("plate", _h(0.140, 0.140, 0.014), _h(0.160, 0.160, 0.018), "round", shapes.plate, reach=1.0),
    Kind("basket", _h(0.120, 0.120, 0.040), _h(0.135, 0.135, 0.050), "round", shapes.round_tub, reach=1.0),
)
KINDS = {kind.name: kind for kind in (*_LIBRARY, *_CONTAINERS)}
GRASPABLES = tuple(kind.name for kind in _LIBRARY)
CONTAINERS = tuple(kind.name for kind in _CONTAINERS)
PRIMITIVES = ("cube", "ball", "can", "bar")
SMALL_OR_THIN = ("dice", "nut", "pen", "domino")
STACKABLES = ("cube", "bowl")


@dataclass(frozen=True)
class TableObject:
    """One object: `half_size` (3,) of its bounding box in its own frame (m), start position (2,) in the base frame, yaw
    (rad), and height (m) of the block it stands on, 0 = the table.
    """

    kind: str
    color: str | None  # None: it comes in one colour, which is not named
    half_size: Half
    xy: tuple[float, float]
    yaw: float
    support_m: float = 0.0

    @property
    def name(self) -> str:
        """What tells it apart in its scene, such as "red cube" or "lemon"."""
        return f"{self.color} {self.kind}" if self.color else self.kind

    @property
    def rgb(self) -> tuple[float, float, float]:
        """sRGB in [0, 1]."""
        return COLORS[self.color] if self.color else NATURAL[self.kind]

    @property
    def radius(self) -> float:
        """Radius in m of the circle around its footprint."""
        return footprint(self.kind, self.half_size)

    @property
    def is_container(self) -> bool:
        """Whether it is a destination that is never grasped."""
        return self.kind in CONTAINERS

    def holds_at(self, offset: np.ndarray) -> bool:
        """Whether something with its centre at `offset` (3,) m in this object's own frame is on or in it."""
        x, y, z = self.half_size
        if offset[2] < (z if self.kind == "cube" else -z):
            return False
        if KINDS[self.kind].reach is not None:  # round
            return float(np.hypot(*offset[:2])) <= x
        return bool(abs(offset[0]) <= x and abs(offset[1]) <= y)


def footprint(kind: str, half: Half) -> float:
    """Radius in m of the circle around the footprint of a `kind` with half sizes `half`."""
    reach = KINDS[kind].reach
    return float(np.hypot(*half[:2])) if reach is None else reach * half[0]


def palette(kind: str, colors: tuple[str, ...]) -> tuple[str | None, ...]:
    """The colours that a kind comes in, of those allowed."""
    return (None,) if kind in NATURAL else colors
