"""Stereo pairs with known disparity that others published: folders of the classic layouts, and datasets with a column
for each view and one for the disparity.

A *pair* is {"left", "right": uint8 (H, W, 3) RGB, "disparity": float32 (H, W) px of the left view, 0 = unknown}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.dataset_builder.formats.labelled_sets import (
    FileSamples,
    Samples,
    Split,
    list_files,
    open_columns,
    split_files,
)
from stereovla.dataset_builder.formats.pixel_maps import decode_map, decode_view, known_values


@dataclass(frozen=True)
class Layout:
    """Where a published set keeps its files: `views` finds the left ones; in their paths `right` and `disparity`, each
    (pattern, replacement), lead to the other two. `unit` is px per step of the disparity's values.
    """

    views: str
    right: tuple[str, str]
    disparity: tuple[str, str]
    unit: float


LAYOUTS = {
    # cvlibs.net/datasets/kitti: 16-bit PNG, 256 steps per px, 0 = unknown; occluded pixels included
    "kitti2015": Layout("training/image_2/*_10.png", ("image_2/", "image_3/"), ("image_2/", "disp_occ_0/"), 1 / 256),
    # vision.middlebury.edu/stereo, the sets of 2014 and 2021: PFM, infinite = unknown
    "middlebury": Layout("**/im0.png", ("im0.png", "im1.png"), ("im0.png", "disp0.pfm"), 1.0),
    # lmb.informatik.uni-freiburg.de: FlyingThings3D, Driving, Monkaa; clean and final pass share their disparity
    "sceneflow": Layout(
        "frames_*pass/**/left/*.png",
        ("/left/", "/right/"),
        (r"frames_\w+pass/(.+)\.png", r"disparity/\1.pfm"),
        1.0,
    ),
}
FORMATS = ("columns", *LAYOUTS)


def decode_disparity(data: bytes | Sequence[Any], unit: float, name: str) -> np.ndarray:
    """File or numbers (see `pixel_maps`) -> float32 (H, W) px, 0 = unknown.

    Args:
        unit: px per step; negative where a set stores disparities below 0.
        name: for errors.
    """
    return known_values(decode_map(data, name, "disparity"), unit, name, "disparity")


def decode_pair(contents: Sequence[Any], names: Sequence[str], *, unit: float) -> dict[str, np.ndarray]:
    """Contents of (left view, right view, disparity) -> pair; `names` are for errors."""
    left, right = (decode_view(content, name) for content, name in zip(contents[:2], names, strict=False))
    disparity = decode_disparity(contents[2], unit, names[2])
    if not left.shape[:2] == right.shape[:2] == disparity.shape:
        shapes = f"left {left.shape[:2]}, right {right.shape[:2]}, disparity {disparity.shape}"
        raise ValueError(f"{names[0]}: sizes (height, width) differ: {shapes}")
    return {"left": left, "right": right, "disparity": disparity}


def pair_files(folder: str | Path, form: str) -> list[tuple[Path, ...]]:
    """(left, right, disparity) of every pair under `folder`; see `labelled_sets.list_files`."""
    layout = LAYOUTS[form]
    return list_files(folder, form, layout.views, (layout.right, layout.disparity))


def open_pairs(
    sources: Sequence[str], form: str, split: Split, held_out: float, columns: Sequence[str], unit: float
) -> Samples:
    """Pairs of one split of a set.

    Args:
        sources: folders of one layout, taken together; or for "columns" one dataset, folder or Hub id (`id@revision`).
        form: one of `FORMATS`.
        held_out: share of the disparities, the last ones in the order of paths or rows, whose pairs are the split
            "validation" where the dataset has none of its own.
        columns: names of (left, right, disparity) for "columns".
        unit: px per step of the disparity for "columns"; the layouts know their own.
    """
    if form not in LAYOUTS:
        return open_columns(sources, split, held_out, columns, partial(decode_pair, unit=unit))
    files = [file for source in sources for file in pair_files(source, form)]
    decode = partial(decode_pair, unit=LAYOUTS[form].unit)
    return FileSamples(split_files(files, split, held_out, ", ".join(sources)), decode)
