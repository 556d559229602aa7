"""What no robot arm and no rectified camera has: the traces of wrong units, of intrinsics of another image size, and of
extrinsics the wrong way round. Each problem names its likely cause.

A rig that is known to be like that says so: `accept: [units]` (see `rig`) switches off the check of that name.
"""

from collections.abc import Mapping

import numpy as np

from stereovla.dataset_builder.streaming.questions import view_pixels
from stereovla.processing.rotations import rotation_angle, rpy_to_matrix

CHECKS = {
    "field_of_view": "focal lengths against the size of the views",
    "principal_point": "the principal point against the middle of the views",
    "units": "lengths in m and angles in rad",
    "camera_pose": "whether the tool is in view",
}
# Focal length in widths of the view: 0.2 sees 136 degrees, 6 sees 9.5; lenses of stereo cameras have 0.4 ... 2.
_FOCAL_WIDTHS = (0.2, 6.0)
# A rectified camera's principal point lies within some percent of the middle (a ZED's within 3 %, CALIB_ZERO_DISPARITY
# within 10 %); intrinsics of 4/3 the size move it by 17 %, of half the size by 25 %.
_OFF_MIDDLE = 0.15
_REACH_M = 5.0  # of an arm, from its base; in centimetres the tool is at 30 or more
_CAMERA_M = 10.0  # of a camera that watches one, from its base
_TOOL_M = 1.0  # from the frame that an arm reports to its tool
_TURN_RAD = 2 * np.pi + 0.01  # Euler angles need no more
# What actions ask for in a frame: an arm at 1 m/s moves 0.1 m at 10 Hz.
_STEP_M, _STEP_RAD = 0.5, 1.5
_SCALE = 5.0  # what deltas add up to, as a multiple of what the arm moved; controllers that lag reach 2
_MOVED_M, _MOVED_RAD = 0.03, 0.1  # an episode that moves less says nothing about that
_IN_VIEW, _FITS = 0.05, 0.5  # shares of the frames: too few with the transform as it is, enough with another one
# optical frame (x right, y down, z forward) in frames that are taken for it
_OTHER_FRAMES = {
    "of a camera frame with y up and z backward (OpenGL)": np.diag([1.0, -1.0, -1.0, 1.0]),
    "of a body frame with x forward and z up (ROS)": np.array(
        [[0.0, 0.0, 1.0, 0.0], [-1.0, 0.0, 0.0, 0.0], [0.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    ),
}


def focal_length_problem(focal_px: np.ndarray, size_px: tuple[int, int]) -> str | None:
    """Of fx, fy (px) beside views of `size_px` (width, height)."""
    low, high = (share * size_px[0] for share in _FOCAL_WIDTHS)
    if (focal_px >= low).all() and (focal_px <= high).all():
        return None
    degrees = 2 * np.degrees(np.arctan(size_px[0] / 2 / focal_px[0]))
    return (
        f"focal_length_px {focal_px.tolist()} makes a view of {list(size_px)} px see {degrees:.0f} degrees, expected "
        f"{low:g} ... {high:g} px: is it in mm, or of another image size?"
    )


def principal_point_problem(point_px: np.ndarray, size_px: tuple[int, int]) -> str | None:
    """Of cx, cy (px) beside views of `size_px`."""
    shares = point_px / np.array(size_px)
    if (np.abs(shares - 0.5) <= _OFF_MIDDLE).all():
        return None
    whole = (2 * point_px).round().astype(int).tolist()
    return (
        f"principal_point_px {point_px.tolist()} lies at {shares[0]:.0%} of the width and {shares[1]:.0%} of the "
        f"height of a view of {list(size_px)} px, expected {0.5 - _OFF_MIDDLE:.0%} ... {0.5 + _OFF_MIDDLE:.0%}: are "
        f"these intrinsics of another image size, such as {whole[0]}x{whole[1]}? A view that was cut out of a larger "
        "one is described whole, and cut by crop_px."
    )


def camera_place_problem(transform_camera_to_base: np.ndarray) -> str | None:
    """Of a pose (4, 4) m whose camera is further away than any that watches an arm."""
    return _length_problem("transform_camera_to_base places the camera", transform_camera_to_base[:3, 3], _CAMERA_M)


def tool_problem(tool: np.ndarray) -> str | None:
    """Of the pose (x, y, z, roll, pitch, yaw) of a tool in the frame that its arm reports."""
    return _length_problem("tool lies", tool[:3], _TOOL_M) or _angle_problem("tool is turned", tool[3:])


def pose_problems(name: str, positions: np.ndarray, rpy: np.ndarray) -> list[str]:
    """Of poses (n, 3) m and (n, 3) rad of a tool in the base; the first frame that shows it."""
    problems = []
    far = np.flatnonzero(np.linalg.norm(positions, axis=1) > _REACH_M)
    if len(far):
        problems.append(_length_problem(f"frame {far[0]}: the {name} is", positions[far[0]], _REACH_M))
    turned = np.flatnonzero(np.abs(rpy).max(axis=1) > _TURN_RAD)
    if len(turned):
        problems.append(_angle_problem(f"frame {turned[0]}: the {name} is turned", rpy[turned[0]]))
    return problems


def step_problems(moves: np.ndarray) -> list[str]:
    """Of actions (n, 6) as in `schema`, dx, dy, dz (m) and drpy (rad): more than an arm does within a frame."""
    away = np.median(np.linalg.norm(moves[:, :3], axis=1))
    turned = np.median(rotation_angle(rpy_to_matrix(moves[:, 3:])))
    return [
        f"in half of the frames the action asks for {value:.3g} {unit} or more, expected up to {limit} {unit} within a "
        "frame: is it of another kind, unit or frame than the rig says?"
        for value, unit, limit in ((away, "m", _STEP_M), (turned, "rad", _STEP_RAD))
        if value > limit
    ]


def delta_problems(poses: np.ndarray, moves: np.ndarray, fps: float) -> list[str]:
    """Of actions (n, 6) that are given as changes and add up to much more, or less, than the poses (n, 6) do."""
    rotations = rpy_to_matrix(poses[:, 3:])
    moved = np.linalg.norm(np.diff(poses[:, :3], axis=0), axis=1).sum()
    turned = rotation_angle(rotations[1:] @ np.swapaxes(rotations[:-1], 1, 2)).sum()
    quantities = (
        ("m", moved, np.linalg.norm(moves[:-1, :3], axis=1).sum(), _MOVED_M, 1000.0, "mm"),
        ("rad", turned, np.linalg.norm(moves[:-1, 3:], axis=1).sum(), _MOVED_RAD, 180 / np.pi, "degrees"),
    )
    problems = []
    for unit, real, asked, least, factor, other in quantities:
        scale = asked / real if real > least else 1.0
        if 1 / _SCALE <= scale <= _SCALE:
            continue
        likely = [f"{other} for {unit}"] if scale and abs(np.log(scale / factor)) < 0.5 else []
        likely += [f"velocities ({unit}/s) for changes"] if scale and abs(np.log(scale / fps)) < 0.5 else []
        problems.append(
            f"the actions ask for {asked:.3g} {unit} in all, the states move by {real:.3g} {unit}: "
            f"{' or '.join(likely) or 'normalised commands, or another unit'}?"
        )
    return problems


def view_of_tool_problem(positions: np.ndarray, calibration: Mapping[str, np.ndarray], size: tuple[int, int]) -> str:
    """Of an episode whose tool, at `positions` (n, 3) m in the base, is hardly ever in the left view of `size` (width,
    height) px; "" where it is. `calibration`: per key (n, ...).
    """

    def count(transforms: np.ndarray) -> int:
        focal, principal = calibration["focal_length_px"], calibration["principal_point_px"]
        return int(np.isfinite(view_pixels(positions, transforms, focal, principal, size[::-1])[:, 0]).sum())

    given, total = np.asarray(calibration["transform_camera_to_base"], dtype=np.float64), len(positions)
    if (seen := count(given)) >= max(1, _IN_VIEW * total):
        return ""
    others = {"the wrong way round (base to camera)": np.linalg.inv(given)}
    others |= {f"the pose {name}": given @ frame for name, frame in _OTHER_FRAMES.items()}
    counts = {name: count(transforms) for name, transforms in others.items()}
    best = max(counts, key=counts.__getitem__)
    likely = (
        "is it the pose of the left camera's optical frame (x right, y down, z forward) in the base, in m, and does "
        "`tool` lead to the fingertips?"
    )
    if counts[best] >= _FITS * total:
        likely = f"it is probably {best}: taken so, the tool is in view in {counts[best]}"
    return f"transform_camera_to_base: the tool is in view in {seen} of {total} frames; {likely}"


def _length_problem(what: str, vector_m: np.ndarray, limit_m: float) -> str | None:
    length = np.linalg.norm(vector_m)
    if length <= limit_m:
        return None
    return f"{what} {length:.3g} m away, expected up to {limit_m:g} m: {'mm' if length > 150 else 'cm or mm'} for m?"


def _angle_problem(what: str, angles_rad: np.ndarray) -> str | None:
    if np.abs(angles_rad).max() <= _TURN_RAD:
        return None
    return f"{what} by {np.round(angles_rad, 3).tolist()}, expected up to 2 pi rad: degrees for rad?"
