"""What an importer must be told about a robot and its stereo camera: a small YAML file, checked strictly.

    embodiment: my_arm               # selects the statistics
    license: cc-by-4.0               # of the data, for the dataset card
    cameras:                         # names of the two views in the source; see the importers
      left: observation.images.left
      right: observation.images.right
    calibration:                     # of the rectified views, as they are before crop_px and resize_px
      size_px: [1280, 720]           # width, height
      focal_length_px: [730.0, 730.0]
      principal_point_px: [640.0, 360.0]
      baseline_m: 0.063
      transform_camera_to_base: [[...], [...], [...], [0, 0, 0, 1]]
    state: {column: observation.state, position: [0, 1, 2], rpy: [3, 4, 5], gripper: 6, gripper_closed_open: [0, 0.08]}
    action: {column: action, kind: delta, position: [0, 1, 2], rpy: [3, 4, 5], gripper: 6, gripper_closed_open: [0, 1]}

Optional: `parts_px: {left: [x, y, width, height], right: ...}` where one image holds both views; `crop_px: [x, y,
width, height]` and `resize_px: [width, height]` of both views, which the calibration follows; `tool: [x, y, z, roll,
pitch, yaw]`, the pose of our tool frame (see `schema`) in the frame that the robot reports; `fps` where the source does
not say it; `vertical_misalignment_px`, rows that matching points of the views are known to lie apart at most: without
it, episodes are refused from about one row on. A value of the calibration may also be the name of a column of the
source, for a camera that moves. What looks like a mistake (see `plausibility`) and is none: `accept`, a list of
field_of_view, principal_point, units, camera_pose.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stereovla.dataset_builder.dataset.schema import CALIBRATION_KEYS
from stereovla.dataset_builder.formats import plausibility
from stereovla.processing.camera_geometry import Calibration
from stereovla.untrusted import read_yaml

SHAPES = {"focal_length_px": (2,), "principal_point_px": (2,), "baseline_m": (), "transform_camera_to_base": (4, 4)}
KINDS = ("absolute", "delta", "from_states")
_LARGEST_PX = 16384  # side of a view
_LARGEST = 1e9  # of any number in the file


@dataclass(frozen=True)
class Vector:
    """Where the state or the action is in the source. Without `position` the vector is taken as it is.

    Args:
        column: name in the source.
        position, rpy: indices of x, y, z (m) and of roll, pitch, yaw (rad, R = Rz(yaw) Ry(pitch) Rx(roll)).
        gripper: index of the gripper, whose values `gripper_closed_open` say closed and open.
        kind: of an action: "absolute" = the pose to be reached within the frame, "delta" = as in `schema`, in the
            robot's base frame, "from_states" = the change of the state until the next frame. With the last, column,
            gripper and gripper_closed_open may say where the gripper's commands are; without them, the opening of the
            next frame is the command, which never says "close" around a thick object.
    """

    column: str | None = None
    position: tuple[int, ...] | None = None
    rpy: tuple[int, ...] | None = None
    gripper: int | None = None
    gripper_closed_open: tuple[float, ...] | None = None
    kind: str | None = None

    @property
    def is_pose(self) -> bool:
        return self.position is not None or self.kind == "from_states"


@dataclass(frozen=True)
class Rig:
    """The contents of the YAML file, see the module."""

    embodiment: str
    license: str
    cameras: Mapping[str, str]
    calibration: Mapping[str, Any]
    state: Vector | None = None
    action: Vector | None = None
    parts_px: Mapping[str, tuple[int, ...]] | None = None
    crop_px: tuple[int, ...] | None = None
    resize_px: tuple[int, ...] | None = None
    tool: tuple[float, ...] = (0.0,) * 6
    fps: float | None = None
    vertical_misalignment_px: float = 0.0
    accept: tuple[str, ...] = ()

    @property
    def stored_misalignment_px(self) -> float:
        """`vertical_misalignment_px` in rows of what `view` makes of a view."""
        height = self.crop_px[3] if self.crop_px else self.size_px[1]
        return self.vertical_misalignment_px * (self.resize_px[1] / height if self.resize_px else 1.0)

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the calibrated views."""
        return tuple(self.calibration["size_px"])

    @property
    def stored_size_px(self) -> tuple[int, int]:
        """Width and height of what `view` makes of a view."""
        return self.resize_px or (self.crop_px[2:] if self.crop_px else self.size_px)

    @property
    def is_pose(self) -> bool:
        """Whether the states are poses of the tool."""
        return self.state.is_pose

    def calibration_columns(self) -> dict[str, str]:
        """{key of the calibration: column of the source} of those that are given by name."""
        return {key: value for key, value in self.calibration.items() if isinstance(value, str)}

    def moved(self, calibration: Mapping[str, Any]) -> dict[str, Any]:
        """Calibration of a view (the four keys of the schema) -> of what `view` makes of it."""
        result = Calibration.from_mapping(calibration)
        if self.crop_px:
            result = result.moved(1.0, -np.array(self.crop_px[:2]))
        if self.resize_px:
            size = self.crop_px[2:] if self.crop_px else self.size_px
            result = result.moved(np.array(self.resize_px) / np.array(size), 0.0)
        arrays = {key: np.asarray(getattr(result, key), dtype=np.float32) for key in CALIBRATION_KEYS}
        return arrays | {"baseline_m": result.baseline_m}

    def part(self, image: np.ndarray, side: str) -> np.ndarray:
        """The calibrated view of `side` in an image of the source, uint8 (h, w, 3)."""
        if not self.parts_px:
            return image
        x, y, width, height = self.parts_px[side]
        return image[y : y + height, x : x + width]

    def view(self, part: np.ndarray) -> np.ndarray:
        """A calibrated view, uint8 (h, w, 3), cropped and resized."""
        if self.crop_px:
            x, y, width, height = self.crop_px
            part = part[y : y + height, x : x + width]
        if self.resize_px:
            part = np.asarray(Image.fromarray(part).resize(self.resize_px, Image.Resampling.LANCZOS))
        return part


def read_rig(path: Path) -> Rig:
    """Read and check the YAML file; ValueError names file, key, value and what is valid."""
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; `stereovla data import lerobot --help` says more") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    return make_rig(content, str(path))


def make_rig(content: Any, where: str) -> Rig:
    """Checked `Rig` of the parsed YAML; `where` names it in errors."""
    values = _known(content, Rig, where)
    for name in ("embodiment", "license"):
        if not isinstance(values[name], str) or not values[name].strip():
            raise ValueError(f"{where}: {name} is {values[name]!r}, expected some text")
    for name in ("state", "action"):
        if values.get(name) is not None:
            values[name] = _vector(values[name], name, f"{where}: {name}")
    state, action = values.get("state"), values.get("action")
    if state and action and state.is_pose != action.is_pose:
        raise ValueError(
            f"{where}: state and action must both be poses (position, rpy, gripper) or both be taken as they are"
        )
    values["accept"] = _accepted(values.get("accept") or [], f"{where}: accept")
    values["calibration"] = _calibration(values["calibration"], f"{where}: calibration", values["accept"])
    size = values["calibration"]["size_px"]
    for name, count in (("crop_px", 4), ("resize_px", 2)):
        if values.get(name) is not None:
            values[name] = _numbers(values[name], count, f"{where}: {name}", whole=True)
    if values.get("crop_px"):
        x, y, width, height = values["crop_px"]
        if min(x, y) < 0 or min(width, height) < 1 or x + width > size[0] or y + height > size[1]:
            raise ValueError(
                f"{where}: crop_px {[x, y, width, height]} does not lie within the view of {list(size)} px"
            )
    if values.get("resize_px") and not all(1 <= side <= _LARGEST_PX for side in values["resize_px"]):
        raise ValueError(f"{where}: resize_px {list(values['resize_px'])} must be positive, up to {_LARGEST_PX} px")
    if "tool" in values:
        values["tool"] = _numbers(values["tool"], 6, f"{where}: tool")
        problem = plausibility.tool_problem(np.array(values["tool"]))
        if problem and "units" not in values["accept"]:
            raise ValueError(f"{where}: {problem} {_unless('units')}")
    if values.get("fps") is not None:
        (values["fps"],) = _numbers([values["fps"]], 1, f"{where}: fps")
        if not values["fps"] > 0:
            raise ValueError(f"{where}: fps is {values['fps']!r}, expected a positive number")
    rows = values.get("vertical_misalignment_px", 0.0)
    if not isinstance(rows, int | float) or isinstance(rows, bool) or not 0 <= rows <= size[1]:
        raise ValueError(f"{where}: vertical_misalignment_px is {rows!r}, expected 0 ... {size[1]} rows")
    if values.get("parts_px") is not None:
        values["parts_px"] = _parts(values["parts_px"], size, f"{where}: parts_px")
    cameras = values["cameras"]
    if not isinstance(cameras, Mapping) or not all(isinstance(name, str) for name in [*cameras, *cameras.values()]):
        raise ValueError(f"{where}: cameras is {cameras!r}, expected names such as {{left: ..., right: ...}}")
    return Rig(**values)


def _known(content: Any, kind: type, where: str) -> dict[str, Any]:
    """`content` as a dict with the fields of the dataclass `kind`, none unknown, none missing."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r}, expected keys and values")
    known = [item.name for item in fields(kind)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"{where} has no key {key!r}; {hint}")
    missing = [item.name for item in fields(kind) if item.default is MISSING and content.get(item.name) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return dict(content)


def _vector(content: Any, name: str, where: str) -> Vector:
    values = _known(content, Vector, where)
    kind = values.get("kind")
    if name == "state" and kind is not None:
        raise ValueError(f"{where}: only an action has a kind")
    if kind == "from_states" and set(values) == {"kind"}:
        return Vector(kind=kind)
    if not isinstance(values.get("column"), str):
        raise ValueError(f"{where} lacks the name of its column")
    parts = ("position", "rpy", "gripper", "gripper_closed_open")
    if kind == "from_states":
        parts = parts[2:]
        if {"position", "rpy"} & set(values):
            raise ValueError(
                f"{where}: with kind from_states the pose follows from the states; leave position, rpy out"
            )
    given = [part for part in parts if values.get(part) is not None]
    if given and len(given) < len(parts):
        raise ValueError(
            f"{where} lacks {', '.join(part for part in parts if part not in given)}; "
            "give all of them, or none to take the vector as it is"
        )
    if not given:
        if kind is not None:
            raise ValueError(f"{where}: kind {kind!r} needs position, rpy, gripper and gripper_closed_open")
        return Vector(column=values["column"])
    if name == "action" and kind not in KINDS:
        raise ValueError(f"{where}: kind is {kind!r}; valid: {', '.join(KINDS)}")
    for part in {"position", "rpy"} & set(parts):
        values[part] = _numbers(values[part], 3, f"{where}: {part}", whole=True)
    (values["gripper"],) = _numbers([values["gripper"]], 1, f"{where}: gripper", whole=True)
    closed, opened = _numbers(values["gripper_closed_open"], 2, f"{where}: gripper_closed_open")
    if closed == opened:
        raise ValueError(f"{where}: gripper_closed_open is {[closed, opened]}; the two values must differ")
    given = [*values.get("position", ()), *values.get("rpy", ()), values["gripper"]]
    if min(given) < 0:
        raise ValueError(f"{where}: indices count from 0, got {given}")
    return Vector(**{**values, "gripper_closed_open": (closed, opened)})


def _accepted(content: Any, where: str) -> tuple[str, ...]:
    if not isinstance(content, list | tuple) or not all(name in [*plausibility.CHECKS] for name in content):
        raise ValueError(f"{where} is {content!r}, expected a list of {', '.join(plausibility.CHECKS)}")
    return tuple(content)


def _unless(check: str) -> str:
    """The end of a message about what is not plausible."""
    return f"Where it is meant so, the rig says `accept: [{check}]`"


def _calibration(content: Any, where: str, accept: Sequence[str]) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {content!r}, expected keys and values")
    known = ["size_px", *CALIBRATION_KEYS]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(
                f"{where} has no key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"it has {known}")
            )
    missing = [key for key in known if content.get(key) is None]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}: without a calibration a pair says nothing about depth")
    values = dict(content)
    values["size_px"] = _numbers(content["size_px"], 2, f"{where}: size_px", whole=True)
    if not all(1 <= side <= _LARGEST_PX for side in values["size_px"]):
        raise ValueError(f"{where}: size_px is {content['size_px']}, expected 1 ... {_LARGEST_PX} px")
    for key in CALIBRATION_KEYS:
        if not isinstance(content[key], str):
            values[key] = check_value(key, content[key], values["size_px"], where, accept)
    return values


def check_value(key: str, value: Any, size_px: tuple[int, int], where: str, accept: Sequence[str] = ()) -> np.ndarray:
    """One value of a calibration as float64 of its shape; ValueError says what cannot be, or is not plausible and not
    named in `accept`.
    """
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {key} is {value!r}, expected {SHAPES[key]} numbers") from error
    if array.shape != SHAPES[key] and array.size == np.prod(SHAPES[key], dtype=int):
        array = array.reshape(SHAPES[key])  # columns of a table are flat
    with np.errstate(over="ignore"):  # as it is stored
        finite = np.isfinite(array.astype(np.float32)).all()
    if array.shape != SHAPES[key] or not finite:
        raise ValueError(f"{where}: {key} is {value!r}, expected {SHAPES[key]} finite numbers")
    if key == "focal_length_px" and (array < 1).any():
        raise ValueError(f"{where}: {key} is {array.tolist()}, must be at least 1 px")
    if key == "baseline_m" and not 1e-3 <= array <= 1:
        hint = ": mm or cm for m?" if array > 1 else ""
        raise ValueError(f"{where}: {key} is {array.tolist()}, must be in 0.001 ... 1 m{hint}")
    if key == "principal_point_px" and not ((array >= 0) & (array <= size_px)).all():
        raise ValueError(f"{where}: {key} {array.tolist()} lies outside the view of {list(size_px)} px")
    if key == "transform_camera_to_base":
        rotation = array[:3, :3]
        rigid = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) and np.linalg.det(rotation) > 0
        if not rigid or not np.allclose(array[3], [0, 0, 0, 1]):
            raise ValueError(f"{where}: {key} is no rigid transform: {array.tolist()}")
        u, _, v = np.linalg.svd(rotation)  # digits that were rounded by hand are made orthogonal
        array[:3, :3] = u @ v
    if key in _PLAUSIBLE:
        check, find = _PLAUSIBLE[key]
        problem = None if check in accept else find(array, size_px)
        if problem:
            raise ValueError(f"{where}: {problem} {_unless(check)}")
    return array


# key of the calibration: name of its check, and what finds its problem, or None, from value and size_px
_PLAUSIBLE: dict[str, tuple[str, Callable[[np.ndarray, tuple[int, int]], str | None]]] = {
    "focal_length_px": ("field_of_view", plausibility.focal_length_problem),
    "principal_point_px": ("principal_point", plausibility.principal_point_problem),
    "transform_camera_to_base": ("units", lambda transform, _: plausibility.camera_place_problem(transform)),
}


def _parts(content: Any, size: tuple[int, int], where: str) -> dict[str, tuple[int, ...]]:
    if not isinstance(content, Mapping) or set(content) != {"left", "right"}:
        raise ValueError(f"{where} is {content!r}, expected {{left: [x, y, width, height], right: [...]}}")
    parts = {side: _numbers(content[side], 4, f"{where}.{side}", whole=True) for side in ("left", "right")}
    for side, part in parts.items():
        if part[2:] != size or min(part) < 0:
            raise ValueError(f"{where}.{side} is {list(part)}; its size must be the calibration's size_px {list(size)}")
    return parts


def _numbers(value: Any, count: int, where: str, whole: bool = False) -> tuple:
    kinds = int if whole else int | float
    good = isinstance(value, list | tuple) and len(value) == count
    good = good and all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
    if not good or not all(-_LARGEST <= item <= _LARGEST for item in value):  # NaN is neither
        raise ValueError(f"{where} is {value!r}, expected {count} {'whole ' if whole else ''}numbers")
    return tuple(value) if whole else tuple(float(item) for item in value)
