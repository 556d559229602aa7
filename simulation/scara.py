"""A SCARA arm on a lift column: four joints in closed form. Its tool always points down, so a state has 5 numbers."""

import math

import numpy as np

from stereovla.processing.rotations import wrap_angle
from stereovla.simulation.camera import Mount
from stereovla.simulation.robot import Robot

# from the base to the axes of shoulder, elbow and tool, one after the other
SHOULDER_X_M, UPPER_M, FOREARM_M = 0.08, 0.36, 0.34
TOOL_Z_M = -0.21  # of the tool when the lift is down, in the base frame


class Scara(Robot):
    """State float32 (5,): x, y, z (m), yaw (rad), opening. Action (5,): dx, dy, dz, dyaw, gripper command."""

    embodiment = "lift_scara"
    model_file = "scara.xml"
    arm_joints = ("lift", "shoulder", "elbow", "wrist")
    axes = ("x", "y", "z", "yaw", "gripper")
    opening_m = 0.09
    closing_rate = 0.22
    max_step_m = 0.06
    max_step_rad = 0.6
    # further away, to the left of the robot, where the elbow is not in the way, with a longer lens and a wider baseline
    mount = Mount(azimuth_deg=15.0, elevation_deg=-5.0, distance=1.3)
    lens = {"fovy_deg": 0.8, "baseline_m": 1.15}

    def ready(self, position: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        return self.solve(position, rotation, np.zeros(4))

    def solve(self, position: np.ndarray, rotation: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Lift (m), shoulder, elbow and wrist (rad), the elbow always to the right, the wrist turned to the equal angle
        nearest to that of `start`. Of a goal out of reach, each joint gets as far as it can.
        """
        x, y = position[0] - SHOULDER_X_M, position[1]
        cosine = (x * x + y * y - UPPER_M**2 - FOREARM_M**2) / (2 * UPPER_M * FOREARM_M)
        elbow = min(max(math.acos(min(1.0, max(-1.0, cosine))), self.lower[2]), self.upper[2])
        shoulder = math.atan2(y, x) - math.atan2(FOREARM_M * math.sin(elbow), UPPER_M + FOREARM_M * math.cos(elbow))
        shoulder = min(max(shoulder, self.lower[1]), self.upper[1])
        yaw = math.atan2(rotation[1, 0], rotation[0, 0])
        wrist = start[3] + wrap_angle(yaw - shoulder - elbow - start[3])
        q = np.array([position[2] - TOOL_Z_M, shoulder, elbow, wrist])
        return np.minimum(np.maximum(q, self.lower), self.upper)
