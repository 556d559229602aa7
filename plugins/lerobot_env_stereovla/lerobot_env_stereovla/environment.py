"""One world as LeRobot's rollouts take it."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from lerobot.envs.utils import NEW_ROLLOUT_OPTION

from stereovla.simulation.environment import TabletopEnv

from .configuration_env import VIEWS


class Tabletop(gymnasium.Env):
    """`TabletopEnv` under LeRobot's names.

    Observation: pixels {left, right}, uint8 (H, W, 3); agent_pos float32 (n,), the robot's state. Action float32 (n,).
    Reward 1.0 on the step that succeeds, where the episode terminates; it is truncated after `episode_length` steps.
    info: is_success, progress. `task_description` is the instruction of the episode.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": TabletopEnv.metadata["render_fps"]}
    render_mode = "rgb_array"

    def __init__(self, options: dict[str, Any], episode_length: int):
        """`options` of the world, see `TabletopEnv`."""
        self.env = TabletopEnv(**options)
        self.task = ",".join(self.env.world.config.tasks)
        self._max_episode_steps = episode_length
        known = self.env.observation_space
        self.observation_space = spaces.Dict(
            {"pixels": spaces.Dict({view: known[view] for view in VIEWS}), "agent_pos": known["state"]}
        )
        self.action_space = self.env.action_space

    @property
    def task_description(self) -> str:
        return self.env.world.instruction

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """The world of `seed`, or the next of the environment's own."""
        unknown = {name: value for name, value in (options or {}).items() if name != NEW_ROLLOUT_OPTION}
        observation, info = self.env.reset(seed=seed, options=unknown)
        self._steps = 0
        return self._seen(observation), self._told(info)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        observation, reward, terminated, _, info = self.env.step(action)
        self._steps += 1
        truncated = not terminated and self._steps >= self._max_episode_steps
        return self._seen(observation), reward, terminated, truncated, self._told(info)

    def render(self) -> np.ndarray:
        """uint8 (H, W, 3): the left picture, which was drawn with the last observation."""
        return self._left

    def close(self) -> None:
        self.env.close()

    def _seen(self, observation: dict[str, Any]) -> dict[str, Any]:
        self._left = observation["left"]
        return {"pixels": {view: observation[view] for view in VIEWS}, "agent_pos": observation["state"]}

    def _told(self, info: dict[str, Any]) -> dict[str, Any]:
        return {"is_success": bool(info["success"]), "progress": float(info["progress"])}
