"""StereoVLA for transformers. Importing this package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .configuration_depthvla import DepthExpertConfig, DepthVLAConfig
from .configuration_pi0 import PI0PolicyConfig
from .configuration_stereo_encoder import StereoEncoderConfig
from .configuration_stereovla import StereoVLAConfig
from .depth_expert import DepthExpertModel
from .modeling_depthvla import DepthVLAForActionPrediction, DepthVLAModel
from .modeling_pi0 import PI0Policy
from .modeling_stereovla import StereoVLAForActionPrediction, StereoVLAModel
from .stereo_encoder import StereoEncoderModel

for config, model in (
    (DepthExpertConfig, DepthExpertModel),
    (DepthVLAConfig, DepthVLAForActionPrediction),
    (PI0PolicyConfig, PI0Policy),
    (StereoEncoderConfig, StereoEncoderModel),
    (StereoVLAConfig, StereoVLAForActionPrediction),
):
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, model)
    # saved folders carry the code and an auto_map, so that they load where this package is not installed
    config.register_for_auto_class()
    model.register_for_auto_class("AutoModel")
AutoModelForImageTextToText.register(DepthVLAConfig, DepthVLAForActionPrediction)
AutoModelForImageTextToText.register(StereoVLAConfig, StereoVLAForActionPrediction)

__all__ = [
    "DepthExpertConfig",
    "DepthExpertModel",
    "DepthVLAConfig",
    "DepthVLAForActionPrediction",
    "DepthVLAModel",
    "PI0Policy",
    "PI0PolicyConfig",
    "StereoEncoderConfig",
    "StereoEncoderModel",
    "StereoVLAConfig",
    "StereoVLAForActionPrediction",
    "StereoVLAModel",
]
