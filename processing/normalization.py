"""Per-embodiment normalisation with exact inverses.

Statistics are plain JSON: ``{embodiment: {key: {name: [one number per dimension]}}}`` with key "state", "action" or
"keyframe_pose" and name "min", "max", "q01", "q99", "mean", "std", in robot units (m, rad, gripper 0..1 or -1..1).
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .rotations import wrap_angle

# mode -> the two statistics that it needs. "quantiles" is what the released StereoVLA uses (its 1 % and 99 %
# percentiles).
STATISTICS_OF_MODE = {"quantiles": ("q01", "q99"), "min_max": ("min", "max"), "mean_std": ("mean", "std")}
# A dimension that spans less than a micrometre or microradian is constant: float32 rounds positions of 1 m to 6e-8 m,
# and dividing by such a span would turn rounding noise into full-scale values.
CONSTANT_SPAN = 1e-6
# Normalised values beyond which an extreme of the data is a rare event that the quantiles (or the deviation) miss: the
# extremes of a normal distribution lie at 2.1 (5.0) among a million values; of a gripper that is open in 99.5 % of the
# frames, with 0.3 % of noise, at 649.
RARE_LIMIT = 10.0
# Of a number that a batch takes; what a robot reports lies near +-1, and float16 ends at 65,504.
MAX_NORMALIZED = 1e4
ROUNDED_PI = 1e-3  # rad; angles that float32 or a robot rounds lie that far beyond pi without going on there


def shown(value: Any) -> str:
    """The value as errors name it, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def check_finite(values: np.ndarray, name: str) -> None:
    """Raise ValueError naming the first index of `values` that is NaN or infinite."""
    finite = np.isfinite(values)
    if not finite.all():
        index = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(f"{name}[{', '.join(map(str, index))}] is {values[index]}; every value must be finite")


def check_statistics(norm_stats: Mapping[str, Any], mode: str) -> None:
    """Raise ValueError if `norm_stats` lacks what `mode` needs, or holds numbers that cannot be statistics."""
    if mode not in STATISTICS_OF_MODE:
        raise ValueError(f"normalization={mode!r} is unknown; valid modes: {sorted(STATISTICS_OF_MODE)}")
    low_name, high_name = STATISTICS_OF_MODE[mode]
    for embodiment, keys in norm_stats.items():
        if not isinstance(keys, Mapping):
            raise ValueError(
                f"norm_stats[{embodiment!r}] must map 'state', 'action', ... to statistics, got {type(keys).__name__}"
            )
        for key, statistics in keys.items():
            where = f"norm_stats[{embodiment!r}][{key!r}]"
            if not isinstance(statistics, Mapping):
                raise ValueError(f"{where} must map statistics' names to lists, got {type(statistics).__name__}")
            missing = [name for name in (low_name, high_name) if name not in statistics]
            if missing:
                raise ValueError(f"{where} lacks {missing}, which mode {mode!r} needs; it has {sorted(statistics)}")
            arrays = {name: np.asarray(statistics[name], dtype=np.float64) for name in statistics}
            shape = arrays[low_name].shape
            for name, array in arrays.items():
                if array.ndim != 1 or array.shape != shape:
                    raise ValueError(
                        f"{where}[{name!r}] has shape {array.shape}; expected one number per dimension, {shape}"
                    )
                check_finite(array, f"{where}[{name!r}]")
            low, high = arrays[low_name], arrays[high_name]
            wrong = np.flatnonzero(high < 0) if mode == "mean_std" else np.flatnonzero(high < low)
            if wrong.size:
                i = int(wrong[0])
                limit = "0" if mode == "mean_std" else f"{low_name}[{i}] = {low[i]}"
                raise ValueError(f"{where}[{high_name!r}][{i}] = {high[i]} is below {limit}")


@dataclass(frozen=True)
class Scaling:
    """normalised = (value - shift) / scale + base, each (dimensions,).

    `turn` is the middle of the turn that the values of an angle are brought to; NaN where they stay as they are.
    """

    shift: np.ndarray
    scale: np.ndarray
    constant: np.ndarray
    turn: np.ndarray

    def turned(self, values: np.ndarray) -> np.ndarray:
        """Values (..., D), those with a `turn` within pi of it."""
        return np.where(np.isnan(self.turn), values, self.turn + wrap_angle(values - self.turn))


class Normalizer:
    """Robot units <-> normalised values. "quantiles" and "min_max" map the range onto [-1, 1], "mean_std" to zero mean.

    Nothing is clipped: values outside the range map outside [-1, 1], and back. Constant dimensions (see CONSTANT_SPAN)
    carry no information: they normalise to one fixed value (-1, or 0 in "mean_std") and always come back as the
    constant. A dimension whose minimum or maximum would lie beyond +-RARE_LIMIT uses these two in any mode, onto
    [-1, 1]: its quantiles (nearly) touch although it moves.

    Angles whose statistics go on beyond +-pi (a flange that looks down has a roll of pi, whose sign flips) are brought
    to that turn before they are normalised, and back into [-pi, pi) after.
    """

    def __init__(
        self,
        norm_stats: Mapping[str, Any] | None,
        mode: str = "quantiles",
        angles: Callable[[str, str], Sequence[int]] = lambda embodiment, key: (),
    ):
        """`norm_stats`: see the module; None or empty is allowed until a value has to be converted. `angles`: of an
        embodiment and a key, the indices of the numbers that are angles of a rotation.
        """
        self.mode = mode
        self.norm_stats = norm_stats or {}
        self.angles = angles
        check_statistics(self.norm_stats, mode)

    @property
    def base(self) -> float:
        """Normalised value of the lower end of the range (or of the mean)."""
        return 0.0 if self.mode == "mean_std" else -1.0

    def statistics(self, embodiment: str, key: str) -> Mapping[str, Any]:
        """Statistics of one quantity; ValueError naming the valid embodiments or keys."""
        if not self.norm_stats:
            raise ValueError(
                "this processor has no statistics: pass norm_stats={embodiment: {'state': {...}, 'action': {...}, "
                "'keyframe_pose': {...}}} when creating it (a dataset keeps them in meta/stats.json)"
            )
        if not isinstance(embodiment, str) or embodiment not in self.norm_stats:
            raise ValueError(f"unknown embodiment {shown(embodiment)}; valid embodiments: {sorted(self.norm_stats)}")
        if key not in self.norm_stats[embodiment]:
            known = sorted(self.norm_stats[embodiment])
            raise ValueError(f"norm_stats[{embodiment!r}] has no {key!r}; it has {known}")
        return self.norm_stats[embodiment][key]

    def scaling(self, embodiment: str, key: str) -> Scaling:
        """What `normalize` does to one quantity."""
        statistics = {n: np.array(v, dtype=np.float64) for n, v in self.statistics(embodiment, key).items()}
        first, second = (statistics[name] for name in STATISTICS_OF_MODE[self.mode])
        shift, middle, scale = first, first, second
        if self.mode != "mean_std":
            middle, scale = (first + second) / 2, (second - first) / 2
        if "min" in statistics and "max" in statistics:
            low, high = statistics["min"], statistics["max"]
            furthest = np.maximum(high - middle, middle - low)
            rare = (furthest > RARE_LIMIT * scale) & (high - low >= CONSTANT_SPAN)
            middle, scale = np.where(rare, (low + high) / 2, middle), np.where(rare, (high - low) / 2, scale)
            shift = np.where(rare, middle if self.mode == "mean_std" else low, shift)
        constant = scale < CONSTANT_SPAN / 2
        turn = np.full(len(middle), np.nan)
        for index in self.angles(embodiment, key):
            ends = [statistics[name][index] for name in ("min", "max", "q01", "q99", "mean") if name in statistics]
            if np.abs(ends).max() > math.pi + ROUNDED_PI:
                turn[index] = middle[index]
        return Scaling(shift, np.where(constant, 1.0, scale), constant, turn)

    def _checked(self, values: Any, dimensions: int, name: str) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        if values.ndim == 0 or values.shape[-1] != dimensions:
            raise ValueError(f"{name} has shape {values.shape}; the last dimension must be {dimensions}")
        check_finite(values, name)
        return values

    def normalize(self, values: Any, embodiment: str, key: str) -> np.ndarray:
        """Robot units (..., D) -> normalised float64 (..., D)."""
        to = self.scaling(embodiment, key)
        values = to.turned(self._checked(values, len(to.shift), key))
        return np.where(to.constant, self.base, (values - to.shift) / to.scale + self.base)

    def normalize_batch(
        self, values: Sequence[np.ndarray | None], embodiments: Sequence[str], key: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        """One value of `shape` per sample, None = zeros -> float64 (B, *shape); one conversion per embodiment.

        ValueError names the sample and number that lie beyond MAX_NORMALIZED.
        """
        out = np.zeros((len(values), *shape))
        for name in sorted({name for name, value in zip(embodiments, values, strict=True) if value is not None}):
            rows = [row for row, value in enumerate(values) if value is not None and embodiments[row] == name]
            out[rows] = self.normalize(np.stack([values[row] for row in rows]), name, key)
        far = np.argwhere(np.abs(out) > MAX_NORMALIZED)
        if len(far):
            row, *place = far[0].tolist()
            raise ValueError(
                f"sample {row}: {key}{place} is {values[row][tuple(place)]:g}, {out[tuple(far[0])]:g} normalised for "
                f"{embodiments[row]!r}; at most {MAX_NORMALIZED:g} is taken: is the unit another one?"
            )
        return out

    def unnormalize(self, values: Any, embodiment: str, key: str) -> np.ndarray:
        """Normalised (..., D) -> robot units float64 (..., D); exact inverse of `normalize` up to rounding."""
        to = self.scaling(embodiment, key)
        values = self._checked(values, len(to.shift), f"normalised {key}")
        values = np.where(to.constant, to.shift, (values - self.base) * to.scale + to.shift)
        return np.where(np.isnan(to.turn), values, wrap_angle(values))

    def scale(self, differences: Any, embodiment: str, key: str, rotations: Sequence[Sequence[int]] = ()) -> np.ndarray:
        """Differences (..., D) of two values in robot units -> of their normalised values, float64 (..., D).

        The three parts of a rotation are one thing, whose axis may lie anywhere: all are divided by the largest of
        their scales.
        """
        to = self.scaling(embodiment, key)
        scale, constant = to.scale.copy(), to.constant.copy()
        for group in map(list, rotations):
            constant[group] = to.constant[group].all()
            scale[group] = np.where(to.constant[group], 0, to.scale[group]).max()
        values = self._checked(differences, len(scale), f"difference of {key}")
        return np.where(constant, 0.0, values / np.where(constant, 1.0, scale))
