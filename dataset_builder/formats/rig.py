"""What an importer must be told about a robot and its cameras: a small YAML file, checked strictly.

    embodiment: my_arm               # selects the statistics
    license: cc-by-4.0               # of the data, for the dataset card
    cameras:                         # names of the views in the source; see the importers
      left: observation.images.left  # the main view, the only one that must be there
      right: observation.images.right
      wrist: observation.images.hand # any further views
    calibration:                     # of the rectified left and right view, as they are before crop_px and resize_px
      size_px: [1280, 720]           # width, height
      focal_length_px: [730.0, 730.0]
      principal_point_px: [640.0, 360.0]
      baseline_m: 0.063
      transform_camera_to_base: [[...], [...], [...], [0, 0, 0, 1]]
    state: {column: observation.state, position: [0, 1, 2], rpy: [3, 4, 5], gripper: 6, gripper_closed_open: [0, 0.08]}
    action: {column: action, kind: delta, position: [0, 1, 2], rpy: [3, 4, 5], gripper: 6, gripper_closed_open: [0, 1]}

Of one camera (no right view), `calibration` has no baseline_m, or is left out: StereoVLA cannot train on such data,
DepthVLA can.

Optional: `parts_px: {left: [x, y, width, height], right: ...}` where one image holds several views, or a view is a part
of one; `crop_px: [x, y, width, height]` and `resize_px: [width, height]` of left and right, which the calibration
follows, or `resize_px: {left: [width, height], wrist: ...}` where further views are resized too, right being as left;
`tool: [x, y, z, roll, pitch, yaw]`, the pose of our tool frame (see `schema`) in the frame that the robot reports;
`fps` where the source does not say it; `vertical_misalignment_px`, rows that matching points of the views are known to
lie apart at most: without it, episodes are refused from about one row on. A value of the calibration may also be the
name of a column of the source, for a camera that moves. What looks like a mistake (see `plausibility`) and is none:
`accept`, a list of field_of_view, principal_point, units, camera_pose.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stereovla.dataset_builder.dataset.schema import VIEW, image_key, views_of
from stereovla.dataset_builder.formats import plausibility
from stereovla.dataset_builder.formats.rig_calibration import LARGEST_PX, numbers, read_calibration, unless
from stereovla.processing.camera_geometry import Calibration
from stereovla.untrusted import read_yaml

STEREO = "stereo"  # a camera that shows left and right side by side
KINDS = ("absolute", "delta", "from_states")


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
    calibration: Mapping[str, Any] | None = None
    state: Vector | None = None
    action: Vector | None = None
    parts_px: Mapping[str, tuple[int, ...]] | None = None
    crop_px: tuple[int, ...] | None = None
    resize_px: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    tool: tuple[float, ...] = (0.0,) * 6
    fps: float | None = None
    vertical_misalignment_px: float = 0.0
    accept: tuple[str, ...] = ()

    @property
    def stored_misalignment_px(self) -> float:
        """`vertical_misalignment_px` in rows of what `stored` makes of a view."""
        height = self.crop_px[3] if self.crop_px else self.size_px[1]
        resized = self.resized_px("left")
        return self.vertical_misalignment_px * (resized[1] / height if resized else 1.0)

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views that are stored, in the order of `schema.views_of`."""
        pair = ("left", "right") if STEREO in self.cameras else ()
        return views_of(image_key(view) for view in (*pair, *self.cameras) if view != STEREO)

    @property
    def is_pair(self) -> bool:
        """Whether there is a right view."""
        return "right" in self.views

    @property
    def size_px(self) -> tuple[int, int] | None:
        """Width and height of the calibrated views; None without a calibration."""
        return tuple(self.calibration["size_px"]) if self.calibration else None

    @property
    def stored_size_px(self) -> tuple[int, int]:
        """Width and height of what `stored` makes of a calibrated view."""
        return self.resized_px("left") or (self.crop_px[2:] if self.crop_px else self.size_px)

    def resized_px(self, view: str) -> tuple[int, int] | None:
        """Width and height that a view is resized to; None = it is not."""
        side = "left" if view == "right" else view
        if isinstance(self.resize_px, Mapping):
            return self.resize_px.get(side)
        return self.resize_px if side == "left" else None

    @property
    def is_pose(self) -> bool:
        """Whether the states are poses of the tool."""
        return self.state.is_pose

    def calibration_columns(self) -> dict[str, str]:
        """{key of the calibration: column of the source} of those that are given by name."""
        return {key: value for key, value in self.stated_calibration().items() if isinstance(value, str)}

    def stated_calibration(self) -> dict[str, Any]:
        """{key of the schema: value or name of a column}, {} where there is none."""
        return {key: value for key, value in (self.calibration or {}).items() if key != "size_px"}

    def moved(self, calibration: Mapping[str, Any]) -> dict[str, Any]:
        """Calibration of a view (keys of the schema) -> of what `stored` makes of it."""
        result = Calibration.from_mapping(calibration)
        if self.crop_px:
            result = result.moved(1.0, -np.array(self.crop_px[:2]))
        if resized := self.resized_px("left"):
            size = self.crop_px[2:] if self.crop_px else self.size_px
            result = result.moved(np.array(resized) / np.array(size), 0.0)
        arrays = {key: np.asarray(getattr(result, key), dtype=np.float32) for key in calibration if key != "baseline_m"}
        return arrays | ({"baseline_m": result.baseline_m} if "baseline_m" in calibration else {})

    def part(self, image: np.ndarray, view: str) -> np.ndarray:
        """The view in an image of the source, uint8 (h, w, 3); ValueError where it does not lie within."""
        return _cut(image, self.parts_px[view], "parts_px") if self.parts_px and view in self.parts_px else image

    def stored(self, part: np.ndarray, view: str) -> np.ndarray:
        """A view, uint8 (h, w, 3), cropped and resized as it is stored."""
        if self.crop_px and view in ("left", "right"):
            part = _cut(part, self.crop_px, "crop_px")
        if resized := self.resized_px(view):
            part = np.asarray(Image.fromarray(part).resize(resized, Image.Resampling.LANCZOS))
        return part


def _cut(image: np.ndarray, place: tuple[int, ...], name: str) -> np.ndarray:
    x, y, width, height = place
    if x + width > image.shape[1] or y + height > image.shape[0]:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise ValueError(f"{name} {list(place)} does not lie within the picture of {size} px")
    return image[y : y + height, x : x + width]


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
    views = _views(values["cameras"], f"{where}: cameras")
    size = None
    given = values.get("calibration")
    if given is None and "right" in views:
        raise ValueError(f"{where} lacks calibration: without one a pair says nothing about depth")
    if given is not None:
        values["calibration"] = read_calibration(given, f"{where}: calibration", values["accept"], "right" in views)
        size = values["calibration"]["size_px"]
    if values.get("crop_px") is not None:
        values["crop_px"] = _rectangle(values["crop_px"], f"{where}: crop_px")
        x, y, width, height = values["crop_px"]
        if size and (x + width > size[0] or y + height > size[1]):
            raise ValueError(
                f"{where}: crop_px {[x, y, width, height]} does not lie within the view of {list(size)} px"
            )
    if values.get("resize_px") is not None:
        values["resize_px"] = _sizes(values["resize_px"], views, f"{where}: resize_px")
    if "tool" in values:
        values["tool"] = numbers(values["tool"], 6, f"{where}: tool")
        problem = plausibility.tool_problem(np.array(values["tool"]))
        if problem and "units" not in values["accept"]:
            raise ValueError(f"{where}: {problem} {unless('units')}")
    if values.get("fps") is not None:
        (values["fps"],) = numbers([values["fps"]], 1, f"{where}: fps")
        if not values["fps"] > 0:
            raise ValueError(f"{where}: fps is {values['fps']!r}, expected a positive number")
    rows = values.get("vertical_misalignment_px", 0.0)
    highest = size[1] if "right" in views else 0  # of one view, no rows can lie apart
    if not isinstance(rows, int | float) or isinstance(rows, bool) or not 0 <= rows <= highest:
        raise ValueError(f"{where}: vertical_misalignment_px is {rows!r}, expected 0 ... {highest} rows")
    if values.get("parts_px") is not None:
        values["parts_px"] = _parts(values["parts_px"], views, size, f"{where}: parts_px")
    return Rig(**values)


def _views(cameras: Any, where: str) -> tuple[str, ...]:
    """Names of the views of `cameras`, see `Rig.views`."""
    if not isinstance(cameras, Mapping) or not all(isinstance(name, str) for name in [*cameras, *cameras.values()]):
        raise ValueError(f"{where} is {cameras!r}, expected names such as {{left: ..., right: ...}}")
    for view in cameras:
        if not VIEW.fullmatch(view):
            raise ValueError(
                f"{where} has the view {view!r}; a name has up to 40 of a ... z, 0 ... 9, _, a letter first"
            )
    if ("left" in cameras) == (STEREO in cameras) or (STEREO in cameras and "right" in cameras):
        raise ValueError(
            f"{where} is {dict(cameras)}; it needs left, the main view (of DROID, {STEREO} is left and right)"
        )
    return Rig("", "", cameras).views


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
        values[part] = numbers(values[part], 3, f"{where}: {part}", whole=True)
    (values["gripper"],) = numbers([values["gripper"]], 1, f"{where}: gripper", whole=True)
    closed, opened = numbers(values["gripper_closed_open"], 2, f"{where}: gripper_closed_open")
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


def _parts(content: Any, views: Sequence[str], size: tuple[int, int] | None, where: str) -> dict[str, tuple[int, ...]]:
    pair = {"left", "right"} & set(views)
    good = isinstance(content, Mapping) and content and set(content) <= set(views)
    if not good or len(pair & set(content)) == 1 < len(pair):
        raise ValueError(
            f"{where} is {content!r}, expected {{view: [x, y, width, height]}} of {', '.join(views)}; of a pair both"
        )
    parts = {view: _rectangle(content[view], f"{where}.{view}") for view in content}
    for view in pair & set(parts) if size else ():
        if parts[view][2:] != size:
            raise ValueError(
                f"{where}.{view} is {list(parts[view])}; its size must be the calibration's size_px {list(size)}"
            )
    return parts


def _rectangle(content: Any, where: str) -> tuple[int, ...]:
    x, y, width, height = place = numbers(content, 4, where, whole=True)
    if min(x, y) < 0 or min(width, height) < 1:
        raise ValueError(f"{where} is {list(place)}; x and y must be 0 or more, width and height above 0")
    return place


def _sizes(content: Any, views: Sequence[str], where: str) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """[width, height], or {view: [width, height]} of any views but the right one."""
    if not isinstance(content, Mapping):
        return _size(content, where)
    own = [view for view in views if view != "right"]
    if not content or not set(content) <= set(own):
        raise ValueError(f"{where} is {content!r}, expected [width, height], or these of {', '.join(own)} by name")
    return {view: _size(size, f"{where}.{view}") for view, size in content.items()}


def _size(content: Any, where: str) -> tuple[int, ...]:
    size = numbers(content, 2, where, whole=True)
    if not all(1 <= side <= LARGEST_PX for side in size):
        raise ValueError(f"{where} {list(size)} must be positive, up to {LARGEST_PX} px")
    return size
