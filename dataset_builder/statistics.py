"""Statistics per embodiment in one pass over the shards, in the form that the processor takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_builder.shards import numbers, open_shard, read_table

SAMPLE = 1_000_000  # values up to which quantiles are exact; beyond, they come from a random sample of as many
_COLUMNS = {"state": "observation.state", "keyframe_pose": "keyframe_pose", "action": "action_plan"}


class RunningStatistics:
    """Minimum, maximum, mean, standard deviation, 1 % and 99 % quantiles of vectors that arrive in parts.

    Mean and deviation are merged in float64 without cancellation. Quantiles are exact up to `sample` vectors; from
    there on a
    reservoir of that many, drawn with a fixed seed, stands for all: its error at 1e6 is below 0.0005 in rank.
    """

    def __init__(self, size: int, sample: int = SAMPLE, seed: int = 0):
        self.count = 0
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.mean, self.squares = np.zeros(size), np.zeros(size)
        self.sample, self._rng = sample, np.random.default_rng(seed)
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

    Actions are the valid steps of the plans, or the column `action` where the data has no plans.
    """
    running: dict[str, dict[str, RunningStatistics]] = {}
    for path in shards:
        for embodiment, values in _values(path):
            entry = running.setdefault(embodiment, {})
            for name, array in values.items():
                entry.setdefault(name, RunningStatistics(array.shape[1])).add(array)
    return {
        embodiment: {name: statistics.result() for name, statistics in sorted(entry.items())}
        for embodiment, entry in sorted(running.items())
    }


def _values(path: Path) -> list[tuple[str, dict[str, np.ndarray]]]:
    """(embodiment, {name: (n, S or A)}) of one shard."""
    wanted = {**_COLUMNS, "length": "action_plan_length", "single": "action", "embodiment": "embodiment"}
    with open_shard(path) as file:
        present = set(file.schema_arrow.names)
    table = read_table(path, [column for column in wanted.values() if column in present])
    embodiments = np.array(table.column("embodiment").to_pylist())
    columns: dict[str, Any] = {name: numbers(table, column) for name, column in _COLUMNS.items() if column in present}
    result = []
    for embodiment in sorted(set(embodiments)):
        rows = embodiments == embodiment
        values = {name: array[rows] for name, array in columns.items()}
        if "action" in values:
            valid = np.arange(values["action"].shape[1]) < numbers(table, "action_plan_length")[rows][:, None]
            values["action"] = values["action"][valid]
        else:
            values["action"] = numbers(table, "action")[rows]
        result.append((str(embodiment), values))
    return result
