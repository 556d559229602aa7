"""Weights in 8 and 4 bit: which parts transformers' quantisers leave whole, and what dtype quantised layers take."""

import torch
from torch import nn

# All but the blocks of the transformers that share attention, which hold most weights outside of vision. The stereo
# encoder reads its linear layers' weights itself, and what knows a robot's numbers, or writes depth, is small.
WHOLE = (
    "model.visual_tokens",
    *(f"model.vlm.{name}" for name in ("vision_tower", "multi_modal_projector")),
    *(f"model.depth_expert.{name}" for name in ("encoder", "stereo", "norm", "projector", "head")),
    "model.depth_reading",
    "lm_head",
    "pointers",
    *(f"action_expert.{name}" for name in ("state_proj", "action_in_proj", "action_out_proj")),
    *(f"action_expert.{name}" for name in ("action_time_mlp_in", "action_time_mlp_out")),
)


def input_dtype(layer: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What a linear layer takes: its weight's dtype, but `otherwise` where that is quantised to integers."""
    dtype = layer.weight.dtype
    return dtype if dtype.is_floating_point else otherwise
