"""Training windows cut out of whole episodes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.shards import ShardError, decode_image, numbers
from stereovla.dataset_builder.streaming.questions import view_pixels

DEPTH, SEGMENTATION = schema.DEPTH, "observation.segmentation"
CARRIED_M = 0.03  # less is not carried: the fingers missed
HELD_BELOW_M = 0.02  # so far below the tool is what a small object that it holds stands on, rather than the air above


class WindowPool:
    """Some whole episodes: numbers as arrays over all their frames, images as bytes until they are asked for; `views`
    are those that a window shows, left among them.
    """

    def __init__(self, tables: Sequence[pa.Table], history: int, chunk: int, views: Sequence[str] = ("left", "right")):
        table = pa.concat_tables(tables).combine_chunks()
        self.size, self.views = table.num_rows, views
        self._bytes = {
            key: table.column(key).combine_chunks().field("bytes")
            for key in (*(f(view) for view in views for f in (schema.image_key, schema.depth_key)), SEGMENTATION)
            if key in table.column_names
        }
        named = schema.OTHER_NAMES in table.column_names
        self._others = table.column(schema.OTHER_NAMES).to_pylist() if named else [None] * self.size
        self._strings = {key: table.column(key).to_pylist() for key in ("task", "target.name", "embodiment")}
        self._index = {key: numbers(table, key) for key in ("episode_index", "frame_index")}
        self._calibration = {key: numbers(table, key) for key in schema.CALIBRATION if key in table.column_names}
        states = numbers(table, "observation.state")
        frames = np.arange(self.size)
        first = frames - self._index["frame_index"]
        self._states = states[np.maximum(frames[:, None] - np.arange(history)[::-1], first[:, None])]  # (n, history, S)
        self._actions, self._mask = _action_chunks(table, first, chunk)
        self._keyframes = numbers(table, "keyframe_pose") if "keyframe_pose" in table.column_names else None
        known = "keyframe_symmetry" in table.column_names
        self._symmetries = table.column("keyframe_symmetry").to_pylist() if known else [None] * self.size
        missing = np.full((self.size, 4), np.nan, dtype=np.float32)
        boxes = [f"target.box_{side}_px" for side in ("left", "right")]
        self._boxes = np.stack([numbers(table, key) if key in table.column_names else missing for key in boxes], axis=1)
        self._points: np.ndarray | None = None
        self._tool_position = _tool_positions(table, states)
        tasks = np.array(self._strings["task"])
        self._destination = _destinations(self._tool_position, numbers(table, "action")[:, -1], tasks, first)

    @property
    def further(self) -> list[str]:
        """The views that are none of a pair."""
        return [view for view in self.views if view not in ("left", "right")]

    def has_depth(self, view: str) -> bool:
        """Whether the data has a depth of this view, and the view is shown."""
        return schema.depth_key(view) in self._bytes

    def image(self, key: str, index: int) -> np.ndarray:
        """Decoded image of frame `index`; ShardError names episode and frame of one that cannot be decoded."""
        data = self._bytes[key][index].as_py()
        if data is None:
            why = "" if key in schema.PAIR else "; was the data recorded without labels?"
            raise ShardError(f"{self._place(index)}: {key} is null{why}")
        try:
            return decode_image(key, data)
        except ShardError as error:
            raise ShardError(f"{self._place(index)}: {error}") from error

    def image_or_none(self, key: str, index: int) -> np.ndarray | None:
        """`image`, or None where the data or the row has none."""
        there = key in self._bytes and self._bytes[key][index].is_valid
        return self.image(key, index) if there else None

    def objects(self, index: int) -> tuple[list[str], np.ndarray] | None:
        """Names of all objects of frame `index`, the target first, and the middles (K, 2) px of their boxes in the left
        view, NaN where one is not in it; None where the data does not say.
        """
        others = self._others[index]
        labels = None if others is None else self.image_or_none(SEGMENTATION, index)
        if labels is None:
            return None
        names = [self._strings["target.name"][index], *others]
        middles = [mask_middle(labels == schema.SEGMENTATION["target"] + number) for number in range(len(names))]
        return names, np.stack(middles)

    def _place(self, index: int) -> str:
        return ", ".join(f"{key} {values[index]}" for key, values in self._index.items())

    def window(self, index: int) -> dict[str, Any]:
        """Window of frame `index` without objective and depth."""
        left = self.image(schema.LEFT, index)
        window = {"left": left}
        if "right" in self.views:
            window["right"] = self.image(schema.RIGHT, index)
            if left.shape != window["right"].shape:
                raise ValueError(
                    f"{self._place(index)}: left view is {left.shape}, right view {window['right'].shape}; they must "
                    "be equally large"
                )
        for view in self.further:
            window[f"view.{view}"] = self.image_or_none(schema.image_key(view), index)
        calibration = {key: values[index] for key, values in self._calibration.items()}
        window |= {
            "state_history": self._states[index],
            "actions": self._actions[index],
            "action_mask": self._mask[index],
            **{key: value for key, value in calibration.items() if np.isfinite(value).all()},  # NaN = null
            "boxes": self._boxes[index],
            "points": self._pointing(left.shape[:2])[index],
            "task": self._strings["task"][index],
            "target": self._strings["target.name"][index],
            "embodiment": self._strings["embodiment"][index],
            **{key: int(values[index]) for key, values in self._index.items()},
        }
        if self._keyframes is not None:
            window["keyframe_pose"] = self._keyframes[index]
        if self._symmetries[index] is not None:
            window["keyframe_symmetry"] = self._symmetries[index]
        return window

    def _pointing(self, size: tuple[int, int]) -> np.ndarray:
        """(n, 3, 2) (u, v) of the middle of the target's box, of the tool centre, and of what the target is put
        onto; NaN = not in the left view.
        """
        if self._points is None:
            placed = np.full((2, self.size, 2), np.nan, dtype=np.float32)
            if self._calibration:
                keys = ("transform_camera_to_base", "focal_length_px", "principal_point_px")
                camera = [self._calibration[f"calibration.{key}"] for key in keys]
                placed[:] = [view_pixels(where, *camera, size) for where in (self._tool_position, self._destination)]
            box = self._boxes[:, 0]
            self._points = np.stack([(box[:, :2] + box[:, 2:]) / 2, *placed], axis=1)
        return self._points


def mask_middle(mask: np.ndarray) -> np.ndarray:
    """(u, v) px, float32, of the middle of the box around a bool mask (H, W); NaN when it is empty."""
    across, down = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    if not len(across):
        return np.full(2, np.nan, np.float32)
    return np.array([across[0] + across[-1] + 1, down[0] + down[-1] + 1], np.float32) / 2


def _tool_positions(table: pa.Table, states: np.ndarray) -> np.ndarray:
    """(n, 3) m in the base frame, NaN where the state is no pose."""
    if "state_is_pose" not in table.column_names:
        return states[:, :3]
    is_pose = table.column("state_is_pose").fill_null(True).to_numpy()
    positions = np.full((len(states), 3), np.nan, dtype=np.float32)
    if is_pose.any():  # a state that is no pose may have fewer numbers
        positions[is_pose] = states[is_pose, :3]
    return positions


def _destinations(tool: np.ndarray, commands: np.ndarray, tasks: np.ndarray, first: np.ndarray) -> np.ndarray:
    """(n, 3) m, what the target is put onto: `HELD_BELOW_M` under the tool where it lets go next of what it carried, or
    in the frames after did so last; NaN where it never does, and in frames that are about another task than that one.
    At the tool's own height a picture shows what is behind.

    Args:
        tool: (n, 3) m. commands: (n,) of the gripper. tasks: (n,). first: (n,), the first frame of each one's episode.
    """
    found = np.full_like(tool, np.nan)
    for begin, end in zip(starts := np.unique(first), [*starts[1:], len(tool)], strict=True):
        told = np.flatnonzero(np.abs(commands[begin:end]) > 0.5) + begin
        turned = told[1:][np.diff(np.sign(commands[told])) != 0]  # where another command begins
        opened = [
            opening
            for closing, opening in pairwise(turned)
            if commands[opening] > 0 and np.linalg.norm(tool[opening] - tool[closing]) > CARRIED_M
        ]
        done = begin
        for opening in opened:
            alike = (tasks[done:end] == tasks[opening])[:, None]
            found[done:end] = np.where(alike, tool[opening] - [0, 0, HELD_BELOW_M], np.nan)
            done = opening + 1
    return found


def _action_chunks(table: pa.Table, first: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Actions (n, chunk, A) and valid steps (n, chunk) from the ideal plans, or else from the actions of the frames
    that follow.
    """
    size = table.num_rows
    if "action_plan" in table.column_names:
        plans = numbers(table, "action_plan")
        if chunk > plans.shape[1]:
            raise ValueError(f"chunk_size={chunk} is longer than the data's action_plan of {plans.shape[1]} steps")
        return plans[:, :chunk], np.arange(chunk) < numbers(table, "action_plan_length")[:, None]
    ends = np.append(np.flatnonzero(np.diff(first)) + 1, size)
    last = ends[np.searchsorted(ends, np.arange(size), side="right")] - 1
    wanted = np.arange(size)[:, None] + np.arange(chunk)
    return numbers(table, "action")[np.minimum(wanted, last[:, None])], wanted <= last[:, None]
