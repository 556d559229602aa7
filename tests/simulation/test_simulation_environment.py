"""The Gymnasium environment."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from stereovla import simulation
from stereovla.simulation import Expert
from stereovla.simulation.environment import TabletopEnv


@pytest.fixture
def environment():
    environment = gymnasium.make("StereoVLA/Tabletop-v0", preset="easy", image_size=64, render_mode="rgb_array")
    yield environment
    environment.close()


@pytest.mark.parametrize(
    "robot, task, size", [("panda", "pick", 7), ("panda", "stack", 7), ("panda", "move", 7), ("scara", "move", 5)]
)
def test_passes_gymnasiums_checker(robot, task, size):
    made = gymnasium.make("StereoVLA/Tabletop-v0", robot=robot, tasks=task, image_size=32)
    assert made.action_space.shape == made.observation_space["state"].shape == (size,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(made.unwrapped)
    made.close()


def test_expert_solves_it_through_the_interface(environment):
    observation, info = environment.reset(seed=3)
    assert environment.observation_space.contains(observation)
    assert observation["instruction"] == f"pick up the {info['target']}"
    expert, rewards, terminated = Expert(environment.unwrapped.world), [], False
    while not terminated:
        observation, reward, terminated, truncated, info = environment.step(expert.plan(1)[0][0])
        rewards.append(reward)
        assert not truncated
    assert info["success"] and sum(rewards) == 1.0 and info["progress"] == 1.0
    assert environment.render().shape == (64, 64, 3)


def test_seed_is_the_worlds_seed(environment):
    world = simulation.World(simulation.WorldConfig.from_preset("easy", image_size=64))
    observation, _ = environment.reset(seed=9)
    world.reset(9)
    np.testing.assert_array_equal(observation["left"], world.observe()["left"])
    drawn, _ = environment.reset()
    environment.reset(seed=9)
    again, _ = environment.reset()
    np.testing.assert_array_equal(drawn["left"], again["left"])
    world.close()


def test_time_limit_truncates(environment):
    environment.reset(seed=0)
    for step in range(120):
        *_, terminated, truncated, _ = environment.step(np.zeros(7, np.float32))
        assert not terminated and truncated == (step == 119)


def test_errors():
    with pytest.raises(ValueError, match="did you mean 'large'"):
        gymnasium.make("StereoVLA/Tabletop-v0", camera_range="larg")
    with pytest.raises(ValueError, match="render_mode"):
        TabletopEnv(render_mode="human")
    with pytest.raises(ValueError, match="unknown reset options"):
        TabletopEnv().reset(options={"speed": 1})
