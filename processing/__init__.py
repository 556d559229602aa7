"""Stereo pairs, instructions and robot states in, model inputs out; model outputs back to robot units."""

from .image_processing_stereovla import StereoImageProcessorPil
from .processing_stereovla import StereoProcessor
from .text_tokenizer import build_tokenizer

# Makes save_pretrained write auto_map and copy the code. This file itself is not part of a saved folder.
StereoImageProcessorPil.register_for_auto_class("AutoImageProcessor")
StereoProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["StereoImageProcessorPil", "StereoProcessor", "build_tokenizer"]
