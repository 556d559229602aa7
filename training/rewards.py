"""Rewards of answers in words, from the truth alone: pure functions.

All lie in [0, 1], so that no kind of question outweighs another, but for answers of another form than was asked for:
these get `INVALID`, less than the worst answer that can be read.
"""

import math
from collections.abc import Sequence

import numpy as np

INVALID = -1.0
DEPTH_SCALE_M = 0.05  # an error of so much leaves 1/e of the reward; the demo's answers are 3 to 4 cm off


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union (...) in [0, 1] of boxes (..., 4), x_min, y_min, x_max, y_max, which have an area."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    overlap = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(axis=-1) for boxes in (first, second)]
    return overlap / (areas[0] + areas[1] - overlap)


def box_reward(boxes: np.ndarray, valid: bool, truth: np.ndarray) -> float:
    """Mean over the views of the boxes' overlap with the true ones.

    Args:
        boxes, truth: (2, 4), left and right, or (1, 4), in px of the same views.
        valid: whether the answer was so many boxes with an area, as the processor's `decode_boxes` says.
    """
    return float(box_iou(boxes, truth).mean()) if valid else INVALID


def depth_reward(depths_m: Sequence[float] | None, truth_m: Sequence[float]) -> float:
    """exp(-error / 5 cm), the mean over the points of a question.

    Args:
        depths_m: the answer as read by `StereoProcessor.decode_depths`; None if it was no list of numbers.
        truth_m: as many as were asked for; an answer of another length is not valid.
    """
    if depths_m is None or len(depths_m) != len(truth_m):
        return INVALID
    errors = [abs(answer - depth) for answer, depth in zip(depths_m, truth_m, strict=True)]
    return sum(math.exp(-error / DEPTH_SCALE_M) for error in errors) / len(errors)
