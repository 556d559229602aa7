"""Held-out rows of a dataset folder or Hub dataset, with what the policy is asked about each of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Image, IterableDataset, load_dataset

from stereovla.sources import InputError, source_of

CALIBRATION = ("focal_length_px", "principal_point_px", "baseline_m", "transform_camera_to_base")
COLUMNS = (
    "observation.images.left",
    "observation.images.right",
    "observation.state",
    "action_plan",
    "action_plan_length",
    "keyframe_pose",
    *(f"calibration.{name}" for name in CALIBRATION),
    "observation.depth",
    "observation.segmentation",
    "target.name",
    "target.box_left_px",
    "target.box_right_px",
    "task",
    "embodiment",
    "episode_index",
    "frame_index",
)
DEPTH_UNIT_M = 1e-4  # of the stored 16-bit depth
GRIPPER, TARGET = 2, 3  # values of the stored segmentation


@dataclass(frozen=True)
class HeldOutRow:
    """One frame. Images (H, W, 3) uint8; states (n, S) of the episode so far; plan (P, A), `plan_length` steps valid.

    depth_m: (H, W) of the left view, 0 = unknown. points_px: (2,) px (u, v) of "target" and "gripper", where in view.
    boxes_px: (2, 4) left and right, None unless both views show the target.
    """

    episode: int
    frame: int
    left: np.ndarray
    right: np.ndarray
    states: np.ndarray
    plan: np.ndarray
    plan_length: int
    keyframe_pose: np.ndarray
    calibration: dict[str, Any]
    depth_m: np.ndarray
    points_px: dict[str, np.ndarray]
    boxes_px: np.ndarray | None
    target: str
    task: str
    embodiment: str

    def depth_at(self, point: np.ndarray) -> float:
        """Depth in m of the pixel that `point` (u, v) is in."""
        return float(self.depth_m[int(point[1]), int(point[0])])


def inner_point(mask: np.ndarray, depth_m: np.ndarray) -> np.ndarray | None:
    """Centre (u, v) of the pixel with known depth that lies nearest to the mask's median; None without such a pixel."""
    pixels = np.argwhere(mask & (depth_m > 0))
    if not len(pixels):
        return None
    nearest = np.abs(pixels - np.median(pixels, axis=0)).sum(axis=1).argmin()
    return pixels[nearest][::-1] + 0.5


def open_split(dataset: str, split: str) -> IterableDataset:
    """A split with all `COLUMNS` and no others, streamed; InputError that says what is wrong with `dataset`."""
    with source_of(dataset, "dataset") as folder:
        if folder is not None and not any(folder.glob("**/*.parquet")):
            raise InputError(f"{dataset!r} is no dataset: it holds no parquet file")
    try:
        stream = load_dataset(dataset, split=split, streaming=True)
    except ValueError as error:  # an unknown split; datasets names those that there are
        raise InputError(f"{dataset!r}: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{dataset!r} cannot be read: {error}") from error
    missing = [name for name in COLUMNS if name not in stream.features]
    if missing:
        raise InputError(f"{dataset!r} lacks the columns {', '.join(missing)}; it has {', '.join(stream.features)}")
    return stream.select_columns(list(COLUMNS))


def count_rows(dataset: str, rows: int, stride: int, split: str = "validation") -> int:
    """How many rows `read_rows` will give."""
    passed = sum(1 for _ in open_split(dataset, split).select_columns(["frame_index"]).take((rows - 1) * stride + 1))
    return -(-passed // stride)


def read_rows(dataset: str, rows: int, stride: int, split: str = "validation") -> Iterator[HeldOutRow]:
    """Every `stride`-th row of a split, at most `rows` of them, streamed in stored order.

    Args:
        dataset: folder or Hub id with the columns of the dataset contract, depth and segmentation included.
    """
    stream = open_split(dataset, split)
    images = [name for name, feature in stream.features.items() if isinstance(feature, Image)]
    for name in images:  # most rows are only passed on the way to the next one asked for
        stream = stream.cast_column(name, Image(decode=False))
    states: list[np.ndarray] = []
    try:
        for number, row in enumerate(stream.take((rows - 1) * stride + 1)):
            if row["frame_index"] == 0:
                states = []
            states.append(np.asarray(row["observation.state"], np.float32))
            if number % stride == 0:
                yield _row({**row, **{name: _decode(row[name]) for name in images}}, np.stack(states))
    except pa.ArrowException as error:
        raise InputError(f"{dataset!r}, split {split!r}: a shard is truncated or corrupt: {error}") from error


def _decode(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image().decode_example(image))


def _row(row: dict[str, Any], states: np.ndarray) -> HeldOutRow:
    depth = row["observation.depth"].astype(np.float32) * DEPTH_UNIT_M
    masks = {
        name: row["observation.segmentation"] == value for name, value in (("target", TARGET), ("gripper", GRIPPER))
    }
    points = {name: inner_point(mask, depth) for name, mask in masks.items()}
    boxes = [row["target.box_left_px"], row["target.box_right_px"]]
    return HeldOutRow(
        episode=row["episode_index"],
        frame=row["frame_index"],
        left=row["observation.images.left"],
        right=row["observation.images.right"],
        states=states,
        plan=np.asarray(row["action_plan"], np.float32),
        plan_length=row["action_plan_length"],
        keyframe_pose=np.asarray(row["keyframe_pose"], np.float32),
        calibration={name: row[f"calibration.{name}"] for name in CALIBRATION},
        depth_m=depth,
        points_px={name: point for name, point in points.items() if point is not None},
        boxes_px=None if None in boxes else np.asarray(boxes, np.float32),
        target=row["target.name"],
        task=row["task"],
        embodiment=row["embodiment"],
    )
