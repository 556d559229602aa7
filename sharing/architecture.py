"""What a policy is, for its card: whose idea, what it sees, of what parts, and which of the paper's choices it has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from stereovla.sharing.folders import is_local

ARXIV = {"StereoVLA": "2512.21970", "DepthVLA": "2510.13375", "pi0": "2410.24164"}
# name of a part: how the names of its weights begin; the first that fits
STEREOVLA_PARTS = {
    "semantic encoder (left view)": "model.visual_tokens.semantic.",
    "spatial encoder (left view)": "model.visual_tokens.spatial.",
    "stereo encoder (both views)": "model.visual_tokens.stereo.",
    "left-right attention": "model.visual_tokens.view_attention.",
    "projector": "model.visual_tokens.projector.",
    "language model (Llama type)": "model.language_model.",
}
DEPTHVLA_PARTS = {
    "vision encoder (each view)": "model.vlm.vision_tower.",
    "projector": "model.vlm.multi_modal_projector.",
    "language model (Gemma type)": "model.vlm.language_model.",
    "depth expert: encoder": "model.depth_expert.encoder.",
    "depth expert: stereo encoder (left and right view)": "model.depth_expert.stereo.",
    "depth expert: decoder": "model.depth_expert.decoder.",
    "depth expert: projector, norm and head": "model.depth_expert.",
    "reading of depth by pointers": "model.depth_reading.",
}
# of transformers' own PI0, behind our processor, which it saves under openpi's names
PI0_PARTS = {
    "vision encoder of PI0": "pi0.paligemma_with_expert.paligemma.model.vision_tower.",
    "projector of PI0": "pi0.paligemma_with_expert.paligemma.model.multi_modal_projector.",
    "language model of PI0": "pi0.paligemma_with_expert.paligemma.",
    "action expert of PI0": "pi0.",
}
SHARED_PARTS = {"language head": "lm_head.", "action expert": "action_expert.", "pointers": "pointers."}
OTHER = "other"


@dataclass(frozen=True)
class Architecture:
    """What the files of a model's or an adapter's folder say of the policy.

    Args:
        name: "StereoVLA", "DepthVLA", or "pi0", which is a DepthVLA without a depth expert.
        views: names of the cameras that it is shown. reads_depth: whether it is also shown the true depth.
        config: the model's; None in an adapter's folder.
        processor: the processor's config. counts: {part: its parameters in the folder}.
    """

    name: str
    views: Sequence[str]
    reads_depth: bool
    config: Mapping[str, Any] | None
    processor: Mapping[str, Any]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, folder: Path, config: Mapping | None, processor: Mapping, reads_depth: bool) -> "Architecture":
        """That of the weights in `folder`."""
        if processor["processor_class"] == "StereoProcessor":
            name, views, parts = "StereoVLA", ["left", "right"], STEREOVLA_PARTS
        else:
            name, views, parts = (
                "pi0",
                [*processor["views"], *["right"] * processor["stereo"]],
                DEPTHVLA_PARTS | PI0_PARTS,
            )
        counts = count_parameters(folder, parts | SHARED_PARTS)
        if any(part.startswith("depth expert") for part in counts):
            name = "DepthVLA"
        return cls(name, views, reads_depth, config, processor, counts)

    @property
    def stereo(self) -> bool:
        return "right" in self.views

    @property
    def tags(self) -> list[str]:
        """Of the Hub."""
        depth = self.name == "DepthVLA"
        return [
            "robotics",
            "vla",
            *(["stereo"] if self.stereo else []),
            *(["depth"] if depth else []),
            self.name.lower(),
        ]

    @property
    def sees(self) -> str:
        """Its cameras, after "that sees"."""
        if self.name == "StereoVLA":
            return "with two eyes"
        pair = ["left and right, a rectified pair"] if self.stereo else []
        names = [*pair, *(name for name in self.views if not (self.stereo and name in ("left", "right")))]
        many = "one camera" if len(self.views) == 1 else f"{len(self.views)} cameras"
        return f"{many} ({', '.join(names)})"

    @property
    def inputs(self) -> str:
        """What goes in beside the instruction and the state."""
        if self.name == "StereoVLA":
            return "a rectified image pair"
        pictures = "a picture" if len(self.views) == 1 else "a picture of each camera"
        return f"{pictures} with its true depth" if self.reads_depth else pictures

    def in_words(self) -> str:
        """Of the whole model: what each part does with its sizes."""
        if self.name == "StereoVLA":
            return self._stereovla()
        config = self.config
        vlm, depth = config["vlm_config"], config["depth_config"]
        read = "its keys and values" if depth is None else "the keys and values of both"
        text = (
            f"{self.seen} each, of a vision-language model of PaliGemma's kind "
            f"({vlm['vision_config']['model_type']}; Gemma type, {size_of(vlm['text_config'])})."
        )
        if depth is not None:
            encoder = "stereo cost volume" if depth["stereo_config"] else depth["encoder_config"]["model_type"]
            text += (
                f" Beside it, with attention at every layer and weights of its own, runs a depth expert ({encoder}; "
                f"decoder {size_of(depth['decoder_config'])}), which predicts the depth of each view."
            )
        text += f" {self.action_expert(read)}{self.pointers}"
        return "\n\n".join([text, "\n".join(f"- {line}" for line in self.choices())])

    def _stereovla(self) -> str:
        config = self.config
        towers = [config[f"{name}_config"] for name in ("semantic", "spatial")]
        names = [tower["model_type"] for tower in towers if tower]
        names += ["stereo cost volume"] if config["stereo_config"] else []
        names += {"separate": ["the same of the right view"], "attention": ["left-right attention"]}.get(
            config.get("right_view"), []
        )
        text = (
            f"{self.seen}, fused by an MLP from {', '.join(names)}. A Llama-type language model "
            f"({size_of(config['text_config'])}) reads them with the text; {self.action_expert('its keys and values')}"
            f"{self.pointers}"
        )
        if frame := config.get("points_frame"):
            given = config["points_of"] == "given"
            of = "a given depth map's disparity" if given else "the stereo encoder's disparity"
            place = "robot base" if frame == "base" else "camera"
            text += (
                f" Not in the paper: tokens and pointers see points of {of} and the calibration, in the {place}'s "
                f"frame; {100 * config['calibration_dropout']:g} % of the training samples came without calibration."
            )
        return text

    @property
    def seen(self) -> str:
        views = self.processor["image_processor"]["size"]
        tokens = self.processor["num_visual_tokens"]
        return f"Views of {views['width']} x {views['height']} px become {tokens} visual tokens"

    @property
    def pointers(self) -> str:
        if not self.config.get("use_pointers"):
            return ""
        what = "target, gripper and destination" if self.config.get("points_at_destination") else "target and gripper"
        return f" Not in the paper: it marks {what} among the visual tokens, and the action expert is told of them."

    def action_expert(self, read: str) -> str:
        article = "an" if self.name == "StereoVLA" else "An"
        return (
            f"{article} action expert ({self.config['expert_hidden_size']} wide) reads {read} at every layer and "
            f"denoises the chunk in {self.config['num_inference_steps']} steps of flow matching."
        )

    def choices(self) -> list[str]:
        """What of DepthVLA can be left out or changed, and how it is here."""
        config, depth = self.config, self.config["depth_config"]
        others = "; all but the first may be absent" if len(config["views"]) > 1 else ""
        lines = [f"Cameras: {', '.join(config['views'])}{others}."]
        if depth is None:
            lines.append("Depth expert: none; the model is pi0.")
        else:
            source = config["depth_expert_source"]
            if source is None:
                begun = "untrained (random weights)"
            else:
                begun = f"with the weights of {Path(source).name if is_local(source) else source}"
            lines.append(f"Depth expert: began {begun}.")
            shown = "the pictures" if depth["input"] == "pictures" else "the true depth in place of the pictures"
            shown = "left and right view, by a stereo encoder" if depth["stereo_config"] else shown
            lines.append(f"Its encoder is shown {shown}.")
            weight = config["depth_map_loss_weight"]
            learned = f"on (weight {weight:g}, lambda {config['silog_lambda']:g})" if weight else "off"
            lines.append(f"Scale-invariant depth loss: {learned}.")
            mask = (
                "on, each sees its own tokens alone" if config["mask"] == "block" else "off, each sees the other's too"
            )
            lines.append(f"Block mask between language model and depth expert: {mask}.")
        frozen = ", ".join(config["frozen_parts"])
        lines.append(f"Held fixed in the last training: {frozen or 'nothing'}.")
        return lines


def size_of(transformer: Mapping) -> str:
    return f"{transformer['num_hidden_layers']} layers, {transformer['hidden_size']} wide"


def count_parameters(folder: Path, parts: Mapping[str, str]) -> dict[str, int]:
    """{part: parameters} of those that are there, counted in the headers of the weight files of a model or adapter."""
    counts = dict.fromkeys([*parts, OTHER], 0)
    for path in sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]):
        with safe_open(path, "pt") as file:
            for key in file.keys():
                name = key.removeprefix("base_model.model.")
                part = next((part for part, prefix in parts.items() if name.startswith(prefix)), OTHER)
                counts[part] += prod(file.get_slice(key).get_shape())
    return {part: count for part, count in counts.items() if count}
