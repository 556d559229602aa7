"""The worlds in LeRobot are those of stereovla, and its own commands measure success in them."""

import json
import sys

import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv
from lerobot.configs import FeatureType
from lerobot.envs import make_env
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features, preprocess_observation
from lerobot_env_stereovla import StereoVLAEnv

from stereovla.simulation import Expert, World, WorldConfig

SMALL = {"preset": "easy", "world": {"image_size": 64}}


def worlds(count=1, use_async_envs=False, **fields):
    config = StereoVLAEnv(**{**SMALL, **fields})
    return config, make_env(config, n_envs=count, use_async_envs=use_async_envs)["stereovla"][0]


def begin(envs, seeds):
    return envs.reset(seed=seeds, options={NEW_ROLLOUT_OPTION: True})  # as lerobot-eval does


def test_observations_are_the_worlds():
    config, envs = worlds(2)
    seen = preprocess_observation(begin(envs, [5, 6])[0])
    world = World(WorldConfig.from_preset("easy", image_size=64))
    for row, seed in enumerate((5, 6)):
        world.reset(seed)
        views = world.observe()
        for view in ("left", "right"):
            picture = seen[f"observation.images.{view}"][row].permute(1, 2, 0)
            np.testing.assert_array_equal((picture * 255).round().numpy().astype(np.uint8), views[view])
        np.testing.assert_array_equal(seen["observation.state"][row].numpy(), world.state())
        assert envs.call("task_description")[row] == world.instruction
    features = env_to_policy_features(config)
    assert {key: (of.type, of.shape) for key, of in features.items()} == {
        "action": (FeatureType.ACTION, (7,)),
        "observation.state": (FeatureType.STATE, (7,)),
        "observation.images.left": (FeatureType.VISUAL, (3, 64, 64)),
        "observation.images.right": (FeatureType.VISUAL, (3, 64, 64)),
    }
    assert envs.unwrapped.metadata["render_fps"] == config.fps == 10
    envs.close()
    world.close()


def play(envs, seeds, acting):
    """Steps until all episodes have ended, world `acting` by the expert: (successes, steps)."""
    begin(envs, seeds)
    experts = [Expert(env.unwrapped.env.world) for env in envs.envs]
    done, succeeded = np.zeros(len(seeds), bool), np.zeros(len(seeds), bool)
    steps = 0
    while not done.all():
        plans = [
            experts[row].plan(1)[0][0] if acting[row] and not done[row] else np.zeros(7) for row in range(len(seeds))
        ]
        _, reward, terminated, truncated, info = envs.step(np.stack(plans).astype(np.float32))
        succeeded |= info["is_success"] & ~done
        assert (reward[~done] == info["is_success"][~done]).all()
        done |= terminated | truncated
        steps += 1
    return succeeded, steps


def test_success_is_what_physics_says():
    _, envs = worlds(2, task="pick", episode_length=50)
    succeeded, steps = play(envs, [0, 1], acting=(True, False))
    assert succeeded.tolist() == [True, False] and steps == 50  # the one that stands still is cut off
    again, _ = play(envs, [2, 3], acting=(True, True))  # a new rollout thaws a world whose episode had ended
    assert again.all()
    envs.close()


def test_worlds_in_processes_of_their_own_are_the_same():
    _, envs = worlds(2)
    _, apart = worlds(2, use_async_envs=True)
    assert isinstance(apart, AsyncVectorEnv)
    for (here, _), (there, _) in ((begin(envs, [1, 2]), begin(apart, [1, 2])),):
        np.testing.assert_array_equal(here["agent_pos"], there["agent_pos"])
        np.testing.assert_array_equal(here["pixels"]["left"], there["pixels"]["left"])
    apart.close()
    envs.close()


def test_another_robot_has_its_own_sizes():
    config, envs = worlds(world={"robot": "scara", "image_size": 64})
    observation, _ = begin(envs, [0])
    assert observation["agent_pos"].shape == (1, 5) and config.features["action"].shape == (5,)
    envs.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "fly"}, r"'fly'.*pick"),
        ({"preset": "hard"}, r"'hard'"),
        ({"world": {"baseline": 0.06}}, r"no option 'baseline'; did you mean 'baseline_m'"),
        ({"task": "pick", "world": {"tasks": ["pick"]}}, r"task and world's tasks say the same"),
        ({"episode_length": 0}, r"episode_length is 0; it must be at least 1"),
        ({"fps": 30}, r"fps is 30; the worlds run at 10 Hz"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StereoVLAEnv(**fields)


def test_lerobot_eval_runs(monkeypatch, tmp_path):
    """With the smallest of LeRobot's own policies, untrained."""
    from lerobot.scripts import lerobot_eval

    options = ["--policy.type=act", "--policy.device=cpu", "--policy.pretrained_backbone_weights=null"]
    options += ["--policy.dim_model=32", "--policy.dim_feedforward=32", "--policy.push_to_hub=false"]
    options += ["--env.type=stereovla", "--env.preset=easy", "--env.world={image_size: 64}", "--env.episode_length=4"]
    options += ["--eval.n_episodes=2", "--eval.batch_size=2", "--eval.use_async_envs=false"]
    monkeypatch.setattr(sys, "argv", ["lerobot-eval", *options, f"--output_dir={tmp_path}"])
    torch.manual_seed(0)
    lerobot_eval.main()
    found = json.loads((tmp_path / "eval_info.json").read_text())
    assert found["overall"]["n_episodes"] == 2 and found["overall"]["pc_success"] == 0.0
