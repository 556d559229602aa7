"""Learned filtering of a cost volume: axial-planar hourglass, gates from the left view, transformer over disparities.

Volumes are (B, C, D, H, W) throughout. Structure after FoundationStereo (arXiv 2501.09898, section 3.3).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_stereo_encoder import DISPARITY_PATCH


class OneTapConvolution(nn.Conv3d):
    """3-D convolution with a single tap across the image: (taps, 1, 1), padded to keep the size."""

    def __init__(self, channels: int, out_channels: int, taps: int = 1, bias: bool = True):
        super().__init__(channels, out_channels, (taps, 1, 1), padding=(taps // 2, 0, 0), bias=bias)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        if volume.device.type != "cpu":
            return super().forward(volume)
        # On one CPU thread torch gives these kernels to its reference implementation unless they are dilated, and a
        # dilation does nothing where there is one tap: 1513 ms against 162 ms for 17 taps at (1, 28, 104, 56, 56), and
        # 0.64 of the time for FoundationStereo's whole ViT-S encoder at 224 px. And always in float32: in bfloat16 the
        # gradient of the weights, dilated or not, holds memory that nobody wrote (torch 2.13).
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else volume.dtype
        work = torch.promote_types(volume.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(work)
        with torch.autocast("cpu", enabled=False):
            result = F.conv3d(volume.to(work), self.weight.to(work), bias, 1, self.padding, (1, 2, 2))
        return result.to(dtype)


def repeat_bin(volume: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """(B, C, D, H, W) with bin `index` standing `count` times: (B, C, D + count - 1, H, W)."""
    if count == 1:
        return volume
    rows = volume.permute(0, 2, 3, 4, 1)  # so that the result is again channels last in memory
    repeated = rows[:, index : index + 1].expand(-1, count, -1, -1, -1)
    return torch.cat([rows[:, :index], repeated, rows[:, index + 1 :]], dim=1).permute(0, 4, 1, 2, 3)


class VolumeConvolution(nn.Module):
    """3-D convolution without bias, batch norm, leaky ReLU; `transposed` doubles the resolution (4x4x4, stride 2)."""

    def __init__(
        self, channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, transposed: bool = False
    ):
        super().__init__()
        if transposed:
            self.convolution = nn.ConvTranspose3d(channels, out_channels, 4, stride=2, padding=1, bias=False)
        elif kernel_size == 1:
            self.convolution = OneTapConvolution(channels, out_channels, bias=False)
        else:
            padding = kernel_size // 2
            self.convolution = nn.Conv3d(channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm = nn.BatchNorm3d(out_channels)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.norm(self.convolution(volume)))


class ResidualVolumeBlock(nn.Module):
    """Two 3x3x3 convolutions with batch norm and a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm3d(channels)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        branch = F.relu(self.norm1(self.conv1(volume)))
        return F.relu(volume + self.norm2(self.conv2(branch)))


class AxialPlanarConvolution(nn.Module):
    """A 3x3 convolution within each disparity plane, then a long one along the disparity: cheaper than a 3-D kernel."""

    def __init__(self, channels: int, disparity_kernel_size: int):
        super().__init__()
        self.planar = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))
        self.planar_norm = nn.BatchNorm3d(channels)
        self.axial = OneTapConvolution(channels, channels, disparity_kernel_size)
        self.axial_norm = nn.BatchNorm3d(channels)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        volume = F.relu(self.planar_norm(self.planar(volume)))
        return F.relu(self.axial_norm(self.axial(volume)))


class FeatureGate(nn.Module):
    """Scales the channels of a volume by a sigmoid of the left view's features at the same pixel."""

    def __init__(self, feature_channels: int, volume_channels: int):
        super().__init__()
        hidden = feature_channels // 2
        self.reduce = nn.Conv2d(feature_channels, hidden, 1, bias=False)
        self.norm = nn.BatchNorm2d(hidden)
        self.expand = nn.Conv2d(hidden, volume_channels, 1)

    def forward(self, volume: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        gate = self.expand(F.leaky_relu(self.norm(self.reduce(features))))
        return volume * gate.sigmoid().unsqueeze(2)


def sinusoidal_positions(length: int, channels: int, device: torch.device) -> torch.Tensor:
    """(length, channels): interleaved sines and cosines of the position (Vaswani et al. 2017, section 3.5)."""
    frequencies = torch.exp(torch.arange(0, channels, 2, device=device) * (-math.log(10000.0) / channels))
    angles = torch.arange(length, device=device)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class DisparityLayer(nn.Module):
    """Post-norm transformer layer over the disparity tokens of one location, (N, D, C).

    layout "heads" lets the heads of each token attend to each other instead, which is what the published code computes
    since its commit c1ee07e, where the scaled dot product is called on (N, D, heads, C / heads).
    """

    def __init__(self, channels: int, heads: int, dropout: float, layout: str):
        super().__init__()
        self.heads, self.layout = heads, layout
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.attention_norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, channels)
        self.contract = nn.Linear(channels, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        heads = [project(tokens).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value)]
        if self.layout == "disparity":
            mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in heads)).transpose(1, 2)
        else:
            mixed = F.scaled_dot_product_attention(*heads)
        return self.out(mixed.flatten(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.attention_norm(tokens + self.dropout(self.attend(tokens)))
        hidden = self.dropout(F.gelu(self.expand(tokens)))
        return self.mlp_norm(tokens + self.dropout(self.contract(hidden)))


class DisparityTransformer(nn.Module):
    """Attention along the disparity at a quarter of the volume's resolution; (B, C, D, H, W) in and out."""

    def __init__(self, config):
        super().__init__()
        channels = config.volume_channels
        self.patch = nn.Conv3d(channels, channels, DISPARITY_PATCH, stride=DISPARITY_PATCH, groups=channels)
        self.patch_norm = nn.BatchNorm3d(channels)
        self.layers = nn.Sequential(
            *(
                DisparityLayer(channels, config.num_disparity_heads, config.disparity_dropout, config.attention_layout)
                for _ in range(config.num_disparity_layers)
            )
        )

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        patches = self.patch_norm(self.patch(volume))
        batch, channels, depth, height, width = patches.shape
        tokens = patches.permute(0, 3, 4, 2, 1).reshape(-1, depth, channels)
        tokens = self.layers(tokens + sinusoidal_positions(depth, channels, tokens.device).to(tokens.dtype))
        patches = tokens.view(batch, height, width, depth, channels).permute(0, 4, 3, 1, 2)
        return F.interpolate(patches, scale_factor=DISPARITY_PATCH, mode="trilinear", align_corners=False)


class HourglassDown(nn.Module):
    """Halves the volume's resolution; gated by the left view's features of the new resolution."""

    def __init__(self, channels: int, out_channels: int, feature_channels: int, kernel_size: int):
        super().__init__()
        self.reduce = VolumeConvolution(channels, out_channels, stride=2)
        self.mix = AxialPlanarConvolution(out_channels, kernel_size)
        self.gate = FeatureGate(feature_channels, out_channels)

    def forward(self, volume: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.gate(self.mix(self.reduce(volume)), features)


class HourglassUp(nn.Module):
    """Doubles the volume's resolution and joins the volume of the way down; gated."""

    def __init__(self, channels: int, out_channels: int, feature_channels: int, kernel_size: int, num_blocks: int):
        super().__init__()
        self.upsample = VolumeConvolution(channels, out_channels, transposed=True)
        self.join = VolumeConvolution(2 * out_channels, out_channels, kernel_size=1)
        self.mix = nn.Sequential(*(AxialPlanarConvolution(out_channels, kernel_size) for _ in range(num_blocks)))
        self.gate = FeatureGate(feature_channels, out_channels)

    def forward(self, volume: torch.Tensor, skip: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.upsample(volume), skip], dim=1)
        return self.gate(self.mix(self.join(joined)), features)


class Hourglass(nn.Module):
    """Filters a volume over growing and shrinking contexts, and adds the disparity transformer's long-range view.

    forward: volume (B, C, D, H, W) and the left view's features at 1/2, 1/4, ... of its resolution -> volume >= 0.
    """

    def __init__(self, config):
        super().__init__()
        widths, kernel = (config.volume_channels, *config.hourglass_channels), config.disparity_kernel_size
        blocks, levels = config.num_hourglass_blocks, len(config.hourglass_channels)
        features = config.volume_map_channels[1:]
        self.down = nn.ModuleList(HourglassDown(widths[i], widths[i + 1], features[i], kernel) for i in range(levels))
        self.up = nn.ModuleList(
            HourglassUp(widths[i + 1], widths[i], features[i - 1], kernel, blocks) for i in reversed(range(1, levels))
        )
        self.restore = VolumeConvolution(widths[1], widths[0], transposed=True)
        self.transformer = DisparityTransformer(config) if config.num_disparity_layers else None
        self.output = nn.Sequential(*(AxialPlanarConvolution(widths[0], kernel) for _ in range(blocks)))

    def forward(self, volume: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        skips, filtered = [], volume  # there may be more maps than levels
        for block, feature in zip(self.down, features, strict=False):
            filtered = block(filtered, feature)
            skips.append(filtered)
        for level, block in zip(reversed(range(len(skips) - 1)), self.up, strict=True):
            filtered = block(filtered, skips[level], features[level])
        filtered = self.restore(filtered)
        if self.transformer is not None:
            filtered = filtered + self.transformer(volume)
        return self.output(filtered)


class CostFilter(nn.Module):
    """Raw volume (B, V, D, H, W) -> filtered volume (B, C, D, H / stride, W / stride), non-negative.

    features: the left view's maps at the filtered volume's resolution and coarser.
    """

    def __init__(self, config):
        super().__init__()
        channels = config.volume_channels
        raw = config.num_correlation_groups + 2 * config.num_concat_channels
        if config.volume_stride == 1:
            self.project = OneTapConvolution(raw, channels)
        else:
            patch = (1, config.volume_stride, config.volume_stride)
            self.project = nn.Conv3d(raw, channels, patch, stride=patch)
        self.stem = VolumeConvolution(channels, channels, config.stem_kernel_size)
        self.blocks = nn.Sequential(*(ResidualVolumeBlock(channels) for _ in range(config.num_stem_blocks)))
        self.gate = FeatureGate(config.volume_map_channels[0], channels)
        self.hourglass = Hourglass(config)
        # how many bins away the convolutions before the hourglass see
        self.reach = config.stem_kernel_size // 2 + 2 * config.num_stem_blocks

    def forward(self, volume: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """The raw volume must be one of `matching_volume`: its bins from W on are alike."""
        bins, width = volume.shape[2], volume.shape[4]
        alike = self.alike_bins(bins, width)
        volume = self.blocks(self.stem(self.project(volume[:, :, : bins - alike + 1])))
        volume = repeat_bin(self.gate(volume, features[0]), width + self.reach, alike)
        return self.hourglass(volume, features[1:])

    def alike_bins(self, bins: int, width: int) -> int:
        """How many bins before the hourglass are alike, so that one is computed for all; they begin at W + reach.

        In the raw volume the bins from W on hold the left view alone, since no pixel of the right one is so far away.
        What the convolutions make of them is alike where they see neither the bins before them nor the border. Beyond,
        nothing is: the 17 taps of the first hourglass level leave 2 bins, and the disparity transformer knows places.
        Not in training, where every bin counts in the batch statistics. FoundationStereo's ViT-S encoder at 224 px
        then takes 0.88 of the time (one thread, median of 6).
        """
        return 1 if self.training else max(1, bins - width - 2 * self.reach)


class DisparityClassifier(nn.Module):
    """Score of each disparity, (B, 1, D, H, W), of a filtered volume (B, C, D, H, W)."""

    def __init__(self, config):
        super().__init__()
        channels, (first, last) = config.volume_channels // 2, config.classifier_kernel_sizes
        self.reduce = VolumeConvolution(config.volume_channels, channels, first)
        self.blocks = nn.Sequential(*(ResidualVolumeBlock(channels) for _ in range(config.num_classifier_blocks)))
        self.score = nn.Conv3d(channels, 1, last, padding=last // 2)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return self.score(self.blocks(self.reduce(volume)))
