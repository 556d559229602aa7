"""Rotations against products of elementary ones, half angles, MuJoCo's own functions, and as inverse pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stereovla.processing.rotations import (
    matrix_to_quaternion,
    matrix_to_rotation_vector,
    matrix_to_rpy,
    rotation_angle,
    rotation_vector_to_matrix,
    rpy_to_matrix,
    wrap_angle,
)


def elementary(axis, angle):
    c, s = np.cos(angle), np.sin(angle)
    first, second = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = c
    matrix[first, second], matrix[second, first] = -s, s
    return matrix


def multiply(a, b):
    """Product of quaternions."""
    w, v = a[0] * b[0] - a[1:] @ b[1:], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.array([w, *v])


angles = st.floats(-3.1, 3.1, allow_nan=False)


@settings(max_examples=80)
@given(roll=angles, pitch=st.floats(-1.5, 1.5), yaw=angles, vector=st.tuples(*[st.floats(-2, 2)] * 3))
def test_rotations_agree(roll, pitch, yaw, vector):
    matrix = rpy_to_matrix([roll, pitch, yaw])
    np.testing.assert_allclose(matrix, elementary(2, yaw) @ elementary(1, pitch) @ elementary(0, roll), atol=1e-12)
    np.testing.assert_allclose(matrix_to_rpy(matrix), [roll, pitch, yaw], atol=1e-9)
    quaternion = matrix_to_quaternion(matrix)
    # Half angles give the quaternion without going through the matrix.
    half = [np.array([np.cos(a / 2), *np.sin(a / 2) * np.eye(3)[i]]) for i, a in ((2, yaw), (1, pitch), (0, roll))]
    product = multiply(multiply(half[0], half[1]), half[2])
    assert min(np.abs(product - quaternion).max(), np.abs(product + quaternion).max()) < 1e-9
    assert quaternion[np.flatnonzero(np.abs(quaternion) > 1e-9)[0]] > 0
    conjugate = quaternion * [1, -1, -1, -1]
    rotated = multiply(multiply(quaternion, np.array([0, *vector])), conjugate)[1:]
    np.testing.assert_allclose(matrix @ vector, rotated, atol=1e-9)
    around = matrix_to_rotation_vector(matrix)
    angle = np.linalg.norm(around)
    expected = [np.cos(angle / 2), *(np.sinc(angle / 2 / np.pi) / 2 * around)]  # sin(a / 2) / a = sinc(a / 2 pi) / 2
    np.testing.assert_allclose(np.abs(np.dot(expected, quaternion)), 1, atol=1e-12)
    assert angle <= np.pi + 1e-12
    np.testing.assert_allclose(rotation_angle(matrix), angle, atol=1e-9)
    np.testing.assert_allclose(rotation_vector_to_matrix(around), matrix, atol=1e-9)


@pytest.mark.parametrize("rpy", np.random.default_rng(0).uniform([-3.1, -1.5, -3.1], [3.1, 1.5, 3.1], (20, 3)))
def test_rotations_agree_with_mujoco(rpy):
    mujoco = pytest.importorskip("mujoco")
    quaternion, matrix, vector = np.zeros(4), np.zeros(9), np.zeros(3)
    mujoco.mju_euler2Quat(quaternion, rpy, "XYZ")  # capitals: fixed axes
    mujoco.mju_quat2Mat(matrix, quaternion)
    matrix = matrix.reshape(3, 3)
    quaternion *= np.sign(quaternion[0])
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    np.testing.assert_allclose(rpy_to_matrix(rpy), matrix, atol=1e-12)
    np.testing.assert_allclose(matrix_to_rpy(matrix), rpy, atol=1e-9)
    np.testing.assert_allclose(matrix_to_quaternion(matrix), quaternion, atol=1e-9)
    np.testing.assert_allclose(matrix_to_rotation_vector(matrix), vector, atol=1e-6)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_gimbal_lock_keeps_the_rotation(pitch):
    matrix = rpy_to_matrix([0.4, pitch, -0.9])
    rpy = matrix_to_rpy(matrix)
    assert rpy[0] == 0
    np.testing.assert_allclose(rpy_to_matrix(rpy), matrix, atol=1e-7)


@pytest.mark.parametrize("axis", [[1.0, 0, 0], [0, 0.6, -0.8], [0.48, 0.6, 0.64]])
@pytest.mark.parametrize("angle", [np.pi, np.pi - 1e-9, 1.0, 1e-9, 0.0])
def test_half_a_turn_and_hardly_any_have_their_vectors(axis, angle):
    vector = angle * np.array(axis)
    matrix = rotation_vector_to_matrix(vector)
    found = matrix_to_rotation_vector(matrix)
    assert min(np.abs(found - vector).max(), np.abs(found + vector).max() if angle > 3 else np.inf) < 1e-7
    np.testing.assert_allclose(rotation_vector_to_matrix(found), matrix, atol=1e-7)
    np.testing.assert_allclose(rotation_angle(matrix), angle, rtol=1e-6, atol=1e-12)


def test_rotations_are_batched():
    rpy = np.random.default_rng(0).uniform(-1, 1, (2, 5, 3))
    matrices = rpy_to_matrix(rpy)
    assert matrices.shape == (2, 5, 3, 3)
    np.testing.assert_allclose(matrix_to_rpy(matrices), rpy, atol=1e-9)
    for function in (matrix_to_quaternion, matrix_to_rotation_vector, rotation_angle):
        np.testing.assert_array_equal(function(matrices)[1, 3], function(rpy_to_matrix(rpy[1, 3])))


def test_half_turns_have_one_quaternion():
    for axis in range(3):
        np.testing.assert_allclose(matrix_to_quaternion(elementary(axis, np.pi)), [0, *np.eye(3)[axis]], atol=1e-9)


@given(angle=st.floats(-20, 20), turns=st.integers(-3, 3))
def test_wrap_angle(angle, turns):
    wrapped = wrap_angle(angle + 2 * np.pi * turns)
    assert -np.pi <= wrapped < np.pi
    np.testing.assert_allclose([np.cos(wrapped), np.sin(wrapped)], [np.cos(angle), np.sin(angle)], atol=1e-9)


@given(angle=st.floats(-20, 20))
def test_wrap_angle_of_half_turns(angle):
    wrapped = wrap_angle(angle, np.pi)
    assert -np.pi / 2 <= wrapped < np.pi / 2
    np.testing.assert_allclose(np.sin(2 * wrapped), np.sin(2 * angle), atol=1e-9)
