"""Pictures with known depth that others published: folders of the usual layouts, and datasets with a column for the
picture and one for the depth.

A *picture* is {"left": uint8 (H, W, 3) RGB, "depth": float32 (H, W), planar depth in m, 0 = unknown}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from stereovla.dataset_builder.formats.labelled_sets import (
    FileSamples,
    Samples,
    Split,
    list_files,
    open_columns,
    split_files,
)
from stereovla.dataset_builder.formats.pixel_maps import decode_map, decode_view, known_values

PLAUSIBLE_M = (1e-3, 1e3)  # of a map's median; a unit that is wrong by a factor of 1000 leaves it
SAME_ASPECT = 0.02  # largest relative difference; ScanNet's 1296 x 968 and 640 x 480 differ by 0.4 %


@dataclass(frozen=True)
class Layout:
    """Where a published set keeps its files: `views` finds the pictures; in their paths `depth`, (pattern,
    replacement), leads to the maps.

    Args:
        unit_m: m per step of the maps; None = to be declared.
        field_of_view: where the maps hold the distance from the camera: its horizontal angle in rad, from which the
            planar depth follows.
    """

    views: str
    depth: tuple[str, str]
    unit_m: float | None = None
    field_of_view: float | None = None


LAYOUTS = {
    # any set: images/NAME.jpg beside depth/NAME.png, .tiff, .pfm, .npy, .npz or .hdf5
    "folders": Layout("images/**/*.*", (r"^images/(.+)\.\w+$", r"depth/\1.*")),
    # NYU Depth V2 as it is passed around for training: 16-bit PNG, mm, filled in
    "nyu": Layout("**/rgb_*.*", (r"rgb_(\w+)\.\w+$", r"sync_depth_\1.png"), 1e-3),
    # ScanNet as its SensReader exports it: 16-bit PNG, mm, smaller than the pictures
    "scannet": Layout("**/color/*.jpg", (r"color/(\w+)\.jpg$", r"depth/\1.png"), 1e-3),
    # Hypersim (github.com/apple/ml-hypersim): distance from the camera in m. 60 degrees (886.81 px at a width of 1024)
    # is the camera of all its scenes but for a few, whose planar depth then is off by some percent towards the border.
    "hypersim": Layout(
        "**/images/scene_cam_*_final_preview/frame.*.tonemap.jpg",
        (r"_final_preview/frame\.(\d+)\.tonemap\.jpg$", r"_geometry_hdf5/frame.\1.depth_meters.hdf5"),
        1.0,
        np.pi / 3,
    ),
}
FORMATS = ("columns", *LAYOUTS)


def planar_depth(distance: np.ndarray, field_of_view: float) -> np.ndarray:
    """Distance from the camera (H, W) -> planar depth, in its unit, of square pixels around the middle.

    Args:
        field_of_view: horizontal, rad.
    """
    height, width = distance.shape
    focal_px = width / 2 / np.tan(field_of_view / 2)
    x, y = np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2
    return (distance * focal_px / np.sqrt(focal_px**2 + x**2 + y[:, None] ** 2)).astype(np.float32)


def decode_depth(data: bytes | Sequence[Any], unit_m: float, name: str) -> np.ndarray:
    """File or numbers (see `pixel_maps`) -> float32 (H, W) m, 0 = unknown; ValueError where the unit cannot be right.

    Args:
        unit_m: m per step.
        name: for errors.
    """
    depth = known_values(decode_map(data, name, "depth map"), unit_m, name, "depth")
    known = depth[depth > 0]
    if known.size and not PLAUSIBLE_M[0] <= (median := float(np.median(known))) <= PLAUSIBLE_M[1]:
        raise ValueError(
            f"{name} has a median depth of {median:g} m; valid: {PLAUSIBLE_M[0]:g} to {PLAUSIBLE_M[1]:g}. Is "
            f"{unit_m:g} m per step right?"
        )
    return depth


def decode_picture(
    contents: Sequence[Any], names: Sequence[str], *, unit_m: float, field_of_view: float | None = None
) -> dict[str, np.ndarray]:
    """Contents of (view, depth map) -> picture; `names` are for errors. A view of another size and the same shape is
    scaled to the size of the map, whose values stay.
    """
    view, depth = decode_view(contents[0], names[0]), decode_depth(contents[1], unit_m, names[1])
    if field_of_view is not None:
        depth = planar_depth(depth, field_of_view)
    (height, width), (map_height, map_width) = view.shape[:2], depth.shape
    if (height, width) != (map_height, map_width):
        if abs(width * map_height / (height * map_width) - 1) > SAME_ASPECT:
            raise ValueError(
                f"{names[0]} has {height} x {width} px (height x width), its depth {map_height} x {map_width}: they "
                "do not show the same; valid: equal sizes, or equal shapes"
            )
        view = np.array(Image.fromarray(view).resize((map_width, map_height), Image.Resampling.BILINEAR))
    return {"left": view, "depth": depth}


def open_depths(
    sources: Sequence[str], form: str, split: Split, held_out: float, columns: Sequence[str], unit_m: float | None
) -> Samples:
    """Pictures of one split of a set.

    Args:
        sources: folders of one layout, taken together; or for "columns" one dataset, folder or Hub id (`id@revision`).
        form: one of `FORMATS`.
        held_out: share of the maps, the last ones in the order of paths or rows, that are the split "validation" where
            the dataset has none of its own.
        columns: names of (picture, depth) for "columns".
        unit_m: m per step of the depth; None = the layout's own.
    """
    layout = LAYOUTS.get(form)
    unit_m = layout.unit_m if unit_m is None and layout is not None else unit_m
    if unit_m is None:
        raise ValueError(f"the unit of the depth is not known: a set of the form {form!r} needs m per step")
    decode = partial(decode_picture, unit_m=unit_m, field_of_view=None if layout is None else layout.field_of_view)
    if layout is None:
        return open_columns(sources, split, held_out, columns, decode)
    files = [file for source in sources for file in list_files(source, form, layout.views, (layout.depth,))]
    return FileSamples(split_files(files, split, held_out, ", ".join(sources)), decode)
