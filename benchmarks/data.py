"""Speed of recording and of streaming, with what others would use beside ours in the same run, and a plan from it.

    python -m benchmarks.data
    python -m benchmarks.data --image_size 224 --rounds 3

Ways are measured in turn, round after round, and a ratio is the median of its rounds' ratios: only ratios within one
run mean something. Recording counts seconds of one core (CPU time), reading counts seconds on the clock, after the
workers have started. What is read are windows of both views, states and actions, in batches, from one recorded dataset:

- ours: `WindowStream`, shuffled
- datasets: its rows through `datasets` with torch formatting, the columns that ours reads
- mp4: the views as LeRobot keeps them, one video per camera for many episodes, a key frame every 2 frames; random
  frames are sought and decoded with PyAV
"""

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.checking import find_problems
from stereovla.dataset_builder.dataset.folders import INFO, PLAN, work_folder
from stereovla.dataset_builder.dataset.schema import CALIBRATION, PAIR
from stereovla.dataset_builder.recording.build import BuildConfig, build
from stereovla.dataset_builder.recording.parts import finish
from stereovla.dataset_builder.recording.recorder import FPS, Recorder
from stereovla.dataset_builder.streaming.window_stream import WindowStream

NUMBERS = ("observation.state", "action_plan", "action_plan_length", "keyframe_pose")
CODECS = {  # PyAV encoder and its options; both as LeRobot writes: 4:2:0, a key frame every 2 frames, quality 30
    "mp4, AV1": ("libsvtav1", {"crf": "30", "g": "2", "preset": "8", "svtav1-params": "lp=1"}),
    "mp4, H.264": ("libx264", {"crf": "30", "g": "2"}),
}
SHARD_BYTES = 500e6  # size of a shard in the plan


@dataclass
class DataOptions:
    """What `python -m benchmarks.data` can be told."""

    image_size: int = field(default=128, metadata={"help": "Side of the square views, px."})
    episodes: int = field(default=64, metadata={"help": "Episodes of the dataset that is read."})
    record_episodes: int = field(default=4, metadata={"help": "Episodes recorded per way and round."})
    windows: int = field(default=512, metadata={"help": "Windows read per way and round."})
    batch_size: int = field(default=32, metadata={"help": "Windows per batch."})
    workers: str = field(default="0,1,2", metadata={"help": "Numbers of DataLoader workers."})
    rounds: int = field(default=5, metadata={"help": "Measurements of each way, in turn."})
    trajectories: int = field(default=5_000_000, metadata={"help": "What the plan is made for."})


# ----------------------------------------------------------------------------------------------------------------------
# Recording
# ----------------------------------------------------------------------------------------------------------------------


def measure_recording(options: DataOptions) -> dict[str, list[float]]:
    """{way: frames kept per core second, one per round}; failed attempts cost time and keep nothing."""
    config = BuildConfig(image_size=options.image_size)
    recorders = {
        "depth, masks, boxes": Recorder(config.world_config(), config),
        "views alone": Recorder(config.world_config(), BuildConfig(image_size=options.image_size, labels=False)),
    }
    speeds: dict[str, list[float]] = {way: [] for way in recorders}
    for recorder in recorders.values():
        recorder.episode(1, "train", 0)  # compiles and opens what the first call opens
    for turn in tqdm(range(options.rounds), desc="recording", unit="round"):
        for way, recorder in recorders.items():
            begin = time.process_time()
            numbers = range(turn * options.record_episodes, (turn + 1) * options.record_episodes)
            frames = sum(len(recorder.episode(1, "train", number)[0]) for number in numbers)
            speeds[way].append(frames / (time.process_time() - begin))
    for recorder in recorders.values():
        recorder.close()
    return speeds


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def collate_windows(windows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    keys = ("left", "right", "state_history", "actions", "action_mask")
    # torch's own: in a worker it stacks in shared memory, which saves a copy
    return default_collate([{key: window[key] for key in keys} for window in windows])


def ours(folder: Path, workers: int, options: DataOptions, depth: bool = False) -> Iterator[Any]:
    stream = WindowStream(folder, mixture={"action": 1.0}, depth_map_share=float(depth), pool_episodes=4)
    return iter(DataLoader(stream, options.batch_size, num_workers=workers, collate_fn=collate_windows))


def plain(folder: Path, workers: int, options: DataOptions) -> Iterator[Any]:
    columns = [*PAIR, *NUMBERS, *CALIBRATION]
    rows = load_dataset(str(folder), split="train", streaming=True).select_columns(columns)
    # one pass, not repeated: `datasets` sleeps for seconds at the end of each
    rows = rows.shuffle(seed=0, buffer_size=64).with_format("torch")
    return iter(DataLoader(rows, options.batch_size, num_workers=workers))


class VideoFrames(Dataset):
    """Random frames of videos, with the numbers that belong to them in memory."""

    def __init__(self, paths: list[Path], table: Any, count: int):
        self.paths, self.count = paths, count
        self.states, self.plans = shards.numbers(table, NUMBERS[0]), shards.numbers(table, NUMBERS[1])
        self.containers: list[Any] = []
        self.process = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        frame = int(np.random.default_rng(index).integers(len(self.states)))
        if self.process != os.getpid():  # a forked worker must not seek in its parent's files
            self.process, self.containers = os.getpid(), [av.open(str(path)) for path in self.paths]
            for container in self.containers:
                container.streams.video[0].thread_type = "NONE"  # one core, as the others
        views = [decode_frame(container, frame) for container in self.containers]
        return {"left": views[0], "right": views[1], "state": self.states[frame], "actions": self.plans[frame]}


def decode_frame(container: Any, number: int) -> np.ndarray:
    """Frame `number` of a video: the key frame before it is sought, then decoded up to it."""
    (stream,) = container.streams.video
    wanted = round(number / (FPS * stream.time_base))
    container.seek(wanted, stream=stream)
    for frame in container.decode(stream):
        if frame.pts >= wanted:
            return frame.to_ndarray(format="rgb24")
    raise ValueError(f"frame {number} is beyond the end of {container.name}")


def write_videos(folder: Path, target: Path) -> dict[str, list[Path]]:
    """{codec: [left, right]} of all frames of the dataset."""
    target.mkdir()
    found: dict[str, list[Path]] = {}
    for number, (name, (encoder, choices)) in enumerate(CODECS.items()):
        for view in PAIR:
            path = target / f"{number}-{view}.mp4"
            with av.open(str(path), "w") as container:
                stream = None
                for shard in sorted((folder / "data").glob("train-*")):
                    for data in shards.read_table(shard, [view]).column(view).to_pylist():
                        image = shards.decode_image(view, data["bytes"])
                        if stream is None:
                            stream = container.add_stream(encoder, rate=FPS, options=choices)
                            stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
                        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
                container.mux(stream.encode())
            found.setdefault(name, []).append(path)
    return found


def speed(batches: Iterator[Any], options: DataOptions) -> float:
    """Windows per second on the clock, from the first batch on; the dataset must have more windows than are counted."""
    next(batches)
    begin, count = time.perf_counter(), 0
    while count < options.windows:
        next(batches)
        count += options.batch_size
    return count / (time.perf_counter() - begin)


def measure_reading(folder: Path, videos: dict[str, list[Path]], options: DataOptions) -> dict[str, dict[int, list]]:
    """{way: {workers: windows per second, one per round}}."""
    import pyarrow as pa

    table = pa.concat_tables([shards.read_table(p, list(NUMBERS)) for p in sorted((folder / "data").glob("train-*"))])
    ways: dict[str, Callable[[int], Iterator[Any]]] = {
        "ours": lambda workers: ours(folder, workers, options),
        "ours, with depth maps": lambda workers: ours(folder, workers, options, depth=True),
        "datasets, torch format": lambda workers: plain(folder, workers, options),
    }
    for name, paths in videos.items():
        # as many as the workers can have begun when the last one is counted
        frames = VideoFrames(paths, table, options.windows + 16 * options.batch_size)
        ways[name] = lambda workers, frames=frames: iter(DataLoader(frames, options.batch_size, num_workers=workers))
    numbers = [int(number) for number in options.workers.split(",")]
    found: dict[str, dict[int, list[float]]] = {way: {number: [] for number in numbers} for way in ways}
    for _ in tqdm(range(options.rounds), desc="reading", unit="round"):
        for number in numbers:
            for way, start in ways.items():
                found[way][number].append(speed(start(number), options))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Report
# ----------------------------------------------------------------------------------------------------------------------


def table(head: list[str], lines: list[list[Any]]) -> str:
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def core_seconds(function: Callable[[], Any]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def plan(folder: Path, frames_per_second: float, options: DataOptions) -> str:
    """Cost of many trajectories from what this run measured: recording, finishing, checking, storage."""
    info = shards.read_json(folder / INFO)
    frames = sum(split["frames"] for split in info["splits"].values())
    episodes = sum(split["episodes"] for split in info["splits"].values())
    size = sum(path.stat().st_size for path in (folder / "data").iterdir())

    def sum_up() -> None:
        with work_folder(folder, "finish"):
            finish(folder, shards.read_json(folder / PLAN))

    factor = options.trajectories / episodes
    hours = {
        "recording": options.trajectories * frames / episodes / frames_per_second / 3600,
        "finishing (statistics, hashes)": core_seconds(sum_up) * factor / 3600,
        "check --quick (hashes)": core_seconds(lambda: find_problems(folder, quick=True)) * factor / 3600,
        "check (every image decoded)": core_seconds(lambda: find_problems(folder)) * factor / 3600,
    }
    per_shard = max(1, round(SHARD_BYTES / (size / episodes)))
    lines = [[name, f"{value:,.0f} core hours"] for name, value in hours.items()]
    lines += [
        ["frames", f"{frames / episodes:.1f} per trajectory, {frames * factor:,.0f} in all"],
        ["storage", f"{size / frames / 1e3:.1f} kB per frame, {size * factor / 1e12:.2f} TB in all"],
        ["shards", f"{options.trajectories / per_shard:,.0f} of {per_shard} episodes ({SHARD_BYTES / 1e6:.0f} MB)"],
        ["memory", f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.1f} GiB per recording process"],
    ]
    return table([f"{options.trajectories:,} trajectories", "cost"], lines)


def main() -> None:
    (options,) = HfArgumentParser(DataOptions, description=__doc__).parse_args_into_dataclasses()
    os.environ.setdefault("LP_NUM_THREADS", "0")  # Mesa's software renderer: no threads of its own
    torch.set_num_threads(1)
    # in a process of its own: a renderer must not be forked into DataLoader workers
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        recording = executor.submit(measure_recording, options).result()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dataset"
        sizes = {"train_episodes": options.episodes, "validation_episodes": 0, "episodes_per_shard": 4}
        build(BuildConfig(out=str(folder), image_size=options.image_size, processes=1, **sizes))
        videos = write_videos(folder, Path(temporary) / "videos")
        reading = measure_reading(folder, videos, options)
        labelled = statistics.median(recording["depth, masks, boxes"])
        costs = plan(folder, labelled, options)
        frames = shards.read_json(folder / INFO)["splits"]["train"]["frames"]
        views = sum(
            len(data["bytes"])
            for path in (folder / "data").iterdir()
            for view in PAIR
            for data in shards.read_table(path, [view]).column(view).to_pylist()
        )
        kilobytes = {"ours": views / frames / 1e3} | {
            name: sum(path.stat().st_size for path in paths) / frames / 1e3 for name, paths in videos.items()
        }
    print(f"\noptions: {json.dumps(vars(options))}; {os.cpu_count()} cores\n")
    lines = [[way, f"{statistics.median(speeds):.1f}"] for way, speeds in recording.items()]
    print(table(["recorded", "stereo frames per core second"], lines), "\n")
    numbers = list(reading["ours"])
    lines = []
    for way, speeds in reading.items():
        cells = [f"{statistics.median(speeds[number]):,.0f}" for number in numbers]
        ratios = [
            statistics.median(a / b for a, b in zip(reading["ours"][number], speeds[number], strict=True))
            for number in numbers
        ]
        lines.append([way, *cells, *(f"{ratio:.1f}x" for ratio in ratios)])
    head = ["read", *(f"windows/s, {number} workers" for number in numbers)]
    print(table([*head, *(f"ours is, {number} workers" for number in numbers)], lines), "\n")
    print(table(["a pair of views", "kB"], [[way, f"{value:.1f}"] for way, value in kilobytes.items()]), "\n")
    print(costs)


if __name__ == "__main__":
    main()
