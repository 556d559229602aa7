"""Statistics per embodiment in one pass over the shards, in the form that the processor takes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.dataset_builder.dataset.shards import numbers, open_shard, read_table
from stereovla.processing.normalization import ROUNDED_PI
from stereovla.processing.state_entries import POSES, rotations_in

SAMPLE = 1_000_000  # values up to which quantiles are exact; beyond, they come from a random sample of as many
_COLUMNS = {"state": "observation.state", "keyframe_pose": "keyframe_pose", "action": "action_plan"}


class RunningStatistics:
    """Minimum, maximum, mean, standard deviation, 1 % and 99 % quantiles of vectors that arrive in parts.

    Mean and deviation are merged in float64 without cancellation. Quantiles are exact up to `sample` vectors. From
    there on a uniform sample of that many, drawn with a fixed seed, stands for all, however many: memory is bounded
    (40 MB for 1e6 states, 7 numbers and their angles a second time), and the share of all values below a stated q01
    differs from 0.01 by a standard error of sqrt(0.01 * 0.99 / sample) = 0.0001, by more than 0.0005 (five of them) in
    fewer than one case in a million.
    """

    def __init__(self, size: int, sample: int = SAMPLE):
        self.count = 0
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.mean, self.squares = np.zeros(size), np.zeros(size)
        self.sample, self._rng = sample, np.random.default_rng(0)
        self._kept: list[np.ndarray] = []
        self._reservoir: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        """Take in (n, size) values; NaN is an error."""
        if not len(values):
            return
        values = np.asarray(values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("statistics over NaN or infinite values")
        before, self.count = self.count, self.count + len(values)
        self.low, self.high = np.minimum(self.low, values.min(0)), np.maximum(self.high, values.max(0))
        mean = values.mean(0)
        shift = mean - self.mean
        self.squares += ((values - mean) ** 2).sum(0) + shift**2 * before * len(values) / self.count
        self.mean = self.mean + shift * len(values) / self.count
        self._keep(values, before)

    def _keep(self, values: np.ndarray, before: int) -> None:
        room = max(0, self.sample - before)
        if room:
            self._kept.append(values[:room].astype(np.float32))
        late = values[room:]
        if len(late):
            if self._reservoir is None:
                self._reservoir = np.concatenate(self._kept)
                self._kept = [self._reservoir]
            # value n (from 0) replaces a random one with probability sample / (n + 1); of equal places the last wins
            places = self._rng.integers(before + room + np.arange(len(late)) + 1)
            chosen = places < self.sample
            self._reservoir[places[chosen]] = late[chosen]

    def result(self) -> dict[str, list[float]]:
        """{"min", "max", "q01", "q99", "mean", "std"}: lists of `size` numbers."""
        if not self.count:
            raise ValueError("statistics over no values")
        low, high = np.quantile(np.concatenate(self._kept), [0.01, 0.99], axis=0)
        values = {
            "min": self.low, "max": self.high, "q01": low, "q99": high, "mean": self.mean,
            "std": np.sqrt(self.squares / self.count),
        }  # fmt: skip
        return {name: [float(np.float32(value)) for value in vector] for name, vector in values.items()}


def compute_statistics(shards: Sequence[Path]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{embodiment: {"state" | "action" | "keyframe_pose": statistics}} over all frames of `shards`.

    Actions are the valid steps of the plans, or the column `action` where the data has no plans. An angle of a pose is
    taken from 0 to 2 pi in place of -pi to pi where it is narrower so: a roll around pi, whose sign flips, then spans
    what it turns and not the circle, and its statistics go on beyond pi (see `processing.normalization`).
    """
    running: dict[str, dict[str, RunningStatistics]] = {}
    angles: dict[tuple[str, str], list[int]] = {}
    for path in shards:
        for embodiment, values, is_pose in _values(path):
            entry = running.setdefault(embodiment, {})
            for name, array in values.items():
                known = POSES.get(array.shape[1], ()) if is_pose and name != "action" else ()
                own = [index for group in rotations_in(known) for index in group]
                if own != angles.setdefault((embodiment, name), own):
                    raise ValueError(f"{path}: the {name} of {embodiment!r} is a pose in some shards and not in others")
                # angles twice, the second time from 0 to 2 pi: which of the two is narrower is known at the end
                both = np.concatenate([array, array[:, own].astype(np.float64) % (2 * np.pi)], axis=1)
                entry.setdefault(name, RunningStatistics(both.shape[1])).add(both)
    return {
        embodiment: {
            name: _narrower(statistics.result(), angles[embodiment, name]) for name, statistics in sorted(entry.items())
        }
        for embodiment, entry in sorted(running.items())
    }


def _narrower(both: dict[str, list[float]], angles: Sequence[int]) -> dict[str, list[float]]:
    """Statistics of a vector behind which its `angles` come a second time: those of the narrower of the two."""
    size = len(both["min"]) - len(angles)

    def width(index: int) -> float:
        # the whole span and the deviation: one says that single frames lie across the cut, the other that most do not
        return (both["max"][index] - both["min"][index]) * both["std"][index]

    # clearly narrower: rounding must not decide
    places = {index: size + n for n, index in enumerate(angles) if width(size + n) < 0.8 * width(index)}
    return {name: [values[places.get(index, index)] for index in range(size)] for name, values in both.items()}


def angles_around_pi(statistics: dict[str, list[float]]) -> list[str]:
    """Names of the angles of a pose that `compute_statistics` took from 0 to 2 pi."""
    names = POSES[len(statistics["max"])]
    angles = [index for group in rotations_in(names) for index in group]
    return [names[index] for index in angles if statistics["max"][index] > np.pi + ROUNDED_PI]


def camera_ranges(shards: Sequence[Path]) -> dict[str, dict[str, list[float]]]:
    """{embodiment: {quantity: [smallest, largest]}} of the cameras of all frames: what the data shows, not what was
    asked for. Elevation is how far the left camera looks up, azimuth where it looks to, from base x towards base y; its
    range, to 0.01 degrees, may go on beyond 180.
    """
    keys = ("focal_length_px", "principal_point_px", "baseline_m", "transform_camera_to_base")
    ranges: dict[str, dict[str, list[float]]] = {}
    azimuths: dict[str, set[float]] = {}
    for path in shards:
        table = read_table(path, ["embodiment", *(f"calibration.{key}" for key in keys)])
        focal, principal, baseline, pose = (numbers(table, f"calibration.{key}") for key in keys)
        forward = pose[:, :3, 2]
        values = {
            "focal length x, px": focal[:, 0], "focal length y, px": focal[:, 1], "baseline, m": baseline,
            "principal point x, px": principal[:, 0], "principal point y, px": principal[:, 1],
            "position x, m": pose[:, 0, 3], "position y, m": pose[:, 1, 3], "position z, m": pose[:, 2, 3],
            "elevation, deg": np.degrees(np.arcsin(np.clip(forward[:, 2], -1, 1))),
        }  # fmt: skip
        azimuth = np.degrees(np.arctan2(forward[:, 1], forward[:, 0])).round(2)
        embodiments = np.array(table.column("embodiment").to_pylist())
        for embodiment in sorted(set(embodiments.tolist())):
            entry = ranges.setdefault(embodiment, {})
            azimuths.setdefault(embodiment, set()).update(azimuth[embodiments == embodiment].tolist())
            for name, array in values.items():
                own = array[embodiments == embodiment]
                low, high = entry.get(name, [np.inf, -np.inf])
                entry[name] = [min(low, float(own.min())), max(high, float(own.max()))]
    for embodiment, angles in azimuths.items():
        ranges[embodiment]["azimuth, deg"] = smallest_arc(angles)
    return ranges


def smallest_arc(angles_deg: Iterable[float]) -> list[float]:
    """[first, last] of the smallest arc that holds all angles, first in [-180, 180), last not before it."""
    angles = np.unique((np.array([*angles_deg]) + 180) % 360 - 180)
    gaps = np.diff(angles, append=angles[0] + 360)
    first = float(angles[(int(np.argmax(gaps)) + 1) % len(angles)])
    return [first, round(first + 360 - float(gaps.max()), 2)]


def mix_statistics(
    parts: Sequence[tuple[dict[str, dict[str, dict[str, list[float]]]], float]],
    state_names: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Statistics of a mixture of datasets from [(statistics, weight)].

    An embodiment of one dataset keeps its statistics. One of several gets the extremes of all, mean and deviation of
    the mixture in proportion to the weights, and the outermost quantiles: q01 ... q99 holds at least 98 % of each part.
    Angles among its `state_names` are brought to one turn first, where all are narrower so.
    """
    found: dict[str, list[tuple[dict[str, dict[str, list[float]]], float]]] = {}
    for statistics, weight in parts:
        for embodiment, entry in statistics.items():
            found.setdefault(embodiment, []).append((entry, weight))
    return {
        embodiment: _mix(embodiment, entries, rotations_in((state_names or {}).get(embodiment, ())))
        for embodiment, entries in sorted(found.items())
    }


def _mix(
    embodiment: str,
    entries: Sequence[tuple[dict[str, dict[str, list[float]]], float]],
    rotations: Sequence[Sequence[int]],
) -> dict[str, Any]:
    if len(entries) == 1:
        return entries[0][0]
    names = {tuple(sorted((name, len(values["mean"])) for name, values in entry.items())) for entry, _ in entries}
    if len(names) > 1:
        raise ValueError(f"datasets with embodiment {embodiment!r} have different quantities (and sizes): {names}")
    weights = np.array([weight for _, weight in entries])
    weights = weights / weights.sum()
    mixed = {}
    for name in entries[0][0]:
        values = {key: np.array([entry[name][key] for entry, _ in entries]) for key in entries[0][0][name]}
        if name != "action":
            for index in (index for group in rotations for index in group):
                _to_one_turn(values, index)
        mean = weights @ values["mean"]
        square = weights @ (values["std"] ** 2 + (values["mean"] - mean) ** 2)
        result = {key: values[key].min(0) for key in ("min", "q01")} | {
            key: values[key].max(0) for key in ("max", "q99")
        }
        mixed[name] = {key: value.tolist() for key, value in (result | {"mean": mean, "std": np.sqrt(square)}).items()}
    return mixed


def _to_one_turn(values: dict[str, np.ndarray], index: int) -> None:
    """Moves number `index`, an angle, of every dataset but the first by whole turns, where all then span less; `values`
    are {statistic: (datasets, numbers)}.
    """
    low, high = values["min"][0, index], values["max"][0, index]
    for row in range(1, len(values["mean"])):
        turns = 2 * np.pi * np.round((values["mean"][0, index] - values["mean"][row, index]) / (2 * np.pi))
        ends = values["min"][row, index], values["max"][row, index]
        spans = [max(high, ends[1] + moved) - min(low, ends[0] + moved) for moved in (0.0, turns)]
        moved = turns if spans[1] < 0.9 * spans[0] else 0.0
        for key in ("min", "max", "q01", "q99", "mean"):
            values[key][row, index] += moved
        low, high = min(low, ends[0] + moved), max(high, ends[1] + moved)


def _values(path: Path) -> list[tuple[str, dict[str, np.ndarray], bool]]:
    """(embodiment, {name: (n, S or A)}, are all its states poses) of one shard."""
    wanted = {**_COLUMNS, "length": "action_plan_length", "single": "action", "embodiment": "embodiment"}
    wanted["is_pose"] = "state_is_pose"
    with open_shard(path) as file:
        present = set(file.schema_arrow.names)
    table = read_table(path, [column for column in wanted.values() if column in present])
    embodiments = np.array(table.column("embodiment").to_pylist())
    columns: dict[str, Any] = {name: numbers(table, column) for name, column in _COLUMNS.items() if column in present}
    is_pose = np.ones(len(embodiments), dtype=bool)
    if "state_is_pose" in present:
        is_pose = table.column("state_is_pose").fill_null(True).to_numpy()
    result = []
    for embodiment in sorted(set(embodiments)):
        rows = embodiments == embodiment
        values = {name: array[rows] for name, array in columns.items()}
        if "action" in values:
            valid = np.arange(values["action"].shape[1]) < numbers(table, "action_plan_length")[rows][:, None]
            values["action"] = values["action"][valid]
        else:
            values["action"] = numbers(table, "action")[rows]
        result.append((str(embodiment), values, bool(is_pose[rows].all())))
    return result
