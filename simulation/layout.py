"""Where things lie: random positions that leave an open hand room to grasp every object and to place it."""

import math
from dataclasses import replace

import numpy as np

from stereovla.simulation.objects import KINDS, TableObject

# bounds over all robots, so that the same seed lays out the same scene for each of them
FINGER_REACH_M = 0.066  # outer side of an open finger from the tool centre
MIN_DISTANCE_M = 0.095  # between centres: an open hand then reaches every object (200/200 in the prototype)
HAND_REACH_M = 0.105  # of the hand's own ends, which are over the fingers
HAND_CLEARANCE_M = 0.03  # the hand passes over what is less than this above a grasp
BLOCK_MARGIN_M = 0.010  # a block is this much wider than what stands on it
CONTAINER_GAP_M = 0.03
TRIES, RESTARTS = 40, 30


def block_half(item: TableObject) -> tuple[float, float]:
    """Half sizes (2,) in m of the block under an object, in the object's own frame."""
    x, y = (item.radius, item.radius) if KINDS[item.kind].reach is not None else item.half_size[:2]
    return x + BLOCK_MARGIN_M, y + BLOCK_MARGIN_M


def occupied_radius(item: TableObject) -> float:
    """Radius in m of the circle around an object and its block."""
    return float(np.hypot(*block_half(item))) if item.support_m > 0 else item.radius


def grasp_height(item: TableObject) -> float:
    """Lowest height over the table in m at which the fingers hold it."""
    return item.support_m + min(item.half_size[2], 0.015)


def top(item: TableObject) -> float:
    """Height of its top over the table in m."""
    return item.support_m + 2 * item.half_size[2]


def needed_distance(first: TableObject, second: TableObject) -> float:
    """Between the centres of two objects, m: fingers fit around either, and the hand beside the taller one."""
    radii = occupied_radius(first), occupied_radius(second)
    needed = max(MIN_DISTANCE_M, FINGER_REACH_M + max(radii))
    for low, high, radius in ((first, second, radii[1]), (second, first, radii[0])):
        if top(high) > grasp_height(low) + HAND_CLEARANCE_M:
            needed = max(needed, HAND_REACH_M + radius)
    return needed


def rectangle(item: TableObject) -> np.ndarray:
    """Half sizes (2,) in m along the base's axes of the box around a container."""
    if KINDS[item.kind].reach is not None:
        return np.full(2, item.radius)
    cos, sin = abs(np.cos(item.yaw)), abs(np.sin(item.yaw))
    x, y = item.half_size[:2]
    return np.array([cos * x + sin * y, sin * x + cos * y])


def far_enough(item: TableObject, other: TableObject) -> bool:
    """Whether two things are far enough apart to be handled."""
    offset = np.abs(np.subtract(item.xy, other.xy))
    if item.is_container and other.is_container:
        return bool((offset > rectangle(item) + rectangle(other) + CONTAINER_GAP_M).any())
    if item.is_container or other.is_container:
        container, thing = (item, other) if item.is_container else (other, item)
        outside = float(np.hypot(*np.maximum(offset - rectangle(container), 0.0)))
        reach = HAND_REACH_M if top(thing) > top(container) + HAND_CLEARANCE_M else 0.0
        from_middle = float(np.hypot(*offset)) >= reach + occupied_radius(thing)
        return from_middle and outside >= max(FINGER_REACH_M + 0.012, occupied_radius(thing) + 0.01)
    return float(np.hypot(*offset)) >= needed_distance(item, other)


def draw_layout(
    items: list[TableObject],
    center: tuple[float, float],
    extent: tuple[float, float],
    rng: np.random.Generator,
    any_yaw: bool = False,
) -> list[TableObject] | None:
    """`items` with random positions inside a rectangle of `extent` (x, y) m around `center` and random yaws, with
    `any_yaw` of the whole turn but for containers; the order stays. The largest are placed first, by throwing darts;
    None where 30 times no room was found.
    """
    order = sorted(range(len(items)), key=lambda i: (not items[i].is_container, -occupied_radius(items[i]), i))
    for _ in range(RESTARTS):
        placed: dict[int, TableObject] = {}
        for index in order:
            for _ in range(TRIES):
                xy = np.array(center) + rng.uniform(-0.5, 0.5, 2) * np.array(extent)
                furthest = math.pi if any_yaw and not items[index].is_container else KINDS[items[index].kind].yaw
                yaw = float(rng.uniform(-1, 1) * furthest)
                item = replace(items[index], xy=(float(xy[0]), float(xy[1])), yaw=yaw)
                if all(far_enough(item, other) for other in placed.values()):
                    placed[index] = item
                    break
            else:
                break
        if len(placed) == len(items):
            return [placed[index] for index in range(len(items))]
    return None
