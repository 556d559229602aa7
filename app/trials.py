"""The simulator behind the page: one world for each visitor, stepped in closed loop by the model."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from stereovla.app.frames import Carried, Frame
from stereovla.evaluation.rollouts import Episode, RolloutConfig
from stereovla.processing.camera_geometry import Calibration
from stereovla.simulation import World


class Trial:
    """An episode that a model acts in. Used from one thread, like the renderer in it.

    Args:
        needs_depth: whether the model is shown true depth.
    """

    def __init__(self, config: RolloutConfig, seed: int, needs_depth: bool = False):
        self.needs_depth, self._episode = needs_depth, Episode(0, World(config.world), config)
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Begins the episode of a seed."""
        if not 0 <= seed < 2**63:
            raise ValueError(f"the seed is {seed}; it must be at least 0")
        self._episode.reset(seed)

    @property
    def instructions(self) -> list[str]:
        """What can be asked for in this scene; the first is what the world asked for."""
        return [task.instruction for task in self._episode.world.tasks]

    def ask(self, instruction: str) -> None:
        """Counts success by the task of this wording, where the scene has it; else by the one asked for before."""
        world = self._episode.world
        task = next((task for task in world.tasks if task.instruction == instruction), None)
        if task is not None and task != world.task:
            world.choose_task(task)

    @property
    def counted(self) -> str:
        """The instruction by which success is counted."""
        return self._episode.world.instruction

    @property
    def done(self) -> bool:
        return self._episode.done

    def frame(self, instruction: str) -> Frame:
        """What the model may see now."""
        seen = self._episode.observation(images=True, depth=self.needs_depth)
        return Frame(
            views={"left": seen.left, "right": seen.right},
            instruction=instruction,
            embodiment=seen.embodiment,
            states=seen.states,
            calibration=Calibration.from_mapping(self._episode.world.calibration),
            carried=Carried(seen.depths, drawn=True),
        )

    def execute(self, actions: np.ndarray) -> Iterator[None]:
        """Executes the beginning of a chunk, (chunk, A) in robot units; yields after each action."""
        if self.done:
            raise ValueError("this episode has ended; begin a new one")
        return self._episode.execute(actions)

    def told(self) -> str:
        """How it stands, in words."""
        record: dict[str, Any] = self._episode.record()
        words = f"{record['steps'] / 10:.1f} s"
        if record["success"]:
            words += ", **succeeded**"
        elif self.done:
            words += ", **failed**"
        words += f", progress {100 * record['progress']:.0f} %"
        return words + (f", lifted the {record['wrong_object']} instead" if record["wrong_object"] else "")

    def close(self) -> None:
        """Frees the world."""
        self._episode.world.close()
