"""What a policy's geometry is seen from, and others in its place: the controls beside every result of stereo or depth.

Geometry is what the policy has beside the left view and the words: a stereo encoder, a depth expert, the right view as
a picture, a depth that it is shown. A policy that makes use of it gets worse where it is shown

- "null": grey pictures, or a depth of which nothing is known;
- "left_twice": the left view in the place of the right one, so that nothing has a disparity;
- "swapped": another scene.

The language model sees the left view of this moment each time. No weight changes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

GREY = 0.5
DEPTHS = ("depth_map", "disparity")  # inputs of a policy that is shown depth


def right_picture(config: Any) -> int | None:
    """Place in pixel_values of a right view that the policy sees as a picture; None = it does not."""
    if getattr(config, "right_view", None) is not None:  # absent from the code of older checkpoints
        return 1
    views = list(getattr(config, "views", ()))
    return views.index("right") if "right" in views else None


def controls(config: Any) -> tuple[str, ...]:
    """Names of `policies.SHOWN` beside "given" that change what the geometry of a policy of this config sees; none
    where it has no geometry.
    """
    has_expert, compares = getattr(config, "depth_config", None) is not None, config.stereo_config is not None
    applies = {
        "null": has_expert or config.reads_depth,
        "left_twice": compares or right_picture(config) is not None,
    }
    found = [name for name, applied in applies.items() if applied]
    return (*found, "swapped") if found else ()


@contextmanager
def shown(
    model: Any, name: str, inputs: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor] | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Within, the geometry of a policy is shown what `name`, one of `policies.SHOWN`, says; yields the inputs that the
    model is to be given.

    Args:
        inputs: of the model, as the processor gives them. others: those of other scenes, for "swapped".
    """
    inputs, config = dict(inputs), model.config
    if name == "given":
        yield inputs
        return
    pixels = inputs["pixel_values"]
    if name == "null":
        seen = torch.full_like(pixels, GREY)
    elif name == "left_twice":
        seen = pixels[:, :1].expand_as(pixels)
    else:
        seen = others["pixel_values"]
    if config.reads_depth and name != "left_twice":
        for key in DEPTHS:
            if key in inputs:
                inputs[key] = torch.zeros_like(inputs[key]) if name == "null" else others[key]
    if (place := right_picture(config)) is not None:
        inputs["pixel_values"] = pixels = pixels.clone()
        pixels[:, place] = seen[:, place]
    # what sees the left view too, which the language model must go on seeing, is shown others where it is called
    if getattr(config, "depth_config", None) is not None:
        owner, method = model.model.depth_expert, "embed"
    elif config.stereo_config is not None:
        owner, method = model.model.visual_tokens, "stereo_features"
    else:
        yield inputs
        return
    called = getattr(owner, method)
    setattr(owner, method, lambda given, *rest, **named: called(seen.to(given), *rest, **named))
    try:
        yield inputs
    finally:
        delattr(owner, method)
