"""Configuration of DepthVLA and of its depth expert, and their named sizes."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, GemmaConfig, PaliGemmaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_policy import PolicyConfig, overridden
from .configuration_stereo_encoder import StereoEncoderConfig, known_keys, refuse_unknown_keys
from .configuration_stereovla import SMALL_STEREO, resnet

DEPTH_INPUTS = ("pictures", "depth")
MASKS = ("block", "full")
RIGHT = "right"  # the view that a stereo encoder compares the first one with


@strict
class DepthExpertConfig(PreTrainedConfig):
    r"""
    Sizes of the depth expert (arXiv 2510.13375, section III): an encoder of the views, a decoder that mirrors the
    VLM's transformer with widths of its own, a linear head. The defaults are the paper's: DINOv2-L as in Depth Anything
    V2, and a decoder shaped like Gemma-300M, which is what its 600 M parameters leave (not published).

    Args:
        encoder_config:
            Encoder of each view, any vision model of transformers; None with `stereo_config`.
        stereo_config (`StereoEncoderConfig`):
            In place of it, an encoder of the first view and the right one: the depth expert then sees with two eyes.
        decoder_config (`GemmaConfig`):
            Layers, heads and head size must be those of the language model whose attention is shared.
        image_size, patch_size (`int`):
            Side of the views and stride of the tokens, px. A token's output is the depth of its patch.
        merge_size (`int`):
            Cells of the encoder's grid, per side, whose features a token holds, one behind the other. More than 1 makes
            few tokens of a fine grid: attention grows with their square (not in the paper; for the small presets).
        input (`str`):
            "pictures", or "depth": the encoder is then shown the true depth in their place (an ablation of the paper).
    """

    model_type = "depthvla_depth_expert"
    sub_configs_defaults = {
        "encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2", optional=True),
        "stereo_config": SubConfigSpec(config_class=StereoEncoderConfig, optional=True),
        "decoder_config": SubConfigSpec(config_class=GemmaConfig),
    }

    encoder_config: dict | PreTrainedConfig | None = None
    stereo_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    image_size: int = 224
    patch_size: int = 14
    merge_size: int = 1
    input: str = "pictures"
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(self, kwargs)
        if self.encoder_config is None and self.stereo_config is None:
            self.encoder_config = dinov2_large()
        if self.decoder_config is None:
            self.decoder_config = gemma_300m()
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "DepthExpertConfig":
        """The depth expert of the policy named `preset` (a key of `PRESETS`) with `overrides`."""
        return overridden(cls, _preset(preset)["depth_config"], overrides)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DepthExpertConfig":
        """As in transformers; keys that are not known are left out with a warning."""
        return super().from_dict(known_keys(cls, config_dict), **kwargs)

    @property
    def hidden_size(self) -> int:
        return self.decoder_config.hidden_size

    @property
    def num_tokens(self) -> int:
        """Tokens of one view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def cell_size(self) -> float:
        """Stride of the encoder's grid, px."""
        return self.patch_size / self.merge_size

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if (self.encoder_config is None) == (self.stereo_config is None):
            raise ValueError("encoder_config and stereo_config are both given; the depth expert has one encoder")
        if self.input not in DEPTH_INPUTS:
            raise ValueError(f"input is {self.input!r}; it must be one of {', '.join(DEPTH_INPUTS)}")
        if self.input == "depth" and self.stereo_config is not None:
            raise ValueError("input is 'depth', but a stereo encoder compares pictures; give encoder_config instead")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size is {self.image_size}; it must be divisible by patch_size ({self.patch_size})")
        if self.stereo_config is not None and self.image_size % 32:
            raise ValueError(
                f"image_size is {self.image_size}; it must be divisible by 32, the stereo encoder's coarsest stride"
            )
        if self.merge_size < 1 or self.patch_size % self.merge_size:
            raise ValueError(f"merge_size is {self.merge_size}; it must divide patch_size ({self.patch_size})")
        patch = getattr(self.encoder_config, "patch_size", self.cell_size)
        if patch != self.cell_size:
            raise ValueError(
                f"encoder_config has patch_size {patch}; it must be patch_size / merge_size, {self.cell_size:g}"
            )


@strict
class DepthVLAConfig(PolicyConfig):
    r"""
    Sizes of DepthVLA (arXiv 2510.13375). The defaults are the paper's (`preset="full"`); `DepthVLAConfig.from_preset`
    gives smaller ones. Without a depth expert the model is pi0 (arXiv 2410.24164).

    Args:
        vlm_config (`PaliGemmaConfig`):
            The vision-language model. Its vision model may be a convolutional one, which is pooled to the grid.
        depth_config (`DepthExpertConfig`):
            The depth expert. None (`depth_expert=False` of `from_preset`) leaves it out.
        views (`list[str]`):
            Names of the cameras in the order of `pixel_values`; VLM and depth expert see each of them. Boxes, points
            and pointing are about the first.
        mask (`str`):
            "block": VLM tokens and depth tokens see their own kind alone. "full", an ablation: both see each other.
        silog_lambda (`float` in [0, 1]):
            Share of the squared mean error in log depth that the depth loss forgives; 1 does not see a wrong scale.
        depth_expert_source (`str`), frozen_parts (`list[str]`):
            What the training did: where the depth expert's weights came from, None = nowhere, and which parts were held
            fixed.
        depth_map_loss_weight (`float`):
            Weight of the depth expert's loss in the sum; the paper's is L_flow + L_si.

    The other fields are those of `PolicyConfig`.
    """

    model_type = "depthvla"
    sub_configs_defaults = {
        "vlm_config": SubConfigSpec(config_class=PaliGemmaConfig),
        "depth_config": SubConfigSpec(config_class=DepthExpertConfig, optional=True),
    }

    vlm_config: dict | PreTrainedConfig | None = None
    depth_config: dict | PreTrainedConfig | None = None
    views: list[str] | tuple[str, ...] = ("left",)
    mask: str = "block"
    expert_intermediate_size: int = 4096
    action_vocab_size: int = 257024
    image_token_id: int = 257152
    language_loss_weight: float | int = 0.0
    depth_map_loss_weight: float | int = 1.0
    silog_lambda: float | int = 0.5
    depth_expert_source: str | None = None
    frozen_parts: list[str] | tuple[str, ...] = ()

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(self, kwargs)
        if self.vlm_config is None:
            self.vlm_config = paligemma_3b()
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, depth_expert: bool = True, **overrides) -> "DepthVLAConfig":
        """The configuration named `preset` (a key of `PRESETS`) with `overrides`; a dict overrides single options of a
        part. Without depth expert: pi0 of the same sizes.
        """
        values = _preset(preset)
        if not depth_expert:
            values |= {"depth_config": None, "depth_map_loss_weight": 0.0}
        return overridden(cls, values, overrides)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "DepthVLAConfig":
        """As in transformers; keys that are not known are left out with a warning."""
        return super().from_dict(known_keys(cls, config_dict), **kwargs)

    @property
    def text_config(self) -> GemmaConfig:
        """The language model's."""
        return self.vlm_config.text_config

    @property
    def stereo_config(self) -> StereoEncoderConfig | None:
        """The stereo encoder's, where the depth expert has one."""
        return None if self.depth_config is None else self.depth_config.stereo_config

    @property
    def reads_depth(self) -> bool:
        """Whether the model must be shown true depth (an ablation)."""
        return self.depth_config is not None and self.depth_config.input == "depth"

    @property
    def writes_pose(self) -> bool:
        """Whether the keyframe pose stands in the sequence of a sample that acts."""
        return False

    @property
    def pixel_views(self) -> list[str]:
        """Names of the views in `pixel_values`: those that are seen, and the right one for a stereo encoder."""
        return [*self.views, *([] if self.stereo_config is None else [RIGHT])]

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        self.validate_policy()
        text, vision, depth = self.text_config, self.vlm_config.vision_config, self.depth_config
        if text.model_type != "gemma":
            raise ValueError(f"vlm_config.text_config is a {text.model_type!r}; it must be a 'gemma'")
        if self.mask not in MASKS:
            raise ValueError(f"mask is {self.mask!r}; it must be one of {', '.join(MASKS)}")
        if not self.views or len(set(self.views)) < len(self.views):
            raise ValueError(f"views are {list(self.views)}; they must be different names, at least one")
        if (vision.image_size, vision.patch_size) != (self.image_size, self.patch_size):
            raise ValueError(
                f"vlm_config.vision_config has image_size {vision.image_size} and patch_size {vision.patch_size}; both "
                f"must equal the model's, {self.image_size} and {self.patch_size}"
            )
        if self.vlm_config.projection_dim != text.hidden_size:
            raise ValueError(
                f"vlm_config.projection_dim is {self.vlm_config.projection_dim}; it must be the language model's "
                f"hidden_size, {text.hidden_size}"
            )
        if depth is None:
            if self.depth_map_loss_weight:
                raise ValueError(
                    f"depth_map_loss_weight is {self.depth_map_loss_weight}, but depth_config is None: without a depth "
                    "expert it must be 0"
                )
        else:
            for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
                mine, its = getattr(text, name), getattr(depth.decoder_config, name)
                if mine != its:
                    raise ValueError(
                        f"depth_config.decoder_config.{name} is {its}; it must be the language model's, {mine}: they "
                        "share attention"
                    )
            if depth.image_size != self.image_size:
                raise ValueError(f"depth_config.image_size is {depth.image_size}; it must be {self.image_size}")
            if self.use_pointers and depth.cell_size != self.patch_size:
                raise ValueError(
                    f"the depth expert's cells (depth_config.patch_size / merge_size) have {depth.cell_size:g} px; "
                    f"pointers read them where they read the visual tokens, so it must be {self.patch_size}"
                )
            if depth.stereo_config is not None and RIGHT in self.views:
                raise ValueError(f"views are {list(self.views)}; {RIGHT!r} is the stereo encoder's, not one of them")
        if self.image_token_id < 0:
            raise ValueError(f"image_token_id is {self.image_token_id}; it must be at least 0")
        if not 0 <= self.silog_lambda <= 1:
            raise ValueError(f"silog_lambda is {self.silog_lambda}; it must be in [0, 1]")


def dinov2_large() -> dict:
    """The encoder of Depth Anything V2 (Large): DINOv2-L/14, trained at 518 px; positions are interpolated."""
    return {
        "model_type": "dinov2",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 518,
        "patch_size": 14,
    }


def gemma_300m() -> dict:
    """A transformer of pi0's action expert's shape."""
    return {
        "vocab_size": 1,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def paligemma_3b() -> dict:
    """PaliGemma-3B at 224 px: SigLIP-so400m/14 and Gemma-2B."""
    return {
        "text_config": {
            "model_type": "gemma",
            "vocab_size": 257216,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "projection_dim": 2048,
        "hidden_size": 2048,
        "vocab_size": 257216,
        "image_token_index": 257152,
    }


def _full() -> dict:
    return {
        "vlm_config": paligemma_3b(),
        "depth_config": {"encoder_config": dinov2_large(), "decoder_config": gemma_300m()},
    }


def _small(
    image_size: int, patch_size: int, width: int, layers: int, vision: dict, depth: dict, narrow: int, merge: int = 2
) -> dict:
    """A small model of the same structure: `width` for language model and action expert, `narrow` for the depth
    expert's decoder; `vision` and `depth` are the configs of their encoders, `merge` is the depth expert's merge_size.
    """
    shape = {
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "head_dim": 32,
    }
    return {
        "vlm_config": {
            "text_config": {
                **shape,
                "model_type": "gemma",
                "vocab_size": 1024,
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "max_position_embeddings": 2048,
                "initializer_range": width**-0.5,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
            # a convolutional model does not state its size on the grid
            "vision_config": {**vision, "image_size": image_size, "patch_size": patch_size},
            "projection_dim": width,
            "hidden_size": width,
            "vocab_size": 1024,
            "image_token_index": 3,
        },
        "depth_config": {
            "encoder_config": depth,
            "decoder_config": {
                **gemma_300m(),
                **shape,
                "hidden_size": narrow,
                "intermediate_size": 2 * narrow,
                "max_position_embeddings": 2048,
                "initializer_range": narrow**-0.5,
            },
            "image_size": image_size,
            "patch_size": merge * patch_size,
            "merge_size": merge,
        },
        "image_size": image_size,
        "patch_size": patch_size,
        "expert_hidden_size": width,
        "expert_intermediate_size": 2 * width,
        "chunk_size": 8,
        "action_vocab_size": 1024,
        "image_token_id": 3,
    }


def _tiny() -> dict:
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 64,
        "patch_size": 16,
    }
    siglip = {**vision, "model_type": "siglip_vision_model", "intermediate_size": 64, "vision_use_head": False}
    dinov2 = {**vision, "model_type": "dinov2", "mlp_ratio": 2}
    return {**_small(64, 16, 64, 2, siglip, dinov2, 32, merge=1), "num_inference_steps": 4}


LEARNED_IN_MINUTES = {
    # what a small policy needs to learn to act within minutes, as StereoVLA's presets of these names
    "flow_draws": 4,
    "language_loss_weight": 0.5,
    "use_pointers": True,
    "turn_symmetry": 2,
    "pointing_loss_weight": 1.0,
    "keyframe_loss_weight": 5.0,
    "noise_scale": 0.0,
}


def _demo() -> dict:
    vision = {**resnet(24, 64), "hidden_size": 64}
    return {**_small(96, 8, 96, 2, vision, resnet(32, stem=12), 32), **LEARNED_IN_MINUTES}


def _lab() -> dict:
    vision = {**resnet(32, 96), "hidden_size": 96}
    return {**_small(128, 8, 192, 3, vision, resnet(12, 48), 64), **LEARNED_IN_MINUTES, "language_loss_weight": 1.0}


def stereo_encoder() -> dict:
    """Overrides of a small preset's `depth_config` that make it see with two eyes, as StereoVLA of that size does."""
    return {"encoder_config": None, "stereo_config": SMALL_STEREO}


PRESETS = {"depthvla-tiny": _tiny, "depthvla-demo": _demo, "depthvla-lab": _lab, "depthvla-full": _full}


def _preset(preset: str) -> dict:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[preset]()
