"""Builds a dataset folder: episodes recorded by several processes into shards, then statistics, card and manifest.

One shard is a fixed range of episodes, written under a temporary name and renamed. So whatever is interrupted, and
however often, the folder holds whole shards only; the same command records the missing ones, and the finished bytes are
those of an undisturbed build.
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm.auto import tqdm

from dataset_builder import shards
from dataset_builder.card import write_card
from dataset_builder.recording import EMBODIMENT, FPS, Recorder, RecordingConfig, option
from dataset_builder.statistics import compute_statistics
from simulation import WorldConfig

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"train_episodes": 4, "validation_episodes": 2, "episodes_per_shard": 2, "image_size": 64, "processes": 1},
    "demo": {"train_episodes": 480, "validation_episodes": 48, "episodes_per_shard": 16},
}
INFO = Path("meta/info.json")
PLAN = Path("meta/build.json")  # the options that decide the bytes, written first
STATS = Path("meta/stats.json")
PARTIAL = ".partial"
# how a build runs and where to; all other options decide what it makes
_NOT_CONTENT = ("out", "preset", "processes")


@dataclass
class BuildConfig(RecordingConfig):
    """What `python -m dataset_builder build` can be told."""

    out: str = option("", "Folder of the dataset; one with an unfinished build of the same options is gone on with.")
    preset: str = option("demo", f"Values of the other options, which may still be given: {', '.join(PRESETS)}.")
    train_episodes: int = option(480, "Successful episodes of the split train.")
    validation_episodes: int = option(48, "Successful episodes of the split validation.")
    seed: int = option(0, "Everything follows from it.")
    processes: int = option(2, "Recording processes; each uses one core.")
    episodes_per_shard: int = option(16, "Episodes per parquet file: what an interruption can cost each process.")
    camera_range: str = option("small", "How far the camera pose varies: small, medium or large.")
    image_size: int = option(128, "Side of the square views, px.")
    num_objects: int = option(3, "Objects on the table, the target included.")
    world: str = option("{}", 'More options of simulation.WorldConfig as JSON, such as \'{"preset": "geometry"}\'.')

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_episodes", "processes", "episodes_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.validation_episodes < 0 or self.seed < 0:
            raise ValueError(
                f"validation_episodes={self.validation_episodes} and seed={self.seed} must not be negative"
            )
        self.world_config()

    def world_config(self) -> WorldConfig:
        """The world's config: this one's options, then those of `world`; ValueError for unknown or wrong ones."""
        try:
            extra = json.loads(self.world)
        except json.JSONDecodeError as error:
            raise ValueError(f"world={self.world!r} is no JSON: {error}") from error
        own = {"camera_range": self.camera_range, "image_size": self.image_size, "num_objects": self.num_objects}
        for key in extra:
            if key in own:
                raise ValueError(f"give {key} as an option of its own, not in world={self.world!r}")
        return WorldConfig.from_preset(**own, **extra)

    def content(self) -> dict[str, Any]:
        """The options that decide the bytes, the world's spelled out, and versions of what draws and encodes."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_CONTENT}
        versions = {
            name: importlib.metadata.version(name) for name in ("mujoco", "numpy", "pillow", "pyarrow", "datasets")
        }
        values |= {"world": dataclasses.asdict(self.world_config()), "versions": versions}
        return json.loads(json.dumps(values))  # tuples become lists, as in the file that this is compared with


@dataclass(frozen=True)
class Task:
    """One shard to record."""

    split: str
    path: Path  # inside the folder
    episodes: range


def plan_shards(config: BuildConfig) -> list[Task]:
    """All shards of the dataset with their episodes."""
    tasks = []
    for split, total in (("train", config.train_episodes), ("validation", config.validation_episodes)):
        starts = range(0, total, config.episodes_per_shard)
        tasks += [
            Task(
                split,
                shards.shard_path(split, number, len(starts)),
                range(start, min(total, start + config.episodes_per_shard)),
            )
            for number, start in enumerate(starts)
        ]
    return tasks


def build(config: BuildConfig) -> Path:
    """Build, or go on building, the dataset in `config.out`; returns the folder. A finished one is left as it is."""
    if not config.out:
        raise ValueError("--out is empty: where shall the dataset go?")
    folder = Path(config.out)
    content = config.content()
    _check_folder(folder, content)
    with _lock(folder):
        shards.write_json(folder / PLAN, content)
        tasks = plan_shards(config)
        missing = [task for task in tasks if not (folder / task.path).exists()]
        if missing or not (folder / shards.MANIFEST).exists():
            (folder / shards.MANIFEST).unlink(missing_ok=True)
            _record(config, folder, tasks, missing)
            _finish(config, folder, tasks)
    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
    return folder


def _check_folder(folder: Path, content: dict[str, Any]) -> None:
    """ValueError when `folder` holds something else than this build."""
    if not (folder / PLAN).exists():
        inside = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
        if all(PARTIAL in path.parts or path.suffix == ".tmp" for path in inside):  # killed before it wrote the plan
            return
        raise ValueError(f"{folder} is not empty and holds no dataset of ours; choose another --out")
    before = shards.read_json(folder / PLAN)
    changed = [
        f"{key} was {before.get(key)}, now {content.get(key)}"
        for key in sorted({*before, *content})
        if before.get(key) != content.get(key)
    ]
    if changed:
        raise ValueError(f"{folder} was begun with other options: {'; '.join(changed)}. Use them, or another --out")


@contextmanager
def _lock(folder: Path):
    """Keep two builds of one folder apart; the operating system frees the lock however the process ends."""
    (folder / PARTIAL).mkdir(parents=True, exist_ok=True)
    with open(folder / PARTIAL / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is building {folder}; wait for it or choose another --out") from error
        for left in (folder / PARTIAL).glob("*.parquet.*"):  # halves of a build that was killed
            left.unlink()
        yield


def _record(config: BuildConfig, folder: Path, tasks: list[Task], missing: list[Task]) -> None:
    """Record the missing shards with a progress bar over episodes."""
    total, waiting = (sum(len(task.episodes) for task in group) for group in (tasks, missing))
    if not missing:
        return
    # inherited by the workers: one core each; Mesa's own threads and OpenMP's would fight over the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("LP_NUM_THREADS", "0")
    context = multiprocessing.get_context("spawn")
    finished, stop = context.SimpleQueue(), context.Event()
    executor = ProcessPoolExecutor(
        min(config.processes, len(missing)),
        mp_context=context,
        initializer=_start,
        initargs=(config, folder, finished, stop),
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


def _start(config: BuildConfig, folder: Path, finished: Any, stop: Any) -> None:
    """First call in each recording process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes of a terminal: end without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(config=config, folder=folder, finished=finished, stop=stop)
    _worker.update(recorder=Recorder(config.world_config(), config))


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
        temporary=folder / PARTIAL / f"{task.path.name}.{os.getpid()}",
        info={"failures": dict(sorted(failures.items())), "episodes": len(task.episodes)},
        plan_length=config.plan_length,
    )


def _finish(config: BuildConfig, folder: Path, tasks: list[Task]) -> None:
    """Statistics, info, card, and at last the manifest, which says that the dataset is whole."""
    failures: Counter[str] = Counter()
    splits: dict[str, dict[str, int]] = {}
    names: set[tuple[str, str]] = set()
    for task in tqdm(tasks, desc="summing up", unit="shard"):
        failures.update(shards.shard_info(folder / task.path)["failures"])
        table = shards.read_table(folder / task.path, ["task", "target.name"])
        names |= set(zip(*(table.column(key).to_pylist() for key in ("task", "target.name")), strict=True))
        entry = splits.setdefault(task.split, {"episodes": 0, "frames": 0, "shards": 0})
        entry["episodes"] += len(task.episodes)
        entry["frames"] += table.num_rows
        entry["shards"] += 1
    train = [folder / task.path for task in tasks if task.split == "train"]
    shards.write_json(folder / STATS, compute_statistics(train))
    info = {
        "fps": FPS,
        "embodiments": [EMBODIMENT],
        "tasks": sorted({task for task, _ in names}),
        "objects": sorted({name for _, name in names}),
        "splits": splits,
        "failed_attempts": dict(sorted(failures.items())),
        "columns": pq.read_schema(train[0]).names,
        "build": config.content(),
    }
    shards.write_json(folder / INFO, info)
    write_card(folder)
    by_split = {split: [task.path for task in tasks if task.split == split] for split in splits}
    shards.write_manifest(folder, by_split)
