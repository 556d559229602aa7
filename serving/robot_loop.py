"""Drives a robot by a policy behind a socket, in real time: the arm is told something in every period of its
controller, whatever the network does.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.executor import ChunkExecutor, Request
from stereovla.serving.recording import EpisodeRecorder

# kinds of `PolicyError` after which the next request may succeed; after any other the run ends
PASSING = ("unreachable", "lost", "timeout", "busy", "late", "closing")


@dataclass(frozen=True)
class Sensed:
    """What the robot knows of itself and sees now.

    state: (S,), robot units. views: RGB uint8 (H, W, 3) by name, "left" and those of the server's metadata, rectified.
    depths: (H, W) m by name, for a model that is shown them. calibration: as `PolicyClient.predict` takes it, for a
    model that is told it. fresh: False = no new picture since the last time; the
    policy is not asked about an old one.
    """

    state: np.ndarray
    views: Mapping[str, np.ndarray]
    depths: Mapping[str, np.ndarray] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    fresh: bool = True


class Robot(Protocol):
    """What a robot's own driver has to offer. None of these may take long: they are called in every period."""

    def observe(self) -> Sensed:
        """The newest state and pictures, at once; it does not wait for the camera."""

    def command(self, target: np.ndarray, seconds: float) -> None:
        """Begins to move to `target` (A,), see `motion`, to be there in so many seconds; it does not wait for that."""

    def stop(self) -> None:
        """Stops at once and stays."""


class RobotLoop:
    """Runs episodes. Between them, and when anything goes wrong, the robot has been told to stop.

    Args:
        client: of the policy; its `timeout_s` is how long an answer may take before it counts as lost.
        executor: how chunks are executed; its `counts` tell how it went.
        embodiment: of the server's metadata; None where it knows one.
        recorder: keeps what is executed; None = nothing is kept.
        give_up_s: the run ends where the arm has had nothing to execute for so long.
        clock, sleep, pool: of the time, and of the thread that asks; for tests.
    """

    def __init__(
        self,
        client: PolicyClient,
        robot: Robot,
        executor: ChunkExecutor,
        embodiment: str | None = None,
        recorder: EpisodeRecorder | None = None,
        give_up_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        pool: Executor | None = None,
    ):
        self.client, self.robot, self.executor, self.recorder = client, robot, executor, recorder
        self.embodiment, self.give_up_s = embodiment, give_up_s
        self._clock, self._sleep, self._pool = clock, sleep, pool
        self._past: deque[tuple[float, np.ndarray]] = deque()

    def run(
        self,
        instruction: str,
        seconds: float,
        ends: Callable[[], bool] = lambda: False,
        outcome: Callable[[], bool | None] | None = None,
        say: Callable[[str], None] = print,
    ) -> Counter[str]:
        """Executes an instruction for so many `seconds`, or until it `ends`; returns the executor's counts, and how
        many periods came "late".

        Args:
            outcome: asked once the robot has stopped, where it is recorded: whether it succeeded, None = throw it away
                (such as `recording.ask_outcome`).
            say: told what was shortened, refused or lost, where it is something else than what was told last.

        Raises:
            PolicyError: the server cannot be used, or has given nothing to execute for `give_up_s`.
        """
        if self.recorder is not None and outcome is None:
            raise ValueError("outcome is missing: a recording says whether it succeeded, such as by ask_outcome")
        self.executor.reset()
        self._past.clear()
        pool = self._pool or ThreadPoolExecutor(1, "policy")
        late, target = 0, None
        if self.recorder is not None:
            self.recorder.begin(instruction)
        try:
            late, target = self._drive(pool, instruction, seconds, ends, say)
        except BaseException:
            if self.recorder is not None:
                self.recorder.discard()
            raise
        finally:
            self.robot.stop()
            if self._pool is None:
                pool.shutdown(wait=False, cancel_futures=True)
        if self.recorder is not None:
            success = outcome()
            if success is None:
                self.recorder.discard()
            else:
                self.recorder.end(success, target)
        return self.executor.counts + Counter(late=late)

    def _drive(
        self, pool: Executor, instruction: str, seconds: float, ends: Callable[[], bool], say: Callable[[str], None]
    ) -> tuple[int, np.ndarray]:
        """The periods of one run; how many were late, and what the arm was told last."""
        period_s, step_s = 1 / self.executor.options.control_hz, 1 / self.executor.options.rate_hz
        begin_s = next_s = moved_s = self._clock()
        asked: tuple[Request, Future] | None = None
        late, steps, target = 0, 0, None
        told: list[str] = []
        while (now_s := self._clock()) - begin_s < seconds - 1e-6 and not (target is not None and ends()):
            sensed = self.robot.observe()
            state = np.asarray(sensed.state, np.float64)
            self._remember(now_s, state)
            words = []
            if asked is not None and asked[1].done():
                words.append(self._hear(*asked, now_s))
                asked = None
            if self.recorder is not None and now_s - begin_s >= steps * step_s - 1e-6:
                self.recorder.add(now_s - begin_s, state, sensed.views, target)
                steps = int((now_s - begin_s) / step_s + 1e-6) + 1  # one that was late is not made up for
            if asked is None and sensed.fresh and self.executor.wants(now_s):
                request = self.executor.request(now_s, state)
                asked = (request, pool.submit(self._ask, request, instruction, sensed, self._history(now_s)))
                if asked[1].done():  # where it takes no time
                    words.append(self._hear(*asked, now_s))
                    asked = None
            command = self.executor.tick(now_s, state)
            target = command.target
            self.robot.command(target, period_s)
            moved_s = moved_s if command.holds else now_s
            if now_s - moved_s > self.give_up_s:
                raise PolicyError(
                    "timeout", f"nothing to execute for {self.give_up_s:g} s; {'; '.join(told) or 'no answer came'}"
                )
            words = [*filter(None, words), *command.notes, *(["stopped: no fresh chunk"] if command.stopped else [])]
            if words and [word.partition(":")[0] for word in words] != [word.partition(":")[0] for word in told]:
                say("; ".join(words))
                told = words
            next_s += period_s
            if (left := next_s - self._clock()) > 0:
                self._sleep(left)
            else:
                late, next_s = late + 1, self._clock()
        if target is None:
            raise ValueError(f"seconds is {seconds}; it must be above 0")
        return late, target

    def _ask(self, request: Request, instruction: str, sensed: Sensed, states: np.ndarray) -> np.ndarray:
        """In the thread of its own."""
        views = dict(sensed.views)
        running: dict[str, Any] = {}
        if request.running_actions is not None:
            running = {"running_actions": request.running_actions, "delay": request.delay}
        return self.client.predict(
            views.pop("left"),
            views.pop("right", None),
            instruction,
            states,
            self.embodiment,
            views=views,
            depths=sensed.depths,
            calibration=sensed.calibration,
            **running,
        ).actions

    def _hear(self, request: Request, answer: Future, now_s: float) -> str:
        """Takes an answer; what is to be said of it. PolicyError for one after which there will be none."""
        try:
            actions = answer.result()
        except PolicyError as error:
            if error.kind not in PASSING:
                raise
            self.executor.lose(request)
            return str(error)
        return self.executor.deliver(request, actions, now_s)

    def _remember(self, now_s: float, state: np.ndarray) -> None:
        self._past.append((now_s, state))
        length_s = self._length / self.executor.options.rate_hz
        while len(self._past) > 1 and self._past[1][0] <= now_s - length_s:
            self._past.popleft()

    @property
    def _length(self) -> int:
        return int(self.client.metadata.get("state_history", 1)) if self.client.is_ours else 1

    def _history(self, now_s: float) -> np.ndarray:
        """(k, S): the states of the last k steps, the present one last; the first of the run where there were none."""
        times = now_s - np.arange(self._length)[::-1] / self.executor.options.rate_hz
        return np.array(
            [next((s for t, s in reversed(self._past) if t <= time + 1e-6), self._past[0][1]) for time in times]
        )
