"""The values of one training or inference sample, checked and brought to the processed view; robot units throughout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .answers import CameraParameters
from .camera_geometry import Calibration
from .image_processing_stereovla import ViewGeometry
from .normalization import check_finite, shown
from .rotations import matrix_to_quaternion

OBJECTIVES = ("action", "pose", "box", "depth", "camera")
SHARED = ("embodiment", "objective")  # may be given once for a whole batch


def split_batch(columns: dict[str, Any], size: int, batched: bool, sets: str = "image pairs") -> list[dict[str, Any]]:
    """Arguments by name, for one sample or as lists over a batch of so many `sets` -> one dict per sample."""
    rows: dict[str, list[Any]] = {}
    for name, value in columns.items():
        if not batched or value is None or (isinstance(value, str) and name in SHARED):
            rows[name] = [value] * size
        elif isinstance(value, (str, dict)) or len(value) != size:
            got = repr(value) if isinstance(value, (str, dict)) else f"{len(value)} entries"
            raise ValueError(f"{name} has {got}, but there are {size} {sets}; a batch needs a list of one per sample")
        else:
            rows[name] = list(value)
    for number, objective in enumerate(rows["objective"]):
        if objective not in OBJECTIVES:
            where = f"sample {number}: " if batched else ""
            raise ValueError(f"{where}unknown objective {objective!r}; valid objectives: {list(OBJECTIVES)}")
    return [{name: rows[name][number] for name in rows} for number in range(size)]


def numbers(value: Any, name: str) -> np.ndarray:
    """Numbers, or lists of numbers -> an array of their own type; ValueError for texts, truth values, other things."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} is no array of numbers: {error}") from error
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name} is {shown(value)} ({array.dtype}); expected numbers")
    return array


def required(sample: dict[str, Any], name: str) -> Any:
    """Value `name` of a sample; ValueError if it is None."""
    if sample[name] is None:
        raise ValueError(f"objective {sample['objective']!r} needs {name}")
    return sample[name]


@dataclass(frozen=True)
class SampleReader:
    """Reads the values of a sample (a dict of the processor's arguments). Every error names the value and what is
    allowed.
    """

    state_history: int
    state_dim: int
    chunk_size: int
    action_dim: int
    depth_unit_m: float
    pose_dim: int | None = None  # None = state_dim
    has_right: bool = True  # whether the model sees the right view, and is asked for boxes in it

    def text(self, sample: dict[str, Any]) -> str:
        """Instruction or object name, without surrounding spaces."""
        text = sample["text"]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"text is {shown(text)}; objective {sample['objective']!r} needs an instruction or an object name, not "
                "empty"
            )
        return text.strip()

    def states(self, sample: dict[str, Any]) -> np.ndarray:
        """float64 (state_history, state_dim), oldest first, filled up with the oldest one."""
        state = numbers(required(sample, "state"), "state")
        history = state[None] if state.ndim == 1 else state
        if history.ndim != 2 or not 1 <= len(history) <= self.state_history or history.shape[1] != self.state_dim:
            raise ValueError(
                f"state has shape {state.shape}; expected ({self.state_dim},) or (k, {self.state_dim}) with "
                f"k = 1 ... {self.state_history}"
            )
        check_finite(state, "state")
        history = history.astype(np.float64)
        return np.concatenate([np.repeat(history[:1], self.state_history - len(history), axis=0), history])

    def pose(self, sample: dict[str, Any]) -> np.ndarray:
        """float64 (pose_dim,)."""
        pose = numbers(required(sample, "keyframe_pose"), "keyframe_pose")
        size = self.state_dim if self.pose_dim is None else self.pose_dim
        if pose.shape != (size,):
            raise ValueError(f"keyframe_pose has shape {pose.shape}; expected ({size},)")
        check_finite(pose, "keyframe_pose")
        return pose.astype(np.float64)

    def symmetry(self, sample: dict[str, Any], turn_symmetry: int) -> int:
        """How many turns of the keyframe are as right."""
        symmetry = sample["keyframe_symmetry"]
        if int(symmetry) != symmetry or symmetry < 1 or symmetry % turn_symmetry:
            raise ValueError(
                f"keyframe_symmetry is {symmetry}; it must be a multiple of the processor's turn_symmetry, "
                f"{turn_symmetry}, which takes what a {turn_symmetry}-th of a turn makes of a keyframe for the same"
            )
        return int(symmetry)

    def actions(self, sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, int]:
        """float64 (chunk_size, action_dim), zeros after those given; bool (chunk_size,) valid; how many are given."""
        actions = numbers(sample["actions"], "actions")
        if actions.ndim != 2 or not 1 <= len(actions) <= self.chunk_size or actions.shape[1] != self.action_dim:
            raise ValueError(
                f"actions has shape {actions.shape}; expected (n, {self.action_dim}) with n = 1 ... {self.chunk_size}"
            )
        check_finite(actions, "actions")
        given = (
            np.ones(len(actions), dtype=bool) if sample["action_mask"] is None else np.asarray(sample["action_mask"])
        )
        if given.shape != (len(actions),) or given.dtype != bool:
            raise ValueError(f"action_mask is {given.dtype} {given.shape}; expected bool ({len(actions)},)")
        chunk, mask = np.zeros((self.chunk_size, self.action_dim)), np.zeros(self.chunk_size, dtype=bool)
        chunk[: len(actions)], mask[: len(actions)] = actions, given
        return chunk, mask, len(actions)

    def boxes(self, sample: dict[str, Any], geometry: ViewGeometry) -> np.ndarray:
        """float64 (2, 4), left and right, in px of the processed view, cut at its border; (1, 4), left, where the model
        does not see the right view.
        """
        boxes = numbers(required(sample, "boxes"), "boxes")
        if not self.has_right and boxes.shape in ((4,), (1, 4), (2, 4)):
            boxes = boxes.reshape(-1, 4)[:1]  # a data set of pairs has the right view's beside it
        elif boxes.shape != (2, 4):
            shapes = "(2, 4): x_min, y_min, x_max, y_max left and right"
            shapes += "" if self.has_right else ", or (4,), left alone"
            raise ValueError(f"boxes has shape {boxes.shape}; expected {shapes}")
        check_finite(boxes, "boxes")
        processed = geometry.boxes(boxes)
        if (processed[:, 2:] <= processed[:, :2]).any():
            which = "left, right" if self.has_right else "left"
            raise ValueError(f"boxes {boxes.tolist()} ({which}) are empty or outside of the processed view")
        return processed

    def question_points(self, sample: dict[str, Any], geometry: ViewGeometry) -> np.ndarray:
        """float64 (n, 2) px of the processed left view."""
        points = numbers(required(sample, "points_px"), "points_px").astype(np.float64).reshape(-1, 2)
        processed = geometry.points(points)
        shown = geometry.shows(processed)
        if not len(points) or not shown.all():
            size = (geometry.source_height, geometry.source_width)
            raise ValueError(
                f"points_px {points[~shown].tolist()} are not in the processed part of the image {size} (height, width)"
            )
        return processed

    def depths(self, sample: dict[str, Any], count: int) -> np.ndarray:
        """float64 (count,) m, the answers at the question points."""
        depths = numbers(required(sample, "depths_m"), "depths_m").astype(np.float64).reshape(-1)
        if len(depths) != count:
            raise ValueError(f"depths_m has {len(depths)} values for {count} points")
        check_finite(depths, "depths_m")
        if (depths <= 0).any():
            raise ValueError(f"depths_m must be positive, got {depths.tolist()}")
        return depths

    def camera(self, sample: dict[str, Any], geometry: ViewGeometry) -> CameraParameters:
        """Parameters of the processed left view."""
        camera = geometry.calibration(Calibration.from_mapping(required(sample, "calibration")))
        camera.require("baseline_m", "transform_camera_to_base")
        size = (geometry.width, geometry.height)
        return CameraParameters(
            focal_length=tuple(camera.focal_length_px / size),
            principal_point=tuple(camera.principal_point_px / size),
            baseline_m=camera.baseline_m,
            position_m=tuple(camera.transform_camera_to_base[:3, 3]),
            quaternion=tuple(matrix_to_quaternion(camera.transform_camera_to_base[:3, :3])),
        )

    def depth_image(self, depth: Any, geometry: ViewGeometry, name: str) -> tuple[np.ndarray, float]:
        """Depth (h, w) of a source view -> (depth (H, W) of the processed view in its own unit, that unit in m)."""
        depth = np.asarray(depth)
        if depth.dtype.kind not in "fiu" or depth.ndim != 2:
            raise ValueError(
                f"{name} is {depth.dtype} {depth.shape}; expected (h, w), float (m) or integer (depth_unit_m)"
            )
        try:
            return geometry.labels(depth), 1.0 if depth.dtype.kind == "f" else self.depth_unit_m
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def depth_map(self, sample: dict[str, Any], geometry: ViewGeometry) -> tuple[np.ndarray, float]:
        """(depth (H, W) of the processed view in its own unit, p) with disparity in px = p / depth."""
        depth, unit = self.depth_image(sample["depth_map"], geometry, "depth_map")
        camera = geometry.calibration(Calibration.from_mapping(required(sample, "calibration")))
        camera.require("baseline_m")
        return depth, float(camera.focal_length_px[0] * camera.baseline_m / unit)

    def depth_maps(self, sample: dict[str, Any], geometries: dict[str, ViewGeometry]) -> dict[str, np.ndarray]:
        """Planar depth float32 (H, W) m of the processed views, 0 where it is not known, by the views' names.

        Args:
            geometries: of the views that the sample has; the first is the one of a depth map without a name.
        """
        given = sample["depth_map"]
        if not isinstance(given, Mapping):
            given = {next(iter(geometries)): given}
        given = {name: depth for name, depth in given.items() if depth is not None}
        if unknown := [name for name in given if name not in geometries]:
            raise ValueError(
                f"depth_map has the views {unknown}; of this sample it may have {list(geometries)}, the views that are "
                "there and whose depth is predicted"
            )
        maps = {}
        for name, depth in given.items():
            processed, unit = self.depth_image(depth, geometries[name], f"depth_map of the view {name!r}")
            known = (processed > 0) & np.isfinite(processed)
            maps[name] = np.where(known, processed * np.float32(unit), 0).astype(np.float32)
        return maps

    def names(self, sample: dict[str, Any], geometry: ViewGeometry) -> tuple[list[str], np.ndarray]:
        """K names of objects and float64 (K, 2) px of the processed left view, NaN outside of it."""
        names = sample["names"]
        if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
            raise ValueError(f"names is {shown(names)}; expected a list of names of objects, none of them empty")
        points = numbers(required(sample, "names_px"), "names_px").astype(np.float64)
        if points.shape != (len(names), 2):
            raise ValueError(f"names_px has shape {points.shape}; expected ({len(names)}, 2), a pixel of each of names")
        return [name.strip() for name in names], _seen(points, geometry)

    def view_points(self, sample: dict[str, Any], names: Sequence[str], geometry: ViewGeometry) -> np.ndarray:
        """float64 (len(names), 2) px of the processed left view; NaN where None, NaN or outside of the view."""
        points = np.full((len(names), 2), np.nan)
        for row, name in enumerate(names):
            if sample[name] is not None:
                points[row] = numbers(sample[name], name)
        return _seen(points, geometry)


def _seen(points: np.ndarray, geometry: ViewGeometry) -> np.ndarray:
    """Pixels (n, 2) of the source view -> those of the processed one, NaN outside of it."""
    processed = geometry.points(points)
    return np.where(geometry.shows(processed)[:, None], processed, np.nan)
