"""The interface of all policies, and two that need no model: the scripted expert and an arm that stands still."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# what a policy's geometry may be shown (see `shown_geometry`), in words
SHOWN = {
    "given": "what there is",
    "null": "grey or no depth",
    "left_twice": "the left view twice",
    "swapped": "another scene",
}


@dataclass(frozen=True)
class Observation:
    """What a policy may know of one environment at the moment it acts.

    slot: number of the environment; seed: of its episode; step: steps executed so far.
    states: (n, S) float32, every state of the episode at 10 Hz, the present one last; m, rad, gripper 0..1.
    left, right: (H, W, 3) uint8 RGB; None unless the policy needs images. views: further ones by name, None where one
    is absent.
    depths: {name of a view: (H, W) float32 m, 0 = unknown}, where they are known.
    calibration: of the left view and the pair, as processors take it, where it is known.
    another: of another scene, whose pictures and depth a policy's geometry is shown in a control (`shown_geometry`).
    running_actions: (n, A) float32, what is left of the chunk that is executed, from the present state on, which the
    next chunk shall continue; delay: how many of them will have been executed when it is there. None = nothing is.
    """

    slot: int
    seed: int
    step: int
    instruction: str
    embodiment: str
    states: np.ndarray
    left: np.ndarray | None = None
    right: np.ndarray | None = None
    views: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    depths: Mapping[str, np.ndarray] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    another: "Observation | None" = None
    running_actions: np.ndarray | None = None
    delay: int = 0

    @property
    def all_views(self) -> dict[str, np.ndarray | None]:
        """All of them by name."""
        given = {"left": self.left, "right": self.right}
        return {**{name: view for name, view in given.items() if view is not None}, **self.views}


class Policy(ABC):
    """Maps observations to action chunks. `reset` announces a new episode, `act` serves many environments at once."""

    name: str
    needs_images = False
    needs_depth = False  # of the left view

    def reset(self, slot: int, world: Any) -> None:  # noqa: B027, most policies keep nothing
        """A new episode begins in environment `slot`. Only the scripted expert may look into `world`."""

    @abstractmethod
    def act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        """One float32 (n, A) chunk per observation: dx, dy, dz m, droll, dpitch, dyaw rad, gripper command, or what
        else the robot's actions are.
        """


class StillPolicy(Policy):
    """Never moves: what success rates and progress begin from."""

    name = "still"

    def __init__(self, chunk_size: int = 8):
        self.chunk_size = chunk_size

    def act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        # every simulated robot's action has as many numbers as its state
        return [np.zeros((self.chunk_size, o.states.shape[-1]), np.float32) for o in observations]


class ExpertPolicy(Policy):
    """The scripted expert, which plans with the world's own state: the upper bound."""

    name = "expert"

    def __init__(self, chunk_size: int = 8):
        self.chunk_size = chunk_size
        self._experts: dict[int, Any] = {}

    def reset(self, slot: int, world: Any) -> None:
        # here, because models are evaluated offline where mujoco is not installed
        from stereovla.evaluation.worlds import make_expert

        self._experts[slot] = make_expert(world)

    def act(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        return [np.asarray(self._experts[o.slot].plan(self.chunk_size)[0], np.float32) for o in observations]
