"""The world as a Gymnasium environment:
`gymnasium.make("simulation.environment:StereoVLA/Tabletop-v0", preset="geometry", tasks="stack")`.
"""

import string
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from stereovla.simulation.config import WorldConfig
from stereovla.simulation.robot import CONTROL_HZ
from stereovla.simulation.robots import ROBOTS
from stereovla.simulation.world import World

ENVIRONMENT_ID = "StereoVLA/Tabletop-v0"
MAX_STEPS = 120  # 12 s; the expert needs 45 at most
STATE_LIMIT = np.array([1.5, 1.5, 1.5, np.pi, np.pi, np.pi, 1.0], np.float32)  # the longest arm reaches 0.86 m


class TabletopEnv(gymnasium.Env):
    """Pick up, stack or move the named object.

    Observation: left, right uint8 (H, W, 3); state float32 (n,) and calibration as in World; instruction, text.
    Action float32 (n,): see World.step, bounded by the longest step of the robot. Reward: 1.0 on the step that
    succeeds, else 0.0; the episode terminates there. info: success, progress, target, destination ("" when there is
    none). `reset(seed=n)` gives the world of seed n; without a seed the next world is drawn from the environment's own
    generator.

    Keyword arguments are `preset` and the fields of WorldConfig.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}

    def __init__(self, render_mode: str | None = None, **config: Any):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode {render_mode!r} is not one of None, 'rgb_array'")
        self.render_mode = render_mode
        self.world = World(WorldConfig.from_preset(**config))
        config = self.world.config
        image = spaces.Box(0, 255, (config.height, config.width, 3), np.uint8)
        robot = ROBOTS[config.robot]
        low = np.concatenate([-STATE_LIMIT[:6], [0.0]]).astype(np.float32)
        self.observation_space = spaces.Dict(
            {
                "left": image,
                "right": image,
                "state": spaces.Box(robot.from_pose(low), robot.from_pose(STATE_LIMIT)),
                "instruction": spaces.Text(max_length=64, charset=string.ascii_lowercase + " "),
                "calibration": spaces.Dict(
                    {
                        "focal_length_px": spaces.Box(0.0, 1e4, (2,)),
                        "principal_point_px": spaces.Box(0.0, 1e4, (2,)),
                        "baseline_m": spaces.Box(0.0, 0.5, ()),
                        "transform_camera_to_base": spaces.Box(-10.0, 10.0, (4, 4)),
                    }
                ),
            }
        )
        limit = robot.from_pose(np.array([robot.max_step_m] * 3 + [robot.max_step_rad] * 3 + [1.0], np.float32))
        self.action_space = spaces.Box(-limit, limit)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """A new episode; see the class for what the seed means. No options are known."""
        super().reset(seed=seed)
        if options:
            raise ValueError(f"unknown reset options {sorted(options)}: there are none")
        self.world.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self._observation(), self._info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """0.1 s; (observation, reward, terminated, truncated, info). Truncation is left to the TimeLimit wrapper."""
        self.world.step(action)
        success = self.world.success
        return self._observation(), float(success), success, False, self._info()

    def render(self) -> np.ndarray | None:
        """uint8 (H, W, 3): the left picture, when render_mode is "rgb_array"."""
        return self.world.observe()["left"] if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Frees the renderer."""
        self.world.close()

    def _observation(self) -> dict:
        pictures = self.world.observe()
        calibration = {name: np.asarray(value) for name, value in pictures["calibration"].items()}
        return {
            "left": pictures["left"],
            "right": pictures["right"],
            "state": self.world.state(),
            "instruction": self.world.instruction,
            "calibration": calibration,
        }

    def _info(self) -> dict:
        return {
            "success": self.world.success,
            "progress": self.world.progress,
            "target": self.world.target_name,
            "destination": self.world.destination_name or "",
        }


gymnasium.register(id=ENVIRONMENT_ID, entry_point=TabletopEnv, max_episode_steps=MAX_STEPS)
