"""Stereo camera geometry: calibration, projection, depth <-> disparity, and a check of the pair itself.

Pixel coordinates are (u, v) with the centre of the pixel in column j, row i at (j + 0.5, i + 0.5). The optical frame
has x to the right, y down, z forward. The right camera stands `baseline_m` along +x of the left one, so that a point
at depth z is seen further left in the right view, by the disparity focal_length * baseline / z in px.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Calibration:
    """One rectified stereo pair. `baseline_m` and `transform_camera_to_base` are None where they are not known."""

    focal_length_px: np.ndarray  # (2,) fx, fy
    principal_point_px: np.ndarray  # (2,) cx, cy
    baseline_m: float | None = None
    transform_camera_to_base: np.ndarray | None = None  # (4, 4) of the left camera

    @classmethod
    def from_mapping(cls, mapping: "Mapping[str, Any] | Calibration") -> "Calibration":
        """Checked copy of a mapping with the field names above; ValueError naming the field that is missing or
        wrong.
        """
        if isinstance(mapping, Calibration):
            return mapping
        unknown = sorted(set(mapping) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"calibration has unknown keys {unknown}; valid keys: {list(cls.__dataclass_fields__)}")
        values: dict[str, Any] = {}
        for name, shape in (
            ("focal_length_px", (2,)),
            ("principal_point_px", (2,)),
            ("transform_camera_to_base", (4, 4)),
        ):
            if mapping.get(name) is None:
                if name != "transform_camera_to_base":
                    raise ValueError(f"calibration lacks {name!r}; it has {sorted(mapping)}")
                values[name] = None
                continue
            values[name] = np.asarray(mapping[name], dtype=np.float64)
            if values[name].shape != shape or not np.isfinite(values[name]).all():
                raise ValueError(f"calibration[{name!r}] must be {shape} finite numbers, got {values[name].tolist()}")
        if (values["focal_length_px"] <= 0).any():
            raise ValueError(
                f"calibration['focal_length_px'] must be positive, got {values['focal_length_px'].tolist()}"
            )
        baseline = mapping.get("baseline_m")
        if baseline is not None and not 0 < float(baseline) < np.inf:
            raise ValueError(f"calibration['baseline_m'] must be a positive number of metres, got {baseline}")
        values["baseline_m"] = None if baseline is None else float(baseline)
        return cls(**values)

    def require(self, *names: str) -> None:
        """Raise ValueError if one of the optional fields `names` is not known."""
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise ValueError(f"calibration lacks {missing}, which this conversion needs")

    def moved(self, scale: Any, offset: Any) -> "Calibration":
        """Calibration of the view whose pixels are (u, v) * scale + offset; baseline and pose do not change."""
        scale, offset = np.asarray(scale, dtype=np.float64), np.asarray(offset, dtype=np.float64)
        principal_point = self.principal_point_px * scale + offset
        return replace(self, focal_length_px=self.focal_length_px * scale, principal_point_px=principal_point)


def depth_to_disparity(depth_m: Any, calibration: Calibration) -> np.ndarray:
    """Depth (...) m -> disparity (...) px float32 of the left view; 0 (unknown) where depth is 0, negative or not
    finite.
    """
    calibration.require("baseline_m")
    depth = np.asarray(depth_m, dtype=np.float32)
    known = (depth > 0) & np.isfinite(depth)
    product = np.float32(calibration.focal_length_px[0] * calibration.baseline_m)
    return np.divide(product, depth, out=np.zeros_like(depth), where=known)


def disparity_to_depth(disparity_px: Any, calibration: Calibration) -> np.ndarray:
    """Inverse of `depth_to_disparity`: depth (...) m float32, 0 where the disparity is 0, negative or not finite."""
    return depth_to_disparity(disparity_px, calibration)  # z = f b / d and d = f b / z are the same function


def project_points(points_m: Any, calibration: Calibration) -> np.ndarray:
    """Points (..., 3) m in the robot base frame -> pixels (..., 2) of the left view; NaN for points behind the
    camera.
    """
    calibration.require("transform_camera_to_base")
    points = np.asarray(points_m, dtype=np.float64)
    rotation, translation = calibration.transform_camera_to_base[:3, :3], calibration.transform_camera_to_base[:3, 3]
    camera = (points - translation) @ rotation  # inverse of the rigid transform, for row vectors
    z = np.where(camera[..., 2:] > 1e-6, camera[..., 2:], np.nan)
    return camera[..., :2] / z * calibration.focal_length_px + calibration.principal_point_px


def unproject_points(pixels: Any, depth_m: Any, calibration: Calibration) -> np.ndarray:
    """Pixels (..., 2) of the left view and their depths (...) m -> points (..., 3) m in the robot base frame."""
    calibration.require("transform_camera_to_base")
    depth = np.asarray(depth_m, dtype=np.float64)[..., None]
    slopes = (np.asarray(pixels, dtype=np.float64) - calibration.principal_point_px) / calibration.focal_length_px
    camera = np.concatenate([slopes * depth, depth], axis=-1)
    transform = calibration.transform_camera_to_base
    return camera @ transform[:3, :3].T + transform[:3, 3]


class StereoPairError(ValueError):
    """The two views are not a rectified pair in the order left, right."""


@dataclass(frozen=True)
class StereoReport:
    """What patch matching says about a pair. Offsets in px of the views as given, medians over the matches."""

    status: str  # "ok", "swapped", "unrectified", "identical", or "unknown" where too few patches can be matched
    matches: int
    vertical_offset_px: float  # median absolute difference of the rows of matching points; NaN without matches
    vertical_limit_px: float  # a larger offset makes a pair unrectified
    disparity_px: float  # median; negative = the right view lies to the left
    negative_disparities: float  # share of the matches whose disparity is clearly negative


# Patch matching works on views that are at most this wide (block averages), unless told otherwise. Lengths below are px
# of such a view.
_WORKING_WIDTH = 160
_RADIUS = 4  # patches are 9 x 9
_VERTICAL_RANGE = 12  # rows searched up and down
_CELLS = 8  # the best patch of each of 8 x 8 cells may be matched, so that the patches are spread over the view
_PATCHES = 40
_MIN_MATCHES = 8  # fewer say nothing
_MAX_VERTICAL_PX = 0.8  # median row offset of a rectified pair
_SAME_ROW_PX = 0.6


def measure_stereo_pair(
    left: np.ndarray, right: np.ndarray, working_width: int = _WORKING_WIDTH, misalignment_px: float = 0.0
) -> StereoReport:
    """Match patches of two views, uint8 (h, w, 3) each, and say whether they can be a rectified pair.

    Corner-like patches of the left view are searched in the right one by normalised cross-correlation over all
    plausible disparities of both signs and a few rows up and down. Only matches that are good, and clearly better
    than any other place, count. In a rectified pair they lie in the same row, and to the left (positive disparity).

    Renderings without anti-aliasing have stepped edges, along which matches slide up and down. So the offsets of an
    unrectified pair must also agree with each other: a plane a + b u + c v (shift, roll, zoom between the views) has to
    explain at least half of them, and twice as many as lie in the same row.

    The limits are px of views that are reduced to at most `working_width` columns. The default is made for every
    call of a policy (10 ms); the width of the views themselves finds offsets of a single row, and none above 12.
    Views that are meant to lie up to `misalignment_px` rows apart (px of the views as given) may do so.
    """
    factor = -(-left.shape[1] // working_width)
    limit = _MAX_VERTICAL_PX * factor + misalignment_px
    if np.array_equal(left, right) and left.std() > 1:
        return StereoReport("identical", 0, 0.0, limit, 0.0, 0.0)
    left_gray, right_gray = _gray(left, factor), _gray(right, factor)
    rows, columns = _corners(left_gray)
    matched, vertical, disparity = _match(left_gray, right_gray, rows, columns)
    if len(vertical) < _MIN_MATCHES:
        return StereoReport("unknown", len(vertical), float("nan"), limit, float("nan"), float("nan"))
    plane = _fitted_plane(columns[matched], rows[matched], vertical)
    offset = float(np.median(np.abs(plane))) * factor
    explained = (np.abs(vertical - plane) < _SAME_ROW_PX).mean()
    same_row = (np.abs(vertical) < _SAME_ROW_PX).mean()
    negative = float((disparity < -1).mean())
    status = "ok"
    if offset > limit and explained >= max(0.5, 2 * same_row):
        status = "unrectified"
    elif negative > 0.5:
        status = "swapped"
    return StereoReport(status, len(vertical), offset, limit, float(np.median(disparity)) * factor, negative)


def check_stereo_pair(left: np.ndarray, right: np.ndarray, name: str = "images") -> StereoReport:
    """`measure_stereo_pair`, and StereoPairError if the pair is swapped, unrectified or one view twice."""
    report = measure_stereo_pair(left, right)
    advice = "; pass check_stereo=False if that is meant"
    if report.status == "identical":
        raise StereoPairError(f"{name}: the left and the right view are the same image" + advice)
    if report.status == "unrectified":
        raise StereoPairError(
            f"{name}: the views are not rectified: matching points differ by {report.vertical_offset_px:.1f} rows "
            f"(median of {report.matches} matches), at most {report.vertical_limit_px:.1f} are allowed" + advice
        )
    if report.status == "swapped":
        raise StereoPairError(
            f"{name}: left and right view seem to be swapped: {report.negative_disparities:.0%} of "
            f"{report.matches} matches have a negative disparity (median {report.disparity_px:.1f} px)" + advice
        )
    return report


def _gray(image: np.ndarray, factor: int) -> np.ndarray:
    """uint8 (h, w, 3) -> float32 (h // factor, w // factor), mean over channels and blocks."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    # whole numbers up to 2^24, which float32 holds exactly; the time grows with the pixels, whatever the factor is
    rows = image[: height * factor, : width * factor].reshape(height, factor, 3 * width * factor)
    rows = rows.sum(axis=1, dtype=np.uint32)
    return rows.reshape(height, width, 3 * factor).sum(axis=2).astype(np.float32) / np.float32(3 * factor**2)


def _box_mean(image: np.ndarray) -> np.ndarray:
    """Mean over all 9 x 9 windows: (..., h, w) -> (..., h - 8, w - 8)."""
    for axis in (-2, -1):
        image = np.swapaxes(image, axis, -2)
        two = image[..., :-1, :] + image[..., 1:, :]
        four = two[..., :-2, :] + two[..., 2:, :]
        eight = four[..., :-4, :] + four[..., 4:, :]
        image = np.swapaxes(eight[..., :-1, :] + image[..., 8:, :], axis, -2)
    return image / 81


def _corners(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Top left corners (rows, columns) of the patches that are structured in both directions, best first."""
    size = 2 * _RADIUS + 1
    if min(gray.shape) < 4 * size:
        return np.empty(0, int), np.empty(0, int)
    gray = gray - gray.mean()  # float32 sums of squares are exact enough then
    dy, dx = np.zeros_like(gray), np.zeros_like(gray)
    dy[1:-1] = (gray[2:] - gray[:-2]) / 2
    dx[:, 1:-1] = (gray[:, 2:] - gray[:, :-2]) / 2
    xx, yy, xy, mean, square = _box_mean(np.stack([dx * dx, dy * dy, dx * dy, gray, gray * gray]))
    smaller = (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)  # smaller eigenvalue of the structure tensor
    # Grey levels squared: gradients of 2 levels are sensor noise. The gradients at the border of a patch look one pixel
    # beyond it, the patch itself may still be uniform.
    smaller[(smaller < 4.0) | (square - mean**2 < 4.0)] = 0
    cell_height, cell_width = smaller.shape[0] // _CELLS, smaller.shape[1] // _CELLS
    cells = smaller[: cell_height * _CELLS, : cell_width * _CELLS].reshape(_CELLS, cell_height, _CELLS, cell_width)
    cells = cells.transpose(0, 2, 1, 3).reshape(_CELLS * _CELLS, -1)
    best, score = cells.argmax(axis=1), cells.max(axis=1)
    order = np.argsort(-score, kind="stable")[:_PATCHES]
    order = order[score[order] > 0]
    rows = order // _CELLS * cell_height + best[order] // cell_width
    columns = order % _CELLS * cell_width + best[order] % cell_width
    return rows, columns


def _match(
    left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patches with these top left corners -> indices (n,) of the reliable matches, their row offsets, disparities."""
    if not len(rows):
        return np.empty(0, int), np.empty(0), np.empty(0)
    size, up, across = 2 * _RADIUS + 1, _VERTICAL_RANGE, left.shape[1] // 3
    padded = np.pad(
        right - right.mean(), ((up, up), (across, across))
    )  # the view's row r, column c: r + up, c + across
    variance = _box_mean(padded * padded) - _box_mean(padded) ** 2
    weight = 1 / np.sqrt(np.maximum(variance, 1.0) * size**2)  # at least one grey level
    patches = np.stack([left[r : r + size, c : c + size] for r, c in zip(rows, columns, strict=True)])
    patches -= patches.mean(axis=(1, 2), keepdims=True)
    patches /= np.linalg.norm(patches, axis=(1, 2), keepdims=True)
    height, width = 2 * up + 1, 2 * across + 1  # of the search range
    corners = list(zip(rows, columns, strict=True))
    regions = np.stack([padded[r : r + height + size - 1, c : c + width + size - 1] for r, c in corners])
    score = torch.conv2d(torch.from_numpy(regions)[None], torch.from_numpy(patches)[:, None], groups=len(rows))[
        0
    ].numpy()
    score *= np.stack([weight[r : r + height, c : c + width] for r, c in corners])

    number = np.arange(len(rows))
    best_y, best_x = np.divmod(score.reshape(len(rows), -1).argmax(axis=1), width)
    before, top, after = (score[number, np.clip(best_y + step, 0, height - 1), best_x] for step in (-1, 0, 1))
    for n, y, x in zip(number, best_y, best_x, strict=True):
        score[n, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = -1
    second = score.max(axis=(1, 2))
    # A peak at the end of the search range is the flank of one outside of it.
    inside = (best_y > 0) & (best_y < height - 1) & (best_x > 0) & (best_x < width - 1)
    good = np.flatnonzero(inside & (top > 0.85) & (1 - second > 2 * (1 - top)))
    fraction = (after - before) / np.maximum(
        2 * (2 * top - before - after), 1e-6
    )  # top of the parabola through the three
    return good, (best_y - up + fraction)[good], (across - best_x)[good].astype(np.float64)


def _fitted_plane(u: np.ndarray, v: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values (n,) of the plane a + b u + c v that has the smallest sum of absolute differences to `values`."""
    design = np.stack([np.ones(len(u)), u - u.mean(), v - v.mean()], axis=1) / [1, 50, 50]
    plane = np.full(len(u), np.median(values))
    for _ in range(10):  # iteratively reweighted least squares; a little damping keeps few points solvable
        weighted = design / np.maximum(np.abs(values - plane), 0.1)[:, None]
        plane = design @ np.linalg.solve(weighted.T @ design + 1e-3 * np.eye(3), weighted.T @ values)
    return plane
