"""A gripper that does not chatter: it changes only at a clear command, and not again at once."""

import numpy as np


class Gripper:
    """Open or closed from a stream of commands; the first is passed on as it is until one is clear.

    Args:
        close_below, open_above: commands beyond change it; between them it stays as it is.
        closed, opened: what the robot is told.
        dwell_s: after a change it stays so for at least so long.
    """

    def __init__(
        self,
        close_below: float = -0.5,
        open_above: float = 0.5,
        closed: float = -1.0,
        opened: float = 1.0,
        dwell_s: float = 0.0,
    ):
        if not close_below <= open_above:
            raise ValueError(f"close_below is {close_below} and open_above {open_above}; it must not be above it")
        if not dwell_s >= 0:
            raise ValueError(f"dwell_s is {dwell_s}; it must be at least 0")
        self.close_below, self.open_above, self.dwell_s = close_below, open_above, dwell_s
        self.closed, self.opened = closed, opened
        self.reset()

    def reset(self) -> None:
        """Nothing has been commanded yet."""
        self._command: float | None = None
        self._changed_s = -np.inf

    def update(self, command: float, now_s: float) -> tuple[float, str]:
        """What the robot is told at `now_s`, and why a clear command is not followed, "" = it is."""
        wanted = self.opened if command > self.open_above else self.closed if command < self.close_below else None
        if wanted is None or wanted == self._command:
            return (command if self._command is None else self._command), ""
        since = now_s - self._changed_s
        if self._command is not None and since < self.dwell_s - 1e-9:
            return self._command, f"gripper: changed {since:.2f} s ago, stays as it is for {self.dwell_s:g} s"
        self._command, self._changed_s = wanted, now_s
        return wanted, ""
