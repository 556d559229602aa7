"""Builds a dataset folder: episodes recorded by several processes into shards, then statistics, card and manifest.

One shard is a fixed range of episodes, written under a temporary name and renamed. So whatever is interrupted, and
however often, the folder holds whole shards only; the same command records the missing ones, and the finished bytes are
those of an undisturbed build.

Many machines: machine I of N records every N-th shard (`shard_index`, `num_shards`), into a folder that all share or
into one of its own; `merge` joins the parts and finishes the dataset, with the bytes that one machine would have
written.
"""

import dataclasses
import importlib.metadata
import json
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Features
from tqdm.auto import tqdm

from stereovla.command_line import json_object, option
from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.folders import PLAN, check_folder, work_folder
from stereovla.dataset_builder.recording.parts import Task, finish, plan_shards
from stereovla.dataset_builder.recording.recorder import FPS, Recorder, RecordingConfig
from stereovla.simulation import WorldConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"train_episodes": 4, "validation_episodes": 2, "episodes_per_shard": 2, "image_size": 64, "processes": 1},
    "demo": {"train_episodes": 480, "validation_episodes": 48, "episodes_per_shard": 16},
    "lab": {"train_episodes": 1920, "validation_episodes": 96, "episodes_per_shard": 32, "image_size": 192},
}
# how a build runs and where to; all other options decide what it makes
_NOT_CONTENT = ("out", "preset", "processes", "shard_index", "num_shards")


@dataclass
class BuildOptions(RecordingConfig, ABC):
    """What every build can be told: where to, how much, and by how many processes and machines."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    packages: ClassVar[tuple[str, ...]] = ("mujoco", "numpy", "pillow", "pyarrow", "datasets")

    out: str = option("", "Folder of the dataset; one with an unfinished build of the same options is gone on with.")
    preset: str = option("demo", f"Values of the other options, which may still be given: {', '.join(PRESETS)}.")
    train_episodes: int = option(480, "Successful episodes of the split train.")
    validation_episodes: int = option(48, "Successful episodes of the split validation.")
    seed: int = option(0, "Everything follows from it.")
    processes: int = option(2, "Recording processes; each uses one core.")
    episodes_per_shard: int = option(16, "Episodes per parquet file: what an interruption can cost each process.")
    shard_index: int = option(0, "Which of num_shards machines this is, counted from 0; it records every N-th shard.")
    num_shards: int = option(1, "Machines that record parts of one dataset; when all are done, `merge` finishes it.")
    camera_range: str = option("small", "How far the camera pose varies: small, medium or large.")
    image_size: int = option(128, "Side of the square views, px (preset).")

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_episodes", "processes", "episodes_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.validation_episodes < 0 or self.seed < 0:
            raise ValueError(
                f"validation_episodes={self.validation_episodes} and seed={self.seed} must not be negative"
            )
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(f"shard_index={self.shard_index} must be in [0, num_shards={self.num_shards})")
        self.world_config()

    @abstractmethod
    def world_config(self) -> Any:
        """The world's config; ValueError for unknown or wrong options."""

    @abstractmethod
    def recorder(self) -> Recorder:
        """What records the episodes in each process."""

    def content(self) -> dict[str, Any]:
        """The options that decide the bytes, the world's spelled out, and versions of what draws and encodes."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_CONTENT}
        versions = {name: importlib.metadata.version(name) for name in self.packages}
        values |= {"fps": FPS, "world": dataclasses.asdict(self.world_config()), "versions": versions}
        return json.loads(json.dumps(values))  # tuples become lists, as in the file that this is compared with


@dataclass
class BuildConfig(BuildOptions):
    """Records stereo demonstrations into a dataset folder; the same command goes on after interruptions."""

    num_objects: int = option(3, "Objects on the table, the target included.")
    world: str = option("{}", 'More options of simulation.WorldConfig as JSON, such as \'{"preset": "geometry"}\'.')

    def world_config(self) -> WorldConfig:
        """The world's config: this one's options, then those of `world`; ValueError for unknown or wrong ones."""
        extra = json_object("world", self.world, '{"preset": "geometry"}')
        own = {"camera_range": self.camera_range, "image_size": self.image_size, "num_objects": self.num_objects}
        for key in extra:
            if key in own:
                raise ValueError(f"give {key} as an option of its own, not in world={self.world!r}")
        return WorldConfig.from_preset(**own, **extra)

    def recorder(self) -> Recorder:
        return Recorder(self.world_config(), self)


def build(config: BuildOptions) -> Path:
    """Build, or go on building, the dataset in `config.out`; returns the folder. A finished one is left as it is.

    With `num_shards` above 1 it records its part only, and leaves finishing to `merge`.
    """
    if not config.out:
        raise ValueError("--out is empty: where shall the dataset go?")
    folder = Path(config.out)
    content = config.content()
    check_folder(folder, content)
    with work_folder(folder, f"{config.shard_index}-of-{config.num_shards}") as partial:
        shards.write_json(folder / PLAN, content, temporary=partial / PLAN.name)
        mine = plan_shards(content)[config.shard_index :: config.num_shards]
        missing = [task for task in mine if not (folder / task.path).exists()]
        if missing:
            (folder / shards.MANIFEST).unlink(missing_ok=True)
            _record(config, folder, partial, mine, missing)
        if config.num_shards == 1 and not (folder / shards.MANIFEST).exists():
            with work_folder(folder, "finish"):
                finish(folder, content)
    return folder


def _record(config: BuildOptions, folder: Path, partial: Path, tasks: list[Task], missing: list[Task]) -> None:
    """Record the missing shards with a progress bar over episodes."""
    total, waiting = (sum(len(task.episodes) for task in group) for group in (tasks, missing))
    # inherited by the workers: one core each; Mesa's own threads and OpenMP's would fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LP_NUM_THREADS", "0")
    context = multiprocessing.get_context("spawn")
    finished, stop = context.SimpleQueue(), context.Event()
    executor = ProcessPoolExecutor(
        min(config.processes, len(missing)),
        mp_context=context,
        initializer=_start,
        initargs=(config, folder, partial, finished, stop),
    )
    with executor, tqdm(total=total, initial=total - waiting, desc="recording", unit="episode", smoothing=0.05) as bar:
        pending: set[Future] = {executor.submit(_record_shard, task) for task in missing}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
                while not finished.empty():
                    finished.get()
                    bar.update()
                for future in done:
                    future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a recording process was killed from outside or could not start (memory? graphics libraries?); "
                "the same command goes on with the shards that are missing"
            ) from error
        finally:
            stop.set()  # where one shard failed, the others need not be finished first
            executor.shutdown(wait=False, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start(config: BuildOptions, folder: Path, partial: Path, finished: Any, stop: Any) -> None:
    """First call in each recording process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes of a terminal: end without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(config=config, folder=folder, partial=partial, finished=finished, stop=stop)
    _worker.update(recorder=config.recorder())
    # before the interpreter's own end, which may close the display first, depending on what was imported when
    multiprocessing.util.Finalize(None, _worker["recorder"].close, exitpriority=1)


def _end_with_parent() -> None:
    """When the building process was killed, its workers would go on, or wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _record_shard(task: Task) -> None:
    config, folder = _worker["config"], _worker["folder"]
    rows: list[dict[str, Any]] = []
    failures: Counter[str] = Counter()
    for index in task.episodes:
        if _worker["stop"].is_set():
            return
        episode, failed = _worker["recorder"].episode(config.seed, task.split, index)
        rows += episode
        failures.update(failed)
        _worker["finished"].put(index)
    shards.write_shard(
        folder / task.path,
        rows,
        temporary=_worker["partial"] / f"{task.path.name}.{os.getpid()}",
        info={"failures": dict(sorted(failures.items())), "episodes": len(task.episodes)},
        layout=layout_of(rows[0], config.plan_length),
    )


def layout_of(row: dict[str, Any], plan_length: int) -> Features:
    """Of the rows that are like `row`, whose columns it has: demonstrations have neither plans nor keyframes."""
    state, action = len(row["observation.state"]), len(row["action"])
    columns = [column.key for column in schema.columns_of(row) if column.key in row]
    return schema.features(plan_length, state, action, columns)
