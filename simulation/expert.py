"""A scripted expert: plans every task from the present state, by kinematics alone, without memory."""

import math
from dataclasses import dataclass, replace

import numpy as np

from stereovla.processing.rotations import matrix_to_rpy, rpy_to_matrix
from stereovla.simulation.config import KEYFRAMES
from stereovla.simulation.grasps import Grasp, choose_grasp, half_height
from stereovla.simulation.layout import FINGER_REACH_M, block_half
from stereovla.simulation.robot import TIPS_M
from stereovla.simulation.tasks import rest_height
from stereovla.simulation.world import World

SPEED_M = 0.025  # per step of 0.1 s
TURN_RAD = 0.25
HOVER_M = 0.08  # height over the grasp at which the tool travels
LIFT_M = 0.10
FUNNEL_RADIUS_M, FUNNEL_SLOPE, MAX_FUNNEL_SLOPE = 0.008, 3.0, 10.0
TIGHT_M, ROOMY_M = 0.006, 0.016  # gaps beside the target
YAW_ARM_M = 0.04  # a yaw error of 1 rad counts as this distance from the grasp
WIDTH_MARGIN_M = 0.02
LET_GO_M, STUCK_M = 0.004, 0.015  # opening beyond the target's width
WIDE_OPEN = 0.98  # opening that is enough for every target
# over what is passed on the way: so much higher than its top, less the further it is to the side
CLEARANCE_M, CLEARANCE_SLOPE, ENTRY_SLOPE = 0.02, 2.0, 6.0
WAY_CLEARANCE_M = 0.015  # beside that, over what is still far: who learns from it is not as exact
RISE_FIRST_M = 0.02  # so much too low, the tool only rises
PLACE_HOVER_M, PLACE_RADIUS_M = 0.06, 0.004
RELEASE_M = 0.003  # drop of a released object
RELEASE_ACROSS_M, RELEASE_HEIGHT_M = 0.006, 0.006  # of the tool from where it releases
RETREAT_M = 0.05


@dataclass(frozen=True)
class Place:
    """Where the target is let go: `offset` (2,) m of the tool from here, and tool height (m); and how far from there it
    may be, across and above (m).
    """

    offset: np.ndarray
    height: float
    across: float = RELEASE_ACROSS_M
    above: float = RELEASE_HEIGHT_M


@dataclass(frozen=True)
class Situation:
    """What the expert looks at: all measured, no phase. Lengths in m, angles in rad, base frame."""

    position: np.ndarray  # (3,) tool
    rpy: np.ndarray  # (3,) tool
    opening: float  # [0, 1]
    opening_m: float  # between the pads at 1
    closing_rate: float  # opening per step while closing freely
    held: bool  # both pads touch the target, and not beside its middle
    grasp: Grasp  # of the target as it lies
    lift_z: float  # tool height at which the pick is complete
    obstacles: np.ndarray  # (n, 4): x, y, radius, top of everything but the target
    below: float  # how far the target reaches below the tool that holds it
    place: Place | None  # when the target has a destination
    released: bool  # the target is at its destination, and not held
    retreat_z: float

    @property
    def depth(self) -> float:
        """How far the lowest of finger tips and held target is below the tool."""
        return max(TIPS_M, self.below) if self.held else TIPS_M

    @property
    def finished(self) -> bool:
        """Nothing is left to do."""
        if self.place is None:
            return self.held and self.position[2] > self.lift_z - 0.002
        return self.released and self.position[2] > self.retreat_z - 0.002


class Expert:
    """Plans from the world's present state; call plan() again after every step. Phases follow from what is measured,
    so any perturbation is answered by the right phase.
    """

    def __init__(self, world: World):
        self.world = world

    def situation(self) -> Situation:
        """The present state of the world as the expert sees it."""
        world, target = self.world, self.world.target
        position, rotation = world.robot.tool_pose()
        center, object_rotation = world.object_pose()
        rpy = matrix_to_rpy(rotation)
        half = half_height(object_rotation, target.half_size)
        grasp = choose_grasp(target, center, object_rotation, self._floor(center, half), float(rpy[2]))
        rest_z = world.rest_z[world.target_index] + grasp.position[2] - center[2]
        opening = world.robot.opening()
        # pads closer than the width hold a round thing beside its middle: take it again, unless it is in the air
        # already; pads wider apart have something askew stuck between them
        spare = opening * world.robot.opening_m - grasp.width
        held = world.held and (spare > -0.005 or world.lift_m > 0.01) and spare < STUCK_M
        below = (position[2] if held else grasp.position[2]) - (center[2] - half)
        place, released = None, False
        if world.task.destination is not None:
            base_center, base_rotation = world.object_pose(world.task.destination)
            base_half = half_height(base_rotation, world.destination.half_size)
            inside = base_rotation.T @ (center - base_center)
            # contact may be lost for a moment: closed fingers have not let go
            let_go = spare > LET_GO_M or world.placed
            released = not held and let_go and world.destination.holds_at(inside)
            under = base_center[2] - base_half + rest_height(target, world.destination) + RELEASE_M
            height = under + below
            if world.destination.kind != "cube":  # opening fingers stay over the walls
                height = max(height, base_center[2] + base_half + TIPS_M + RELEASE_M)
            place = Place((base_center - center)[:2] if held else base_center[:2] - position[:2], height)
        return Situation(
            position=position,
            rpy=rpy,
            opening=opening,
            opening_m=world.robot.opening_m,
            closing_rate=world.robot.closing_rate,
            held=held,
            grasp=grasp,
            lift_z=rest_z + LIFT_M,
            obstacles=self._obstacles(),
            below=below,
            place=place,
            released=released,
            retreat_z=center[2] + half + RETREAT_M,
        )

    def _floor(self, center: np.ndarray, half: float) -> float:
        """Height of what the target stands on, or would fall onto: its block or the table."""
        world, item = self.world, self.world.target
        cos, sin = math.cos(item.yaw), math.sin(item.yaw)
        dx, dy = center[0] - item.xy[0], center[1] - item.xy[1]
        x, y = block_half(item)
        over = abs(cos * dx + sin * dy) < x and abs(-sin * dx + cos * dy) < y
        block_z = world.table_z + item.support_m
        return block_z if over and center[2] - half > block_z - 0.005 else world.table_z

    def _obstacles(self) -> np.ndarray:
        world, rows = self.world, []
        for index, item in enumerate(world.objects):
            if item.support_m > 0:
                x, y = block_half(item)
                rows.append([*item.xy, math.hypot(x, y), world.table_z + item.support_m])
            if index != world.target_index:
                center, rotation = world.object_pose(index)
                rows.append([center[0], center[1], item.radius, center[2] + half_height(rotation, item.half_size)])
        return np.array(rows).reshape(-1, 4)

    @property
    def done(self) -> bool:
        """The target is held at the lift height, or placed."""
        if self.world.task.destination is not None:
            return self.world.success
        now = self.situation()
        return self.world.success and now.position[2] > now.lift_z - 0.01

    def keyframe_symmetry(self) -> int:
        """How many yaws in a whole turn are as right as that of the next keyframe: those of the grasp, and of what is
        held the two that two fingers allow.
        """
        now = self.situation()
        return 2 if now.held or now.released else now.grasp.symmetry

    def plan(self, horizon: int) -> tuple[np.ndarray, int, np.ndarray]:
        """(actions float32 (horizon, n), number of valid actions, next keyframe float32 (n,): x, y, z, roll, pitch,
        yaw, gripper), of the axes that the robot has.

        The rest of `actions` holds still with the gripper closed, or open where the target was placed. The keyframe is
        the next of those that the world's config names; see `keyframe_of`.
        """
        now, own = self.situation(), self.world.robot.from_pose
        keyframe = own(keyframe_of(now, self.world.config.keyframes)[1])
        actions = np.zeros((horizon, 7), np.float32)
        actions[:, 6] = -1.0 if now.place is None else 1.0
        for index in range(horizon):
            if now.finished:
                return own(actions), index, keyframe
            actions[index] = decide(now)
            now = predict(now, actions[index])
        return own(actions), horizon, keyframe


def keyframe_of(now: Situation, names: tuple[str, ...] = KEYFRAMES) -> tuple[str, np.ndarray]:
    """(name, float32 (7,) pose) of the next keyframe among `names`.

    pre_grasp and grasp are reached with an open gripper (1): over the target, and at it. lift, pre_place and place with
    a closed one (0): high enough to leave, over the destination, and where the fingers open. Picking up ends with lift.
    """
    grasp, place = now.grasp, now.place
    across = float(np.linalg.norm(now.position[:2] - grasp.position[:2]))
    if now.released:
        present = "place"
    elif not now.held:
        near = across < 0.02 and abs(grasp.yaw - now.rpy[2]) < 0.2
        present = "grasp" if near else "pre_grasp"
    elif place is None or (float(np.linalg.norm(place.offset)) > 0.03 and travel_height(now) > now.position[2] + 0.01):
        present = "lift"
    else:
        present = "pre_place" if float(np.linalg.norm(place.offset)) > 0.02 else "place"
    last = "lift" if place is None else "place"
    order = KEYFRAMES[KEYFRAMES.index(present) : KEYFRAMES.index(last) + 1]
    name = next(name for name in order if name in names)
    hover = np.array([0.0, 0.0, HOVER_M])
    if name in ("pre_grasp", "grasp"):
        position = grasp.position + (hover if name == "pre_grasp" else 0.0)
        return name, np.array([*position, 0.0, 0.0, grasp.yaw, 1.0], np.float32)
    start = now.position if now.held else grasp.position
    if name == "lift":
        height = now.lift_z if place is None else max(now.lift_z, travel_height(now))
        position = np.array([*start[:2], height])
    else:
        position = np.array([*(now.position[:2] + place.offset), place.height])
        position += np.array([0.0, 0.0, PLACE_HOVER_M]) if name == "pre_place" else 0.0
    yaw = now.rpy[2] if now.held or now.released else grasp.yaw
    return name, np.array([*position, 0.0, 0.0, yaw, 0.0], np.float32)


def ready_to_close(now: Situation) -> bool:
    """The target is between the fingers. Tolerances widen as the gripper closes, so that noise does not undo a grasp
    half made.
    """
    slack, grasp = 1.0 - now.opening, now.grasp
    offset = grasp.position - now.position
    cos, sin = math.cos(now.rpy[2]), math.sin(now.rpy[2])
    across = abs(cos * offset[0] + sin * offset[1])  # along the finger faces
    between = abs(-sin * offset[0] + cos * offset[1])  # along the closing direction
    free = max(0.0, (now.opening * now.opening_m - grasp.width) / 2)
    small = grasp.width < 0.024 and not grasp.rim  # a small thing needs the middle of the pads
    return (
        across < (0.006 if small else 0.010 if grasp.round else 0.014) + 0.014 * slack
        and between < min(0.016, free) + 0.014 * slack
        and -0.02 < -offset[2] < (0.004 if small or grasp.rise > 0.025 else 0.012) + 0.012 * slack
        and abs(grasp.yaw - now.rpy[2]) < 0.20 + 0.40 * slack
        and now.opening * now.opening_m > grasp.width - 0.006
    )


def decide(now: Situation) -> np.ndarray:
    """The action float32 (7,) in a situation."""
    if now.released:
        goal, yaw, grip = np.array([*now.position[:2], now.retreat_z]), now.rpy[2], 1.0
    elif now.held and now.place is None:
        goal, yaw, grip = np.array([*now.position[:2], now.lift_z]), now.rpy[2], -1.0
    elif now.held:
        goal, yaw = carry(now), now.rpy[2]
        grip = 1.0 if ready_to_open(now) else -1.0
    elif ready_to_close(now):
        goal, yaw, grip = now.grasp.position, now.grasp.yaw, -1.0
    else:
        goal, yaw, grip = approach(now), now.grasp.yaw, 1.0
    move = goal - now.position
    length = float(np.linalg.norm(move))
    move *= min(1.0, SPEED_M / max(length, 1e-9))
    # R_goal = R(turn) R_now: a difference of the angles themselves would tilt the tool at large yaw
    turn = matrix_to_rpy(rpy_to_matrix(np.array([0.0, 0.0, yaw])) @ rpy_to_matrix(now.rpy).T)
    turn = np.clip(turn, -TURN_RAD, TURN_RAD)
    return np.array([*move, *turn, grip], np.float32)


def approach(now: Situation) -> np.ndarray:
    """Where the open gripper goes next (3,): towards the grasp above a funnel around it, so that it comes down only
    over the target, and over everything on the way.
    """
    grasp = now.grasp
    offset = grasp.position[:2] - now.position[:2]
    distance = float(np.linalg.norm(offset))
    gap = (now.opening_m - grasp.width) / 2  # between an open finger and the target
    # where there is room, the tool comes down while it moves the last step to the side
    lead = SPEED_M * min(1.0, max(0.0, (gap - TIGHT_M) / (ROOMY_M - TIGHT_M)))
    left = max(0.0, distance - lead) + YAW_ARM_M * max(0.0, abs(grasp.yaw - now.rpy[2]) - TURN_RAD)
    radius = min(FUNNEL_RADIUS_M, 0.6 * gap)
    # a wide or high target is passed over before the fingers come down beside it
    slope = (grasp.rise + TIPS_M + 0.004) / max(0.9 * gap - radius, 1e-3)
    slope = min(MAX_FUNNEL_SLOPE, max(FUNNEL_SLOPE, slope))
    height = min(HOVER_M, max(0.0, left - radius) * slope)
    # fingers that are not open enough to pass the target stay above it
    missing = min(WIDE_OPEN, (grasp.width + WIDTH_MARGIN_M) / now.opening_m) - now.opening
    height = max(height, HOVER_M * min(1.0, max(0.0, missing * 5.0)))
    return over_obstacles(now, offset, grasp.position[2] + height, grasp.position[2] + ENTRY_SLOPE * left)


def carry(now: Situation) -> np.ndarray:
    """Where the held target's tool goes next (3,): up, over everything on the way, and down onto the destination.

    It rises once, to what the whole way needs: a policy learns that better than a wall to be seen in time.
    """
    distance = float(np.linalg.norm(now.place.offset))
    shares = np.linspace(0.0, 1.0, 1 + math.ceil(distance / SPEED_M))  # of the way
    left = np.maximum(0.0, (1.0 - shares) * distance - SPEED_M)
    entry = now.place.height + ENTRY_SLOPE * left
    needed = needed_height(now, now.position[:2] + shares[:, None] * now.place.offset) + WAY_CLEARANCE_M
    above = now.place.height + min(PLACE_HOVER_M, max(0.0, left[0] - PLACE_RADIUS_M) * FUNNEL_SLOPE)
    height = max(above, float(np.minimum(needed, entry).max()))
    return over_obstacles(now, now.place.offset, height, float(entry[0]))


def ready_to_open(now: Situation) -> bool:
    """The held target is where it is let go."""
    across = float(np.linalg.norm(now.place.offset))
    return across < now.place.across and now.position[2] - now.place.height < now.place.above


def needed_height(now: Situation, xy: np.ndarray) -> np.ndarray:
    """Lowest tool heights (...) in m at `xy` (..., 2) that clear all obstacles."""
    if not len(now.obstacles):
        return np.full(xy.shape[:-1], -math.inf)
    away = now.obstacles[:, :2] - xy[..., None, :]
    beside = np.hypot(away[..., 0], away[..., 1]) - now.obstacles[:, 2] - FINGER_REACH_M
    clear = now.obstacles[:, 3] + CLEARANCE_M - CLEARANCE_SLOPE * np.maximum(beside, 0.0)
    return clear.max(-1) + now.depth


def over_obstacles(now: Situation, offset: np.ndarray, height: float, entry: float) -> np.ndarray:
    """Next goal (3,) of the tool on its way by `offset` (2,) to a point over which it may be at `height`. Obstacles
    count up to the height `entry`, since beside its goal the hand fits between them.
    """
    distance = float(np.linalg.norm(offset))
    ahead = now.position[:2] + offset * min(1.0, SPEED_M / max(distance, 1e-9))
    needed = min(float(needed_height(now, np.stack([ahead, now.position[:2]])).max()), entry)
    goal = max(height, needed)
    low = max(needed, height if now.held else -math.inf) - now.position[2]
    share = min(1.0, max(0.0, 1.0 - low / RISE_FIRST_M))
    return np.array([*(now.position[:2] + share * offset), goal])


def travel_height(now: Situation) -> float:
    """Tool height in m at which a held target leaves for its destination."""
    return float(carry(now)[2])


def predict(now: Situation, action: np.ndarray) -> Situation:
    """The situation one step later if the motion is perfect: fingers move at their rate, a held target moves along."""
    move = action[:3].astype(np.float64)
    width = now.grasp.width / now.opening_m
    opening = (
        min(1.0, now.opening + now.closing_rate)
        if action[6] > 0
        else max(now.opening - now.closing_rate, min(width, now.opening))
    )
    held = (now.held and action[6] < 0) or (action[6] < 0 and opening <= width + 1e-9)
    released = not held and (now.released or now.held)
    grasp, place, retreat_z = now.grasp, now.place, now.retreat_z
    if now.held:
        grasp = replace(grasp, position=grasp.position + move)
        retreat_z += move[2]
    if place is not None:
        place = replace(place, offset=place.offset - move[:2])
    return replace(
        now,
        position=now.position + move,
        rpy=matrix_to_rpy(rpy_to_matrix(action[3:6].astype(np.float64)) @ rpy_to_matrix(now.rpy)),
        opening=opening,
        held=held,
        grasp=grasp,
        place=place,
        released=released and place is not None,
        retreat_z=retreat_z,
    )
