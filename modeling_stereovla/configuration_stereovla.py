"""Configuration of StereoVLA and its named sizes."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_policy import PolicyConfig, overridden
from .configuration_stereo_encoder import StereoEncoderConfig, known_keys, refuse_unknown_keys
from .view_attention import HEAD_DIM
from .view_points import NUM_CHANNELS


@strict
class StereoVLAConfig(PolicyConfig):
    r"""
    Sizes of StereoVLA (arXiv 2512.21970). The defaults are the paper's (`preset="full"`);
    `StereoVLAConfig.from_preset` gives smaller ones.

    Args:
        text_config (`LlamaConfig`):
            The language model; InternLM2 is a Llama with a fused attention weight.
        semantic_config, spatial_config:
            The encoders of the left view, any vision model of transformers; SigLIP and DINOv2 with registers in the
            paper. Of a vision transformer the second-to-last block is taken, so the last one is not built.
        stereo_config (`StereoEncoderConfig`):
            The stereo encoder of both views. None makes a mono model, which takes the pair and does not look at the
            right view. Of these three, one at least must remain; all four parts None means the paper's.
        right_view (`str`, *optional*):
            How a model without stereo encoder sees the right view: "separate", as visual tokens of its own behind the
            left view's, or "attention", by left-right attention between the features of both (`view_attention.py`).
            None: not at all. Not in the paper: what to compare it with.
        projector_hidden_size (`int`):
            Width of the projector's first layer.
        chain_of_thought (`bool`):
            Whether `predict_action` generates the keyframe pose first by default.
        direct_probability (`float` in [0, 1]):
            Share of the training samples whose action expert does not see the keyframe pose; above 0 the policy can
            act without generating it.
        stereo_learns_from (`str`):
            "all" losses, or "disparity": the stereo encoder then learns from the samples with known disparity alone
            and runs without gradients on the others, which makes a training step cheaper.
        disparity_loss_weight (`float`):
            Weight of the stereo encoder's loss in the sum.
        points_frame (`str`, *optional*):
            "base" or "camera": points of the disparity and the calibration, in this frame, are channels of the visual
            tokens, and the pointers read them out (`view_points.py`). None: none, as in the paper.
        points_of (`str`):
            "encoder": the stereo encoder's disparity; "given": one that comes with the pair, for a camera that measures
            depth.
        calibration_dropout (`float` in [0, 1)):
            Share of the training samples whose calibration the model is not told, so that it can do without.
        language_pointing_layer (`int`), language_pointing_loss_weight (`float`):
            The layer of the language model, half of whose heads learn to look at what an answer is about
            (`language_pointing.py`), None = no layer, and the weight of that loss; not in the papers.
        place_code (`bool`):
            Whether visual tokens are told their place in the picture by fixed waves, in which the bins of an untrained
            model are written too (`place_code.py`); not in the papers.
        bin_smoothing (`float`):
            Standard deviation in bins of the targets of poses and boxes, and in hundredths of those of depths where
            `num_hundredths`; 0 = the true bin alone, as in the papers.
        num_hundredths (`int`):
            100: the ids before the bins are the decimals ".00" to ".99", as the tokenizers of small models have them;
            0: two decimals are no word.

    The other fields are those of `PolicyConfig`.
    """

    model_type = "stereovla"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=LlamaConfig),
        "semantic_config": SubConfigSpec(config_class=AutoConfig, model_type="siglip_vision_model", optional=True),
        "spatial_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2_with_registers", optional=True),
        "stereo_config": SubConfigSpec(config_class=StereoEncoderConfig, optional=True),
    }

    text_config: dict | PreTrainedConfig | None = None
    semantic_config: dict | PreTrainedConfig | None = None
    spatial_config: dict | PreTrainedConfig | None = None
    stereo_config: dict | PreTrainedConfig | None = None
    right_view: str | None = None
    projector_hidden_size: int = 20352
    state_history: int = 4
    chain_of_thought: bool = True
    direct_probability: float | int = 0.0
    stereo_learns_from: str = "all"
    disparity_loss_weight: float | int = 0.0
    points_frame: str | None = None
    points_of: str = "encoder"
    calibration_dropout: float | int = 0.0
    language_pointing_layer: int | None = None
    language_pointing_loss_weight: float | int = 0.0
    place_code: bool = False
    bin_smoothing: float | int = 0.0
    num_hundredths: int = 0

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(self, kwargs)
        parts = full_parts()
        if all(getattr(self, name) is None for name in parts):
            for name, part in parts.items():
                setattr(self, name, part)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "StereoVLAConfig":
        """The configuration named `preset` (a key of `PRESETS`) with `overrides`; a dict overrides single options
        of a part.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
        return overridden(cls, PRESETS[preset](), overrides)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "StereoVLAConfig":
        """As in transformers; keys that are not known are left out with a warning."""
        return super().from_dict(known_keys(cls, config_dict), **kwargs)

    @property
    def writes_pose(self) -> bool:
        """Whether the keyframe pose stands in the sequence of a sample that acts."""
        return True

    @property
    def pixel_views(self) -> list[str]:
        """Names of the views in `pixel_values`."""
        return ["left", "right"]

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of a pair."""
        return (2 if self.right_view == "separate" else 1) * self.num_visual_tokens

    @property
    def fused_size(self) -> int:
        """Channels of a token before the projector."""
        towers = [tower for tower in (self.semantic_config, self.spatial_config) if tower is not None]
        # a convolutional network states the widths of its stages
        widths = [tower.hidden_sizes[-1] if hasattr(tower, "hidden_sizes") else tower.hidden_size for tower in towers]
        if self.stereo_config is not None:
            widths.append(self.stereo_config.num_feature_channels(self.image_size))
        if self.points_frame is not None:
            widths.append(NUM_CHANNELS)
        return sum(widths)

    @property
    def point_cells(self) -> int:
        """Points of a visual token along each of its sides; 0 = none."""
        if self.points_frame is None:
            return 0
        finest = 2 if self.points_of == "given" or self.stereo_config.refinement_channels else 4
        return self.patch_size // finest

    @property
    def reads_depth(self) -> bool:
        """Whether the model must be shown true depth."""
        return self.points_frame is not None and self.points_of == "given"

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        self.validate_policy()
        if self.semantic_config is None and self.spatial_config is None and self.stereo_config is None:
            raise ValueError(
                "semantic_config, spatial_config and stereo_config are all None; one at least must give visual tokens"
            )
        if self.stereo_config is not None and self.image_size % 32:
            raise ValueError(
                f"image_size is {self.image_size}; it must be divisible by 32, the stereo encoder's coarsest stride"
            )
        for name in ("semantic_config", "spatial_config"):
            tower = getattr(self, name)
            if not hasattr(tower, "patch_size"):
                continue  # absent, or convolutional: pooled to the grid
            if (tower.image_size, tower.patch_size) != (self.image_size, self.patch_size):
                raise ValueError(
                    f"{name} has image_size {tower.image_size} and patch_size {tower.patch_size}; both must equal the "
                    f"model's, {self.image_size} and {self.patch_size}"
                )
            if tower.num_hidden_layers < 2:
                raise ValueError(
                    f"{name}.num_hidden_layers is {tower.num_hidden_layers}; the second-to-last block needs at least 2"
                )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(f"image_token_id is {self.image_token_id}; valid: 0 ... {self.text_config.vocab_size - 1}")
        if self.stereo_learns_from not in ("all", "disparity"):
            raise ValueError(f"stereo_learns_from is {self.stereo_learns_from!r}; it must be 'all' or 'disparity'")
        if self.stereo_config is None and (self.disparity_loss_weight or self.stereo_learns_from != "all"):
            raise ValueError(
                f"disparity_loss_weight is {self.disparity_loss_weight} and stereo_learns_from "
                f"{self.stereo_learns_from!r}, but stereo_config is None: without a stereo encoder they must be 0 and "
                "'all'"
            )
        self._validate_right_view()
        if self.points_frame not in (None, "camera", "base"):
            raise ValueError(f"points_frame is {self.points_frame!r}; it must be None, 'camera' or 'base'")
        if self.points_of not in ("encoder", "given"):
            raise ValueError(f"points_of is {self.points_of!r}; it must be 'encoder' or 'given'")
        if self.points_frame is not None and self.points_of == "encoder" and self.stereo_config is None:
            raise ValueError("points_frame needs a disparity: give stereo_config, or set points_of to 'given'")
        if self.points_frame is not None and self.patch_size % 4:
            raise ValueError(f"patch_size is {self.patch_size}; with points_frame it must be a multiple of 4")
        if not 0 <= self.calibration_dropout < 1:
            raise ValueError(f"calibration_dropout is {self.calibration_dropout}; it must be in [0, 1)")
        layers, layer = self.text_config.num_hidden_layers, self.language_pointing_layer
        if layer is not None and not 1 <= layer < layers:
            raise ValueError(
                f"language_pointing_layer is {layer}; it must be None or one of 1 ... {layers - 1}, as the layer "
                "before it reads the question"
            )
        if layer is None and self.language_pointing_loss_weight:
            raise ValueError(
                f"language_pointing_loss_weight is {self.language_pointing_loss_weight}, but language_pointing_layer "
                "is None: without a layer that learns to point it must be 0"
            )
        if not self.bin_smoothing >= 0:
            raise ValueError(f"bin_smoothing is {self.bin_smoothing}; it must be at least 0 bins")
        if self.num_hundredths not in (0, 100) or self.num_bins + self.num_hundredths >= self.action_vocab_size:
            raise ValueError(
                f"num_hundredths is {self.num_hundredths}; it must be 0, or 100 where these and num_bins "
                f"({self.num_bins}) are fewer than action_vocab_size ({self.action_vocab_size})"
            )
        if not 0 <= self.direct_probability <= 1:
            raise ValueError(f"direct_probability is {self.direct_probability}; it must be in [0, 1]")

    def _validate_right_view(self) -> None:
        """ValueError for a way to see the right view that is none, or that the other parts do not allow."""
        if self.right_view not in (None, "separate", "attention"):
            raise ValueError(f"right_view is {self.right_view!r}; it must be None, 'separate' or 'attention'")
        beside = [name for name in ("stereo_config", "points_frame") if getattr(self, name) is not None]
        if self.right_view is not None and beside:
            raise ValueError(
                f"right_view is {self.right_view!r}, and {' and '.join(beside)} given; it is for a model without "
                "stereo encoder and without points: both must be None"
            )
        if self.right_view == "attention" and self.fused_size % HEAD_DIM:
            raise ValueError(
                f"right_view is 'attention' and the semantic and spatial features have {self.fused_size} channels; "
                f"they must be a multiple of {HEAD_DIM}"
            )


def full_parts() -> dict[str, dict]:
    """The paper's parts: InternLM2-1.8B, SigLIP-so400m/14, DINOv2-L/14 with registers, FoundationStereo (ViT-L)."""
    return {
        "text_config": {
            "vocab_size": 92608,  # InternLM2's 92544 and the added tokens, padded to a multiple of 64
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
            "tie_word_embeddings": False,
            "pad_token_id": 92544,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "semantic_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "hidden_act": "gelu",
            "vision_use_head": False,
        },
        "spatial_config": {
            "model_type": "dinov2_with_registers",
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "num_register_tokens": 4,
        },
        "stereo_config": StereoEncoderConfig.foundationstereo("large").to_dict(),
    }


def _small(image_size: int, patch_size: int, width: int, layers: int, tower: int, stereo: dict) -> dict:
    """A small model of the same structure: `width` for the language model, `tower` for the semantic encoders."""
    semantic = {
        "hidden_size": tower,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, tower // 32),
        "image_size": image_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",
    }
    return {
        "text_config": {
            "vocab_size": 1024,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 64,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "tie_word_embeddings": False,
            "initializer_range": width**-0.5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "semantic_config": {
            **semantic,
            "model_type": "siglip_vision_model",
            "intermediate_size": 2 * tower,
            "vision_use_head": False,
        },
        "spatial_config": {**semantic, "model_type": "dinov2_with_registers", "mlp_ratio": 2, "num_register_tokens": 4},
        "stereo_config": stereo,
        "image_size": image_size,
        "patch_size": patch_size,
        "projector_hidden_size": 2 * width,
        "expert_hidden_size": width,
        "expert_intermediate_size": 2 * width,
        "chunk_size": 8,
        "num_bins": 256,
        "action_vocab_size": 1024,
        "image_token_id": 3,
        "min_period": 4e-3,
    }


# chosen by how fast the disparity error falls per second of one core (docs of the stereo encoder)
SMALL_STEREO = {
    "max_disparity": 32,
    "edgenext_depths": [1, 1, 1],
    "edgenext_channels": [16, 24, 32],
    "edgenext_kernel_sizes": [3, 5, 5],
    "edgenext_splits": [0, 0, 0],
    "num_refine_blocks": 0,
    "layer_scale_init_value": 1.0,
    "num_correlation_groups": 4,
    "num_concat_channels": 4,
    "volume_channels": 16,
    "volume_stride": 2,
    "stem_kernel_size": 3,
    "num_stem_blocks": 0,
    "hourglass_channels": [32],
    "num_hourglass_blocks": 1,
    "disparity_kernel_size": 5,
    "num_disparity_layers": 1,
    "num_disparity_heads": 2,
    "disparity_dropout": 0.0,
    "num_classifier_blocks": 0,
    "classifier_kernel_sizes": [1, 1],
}


def _tiny() -> dict:
    return {**_small(64, 16, 64, 2, 32, SMALL_STEREO), "num_inference_steps": 4}


def resnet(*channels: int, stem: int | None = None) -> dict:
    """A convolutional network of one block for each of these numbers of channels, after a stem of as many as the first
    or of `stem`: one block or two have a stride of 8, three one of 16.
    """
    return {
        "model_type": "resnet",
        "embedding_size": stem or channels[0],
        "hidden_sizes": list(channels),
        "depths": [1] * len(channels),
        "layer_type": "basic",
        "downsample_in_first_stage": len(channels) == 1,
    }


def _taught() -> dict:
    """What is learnt in minutes, from the pair and the simulator's labels."""
    return {
        **_small(96, 8, 96, 2, 64, SMALL_STEREO),
        # from scratch, a small convolutional network finds the target several times faster than the two transformers:
        # pointing loss 1.8 after 106 steps of 24 samples, against 2.2 after 350
        "semantic_config": resnet(24, 64),
        "spatial_config": None,
        "state_history": 1,
        "chain_of_thought": False,
        "direct_probability": 1.0,
        "flow_draws": 4,
        "language_loss_weight": 0.5,
        "use_pointers": True,
        "turn_symmetry": 2,
        "disparity_loss_weight": 1.0,
        "pointing_loss_weight": 1.0,
        "keyframe_loss_weight": 5.0,
        "noise_scale": 0.0,
        "stereo_learns_from": "disparity",
    }


# answers look at what they are about (`language_pointing.py`)
LOOKING = {
    "language_loss_weight": 1.0,
    "language_pointing_layer": 1,
    "language_pointing_loss_weight": 1.0,
    "place_code": True,
    "bin_smoothing": 2.0,
}


def _demo() -> dict:
    return {**_taught(), **LOOKING}


# sees objects of 3 cm: a coarse volume of views of 192 px, and a search around it at half of their resolution
SHARP_STEREO = {
    **SMALL_STEREO,
    "max_disparity": 64,
    "volume_channels": 8,
    "hourglass_channels": [16],
    "refinement_channels": 8,
}


def _points() -> dict:
    return {
        **_taught(),
        "image_size": 192,
        "patch_size": 16,
        "stereo_config": SHARP_STEREO,
        "points_frame": "base",
        "calibration_dropout": 0.1,
        # the stereo encoder comes trained
        "disparity_loss_weight": 0.0,
        "stereo_learns_from": "all",
    }


def _lab() -> dict:
    # every task and every answer, in hours
    return {
        **_points(),
        **LOOKING,
        **_small(192, 16, 192, 3, 96, SHARP_STEREO),
        "semantic_config": resnet(32, 96, 192),
        "spatial_config": None,
        "points_at_destination": True,
        "naming_loss_weight": 1.0,
    }


PRESETS = {"tiny": _tiny, "demo": _demo, "points": _points, "lab": _lab, "full": full_parts}
