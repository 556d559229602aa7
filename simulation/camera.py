"""Where a stereo rig can stand and what its cameras are: three ranges of poses, lenses, and calibration."""

import math
from dataclasses import dataclass

import numpy as np

LOOK_AT_HEIGHT_M = 0.08  # above the table: leaves room in the picture for the gripper
NOMINAL = {"azimuth_deg": 0.0, "elevation_deg": 45.0, "distance_m": 0.56}
# half widths; azimuth 0 is in front of the robot, looking back at it, where the arm hides least
RANGES = {
    "small": {"shift_m": 0.03, "turn_deg": 3.0},
    "medium": {
        "azimuth_deg": (-25.0, 25.0),
        "elevation_deg": (35.0, 55.0),
        "distance_m": (0.50, 0.70),
        "turn_deg": 3.0,
    },
    "large": {"azimuth_deg": (-60.0, 60.0), "elevation_deg": (30.0, 60.0), "distance_m": (0.50, 0.90), "turn_deg": 3.0},
}


@dataclass(frozen=True)
class Mount:
    """Where a robot's rig stands instead: the poses of `NOMINAL` and `RANGES` turned by `azimuth_deg`, raised by
    `elevation_deg`, and `distance` times as far away.
    """

    azimuth_deg: float = 0.0
    elevation_deg: float = 0.0
    distance: float = 1.0

    def pose(self, center: np.ndarray, azimuth_deg: float, elevation_deg: float, distance_m: float) -> np.ndarray:
        """See `orbit_pose`."""
        return orbit_pose(
            center, azimuth_deg + self.azimuth_deg, elevation_deg + self.elevation_deg, distance_m * self.distance
        )


def focal_length(fovy_deg: float, height: int) -> float:
    """In px."""
    return 0.5 * height / math.tan(math.radians(fovy_deg) / 2)


def camera_rotation(forward: np.ndarray) -> np.ndarray:
    """(3, 3) rotation camera -> base of a level OpenCV camera (x right, y down, z forward) that looks along `forward`
    (3,), which is not vertical.
    """
    z = np.asarray(forward, np.float64) / np.linalg.norm(forward)
    x = np.cross(z, (0.0, 0.0, 1.0))
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1)


def project(
    points: np.ndarray, transform_camera_to_base: np.ndarray, focal: np.ndarray, centre: np.ndarray
) -> np.ndarray:
    """Pixels (n, 2) of `points` (n, 3) given in the base frame (m); NaN for points behind the camera. Pixel centres
    lie at j + 0.5.
    """
    rotation, origin = transform_camera_to_base[:3, :3], transform_camera_to_base[:3, 3]
    local = (np.asarray(points, np.float64) - origin) @ rotation
    depth = np.where(local[:, 2:] > 0, local[:, 2:], np.nan)
    return local[:, :2] / depth * focal + centre


def orbit_pose(center: np.ndarray, azimuth_deg: float, elevation_deg: float, distance_m: float) -> np.ndarray:
    """(4, 4) pose of the rig's centre, OpenCV axes, in the base frame: on a sphere around `center` (3,), looking at
    it.
    """
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    direction = np.array(
        [math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)]
    )
    pose = np.eye(4)
    pose[:3, :3] = camera_rotation(-direction)
    pose[:3, 3] = center + distance_m * direction
    return pose


def calibration(
    left_pose: np.ndarray, focal_px: float, baseline_m: float, image_size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The four calibration columns, float32: focal length (2,) px, principal point (2,) px, baseline () m, LEFT camera
    pose (4, 4) in the base frame.
    """
    height, width = image_size
    return {
        "focal_length_px": np.array([focal_px, focal_px], np.float32),
        "principal_point_px": np.array([width / 2, height / 2], np.float32),
        "baseline_m": np.float32(baseline_m),
        "transform_camera_to_base": left_pose.astype(np.float32),
    }


def in_view(
    points: np.ndarray, values: dict[str, np.ndarray], image_size: tuple[int, int], margin: float
) -> np.ndarray:
    """bool (2, n): which points (n, 3) project into the left and the right picture, at least `margin` of the picture's
    size away from the border.
    """
    size = np.array([image_size[1], image_size[0]])
    seen = []
    for shift in (0.0, float(values["baseline_m"])):
        pose = values["transform_camera_to_base"].astype(np.float64)
        pose[:3, 3] += pose[:3, 0] * shift
        pixels = project(points, pose, values["focal_length_px"], values["principal_point_px"])
        seen.append(((pixels > margin * size) & (pixels < (1 - margin) * size)).all(axis=1))  # NaN compares false
    return np.array(seen)
