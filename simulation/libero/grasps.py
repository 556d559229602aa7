"""Where the fingers take hold of an arbitrary thing from above: across it where it is narrow enough, else at its rim;
on the side where hand and fingers have most room. Pure functions of corner points; lengths in m.
"""

import math
from collections.abc import Callable

import numpy as np

from stereovla.processing.rotations import wrap_angle
from stereovla.simulation.grasps import GRASP_FLOOR_M, MAX_RISE_M, THIN_FLOOR_M, THIN_M, Grasp
from stereovla.simulation.robot import TIPS_M

WIDEST_M = 0.068  # that fits between the open fingers with room at both sides
YAWS = 8  # tried in half a turn, from the thing's own
# and around a rim that lies level, both sides of each: between the walls of a drawer a finger has room at few places.
# The best place on one that leans moves as it is touched, the more the finer they are
RIM_YAWS, LEVEL = 16, 0.95
RIM_SLAB_M = 0.012  # what belongs to a rim, below the top
RIM_DEPTH_M = 0.012  # of the tool below the top of a rim
WALL_M = 0.006  # of what is held at its rim
# where the fingers and the hand are when the gripper is open: along the closing direction, to the side, and over the
# tool
FINGERS = [(along, side, -TIPS_M) for along in np.arange(0.010, 0.060, 0.007) for side in (-0.01, 0.01)]
HAND = [(along, side, 0.05) for along in (-0.1, -0.05, 0.05, 0.1) for side in (-0.03, 0.03)]
MARGIN_M = 0.004
MOST_YAW_RAD = 1.9
REACH_M = 0.75  # from the base; at 0.78 m the elbow of a hand that points down is straight
# costs: of a blocked point, of a yaw of 1 rad and of the same at a rim that leans, of 1 m more than the narrowest, of
# the rim's left side, of 1 m beyond the reach. None depends on where the tool is: what is gone for stays the best, and
# a policy has one thing to learn. What leans moves as it is touched, and fingers that turn after it do not close
BLOCKED, AWKWARD, AWKWARD_LEANING, WIDE, LEFT_SIDE, BEYOND = 10.0, 1.5, 6.0, 60.0, 1.0, 100.0

Heights = Callable[[np.ndarray], np.ndarray]  # (n, 2) -> (n,) height of what is in the way


def choose_grasp(
    points: np.ndarray,
    rotation: np.ndarray,
    floor_z: float,
    tool_yaw: float,
    way: np.ndarray,
    heights: Heights,
) -> Grasp:
    """The best grasp of a thing with the corner points (n, 3) and the rotation (3, 3), over a floor at `floor_z`, for a
    tool that has the yaw `tool_yaw` and then carries it `way` (2,); positions in the robot's base frame.
    """
    top, middle = float(points[:, 2].max()), (points[:, :2].max(0) + points[:, :2].min(0)) / 2
    half = (top - float(points[:, 2].min())) / 2
    lowest = floor_z + (THIN_FLOOR_M if half < THIN_M else GRASP_FLOOR_M)
    height = max(top - half, lowest, top - MAX_RISE_M)
    yaw = float(np.arctan2(rotation[1, 0], rotation[0, 0]))
    found = _across(points[:, :2], np.array([*middle, height]), yaw, heights)
    at_rim = not found
    found = found or _at_the_rim(points, rotation, lowest, heights)

    def cost(one: tuple) -> float:
        place = one[1][:2]
        beyond = max(0.0, float(np.linalg.norm(place)) - REACH_M, float(np.linalg.norm(place + way)) - REACH_M)
        return one[0] + BEYOND * beyond

    _, place, turn, width = min(found, key=cost)
    # the fingers are alike: of the two yaws the one nearer to the tool's, as far as the wrist turns
    turn = min((turn - math.pi, turn, turn + math.pi), key=lambda yaw: (abs(yaw) > MOST_YAW_RAD, abs(yaw - tool_yaw)))
    return Grasp(place, turn, 2, width, False, max(0.0, top - float(place[2])), at_rim)


def closing_direction(yaw: float) -> np.ndarray:
    """(2,) along which the fingers of a gripper of this yaw close."""
    return np.array([-math.sin(yaw), math.cos(yaw)])


def _across(points: np.ndarray, middle: np.ndarray, yaw: float, heights: Heights) -> list[tuple]:
    """(cost, place, yaw, width) of each closing direction in which the points (n, 2) around `middle` (3,) are narrow
    enough.
    """
    found = []
    for turn in _yaws(yaw):
        along = (points - middle[:2]) @ closing_direction(turn)
        width = float(along.max() - along.min())
        if width <= WIDEST_M:
            shift = closing_direction(turn) * (along.max() + along.min()) / 2
            place = middle + np.array([*shift, 0.0])
            found.append((_blocked(place, turn, heights, (-1, 1)), place, turn, width))
    narrowest = min((one[3] for one in found), default=0.0)
    return [
        (cost + AWKWARD * abs(turn) + WIDE * (width - narrowest), place, turn, width)
        for cost, place, turn, width in found
    ]


def _at_the_rim(points: np.ndarray, rotation: np.ndarray, lowest: float, heights: Heights) -> list[tuple]:
    """The same of places all around the upper end of a thing, one finger inside and one outside."""
    axis = rotation[:, np.argmax(np.abs(rotation[2]))]
    axis = axis * np.sign(axis[2])
    along = points @ axis
    rim = points[along > along.max() - RIM_SLAB_M]
    middle = (rim.max(0) + rim.min(0)) / 2
    middle += axis * (along.max() - middle @ axis)
    yaws, awkward = (RIM_YAWS, AWKWARD) if axis[2] > LEVEL else (YAWS, AWKWARD_LEANING)
    found = []
    for turn in _yaws(0.0, yaws):
        for side in (-1, 1):
            outwards = side * closing_direction(turn)
            reach = float(((rim - middle)[:, :2] @ outwards).max()) - WALL_M / 2
            height = middle[2] - float(axis[:2] @ outwards) / axis[2] * reach - RIM_DEPTH_M  # the rim may be tilted
            place = np.array([*(middle[:2] + outwards * reach), max(height, lowest)])
            cost = _blocked(place, turn, heights, (side,)) + awkward * abs(turn) + LEFT_SIDE * (side > 0)
            found.append((cost, place, turn, WALL_M))
    return found


def _yaws(own: float, count: int = YAWS) -> list[float]:
    """Yaws in [-pi/2, pi/2) from a thing's own on."""
    return [wrap_angle(own + k * math.pi / count, math.pi) for k in range(count)]


def _blocked(place: np.ndarray, yaw: float, heights: Heights, sides: tuple[int, ...]) -> float:
    """Cost of what is in the way of the hand of a tool at `place` (3,), and of its fingers on `sides`."""
    along = closing_direction(yaw)
    across = np.array([along[1], -along[0]])
    offsets = np.array([(side * a, s, z) for side in sides for a, s, z in FINGERS] + HAND)
    xy = place[:2] + offsets[:, :1] * along + offsets[:, 1:2] * across
    return BLOCKED * float((heights(xy) > place[2] + offsets[:, 2] - MARGIN_M).sum())
