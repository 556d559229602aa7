"""Matching between rectified views as pure functions: correlation volumes, disparity regression, depth <-> disparity.

Disparity d is positive: pixel x of the left view matches x - d of the right one. Volumes are (B, C, D, H, W) at the
resolution of the features; bin d of a volume is a disparity of d feature pixels.
"""

import torch
import torch.nn.functional as F


def groupwise_correlation(
    left: torch.Tensor, right: torch.Tensor, num_disparities: int, num_groups: int
) -> torch.Tensor:
    """Cosine similarity of each group of channels at each disparity (Guo et al. 2019, arXiv 1903.04025).

    Args:
        left, right: features (B, C, H, W), C divisible by num_groups.
    Returns:
        (B, num_groups, D, H, W) in [-1, 1], at least float32; zero where x < d, for which the right view has no pixel.
    """
    batch, channels, height, width = left.shape
    if right.shape != left.shape:
        raise ValueError(f"the views' features differ in shape: left {tuple(left.shape)}, right {tuple(right.shape)}")
    if channels % num_groups:
        raise ValueError(f"{channels} feature channels cannot be split into num_groups = {num_groups}")
    # column g sums the channels of group g: with channels last, sums within groups are one matrix product, several
    # times faster on a CPU than reductions over a handful of channels
    dtype = torch.promote_types(left.dtype, torch.float32)
    groups = torch.eye(num_groups, device=left.device, dtype=dtype).repeat_interleave(channels // num_groups, dim=0)
    left, right = (normalize_groups(view.to(dtype).permute(0, 2, 3, 1), groups) for view in (left, right))
    return BandedProduct.apply(left, right, groups, num_disparities).permute(0, 4, 1, 2, 3)


def normalize_groups(features: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Features (..., C) scaled so that each group, a column of `groups` (C, G), has unit length."""
    squared = (features * features) @ groups
    return features * (squared.clamp_min(1e-24).rsqrt() @ groups.T)


class BandedProduct(torch.autograd.Function):
    """Sum over groups of left[x] * right[x - d] for each d: (B, H, W, C), (B, H, W, C), (C, G) -> (B, D, H, W, G).

    Its own gradient, because autograd pads each of the D shifted slices to full size: 176 ms forward and backward at
    (32, 32, 32, 32), D = 8 with autograd over (B, C, H, W), 50 ms so (one core).
    """

    @staticmethod
    def forward(ctx, left: torch.Tensor, right: torch.Tensor, groups: torch.Tensor, num_disparities: int):
        ctx.save_for_backward(left, right, groups)
        batch, height, width, _ = left.shape
        volume = left.new_zeros(batch, num_disparities, height, width, groups.shape[1])
        for d in range(min(num_disparities, width)):
            volume[:, d, :, d:] = (left[:, :, d:] * right[:, :, : width - d]) @ groups
        return volume

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        left, right, groups = ctx.saved_tensors
        width = left.shape[2]
        grad_left, grad_right = torch.zeros_like(left), torch.zeros_like(right)
        for d in range(min(grad.shape[1], width)):
            spread = grad[:, d, :, d:] @ groups.T  # (B, H, W - d, C)
            grad_left[:, :, d:].addcmul_(spread, right[:, :, : width - d])
            grad_right[:, :, : width - d].addcmul_(spread, left[:, :, d:])
        return grad_left, grad_right, None, None


def shifted_views(right: torch.Tensor, num_disparities: int) -> torch.Tensor:
    """Right features (B, C, H, W) moved onto the left view at each disparity: (B, C, D, H, W), zero where x < d."""
    width = right.shape[-1]
    padded = F.pad(right, (num_disparities - 1, 0))
    # window s of the padded row starts s - (D - 1) px left of the view, so it is disparity D - 1 - s
    return padded.unfold(-1, width, 1).flip(3).movedim(3, 2)


def matching_volume(
    left: torch.Tensor,
    right: torch.Tensor,
    projected_left: torch.Tensor,
    projected_right: torch.Tensor,
    num_disparities: int,
    num_groups: int,
) -> torch.Tensor:
    """[correlation, left at every disparity, right shifted by d] along the channels: (B, G + 2 P, D, H, W).

    The left part is not masked where x < d, as in FoundationStereo.

    Args:
        left, right: features to correlate, (B, C, H, W); in float32 also under autocast.
        projected_left, projected_right: features to concatenate, (B, P, H, W).
    """
    with torch.autocast(left.device.type, enabled=False):
        correlation = groupwise_correlation(left, right, num_disparities, num_groups)
    repeated = projected_left[:, :, None].expand(-1, -1, num_disparities, -1, -1)
    parts = [correlation.to(repeated.dtype), repeated, shifted_views(projected_right, num_disparities)]
    # channels last in memory: 3-D convolutions with few channels are 2 to 5 times faster so on a CPU
    return torch.cat([part.permute(0, 2, 3, 4, 1) for part in parts], dim=-1).permute(0, 4, 1, 2, 3)


def all_pairs_correlation(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of every left pixel with every right pixel of its row: (B, H, W_left, W_right), float32."""
    left = F.normalize(left.float(), dim=1).permute(0, 2, 3, 1)  # (B, H, W, C)
    right = F.normalize(right.float(), dim=1).permute(0, 2, 1, 3)  # (B, H, C, W)
    return left @ right


def regress_disparity(logits: torch.Tensor) -> torch.Tensor:
    """Expected disparity in feature pixels, (B, 1, H, W), float32, of scores (B, 1, D, H, W): a soft argmax over D."""
    shares = logits.float().softmax(2)
    bins = torch.arange(logits.shape[2], device=logits.device, dtype=shares.dtype)
    return torch.einsum("bcdhw,d->bchw", shares, bins)


def known_disparity(
    disparity_px: torch.Tensor, max_disparity: int, stride: int = 4
) -> tuple[torch.Tensor, torch.Tensor]:
    """What predictions at 1/stride of the resolution are compared with.

    Args:
        disparity_px: true disparity (B, H, W) in px of the left view, 0 = unknown; H and W multiples of the stride.
        max_disparity: of the volume, px, exclusive.
    Returns:
        truth (B, 1, H/stride, W/stride) float32 in px of that resolution, taken at the centre of each block, and where
        it is known and within the volume, bool of the same shape.
    """
    middle = stride // 2
    truth = disparity_px[:, None, middle::stride, middle::stride].float() / stride
    return truth, (truth > 0) & (truth < max_disparity / stride)


def disparity_loss(
    predicted: torch.Tensor,
    disparity_px: torch.Tensor,
    max_disparity: int,
    weight: torch.Tensor | None = None,
    beta: float = 1.0,
) -> torch.Tensor:
    """Sum of the smooth L1 losses of the known pixels, in px of the prediction's resolution: FoundationStereo's loss of
    its initial disparity, `predicted` (B, 1, H/4, W/4). At half of the resolution four pixels count as one.

    Args:
        weight: (B, H, W), factors on the losses; None = 1. beta: the error from which on the loss is linear.
    """
    stride = disparity_px.shape[-2] // predicted.shape[-2]
    truth, known = known_disparity(disparity_px, max_disparity, stride)
    losses = F.smooth_l1_loss(predicted.float(), truth, reduction="none", beta=beta) * known
    if weight is not None:
        losses = losses * weight[:, None, stride // 2 :: stride, stride // 2 :: stride]
    return losses.sum() * (stride / 4) ** 2


def sample_rows(rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Linear interpolation along the last axis, zero outside.

    Args:
        rows: (..., C, W).
        positions: (..., K), in entries of that axis.
    Returns:
        (..., C, K).
    """
    width = rows.shape[-1]
    floor = positions.floor()
    fraction = (positions - floor).unsqueeze(-2)
    sampled = 0
    for index, weight in ((floor.long(), 1 - fraction), (floor.long() + 1, fraction)):
        inside = ((index >= 0) & (index < width)).unsqueeze(-2)
        index = index.clamp(0, width - 1).unsqueeze(-2).expand(*rows.shape[:-1], -1)
        sampled = sampled + rows.gather(-1, index) * weight * inside
    return sampled


def lookup_features(
    volume: torch.Tensor, correlation: torch.Tensor, disparity: torch.Tensor, levels: int, radius: int
) -> torch.Tensor:
    """Volume and correlation in a window around a disparity, from a pyramid over the disparity.

    As in IGEV-Stereo (Xu et al. 2023, arXiv 2303.06615).

    Args:
        volume: (B, C, D, H, W). correlation: all pairs (B, H, W, W). disparity: (B, 1, H, W) in feature pixels.
    Returns:
        (B, levels * (C + 1) * (2 radius + 1), H, W): for each level the volume (channel-major), then the correlation.
    """
    offsets = torch.arange(-radius, radius + 1, device=volume.device, dtype=torch.float32)
    disparity = disparity.float().squeeze(1).unsqueeze(-1)  # (B, H, W, 1)
    columns = torch.arange(disparity.shape[2], device=volume.device, dtype=torch.float32)[:, None]
    volume = volume.float().permute(0, 3, 4, 1, 2)  # (B, H, W, C, D)
    correlation = correlation.float().unsqueeze(-2)  # (B, H, W, 1, W)
    sampled = []
    for level in range(levels):
        if level:
            volume, correlation = (
                F.avg_pool2d(rows.flatten(1, 2), (1, 2)).unflatten(1, rows.shape[1:3]) for rows in (volume, correlation)
            )
        sampled.append(sample_rows(volume, disparity / 2**level + offsets).flatten(3))
        sampled.append(sample_rows(correlation, (columns - disparity) / 2**level + offsets).flatten(3))
    return torch.cat(sampled, dim=-1).permute(0, 3, 1, 2)


def disparity_to_depth(
    disparity_px: torch.Tensor, focal_length_px: torch.Tensor, baseline_m: torch.Tensor
) -> torch.Tensor:
    """Planar depth in m of a disparity in px of the same image; infinite where the disparity is 0."""
    return focal_length_px * baseline_m / disparity_px


def depth_to_disparity(depth_m: torch.Tensor, focal_length_px: torch.Tensor, baseline_m: torch.Tensor) -> torch.Tensor:
    """Disparity in px of a planar depth in m; the inverse of `disparity_to_depth`."""
    return focal_length_px * baseline_m / depth_m
