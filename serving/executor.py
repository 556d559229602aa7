"""Executes action chunks: an arm that moves on while the next chunk is computed. Needs numpy alone, and no clock.

Whoever has the clock calls, once in each period of the controller: `deliver` or `lose` for an answer that has come or
will not, `request` for what the policy is to be asked now, `tick` for what the arm is told. Times are seconds of any
clock, such as that of a simulator.
"""

import math
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

from stereovla.serving.gripper import Gripper
from stereovla.serving.motion import Motion

MODES = ("synchronous", "asynchronous", "real_time")
DELAYS = 10  # of the last answers, the longest of which is expected of the next
SLACK_S = 1e-6  # of times, for rounding


@dataclass(frozen=True)
class ExecutorOptions:
    """How chunks are executed.

    Args:
        mode: "synchronous": the arm waits for each chunk. "asynchronous": it goes on with the present one meanwhile.
            "real_time": the same, and the policy is told the rest of the present chunk, so that the next continues it.
        rate_hz: steps of a chunk per second, as the server's metadata has them. control_hz: commands per second.
        horizon: steps after which the next chunk is asked for, counted from the observation of the present one.
        watchdog_s: the arm is stopped where the observation behind its motion is older than that.
        first_delay_s: expected until an answer has been measured.
    """

    mode: str = "real_time"
    rate_hz: float = 10.0
    control_hz: float = 10.0
    horizon: int = 3
    watchdog_s: float = 2.0
    first_delay_s: float = 0.1

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; valid: {', '.join(MODES)}")
        if self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}; it must be at least 1 step")
        if not self.rate_hz > 0 or not self.control_hz >= self.rate_hz:
            raise ValueError(
                f"rate_hz is {self.rate_hz} and control_hz {self.control_hz}; both must be above 0, and a controller "
                "must not be slower than the policy's steps"
            )
        if not self.watchdog_s > self.horizon / self.rate_hz:
            raise ValueError(
                f"watchdog_s is {self.watchdog_s}; it must be longer than the {self.horizon / self.rate_hz:g} s of "
                f"{self.horizon} steps, or the arm stops in every chunk"
            )
        if not self.first_delay_s >= 0:
            raise ValueError(f"first_delay_s is {self.first_delay_s}; it must be at least 0")


@dataclass
class Request:
    """What the policy is to be asked, with the observation of `time_s`, when the arm was at `state`.

    running_actions: (n, A) what is left of the running chunk, as actions that begin at `state`; None = nothing, or the
    mode does not tell it. delay: how many of them will have been executed when the answer comes.
    """

    time_s: float
    state: np.ndarray
    running_actions: np.ndarray | None = None
    delay: int = 0
    waited_s: float = field(default=0.0, repr=False)  # that the arm did not move on since then


@dataclass(frozen=True)
class Command:
    """What the arm is told for the next period.

    target: (A,) to be reached at its end, the gripper's command in it; see `motion`. holds: there is nothing to
    execute, the target is where it is. stopped: by the watchdog. notes: what was shortened or not followed, in words.
    """

    target: np.ndarray
    holds: bool = False
    stopped: bool = False
    notes: tuple[str, ...] = ()


@dataclass
class _Chunk:
    """begin_s: when its first step began; knots (n + 1, A): where it began, and its targets."""

    asked_s: float
    begin_s: float
    knots: np.ndarray


class ChunkExecutor:
    """Executes the chunks of one episode at a time.

    A chunk takes over when it arrives, at the step that the arm has reached by then: what was executed meanwhile is
    skipped, what the arm waited is not. A motion that the speed limit shortens delays the rest of its chunk, so that
    the gripper does not close before the arm is there.

    Attributes:
        counts: of "commands", "requests", "chunks" taken over; "lost" answers, those "outdated" (nothing of them was
            left when they came) and "refused" (no chunk that this arm may execute); of the commands those that "hold"
            and are "stopped" by the watchdog, and that "speed", "workspace" and "gripper" changed.
        told: what was refused last, in words.
    """

    def __init__(self, motion: Motion, options: ExecutorOptions | None = None, gripper: Gripper | None = None):
        self.motion, self.options, self.gripper = motion, options or ExecutorOptions(), gripper or Gripper()
        self._step_s, self._period_s = 1 / self.options.rate_hz, 1 / self.options.control_hz
        self._delays_s: deque[float] = deque(maxlen=DELAYS)
        self.reset()

    def reset(self) -> None:
        """An episode begins: nothing is executed or asked for. The measured delays stay."""
        self._chunk: _Chunk | None = None
        self._pending: Request | None = None
        self._target: np.ndarray | None = None
        self._stopped = False
        self.gripper.reset()
        self.counts: Counter[str] = Counter()
        self.told = ""

    # ------------------------------------------------------------------ asking

    @property
    def expected_delay_s(self) -> float:
        """The longest of the last ten measured delays."""
        return max(self._delays_s, default=self.options.first_delay_s)

    def wants(self, now_s: float) -> bool:
        """Whether the policy is to be asked now; `request` does so."""
        if self._pending is not None:
            return False
        chunk = self._chunk
        if chunk is None or self._stopped or self._step(now_s) >= self._last_step(chunk) - SLACK_S:
            return True
        if self.options.mode == "synchronous":
            return False
        return now_s - chunk.asked_s >= self.options.horizon * self._step_s - SLACK_S

    def request(self, now_s: float, state: np.ndarray) -> Request:
        """What the policy is to be asked, about what is seen `now_s`. One at a time; ValueError for a second one."""
        if self._pending is not None:
            raise ValueError(f"the request of {self._pending.time_s:g} s has no answer yet; deliver or lose it first")
        request = Request(now_s, np.array(state, np.float64))
        if self.options.mode == "real_time" and (rest := self._rest(now_s)) is not None:
            request.running_actions = self.motion.actions(request.state, rest).astype(np.float32)
            request.delay = min(math.ceil(self.expected_delay_s / self._step_s - SLACK_S), len(rest))
        self._pending = request
        self.counts["requests"] += 1
        return request

    def deliver(self, request: Request, actions: np.ndarray, now_s: float) -> str:
        """The answer to `request`, (n, A); returns why it is not executed, "" = it is from now on."""
        self._answered(request)
        self._delays_s.append(now_s - request.time_s)
        chunk, problem = self._read(request, np.asarray(actions, np.float64))
        if problem:
            return self._refused("refused", problem)
        step = (now_s - chunk.begin_s) / self._step_s
        if step >= self._last_step(chunk) - SLACK_S:
            took = now_s - request.time_s
            return self._refused("outdated", f"the answer took {took:.2f} s, after which nothing of it is left")
        self.counts["chunks"] += 1
        self._chunk, self._stopped = chunk, False
        return ""

    def lose(self, request: Request) -> None:
        """No answer to `request` will come."""
        self._answered(request)
        self.counts["lost"] += 1

    def _answered(self, request: Request) -> None:
        if request is not self._pending:
            raise ValueError(f"the request of {request.time_s:g} s is not the one that waits for its answer")
        self._pending = None

    def _read(self, request: Request, actions: np.ndarray) -> tuple[_Chunk | None, str]:
        size = self.motion.size
        if actions.ndim != 2 or actions.shape[1] != size or not len(actions):
            return None, f"the chunk has shape {actions.shape}; expected (n, {size})"
        if not np.isfinite(actions).all():
            step, index = np.argwhere(~np.isfinite(actions))[0]
            return None, f"action {step} has {actions[step, index]} as number {index}"
        targets = self.motion.targets(request.state, actions)
        start = self._start(request.state, targets[0])
        if problem := self.motion.refusal(start, targets):
            return None, problem
        begin_s = request.time_s + request.waited_s
        return _Chunk(request.time_s, begin_s, np.concatenate([start[None], targets])), ""

    def _refused(self, kind: str, problem: str) -> str:
        self.counts[kind] += 1
        self.told = problem
        return problem

    # ------------------------------------------------------------------ moving

    def tick(self, now_s: float, state: np.ndarray) -> Command:
        """What the arm, which is at `state` (S,), is told for the period that begins at `now_s`."""
        self.counts["commands"] += 1
        chunk, state = self._chunk, np.asarray(state, np.float64)
        if self._target is None:
            start = chunk.knots[0] if chunk is not None else np.zeros(self.motion.size)
            self._target = self._start(state, start)
        if chunk is not None and not self._stopped and now_s - chunk.asked_s > self.options.watchdog_s + SLACK_S:
            self._stopped, self._target = True, self._start(state, self._target)  # where it is, not where it was told
            self._chunk = chunk = None
        step = self._step(now_s)
        if chunk is None or step >= self._last_step(chunk) - SLACK_S:
            self._wait(self._period_s)
            self.counts["hold"] += 1
            self.counts["stopped"] += self._stopped
            return Command(self._target.copy(), holds=True, stopped=self._stopped)
        return self._moved(now_s, step)

    def _moved(self, now_s: float, step: float) -> Command:
        """On from `step` of the chunk."""
        chunk, gripper = self._chunk, self.motion.gripper
        end = min(step + self._period_s / self._step_s, self._last_step(chunk))
        target, share, notes = self.motion.bounded(self._target, self._at(end), self._period_s)
        for note in notes:
            self.counts[note.partition(":")[0]] += 1
        if share < 1:
            late_s = (1 - share) * self._period_s
            chunk.begin_s += late_s
            self._wait(late_s)
        if gripper is not None:
            # of the step that the period begins in: what the next one says comes when the arm is there
            said = chunk.knots[math.floor(step + SLACK_S) + 1, gripper]
            target = target.copy()
            target[gripper], note = self.gripper.update(float(said), now_s)
            if note:
                notes.append(note)
                self.counts["gripper"] += 1
        self._target = target
        return Command(target.copy(), notes=tuple(notes))

    def _wait(self, seconds: float) -> None:
        """The arm does not go on for so long; a chunk that is asked for begins so much later."""
        if self._pending is not None:
            self._pending.waited_s += seconds

    # ------------------------------------------------------------------ along the chunk

    def _step(self, now_s: float) -> float:
        """The place in the running chunk."""
        return 0.0 if self._chunk is None else (now_s - self._chunk.begin_s) / self._step_s

    def _last_step(self, chunk: _Chunk) -> int:
        steps = len(chunk.knots) - 1
        return min(self.options.horizon, steps) if self.options.mode == "synchronous" else steps

    def _at(self, step: float) -> np.ndarray:
        """The target at a place in the running chunk."""
        knots = self._chunk.knots
        before = min(max(math.ceil(step - SLACK_S) - 1, 0), len(knots) - 2)
        return self.motion.between(knots[before], knots[before + 1], min(max(step - before, 0.0), 1.0))

    def _rest(self, now_s: float) -> np.ndarray | None:
        """Targets of the running chunk from now on, at its own rate; None where nothing is left."""
        if self._chunk is None or self._stopped:
            return None
        step = self._step(now_s)
        places = step + 1 + np.arange(math.floor(self._last_step(self._chunk) - step + SLACK_S))
        return np.array([self._at(place) for place in places]) if len(places) else None

    def _start(self, state: np.ndarray, target: np.ndarray) -> np.ndarray:
        """`state` as a target: with the gripper's command of another one."""
        start = np.zeros(self.motion.size)
        start[: len(state)] = state[: self.motion.size]
        if self.motion.gripper is not None:
            start[self.motion.gripper] = target[self.motion.gripper]
        return start
