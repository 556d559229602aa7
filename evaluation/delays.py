"""An arm whose policy answers late: what a chunk executor makes of answers that take their time, in simulated time, so
that a result does not depend on the machine.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stereovla.serving.executor import MODES, ChunkExecutor, ExecutorOptions, Request
from stereovla.serving.motion import PoseMotion

PERIOD_S = 0.1  # of the simulated controller, which is also a step of a chunk


@dataclass(frozen=True)
class Delivery:
    """How chunks are asked for, and how their answers come.

    Args:
        mode: of `serving.executor`.
        latency_s: from an observation to its answer. jitter_s: each one's differs by up to so much.
        dropped_frames: share of the periods of the controller without a new picture: nothing can be asked in them.
        restart_s: the server is away for so long, once in each episode, from a moment in its first second on; what was
            asked and not answered by then is lost.
    """

    mode: str = "real_time"
    latency_s: float = 0.0
    jitter_s: float = 0.0
    dropped_frames: float = 0.0
    restart_s: float = 0.0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; valid: {', '.join(MODES)}")
        if not 0 <= self.jitter_s <= self.latency_s:
            raise ValueError(
                f"jitter_s is {self.jitter_s}; it must be in [0, latency_s], latency_s is {self.latency_s}"
            )
        if not 0 <= self.dropped_frames < 1 or not self.restart_s >= 0:
            raise ValueError(
                f"dropped_frames is {self.dropped_frames} and restart_s {self.restart_s}; the one must be in [0, 1), "
                "the other at least 0"
            )


class DelayedArm:
    """One episode of a `ChunkExecutor` behind such a delivery; everything that is random in it follows from the seed.

    Args:
        axes: of the robot's actions. horizon: steps of a chunk after which the next is asked for.
    """

    def __init__(self, delivery: Delivery, axes: tuple[str, ...], horizon: int, seed: int):
        self.delivery, self.motion = delivery, PoseMotion(axes)
        rate = 1 / PERIOD_S
        self.executor = ChunkExecutor(
            self.motion,
            ExecutorOptions(delivery.mode, rate, rate, horizon, first_delay_s=delivery.latency_s),
        )
        self._random = np.random.default_rng((seed, 3))
        self._away_s = float(self._random.uniform(0.0, 1.0))  # when the server goes away, if it does
        self._period = 0
        self.request: Request | None = None

    @property
    def now_s(self) -> float:
        return self._period * PERIOD_S

    def begin(self, state: np.ndarray) -> None:
        """The first request, about what is seen at `state`."""
        self.request = self.executor.request(self.now_s, state)

    def actions(self, chunk: np.ndarray, state: Callable[[], np.ndarray]) -> Iterator[np.ndarray]:
        """The robot's actions, one in each period, from the request that `chunk` answers until the next one is asked.

        Args:
            state: what the arm's is now.
        """
        due_s = self.now_s + self.delivery.latency_s
        due_s += float(self._random.uniform(-1, 1)) * self.delivery.jitter_s
        lost = self.delivery.restart_s > 0 and self.now_s < self._away_s <= due_s
        asked, self.request = self.request, None
        while True:
            now_s = self.now_s
            if asked is not None and now_s >= (self._away_s if lost else due_s) - 1e-6:
                if lost:
                    self.executor.lose(asked)
                else:
                    self.executor.deliver(asked, chunk, now_s)
                asked = None
            if self._asks(now_s, state):
                return
            action = self.motion.actions(state(), self.executor.tick(now_s, state()).target[None])[0]
            self._period += 1
            yield action

    def _asks(self, now_s: float, state: Callable[[], np.ndarray]) -> bool:
        """Whether a request leaves now; one that finds no server is lost."""
        if not self.executor.wants(now_s) or self._random.random() < self.delivery.dropped_frames:
            return False
        request = self.executor.request(now_s, state())
        if self.delivery.restart_s and self._away_s <= now_s < self._away_s + self.delivery.restart_s:
            self.executor.lose(request)
            return False
        self.request = request
        return True


def deliveries(options: Any, modes: Sequence[str]) -> dict[str, Delivery]:
    """{name: delivery} of what `stereovla evaluate delays` tries, in the order of its table."""
    found: dict[str, Delivery] = {}
    for mode in modes:
        for latency in options.latencies_ms:
            found[f"{mode}-{latency}ms"] = Delivery(mode, latency / 1000)
        late = options.disturbed_ms / 1000
        found[f"{mode}-jitter"] = Delivery(mode, late, jitter_s=options.jitter_ms / 1000)
        found[f"{mode}-dropped"] = Delivery(mode, late, dropped_frames=options.dropped_frames)
        found[f"{mode}-restart"] = Delivery(mode, late, restart_s=options.restart_ms / 1000)
    return found
