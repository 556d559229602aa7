"""Rotations and camera poses as pure functions. Fixed-axis roll, pitch, yaw: R = Rz(yaw) Ry(pitch) Rx(roll);
quaternions wxyz; angles in rad.
"""

import math

import numpy as np


def rpy_to_matrix(rpy: np.ndarray) -> np.ndarray:
    """(3,) roll, pitch, yaw -> (3, 3) rotation."""
    (sr, sp, sy), (cr, cp, cy) = np.sin(rpy), np.cos(rpy)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def matrix_to_rpy(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) rotation -> (3,) roll, pitch, yaw; pitch in [-pi/2, pi/2], roll and yaw in (-pi, pi]."""
    pitch = math.asin(min(1.0, max(-1.0, -matrix[2, 0])))
    return np.array([math.atan2(matrix[2, 1], matrix[2, 2]), pitch, math.atan2(matrix[1, 0], matrix[0, 0])])


def matrix_to_quaternion(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) rotation -> (4,) unit quaternion wxyz with w >= 0, from the largest eigenvector of the symmetric 4 x 4
    form (Bar-Itzhack 2000).
    """
    m = matrix
    form = np.array(
        [
            [m[0, 0] + m[1, 1] + m[2, 2], m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]],
            [0, m[0, 0] - m[1, 1] - m[2, 2], m[0, 1] + m[1, 0], m[0, 2] + m[2, 0]],
            [0, 0, m[1, 1] - m[0, 0] - m[2, 2], m[1, 2] + m[2, 1]],
            [0, 0, 0, m[2, 2] - m[0, 0] - m[1, 1]],
        ]
    )
    quaternion = np.linalg.eigh(form, UPLO="U")[1][:, -1]
    return quaternion if quaternion[0] >= 0 else -quaternion


def rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) rotation -> (3,) axis times angle in rad; exact below pi, which control errors never reach."""
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]]) / 2.0
    sine = float(np.linalg.norm(axis))
    angle = math.atan2(sine, (np.trace(matrix) - 1.0) / 2.0)
    return axis if sine < 1e-9 else axis * (angle / sine)


def wrap_angle(angle: float, period: float = 2.0 * math.pi) -> float:
    """The equal angle modulo `period` in [-period / 2, period / 2)."""
    return (angle + period / 2.0) % period - period / 2.0


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
