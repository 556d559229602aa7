"""How wrong predicted disparities are: end-point error and bad-2, the best constant beside them, and a picture."""

from pathlib import Path

import torch

from stereovla.training.map_pictures import ROWS, draw_maps

BAD_PX = 2.0  # an error beyond this is a bad pixel


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
    """Writes a PNG with rows of left view, true and predicted disparity; see `draw_maps`."""
    known = (truth > 0)[:ROWS]
    errors = [(p - t).abs()[k].mean() for p, t, k in zip(predicted[:ROWS], truth[:ROWS], known, strict=True)]
    draw_maps(path, left, truth, predicted, "disparity", "px", [f"{error:.2f} px off" for error in errors])
