"""Where the stereo rig stands: LIBERO's agent view, and ranges of poses around it as wide as those of our own world."""

import math

import numpy as np

from stereovla.processing.rotations import rpy_to_matrix
from stereovla.simulation import camera
from stereovla.simulation.camera import NOMINAL, orbit_pose

# half widths or ranges about the agent view: angles in deg are added to its own, distances are multiples of its own
RANGES: dict[str, dict] = {"stock": {}} | {
    name: {
        key: tuple(value / NOMINAL[key] if key == "distance_m" else value - NOMINAL[key] for value in limits)
        if isinstance(limits, tuple)
        else limits
        for key, limits in found.items()
    }
    for name, found in camera.RANGES.items()
}


def draw_view(camera_range: str, stock: np.ndarray, table_z: float, rng: np.random.Generator) -> np.ndarray:
    """Random (4, 4) pose of the left view, OpenCV axes, around the agent view `stock` (4, 4). Azimuth, elevation and
    distance are those from the point at the height `table_z` (m) that the agent view looks at.
    """
    limits = RANGES[camera_range]
    if not limits:
        return stock.copy()
    pose = stock.copy()
    if "shift_m" in limits:
        pose[:3, 3] += rng.uniform(-1, 1, 3) * limits["shift_m"]
    else:
        forward, origin = stock[:3, 2], stock[:3, 3]
        distance = (table_z - origin[2]) / forward[2]
        azimuth = math.degrees(math.atan2(-forward[1], -forward[0]))
        elevation = math.degrees(math.asin(-forward[2]))
        pose = orbit_pose(
            origin + distance * forward,
            azimuth + rng.uniform(*limits["azimuth_deg"]),
            elevation + rng.uniform(*limits["elevation_deg"]),
            distance * rng.uniform(*limits["distance_m"]),
        )
    pose[:3, :3] = pose[:3, :3] @ rpy_to_matrix(np.radians(rng.uniform(-1, 1, 3) * limits["turn_deg"]))
    return pose
