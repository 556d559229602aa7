"""Points: where in the robot's frame the pixels of the left view are, of the stereo encoder's disparity and the
calibration.

Not in the papers: an option. A camera that stands elsewhere in every episode tells a policy little by depth alone,
which has to pass through a transformation that the policy would have to infer; points in the frame of the actions are
what it looks for. They are channels of the visual tokens, beside the depth that answers tell, and, at the resolution of
the disparity, what the pointers read out.
"""

import torch
import torch.nn.functional as F

POINT_LIMIT = 4.0  # of a coordinate, and of a depth in m: the background may be far away
CELLS = 2  # points of a token, along each side, that are among its channels
NUM_CHANNELS = 4 * CELLS**2 + 2  # with the depth, and two that say which frame they are in
SMALLEST_PX = 0.5  # disparity, that of what is further away


def points_of_disparity(disparity: torch.Tensor, transform: torch.Tensor, frame: torch.Tensor, size: int):
    """Points and their depths (B, 4, h, w) float32 of a square view of side `size` px, zeros where `frame` is 0.

    Args:
        disparity: (B, 1, h, w) in px of that view. transform: (B, 4, 4), frame: (B,), of the processor.
    """
    height, width = disparity.shape[-2:]
    inverse = 1 / disparity.float().clamp(min=SMALLEST_PX)
    v, u = torch.meshgrid(
        (torch.arange(height, device=disparity.device) + 0.5) * (size / height),
        (torch.arange(width, device=disparity.device) + 0.5) * (size / width),
        indexing="ij",
    )
    rays = torch.cat([u * inverse, v * inverse, inverse, torch.ones_like(inverse)], dim=1)
    points = (transform.float() @ rays.flatten(2)).unflatten(2, (height, width))
    return points.clamp(-POINT_LIMIT, POINT_LIMIT) * (frame > 0).view(-1, 1, 1, 1)


def point_channels(points: torch.Tensor, frame: torch.Tensor, grid: int) -> torch.Tensor:
    """(B, grid * grid, NUM_CHANNELS): means of the points and depths over the quarters of a token, and the frame."""
    means = F.adaptive_avg_pool2d(points, CELLS * grid)
    means = means.unflatten(3, (grid, CELLS)).unflatten(2, (grid, CELLS))  # (B, 4, grid, CELLS, grid, CELLS)
    means = means.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    known = torch.stack([frame == 1, frame == 2], dim=-1).to(means.dtype)
    return torch.cat([means, known[:, None].expand(-1, means.shape[1], -1)], dim=-1)


def in_tokens(points: torch.Tensor, grid: int) -> torch.Tensor:
    """Points (B, 3, h, w) by token and, in row order, its cells: (B, grid * grid, cells, 3)."""
    cells = points.shape[-1] // grid
    parts = points.unflatten(3, (grid, cells)).unflatten(2, (grid, cells))
    return parts.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)
