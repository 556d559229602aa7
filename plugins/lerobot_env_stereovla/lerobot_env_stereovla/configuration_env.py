"""What LeRobot is told of the worlds, `--env.NAME=...`."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig
from lerobot.envs.utils import freeze_after_episode_end
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

VIEWS = ("left", "right")


@EnvConfig.register_subclass("stereovla")
@dataclass
class StereoVLAEnv(EnvConfig):
    """Worlds of `stereovla.simulation`: pick up, stack or move the named object. The world of seed n is that of
    `stereovla evaluate rollout` with seed n.

    Args:
        task: those that episodes ask for, separated by commas: pick, stack, move; None = the preset's.
        preset: of the world.
        world: further options of the world, such as '{robot: scara, image_size: 96}'.
        episode_length: steps of 0.1 s after which an episode has failed.
    """

    task: str | None = None
    fps: int = 10
    preset: str = "default"
    world: dict[str, Any] = field(default_factory=dict)
    episode_length: int = 60
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            ACTION: ACTION,
            "agent_pos": OBS_STATE,
            **{f"pixels/{view}": f"{OBS_IMAGES}.{view}" for view in VIEWS},
        }
    )

    def __post_init__(self):
        from stereovla.simulation import WorldConfig
        from stereovla.simulation.robot import CONTROL_HZ
        from stereovla.simulation.robots import ROBOTS

        config = WorldConfig.from_preset(**self.world_options())
        if self.fps != CONTROL_HZ:
            raise ValueError(f"fps is {self.fps}; the worlds run at {CONTROL_HZ} Hz")
        if self.episode_length < 1:
            raise ValueError(f"episode_length is {self.episode_length}; it must be at least 1")
        size = (len(ROBOTS[config.robot].axes),)
        picture = PolicyFeature(type=FeatureType.VISUAL, shape=(config.height, config.width, 3))
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=size),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=size),
            **{f"pixels/{view}": picture for view in VIEWS},
        }

    def world_options(self) -> dict[str, Any]:
        """Arguments of `WorldConfig.from_preset`."""
        options = dict(self.world)
        if self.task is not None:
            if "tasks" in options:
                raise ValueError("task and world's tasks say the same; give one of them")
            options["tasks"] = self.task.split(",")
        return {"preset": self.preset, **options}

    @property
    def gym_kwargs(self) -> dict:
        return {"options": self.world_options(), "episode_length": self.episode_length}

    def create_envs(
        self, n_envs: int, use_async_envs: bool = False
    ) -> dict[str, dict[int, gymnasium.vector.VectorEnv]]:
        """{"stereovla": {0: n_envs worlds}}, in processes of their own with `use_async_envs`. A world whose episode has
        ended stands still until the next rollout.
        """
        from .environment import Tabletop

        if n_envs < 1:
            raise ValueError(f"n_envs is {n_envs}; it must be at least 1")
        make = [freeze_after_episode_end(partial(Tabletop, **self.gym_kwargs)) for _ in range(n_envs)]
        mode = gymnasium.vector.AutoresetMode.NEXT_STEP
        if use_async_envs and n_envs > 1:
            envs = gymnasium.vector.AsyncVectorEnv(make, autoreset_mode=mode, context="forkserver")
        else:
            envs = gymnasium.vector.SyncVectorEnv(make, autoreset_mode=mode)
        return {self.type: {0: envs}}
