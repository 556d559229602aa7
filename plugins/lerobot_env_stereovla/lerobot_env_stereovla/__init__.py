"""StereoVLA's worlds for LeRobot: `--env.type=stereovla`."""

from .configuration_env import StereoVLAEnv

__all__ = ["StereoVLAEnv"]
