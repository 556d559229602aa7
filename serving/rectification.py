"""Rectifies the views of a stereo camera on the robot's computer, where its driver does not."""

from typing import Any

import numpy as np

from stereovla.extras import extra
from stereovla.serving.stereo_calibration import StereoCalibration

with extra("robot"):
    import cv2


class Rectification:
    """Views free of distortion, in which every point has one row, as the model needs them.

    Both views get one focal length and one principal point, and no black border (OpenCV's `CALIB_ZERO_DISPARITY`, alpha
    0). The maps are made once; a pair of 1280x720 px takes some milliseconds.

    Attributes:
        calibration: {"size_px", "focal_length_px", "principal_point_px", "baseline_m"} of the rectified views, as
            datasets have it: the middle of the first pixel is (0.5, 0.5).
        rotation: (3, 3), rectified left camera's frame <- left camera's. A pose of the left camera that was measured in
            views which are not rectified, times its transpose, is the pose of the rectified one.
    """

    def __init__(self, cameras: StereoCalibration):
        self.size_px = cameras.size_px
        left = (cameras.left_matrix, cameras.left_distortion)
        right = (cameras.right_matrix, cameras.right_distortion)
        self.rotation, right_rotation, left_projection, right_projection = cv2.stereoRectify(
            *left,
            *right,
            self.size_px,
            cameras.rotation,
            cameras.translation_m[:, None],
            flags=cv2.CALIB_ZERO_DISPARITY,
            alpha=0,
        )[:4]
        views = ((left, self.rotation, left_projection), (right, right_rotation, right_projection))
        self._maps = [
            cv2.initUndistortRectifyMap(*camera, rotation, projection[:, :3], self.size_px, cv2.CV_32FC1)
            for camera, rotation, projection in views
        ]
        focal = float(left_projection[0, 0])
        self.calibration: dict[str, Any] = {
            "size_px": list(self.size_px),
            "focal_length_px": [focal, float(left_projection[1, 1])],
            "principal_point_px": (left_projection[:2, 2] + 0.5).tolist(),
            "baseline_m": float(-right_projection[0, 3] / focal),
        }

    def __call__(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Views uint8 (H, W, 3) as the camera gives them -> rectified, the same shape; ValueError for other sizes."""
        for name, view in (("left", left), ("right", right)):
            if view.shape[1::-1] != tuple(self.size_px):
                raise ValueError(
                    f"the {name} view has {view.shape[1]}x{view.shape[0]} px, the calibration is of "
                    f"{self.size_px[0]}x{self.size_px[1]} px"
                )
        return tuple(
            cv2.remap(view, *maps, cv2.INTER_LINEAR) for view, maps in zip((left, right), self._maps, strict=True)
        )
