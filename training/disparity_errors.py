"""How wrong predicted disparities are: end-point error and bad-2, at target and gripper, at borders; the best constant
and semi-global matching beside them, and a picture.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from stereovla.dataset_builder.dataset.schema import SEGMENTATION
from stereovla.extras import extra
from stereovla.training.map_pictures import ROWS, draw_maps

BAD_PX = 2.0  # an error beyond this is a bad pixel
BORDER_PX = 1.0  # a step of the true disparity beyond this is a border


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


def in_middle(mask: torch.Tensor) -> tuple[int, int] | None:
    """(row, column) of the pixel of a mask (H, W) that is nearest to the mean of them; None where it has none."""
    pixels = mask.nonzero()
    if not len(pixels):
        return None
    row, column = pixels[((pixels - pixels.double().mean(0)) ** 2).sum(-1).argmin()].tolist()
    return row, column


def border_pixels(truth: torch.Tensor) -> torch.Tensor:
    """Pixels of (B, H, W) px, 0 = unknown, within 2 px of a step of more than `BORDER_PX`, bool."""
    known = truth > 0
    low = torch.where(known, truth, torch.inf)[:, None]
    high = torch.where(known, truth, -torch.inf)[:, None]
    span = F.max_pool2d(high, 3, stride=1, padding=1) + F.max_pool2d(-low, 3, stride=1, padding=1)
    return F.max_pool2d((span > BORDER_PX).float(), 3, stride=1, padding=1)[:, 0] > 0


def errors_where_it_matters(
    predicted: torch.Tensor, truth: torch.Tensor, segmentation: torch.Tensor, depth_times_disparity: torch.Tensor
) -> dict[str, float]:
    """Median absolute errors at target and gripper, in px of disparity and in cm of depth, each of the pixel in the
    middle of what is visible of it; and mean ones in px near the borders of things and elsewhere. Without what the
    pairs have not got.

    Args:
        predicted, truth: (B, H, W) px, truth 0 = unknown. segmentation: (B, H, W), as in the schema; 0 = unknown.
        depth_times_disparity: (B,) px m, NaN = unknown.
    """
    known, errors = truth > 0, (predicted - truth).abs()
    found = {}
    for name in ("target", "gripper"):
        px, cm = [], []
        for row, mask in enumerate((segmentation == SEGMENTATION[name]) & known):
            if (place := in_middle(mask)) is None:
                continue
            px.append(errors[row][place].item())
            depths = depth_times_disparity[row] / torch.stack([predicted[row][place], truth[row][place]])
            cm.append(100 * (depths[0] - depths[1]).abs().item())
        if px:
            found |= {f"{name}_px": float(np.median(px)), f"{name}_cm": float(np.median(cm))}
    border = border_pixels(truth) & known
    for name, where in (("border_px", border), ("elsewhere_px", known & ~border)):
        if where.any():
            found[name] = errors[where].double().mean().item()
    return {name: value for name, value in found.items() if np.isfinite(value)}


def semi_global_matching(pixel_values: torch.Tensor, max_disparity: int) -> torch.Tensor:
    """Disparity (B, H, W) px of pairs (B, 2, 3, H, W) in [0, 1] by OpenCV's semi-global block matching with the usual
    penalties; a pixel without a match gets the smaller of its neighbours' in the row, as KITTI's benchmark does.
    """
    with extra("report"):
        import cv2
    window, channels = 5, 3
    penalties = {"P1": 8 * channels * window**2, "P2": 32 * channels * window**2}
    matcher = cv2.StereoSGBM_create(
        minDisparity=0,
        numDisparities=-(-max_disparity // 16) * 16,
        blockSize=window,
        uniquenessRatio=5,
        speckleWindowSize=50,
        speckleRange=2,
        disp12MaxDiff=1,
        mode=cv2.STEREO_SGBM_MODE_HH,
        **penalties,
    )
    found = []
    for pair in (255 * pixel_values).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous().numpy():
        # the left part of a left view has its matches beyond the right view: a margin gives the matcher room
        margin = matcher.getNumDisparities()
        left, right = (cv2.copyMakeBorder(view, 0, 0, margin, 0, cv2.BORDER_REPLICATE) for view in pair)
        disparity = matcher.compute(left, right)[:, margin:].astype(np.float32) / 16
        found.append(filled(np.where(disparity > 0, disparity, np.nan)))
    return torch.from_numpy(np.stack(found))


def filled(disparity: np.ndarray) -> np.ndarray:
    """(H, W) with each NaN replaced by the smaller of the values before and after it in its row; 0 in an empty row."""
    columns = np.arange(disparity.shape[1])
    known = np.isfinite(disparity)
    before = np.maximum.accumulate(np.where(known, columns, -1), axis=1)
    after = np.minimum.accumulate(np.where(known, columns, columns.size)[:, ::-1], axis=1)[:, ::-1]
    padded = np.concatenate([disparity, np.full((len(disparity), 1), np.inf)], axis=1)  # -1 and size are the last
    rows = np.arange(len(disparity))[:, None]
    smaller = np.minimum(padded[rows, before], padded[rows, after])
    return np.where(known, disparity, np.where(np.isfinite(smaller), smaller, 0)).astype(np.float32)


def best_constant(truth: torch.Tensor, max_disparity: int) -> float:
    """The constant prediction with the smallest end-point error, px: the median of the measured pixels of (B, H, W)."""
    return truth[(truth > 0) & (truth < max_disparity)].median().item()


def draw_disparities(path: Path, left: torch.Tensor, truth: torch.Tensor, predicted: torch.Tensor) -> None:
    """Writes a PNG with rows of left view, true and predicted disparity; see `draw_maps`."""
    known = (truth > 0)[:ROWS]
    errors = [(p - t).abs()[k].mean() for p, t, k in zip(predicted[:ROWS], truth[:ROWS], known, strict=True)]
    draw_maps(path, left, truth, predicted, "disparity", "px", [f"{error:.2f} px off" for error in errors])
