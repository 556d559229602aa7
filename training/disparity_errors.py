"""How wrong predicted disparities are: end-point error and bad-2, the best constant beside them, and a picture."""

import os
from pathlib import Path

import torch

from stereovla.extras import extra

with extra("report"):
    from matplotlib.figure import Figure

BAD_PX = 2.0  # an error beyond this is a bad pixel
PICTURE_PAIRS = 3


def error_sums(predicted: torch.Tensor, truth: torch.Tensor, max_disparity: int) -> torch.Tensor:
    """What end-point error and bad-2 are made of, as sums that add up over batches.

    Args:
        predicted: (B, H, W) px, or a number that is predicted everywhere.
        truth: (B, H, W) px, 0 = unknown.
        max_disparity: of the volume, px, exclusive; pixels beyond it cannot be right and are counted apart.
    Returns:
        float64 (5,): sum of the absolute errors, bad pixels, measured pixels, pixels beyond the volume, pixels.
    """
    beyond = truth >= max_disparity
    measured = (truth > 0) & ~beyond
    errors = (predicted - truth).abs()[measured].double()
    counts = [(errors > BAD_PX).sum(), measured.sum(), beyond.sum(), measured.new_tensor(truth.numel(), dtype=float)]
    return torch.stack([errors.sum(), *(count.double() for count in counts)])


def error_numbers(sums: torch.Tensor) -> dict[str, float]:
    """{"end_point_px": mean absolute error, "bad_2": share of the measured pixels with errors above 2 px,
    "beyond_range": share of the known pixels that the volume does not reach, "unknown": share of all pixels}.
    """
    absolute, bad, measured, beyond, pixels = sums.tolist()
    if not measured:
        raise ValueError(
            f"none of {pixels:.0f} pixels has a known disparity within the volume; {beyond:.0f} lie beyond it: "
            "--max_disparity may be too small"
        )
    return {
        "end_point_px": absolute / measured,
        "bad_2": bad / measured,
        "beyond_range": beyond / (measured + beyond),
        "unknown": 1 - (measured + beyond) / pixels,
    }


def best_constant(truth: torch.Tensor, max_disparity: int) -> float:
    """The constant prediction with the smallest end-point error, px: the median of the measured pixels of (B, H, W)."""
    return truth[(truth > 0) & (truth < max_disparity)].median().item()


def draw_disparities(path: Path, left: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor) -> None:
    """Writes a PNG with a row for each pair: left view, true and predicted disparity; unknown pixels are grey.

    Args:
        left: (B, 3, H, W) in [0, 1]. truth, predicted: (B, H, W) px, truth 0 = unknown.
    """
    rows, height, width = truth.shape
    figure = Figure(figsize=(9.6, 0.3 + rows * (2.8 * height / width + 0.25)), layout="constrained")
    for row, axes in enumerate(figure.subplots(rows, 3, squeeze=False)):
        known = truth[row] > 0
        seen = truth[row][known] if known.any() else predicted[row]
        error = (predicted[row] - truth[row]).abs()[known].mean()
        limits = {"vmin": seen.min().item(), "vmax": seen.max().item(), "cmap": "turbo"}
        axes[0].imshow(left[row].permute(1, 2, 0).numpy())
        axes[1].imshow(torch.where(known, truth[row], torch.nan).numpy(), **limits)
        drawn = axes[2].imshow(predicted[row].numpy(), **limits)
        figure.colorbar(drawn, ax=list(axes[1:]), label="px", shrink=0.9)
        for axis, title in zip(axes, ("left view", "true disparity", f"predicted: {error:.2f} px off"), strict=True):
            axis.set_title(title, fontsize=9)
            axis.set_facecolor("0.8")
            axis.set_xticks([])
            axis.set_yticks([])
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, path)
