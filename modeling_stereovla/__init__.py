"""StereoVLA for transformers. Importing this package registers its classes with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .configuration_stereo_encoder import StereoEncoderConfig
from .configuration_stereovla import StereoVLAConfig
from .modeling_stereovla import StereoVLAForActionPrediction, StereoVLAModel
from .stereo_encoder import StereoEncoderModel

AutoConfig.register(StereoEncoderConfig.model_type, StereoEncoderConfig)
AutoConfig.register(StereoVLAConfig.model_type, StereoVLAConfig)
AutoModel.register(StereoEncoderConfig, StereoEncoderModel)
AutoModel.register(StereoVLAConfig, StereoVLAForActionPrediction)
AutoModelForImageTextToText.register(StereoVLAConfig, StereoVLAForActionPrediction)

# saved folders carry the code and an auto_map, so that they load where this package is not installed
StereoEncoderConfig.register_for_auto_class()
StereoVLAConfig.register_for_auto_class()
StereoEncoderModel.register_for_auto_class("AutoModel")
StereoVLAForActionPrediction.register_for_auto_class("AutoModel")

__all__ = [
    "StereoEncoderConfig",
    "StereoEncoderModel",
    "StereoVLAConfig",
    "StereoVLAForActionPrediction",
    "StereoVLAModel",
]
