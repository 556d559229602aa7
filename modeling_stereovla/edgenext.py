"""Convolutional features of the stereo branch: an EdgeNeXt encoder and the decoder back to 1/4 of the resolution.

EdgeNeXt: Maaz et al. 2022, arXiv 2206.10589. Sizes and order of operations as in FoundationStereo (arXiv 2501.09898).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

NORM_EPS = 1e-6  # LayerNorm epsilon of EdgeNeXt


def instance_norm(features: torch.Tensor) -> torch.Tensor:
    """Each channel of each sample of (B, C, H, W) to mean 0 and variance 1."""
    if features.shape[1] >= 64:
        return F.instance_norm(features)
    # torch returns channels first. With few channels the next convolution then takes longer on a CPU: forward and
    # backward of 3x3 on (64, 32, 32, 32) 79 ms against 34 ms with channels last, on (64, 16, 32, 32) 35 against 21.
    if features.device.type != "cpu" or features.dtype not in (torch.float32, torch.float64):
        return F.instance_norm(features).contiguous(memory_format=torch.channels_last)
    # and it copies what has its channels last, twice: 3.0 against 0.5 ms without gradients on (38, 32, 24, 24)
    features = features.contiguous(memory_format=torch.channels_last)
    centred = features - features.mean((2, 3), keepdim=True)
    return centred * (centred.square().mean((2, 3), keepdim=True) + 1e-5).rsqrt()


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PixelMLP(nn.Module):
    """Norm, expand by 4, exact GELU, contract, layer scale; on (..., C)."""

    def __init__(self, channels: int, layer_scale: float):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)
        self.layer_scale = LayerScale(channels, layer_scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layer_scale(self.contract(F.gelu(self.expand(self.norm(tokens)))))


class LayerScale(nn.Module):
    """Learned factor per channel, of (..., C)."""

    def __init__(self, channels: int, value: float):
        super().__init__()
        self.value = value
        self.scale = nn.Parameter(torch.full((channels,), value))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens * self.scale


class ConvolutionBlock(nn.Module):
    """Depthwise convolution and MLP with a residual connection; (B, C, H, W) in and out."""

    def __init__(self, channels: int, kernel_size: int, layer_scale: float):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.mlp = PixelMLP(channels, layer_scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = self.depthwise(features).permute(0, 2, 3, 1)  # (B, H, W, C)
        return features + self.mlp(tokens).permute(0, 3, 1, 2)


class CrossCovarianceAttention(nn.Module):
    """Attention between channels instead of positions (Ali et al. 2021, arXiv 2106.09681): linear in H*W."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, count, channels = tokens.shape
        qkv = self.qkv(tokens).view(batch, count, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # (B, heads, C / heads, N)
        weights = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        mixed = (weights * self.temperature).softmax(-1) @ value
        return self.out(mixed.permute(0, 3, 1, 2).reshape(batch, count, channels))


class FourierPosition(nn.Module):
    """Sines and cosines of the row and column, projected to the channels of the map."""

    def __init__(self, channels: int, hidden: int = 32):
        super().__init__()
        self.hidden = hidden
        self.projection = nn.Conv2d(2 * hidden, channels, 1)

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Encoding (1, height * width, C)."""
        weight = self.projection.weight
        periods = 10000 ** (2 * torch.arange(self.hidden // 2, device=weight.device) / self.hidden)

        def encode(length: int) -> torch.Tensor:
            steps = torch.arange(1, length + 1, device=weight.device, dtype=torch.float32)
            angles = (steps / (length + 1e-6) * 2 * math.pi)[:, None] / periods  # (length, hidden / 2)
            return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (length, hidden)

        rows = encode(height)[:, None].expand(height, width, self.hidden)
        columns = encode(width)[None].expand(height, width, self.hidden)
        grid = torch.cat([rows, columns], dim=-1).permute(2, 0, 1)[None].to(weight.dtype)
        return self.projection(grid).flatten(2).transpose(1, 2)


class SplitAttentionBlock(nn.Module):
    """Cascaded depthwise convolutions over channel splits, cross-covariance attention, MLP; (B, C, H, W) in and out."""

    def __init__(self, channels: int, splits: int, heads: int, layer_scale: float, with_position: bool):
        super().__init__()
        width = math.ceil(channels / splits)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in range(splits - 1)
        )
        self.position = FourierPosition(channels) if with_position else None
        self.attention_norm = nn.LayerNorm(channels, eps=NORM_EPS)
        self.attention = CrossCovarianceAttention(channels, heads)
        self.attention_scale = LayerScale(channels, layer_scale)
        self.mlp = PixelMLP(channels, layer_scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = features.shape
        parts = list(features.chunk(len(self.convolutions) + 1, dim=1))
        for index, convolution in enumerate(self.convolutions):
            # each split sees the result of the one before it, so later splits have a larger receptive field
            parts[index] = convolution(parts[index] if index == 0 else parts[index] + parts[index - 1])
        tokens = torch.cat(parts, dim=1).flatten(2).transpose(1, 2)  # (B, H * W, C)
        if self.position is not None:
            tokens = tokens + self.position(height, width)
        tokens = tokens + self.attention_scale(self.attention(self.attention_norm(tokens)))
        return features + self.mlp(tokens).transpose(1, 2).reshape(batch, channels, height, width)


class EdgeNeXtStage(nn.Module):
    """Downsampling by 2 (except in the first stage) and the blocks of one resolution."""

    def __init__(self, config, index: int):
        super().__init__()
        channels, depth = config.edgenext_channels[index], config.edgenext_depths[index]
        splits, scale = config.edgenext_splits[index], config.layer_scale_init_value
        self.downsample = nn.Identity()
        if index > 0:
            previous = config.edgenext_channels[index - 1]
            self.downsample = nn.Sequential(ChannelLayerNorm(previous), nn.Conv2d(previous, channels, 2, stride=2))
        blocks = [
            ConvolutionBlock(channels, config.edgenext_kernel_sizes[index], scale)
            for _ in range(depth - 1 if splits else depth)
        ]
        if splits:
            # the published network encodes positions in the first attention block only
            first = not any(config.edgenext_splits[:index])
            blocks.append(SplitAttentionBlock(channels, splits, config.edgenext_heads, scale, with_position=first))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.downsample(features))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm; `activate_branch` puts a ReLU on the branch before the sum."""

    def __init__(self, channels: int, bias: bool, activate_branch: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.activate_branch = activate_branch

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        branch = instance_norm(self.conv2(F.relu(instance_norm(self.conv1(features)))))
        return F.relu(features + (F.relu(branch) if self.activate_branch else branch))


class UpsamplingBlock(nn.Module):
    """Doubles the resolution, joins the encoder's map of that resolution and mixes both."""

    def __init__(self, channels: int, skip_channels: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(channels, skip_channels, 4, stride=2, padding=1, bias=False)
        self.mix = ResidualBlock(2 * skip_channels, bias=False, activate_branch=False)

    def forward(self, features: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        upsampled = F.leaky_relu(instance_norm(self.upsample(features)))
        return self.mix(torch.cat([upsampled, skip], dim=1))


class StereoFeatures(nn.Module):
    """Multi-scale features of single views.

    forward: normalised RGB (B, 3, H, W), H and W divisible by 32, and the frozen ViT's features (B, P, H/4, W/4) or
    None -> list of maps at 1/4, 1/8, ... of the image, the first of which is matched between the views.
    """

    def __init__(self, config):
        super().__init__()
        widths = config.edgenext_channels
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, stride=4), ChannelLayerNorm(widths[0]))
        self.stages = nn.ModuleList(EdgeNeXtStage(config, index) for index in range(len(widths)))
        self.upsampling = nn.ModuleList(  # coarse to fine
            UpsamplingBlock(config.map_channels[level + 1], widths[level]) for level in reversed(range(len(widths) - 1))
        )
        matching = config.map_channels[0]
        self.fuse = nn.Conv2d(matching, matching, 3, padding=1, bias=False)
        self.refine = nn.Sequential(
            *(ResidualBlock(matching, bias=True, activate_branch=True) for _ in range(config.num_refine_blocks))
        )

    def forward(self, images: torch.Tensor, prior: torch.Tensor | None = None) -> list[torch.Tensor]:
        features = self.stem(images)  # channels last in memory from here on: its norm is over the last axis
        maps = []
        for stage in self.stages:
            features = stage(features)
            maps.append(features)
        for level, block in zip(reversed(range(len(maps) - 1)), self.upsampling, strict=True):
            maps[level] = block(maps[level + 1], maps[level])
        finest = maps[0] if prior is None else torch.cat([maps[0], prior.to(maps[0].dtype)], dim=1)
        maps[0] = self.refine(F.leaky_relu(instance_norm(self.fuse(finest))))
        return maps
