"""The pipelines around a policy. The model's own processor, which is saved with the model, does all that is numeric."""

from dataclasses import dataclass, field
from typing import Any

import torch
from lerobot.configs import PipelineFeatureType, PolicyFeature
from lerobot.lerobot_types import PolicyAction
from lerobot.processor import (
    ObservationProcessorStep,
    PolicyProcessorPipeline,
    ProcessorStepRegistry,
    make_default_policy_processor_steps,
    make_policy_processor_pipelines,
)

from .configuration_stereovla import StereoVLAConfig

Pipelines = tuple[
    PolicyProcessorPipeline[dict[str, Any], dict[str, Any]], PolicyProcessorPipeline[PolicyAction, PolicyAction]
]


@ProcessorStepRegistry.register("stereovla_pictures")
@dataclass
class PicturesStep(ObservationProcessorStep):
    """Of each camera only the present picture, as uint8: a quarter of the bytes, and of a history its last.

    Args:
        keys: of the cameras.
    """

    keys: list[str] = field(default_factory=list)

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """float (B, 3, H, W) or (B, history, 3, H, W) in [0, 1], or uint8, under each key -> uint8 (B, 3, H, W)."""
        if absent := [key for key in self.keys if key not in observation]:
            raise ValueError(f"the observation has no {', '.join(absent)}; it has {', '.join(observation)}")
        return {**observation, **{key: _present(observation[key], key) for key in self.keys}}

    def get_config(self) -> dict[str, Any]:
        return {"keys": list(self.keys)}

    def transform_features(
        self, features: dict[PipelineFeatureType, dict[str, PolicyFeature]]
    ) -> dict[PipelineFeatureType, dict[str, PolicyFeature]]:
        return features


def _present(pictures: torch.Tensor, key: str) -> torch.Tensor:
    if pictures.ndim not in (4, 5) or pictures.shape[-3] != 3:
        raise ValueError(f"{key} has shape {tuple(pictures.shape)}; expected (batch, [history,] 3, height, width)")
    now = pictures[:, -1] if pictures.ndim == 5 else pictures
    if now.dtype == torch.uint8:
        return now
    if now.numel() and not (0 <= float(now.min()) and float(now.max()) <= 1):
        raise ValueError(f"{key} has values from {float(now.min()):g} to {float(now.max()):g}; expected 0 to 1")
    return (now * 255).round().to(torch.uint8)


def make_stereovla_pre_post_processors(
    config: StereoVLAConfig, dataset_stats: dict[str, dict[str, torch.Tensor]] | None = None
) -> Pipelines:
    """LeRobot's own steps, which normalise nothing, and the present pictures before they go to the device."""
    steps = make_default_policy_processor_steps(config, dataset_stats)
    pictures = PicturesStep(list(config.views.values()))
    return make_policy_processor_pipelines(
        input_steps=[steps.rename_observations, steps.add_batch_dim, pictures, steps.to_device, steps.normalize],
        output_steps=[steps.unnormalize, steps.to_cpu],
    )


make_depthvla_pre_post_processors = make_stereovla_pre_post_processors
