"""The policies that are compared, each by the options of `stereovla train` that make it.

All have the same language model and action expert, see the same frames in the same order, and learn from actions alone
(with the keyframe and the pointing that belong to them); they differ in what they see with. Sizes are those of
StereoVLA's presets. A policy with a stereo encoder may be given a trained one, which it then holds fixed; without, its
own learns beside it, that of a StereoVLA from disparity alone.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from stereovla.modeling_stereovla.configuration_stereo_encoder import FEATURE_CHOICES
from stereovla.modeling_stereovla.configuration_stereovla import (
    LOOKING,
    SHARP_STEREO,
    SMALL_STEREO,
    StereoVLAConfig,
    resnet,
)

SHARP_VIEWS = {"image_size": 192, "patch_size": 16}  # with which an encoder finds objects
# StereoVLA's preset: that of DepthVLA and pi0 with the same trunk, how its views differ, and how what sees them
SIZES: dict[str, tuple[str, dict[str, int], dict[str, Any]]] = {
    "tiny": ("tiny", {}, {}),
    "demo": ("demo", {}, {}),
    "points": ("demo", SHARP_VIEWS, {}),
    "lab": ("lab", SHARP_VIEWS, {**resnet(32, 96, 192), "hidden_size": 192}),
}
# a StereoVLA also learns to say the pose and to look at what it says, which the others cannot
SAYS_NOTHING = {name: StereoVLAConfig.__dataclass_fields__[name].default for name in LOOKING}
SAYS_NOTHING |= {"language_loss_weight": 0.0}
# what those of PaliGemma's kind are told and taught as StereoVLA is
TAUGHT = ("state_history", "points_at_destination", "naming_loss_weight")
NO_STEREO = {
    "stereo_config": None,
    "points_frame": None,
    "calibration_dropout": 0.0,
    "disparity_loss_weight": 0.0,
    "stereo_learns_from": "all",
}
ENCODER_COMES_TRAINED = {"disparity_loss_weight": 0.0, "stereo_learns_from": "all"}
ENCODER_LEARNS_BESIDE = {"disparity_loss_weight": 1.0, "stereo_learns_from": "disparity"}  # as of the preset "demo"
POINTS_DROPOUT = 0.1  # as of the preset "points"


@dataclass(frozen=True)
class Entry:
    """One policy.

    Args:
        sees: what, in words. config: fields that are not the preset's. options: of `stereovla train`.
        stereo: whether it has a stereo encoder. depth_expert: "depth" or "stereo", the kind of depth expert that it
            has, None = none.
    """

    sees: str
    preset: str
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    stereo: bool = False
    depth_expert: str | None = None


def entries(size: str) -> dict[str, Entry]:
    """All policies of a size, a key of `SIZES`, by name; ValueError for another one."""
    if size not in SIZES:
        raise ValueError(f"--size is {size!r}; it must be one of {', '.join(SIZES)}")
    trunk, views, tower = SIZES[size]
    found = {**_stereovla(size), **_depthvla(trunk, views, tower, SHARP_STEREO if views else SMALL_STEREO)}
    preset = StereoVLAConfig.from_preset(size)
    taught = {name: getattr(preset, name) for name in TAUGHT}
    for name, entry in found.items():
        if entry.preset == size:
            found[name] = replace(entry, config=entry.config | SAYS_NOTHING)
        elif not entry.preset.startswith("pi0-"):  # transformers' PI0 has none of them
            found[name] = replace(entry, config=entry.config | taught)
    return found


def _stereovla(size: str) -> dict[str, Entry]:
    # of one view in place of two in the tiny preset, whose two semantic encoders both see the left one
    blind = {"semantic_config": None, "spatial_config": None}
    given = {**NO_STEREO, "points_of": "given", "calibration_dropout": POINTS_DROPOUT}
    found = {}
    for features in FEATURE_CHOICES:
        geometry = {"points_frame": None, "calibration_dropout": 0.0, "stereo_config": {"features": features}}
        what = features.replace("_", " ")
        found[features] = Entry(f"left view, and {what} of the pair", size, geometry, stereo=True)
        found[f"{features}-alone"] = Entry(f"{what} of the pair alone", size, {**geometry, **blind}, stereo=True)
    for frame in ("camera", "base"):
        points = {"points_frame": frame, "calibration_dropout": POINTS_DROPOUT}
        what = "the camera's" if frame == "camera" else "the robot's"
        found[f"points-{frame}"] = Entry(
            f"left view, filtered cost volume and points of the pair in {what} frame", size, points, stereo=True
        )
        found[f"rgbd-{frame}"] = Entry(
            f"left view, and points of the true depth in {what} frame", size, given | {"points_frame": frame}
        )
    return found | {
        "mono": Entry("left view", size, NO_STEREO),
        "two-views": Entry("both views as separate pictures", size, {**NO_STEREO, "right_view": "separate"}),
        "attention": Entry("both views by left-right attention", size, {**NO_STEREO, "right_view": "attention"}),
    }


def _depthvla(preset: str, views: dict[str, int], tower: dict[str, Any], stereo: dict[str, Any]) -> dict[str, Entry]:
    """Those of PaliGemma's kind, with views of the sizes `views` seen by `tower`, {} = the preset's, and a stereo
    encoder `stereo`; transformers' PI0 sees with a SigLIP.
    """
    siglip = {**views, "vlm_config": {"vision_config": views}} if views else {}
    vlm = {**views, "vlm_config": {"vision_config": {**views, **tower}}} if views else {}
    merged = (
        {"depth_config": {"image_size": views["image_size"], "patch_size": 2 * views["patch_size"]}} if views else {}
    )
    two_eyes = {"depth_config": merged.get("depth_config", {}) | {"stereo_config": stereo}}
    name = f"depthvla-{preset}"
    return {
        "depthvla": Entry("DepthVLA: left view, by a depth expert too", name, {**vlm, **merged}, depth_expert="depth"),
        "depthvla-stereo": Entry(
            "DepthVLA: left view, and the pair by a stereo depth expert",
            name,
            {**vlm, **two_eyes},
            {"depth_input": "stereo"},
            stereo=True,
            depth_expert="stereo",
        ),
        "depthvla-given": Entry(
            "DepthVLA: left view, and the true depth by a depth expert",
            name,
            {**vlm, **merged},
            {"depth_input": "depth"},
        ),
        "pi0": Entry("pi0 of our code, with pointers: left view", name, vlm, {"depth_input": "none"}),
        "pi0-two-views": Entry(
            "pi0 of our code, with pointers: both views as separate pictures",
            name,
            vlm,
            {"depth_input": "none", "views": "left,right"},
        ),
        "pi0-transformers": Entry("transformers' own PI0: left view", f"pi0-{preset}", siglip),
        "pi0-transformers-two-views": Entry(
            "transformers' own PI0: both views as separate pictures", f"pi0-{preset}", siglip, {"views": "left,right"}
        ),
    }
