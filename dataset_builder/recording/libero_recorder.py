"""The scripted expert's episodes of LIBERO's tasks, on layouts that are drawn, never on the official ones."""

import numpy as np

from stereovla.dataset_builder.recording.recorder import PUSHED_M, Recorder
from stereovla.simulation.libero import LiberoExpert, LiberoWorld

IN_A_ROW = 5  # episodes of one task before the next: another scene takes seconds to load


class LiberoRecorder(Recorder):
    """Records the tasks of a suite in turn: `IN_A_ROW` episodes of each, fewer where a split has not so many of all."""

    world_type, expert_type = LiberoWorld, LiberoExpert

    def _reset(self, world_seed: int, split: str, index: int) -> None:
        tasks = self.world.config.tasks
        count = self.config.train_episodes if split == "train" else self.config.validation_episodes
        in_a_row = max(1, min(IN_A_ROW, count // len(tasks)))
        self.world.reset(world_seed, tasks[index // in_a_row % len(tasks)])

    def _pushed(self) -> bool:
        """Whether something lies elsewhere than at the start that the task is not about."""
        world = self.world
        named = {key for goal in world.scene.goals for key in (goal.target, goal.destination)}
        return any(
            np.linalg.norm(world.object_pose(number)[0] - world.rest_points[number]) > PUSHED_M
            for number, item in enumerate(world.objects)
            if item.key not in named
        )
