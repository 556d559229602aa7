"""Configuration of the stereo encoder: sizes of the feature network, the cost volume and its filter."""

import difflib
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

logger = logging.get_logger(__name__)

FEATURE_CHOICES = ("correlation", "cost_volume", "filtered_cost_volume", "lookup")
ATTENTION_LAYOUTS = ("disparity", "heads")
DISPARITY_PATCH = 4  # voxels of the filtered volume, along each side, that one token of the transformer stands for

# ViT and DPT of the two releases: hidden size, layers, heads, tapped blocks (counted from 1), neck sizes, fusion size.
FOUNDATIONSTEREO_RELEASES = {
    "large": (1024, 24, 16, [5, 12, 18, 24], [256, 512, 1024, 1024], 256),
    "small": (384, 12, 6, [3, 6, 9, 12], [48, 96, 192, 384], 64),
}
# Keys that transformers itself writes into or passes with a config, beside the fields of PreTrainedConfig.
TRANSFORMERS_KEYS = {
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation_internal",
    "_from_auto",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "per_layer_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",  # Trainer's
}


def known_keys(kind: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """What a saved config says, without the keys that `kind` does not know, such as a newer transformers may write, and
    the same of the configs of ours within it; a warning names these.
    """
    valid = {name for name in kind.__dataclass_fields__ if not name.startswith("_")} | TRANSFORMERS_KEYS
    if unknown := sorted(values.keys() - valid):
        logger.warning(f"{kind.__name__}: unknown keys of the saved config are left out: {', '.join(unknown)}")
    kept = {name: value for name, value in values.items() if name in valid}
    for name, part in kind.sub_configs_defaults.items():
        if isinstance(kept.get(name), dict) and part.config_class.__module__.startswith(__name__.rpartition(".")[0]):
            kept[name] = known_keys(part.config_class, kept[name])
    return kept


def refuse_unknown_keys(config: PreTrainedConfig, keywords: dict) -> None:
    """Raise on a keyword that is no field of `config`, naming the nearest one (transformers would keep it silently)."""
    valid = {name for name in config.__dataclass_fields__ if not name.startswith("_")}
    for key in keywords:
        if key not in valid and key not in TRANSFORMERS_KEYS:
            near = difflib.get_close_matches(key, valid, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(valid))}"
            raise ValueError(f"{type(config).__name__} has no field {key!r}; {hint}")


@strict
class StereoEncoderConfig(PreTrainedConfig):
    r"""
    Sizes of [`StereoEncoderModel`]. The defaults are FoundationStereo's released sizes without its frozen ViT;
    [`StereoEncoderConfig.foundationstereo`] gives the two releases in full.

    max_disparity (`int`, defaults to 416):
        Largest disparity in px of the input image that the volume holds, exclusive. The volume has
        D = max_disparity / 4 bins, which the hourglass must be able to halve at each of its levels: with three levels a
        multiple of 32 px.
    features (`str`, defaults to `"filtered_cost_volume"`):
        What the model returns as features: "correlation", "cost_volume", "filtered_cost_volume" or "lookup".
    edgenext_depths, edgenext_channels, edgenext_kernel_sizes (`list[int]`):
        Blocks, channels and depthwise kernel of each stage at 1/4, 1/8, ... of the image; 2 to 4 stages.
    edgenext_splits (`list[int]`, defaults to `[0, 2, 3, 4]`):
        Channel splits of the attention block that ends a stage; 0 means a stage without one.
    edgenext_heads (`int`, defaults to 8):
        Heads of that cross-covariance attention.
    layer_scale_init_value (`float`, defaults to 1e-6):
        Initial residual scale of the EdgeNeXt blocks; training from scratch wants about 1.
    num_refine_blocks (`int`, defaults to 2):
        Residual blocks that finish the features at 1/4, which are matched.
    depth_anything_config (`dict` or `DepthAnythingConfig`, *optional*):
        The frozen ViT and DPT head whose features join the convolutional ones; `None` turns this path off.
    num_correlation_groups, num_concat_channels (`int`, defaults to 8 and 12):
        Groups of the correlation and channels of each view in the concatenated part of the volume.
    volume_channels (`int`, defaults to 28):
        Channels of the filtered volume.
    volume_stride (`int`, defaults to 1):
        Side in quarter-resolution pixels of the patches that one pixel of the filtered volume stands for, 1 or 2. Not
        in FoundationStereo: 2 filters a quarter of the voxels, for training on a CPU. Disparity bins stay as fine.
    stem_kernel_size (`int`, defaults to 3), num_stem_blocks (`int`, defaults to 2):
        First 3-D kernel and residual 3-D blocks before the hourglass.
    hourglass_channels (`list[int]`, defaults to `[56, 112, 168]`):
        Widths at 1/8, 1/16, 1/32; as many levels as entries.
    num_hourglass_blocks (`int`, defaults to 2):
        Axial-planar convolutions after each upsampling and at the end.
    disparity_kernel_size (`int`, defaults to 17):
        Taps along the disparity of an axial-planar convolution; odd.
    num_disparity_layers, num_disparity_heads (`int`, defaults to 4 and 4):
        The transformer over disparities; 0 layers turn it off.
    disparity_dropout (`float`, defaults to 0.1):
        Its dropout in training.
    attention_layout (`str`, defaults to `"disparity"`):
        "disparity" attends over the disparity tokens; "heads" over the heads of each token, as the published code does
        since its commit c1ee07e.
    reachable_bins_only (`bool`, defaults to `False`):
        Filter only the disparity bins for which the width of the image leaves a pixel in the right view: W/4 of them,
        56 of 104 at 224 px, which takes 0.62 of the time there. Not quite the same (docs/stereo_encoder.md): the filter
        sees their end as a border, the disparity is a mean over these bins alone, and in the features the others hold
        the mean of these, so that their number stays.
    num_classifier_blocks (`int`, defaults to 1), classifier_kernel_sizes (`list[int]`, defaults to `[3, 7]`):
        Residual blocks, and first and last kernel, of the head that scores each disparity.
    refinement_channels (`int`, defaults to 0):
        Width of the search around the filtered volume's disparity at half of the resolution, which then is the
        disparity that the model returns; 0 = none. Not in FoundationStereo.
    refinement_radius (`int`, defaults to 3):
        How far this search looks, px at half of the resolution.
    lookup_levels, lookup_radius (`int`, defaults to 2 and 4):
        Pyramid levels and radius of the "lookup" features.
    image_mean, image_std (`list[float]`):
        RGB normalisation inside the model, for images in [0, 1]; ImageNet's by default.
    """

    model_type = "stereovla_stereo_encoder"
    sub_configs_defaults = {
        "depth_anything_config": SubConfigSpec(config_class=AutoConfig, model_type="depth_anything", optional=True)
    }

    max_disparity: int = 416
    features: str = "filtered_cost_volume"
    edgenext_depths: list[int] | tuple[int, ...] = (3, 3, 9, 3)
    edgenext_channels: list[int] | tuple[int, ...] = (48, 96, 160, 304)
    edgenext_kernel_sizes: list[int] | tuple[int, ...] = (3, 5, 7, 9)
    edgenext_splits: list[int] | tuple[int, ...] = (0, 2, 3, 4)
    edgenext_heads: int = 8
    layer_scale_init_value: float | int = 1e-6
    num_refine_blocks: int = 2
    depth_anything_config: dict | PreTrainedConfig | None = None
    num_correlation_groups: int = 8
    num_concat_channels: int = 12
    volume_channels: int = 28
    volume_stride: int = 1
    stem_kernel_size: int = 3
    num_stem_blocks: int = 2
    hourglass_channels: list[int] | tuple[int, ...] = (56, 112, 168)
    num_hourglass_blocks: int = 2
    disparity_kernel_size: int = 17
    num_disparity_layers: int = 4
    num_disparity_heads: int = 4
    disparity_dropout: float | int = 0.1
    attention_layout: str = "disparity"
    reachable_bins_only: bool = False
    num_classifier_blocks: int = 1
    classifier_kernel_sizes: list[int] | tuple[int, ...] = (3, 7)
    refinement_channels: int = 0
    refinement_radius: int = 3
    lookup_levels: int = 2
    lookup_radius: int = 4
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self, **kwargs):
        refuse_unknown_keys(self, kwargs)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "StereoEncoderConfig":
        """As in transformers; keys that are not known are left out with a warning."""
        return super().from_dict(known_keys(cls, config_dict), **kwargs)

    @classmethod
    def foundationstereo(cls, release: str, **overrides) -> "StereoEncoderConfig":
        """Config of a FoundationStereo release, "large" (ViT-L) or "small" (ViT-S), with single fields replaced."""
        if release not in FOUNDATIONSTEREO_RELEASES:
            raise ValueError(f"release is {release!r}; valid: {', '.join(map(repr, FOUNDATIONSTEREO_RELEASES))}")
        hidden, layers, heads, taps, neck, fusion = FOUNDATIONSTEREO_RELEASES[release]
        backbone = {
            "model_type": "dinov2",
            "image_size": 518,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "out_indices": taps,
            "reshape_hidden_states": False,
            "use_mask_token": False,
        }
        depth_anything = {
            "backbone_config": backbone,
            "reassemble_hidden_size": hidden,
            "neck_hidden_sizes": neck,
            "fusion_hidden_size": fusion,
        }
        return cls(**{"depth_anything_config": depth_anything, **overrides})

    @property
    def num_disparities(self) -> int:
        """Bins of the volume, each one pixel at a quarter of the resolution."""
        return self.max_disparity // 4

    @property
    def map_channels(self) -> list[int]:
        """Channels of a view's features at 1/4, 1/8, ... of the image; the first are matched between the views."""
        prior = self.depth_anything_config
        # decoded maps join the encoder's map of their resolution with an upsampled one of as many channels
        channels = [2 * width for width in self.edgenext_channels[:-1]] + [self.edgenext_channels[-1]]
        channels[0] += 0 if prior is None else prior.fusion_hidden_size // 2
        return channels

    @property
    def volume_map_channels(self) -> list[int]:
        """The entries of `map_channels` from the filtered volume's resolution on."""
        return self.map_channels[self.volume_stride - 1 :]

    def num_feature_channels(self, image_width: int) -> int:
        """Channels of the returned features for images of this width in px (only "correlation" depends on it)."""
        taps = 2 * self.lookup_radius + 1
        return {
            "correlation": image_width // 4,
            "cost_volume": (self.num_correlation_groups + 2 * self.num_concat_channels) * self.num_disparities,
            "filtered_cost_volume": self.volume_channels * self.num_disparities,
            "lookup": self.lookup_levels * (self.volume_channels + 1) * taps,
        }[self.features]

    def validate_architecture(self):
        """Part of `@strict`-powered validation: what the fields must satisfy together."""
        step = 4 * max(2 ** len(self.hourglass_channels), DISPARITY_PATCH if self.num_disparity_layers else 1)
        if self.max_disparity <= 0 or self.max_disparity % step:
            raise ValueError(f"max_disparity is {self.max_disparity} px; it must be a positive multiple of {step}")
        if self.refinement_channels < 0 or self.refinement_channels % 2 or self.refinement_radius < 1:
            raise ValueError(
                f"refinement_channels and refinement_radius are {self.refinement_channels} and "
                f"{self.refinement_radius}; valid: an even number or 0 (none), and 1 or more"
            )
        if self.features not in FEATURE_CHOICES:
            raise ValueError(f"features is {self.features!r}; valid: {', '.join(map(repr, FEATURE_CHOICES))}")
        if self.attention_layout not in ATTENTION_LAYOUTS:
            valid = ", ".join(map(repr, ATTENTION_LAYOUTS))
            raise ValueError(f"attention_layout is {self.attention_layout!r}; valid: {valid}")
        stages = len(self.edgenext_channels)
        if not 2 <= stages <= 4:
            raise ValueError(f"edgenext_channels has {stages} stages; valid: 2 to 4")
        for name in ("edgenext_depths", "edgenext_kernel_sizes", "edgenext_splits"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; edgenext_channels has {stages}")
        for stage, (splits, width) in enumerate(zip(self.edgenext_splits, self.edgenext_channels, strict=True)):
            if (
                splits == 1
                or splits < 0
                or (splits and (width % self.edgenext_heads or not self.edgenext_depths[stage]))
            ):
                raise ValueError(
                    f"edgenext_splits[{stage}] is {splits} for {width} channels; valid: 0 (no attention block), or "
                    f"2 and more with channels divisible by edgenext_heads = {self.edgenext_heads} and a depth above 0"
                )
        if self.volume_stride not in (1, 2):
            raise ValueError(f"volume_stride is {self.volume_stride}; valid: 1, 2")
        levels, gates = len(self.hourglass_channels), len(self.volume_map_channels)
        if not 1 <= levels < gates:
            raise ValueError(
                f"hourglass_channels has {levels} levels; with {stages} EdgeNeXt stages, whose features gate the "
                f"volume, and volume_stride {self.volume_stride}, valid: 1 to {gates - 1}"
            )
        if self.map_channels[0] % self.num_correlation_groups:
            raise ValueError(
                f"num_correlation_groups is {self.num_correlation_groups}; it must divide the "
                f"{self.map_channels[0]} matched channels"
            )
        # even, because the position encoding pairs a sine with a cosine
        uneven = self.volume_channels % 2 or self.volume_channels % self.num_disparity_heads
        if self.num_disparity_layers and uneven:
            raise ValueError(
                f"volume_channels is {self.volume_channels}; with a disparity transformer it must be even and "
                f"divisible by num_disparity_heads = {self.num_disparity_heads}"
            )
        if len(self.classifier_kernel_sizes) != 2:
            raise ValueError(f"classifier_kernel_sizes has {len(self.classifier_kernel_sizes)} entries; it needs 2")
        kernels = (self.stem_kernel_size, self.disparity_kernel_size, *self.classifier_kernel_sizes)
        if any(kernel % 2 == 0 or kernel < 1 for kernel in kernels):
            raise ValueError(
                f"stem_kernel_size, disparity_kernel_size and classifier_kernel_sizes are {kernels}; each must be odd "
                "and positive"
            )
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} has {len(getattr(self, name))} values; it needs 3, one per RGB channel")


__all__ = ["StereoEncoderConfig"]
