"""Turns of a tool about its own axis: taken out of the way to a keyframe, and keyframes that are written alike."""

import numpy as np
import pytest

from stereovla.processing.rotations import rpy_to_matrix, wrap_angle
from stereovla.processing.state_entries import POSES, differences, differences_and_turns, rotations_in, written_alike

RNG = np.random.default_rng(0)
POSE = rotations_in(POSES[7])


def about_z(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def rotation_of(vector: np.ndarray) -> np.ndarray:
    """Rodrigues' formula, apart from the code's quaternions."""
    angle = np.linalg.norm(vector)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def pose(rpy) -> np.ndarray:
    return np.array([0.4, 0.1, 0.2, *rpy, 1.0])


def turned(given: np.ndarray, angle: float) -> np.ndarray:
    """The pose (7,) turned on about the tool's own axis, its angles as they come."""
    matrix = rpy_to_matrix(given[3:6]) @ about_z(angle)
    rpy = [
        np.arctan2(matrix[2, 1], matrix[2, 2]),
        np.arcsin(np.clip(-matrix[2, 0], -1, 1)),
        np.arctan2(matrix[1, 0], matrix[0, 0]),
    ]
    return np.array([*given[:3], *rpy, given[6]])


def test_way_and_turn_make_the_rotation_again():
    for _ in range(50):
        state, target = pose(RNG.uniform(-1.4, 1.4, 3)), pose(RNG.uniform(-1.4, 1.4, 3))
        way, turns = differences_and_turns(target, state, POSE)
        assert turns.shape == (1,) and -np.pi <= turns[0] < np.pi
        again = rotation_of(way[3:6]) @ rpy_to_matrix(state[3:6]) @ about_z(turns[0])
        np.testing.assert_allclose(again, rpy_to_matrix(target[3:6]), atol=1e-9)
        # what is left only tilts: its axis is across the tool's
        assert abs(way[3:6] @ rpy_to_matrix(state[3:6])[:, 2]) < 1e-9
        np.testing.assert_allclose(way[[0, 1, 2, 6]], (target - state)[[0, 1, 2, 6]])


def test_a_target_that_is_turned_on_has_the_same_way():
    for tilt in (0.0, 0.3, np.pi):  # upright, tilted, and a flange that looks down
        state, target = pose([tilt, 0.1, -0.4]), pose([tilt, -0.1, 1.0])
        way, turns = differences_and_turns(target, state, POSE)
        for angle in (0.5, np.pi, -2.0):
            other, more = differences_and_turns(turned(target, angle), state, POSE)
            np.testing.assert_allclose(other, way, atol=1e-9)
            np.testing.assert_allclose(wrap_angle(more - turns - angle), 0, atol=1e-9)


def test_of_an_upright_tool_the_turn_is_that_of_the_yaw():
    state, target = pose([0, 0, 3.0]), pose([0, 0, -3.0])
    way, turns = differences_and_turns(target, state, POSE)
    assert turns[0] == pytest.approx(2 * np.pi - 6) and np.allclose(way[3:6], 0)
    assert differences(target, state, POSE)[5] == pytest.approx(2 * np.pi - 6)
    # a robot of five numbers, many at once, and two arms of which one only turns
    five, scara = rotations_in(POSES[5]), np.array([[0.1, 0.2, 0.3, 3.0, 1.0]] * 2)
    way, turns = differences_and_turns(scara * [1, 1, 1, -1, 1], scara, five)
    np.testing.assert_allclose(turns, [[2 * np.pi - 6]] * 2)
    assert not way.any()
    names = [f"left_{name}" for name in POSES[7]] + [f"right_{name}" for name in POSES[5]]
    both = np.concatenate([state, scara[0]])
    way, turns = differences_and_turns(
        np.concatenate([target, scara[0] + [0, 0, 0, 0.2, 0]]), both, rotations_in(names)
    )
    np.testing.assert_allclose(turns, [2 * np.pi - 6, 0.2])
    # joints have no turns
    assert differences_and_turns(np.ones(6), np.zeros(6), ())[1].shape == (0,)


def test_poses_that_hold_alike_are_written_alike():
    for tilt in (0.0, 0.3, 3.0):
        for yaw in np.linspace(-3.1, 3.1, 15):
            given = pose([tilt, 0.2, yaw])
            written, other = (written_alike(p, POSE, 2) for p in (given, turned(given, np.pi)))
            assert -np.pi / 2 <= written[5] < np.pi / 2
            np.testing.assert_allclose(rpy_to_matrix(written[3:6]), rpy_to_matrix(other[3:6]), atol=1e-9)
            # it is the pose, or half a turn from it
            rotations = [rpy_to_matrix(given[3:6]) @ about_z(angle) for angle in (0, np.pi)]
            assert min(np.abs(rpy_to_matrix(written[3:6]) - rotation).max() for rotation in rotations) < 1e-9
            np.testing.assert_array_equal(written[[0, 1, 2, 6]], given[[0, 1, 2, 6]])
    np.testing.assert_allclose(written_alike(pose([0, 0, 3.5]), POSE, 1)[5], 3.5 - 2 * np.pi)
    five = rotations_in(POSES[5])
    np.testing.assert_allclose(
        written_alike(np.array([[0, 0, 0, 2.0, 1], [0, 0, 0, 1, 1]]), five, 2)[:, 3], [2 - np.pi, 1]
    )
    assert np.array_equal(written_alike(np.full(6, 3.0), (), 2), np.full(6, 3.0))
