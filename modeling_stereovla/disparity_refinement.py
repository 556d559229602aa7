"""Sharper disparity: what the filtered volume found is searched once more nearby, at half of the picture's resolution.

Not in FoundationStereo, whose own refinement iterates (arXiv 2501.09898, section 3.3) and which StereoVLA does not use;
an option for small encoders. A volume fine enough for an object of 3 cm costs a CPU ten times a coarse one; the two
views matched once more around the coarse answer cost as much as the coarse one again.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .cost_volume import groupwise_correlation
from .edgenext import instance_norm


def window_around(volume: torch.Tensor, centre: torch.Tensor, radius: int) -> torch.Tensor:
    """The bins of a volume (B, C, D, H, W) from `centre` - radius to `centre` + radius, zero where it has none.

    Args:
        centre: (B, 1, H, W) int64.
    Returns:
        (B, C, 2 radius + 1, H, W).
    """
    offsets = torch.arange(-radius, radius + 1, device=volume.device).view(1, -1, 1, 1)
    bins = centre + offsets  # (B, K, H, W)
    inside = (bins >= 0) & (bins < volume.shape[2])
    bins = bins.clamp(0, volume.shape[2] - 1)[:, None].expand(-1, volume.shape[1], -1, -1, -1)
    return volume.gather(2, bins) * inside[:, None]


class DisparityRefinement(nn.Module):
    """Disparity at a quarter of the resolution -> at half of it.

    Both views get features at half resolution, of their own pixels and of the backbone's maps. Around the given
    disparity, rounded to whole bins, their correlation says where within `refinement_radius` bins the match is.
    """

    def __init__(self, config):
        super().__init__()
        channels, context = config.refinement_channels, config.map_channels[0]
        self.radius, self.groups = config.refinement_radius, config.num_correlation_groups
        self.num_bins = config.max_disparity // 2
        self.pixels = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.context = nn.Conv2d(context, channels, 1)
        self.features = nn.Conv2d(channels, channels, 3, padding=1)
        window = self.groups * (2 * self.radius + 1)
        width = 2 * channels
        self.near = nn.Conv2d(window + channels + 1, width, 3, padding=1)
        self.wide = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.score = nn.Conv2d(width, 2 * self.radius + 1, 3, padding=1)

    def forward(self, views: torch.Tensor, maps: torch.Tensor, disparity: torch.Tensor) -> torch.Tensor:
        """(B, 1, H/2, W/2) float32 in px at half of the resolution.

        Args:
            views: (2B, 3, H, W) normalised, left and right of each pair in turn; maps: (2B, C, H/4, W/4) of them.
            disparity: (B, 1, H/4, W/4) in px at a quarter of the resolution.
        """
        pixels = self.pixels(views)
        context = F.interpolate(self.context(maps), size=pixels.shape[-2:], mode="nearest")
        features = F.relu(instance_norm(pixels + context))
        features = features + self.features(features)
        left, right = features[0::2], features[1::2]
        with torch.autocast(left.device.type, enabled=False):
            volume = groupwise_correlation(left, right, self.num_bins, self.groups)
        coarse = 2 * F.interpolate(disparity.detach(), size=left.shape[-2:], mode="bilinear")
        centre = coarse.round().long()
        window = window_around(volume, centre, self.radius).flatten(1, 2).to(left.dtype)
        hidden = F.relu(self.near(torch.cat([window, F.relu(left), (coarse - centre).to(left.dtype)], dim=1)))
        scores = self.score(hidden + F.relu(self.wide(hidden)))
        offsets = torch.arange(-self.radius, self.radius + 1, device=left.device, dtype=torch.float32)
        return centre + torch.einsum("bkhw,k->bhw", scores.float().softmax(1), offsets)[:, None]
