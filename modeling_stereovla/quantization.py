"""Weights in 8 and 4 bit: which parts transformers' quantisers leave whole, and what dtype quantised layers take."""

import torch
from torch import nn

# All but the blocks of the two transformers, which hold most weights outside of vision. The stereo encoder reads its
# linear layers' weights itself, and what knows a robot's numbers is small.
WHOLE = (
    "model.visual_tokens",
    "lm_head",
    "pointers",
    *(f"action_expert.{name}" for name in ("state_proj", "action_in_proj", "action_out_proj")),
    *(f"action_expert.{name}" for name in ("action_time_mlp_in", "action_time_mlp_out")),
)


def input_dtype(layer: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What a linear layer takes: its weight's dtype, but `otherwise` where that is quantised to integers."""
    dtype = layer.weight.dtype
    return dtype if dtype.is_floating_point else otherwise
