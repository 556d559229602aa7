"""The scale-invariant error of a depth map."""

import torch

EPSILON = 1e-6  # under the root, whose gradient would be infinite at a perfect prediction


def known_depth(depth: torch.Tensor) -> torch.Tensor:
    """Which pixels of depth maps in m are known, bool of the same shape; 0, negative, infinite and NaN are not."""
    return (depth > 0) & depth.isfinite()


def scale_invariant_losses(log_depth: torch.Tensor, depth: torch.Tensor, share: float) -> torch.Tensor:
    """sqrt(mean(y^2) - share * mean(y)^2) of each picture, with y = log_depth - log(depth) over its known pixels; 0 for
    pictures without any.

    Eigen et al. 2014 (arXiv 1406.2283, eq. 4), under a root as in DepthVLA; `share` is its lambda. Of each picture, not
    of the batch: then the losses of the parts of a batch add up.

    Args:
        log_depth, depth: (..., H, W); depth in m, see `known_depth`.
    """
    known = known_depth(depth)
    errors = torch.where(known, log_depth.float() - torch.where(known, depth, 1.0).float().log(), 0.0)
    number = known.sum((-2, -1)).clamp(min=1)
    squares, mean = errors.square().sum((-2, -1)) / number, errors.sum((-2, -1)) / number
    losses = ((squares - share * mean.square()).clamp(min=0) + EPSILON).sqrt()
    return losses * known.any(-1).any(-1)
