"""What every robot of the world is: an arm whose tool is moved by Cartesian deltas, with a two-finger gripper.

A robot is a subclass of `Robot` and an MJCF file in `assets/` that has, beside its arm: the bodies hand, left_finger
and right_finger; the joints left_finger and right_finger (m, 0 = closed); the position actuator gripper, and one named
like each joint of the arm; the geoms left_pad and right_pad, which hold objects; and the site tool. Its frame lies
between the pads, `TIPS_M` over the finger tips and 4.5 cm or more under the palm; its axes are the base's when the
gripper points straight down with its fingers opening along base y.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import mujoco
import numpy as np

from stereovla.processing.rotations import matrix_to_rpy, rpy_to_matrix
from stereovla.simulation.camera import Mount

CONTROL_HZ = 10
STEP_S = 1.0 / CONTROL_HZ
POSE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # m, rad, [0, 1]; of actions: deltas and command
TIPS_M = 0.009  # finger tips below the tool
DIVERGED = (
    mujoco.mjtWarning.mjWARN_BADQPOS,
    mujoco.mjtWarning.mjWARN_BADQVEL,
    mujoco.mjtWarning.mjWARN_BADQACC,
)


class Robot(ABC):
    """Controls the arm inside a model that contains the robot's MJCF file.

    Deltas apply to the measured tool pose: a label computed from the measured state then means the same pose whatever
    happened before, so errors cannot wind up in a hidden set-point. What tracking leaves behind (below 0.5 mm a step in
    free space) is therefore not made up by the next delta but by the policy, which sees it in the next state.

    Attributes:
        embodiment: its name in datasets.
        model_file: MJCF in `assets/`.
        arm_joints: from the base to the hand.
        axes: those of `POSE` that its state and its action have, in that order, the gripper last.
        opening_m: between the pads of the open gripper.
        closing_rate: opening, 0 to 1, that the free gripper loses or gains in a step.
        max_step_m, max_step_rad: longer commands are shortened, as a real arm's controller does.
        mount: where its stereo rig stands.
        lens: factors of its camera, on fields of the presets of `WorldConfig`.
    """

    embodiment: ClassVar[str]
    model_file: ClassVar[str]
    arm_joints: ClassVar[tuple[str, ...]]
    axes: ClassVar[tuple[str, ...]]
    opening_m: ClassVar[float]
    closing_rate: ClassVar[float]
    max_step_m: ClassVar[float]
    max_step_rad: ClassVar[float]
    mount: ClassVar[Mount]
    lens: ClassVar[dict[str, float]]

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData):
        self.model, self.data = model, data
        joints = [model.joint(name) for name in self.arm_joints]
        self.qpos = np.array([joint.qposadr[0] for joint in joints])
        self.dofs = np.array([joint.dofadr[0] for joint in joints])
        self.lower, self.upper = np.array([joint.range for joint in joints]).T
        self.motors = np.array([model.actuator(name).id for name in self.arm_joints])
        # feed-forward: force = kp (ctrl - q) - kv v, so a set-point ahead by (kv / kp) v cancels the damping of a
        # wanted motion
        self.lead_s = -model.actuator_biasprm[self.motors, 2] / model.actuator_gainprm[self.motors, 0]
        self.gripper = model.actuator("gripper").id
        self.fingers = np.array([model.joint(name).qposadr[0] for name in ("left_finger", "right_finger")])
        self.finger_travel_m = self.opening_m / 2
        self.tool = model.site("tool").id
        self.substeps = round(STEP_S / model.opt.timestep)
        self.shortened = 0  # commands that exceeded the speed limits since the reset

    @classmethod
    def from_pose(cls, values: np.ndarray) -> np.ndarray:
        """Poses, or actions, (..., 7) in the order of `POSE` -> the robot's own (..., n), n = len(axes)."""
        return values[..., [POSE.index(axis) for axis in cls.axes]]

    @classmethod
    def to_pose(cls, values: np.ndarray) -> np.ndarray:
        """Inverse of `from_pose`: (..., n) -> (..., 7), with 0 for the axes that the robot has not."""
        result = np.zeros((*values.shape[:-1], len(POSE)), values.dtype)
        result[..., [POSE.index(axis) for axis in cls.axes]] = values
        return result

    @classmethod
    def idle(cls, gripper: float) -> np.ndarray:
        """The action (n,) that keeps the tool where it is, with a gripper command."""
        return cls.from_pose(np.array([0.0] * 6 + [gripper]))

    def tool_pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) in m and rotation (3, 3) of the tool frame in the base frame."""
        return self.data.site_xpos[self.tool].copy(), self.data.site_xmat[self.tool].reshape(3, 3).copy()

    def opening(self) -> float:
        """Gripper opening, 0 closed to 1 open."""
        return min(1.0, max(0.0, float(self.data.qpos[self.fingers].mean()) / self.finger_travel_m))

    def state(self) -> np.ndarray:
        """float32 (n,): those of x, y, z (m), roll, pitch, yaw (rad), opening [0, 1] that are among `axes`."""
        position, rotation = self.tool_pose()
        return self.from_pose(np.concatenate([position, matrix_to_rpy(rotation), [self.opening()]]).astype(np.float32))

    @abstractmethod
    def solve(self, position: np.ndarray, rotation: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Joint angles (or m) of the arm, within their limits, whose tool frame is at `position` (3,), `rotation` (3,
        3), near the joint angles `start`. A goal out of reach gives a pose near it.
        """

    @abstractmethod
    def ready(self, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """The same, for the begin of an episode, with the arm's posture free."""

    def place(self, position: np.ndarray, yaw: float) -> None:
        """Puts the arm at a tool pose with the gripper open, at rest (only at the start of an episode)."""
        self.data.qpos[self.qpos] = self.ready(position, rpy_to_matrix(np.array([0.0, 0.0, yaw])))
        self.data.qpos[self.fingers] = self.finger_travel_m
        self.data.qvel[:] = 0.0
        self.data.ctrl[self.motors] = self.data.qpos[self.qpos]
        self.data.ctrl[self.gripper] = self.finger_travel_m
        self.shortened = 0
        mujoco.mj_forward(self.model, self.data)
        miss = float(np.linalg.norm(self.tool_pose()[0] - position))
        if miss > 1e-3:
            raise ValueError(f"the start position {np.round(position, 3)} m is out of reach by {miss:.3f} m")

    def step(self, action: np.ndarray) -> None:
        """Runs 0.1 s of physics towards the measured tool pose moved by `action` (n,); see World.step."""
        action = self.to_pose(action)
        move, turn = self._limit(action[:3], self.max_step_m), self._limit(action[3:6], self.max_step_rad)
        position, rotation = self.tool_pose()
        start = self.data.qpos[self.qpos].copy()
        goal = self.solve(position + move, rpy_to_matrix(turn) @ rotation, start)
        if action[6] < -0.5:
            self.data.ctrl[self.gripper] = 0.0
        elif action[6] > 0.5:
            self.data.ctrl[self.gripper] = self.finger_travel_m
        lead = self.lead_s * (goal - start) / STEP_S
        for k in range(self.substeps):
            self.data.ctrl[self.motors] = start + (goal - start) * (k / self.substeps) + lead
            mujoco.mj_step(self.model, self.data)
        mujoco.mj_kinematics(self.model, self.data)
        for kind in DIVERGED:  # MuJoCo only counts these and puts the scene back to its start
            if self.data.warning[kind].number:
                raise RuntimeError(f"the physics diverged ({kind.name}) at {self.data.time:.2f} s: reset the world")

    def _limit(self, vector: np.ndarray, limit: float) -> np.ndarray:
        norm = float(np.linalg.norm(vector))
        if norm <= limit:
            return np.asarray(vector, np.float64)
        self.shortened += 1
        return np.asarray(vector, np.float64) * (limit / norm)
