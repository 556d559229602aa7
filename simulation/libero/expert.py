"""A scripted expert for LIBERO's tasks of picking up and placing: our own expert's decisions, on a situation read from
LIBERO's scene.
"""

import numpy as np

from stereovla.processing.rotations import matrix_to_rpy
from stereovla.simulation.expert import (
    LIFT_M,
    RELEASE_ACROSS_M,
    RELEASE_HEIGHT_M,
    RELEASE_M,
    RETREAT_M,
    Expert,
    Place,
    Situation,
)
from stereovla.simulation.libero.grasps import FINGERS, HAND, choose_grasp, closing_direction
from stereovla.simulation.libero.world import LiberoWorld

FULFILLED_ACROSS_M = 0.02  # so near the middle, what LIBERO counts as placed is let go at any height
LOOSE_M, LIFTED_M, NEAR_M = 0.008, 0.004, 0.025
RIM_HELD_M = 0.016  # wider, the fingers do not hold a rim
TILE_M = 0.06  # obstacles are cut into pieces of this size
FOOT_M = 0.015  # what belongs to the foot of a thing, above its lowest point
FOOT_POINTS = 24  # of it that are looked under
ABOVE_M = 0.6  # over the table, from where is looked down


class LiberoExpert(Expert):
    """Plans from the world's present state, as `Expert`; ValueError for a task that needs more than placing things."""

    world: LiberoWorld

    def __init__(self, world: LiberoWorld):
        self.world = world

    def situation(self) -> Situation:
        """The present state of the world as the expert sees it."""
        world, scene, robot = self.world, self.world.scene, self.world.robot
        goal, target = world.task, world.target
        if not goal.by_placing:
            raise ValueError(
                f"the expert cannot do {world.instruction!r}: it asks for {goal.predicate!r}, which is not picking up "
                "and placing"
            )
        position, rotation = robot.tool_pose()
        rpy = matrix_to_rpy(rotation)
        center, object_rotation = world.object_pose()
        points = np.concatenate(scene.points(target.bodies)) - robot.base
        lowest, top = float(points[:, 2].min()), float(points[:, 2].max())
        arm = scene.subtree(world.model.body("robot0_base").id)

        def heights(xy: np.ndarray) -> np.ndarray:
            """Of what is neither target nor robot, in the base frame."""
            found = scene.heights(xy + robot.base[:2], robot.base[2] + ABOVE_M, target.bodies | arm)
            return found - robot.base[2]

        destination = scene.place_of(goal.destination) - robot.base
        grasp = choose_grasp(points, object_rotation, lowest, rpy[2], destination[:2] - center[:2], heights)
        # pads far apart touch two sides of something wide, or two things; what is in the air between closed ones is
        # held, though it may not touch both for a moment
        closed = robot.opening() * robot.opening_m < (RIM_HELD_M if grasp.rim else grasp.width + LOOSE_M)
        in_air = world.lift_m > LIFTED_M and float(np.linalg.norm(points - position, axis=1).min()) < NEAR_M
        held = closed and (world.held or in_air)
        below = (position[2] if held else grasp.position[2]) - lowest
        # where tool and fingers will be when the target's body is over its destination
        tool = position[:2] if held else grasp.position[:2]
        tool_there = destination[:2] + tool - center[:2]
        foot = points[points[:, 2] < lowest + FOOT_M, :2]
        foot = foot[:: max(1, len(foot) // FOOT_POINTS)] - center[:2]
        under = heights(destination[:2] + np.concatenate([foot, 0.6 * foot])).max()
        height = under + RELEASE_M + below
        along = closing_direction(float(rpy[2]) if held else grasp.yaw)
        across = np.array([along[1], -along[0]])
        parts = np.array([(side * a, s, z) for side in (-1, 1) for a, s, z in FINGERS] + HAND)
        walls = heights(tool_there + parts[:, :1] * along + parts[:, 1:2] * across) - parts[:, 2]
        height = max(height, float(walls.max()) + RELEASE_M)
        fulfilled = scene.fulfilled(goal)
        near = (FULFILLED_ACROSS_M, np.inf) if fulfilled else (RELEASE_ACROSS_M, RELEASE_HEIGHT_M)
        return Situation(
            position=position,
            rpy=rpy,
            opening=robot.opening(),
            opening_m=robot.opening_m,
            closing_rate=robot.closing_rate,
            held=held,
            grasp=grasp,
            lift_z=world.rest_z[world.target_index] + grasp.position[2] - center[2] + LIFT_M,
            obstacles=self._obstacles(),
            below=below,
            place=Place(destination[:2] - (center if held else position)[:2], height, *near),
            released=fulfilled and not any(world.fingers_touching()),
            retreat_z=top + RETREAT_M,
        )

    def _obstacles(self) -> np.ndarray:
        """(n, 4) x, y, radius, top of everything that is neither target nor robot nor table."""
        world, rows = self.world, []
        for item in world.objects:
            if item.key == world.target.key and item.movable:
                continue
            for corners in world.scene.points(item.bodies - world.target.bodies):
                low, high = corners.min(0) - world.robot.base, corners.max(0) - world.robot.base
                counts = np.maximum(1, np.ceil((high - low)[:2] / TILE_M)).astype(int)
                step = (high - low)[:2] / counts
                for i in range(counts[0]):
                    for j in range(counts[1]):
                        middle = low[:2] + step * (np.array([i, j]) + 0.5)
                        rows.append([*middle, float(np.linalg.norm(step)) / 2, high[2]])
        return np.array(rows).reshape(-1, 4)

    @property
    def done(self) -> bool:
        """LIBERO says that the task is done, and the fingers have let go."""
        return self.world.success and not any(self.world.fingers_touching())
