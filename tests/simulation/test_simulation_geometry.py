"""Rotations and projection against MuJoCo's own functions and by hand."""

import mujoco
import numpy as np
import pytest

from stereovla.simulation import geometry

RNG = np.random.default_rng(0)
ANGLES = RNG.uniform([-3.1, -1.5, -3.1], [3.1, 1.5, 3.1], (50, 3))


def mujoco_matrix(rpy: np.ndarray) -> np.ndarray:
    quaternion, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_euler2Quat(quaternion, rpy, "XYZ")  # capitals: fixed axes
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


@pytest.mark.parametrize("rpy", ANGLES)
def test_rotations_agree_with_mujoco(rpy):
    matrix = mujoco_matrix(rpy)
    np.testing.assert_allclose(geometry.rpy_to_matrix(rpy), matrix, atol=1e-12)
    np.testing.assert_allclose(geometry.matrix_to_rpy(matrix), rpy, atol=1e-9)
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, matrix.ravel())
    quaternion *= np.sign(quaternion[0])
    np.testing.assert_allclose(geometry.matrix_to_quaternion(matrix), quaternion, atol=1e-9)
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    np.testing.assert_allclose(geometry.rotation_vector(matrix), vector, atol=1e-6)


def test_rotation_vector_of_nothing_is_zero():
    np.testing.assert_array_equal(geometry.rotation_vector(np.eye(3)), np.zeros(3))


@pytest.mark.parametrize("angle", [-7.0, -1.6, 0.0, 0.4, 1.5, 9.0])
def test_wrapped_angle_is_equal_and_in_range(angle):
    wrapped = geometry.wrap_angle(angle, np.pi)
    assert -np.pi / 2 <= wrapped < np.pi / 2
    assert np.sin(2 * wrapped) == pytest.approx(np.sin(2 * angle), abs=1e-12)


def test_camera_looks_forward_and_is_level():
    rotation = geometry.camera_rotation(np.array([-1.0, 0.5, -1.0]))
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation[:, 2], np.array([-1.0, 0.5, -1.0]) / 1.5, atol=1e-12)
    assert rotation[2, 0] == pytest.approx(0.0)  # its x axis is horizontal
    assert rotation[2, 1] < 0  # its y axis points down


def test_projection_by_hand():
    pose = np.eye(4)
    pose[:3, 3] = [1.0, 2.0, 3.0]
    pixels = geometry.project(
        np.array([[1.2, 1.9, 5.0], [1.0, 2.0, 1.0]]), pose, np.array([100.0, 110.0]), np.array([64.0, 48.0])
    )
    np.testing.assert_allclose(pixels[0], [64 + 100 * 0.2 / 2, 48 - 110 * 0.1 / 2])
    assert np.isnan(pixels[1]).all()  # behind the camera
