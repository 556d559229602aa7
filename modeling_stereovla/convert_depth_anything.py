"""Depth Anything V2's published weights -> the encoder of a DepthVLA's depth expert.

DepthAnythingForDepthEstimation (https://huggingface.co/depth-anything/Depth-Anything-V2-Large-hf, for non-commercial
use; the small one is free) is a DINOv2 and a convolutional head. The depth expert has a decoder of its own, so neck and
head are left out. A plain DINOv2 is taken too.
"""

from pathlib import Path

import torch
from transformers import DepthAnythingConfig, Dinov2Config

from .configuration_policy import own_fields
from .convert_files import Part, open_weights, read_description
from .saved_names import present_name

# what a backbone is told beside its sizes: which of its layers a head reads, and how
BACKBONE_FIELDS = ("out_features", "out_indices", "stage_names", "reshape_hidden_states", "apply_layernorm")


def convert_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Dinov2Model's keys for one of DepthAnythingForDepthEstimation's; {} for those of its neck and head.

    Raises:
        KeyError: the key is not Depth Anything's.
    """
    part, _, name = key.partition(".")
    if part not in ("backbone", "neck", "head"):
        raise KeyError(key)
    return {present_name(name): tensor} if part == "backbone" else {}


def open_depth_encoder(path: str | Path) -> tuple[dict, Part]:
    """Config fields, `model_type` included, and weights of the DINOv2 in a folder of Depth Anything or of its own.

    Raises:
        ValueError: it is another model.
    """
    kind = read_description(path).get("model_type")
    if kind == DepthAnythingConfig.model_type:
        config, rule = DepthAnythingConfig.from_pretrained(path).backbone_config, convert_key
    elif kind == Dinov2Config.model_type:
        config, rule = Dinov2Config.from_pretrained(path), lambda key, tensor: {present_name(key): tensor}
    else:
        raise ValueError(f"{path} is a {kind!r}; valid depth encoders: depth_anything, dinov2")
    fields = {name: value for name, value in own_fields(config).items() if name not in BACKBONE_FIELDS}
    return fields, Part(open_weights(path), rule)
