"""The arm: conventions of the tool frame, inverse kinematics, tracking, gripper."""

import mujoco
import numpy as np
import pytest

from stereovla.processing.rotations import matrix_to_rotation_vector, rpy_to_matrix
from stereovla.simulation import World, WorldConfig


@pytest.fixture
def world():
    world = World(WorldConfig.from_preset("easy", image_size=32, num_objects=1))
    world.reset(3)
    return world


def act(*values: float) -> np.ndarray:
    return np.array([*values, *[0.0] * (6 - len(values)), 1.0])


def test_zero_rotation_points_down_with_fingers_along_y(world):
    for _ in range(3):
        world.step(np.array([0, 0, 0, *-world.state()[3:6], 1.0]))
    data, model = world.data, world.model
    assert np.abs(world.state()[3:6]).max() < 2e-3
    left, right = (data.geom_xpos[model.geom(name).id] for name in ("left_pad", "right_pad"))
    apart = left - right
    assert abs(apart[1]) > 0.08 and np.abs(apart[[0, 2]]).max() < 1e-3
    np.testing.assert_allclose((left + right) / 2, world.robot.tool_pose()[0], atol=1e-3)
    hand_to_tool = world.robot.tool_pose()[0] - data.xpos[model.body("hand").id]
    np.testing.assert_allclose(hand_to_tool, [0, 0, -0.1034], atol=1e-3)


def test_inverse_kinematics_reaches_random_poses(world):
    robot, rng = world.robot, np.random.default_rng(0)
    position, rotation = robot.tool_pose()
    start = world.data.qpos[robot.qpos].copy()
    check = mujoco.MjData(world.model)
    for _ in range(30):
        goal = position + rng.uniform(-0.08, 0.08, 3)
        turned = rpy_to_matrix(rng.uniform(-0.4, 0.4, 3)) @ rotation
        check.qpos[robot.qpos] = robot.solve(goal, turned, start)
        mujoco.mj_kinematics(world.model, check)
        assert np.linalg.norm(check.site_xpos[robot.tool] - goal) < 1e-4
        assert np.linalg.norm(matrix_to_rotation_vector(turned @ check.site_xmat[robot.tool].reshape(3, 3).T)) < 1e-3


def test_delta_is_reached_within_its_step(world):
    rng = np.random.default_rng(1)
    world.step(act(0, 0, 0.05))  # away from the objects
    for _ in range(20):
        before, rotation = world.robot.tool_pose()
        move = rng.uniform(-1, 1, 3)
        move *= 0.025 / np.linalg.norm(move)
        turn = rng.uniform(-0.1, 0.1, 3)
        world.step(np.array([*move, *turn, 1.0]))
        after, turned = world.robot.tool_pose()
        assert np.linalg.norm(after - before - move) < 1e-3
        assert np.linalg.norm(matrix_to_rotation_vector(rpy_to_matrix(turn) @ rotation @ turned.T)) < 0.02


def test_holding_still_does_not_drift(world):
    before = world.robot.tool_pose()[0]
    for _ in range(20):
        world.step(act())
    assert np.linalg.norm(world.robot.tool_pose()[0] - before) < 3e-4


def test_gripper_closes_keeps_and_opens(world):
    world.step(act(0, 0, 0.05))
    assert world.state()[6] > 0.99
    for _ in range(6):
        world.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))
    assert world.state()[6] < 0.02
    world.step(np.zeros(7))  # between -0.5 and 0.5 the last command stays
    assert world.state()[6] < 0.02
    for _ in range(8):
        world.step(act())
    assert world.state()[6] > 0.98


def test_long_commands_are_shortened_and_counted(world):
    world.step(act(0, 0, 0.05))
    before = world.robot.tool_pose()[0]
    assert world.robot.shortened == 0
    world.step(act(0, 0, 0.5))
    assert world.robot.shortened == 1
    assert np.linalg.norm(world.robot.tool_pose()[0] - before) < 0.09
    world.reset(3)
    assert world.robot.shortened == 0


def test_start_out_of_reach_is_an_error():
    with pytest.raises(ValueError, match="out of reach"):
        World(WorldConfig.from_preset("easy", start_x=0.7, start_y=0.5, start_height_m=0.6)).reset(0)


def test_diverged_physics_is_an_error(world):
    world.data.qvel[:] = 1e12
    with pytest.raises(RuntimeError, match="diverged"):
        world.step(act())
