"""Held-out rows of a dataset folder or Hub dataset, with what the policy is asked about each of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Image, IterableDataset, load_dataset_builder

from stereovla.sources import InputError, source_of
from stereovla.untrusted import check_parquet_files

CALIBRATION = ("focal_length_px", "principal_point_px", "baseline_m", "transform_camera_to_base")
LEFT, PICTURES, DEPTHS = "left", "observation.images.", "observation.depth"
COLUMNS = (
    f"{PICTURES}{LEFT}",
    "observation.state",
    "action",
    "target.name",
    "task",
    "embodiment",
    "episode_index",
    "frame_index",
)
# what a recording of a robot often has not; nothing is asked about what is not there
OPTIONAL = (
    "timestamp",
    *(f"calibration.{name}" for name in CALIBRATION),
    "action_plan",
    "action_plan_length",
    "keyframe_pose",
    "state_is_pose",
    "observation.segmentation",
    "target.box_left_px",
    "target.box_right_px",
)
PLAN_LENGTH = 16  # steps of a plan that is made of the actions that follow, as long as the stored ones
DEPTH_UNIT_M = 1e-4  # of the stored 16-bit depth
GRIPPER, TARGET = 2, 3  # values of the stored segmentation


@dataclass(frozen=True)
class HeldOutRow:
    """One frame, `time_s` after its episode began; states (n, S) of the episode so far; plan (P, A), `plan_length`
    steps valid.

    views: {name: (H, W, 3) uint8, or None where the row has none} of all that the data has. depths: {name of a view:
    (H, W) float32 m, 0 = unknown}. points_px: (2,) px (u, v) of "target" and "gripper" in the left view, where they are
    seen. boxes_px: (2, 4) left and right, NaN where a view does not show the target, None where neither does. None is
    also what the data has not.
    """

    episode: int
    frame: int
    time_s: float | None
    views: dict[str, np.ndarray | None]
    states: np.ndarray
    plan: np.ndarray
    plan_length: int
    keyframe_pose: np.ndarray | None
    calibration: dict[str, Any] | None
    depths: dict[str, np.ndarray]
    points_px: dict[str, np.ndarray]
    boxes_px: np.ndarray | None
    target: str
    task: str
    embodiment: str

    @property
    def left(self) -> np.ndarray:
        """The main view."""
        return self.views[LEFT]

    @property
    def depth_m(self) -> np.ndarray | None:
        """Of the main view."""
        return self.depths.get(LEFT)

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
    """A split with all `COLUMNS`, those of `OPTIONAL` that it has, and its views and depth maps, streamed; InputError
    that says what is wrong with `dataset`.
    """
    with source_of(dataset, "dataset") as folder:
        if folder is not None and not any(folder.glob("**/*.parquet")):
            raise InputError(f"{dataset!r} is no dataset: it holds no parquet file")
    try:
        builder = load_dataset_builder(dataset)
        check_parquet_files((builder.config.data_files or {}).get(split, ()))
        stream = builder.as_streaming_dataset(split=split)
    except ValueError as error:  # an unknown split; datasets names those that there are
        raise InputError(f"{dataset!r}: {error}") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{dataset!r} cannot be read: {error}") from error
    missing = [name for name in COLUMNS if name not in stream.features]
    if missing:
        raise InputError(f"{dataset!r} lacks the columns {', '.join(missing)}; it has {', '.join(stream.features)}")
    views = [name for name in stream.features if name.startswith((PICTURES, DEPTHS))]
    there = [name for name in OPTIONAL if name in stream.features]
    return stream.select_columns(list(dict.fromkeys([*COLUMNS, *there, *views])))


def count_rows(dataset: str, rows: int, stride: int, split: str = "validation") -> int:
    """How many rows `read_rows` will give."""
    passed = sum(1 for _ in open_split(dataset, split).select_columns(["frame_index"]).take((rows - 1) * stride + 1))
    return -(-passed // stride)


def read_rows(dataset: str, rows: int, stride: int, split: str = "validation") -> Iterator[HeldOutRow]:
    """Every `stride`-th row of a split, at most `rows` of them, streamed in stored order.

    Args:
        dataset: folder or Hub id with the columns of the dataset contract.
    """
    stream = open_split(dataset, split)
    images = [name for name, feature in stream.features.items() if isinstance(feature, Image)]
    for name in images:  # most rows are only passed on the way to the next one asked for
        stream = stream.cast_column(name, Image(decode=False))
    passed = (rows - 1) * stride + 1
    episode: list[dict[str, Any]] = []
    first = 0  # number of the episode's first row

    def chosen() -> Iterator[HeldOutRow]:
        return _episode_rows(episode, range(-first % stride, min(len(episode), passed - first), stride), images)

    try:
        for number, row in enumerate(stream.take(passed + PLAN_LENGTH - 1)):
            if row["frame_index"] == 0:
                yield from chosen()
                episode, first = [], number
            episode.append(row)
        yield from chosen()
    except pa.ArrowException as error:
        raise InputError(f"{dataset!r}, split {split!r}: a shard is truncated or corrupt: {error}") from error


def _decode(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image().decode_example(image))


def _episode_rows(episode: list[dict[str, Any]], chosen: range, images: list[str]) -> Iterator[HeldOutRow]:
    """The `chosen` rows of an episode, or of its beginning."""
    states = [np.asarray(row["observation.state"], np.float32) for row in episode]
    for number in chosen:
        row = dict(episode[number])
        if row.get("state_is_pose") is False:
            raise InputError(
                f"episode {row['episode_index']}: states and actions are the robot's own numbers (state_is_pose is "
                "false); errors are known for poses of the tool"
            )
        if row.get("action_plan") is None:  # what the robot did next, held still after the end, as in training
            following = episode[number : number + PLAN_LENGTH]
            plan = [later["action"] for later in following]
            row["action_plan"] = plan + plan[-1:] * (PLAN_LENGTH - len(plan))
            row["action_plan_length"] = len(following)
        row |= {name: _decode(row[name]) for name in images if row[name] is not None}
        yield _row(row, np.stack(states[: number + 1]))


def _row(row: dict[str, Any], states: np.ndarray) -> HeldOutRow:
    views = {name.removeprefix(PICTURES): row[name] for name in row if name.startswith(PICTURES)}
    maps = {name.removeprefix(DEPTHS).removeprefix(".") or LEFT: row[name] for name in row if name.startswith(DEPTHS)}
    depths = {name: depth.astype(np.float32) * DEPTH_UNIT_M for name, depth in maps.items() if depth is not None}
    segmentation, points = row.get("observation.segmentation"), {}
    if LEFT in depths and segmentation is not None:
        regions = (("target", TARGET), ("gripper", GRIPPER))
        points = {name: inner_point(segmentation == value, depths[LEFT]) for name, value in regions}
    boxes = [row.get("target.box_left_px"), row.get("target.box_right_px")]
    seen = [box for box in boxes if box is not None]
    keyframe = row.get("keyframe_pose")
    calibration = {name: row.get(f"calibration.{name}") for name in CALIBRATION}
    return HeldOutRow(
        episode=row["episode_index"],
        frame=row["frame_index"],
        time_s=row.get("timestamp"),
        views=views,
        states=states,
        plan=np.asarray(row["action_plan"], np.float32),
        plan_length=row["action_plan_length"],
        keyframe_pose=None if keyframe is None else np.asarray(keyframe, np.float32),
        calibration=None if None in calibration.values() else calibration,
        depths=depths,
        points_px={name: point for name, point in points.items() if point is not None},
        boxes_px=None if not seen else np.float32([[np.nan] * 4 if box is None else box for box in boxes]),
        target=row["target.name"],
        task=row["task"],
        embodiment=row["embodiment"],
    )
