"""The photometric proof of a rendered pair: where textured patches of the right view, warped by what depth and
calibration say, lie on the left view.
"""

import numpy as np


def shifts_of(seen: dict) -> np.ndarray:
    """(n, 2) px: how far the right view of `World.observe(labels=True)`, warped by focal * baseline / depth, lies from
    the left one, in patches of the background.
    """
    calibration, depth = seen["calibration"], seen["depth"].astype(float)
    disparity = calibration["focal_length_px"][0] * float(calibration["baseline_m"]) / depth
    left, right = (seen[view].astype(float).mean(-1) for view in ("left", "right"))
    usable = smooth_depth(depth) & (np.arange(depth.shape[1])[None] - disparity > 2) & (seen["segmentation"] == 0)
    return shifts(left, warped_to_left(right, disparity), usable)


def warped_to_left(right: np.ndarray, disparity: np.ndarray) -> np.ndarray:
    """(H, W) the right view, float (H, W), seen from the left: pixel (v, u) is right (v, u - disparity), linearly
    interpolated.
    """
    height, width = disparity.shape
    place = np.clip(np.arange(width)[None] - disparity, 0, width - 1.001)
    index, weight = place.astype(int), place % 1.0
    row = np.arange(height)[:, None]
    return right[row, index] * (1 - weight) + right[row, index + 1] * weight


def shifts(left: np.ndarray, warped: np.ndarray, usable: np.ndarray, side: int = 17) -> np.ndarray:
    """(n, 2) sub-pixel shifts (u, v) of textured patches of `warped` against `left`, by least squares on the image
    gradients, twice.
    """
    found, gradient = [], np.gradient(warped)
    for row in range(side, left.shape[0] - 2 * side, side):
        for column in range(side, left.shape[1] - 2 * side, side):
            window = slice(row, row + side), slice(column, column + side)
            if not usable[window].all():
                continue
            matrix = np.stack([gradient[1][window].ravel(), gradient[0][window].ravel()], axis=1)
            if np.linalg.eigvalsh(matrix.T @ matrix)[0] < 60 * side:  # too little texture in one direction
                continue
            difference = (left[window] - warped[window]).ravel()
            found.append(np.linalg.lstsq(matrix, difference - difference.mean(), rcond=None)[0])
    return np.array(found)


def smooth_depth(depth: np.ndarray) -> np.ndarray:
    """bool (H, W): no depth edge within 3 px."""
    flat = np.ones_like(depth, bool)
    for shift in range(1, 4):
        for axis in (0, 1):
            change = np.abs(np.roll(depth, shift, axis) - depth) > 0.02
            flat &= ~change & ~np.roll(change, -shift, axis)
    return flat


def best_offset(seen: dict) -> float:
    """px to add to focal * baseline / depth so that the warped right view is most like the left one, by a parabola
    through the mean absolute differences over all smooth surfaces; for scenes with little texture.
    """
    calibration, depth = seen["calibration"], seen["depth"].astype(float)
    disparity = calibration["focal_length_px"][0] * float(calibration["baseline_m"]) / depth
    left, right = (seen[view].astype(float).mean(-1) for view in ("left", "right"))
    usable = smooth_depth(depth) & (np.arange(depth.shape[1])[None] - disparity > 6)
    offsets = np.arange(-3.0, 3.01, 0.5)
    errors = [np.abs(left - warped_to_left(right, disparity + offset))[usable].mean() for offset in offsets]
    least = int(np.argmin(errors))
    low, middle, high = errors[least - 1 : least + 2]
    return float(offsets[least] + 0.25 * (low - high) / (low - 2 * middle + high))
