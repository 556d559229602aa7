"""The contract between rooms: every key of a dataset row and of a training window, with shape, dtype, unit and range.

A *row* is one frame as it is stored; the frames of an episode are contiguous, start at frame_index 0, and an episode
never spans two shards. A *window* is what `streaming.WindowStream` yields for training. `NEEDED` says which images a
model needs; meta/info.json names the `views` of a dataset, and in `depth_source` whose its depth is. Poses, actions and
views follow these rules:

- state: x, y, z of the tool centre point in the robot base frame (m); roll, pitch, yaw (rad, R = Rz(yaw) Ry(pitch)
  Rx(roll)) of the tool, zero when the gripper points straight down with its fingers opening along base y; gripper
  opening, 1 = open.
- a tool that always points down has neither roll nor pitch: its state is x, y, z, yaw, opening, and its action dx, dy,
  dz, dyaw, command (`POSES`).
- action: dx, dy, dz (m, base frame), droll, dpitch, dyaw (rad, R_next = R(d) R_now) to be reached within one frame;
  gripper command, below -0.5 close, above 0.5 open, else keep.
- robots whose state is no pose of the tool (joint angles, two arms, ...): `state_is_pose` is False, state and action
  are the robot's own vectors of any size, the same in all rows of a dataset (meta/info.json: state_dim, action_dim).
- transform_camera_to_base: pose of the left camera's optical frame (x right, y down, z forward). Pixel centres lie at j
  + 0.5.
- `left` is the main view, in every row; `right` makes a rectified pair of it, whose baseline a calibration then has. A
  further view, such as `wrist`, has the columns `observation.images.wrist` and `observation.depth.wrist`, a size of its
  own, and is null where it is absent.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Features, Image, List, Value

from stereovla.processing.state_entries import POSES

STATE_DIM = ACTION_DIM = 7  # of most robots; "S" and "A" in the shapes below
HISTORY = 4  # states that the policy is told, the present one included; the released model's number
PLAN_LENGTH = 16  # steps of `action_plan` in data that our builder writes
DEPTH_UNIT_M = 1e-4  # one step of the stored 16-bit depth; 65535 steps = 6.55 m
SEGMENTATION = {"background": 0, "robot": 1, "gripper": 2, "target": 3}  # 4 and above: other objects
IMAGES, DEPTH = "observation.images.", "observation.depth"
PAIR = LEFT, RIGHT = f"{IMAGES}left", f"{IMAGES}right"
CALIBRATION_KEYS = ("focal_length_px", "principal_point_px", "baseline_m", "transform_camera_to_base")
CALIBRATION = tuple(f"calibration.{key}" for key in CALIBRATION_KEYS)
BASELINE = "calibration.baseline_m"  # of a pair alone
OTHER_NAMES = "others.names"
VIEW = re.compile(r"[a-z][a-z0-9_]{0,39}")  # name of a view
# whose depth it is: of a camera, of the renderer, or a model's answer
DEPTH_SOURCES = ("sensor", "simulation", "estimated by CHECKPOINT@REVISION")
# the images without which a model learns nothing from a row
NEEDED = {"StereoVLA": PAIR, "DepthVLA": (LEFT,)}


@dataclass(frozen=True)
class Column:
    """One key. `shape` may hold names such as "H", which must agree within a row, but for strings, of which it means a
    list of any length; `low`/`high` None = unbounded.
    """

    key: str
    dtype: str
    shape: tuple[int | str, ...] = ()
    unit: str = ""
    low: float | None = None
    high: float | None = None
    optional: bool = False  # the column may be missing, or null in a row
    image: bool = False  # stored as an encoded image
    note: str = ""


_CALIBRATION = (
    Column("calibration.focal_length_px", "float32", (2,), "px", low=1.0, optional=True, note="fx, fy"),
    Column("calibration.principal_point_px", "float32", (2,), "px", low=0.0, optional=True, note="cx, cy"),
    Column("calibration.baseline_m", "float32", (), "m", low=1e-3, high=1.0, optional=True),
    Column(
        "calibration.transform_camera_to_base",
        "float32",
        (4, 4),
        "m",
        optional=True,
        note="left camera's optical frame -> base",
    ),
)

ROW: tuple[Column, ...] = (
    Column(LEFT, "uint8", ("H", "W", 3), image=True, low=0, high=255, note="RGB, JPEG"),
    Column(RIGHT, "uint8", ("H", "W", 3), image=True, low=0, high=255, optional=True, note="RGB, JPEG"),
    Column("observation.state", "float32", ("S",), "m, rad, 0..1"),
    Column("action", "float32", ("A",), "m, rad, -1..1", note="the expert's ideal next action from this state"),
    Column(
        "action_plan",
        "float32",
        ("P", "A"),
        "m, rad, -1..1",
        optional=True,
        note="the expert's ideal plan from this state, held still after its end",
    ),
    Column("action_plan_length", "int32", (), "steps", low=0, optional=True, note="valid steps of action_plan"),
    Column(
        "keyframe_pose",
        "float32",
        ("S",),
        "m, rad, 0..1",
        optional=True,
        note="the next of the keyframes that the world names: pre_grasp, grasp, lift, pre_place, place",
    ),
    Column(
        "keyframe_symmetry",
        "int32",
        low=1,
        optional=True,
        note="poses in a whole turn of the tool about its axis that are as right as keyframe_pose: to grasp a cube 4; "
        "null = as many as hold alike with the gripper",
    ),
    Column("state_is_pose", "bool", optional=True, note="False = state and action are the robot's own; null = True"),
    *_CALIBRATION,
    Column(
        DEPTH,
        "float32",
        ("H", "W"),
        "m",
        low=0.0,
        optional=True,
        image=True,
        note="planar depth of the left view, 16-bit PNG in steps of 1e-4 m, 0 = none or beyond 6.55 m",
    ),
    Column(
        "observation.segmentation",
        "uint8",
        ("H", "W"),
        low=0,
        high=255,
        optional=True,
        image=True,
        note="left view, 8-bit PNG: 0 background, 1 robot arm, 2 gripper, 3 target, 4.. other objects",
    ),
    Column("target.name", "string", note='such as "red cube"; "unnamed object" where an import cannot know it'),
    Column(
        "target.box_left_px",
        "float32",
        (4,),
        "px",
        low=0.0,
        optional=True,
        note="x_min, y_min, x_max, y_max, max exclusive; null = not visible",
    ),
    Column("target.box_right_px", "float32", (4,), "px", low=0.0, optional=True, note="the same in the right view"),
    Column(
        OTHER_NAMES,
        "string",
        ("O",),
        optional=True,
        note="of the other objects of the scene, in the order of the segmentation's ids from 4 on",
    ),
    Column("task", "string", note="the instruction"),
    Column("embodiment", "string", note="selects the statistics"),
    Column("episode_index", "int64", low=0),
    Column("frame_index", "int64", low=0),
    Column("timestamp", "float32", (), "s", low=0.0),
)

WINDOW: tuple[Column, ...] = (
    Column("left", "uint8", ("H", "W", 3), low=0, high=255, note="RGB"),
    Column("right", "uint8", ("H", "W", 3), low=0, high=255, optional=True, note="RGB"),
    Column(
        "state_history",
        "float32",
        ("history", "S"),
        "m, rad, 0..1",
        note="oldest first, the present state last; the episode's first state repeated at its start",
    ),
    Column("actions", "float32", ("chunk", "A"), "m, rad, -1..1", note="ideal actions from the present state"),
    Column("action_mask", "bool", ("chunk",), note="True = a step to learn from, False = padding"),
    Column("keyframe_pose", "float32", ("S",), "m, rad, 0..1", optional=True),
    Column("keyframe_symmetry", "int32", low=1, optional=True, note="as in a row"),
    *_CALIBRATION,
    Column("boxes", "float32", (2, 4), "px", note="of the target in the left and right view; NaN = not visible"),
    Column(
        "points",
        "float32",
        (3, 2),
        "px",
        note="(u, v) in the left view of the target, of the tool, and of what the target is put onto; NaN = not in it, "
        "or put nowhere",
    ),
    Column("depth", "float32", ("H", "W"), "m", low=0.0, optional=True, note="where the stream was asked for it"),
    Column("segmentation", "uint8", ("H", "W"), optional=True, note="where the stream was asked for it"),
    Column("points_px", "float32", ("N", 2), "px", optional=True, note="(u, v) that a depth question asks about"),
    Column("depths_m", "float32", ("N",), "m", low=0.0, optional=True, note="the answer: planar depth at points_px"),
    Column("names", "string", ("K",), optional=True, note="what objects in the left view are called, where asked for"),
    Column("names_px", "float32", ("K", 2), "px", optional=True, note="(u, v) of the middle of each one's box"),
    Column("task", "string"),
    Column("target", "string", note="name of the object that box questions are about"),
    Column("embodiment", "string"),
    Column("seed", "int64", low=0, note="of what is drawn for this window, in this epoch"),
    Column("objective", "string", note="action | depth | box | pose"),
    Column("episode_index", "int64", low=0),
    Column("frame_index", "int64", low=0),
)


def image_key(view: str) -> str:
    """Column of the pictures of a view."""
    return f"{IMAGES}{view}"


def depth_key(view: str) -> str:
    """Column of the depth of a view."""
    return DEPTH if view == "left" else f"{DEPTH}.{view}"


def is_depth(key: str) -> bool:
    """Whether a column holds depth."""
    return key == DEPTH or key.startswith(f"{DEPTH}.")


def views_of(keys: Iterable[str]) -> tuple[str, ...]:
    """Names of the views whose pictures are among the columns `keys`: left, right, then the further ones by name."""
    names = {name for key in keys if VIEW.fullmatch(name := key.removeprefix(IMAGES)) and key != name}
    return (*(name for name in ("left", "right") if name in names), *sorted(names - {"left", "right"}))


def for_whom(views: Sequence[str]) -> str:
    """Which model cannot learn from data with these views, in words; "" where all can."""
    unable = [model for model, needed in NEEDED.items() if not {*map(image_key, views)}.issuperset(needed)]
    if not unable:
        return ""
    cameras = "one camera" if len(views) == 1 else f"{len(views)} cameras ({', '.join(views)}), but no right view"
    able = [model for model in NEEDED if model not in unable]
    return f"{cameras}: {', '.join(unable)} cannot train on it, {', '.join(able)} can"


def columns_of(keys: Iterable[str]) -> tuple[Column, ...]:
    """`ROW` with the columns of the further views among `keys`: pictures after the right view, depth after `DEPTH`."""
    return _with_views(ROW, keys, {IMAGES: RIGHT, f"{DEPTH}.": DEPTH})


def _with_views(table: tuple[Column, ...], keys: Iterable[str], starts: Mapping[str, str]) -> tuple[Column, ...]:
    """`table`, and behind a column those of further views, {how their keys start: the column that they are like}."""
    known = {column.key for column in table}
    added: dict[str, list[Column]] = {}
    for key in sorted(set(keys) - known):
        for start, like in starts.items():
            view = key.removeprefix(start)
            if key.startswith(start) and VIEW.fullmatch(view) and view != "left":
                own = {size: size if view == "right" else f"{size} of {view}" for size in ("H", "W")}
                column = next(column for column in table if column.key == like)
                shape = tuple(own.get(size, size) for size in column.shape)
                note = column.note.replace("the left view", "this view")
                added.setdefault(like, []).append(replace(column, key=key, shape=shape, note=note))
    return tuple(found for column in table for found in (column, *added.get(column.key, ()))) if added else table


def features(
    plan_length: int = PLAN_LENGTH,
    state_dim: int = STATE_DIM,
    action_dim: int = ACTION_DIM,
    columns: Sequence[str] | None = None,
) -> Features:
    """`datasets.Features` of a row with `columns` (default: every one), `action_plan` being (plan_length,
    action_dim).
    """
    sizes = {"P": plan_length, "S": state_dim, "A": action_dim}

    def feature(column: Column) -> Any:
        if column.image:
            return Image()
        result: Any = Value(column.dtype)
        for size in reversed(column.shape):
            result = List(result, length=-1 if column.dtype == "string" else sizes.get(size, size))
        return result

    wanted = row_columns() if columns is None else columns
    return Features({column.key: feature(column) for column in columns_of(wanted) if column.key in wanted})


def row_columns() -> list[str]:
    """Keys of a row without further views, in their stored order."""
    return [column.key for column in ROW]


def check_columns(names: Sequence[str], *, source: str, needed: Sequence[str] = ()) -> None:
    """ValueError that names the required columns missing from `names`, or misspelt, in dataset `source`."""
    required = [column.key for column in ROW if not column.optional] + list(needed)
    missing = [key for key in dict.fromkeys(required) if key not in names]
    if missing:
        near = {key: difflib.get_close_matches(key, names, n=1) for key in missing}
        hints = ", ".join(f"{key} (there is {match[0]})" if match else key for key, match in near.items())
        why = f" ({for_whom(views_of(names))})" if RIGHT in missing and LEFT in names else ""
        raise ValueError(f"{source} has no column {hints}; it has: {', '.join(names)}{why}")


def validate_row(row: Mapping[str, Any], *, where: str = "row") -> None:
    """Check one decoded row against `ROW` and what the numbers must mean; ValueError names key, value and limit."""
    is_pose = row.get("state_is_pose") is not False
    size = np.size(row.get("observation.state"))
    size = size if size in POSES else STATE_DIM
    sizes = _check_table(row, columns_of(row), where, {"S": size, "A": size} if is_pose else {})
    if is_pose:
        _check_poses(row, where)
    if row.get("action_plan") is not None:
        length = row.get("action_plan_length")
        if length is None or length > sizes["P"]:
            raise ValueError(f"{where}: action_plan_length is {length}, action_plan has {sizes['P']} steps")
        if length and not np.array_equal(row["action_plan"][0], row["action"]):
            raise ValueError(
                f"{where}: action {row['action']} is not the first step of action_plan {row['action_plan'][0]}"
            )
    _check_calibration(row, sizes, where)
    for key in ("target.box_left_px", "target.box_right_px"):
        if row.get(key) is not None:
            x_min, y_min, x_max, y_max = (float(value) for value in row[key])
            if not (x_min < x_max <= sizes["W"] and y_min < y_max <= sizes["H"]):
                raise ValueError(f"{where}: {key} {list(row[key])} is no box within {sizes['W']}x{sizes['H']} px")
    for key in ("task", "target.name", "embodiment"):
        if not row[key].strip():
            raise ValueError(f"{where}: {key} is empty")
    others, labels = row.get(OTHER_NAMES), row.get("observation.segmentation")
    if others is not None and labels is not None and labels.max(initial=0) > SEGMENTATION["target"] + len(others):
        raise ValueError(
            f"{where}: the segmentation has the id {labels.max()}, but {OTHER_NAMES} {others} are of ids from 4 to "
            f"{SEGMENTATION['target'] + len(others)}"
        )


def validate_window(window: Mapping[str, Any], *, where: str = "window") -> None:
    """Check one training window against `WINDOW`; ValueError names key, value and limit."""
    table = _with_views(WINDOW, window, {"view.": "right", "depth.": "depth"})
    _check_table(window, table, where, {})


def _check_table(
    values: Mapping[str, Any], table: tuple[Column, ...], where: str, sizes: dict[str, int]
) -> dict[str, int]:
    """Check `values` with the named `sizes`, and return all sizes."""
    known = [column.key for column in table]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(
                f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else f"; keys: {known}")
            )
    for column in table:
        value = values.get(column.key)
        if value is None:
            if not column.optional:
                raise ValueError(f"{where}: {column.key} is missing")
            continue
        _check_value(value, column, sizes, where)
    return sizes


def _check_value(value: Any, column: Column, sizes: dict[str, int], where: str) -> None:
    name = f"{where}: {column.key}"
    if column.dtype == "string":
        listed = bool(column.shape)
        texts = value if listed else [value]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{name} is {value!r}, expected {'a list of strings' if listed else 'a string'}")
        return
    array = np.asarray(value)
    if column.shape and array.dtype != np.dtype(column.dtype):
        raise ValueError(f"{name} has dtype {array.dtype}, expected {column.dtype}")
    expected = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in column.shape)
    if array.ndim != len(expected) or any(
        isinstance(e, int) and e != a for e, a in zip(expected, array.shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
    sizes.update({size: array.shape[i] for i, size in enumerate(column.shape) if isinstance(size, str)})
    if array.dtype.kind == "f" and column.key not in ("boxes", "points") and not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity: {array.reshape(-1)[:16].tolist()}")
    if array.size and column.dtype != "uint8":
        low, high = array.min(), array.max()
        if (column.low is not None and low < column.low) or (column.high is not None and high > column.high):
            raise ValueError(f"{name} spans {low} ... {high} {column.unit}, allowed: {column.low} ... {column.high}")


def _check_poses(row: Mapping[str, Any], where: str) -> None:
    _check_state(row["observation.state"], where, "observation.state")
    for key in ("action", "action_plan"):
        if row.get(key) is not None:
            _check_gripper(np.asarray(row[key])[..., -1], -1.0, 1.0, where, key)
    if row.get("keyframe_pose") is not None:
        _check_state(row["keyframe_pose"], where, "keyframe_pose")


def _check_state(state: np.ndarray, where: str, key: str) -> None:
    angles = state[3:-1]
    if np.abs(angles).max() > np.pi + 1e-4:
        raise ValueError(f"{where}: {key} has angles {angles.tolist()}, allowed: -pi ... pi rad")
    _check_gripper(state[-1], 0.0, 1.0, where, key)


def _check_gripper(value: np.ndarray, low: float, high: float, where: str, key: str) -> None:
    if np.min(value) < low - 1e-4 or np.max(value) > high + 1e-4:
        raise ValueError(
            f"{where}: the gripper of {key} spans {np.min(value)} ... {np.max(value)}, allowed: {low} ... {high}"
        )


def _check_calibration(row: Mapping[str, Any], sizes: Mapping[str, int], where: str) -> None:
    given = [key for key in CALIBRATION if row.get(key) is not None]
    if not given:
        return
    whole = [key for key in CALIBRATION if key != BASELINE or row.get(RIGHT) is not None]
    if given != whole:
        raise ValueError(
            f"{where}: the calibration has {', '.join(given)}; with{'' if BASELINE in whole else 'out'} a right "
            f"view it is {', '.join(whole)}, or nothing"
        )
    transform = np.asarray(row["calibration.transform_camera_to_base"], dtype=np.float64)
    rotation = transform[:3, :3]
    if (
        not np.allclose(transform[3], [0, 0, 0, 1])
        or not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
        or (np.linalg.det(rotation) < 0)
    ):
        raise ValueError(f"{where}: calibration.transform_camera_to_base is no rigid transform: {transform.tolist()}")
    cx, cy = row["calibration.principal_point_px"]
    if cx > sizes["W"] or cy > sizes["H"]:
        raise ValueError(f"{where}: principal point ({cx}, {cy}) lies outside the view of {sizes['W']}x{sizes['H']} px")
