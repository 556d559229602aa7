"""The stereo encoder: a rectified image pair -> geometric features, disparity and, with calibration, metric depth.
Useful alone and inside StereoVLA.

The published FoundationStereo network (Wen et al. 2025, arXiv 2501.09898) up to its filtered cost volume and initial
disparity, without the iterative refinement, which StereoVLA does not use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_stereo_encoder import StereoEncoderConfig
from .cost_filtering import CostFilter, DisparityClassifier
from .cost_volume import all_pairs_correlation, disparity_to_depth, lookup_features, matching_volume, regress_disparity
from .disparity_refinement import DisparityRefinement
from .edgenext import CrossCovarianceAttention, LayerScale, StereoFeatures
from .monocular_prior import MonocularPrior
from .running_statistics import hold_running_statistics


@dataclass
class StereoEncoderOutput(ModelOutput):
    """
    features: (B, F, H/4, W/4), the chosen features; volumes are flattened channel-major (channel * D + disparity).
        The filtered volume is (B, F, H/8, W/8) with volume_stride 2.
    initial_disparity: (B, 1, H/4, W/4) float32, in px at a quarter of the resolution; None where neither the disparity
        is asked for nor the features need it.
    refined_disparity: (B, 1, H/2, W/2) float32, in px at half of the resolution; None without
        config.refinement_channels, or if no disparity is asked for.
    disparity: (B, H, W) float32, in px of the given left view: the refined disparity times 2, or the initial one times
        4, resized bilinearly; None if not asked for.
    depth: (B, H, W) float32, planar depth of the left view in m, infinite where the disparity is 0; None without
        calibration.
    logits: (B, 1, D, h, w), the score of each disparity before the softmax, at the filtered volume's resolution; with
        config.reachable_bins_only, of the filtered bins.
    """

    features: torch.FloatTensor | None = None
    initial_disparity: torch.FloatTensor | None = None
    refined_disparity: torch.FloatTensor | None = None
    disparity: torch.FloatTensor | None = None
    depth: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None

    @property
    def maps(self) -> list[torch.Tensor]:
        """The disparities that it learns, each in px of its own resolution, the finest last."""
        return [found for found in (self.initial_disparity, self.refined_disparity) if found is not None]


def of_channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """A value for each channel, (C, 1, 1), of the dtype and device of `like`; made there, since a CUDA graph holds no
    copy from the host.
    """
    return torch.cat([like.new_full((1, 1, 1), value) for value in values])


def split_views(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(2B, ...), the views of each pair in turn -> left (B, ...), right (B, ...)."""
    return features[0::2], features[1::2]


def fill_bins(volume: torch.Tensor, num_bins: int) -> torch.Tensor:
    """(B, C, D, H, W) with bins that hold the mean of the others added at the end, up to num_bins."""
    missing = num_bins - volume.shape[2]
    mean = volume.mean(2, keepdim=True).expand(-1, -1, missing, -1, -1)
    return torch.cat([volume, mean], dim=2) if missing else volume


class StereoEncoderPreTrainedModel(PreTrainedModel):
    config: StereoEncoderConfig
    base_model_prefix = "stereo_encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False
    _no_split_modules = ["CostFilter", "EdgeNeXtStage", "Dinov2Layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            # variance-preserving: the norms that follow do not need it, the residual and ungated paths do
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
        elif isinstance(module, LayerScale):
            init.constant_(module.scale, module.value)
        elif isinstance(module, CrossCovarianceAttention):
            init.ones_(module.temperature)


class StereoEncoderModel(StereoEncoderPreTrainedModel):
    """Image pair -> geometric features and disparity."""

    def __init__(self, config: StereoEncoderConfig):
        super().__init__(config)
        self.prior = None if config.depth_anything_config is None else MonocularPrior(config.depth_anything_config)
        self.backbone = StereoFeatures(config)
        self.match_projection = nn.Conv2d(config.map_channels[0], config.num_concat_channels, 1)
        self.filter = CostFilter(config)
        self.classifier = DisparityClassifier(config)
        self.refinement = DisparityRefinement(config) if config.refinement_channels else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The first layers of the trained backbone; FSDP2 and gradient checkpointing with adapters ask for it."""
        return self.backbone.stem

    def check_inputs(self, pixel_values: torch.Tensor) -> None:
        """Raise unless pixel_values is a float (B, 2, 3, H, W) with sides that are multiples of 32."""
        if pixel_values.ndim != 5 or pixel_values.shape[1:3] != (2, 3):
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (batch, 2, 3, height, width): "
                "the left and the right view, RGB"
            )
        if not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values is {pixel_values.dtype}; expected floating point in [0, 1]")
        height, width = pixel_values.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(f"images are {height} x {width} px; both sides must be multiples of 32")

    def check_calibration(
        self,
        batch: int,
        focal_length_px: torch.Tensor | None,
        baseline_m: torch.Tensor | None,
        output_disparity: bool,
    ) -> None:
        """Raise unless focal length and baseline are both absent, or both (batch,) and the disparity is asked for."""
        given = {"focal_length_px": focal_length_px, "baseline_m": baseline_m}
        absent = [name for name, value in given.items() if value is None]
        if len(absent) == 1:
            raise ValueError(f"{absent[0]} is missing; depth needs focal_length_px and baseline_m")
        if absent:
            return
        if not output_disparity:
            raise ValueError("output_disparity is False; depth (focal_length_px and baseline_m) needs the disparity")
        for name, value in given.items():
            if tuple(value.shape) != (batch,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}; expected ({batch},), one for each pair")

    def normalized_views(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 2, 3, H, W) in [0, 1] -> (2B, 3, H, W): left and right view of each pair in turn."""
        views = pixel_values.flatten(0, 1)
        mean, std = (of_channels(values, views) for values in (self.config.image_mean, self.config.image_std))
        return (views - mean).div_(std).to(self.dtype)

    def extract_features(self, views: torch.Tensor) -> list[torch.Tensor]:
        """Maps at 1/4, 1/8, ... of normalised views (2B, 3, H, W), each (2B, C, h, w)."""
        prior = None if self.prior is None else self.prior(views)
        return self.backbone(views, prior)

    def raw_volume(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """The unfiltered volume (B, groups + 2 * concat channels, D, H/4, W/4)."""
        config = self.config
        features, projected = split_views(maps[0]), split_views(self.match_projection(maps[0]))
        return matching_volume(*features, *projected, config.num_disparities, config.num_correlation_groups)

    def forward(
        self,
        pixel_values: torch.Tensor,
        focal_length_px: torch.Tensor | None = None,
        baseline_m: torch.Tensor | None = None,
        output_disparity: bool = True,
        return_dict: bool | None = None,
    ) -> StereoEncoderOutput | tuple:
        """
        Args:
            pixel_values: (B, 2, 3, H, W) floating point in [0, 1], RGB, rectified, left view first; H and W multiples
                of 32.
            focal_length_px, baseline_m: (B,) horizontal focal length of the pixels as given here, after any resizing,
                and distance of the cameras; both together give the depth.
            output_disparity: False leaves out what only the disparity needs.
        """
        if self.training:
            hold_running_statistics(self)
        self.check_inputs(pixel_values)
        self.check_calibration(len(pixel_values), focal_length_px, baseline_m, output_disparity)
        chosen = self.config.features
        views = self.normalized_views(pixel_values)
        maps = self.extract_features(views)
        left_maps = [split_views(features)[0] for features in maps]
        correlation = all_pairs_correlation(*split_views(maps[0])) if chosen in ("correlation", "lookup") else None
        volume = filtered = logits = initial = refined = disparity = depth = None
        if chosen != "correlation" or output_disparity:
            volume = self.raw_volume(maps)
        if chosen in ("filtered_cost_volume", "lookup") or output_disparity:
            bins = volume.shape[4] if self.config.reachable_bins_only else volume.shape[2]
            filtered = self.filter(volume[:, :, :bins], left_maps[self.config.volume_stride - 1 :])
        if chosen == "lookup" or output_disparity:
            logits = self.classifier(filtered)
            regressed = regress_disparity(logits)
            # the same where volume_stride is 1
            initial = F.interpolate(regressed, size=maps[0].shape[-2:], mode="bilinear")
        if output_disparity:
            finest = 4 * regressed
            if self.refinement is not None:
                refined = self.refinement(views, maps[0], initial)
                finest = 2 * refined
            disparity = F.interpolate(finest, size=pixel_values.shape[-2:], mode="bilinear").squeeze(1)
        if focal_length_px is not None:
            focal, baseline = (value.float().view(-1, 1, 1) for value in (focal_length_px, baseline_m))
            depth = disparity_to_depth(disparity, focal, baseline)
        if chosen == "correlation":
            features = correlation.permute(0, 3, 1, 2)  # the right view's column becomes the channel
        elif chosen == "lookup":
            stride = self.config.volume_stride  # each pixel of the filtered volume stands for a patch of so many
            everywhere = filtered.repeat_interleave(stride, -1).repeat_interleave(stride, -2)
            features = lookup_features(
                everywhere, correlation, initial, self.config.lookup_levels, self.config.lookup_radius
            )
        else:
            volume = volume if chosen == "cost_volume" else fill_bins(filtered, self.config.num_disparities)
            features = volume.flatten(1, 2)
        output = StereoEncoderOutput(features.to(self.dtype), initial, refined, disparity, depth, logits)
        return output if return_dict is not False else output.to_tuple()


__all__ = ["StereoEncoderModel", "StereoEncoderOutput"]
