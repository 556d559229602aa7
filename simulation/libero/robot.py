"""LIBERO's Panda behind robosuite's operational-space controller, told in the dataset's terms or in its own."""

import math

import mujoco
import numpy as np

from stereovla.processing.rotations import (
    matrix_to_rotation_vector,
    matrix_to_rpy,
    rotation_vector_to_matrix,
    rpy_to_matrix,
)
from stereovla.simulation.robot import POSE, STEP_S

CONTROL_HZ = 20
SUBSTEPS = round(STEP_S * CONTROL_HZ)
MAX_MOVE_M, MAX_TURN_RAD = 0.05, 0.5  # of a command of 1 to the controller, which is its largest
STIFFNESS = 150.0  # of the controller, 1 / s^2; critically damped
OPEN, CLOSE = -1.0, 1.0  # LIBERO's gripper commands
FINGER_M = 0.04  # travel of a finger
# LIBERO's site between the fingers has its z axis downwards and the fingers open along its x axis; ours is the base's
SITE_TO_TOOL = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])
# a critically damped mass that starts at rest x with the speed v and is drawn to the goal x + o has after STEP_S moved
# by REACHED * o + COASTED * v
_DECAY = math.exp(-math.sqrt(STIFFNESS) * STEP_S)
REACHED = 1 - (1 + math.sqrt(STIFFNESS) * STEP_S) * _DECAY
COASTED = STEP_S * _DECAY


class LiberoRobot:
    """The arm of one scene.

    control "pose": state and action as in `World`, at 10 Hz. Deltas apply to the measured tool pose; the controller's
    goal is set so far beyond that it gets there within the step, as far as it can: about 2.5 cm and 0.13 rad. Longer
    moves are shortened and counted.

    control "osc": LIBERO's own, at 20 Hz. Action (7,) in [-1, 1]: dx, dy, dz in units of 5 cm, rotation vector in
    units of 0.5 rad, gripper (-1 opens, 1 closes). State (8,): tool x, y, z in m and rotation vector of the hand in
    LIBERO's world frame, positions of both fingers in m, as openpi's policies for LIBERO are told.

    Args:
        env: LIBERO's environment.
    """

    axes = POSE
    opening_m = 2 * FINGER_M
    closing_rate = 0.25

    def __init__(self, env, control: str):
        self._env, self.control = env, control
        self.embodiment = "libero_panda" if control == "pose" else "libero_panda_osc"
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self.base = self.data.xpos[self.model.body("robot0_base").id].copy()
        turn = self.data.xmat[self.model.body("robot0_base").id]
        if not np.allclose(turn, np.eye(3).ravel(), atol=1e-6):
            raise RuntimeError(f"the robot's base is turned against LIBERO's world by {turn.round(3).tolist()}")
        self.tool = self.model.site("gripper0_grip_site").id
        self.hand = self.model.body("robot0_right_hand").id
        self.fingers = [self.model.joint(f"gripper0_finger_joint{side}").qposadr[0] for side in (1, 2)]
        self.pads = tuple(self.model.geom(f"gripper0_finger{side}_pad_collision").id for side in (1, 2))
        self.begin()

    def begin(self) -> None:
        """A new episode: nothing was shortened or reached, the gripper is told to be open."""
        self.shortened, self.reached, self._gripper = 0, False, OPEN

    @staticmethod
    def from_pose(values: np.ndarray) -> np.ndarray:
        """The robot has every axis: poses and actions are its own."""
        return values

    @staticmethod
    def idle(gripper: float) -> np.ndarray:
        """The action (7,), of either control, that moves no more, with a gripper command."""
        return np.array([0.0] * 6 + [gripper])

    @property
    def size(self) -> int:
        """Numbers of an action."""
        return len(POSE)

    def tool_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) in m and rotation (3, 3) of the tool frame in the base frame."""
        rotation = self.data.site_xmat[self.tool].reshape(3, 3) @ SITE_TO_TOOL.T
        return self.data.site_xpos[self.tool] - self.base, rotation

    def opening(self) -> float:
        """Gripper opening, 0 closed to 1 open."""
        left, right = self.data.qpos[self.fingers]
        return min(1.0, max(0.0, float(left - right) / (2 * FINGER_M)))

    def state(self) -> np.ndarray:
        """float32 (7,), or (8,) of "osc"."""
        if self.control == "osc":
            turn = openpi_turn(self.data.xquat[self.hand])
            own = np.concatenate([self.data.site_xpos[self.tool], turn, self.data.qpos[self.fingers]])
            return own.astype(np.float32)
        position, rotation = self.tool_pose()
        return np.concatenate([position, matrix_to_rpy(rotation), [self.opening()]]).astype(np.float32)

    def wait(self, steps: int) -> None:
        """Lets so many steps of 20 Hz pass, as LIBERO's protocol does before an episode."""
        for _ in range(steps):
            self._env.step(self.idle(OPEN))

    def step(self, action: np.ndarray) -> None:
        """Executes an action, see the class."""
        self.reached = False
        if self.control == "osc":
            self._act(np.clip(action, -1.0, 1.0))
            return
        if action[6] < -0.5:
            self._gripper = CLOSE
        elif action[6] > 0.5:
            self._gripper = OPEN
        position, rotation = self.tool_pose()
        velocity = np.zeros(6)  # of rotation, then of translation
        mujoco.mj_objectVelocity(self.model, self.data, mujoco.mjtObj.mjOBJ_SITE, self.tool, velocity, 0)
        goal = position + (action[:3] - COASTED * velocity[3:]) / REACHED
        turn = matrix_to_rotation_vector(rpy_to_matrix(action[3:6]))
        goal_rotation = rotation_vector_to_matrix((turn - COASTED * velocity[:3]) / REACHED) @ rotation
        shortened = False
        for _ in range(SUBSTEPS):
            position, rotation = self.tool_pose()
            move = (goal - position) / MAX_MOVE_M
            turn = matrix_to_rotation_vector(goal_rotation @ rotation.T) / MAX_TURN_RAD
            longest = max(np.abs(move).max(), 1.0), max(np.abs(turn).max(), 1.0)
            shortened |= max(longest) > 1.0
            self._act(np.concatenate([move / longest[0], turn / longest[1], [self._gripper]]))
        self.shortened += shortened

    def _act(self, action: np.ndarray) -> None:
        """One step of 20 Hz."""
        self.reached |= bool(self._env.step(action)[2])


def openpi_turn(quaternion: np.ndarray) -> np.ndarray:
    """Unit quaternion wxyz (4,) -> rotation vector (3,) as openpi's policies for LIBERO are told it: of the longer way
    round where w is negative.
    """
    w = min(1.0, max(-1.0, float(quaternion[0])))  # rounding leaves it beside
    return quaternion[1:] * (2 * math.acos(w) / max(math.sqrt(1 - w * w), 1e-9))
