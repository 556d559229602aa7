"""Actions as ways: targets and back, what lies between them, limits, against matrices and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stereovla.processing.rotations import matrix_to_rotation_vector, rpy_to_matrix
from stereovla.serving.limits import PoseLimits, VectorLimits
from stereovla.serving.motion import AXES, PoseMotion, VectorMotion

STATE = np.array([0.4, -0.1, 0.2, 0.3, -0.2, 1.5, 1.0])
ACTIONS = np.random.default_rng(0).normal(size=(6, 7)) * [0.02, 0.02, 0.02, 0.2, 0.2, 0.2, 1.0]


def test_targets_of_poses_are_products_of_matrices():
    targets = PoseMotion().targets(STATE, ACTIONS)
    position, rotation = STATE[:3], rpy_to_matrix(STATE[3:6])
    for action, target in zip(ACTIONS, targets, strict=True):
        position, rotation = position + action[:3], rpy_to_matrix(action[3:6]) @ rotation
        np.testing.assert_allclose(target[:3], position, atol=1e-12)
        np.testing.assert_allclose(rpy_to_matrix(target[3:6]), rotation, atol=1e-12)
        assert target[6] == action[6]


@pytest.mark.parametrize(
    ("motion", "size"),
    [
        (PoseMotion(), 7),
        (PoseMotion(("x", "y", "z", "yaw", "gripper")), 5),
        (VectorMotion(7), 7),
        (VectorMotion(7, absolute=False, gripper=3), 7),
    ],
)
def test_actions_and_targets_invert_each_other(motion, size):
    targets = motion.targets(STATE[:size], ACTIONS[:, :size])
    np.testing.assert_allclose(motion.actions(STATE[:size], targets), ACTIONS[:, :size], atol=1e-12)


def test_between_is_straight_and_turns_about_one_axis():
    motion, start = PoseMotion(), np.concatenate([STATE[:6], [1.0]])
    end = motion.targets(STATE, ACTIONS[:1])[0]
    quarter, half = motion.between(start, end, 0.25), motion.between(start, end, 0.5)
    np.testing.assert_allclose(half[:3], (start[:3] + end[:3]) / 2, atol=1e-12)
    np.testing.assert_allclose(motion.between(start, half, 0.5)[:6], quarter[:6], atol=1e-12)
    turn = rpy_to_matrix(half[3:6]) @ rpy_to_matrix(start[3:6]).T
    np.testing.assert_allclose(turn @ turn, rpy_to_matrix(ACTIONS[0, 3:6]), atol=1e-12)
    assert half[6] == end[6] and start[6] != end[6]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    st.floats(0.01, 1.0),
    st.floats(0.05, 3.0),
    st.floats(0.01, 0.2),
)
def test_no_pose_is_commanded_faster_or_outside(way, speed_m_s, speed_rad_s, seconds):
    low, high = [0.2, -0.3, 0.0], [0.6, 0.3, 0.5]
    motion = PoseMotion(limits=PoseLimits(speed_m_s, speed_rad_s, workspace_m=(low, high)))
    start = np.array([0.4, 0.0, 0.2, *way[3:], 1.0])
    end = np.array([0.4 + way[0], way[1], 0.2 + way[2], *(-np.array(way[3:])), -1.0])
    target, share, changes = motion.bounded(start, end, seconds)
    assert np.linalg.norm(target[:3] - start[:3]) <= speed_m_s * seconds + 1e-8
    turn = matrix_to_rotation_vector(rpy_to_matrix(target[3:6]) @ rpy_to_matrix(start[3:6]).T)
    assert np.linalg.norm(turn) <= speed_rad_s * seconds + 1e-7
    assert (target[:3] >= np.array(low) - 1e-12).all() and (target[:3] <= np.array(high) + 1e-12).all()
    changed = not np.allclose(target, end, atol=1e-12)
    assert changed == bool(changes) and (share < 1) == any(change.startswith("speed") for change in changes)


def test_limits_say_what_they_changed():
    motion = PoseMotion(limits=PoseLimits(0.5, 1.0, 0.05, 0.3, ([0, -1, 0.1], [1, 1, 1])))
    start = np.array([0.5, 0, 0.15, 0, 0, 0, 1.0])
    target, share, changes = motion.bounded(start, np.array([0.5, 0, 0.05, 0, 0, 0.4, 1.0]), 0.2)
    # 0.4 rad in 0.2 s are 2 rad/s, twice what is allowed; the way down ends at 0.1 m
    np.testing.assert_allclose(target, [0.5, 0, 0.125, 0, 0, 0.2, 1.0], atol=1e-12)
    assert share == pytest.approx(0.5) and [change.partition(":")[0] for change in changes] == ["workspace", "speed"]
    assert "at most 1 rad/s" in changes[1]
    steps = motion.targets(start, np.array([[0.04, 0, 0, 0, 0, 0, 1], [0.04, 0.04, 0, 0, 0, 0, 1]]))
    assert motion.refusal(start, steps[:1]) == ""
    assert motion.refusal(start, steps) == "action 1 moves the tool by 0.057 m, at most 0.05 m are taken"
    turned = motion.targets(start, np.array([[0, 0, 0, 0, 0, 0.31, 1.0]]))
    assert "0.310 rad, at most 0.3 rad" in motion.refusal(start, turned)


def test_limits_of_own_numbers():
    motion = VectorMotion(3, gripper=2, limits=VectorLimits(speed=[1, 2, 9], step=0.5, low=-1, high=1))
    start = np.array([0.0, 0.0, 1.0])
    target, share, changes = motion.bounded(start, np.array([0.4, 0.4, 0.0]), 0.2)
    np.testing.assert_allclose(target, [0.2, 0.2, 0.0])
    assert share == 0.5 and "number 0 changes by 2 per s" in changes[0]
    target, share, changes = motion.bounded(start, np.array([-1.2, 0.0, 0.0]), 10.0)
    np.testing.assert_allclose(target, [-1.0, 0.0, 0.0])
    assert share == 1 and changes[0].startswith("workspace: number 0 is -1.2")
    assert motion.refusal(start, np.array([[0.4, 0, 0], [0.95, 0, 1]])).startswith("action 1 moves number 0 by 0.55")
    assert motion.refusal(start, np.array([[0.4, 0, -9]])) == ""  # a gripper has no way


def test_what_cannot_be_is_refused_in_words():
    with pytest.raises(ValueError, match="the state is a, b; a pose of the tool is x, y, z, roll"):
        PoseMotion(("a", "b"))
    with pytest.raises(ValueError, match="speed_m_s is 0; it must be above 0"):
        PoseLimits(speed_m_s=0)
    with pytest.raises(ValueError, match="workspace_m is .*lowest first"):
        PoseLimits(workspace_m=([1, 0, 0], [0, 1, 1]))
    with pytest.raises(ValueError, match="low must not be above high"):
        VectorLimits(low=1, high=0)
    with pytest.raises(ValueError, match="gripper is number 7 of an action; valid: 0 ... 6"):
        VectorMotion(7, gripper=7)
    with pytest.raises(ValueError, match="speed has 2 numbers, an action 4"):
        VectorMotion(4, limits=VectorLimits(speed=[1, 2]))
    with pytest.raises(ValueError, match="the state has 2 numbers, an action 3"):
        VectorMotion(3, absolute=False).targets(np.zeros(2), np.zeros((1, 3)))
    assert AXES[-1] == "gripper"
