"""StereoVLA and DepthVLA for LeRobot: `--policy.type=stereovla` and `--policy.type=depthvla`."""

from .configuration_stereovla import DepthVLAConfig, StereoVLAConfig
from .processor_stereovla import PicturesStep

__all__ = ["DepthVLAConfig", "PicturesStep", "StereoVLAConfig"]
