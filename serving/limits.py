"""What a robot may be asked to do. A motion beyond it is shortened, an action beyond it refused: always with words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PoseLimits:
    """Of the tool; None = no limit.

    Args:
        speed_m_s, speed_rad_s: longest motion from one command to the next, per second; a longer one is shortened.
        step_m, step_rad: of one action of a chunk; a chunk with a longer one is refused.
        workspace_m: (lowest, highest) corner (3,) of the box that the tool stays in, in the base frame; what is asked
            for beyond is moved to its nearest point.
    """

    speed_m_s: float | None = None
    speed_rad_s: float | None = None
    step_m: float | None = None
    step_rad: float | None = None
    workspace_m: tuple[Sequence[float], Sequence[float]] | None = None

    def __post_init__(self):
        _check_positive(self, "speed_m_s", "speed_rad_s", "step_m", "step_rad")
        if self.workspace_m is not None:
            _check_range("workspace_m", self.workspace_m, 3)


@dataclass(frozen=True)
class VectorLimits:
    """Of the numbers of a robot's own actions, (A,) or one for all; None = no limit.

    Args:
        speed: largest change from one command to the next, per second; a larger one is shortened, all numbers alike.
        step: between actions of a chunk that follow each other; a chunk with a larger one is refused.
        low, high: what a command stays between; what is asked for beyond is moved to the nearest.
    """

    speed: Sequence[float] | float | None = None
    step: Sequence[float] | float | None = None
    low: Sequence[float] | float | None = None
    high: Sequence[float] | float | None = None

    def __post_init__(self):
        _check_positive(self, "speed", "step")
        if self.low is not None and self.high is not None and not np.all(np.less_equal(self.low, self.high)):
            raise ValueError(f"low is {self.low} and high {self.high}; low must not be above high")


def _check_positive(limits: object, *names: str) -> None:
    for name in names:
        value = getattr(limits, name)
        if value is not None and not np.all(np.greater(value, 0)):
            raise ValueError(f"{name} is {value}; it must be above 0, or None for no limit")


def _check_range(name: str, given: tuple[Sequence[float], Sequence[float]], size: int) -> None:
    bounds = np.asarray(given, np.float64)
    if bounds.shape != (2, size) or not (bounds[0] <= bounds[1]).all():
        raise ValueError(f"{name} is {given}; expected (lowest, highest) of {size} numbers each, lowest first")
