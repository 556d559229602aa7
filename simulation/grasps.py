"""Where the fingers take hold of an object: from above, on sides that are parallel, low enough to hold and high enough
to stay off what it stands on. Pure functions of its pose.
"""

import math
from dataclasses import dataclass

import numpy as np

from stereovla.processing.rotations import wrap_angle
from stereovla.simulation.objects import KINDS, TableObject

GRASP_FLOOR_M = 0.0135  # lowest tool height over a surface: the finger tips are 9 mm below the tool centre
THIN_FLOOR_M, THIN_M = 0.011, 0.0125  # the same for what is less high than this
MAX_RISE_M = 0.035  # of the object over the tool: the palm is 4.5 cm over it
UPRIGHT = 0.9  # cosine of the largest tilt of a standing object


@dataclass(frozen=True)
class Grasp:
    """Tool pose (3,) m and yaw (rad) of a grasp, how many yaws in a whole turn are as right, the object's width between
    the fingers (m), whether it is round there, how far it rises over the tool (m), and whether it is held at its rim,
    which need not meet the middle of the pads.
    """

    position: np.ndarray
    yaw: float
    symmetry: int
    width: float
    round: bool
    rise: float
    rim: bool = False


def half_height(rotation: np.ndarray, half_size: tuple[float, float, float]) -> float:
    """Half of the vertical extent in m of a turned box."""
    return float(np.abs(rotation[2]) @ half_size)


def closing_yaw(item: TableObject, rotation: np.ndarray, tool_yaw: float) -> tuple[float, int, float, bool]:
    """(yaw, symmetry, width, round): the gripper yaw, near 0, at which the fingers close on flat sides, how many such
    yaws a whole turn has, and the width there. `rotation` (3, 3) is the object's.
    """
    kind, half = KINDS[item.kind], item.half_size
    upright = abs(rotation[2, 2]) > UPRIGHT
    if kind.grip == "round" and (kind.rolls or upright):
        # any would do; the expert's leaps nowhere, so that it is as learnable as none, and the actions turn to it
        return 0.0, 2, 2 * half[0], True
    if isinstance(kind.grip, int) and upright:
        angle, period, width = math.atan2(rotation[1, 0], rotation[0, 0]), 2 * math.pi / kind.grip, 2 * half[1]
        if rotation[2, 2] < 0:
            angle += math.pi
    else:
        up = int(np.argmax(np.abs(rotation[2])))
        first, second = (i for i in range(3) if i != up)
        long_axis, width_axis = (first, second) if half[first] >= half[second] else (second, first)
        angle = math.atan2(rotation[1, long_axis], rotation[0, long_axis])
        period = math.pi / 2 if abs(half[first] - half[second]) < 1e-6 else math.pi
        width = 2 * half[width_axis]
    angle = wrap_angle(angle, period)
    # near 0 first, so that scene alone decides; a little pull to the present yaw keeps an object turned past the
    # boundary from flipping the wrist
    candidates = [angle + k * period for k in (-1, 0, 1)]
    best = min(candidates, key=lambda value: abs(value) + 0.3 * abs(value - tool_yaw))
    return best, round(2 * math.pi / period), width, kind.rolls


def choose_grasp(item: TableObject, center: np.ndarray, rotation: np.ndarray, floor_z: float, tool_yaw: float) -> Grasp:
    """The grasp of an object with its centre (3,) m and rotation (3, 3) over a surface at `floor_z`."""
    yaw, symmetry, width, is_round = closing_yaw(item, rotation, tool_yaw)
    half = half_height(rotation, item.half_size)
    lift = KINDS[item.kind].grip_height * item.half_size[2] if rotation[2, 2] > UPRIGHT else 0.0
    lowest = floor_z + (THIN_FLOOR_M if half < THIN_M else GRASP_FLOOR_M)
    top = center[2] + half
    height = max(center[2] + lift, lowest, top - MAX_RISE_M)
    return Grasp(np.array([center[0], center[1], height]), yaw, symmetry, width, is_round, max(0.0, top - height))
