"""Rotations, with numpy alone: roll, pitch, yaw about fixed x, y, z (R = Rz Ry Rx), matrices, and rotation vectors."""

import numpy as np


def rpy_to_matrix(rpy: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw (3,) rad -> (3, 3)."""
    (sr, sp, sy), (cr, cp, cy) = np.sin(rpy), np.cos(rpy)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def matrix_to_rpy(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) -> roll, pitch, yaw (3,) rad with pitch in [-pi/2, pi/2]; at |pitch| = pi/2 the roll is 0."""
    level = np.hypot(matrix[0, 0], matrix[1, 0])
    pitch = np.arctan2(-matrix[2, 0], level)
    if level < 1e-9:
        return np.array([0.0, pitch, np.arctan2(-matrix[0, 1], matrix[1, 1])])
    return np.array([np.arctan2(matrix[2, 1], matrix[2, 2]), pitch, np.arctan2(matrix[1, 0], matrix[0, 0])])


def vector_to_matrix(vector: np.ndarray) -> np.ndarray:
    """Rotation vector (3,), axis times angle in rad -> (3, 3), by Rodrigues' formula."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def matrix_to_vector(matrix: np.ndarray) -> np.ndarray:
    """(3, 3) -> rotation vector (3,), of length 0 to pi."""
    skew = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]]) / 2
    sine, cosine = float(np.linalg.norm(skew)), (np.trace(matrix) - 1) / 2
    angle = float(np.arctan2(sine, cosine))
    if sine > 1e-6:
        return skew * (angle / sine)
    if cosine > 0:
        return skew
    # half a turn: R + 1 = 2 axis axis^T, whose longest column is the axis but for its length
    column = (matrix + np.eye(3))[:, np.argmax(np.diag(matrix))]
    return angle * column / np.linalg.norm(column)
