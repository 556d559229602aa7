"""Sharper disparity: what the filtered volume found is searched once more nearby, at half of the picture's resolution.

Not in FoundationStereo, whose own refinement iterates (arXiv 2501.09898, section 3.3) and which StereoVLA does not use;
an option for small encoders. A volume fine enough for an object of 3 cm costs a CPU ten times a coarse one; the two
views matched once more around the coarse answer cost as much as the coarse one again.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .cost_volume import normalize_groups
from .edgenext import instance_norm


def correlation_around(left: torch.Tensor, right: torch.Tensor, centre: torch.Tensor, radius: int, num_groups: int):
    """Cosine similarity of each group of channels at the whole disparities from `centre` - radius to `centre` + radius.

    Args:
        left, right: features (B, C, H, W), C divisible by num_groups. centre: (B, H, W) int64, in px of these.
    Returns:
        (B, (2 radius + 1) * num_groups, H, W) float32, the groups of a disparity in turn; zero where the right view has
        no pixel.
    """
    channels, width = left.shape[1], left.shape[3]
    groups = torch.eye(num_groups, device=left.device).repeat_interleave(channels // num_groups, dim=0)
    left, right = (normalize_groups(view.float().permute(0, 2, 3, 1), groups) for view in (left, right))
    offsets = torch.arange(-radius, radius + 1, device=left.device)
    columns = torch.arange(width, device=left.device)[:, None] - centre[..., None] - offsets  # (B, H, W, K)
    inside = (columns >= 0) & (columns < width)
    index = columns.clamp(0, width - 1).flatten(2)[..., None].expand(-1, -1, -1, channels)
    seen = right.gather(2, index).unflatten(2, (width, len(offsets)))  # (B, H, W, K, C)
    correlation = ((left[..., None, :] * seen) @ groups) * inside[..., None]
    return correlation.flatten(3).permute(0, 3, 1, 2)


REFINEMENT_GROUPS = 2  # of the correlation


class DisparityRefinement(nn.Module):
    """Disparity at a quarter of the resolution -> at half of it.

    Both views get features at half resolution, of their own pixels and of the backbone's maps. Around the given
    disparity, rounded to whole bins, their correlation says where within `refinement_radius` bins the match is.
    """

    def __init__(self, config):
        super().__init__()
        channels, context = config.refinement_channels, config.map_channels[0]
        self.radius, self.groups = config.refinement_radius, REFINEMENT_GROUPS
        self.pixels = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.context = nn.Conv2d(context, channels, 1)
        self.features = nn.Conv2d(channels, channels, 3, padding=1)
        candidates, width = 2 * self.radius + 1, 2 * channels
        self.near = nn.Conv2d(self.groups * candidates + channels + 1, width, 3, padding=1)
        self.wide = nn.Conv2d(width, width, 3, padding=2, dilation=2)
        self.score = nn.Conv2d(width, candidates, 3, padding=1)

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
        coarse = 2 * F.interpolate(disparity.detach(), size=left.shape[-2:], mode="bilinear")
        centre = coarse.round().long()
        with torch.autocast(left.device.type, enabled=False):
            window = correlation_around(left, right, centre[:, 0], self.radius, self.groups)
        window = window.to(left.dtype)
        hidden = F.relu(self.near(torch.cat([window, F.relu(left), (coarse - centre).to(left.dtype)], dim=1)))
        scores = self.score(hidden + F.relu(self.wide(hidden)))
        shares = scores.float().softmax(1)
        offsets = torch.arange(-self.radius, self.radius + 1, device=left.device, dtype=shares.dtype)
        return centre + torch.einsum("bkhw,k->bhw", shares, offsets)[:, None]
