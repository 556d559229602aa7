"""From a pixel and its disparity straight to where the point is, in the units in which a policy reads the state, and to
how far away it is.
"""

from collections.abc import Sequence

import numpy as np

from .camera_geometry import Calibration

FRAMES = ("camera", "base")  # that points can be asked for in; a model reads 1 and 2, and 0 where there are none
CAMERA_UNIT_M = 0.25  # of points in the camera's frame: the reach of an arm is a few of these


def point_transform(
    calibration: Calibration | None, frame: str, scale_m: Sequence[float] | None, shift_m: Sequence[float] | None
) -> tuple[np.ndarray, int]:
    """float64 (4, 4) M and its frame as a number: M [u/d, v/d, 1/d, 1] is the point of pixel (u, v) px with disparity
    d px, all of the view that `calibration` is of, and its depth in m, in which answers are.

    In the base frame (2) it is (point - shift) / scale, as the state's position is normalised; where the extrinsics
    are unknown or the state has no position, or the frame that is asked for is the camera's, in units of
    `CAMERA_UNIT_M` in the camera's frame (1); without a baseline there are no points: zeros (0).

    Args:
        scale_m, shift_m: (3,) of x, y, z, with which the state begins; None where it does not.
    """
    if calibration is None or calibration.baseline_m is None:
        return np.zeros((4, 4)), 0
    (fx, fy), (cx, cy), baseline = calibration.focal_length_px, calibration.principal_point_px, calibration.baseline_m
    # z = fx b / d, x = (u - cx) z / fx, y = (v - cy) z / fy
    rays = baseline * np.array([[1, 0, -cx], [0, fx / fy, -cy * fx / fy], [0, 0, fx]])
    transform = np.zeros((4, 4))
    transform[3, :3] = rays[2]
    pose = calibration.transform_camera_to_base
    if frame == "camera" or pose is None or scale_m is None:
        transform[:3, :3] = rays / CAMERA_UNIT_M
        return transform, 1
    scale = np.asarray(scale_m)
    transform[:3, :3] = pose[:3, :3] @ rays / scale[:, None]
    transform[:3, 3] = (pose[:3, 3] - np.asarray(shift_m)) / scale
    return transform, 2
