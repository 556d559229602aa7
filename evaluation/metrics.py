"""Metrics as plain functions of numpy arrays: success rates, action, depth, box, keyframe and disparity errors."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from stereovla.processing.rotations import rotation_angle, rpy_to_matrix

GRIPPER_COMMAND = 0.5  # below minus this the gripper closes, above it opens, between it keeps


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a success probability, in [0, 1]; z = 1.96 standard deviations hold 95 %.

    Unlike the normal approximation it stays inside [0, 1] and has a width at 0 and at 100 % (Wilson 1927).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(
            f"{successes} successes in {trials} trials; 0 <= successes <= trials and trials >= 1 must hold"
        )
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    half = z * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    low, high = (centre - half) / scale, (centre + half) / scale
    # exact at both ends, where rounding would leave the rate outside of its interval
    return (low if successes else 0.0), (high if successes < trials else 1.0)


def success_rate(successes: Sequence[bool]) -> dict[str, float]:
    """Rate in [0, 1] with its 95 % interval, from one bool per episode."""
    successes = np.asarray(successes, dtype=bool)
    low, high = wilson_interval(int(successes.sum()), len(successes))
    return {
        "success_rate": float(successes.mean()),
        "interval_low": low,
        "interval_high": high,
        "successes": int(successes.sum()),
        "episodes": len(successes),
    }


def rotation_error_deg(predicted_rpy: np.ndarray, true_rpy: np.ndarray) -> np.ndarray:
    """Angle between the rotations of two (..., 3) roll-pitch-yaw arrays, (...) in degrees, 0..180."""
    turned_back = np.swapaxes(rpy_to_matrix(predicted_rpy), -1, -2)
    return np.degrees(rotation_angle(turned_back @ rpy_to_matrix(true_rpy)))


def gripper_class(command: np.ndarray) -> np.ndarray:
    """Gripper commands (...) -> -1 close, 0 keep, 1 open."""
    command = np.asarray(command)
    return (command > GRIPPER_COMMAND).astype(int) - (command < -GRIPPER_COMMAND).astype(int)


def whole_pose(values: np.ndarray) -> np.ndarray:
    """Poses or actions (..., 7), or (..., 5) of robots whose tool only turns about the vertical: x, y, z m, yaw rad,
    gripper -> (..., 7) x, y, z m, roll, pitch, yaw rad, gripper.
    """
    values = np.asarray(values)
    if values.shape[-1] == 7:
        return values
    if values.shape[-1] == 5:
        return np.insert(values, [3, 3], 0, axis=-1)
    raise ValueError(
        f"vectors of {values.shape[-1]} numbers: errors are known for 7 (x, y, z, roll, pitch, yaw, gripper) and 5 "
        "(x, y, z, yaw, gripper)"
    )


def action_errors(predicted: np.ndarray, truth: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
    """Errors of predicted action chunks at their valid steps; N = number of valid steps.

    Args:
        predicted, truth: (B, chunk, 7): dx, dy, dz m, droll, dpitch, dyaw rad, gripper command; or 5, see `whole_pose`.
        valid: (B, chunk) bool, the valid steps lead.

    Returns:
        position_mm, rotation_deg: (N,) of single steps. gripper_right: (N,) bool. chunk_position_mm: (B',) distance of
        the ends of the chunks, of samples with a valid step. still_mm: (N,) error of an arm that does not move.
    """
    if predicted.shape != truth.shape or valid.shape != truth.shape[:2]:
        raise ValueError(f"shapes differ: predicted {predicted.shape}, truth {truth.shape}, valid {valid.shape}")
    predicted, truth = whole_pose(predicted), whole_pose(truth)
    difference = (predicted - truth)[..., :3]
    ends = np.linalg.norm((difference * valid[..., None]).sum(axis=1), axis=-1)
    return {
        "position_mm": 1e3 * np.linalg.norm(difference, axis=-1)[valid],
        "rotation_deg": rotation_error_deg(predicted[..., 3:6], truth[..., 3:6])[valid],
        "gripper_right": (gripper_class(predicted[..., 6]) == gripper_class(truth[..., 6]))[valid],
        "chunk_position_mm": 1e3 * ends[valid.any(axis=1)],
        "still_mm": 1e3 * np.linalg.norm(truth[..., :3], axis=-1)[valid],
    }


def depth_errors(answers: Sequence[Sequence[float] | None], truth_m: np.ndarray) -> np.ndarray:
    """Absolute errors (B,) in cm, NaN where the text was no answer.

    Args:
        answers: one per question: [depth in m], or None (or another number of values) where the text is no answer.
        truth_m: (B,) true depths in m.
    """
    if len(answers) != len(truth_m):
        raise ValueError(f"{len(answers)} answers for {len(truth_m)} depths")
    values = [answer[0] if answer is not None and len(answer) == 1 else np.nan for answer in answers]
    return 1e2 * np.abs(np.array(values, dtype=np.float64) - np.asarray(truth_m, dtype=np.float64))


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (..., 4) x_min, y_min, x_max, y_max: (...) in 0..1; 0 for boxes without area."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    overlap = np.clip(high - low, 0, None).prod(axis=-1)
    areas = [np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(axis=-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - overlap
    return np.divide(overlap, union, out=np.zeros(np.broadcast(overlap, union).shape), where=union > 0)


def keyframe_errors(predicted: np.ndarray, truth: np.ndarray, turn_symmetry: int = 1) -> dict[str, np.ndarray]:
    """Errors of keyframe poses (B, 7) xyz m, rpy rad, gripper 0..1, or 5, see `whole_pose`: (B,) xy_cm, z_cm,
    rotation_deg, gripper_right. Of rotations that hold alike, `turn_symmetry` (1 or 2) in a whole turn of the tool
    about its own axis, the nearest counts.
    """
    predicted, truth = whole_pose(predicted), whole_pose(truth)
    # Rz(yaw) Ry(pitch) Rx(roll) Rz(pi) = Rz(yaw + pi) Ry(-pitch) Rx(-roll)
    alike = [truth[:, 3:6], truth[:, 3:6] * [-1, -1, 1] + [0, 0, np.pi]][:turn_symmetry]
    difference = np.asarray(predicted, dtype=np.float64) - np.asarray(truth, dtype=np.float64)
    return {
        "xy_cm": 1e2 * np.linalg.norm(difference[:, :2], axis=-1),
        "z_cm": 1e2 * np.abs(difference[:, 2]),
        "rotation_deg": np.min([rotation_error_deg(predicted[:, 3:6], other) for other in alike], axis=0),
        "gripper_right": (predicted[:, 6] > 0.5) == (truth[:, 6] > 0.5),
    }


def disparity_errors(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Absolute errors (N,) in px of full resolution, where the truth is known.

    Args:
        predicted: (B, h, w) px, of a lower resolution, as the model gives it.
        truth: (B, H, W) px, 0 = unknown; read at the centre of each of its blocks.
    """
    stride = truth.shape[-1] // predicted.shape[-1]
    truth = truth[:, stride // 2 :: stride, stride // 2 :: stride]
    return np.abs(predicted - truth)[truth > 0]


def depth_map_sums(predicted: np.ndarray, truth: np.ndarray, silog_lambda: float) -> dict[str, np.ndarray]:
    """What the errors of depth maps are made of, for each picture with any known pixel: (N,) sums over its known pixels
    of relative and squared errors and of pixels within a factor of 1.25, their number, and L_si (Eigen et al. 2014, eq.
    4, under a root).

    Args:
        predicted, truth: (B, H, W) m; truth 0 = unknown.
    """
    known = np.isfinite(truth) & (truth > 0)
    seen = known.any(axis=(1, 2))
    known, truth, mine = known[seen], truth[seen].astype(np.float64), predicted[seen].astype(np.float64)
    truth = np.where(known, truth, mine)  # no error where it is unknown
    pixels = known.sum(axis=(1, 2))
    logs = np.log(mine) - np.log(truth)
    squares, means = (logs**2).sum(axis=(1, 2)) / pixels, logs.sum(axis=(1, 2)) / pixels
    return {
        "relative": (np.abs(mine - truth) / truth).sum(axis=(1, 2)),
        "squared": ((mine - truth) ** 2).sum(axis=(1, 2)),
        "right": ((np.maximum(mine / truth, truth / mine) < 1.25) & known).sum(axis=(1, 2)),
        "pixels": pixels,
        "l_si": np.sqrt(np.maximum(squares - silog_lambda * means**2, 0)),
    }


def depth_map_errors(sums: Mapping[str, np.ndarray]) -> dict[str, float] | None:
    """Of `depth_map_sums`: abs_rel, rmse_m, delta_1_25 over all known pixels, l_si over pictures; None when there are
    none.
    """
    pixels = np.sum(sums["pixels"])
    if not pixels:
        return None
    return {
        "abs_rel": float(np.sum(sums["relative"]) / pixels),
        "rmse_m": float(np.sqrt(np.sum(sums["squared"]) / pixels)),
        "delta_1_25": float(np.sum(sums["right"]) / pixels),
        "l_si": float(np.mean(sums["l_si"])),
        "count": len(sums["l_si"]),
    }


def summary(values: np.ndarray) -> dict[str, float] | None:
    """Mean, median and 90 % quantile of (N,) numbers; None when there are none."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return None
    median, high = np.quantile(values, [0.5, 0.9])
    return {"mean": float(values.mean()), "median": float(median), "q90": float(high), "count": len(values)}
