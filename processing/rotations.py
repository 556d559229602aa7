"""Rotations, with numpy alone: roll, pitch, yaw about fixed x, y, z (R = Rz(yaw) Ry(pitch) Rx(roll)), matrices, unit
quaternions wxyz and rotation vectors; angles in rad.

It stands here because it travels with a checkpoint; as arithmetic that needs nothing, it serves every other room too.
"""

import math
from typing import Any

import numpy as np


def rpy_to_matrix(rpy: Any) -> np.ndarray:
    """Roll, pitch, yaw (..., 3) -> (..., 3, 3)."""
    rpy = np.asarray(rpy, dtype=np.float64)
    (sr, sp, sy), (cr, cp, cy) = np.moveaxis(np.sin(rpy), -1, 0), np.moveaxis(np.cos(rpy), -1, 0)
    return _matrix(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def matrix_to_rpy(matrix: Any) -> np.ndarray:
    """(..., 3, 3) -> roll, pitch, yaw (..., 3) with pitch in [-pi/2, pi/2]; at |pitch| = pi/2 the roll is 0."""
    matrix = np.asarray(matrix, dtype=np.float64)
    cos_pitch = np.hypot(matrix[..., 0, 0], matrix[..., 1, 0])
    pitch = np.arctan2(-matrix[..., 2, 0], cos_pitch)
    # At gimbal lock only roll -+ yaw is defined; below 1e-7 the two arctan2 arguments are rounding noise.
    locked = cos_pitch < 1e-7
    roll = np.where(locked, 0.0, np.arctan2(matrix[..., 2, 1], matrix[..., 2, 2]))
    free_yaw = np.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
    yaw = np.where(locked, np.arctan2(-matrix[..., 0, 1], matrix[..., 1, 1]), free_yaw)
    return np.stack([roll, pitch, yaw], axis=-1)


def matrix_to_quaternion(matrix: Any) -> np.ndarray:
    """(..., 3, 3) -> unit quaternion wxyz (..., 4), its first component that is not 0 positive, so that it is
    unique.
    """
    m = np.asarray(matrix, dtype=np.float64)
    diagonal = np.diagonal(m, axis1=-2, axis2=-1)  # (..., 3)
    trace = diagonal.sum(axis=-1)
    x_part, y_part, z_part = np.moveaxis(_skew_part(m), -1, 0)
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    # Rows of 4 q q^T: each is 4 q_i q. The row of the largest |q_i| is well conditioned for every rotation.
    outer = _matrix(
        [
            [1 + trace, x_part, y_part, z_part],
            [x_part, 1 - trace + 2 * diagonal[..., 0], xy, xz],
            [y_part, xy, 1 - trace + 2 * diagonal[..., 1], yz],
            [z_part, xz, yz, 1 - trace + 2 * diagonal[..., 2]],
        ]
    )  # (..., 4, 4)
    best = np.diagonal(outer, axis1=-2, axis2=-1).argmax(axis=-1)
    quaternion = np.take_along_axis(outer, best[..., None, None], axis=-2)[..., 0, :]
    quaternion = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    leading = (np.abs(quaternion) > 1e-9).argmax(axis=-1)
    return quaternion * np.sign(np.take_along_axis(quaternion, leading[..., None], axis=-1))


def matrix_to_rotation_vector(matrix: Any) -> np.ndarray:
    """(..., 3, 3) -> axis times angle (..., 3), the angle in [0, pi]."""
    quaternion = matrix_to_quaternion(matrix)
    sine = np.linalg.norm(quaternion[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, quaternion[..., :1])
    return quaternion[..., 1:] * np.where(sine > 1e-12, angle / np.maximum(sine, 1e-12), 2.0)


def rotation_vector_to_matrix(vector: Any) -> np.ndarray:
    """Axis times angle (3,) -> (3, 3), by Rodrigues' formula."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = np.asarray(vector, dtype=np.float64) / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def rotation_angle(matrix: Any) -> np.ndarray:
    """(..., 3, 3) -> by how much it turns, (...) in [0, pi].

    The arctan of sine and cosine keeps small angles exact, where the arccos of the trace loses half of the digits.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    sine = np.linalg.norm(_skew_part(matrix), axis=-1)
    return np.arctan2(sine, np.trace(matrix, axis1=-2, axis2=-1) - 1)


def wrap_angle(angle: Any, period: float = 2 * math.pi) -> np.ndarray:
    """The equal angles modulo `period` in [-period / 2, period / 2)."""
    return (np.asarray(angle, dtype=np.float64) + period / 2) % period - period / 2


def _matrix(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Rows of numbers (...), as one is written down -> (..., rows, columns)."""
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def _skew_part(matrix: np.ndarray) -> np.ndarray:
    """(..., 3, 3) -> the axis (..., 3) times twice the sine of the angle."""
    return np.stack(
        [
            matrix[..., 2, 1] - matrix[..., 1, 2],
            matrix[..., 0, 2] - matrix[..., 2, 0],
            matrix[..., 1, 0] - matrix[..., 0, 1],
        ],
        axis=-1,
    )
