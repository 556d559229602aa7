"""A scripted expert: plans the pick from the present state, by kinematics alone, without memory."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from simulation.geometry import matrix_to_rpy, rpy_to_matrix, wrap_angle

if TYPE_CHECKING:
    from simulation.world import World

SPEED_M = 0.025  # per step of 0.1 s
TURN_RAD = 0.25
HOVER_M = 0.08  # height over the grasp at which the tool travels
LIFT_M = 0.10
GRASP_FLOOR_M = 0.0135  # lowest tool height over the table: the finger tips are 9 mm below the tool centre
FUNNEL_RADIUS_M, FUNNEL_SLOPE = 0.008, 3.0
YAW_ARM_M = 0.04  # a yaw error of 1 rad counts as this distance from the grasp
OPENING_M = 0.08
GRIPPER_RATE = 0.25  # opening per step while closing freely
WIDTH_MARGIN_M = 0.02


@dataclass(frozen=True)
class Situation:
    """What the expert looks at: all measured, no phase. Lengths in m, angles in rad, base frame."""

    position: np.ndarray  # (3,) tool
    rpy: np.ndarray  # (3,) tool
    opening: float  # [0, 1]
    held: bool  # both pads touch the target, and not beside its middle
    center: np.ndarray  # (3,) target
    yaw: float  # grasp yaw
    width: float  # of the target between the fingers at that yaw
    round: bool  # ball or upright can: slips out of pads that press beside its middle
    table_z: float
    lift_z: float  # tool height at which the pick is complete

    @property
    def grasp(self) -> np.ndarray:
        """(3,) tool position of the grasp."""
        return np.array([self.center[0], self.center[1], max(self.center[2], self.table_z + GRASP_FLOOR_M)])


def grasp_yaw(
    rotation: np.ndarray, half_size: tuple[float, float, float], shape: str, tool_yaw: float
) -> tuple[float, float]:
    """(yaw, width): the gripper yaw, near 0, at which the fingers close on flat sides, and the width there. `rotation`
    (3, 3) is the object's.
    """
    axes = np.abs(rotation[2])
    up = int(np.argmax(axes))
    if shape == "ball" or (shape == "can" and up == 2):
        return 0.0, 2 * half_size[0]
    first, second = (i for i in range(3) if i != up)
    long_axis, width_axis = (first, second) if half_size[first] >= half_size[second] else (second, first)
    angle = math.atan2(rotation[1, long_axis], rotation[0, long_axis])
    quarter = abs(half_size[first] - half_size[second]) < 1e-6
    period = math.pi / 2 if quarter else math.pi
    angle = wrap_angle(angle, period)
    candidates = [angle + k * period for k in (-1, 0, 1)]
    # near 0 first, so that scene alone decides; a little pull to the present yaw keeps an object turned past the
    # boundary from flipping the wrist
    best = min(candidates, key=lambda value: abs(value) + 0.3 * abs(value - tool_yaw))
    return best, 2 * half_size[width_axis]


class Expert:
    """Plans from the world's present state; call plan() again after every step. Phases follow from what is measured,
    so any perturbation is answered by the right phase.
    """

    def __init__(self, world: "World"):
        self.world = world

    def situation(self) -> Situation:
        """The present state of the world as the expert sees it."""
        world = self.world
        position, rotation = world.robot.tool_pose()
        center, object_rotation = world.object_pose()
        rpy = matrix_to_rpy(rotation)
        yaw, width = grasp_yaw(object_rotation, world.target.half_size, world.target.shape, float(rpy[2]))
        rest_z = max(world.rest_z[world.target_index], world.table_z + GRASP_FLOOR_M)
        opening = world.robot.opening()
        # pads closer than the width hold a round thing beside its middle: take it again, unless it is in the air
        # already
        held = world.held and (opening * OPENING_M > width - 0.005 or world.lift_m > 0.01)
        return Situation(
            position,
            rpy,
            opening,
            held,
            center,
            yaw,
            width,
            world.target.shape in ("ball", "can"),
            world.table_z,
            rest_z + LIFT_M,
        )

    @property
    def done(self) -> bool:
        """The target is held at the lift height."""
        now = self.situation()
        return self.world.success and now.position[2] > now.lift_z - 0.01

    def plan(self, horizon: int) -> tuple[np.ndarray, int, np.ndarray]:
        """(actions float32 (horizon, 7), number of valid actions, next keyframe float32 (7,): x, y, z, roll, pitch,
        yaw, gripper).

        The rest of `actions` holds still with the gripper closed. The keyframe is the grasp pose, reached with an open
        gripper (1), until the target is held, then the lift pose (0).
        """
        now = self.situation()
        keyframe = keyframe_of(now)
        actions = np.zeros((horizon, 7), np.float32)
        actions[:, 6] = -1.0
        for index in range(horizon):
            if now.held and now.position[2] > now.lift_z - 0.002:
                return actions, index, keyframe
            actions[index] = decide(now)
            now = predict(now, actions[index])
        return actions, horizon, keyframe


def keyframe_of(now: Situation) -> np.ndarray:
    """float32 (7,) pose of the next keyframe, see Expert.plan."""
    if now.held:
        return np.array([now.position[0], now.position[1], now.lift_z, 0.0, 0.0, now.rpy[2], 0.0], np.float32)
    return np.array([*now.grasp, 0.0, 0.0, now.yaw, 1.0], np.float32)


def ready_to_close(now: Situation) -> bool:
    """The target is between the fingers. Tolerances widen as the gripper closes, so that noise does not undo a grasp
    half made.
    """
    slack = 1.0 - now.opening
    offset = now.grasp - now.position
    cos, sin = math.cos(now.rpy[2]), math.sin(now.rpy[2])
    across = abs(cos * offset[0] + sin * offset[1])  # along the finger faces
    between = abs(-sin * offset[0] + cos * offset[1])  # along the closing direction
    free = max(0.0, (now.opening * OPENING_M - now.width) / 2)
    return (
        across < (0.010 if now.round else 0.014) + 0.014 * slack
        and between < min(0.016, free) + 0.014 * slack
        and -0.02 < -offset[2] < 0.012 + 0.012 * slack
        and abs(now.yaw - now.rpy[2]) < 0.20 + 0.40 * slack
        and now.opening * OPENING_M > now.width - 0.006
    )


def decide(now: Situation) -> np.ndarray:
    """The action float32 (7,) in a situation."""
    if now.held:
        goal, yaw, grip = np.array([now.position[0], now.position[1], now.lift_z]), now.rpy[2], -1.0
    elif ready_to_close(now):
        goal, yaw, grip = now.grasp, now.yaw, -1.0
    else:
        goal, yaw, grip = approach(now), now.yaw, 1.0
    move = goal - now.position
    length = float(np.linalg.norm(move))
    move *= min(1.0, SPEED_M / max(length, 1e-9))
    # R_goal = R(turn) R_now: a difference of the angles themselves would tilt the tool at large yaw
    turn = matrix_to_rpy(rpy_to_matrix(np.array([0.0, 0.0, yaw])) @ rpy_to_matrix(now.rpy).T)
    turn = np.clip(turn, -TURN_RAD, TURN_RAD)
    return np.array([*move, *turn, grip], np.float32)


def approach(now: Situation) -> np.ndarray:
    """Where the open gripper goes next (3,): towards the grasp above a funnel around it, so that it comes down only
    over the target.
    """
    grasp = now.grasp
    offset = grasp[:2] - now.position[:2]
    distance = float(np.linalg.norm(offset))
    left = max(0.0, distance - SPEED_M) + YAW_ARM_M * max(0.0, abs(now.yaw - now.rpy[2]) - TURN_RAD)
    height = min(HOVER_M, max(0.0, left - FUNNEL_RADIUS_M) * FUNNEL_SLOPE)
    # fingers that are not open enough to pass the target stay above it
    missing = (now.width + WIDTH_MARGIN_M) / OPENING_M - now.opening
    height = max(height, HOVER_M * min(1.0, max(0.0, missing * 5.0)))
    return np.array([grasp[0], grasp[1], grasp[2] + height])


def predict(now: Situation, action: np.ndarray) -> Situation:
    """The situation one step later if the motion is perfect: fingers move at their rate, a held target moves along."""
    move = action[:3].astype(np.float64)
    width = now.width / OPENING_M
    opening = (
        min(1.0, now.opening + GRIPPER_RATE)
        if action[6] > 0
        else max(now.opening - GRIPPER_RATE, min(width, now.opening))
    )
    held = now.held or (action[6] < 0 and opening <= width + 1e-9)
    return replace(
        now,
        position=now.position + move,
        rpy=matrix_to_rpy(rpy_to_matrix(action[3:6].astype(np.float64)) @ rpy_to_matrix(now.rpy)),
        opening=opening,
        held=held,
        center=now.center + move if now.held else now.center,
    )
