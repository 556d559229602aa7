"""The build as a datatrove pipeline: one task per part of the dataset, then one that joins them.

The tasks share the folder `out`. A task that is killed or runs out of time goes on where it was when it is started
again, whichever executor starts it: what is done is what lies in the folder, not what an executor remembers.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from stereovla.command_line import option
from stereovla.dataset_builder.recording.build import BuildConfig, build
from stereovla.dataset_builder.recording.parts import merge
from stereovla.extras import extra

with extra("data"):
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep

EXECUTORS = ("local", "slurm", "ray")
_MEMORY_GB = 3  # per recording process: it takes 0.6 GB and holds its shard, twice while it writes it


@dataclass
class PipelineConfig(BuildConfig):
    """Builds and merges a dataset as tasks of datatrove: the options of `build`, and where the tasks run."""

    num_shards: int = option(2, "Tasks; each records every N-th shard with `processes` processes.")
    executor: str = option("local", f"Who runs the tasks: {', '.join(EXECUTORS)}.")
    workers: int = option(-1, "Tasks that run at the same time; -1 = all.")
    logs: str = option("", "Folder of datatrove's logs; default: beside the dataset, with -logs behind its name.")
    partition: str = option("", "Slurm's partition.")
    time: str = option("24:00:00", "Slurm's time limit for a task.")

    def __post_init__(self):
        super().__post_init__()
        if self.executor not in EXECUTORS:
            raise ValueError(f"executor={self.executor!r}; valid: {', '.join(EXECUTORS)}")
        if self.shard_index:
            raise ValueError(f"shard_index={self.shard_index}: the pipeline runs all parts, each task knows its own")
        if self.workers == 0 or self.workers < -1:
            raise ValueError(f"workers={self.workers} must be at least 1, or -1 for all at once")
        if self.executor == "slurm" and not self.partition:
            raise ValueError("--partition is empty: Slurm needs one")

    def build_config(self) -> BuildConfig:
        """The options of `build` alone."""
        return BuildConfig(**{item.name: getattr(self, item.name) for item in fields(BuildConfig)})


class RecordPart(PipelineStep):
    """Task `rank` of `world_size` records its shards."""

    type, name = "StereoVLA", "record a part"

    def __init__(self, config: BuildConfig):
        super().__init__()
        self.config = config

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self.track_time(unit="task"):
            build(replace(self.config, shard_index=rank, num_shards=world_size))


class JoinParts(PipelineStep):
    """Finishes the dataset."""

    type, name = "StereoVLA", "join the parts"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        with self.track_time(unit="dataset"):
            merge(self.folder)


def make_executor(config: PipelineConfig) -> PipelineExecutor:
    """Executor of the last step; `run()` runs the recording first (Slurm: submits both and returns)."""
    if not config.out:
        raise ValueError("--out is empty: where shall the dataset go?")
    folder = Path(config.out)
    logs = Path(config.logs) if config.logs else folder.with_name(f"{folder.name}-logs")
    common: dict[str, Any] = {"skip_completed": False}  # see the module's docstring
    if config.executor == "slurm":
        kind = SlurmPipelineExecutor
        common |= {"time": config.time, "partition": config.partition, "mem_per_cpu_gb": _MEMORY_GB}
        cores = {"cpus_per_task": config.processes, "job_name": "stereovla-build"}
    elif config.executor == "ray":
        kind = RayPipelineExecutor
        common |= {"mem_per_cpu_gb": _MEMORY_GB}
        cores = {"cpus_per_task": config.processes}
    else:
        kind, cores = LocalPipelineExecutor, {}
    record = kind(
        pipeline=[RecordPart(config.build_config())],
        tasks=config.num_shards,
        workers=config.workers,
        logging_dir=str(logs / "record"),
        **common,
        **cores,
    )
    return kind(pipeline=[JoinParts(folder)], tasks=1, logging_dir=str(logs / "join"), depends=record, **common)


def run_pipeline(config: PipelineConfig) -> Path:
    """Run the pipeline (Slurm: submit it); returns the dataset's folder."""
    make_executor(config).run()
    return Path(config.out)
