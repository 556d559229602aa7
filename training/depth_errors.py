"""How wrong predicted depth maps are: the measures of the literature, and the best constants beside them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stereovla.modeling_stereovla.depth_loss import EPSILON, known_depth, scale_invariant_losses
from stereovla.training.map_pictures import ROWS, draw_maps

DELTA = 1.25  # a pixel within this factor of the truth is right
MEASURES = {
    "abs_rel": "mean absolute error relative to the truth",
    "rmse_m": "root of the mean squared error, m",
    "delta_1_25": "share of the pixels within a factor of 1.25 (higher is better)",
    "l_si": "scale-invariant error in the logarithm (the loss)",
}


def depth_errors(predicted: torch.Tensor | float, truth: torch.Tensor, silog_lambda: float) -> dict[str, float]:
    """{name of `MEASURES`: error}, and "unknown", the share of the pixels without truth. The first three are over the
    known pixels of all pictures together, the last is the mean over pictures (`depth_loss.scale_invariant_losses`).

    Args:
        predicted: (B, H, W) m, above 0, or a number that is predicted everywhere.
        truth: (B, H, W) m, see `known_depth`.
    """
    known = known_depth(truth)
    if not known.any():
        raise ValueError(f"none of {truth.numel()} pixels has a known depth")
    predicted = torch.as_tensor(predicted, dtype=torch.float64).expand(truth.shape)
    mine, true = predicted[known], truth[known].double()
    losses = scale_invariant_losses(predicted.log(), truth, silog_lambda)
    pictures = known.any(-1).any(-1).sum()
    return {
        "abs_rel": ((mine - true).abs() / true).mean().item(),
        "rmse_m": (mine - true).square().mean().sqrt().item(),
        "delta_1_25": (torch.maximum(mine / true, true / mine) < DELTA).double().mean().item(),
        "l_si": (losses.double().sum() / pictures).item(),
        "unknown": 1 - known.double().mean().item(),
    }


@dataclass(frozen=True)
class BestConstants:
    """The constant depth, m, that is best for each measure on some pictures."""

    constants: dict[str, float]

    @classmethod
    def of(cls, truth: torch.Tensor, silog_lambda: float) -> "BestConstants":
        """Of depth maps (B, H, W) m."""
        depths = np.sort(truth[known_depth(truth)].double().numpy())
        if not len(depths):
            raise ValueError(f"none of {truth.numel()} pixels of the training data has a known depth")
        # sum of |c / d - 1| is a sum of |c - d| with weights 1 / d: a weighted median
        weights = np.cumsum(1 / depths)
        median = depths[np.searchsorted(weights, weights[-1] / 2)]
        # a constant is right for what lies within a factor of 1.25 to both sides: the fullest such window
        ends = np.searchsorted(depths, depths * DELTA**2 * (1 - 1e-12))
        first = int(np.argmax(ends - np.arange(len(depths))))
        middle = np.sqrt(depths[first] * depths[ends[first] - 1])
        constants = {"abs_rel": median, "rmse_m": depths.mean(), "delta_1_25": middle}
        constants["l_si"] = best_for_l_si(truth, silog_lambda)
        return cls({name: float(value) for name, value in constants.items()})

    def errors(self, truth: torch.Tensor, silog_lambda: float) -> dict[str, float]:
        """Each measure with its own constant; arguments as of `depth_errors`."""
        return {name: depth_errors(value, truth, silog_lambda)[name] for name, value in self.constants.items()}


def best_for_l_si(truth: torch.Tensor, silog_lambda: float) -> float:
    """The constant with the smallest mean L_si: of each picture it is a convex function of the constant's logarithm."""
    logs = [picture[known_depth(picture)].double().log() for picture in truth]
    means = np.array([part.mean().item() for part in logs if len(part)])
    spreads = np.array([part.var(correction=0).item() for part in logs if len(part)])
    low, high = means.min(), means.max()
    for _ in range(100):  # by thirds, to a share of 1e-17
        a, b = low + (high - low) / 3, high - (high - low) / 3
        losses = [np.sqrt(spreads + (1 - silog_lambda) * (x - means) ** 2 + EPSILON).sum() for x in (a, b)]
        low, high = (low, b) if losses[0] < losses[1] else (a, high)
    return float(np.exp((low + high) / 2))


def draw_depths(path: Path, left: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor) -> None:
    """Writes a PNG with rows of left view, true and predicted depth and the relative error; see `draw_maps`."""
    truth, predicted = truth[:ROWS], predicted[:ROWS]
    known = known_depth(truth)
    relative = torch.where(known, (predicted - truth).abs() / torch.where(known, truth, 1), torch.nan)
    means = [f"{100 * float(part.nanmean()):.1f} % off" for part in relative]
    draw_maps(path, left, truth, predicted, "depth", "m", means, ("% of the depth", 100 * relative))
