"""The layers that know a robot's numbers, and giving them the sizes of another robot."""

from collections.abc import Mapping

from torch import nn

# path of the layer: the fields of the config that are its inputs and its outputs, None = a width of the network
ROBOT_HEADS = {
    "action_expert.state_proj": ("state_dim", None),
    "action_expert.action_in_proj": ("action_dim", None),
    "action_expert.action_out_proj": (None, "action_dim"),
    "pointers.anchors.posture": ("state_dim", None),
    "pointers.carried_query": ("state_dim", None),
    "pointers.displacement.4": (None, "pose_dim"),
    "pointers.displacement_token.0": ("pose_dim", None),
    "pointers.turns.cosine": (None, "num_turns"),
    "pointers.turns.sine": (None, "num_turns"),
    "pointers.turns.token.0": ("num_turns", None),
}


def sizes_of_robot(state_dim: int, action_dim: int, num_turns: int) -> dict[str, int]:
    """Fields of the config that follow from a robot; a keyframe is a state."""
    return {"state_dim": state_dim, "action_dim": action_dim, "pose_dim": state_dim, "num_turns": num_turns}


def resize_heads(model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Replaces the layers whose size is not the one in `sizes` (see `sizes_of_robot`) by untrained ones, and writes the
    sizes into the model's config. What is kept keeps its weights.
    """
    modules = dict(model.named_modules())
    for path, fields in ROBOT_HEADS.items():
        if path not in modules:
            continue
        old = modules[path]
        widths = (old.in_features, old.out_features)
        wanted = [width if field is None else sizes[field] for field, width in zip(fields, widths, strict=True)]
        if tuple(wanted) != widths:
            new = nn.Linear(*wanted, device=old.weight.device, dtype=old.weight.dtype)
            model._init_weights(new)
            model.set_submodule(path, new)
    for name, size in sizes.items():
        setattr(model.config, name, size)


def sizes_in_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """`sizes_of_robot` of the tensors of an adapter, {name: shape}; None where it has no such layers."""
    found = {"num_turns": 1}
    for name, shape in shapes.items():
        if name.endswith("action_expert.state_proj.weight"):
            found["state_dim"] = shape[1]
        elif name.endswith("action_expert.action_in_proj.weight"):
            found["action_dim"] = shape[1]
        elif name.endswith("pointers.turns.token.0.weight"):
            found["num_turns"] = shape[1]
    return sizes_of_robot(**found) if len(found) == 3 else None
