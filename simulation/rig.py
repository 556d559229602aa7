"""The stereo rig of one episode, drawn within the ranges of the world's config."""

import math
from dataclasses import dataclass

import numpy as np

from stereovla.processing.rotations import rpy_to_matrix
from stereovla.simulation.camera import NOMINAL, RANGES, Mount, calibration, focal_length
from stereovla.simulation.config import WorldConfig


@dataclass(frozen=True)
class Rig:
    """A stereo rig: `pose` (4, 4) of its centre, OpenCV axes, in the base frame; lengths in m."""

    pose: np.ndarray
    fovy_deg: float
    baseline_m: float
    right_pitch_rad: float  # of the right camera, upwards: its picture lies lower than a rectified one

    def calibration(self, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
        """Nominal calibration, see `calibration`: it knows nothing of `right_pitch_rad`."""
        left = self.pose.copy()
        left[:3, 3] -= self.pose[:3, 0] * (self.baseline_m / 2)
        return calibration(left, focal_length(self.fovy_deg, image_size[0]), self.baseline_m, image_size)


def draw_rig(config: WorldConfig, mount: Mount, center: np.ndarray, rng: np.random.Generator) -> Rig:
    """Random rig within the config's ranges, looking at `center` (3,)."""
    pose = draw_rig_pose(config.camera_range, mount, center, rng)
    fovy, baseline = rng.uniform(*config.fovy_deg), rng.uniform(*config.baseline_m)
    lower = rng.uniform(*config.vertical_misalignment_px)
    return Rig(pose, fovy, baseline, math.atan(lower / focal_length(fovy, config.height)))


def draw_rig_pose(camera_range: str, mount: Mount, center: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random (4, 4) pose of the rig's centre within "small", "medium" or "large" around `center` (3,), the point
    looked at, on a robot's mount.
    """
    limits = RANGES[camera_range]
    if camera_range == "small":
        pose = mount.pose(center, **NOMINAL)
        pose[:3, 3] += rng.uniform(-1, 1, 3) * limits["shift_m"]
    else:
        pose = mount.pose(center, **{key: rng.uniform(*limits[key]) for key in NOMINAL})
    pose[:3, :3] = pose[:3, :3] @ rpy_to_matrix(np.radians(rng.uniform(-1, 1, 3) * limits["turn_deg"]))
    return pose
