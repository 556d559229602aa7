"""Textured stereo pairs and poses that say which frame they are, with numpy and Pillow alone."""

import math

import numpy as np
from PIL import Image


def textured_pair(seed: int, width: int, height: int, disparity: int = 6, rows: float = 0) -> list[np.ndarray]:
    """[left, right] uint8 (height, width, 3) of a wall with blobs, `disparity` px apart; right is `rows` px lower."""
    rng = np.random.default_rng(seed)
    margin = abs(disparity) + math.ceil(abs(rows))
    size = (height + 2 * margin) // 4 + 2, (width + 2 * margin) // 4 + 2
    # mostly grey: video halves the resolution of colours
    small = (rng.integers(20, 216, (*size, 1)) + rng.integers(0, 20, (*size, 3))).astype(np.uint8)
    wall = np.asarray(Image.fromarray(small).resize((small.shape[1] * 4, small.shape[0] * 4), Image.Resampling.BICUBIC))

    def cut(y: int, x: int) -> np.ndarray:
        return np.ascontiguousarray(wall[y : y + height, x : x + width])

    whole = math.floor(rows)
    right = cut(margin - whole, margin + disparity)
    if share := rows - whole:
        right = (1 - share) * right + share * cut(margin - whole - 1, margin + disparity)
    return [cut(margin, margin), np.round(right).astype(np.uint8)]


def poses(episode: int, length: int) -> np.ndarray:
    """(length, 7) float32: x, y, z m, roll, pitch, yaw rad, gripper opening in 0..1 that closes in the middle."""
    t = np.arange(length) / 10
    columns = [
        0.4 + 0.05 * np.sin(t + episode),
        0.1 * np.cos(t),
        0.3 - 0.02 * t,
        0.1 * np.sin(t),
        0.2 * np.cos(2 * t),
        0.5 * t - 0.4 + 0.1 * episode,
        np.where(np.arange(length) < length // 2, 1.0, 0.25),
    ]
    return np.stack(columns, axis=1).astype(np.float32)
