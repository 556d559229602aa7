"""What the actions of a chunk mean: targets that the arm is to reach one after the other, and what lies between them.

A chunk is executed as the way that it describes from the state which the policy saw: what the arm has done meanwhile,
and what its controller left behind, does not move the targets. A target (A,) is a state to be reached, with the
command of the gripper in place of its opening.
"""

from abc import ABC, abstractmethod

import numpy as np

from stereovla.processing.rotations import (
    matrix_to_rotation_vector,
    matrix_to_rpy,
    rotation_vector_to_matrix,
    rpy_to_matrix,
)
from stereovla.serving.limits import PoseLimits, VectorLimits

AXES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
SLACK = 1e-9  # of a limit, for rounding


class Motion(ABC):
    """How one robot's actions move it. `size` numbers an action; `gripper`, which of them is its command, if any."""

    size: int
    gripper: int | None

    @abstractmethod
    def targets(self, state: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Targets (n, A) of actions (n, A) that begin at `state` (S,)."""

    @abstractmethod
    def actions(self, state: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Inverse of `targets`: the actions (n, A) that lead from `state` through them."""

    @abstractmethod
    def between(self, start: np.ndarray, end: np.ndarray, share: float) -> np.ndarray:
        """The target (A,) that lies `share`, 0 to 1, of the way from one to the next; the gripper's command is that of
        the end, on all of it.
        """

    @abstractmethod
    def refusal(self, start: np.ndarray, targets: np.ndarray) -> str:
        """Why targets (n, A) that begin at `start` (A,) are not to be executed at all, "" = they are."""

    @abstractmethod
    def bounded(self, start: np.ndarray, end: np.ndarray, seconds: float) -> tuple[np.ndarray, float, list[str]]:
        """`end`, or as much of the way there as the limits allow in `seconds`; the share of the way, 0 to 1, that the
        speed allows; and what was changed, in words.
        """


class PoseMotion(Motion):
    """Actions that displace the tool: dx, dy, dz (m, base frame), droll, dpitch, dyaw (rad, R_next = R(d) R_now), and
    the gripper's command; of a tool that always points down dx, dy, dz, dyaw and the command.

    Args:
        names: of the state, as the server's metadata has them.
    """

    def __init__(self, names: tuple[str, ...] = AXES, limits: PoseLimits | None = None):
        names = tuple(names)
        if names not in (AXES, (*AXES[:3], "yaw", "gripper")):
            raise ValueError(
                f"the state is {', '.join(names) or 'without names'}; a pose of the tool is {', '.join(AXES)}, or x, "
                "y, z, yaw, gripper. VectorMotion takes any other"
            )
        self.size, self.gripper, self.limits = len(names), len(names) - 1, limits or PoseLimits()
        self._turns = [AXES.index(name) - 3 for name in names[3:-1]]

    def _rotation(self, values: np.ndarray) -> np.ndarray:
        """(3, 3) of a state, an action or a target."""
        rpy = np.zeros(3)
        rpy[self._turns] = values[3:-1]
        return rpy_to_matrix(rpy)

    def _joined(self, position: np.ndarray, rotation: np.ndarray, gripper: float) -> np.ndarray:
        return np.concatenate([position, matrix_to_rpy(rotation)[self._turns], [gripper]])

    def targets(self, state, actions):
        position, rotation, found = np.asarray(state[:3], np.float64), self._rotation(state), []
        for action in actions:
            position, rotation = position + action[:3], self._rotation(action) @ rotation
            found.append(self._joined(position, rotation, action[-1]))
        return np.array(found).reshape(len(actions), self.size)

    def actions(self, state, targets):
        found, position, rotation = [], np.asarray(state[:3], np.float64), self._rotation(state)
        for target in targets:
            following = self._rotation(target)
            found.append(self._joined(target[:3] - position, following @ rotation.T, target[-1]))
            position, rotation = target[:3], following
        return np.array(found).reshape(len(targets), self.size)

    def between(self, start, end, share):
        first, last = self._rotation(start), self._rotation(end)
        rotation = rotation_vector_to_matrix(share * matrix_to_rotation_vector(last @ first.T)) @ first
        return self._joined(start[:3] + share * (end[:3] - start[:3]), rotation, end[-1])

    def _way(self, start: np.ndarray, end: np.ndarray) -> tuple[float, float]:
        """m and rad from one to the other."""
        turn = matrix_to_rotation_vector(self._rotation(end) @ self._rotation(start).T)
        return float(np.linalg.norm(end[:3] - start[:3])), float(np.linalg.norm(turn))

    def refusal(self, start, targets):
        limits = self.limits
        for step, (before, after) in enumerate(zip((start, *targets[:-1]), targets, strict=True)):
            for way, most, unit in zip(
                self._way(before, after), (limits.step_m, limits.step_rad), ("m", "rad"), strict=True
            ):
                if most is not None and way > most + SLACK:
                    return f"action {step} moves the tool by {way:.3f} {unit}, at most {most:g} {unit} are taken"
        return ""

    def bounded(self, start, end, seconds):
        changes, limits = [], self.limits
        if limits.workspace_m is not None:
            low, high = np.asarray(limits.workspace_m, np.float64)
            inside = np.clip(end[:3], low, high)
            if (inside != end[:3]).any():
                changes.append(f"workspace: {np.round(end[:3], 4)} m lies outside of {low} to {high} m")
                end = np.concatenate([inside, end[3:]])
        share = 1.0
        for way, most, unit in zip(
            self._way(start, end), (limits.speed_m_s, limits.speed_rad_s), ("m", "rad"), strict=True
        ):
            if most is not None and way > most * seconds + SLACK:
                share = min(share, most * seconds / way)
                changes.append(f"speed: {way / seconds:.3f} {unit}/s, at most {most:g} {unit}/s are allowed")
        return (end if share == 1.0 else self.between(start, end, share)), share, changes


class VectorMotion(Motion):
    """A robot's own actions, numbers that its controller knows: joint angles, two arms, a base.

    Args:
        size: numbers of an action.
        absolute: they are what is to be reached; False = added to what is there, the first numbers of the state.
        gripper: which of them is a gripper's command.
    """

    def __init__(
        self, size: int, absolute: bool = True, gripper: int | None = None, limits: VectorLimits | None = None
    ):
        if gripper is not None and not 0 <= gripper < size:
            raise ValueError(f"gripper is number {gripper} of an action; valid: 0 ... {size - 1}, or None")
        self.size, self.absolute, self.gripper = size, absolute, gripper
        self.limits = limits or VectorLimits()
        self._moving = np.array([index != gripper for index in range(size)])
        for name in ("speed", "step", "low", "high"):
            value = getattr(self.limits, name)
            if value is not None and np.shape(value) not in ((), (size,)):
                raise ValueError(f"{name} has {np.size(value)} numbers, an action {size}; give one, or one for each")

    def targets(self, state, actions):
        actions = np.asarray(actions, np.float64)
        if self.absolute:
            return actions.copy()
        found = self._start(state) + np.cumsum(actions, axis=0)
        return np.where(self._moving, found, actions)

    def actions(self, state, targets):
        if self.absolute:
            return targets.copy()
        before = np.concatenate([self._start(state)[None], targets[:-1]])
        return np.where(self._moving, targets - before, targets)

    def _start(self, state: np.ndarray) -> np.ndarray:
        if len(state) < self.size:
            raise ValueError(f"the state has {len(state)} numbers, an action {self.size}: it cannot be added to it")
        return np.asarray(state[: self.size], np.float64)

    def between(self, start, end, share):
        return np.where(self._moving, start + share * (end - start), end)

    def refusal(self, start, targets):
        if self.limits.step is None:
            return ""
        ways = np.abs(np.diff(np.concatenate([start[None], targets]), axis=0))
        most = np.broadcast_to(self.limits.step, (self.size,))
        too_far = np.argwhere((ways > most + SLACK) & self._moving)
        if not len(too_far):
            return ""
        step, index = too_far[0]
        return f"action {step} moves number {index} by {ways[step, index]:g}, at most {most[index]:g} are taken"

    def bounded(self, start, end, seconds):
        changes, limits = [], self.limits
        low = -np.inf if limits.low is None else np.asarray(limits.low, np.float64)
        high = np.inf if limits.high is None else np.asarray(limits.high, np.float64)
        inside = np.where(self._moving, np.clip(end, low, high), end)
        if (inside != end).any():
            index = int(np.argmax(inside != end))
            changes.append(f"workspace: number {index} is {end[index]:g}, allowed is {inside[index]:g} at the furthest")
        share = 1.0
        if limits.speed is not None:
            way = np.where(self._moving, np.abs(inside - start), 0.0)
            allowed = np.broadcast_to(np.asarray(limits.speed, np.float64) * seconds, (self.size,))
            if (way > allowed + SLACK).any():
                index = int(np.argmax(way / allowed))
                share = float(allowed[index] / way[index])
                changes.append(f"speed: number {index} changes by {way[index] / seconds:g} per s")
        return (inside if share == 1.0 else self.between(start, inside, share)), share, changes
