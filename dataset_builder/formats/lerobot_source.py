"""Reads LeRobot datasets of the format v3.0 (parquet and mp4), without lerobot.

Facts of the format, from lerobot's own dataset code (https://github.com/huggingface/lerobot): meta/info.json names
`fps`, `features`, `splits` ("train": "0:50" are episodes) and the templates `data_path` and `video_path`;
meta/tasks.parquet maps sentences (its index) to `task_index`; meta/episodes/*/*.parquet says per episode its `length`,
in which data file it is, and per video the file and `from_timestamp`, `to_timestamp` (s) in it. A frame's picture is
the one at from_timestamp + timestamp.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.schema import CALIBRATION_KEYS
from stereovla.dataset_builder.formats.importing import EpisodeError, ImportConfig, SourceEpisode
from stereovla.dataset_builder.formats.rig import Rig
from stereovla.dataset_builder.formats.video import VideoError, read_frames
from stereovla.untrusted import fill_template, inside, open_image, split_name


@dataclass
class LeRobotImportConfig(ImportConfig):
    """Imports a LeRobot dataset v3.0; every problem of its episodes is named, exit status 1 if there is any."""

    revision: str | None = option(None, "Of a dataset on the Hub.")


def open_lerobot(config: LeRobotImportConfig, rig: Rig) -> "LeRobotSource":
    """The dataset in the folder `config.source`, or that of this id on the Hub, whose files are downloaded."""
    folder = Path(config.source)
    if not folder.is_dir():
        patterns = ["meta/*", "data/*", *(f"videos/{key}/*" for key in dict.fromkeys(rig.cameras.values()))]
        folder = Path(
            snapshot_download(config.source, repo_type="dataset", revision=config.revision, allow_patterns=patterns)
        )
    return LeRobotSource(folder, rig)


class LeRobotSource:
    """See `importing.Source`; episodes are named "episode 7"."""

    def __init__(self, folder: Path, rig: Rig):
        self.folder, self.rig = folder, rig
        self.info = shards.read_json(folder / "meta/info.json")
        version = str(self.info.get("codebase_version"))
        if not version.startswith("v3."):
            raise ValueError(
                f"{folder} is a LeRobot dataset of version {version}; v3.0 is needed (lerobot converts older ones)"
            )
        self.fps = float(self.info["fps"])
        if set(rig.cameras) != {"left", "right"}:
            raise ValueError(f"cameras is {dict(rig.cameras)}; name the views left and right")
        features = self.info["features"]
        images = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
        for side, key in rig.cameras.items():
            if key not in images:
                raise ValueError(f"{folder} has no camera {key!r} for the {side} view; it has: {', '.join(images)}")
        if rig.cameras["left"] == rig.cameras["right"] and not rig.parts_px:
            raise ValueError(f"both views come from {rig.cameras['left']!r}: parts_px must say where each is in it")
        if rig.state is None or rig.action is None:
            raise ValueError("the rig lacks state or action: say where they are in the source")
        self._videos = [key for key in dict.fromkeys(rig.cameras.values()) if features[key]["dtype"] == "video"]
        self._images = [key for key in dict.fromkeys(rig.cameras.values()) if features[key]["dtype"] == "image"]
        wanted = [rig.state.column, rig.action.column, *rig.calibration_columns().values()]
        self._columns = [key for key in dict.fromkeys(wanted) if key is not None]
        for key in self._columns:
            if key not in features:
                raise ValueError(f"{folder} has no column {key!r}; it has: {', '.join(features)}")
        tasks = pd.read_parquet(folder / "meta/tasks.parquet")
        self._tasks = dict(zip(tasks["task_index"].tolist(), tasks.index.tolist(), strict=True))
        self._episodes = self._read_episodes()

    def _read_episodes(self) -> dict[str, dict[str, Any]]:
        files = sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
        if not files:
            raise ValueError(f"{self.folder} has no meta/episodes/*/*.parquet")
        columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        places = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
        columns += [f"videos/{key}/{place}" for key in self._videos for place in places]
        rows = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
        return {f"episode {row['episode_index']}": row for row in sorted(rows, key=lambda row: row["episode_index"])}

    def content(self) -> dict[str, Any]:
        """See `importing.Source`."""
        names = ["info.json", "tasks.parquet"]
        hashes = {name: shards.sha256(self.folder / "meta" / name) for name in names}
        hashes |= {
            path.relative_to(self.folder / "meta").as_posix(): shards.sha256(path)
            for path in sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
        }
        folders = ["data", *(f"videos/{key}" for key in self._videos)]
        files = sorted(path for name in folders for path in (self.folder / name).rglob("*") if path.is_file())
        listing = [[path.relative_to(self.folder).as_posix(), path.stat().st_size] for path in files]
        hashes["files"] = hashlib.sha256(json.dumps(listing).encode()).hexdigest()  # of their names and sizes
        return {"format": f"LeRobot {self.info['codebase_version']}", "sha256": hashes}

    def splits(self) -> dict[str, list[str]]:
        """See `importing.Source`."""
        names = list(self._episodes)
        splits, placed = {}, 0
        for split, text in self.info["splits"].items():
            split_name(split)
            start, stop = (int(number) for number in text.split(":"))
            splits[split] = [name for name in names if start <= self._episodes[name]["episode_index"] < stop]
            placed += len(splits[split])
        total = self.info["total_episodes"]
        if not placed == len(names) == total:
            raise ValueError(
                f"{self.folder}: info.json counts {total} episodes, meta/episodes holds {len(names)}, "
                f"the splits {self.info['splits']} {placed}"
            )
        return splits

    def read(self, name: str) -> SourceEpisode:
        """See `importing.Source`."""
        entry = self._episodes[name]
        table = self._table(entry, [*self._columns, "timestamp", "frame_index", "task_index"])
        length = table.num_rows
        problems = []
        if length != entry["length"]:
            problems.append(f"the data has {length} frames, meta/episodes says {entry['length']}")
        if not length:
            raise EpisodeError("; ".join(problems) or "no frames")
        frames = table.column("frame_index").to_numpy()
        problems += [f"frame {i}: its frame_index is {frames[i]}" for i in np.flatnonzero(frames != np.arange(length))]
        for key in self._videos:
            seconds = entry[f"videos/{key}/to_timestamp"] - entry[f"videos/{key}/from_timestamp"]
            count = seconds * self.fps
            if abs(count - length) > 0.5:
                problems.append(f"the video {key} spans {count:.1f} frames, the data {length}")
        indices = table.column("task_index").to_pylist()
        problems += [
            f"frame {i}: task_index {index} is not in meta/tasks.parquet"
            for i, index in enumerate(indices)
            if index not in self._tasks
        ]
        values = {key: _array(table, key) for key in self._columns}
        calibration = self.rig.calibration
        return SourceEpisode(
            timestamps_s=table.column("timestamp").to_numpy(),
            states=values[self.rig.state.column],
            actions=None if self.rig.action.column is None else values[self.rig.action.column],
            tasks=[self._tasks.get(index, "unknown") for index in indices],
            calibration={
                key: values[calibration[key]]
                if isinstance(calibration[key], str)
                else np.broadcast_to(calibration[key], (length, *np.shape(calibration[key])))
                for key in CALIBRATION_KEYS
            },
            problems=problems,
        )

    def pairs(self, name: str, episode: SourceEpisode) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """See `importing.Source`."""
        entry = self._episodes[name]
        streams = {key: self._video(entry, key, episode.timestamps_s) for key in self._videos}
        if self._images:
            table = self._table(entry, self._images)
            streams |= {key: self._stored(table, key) for key in self._images}
        for _ in range(len(episode.timestamps_s)):
            images = {key: next(stream) for key, stream in streams.items()}
            yield images[self.rig.cameras["left"]], images[self.rig.cameras["right"]]

    def _video(self, entry: dict[str, Any], key: str, timestamps_s: np.ndarray) -> Iterator[np.ndarray]:
        name = fill_template(
            self.info["video_path"],
            video_key=key,
            chunk_index=entry[f"videos/{key}/chunk_index"],
            file_index=entry[f"videos/{key}/file_index"],
        )
        path = inside(self.folder, name)
        times = entry[f"videos/{key}/from_timestamp"] + np.asarray(timestamps_s, dtype=np.float64)
        return read_frames(path, times, self.fps)

    def _stored(self, table: pa.Table, key: str) -> Iterator[np.ndarray]:
        for frame, value in enumerate(table.column(key).to_pylist()):
            try:
                with open_image(value["bytes"]) as image:
                    yield np.array(image.convert("RGB"))
            except (OSError, TypeError, ValueError) as error:
                raise VideoError(f"frame {frame}: {key} cannot be read: {error}") from error

    def _table(self, entry: dict[str, Any], columns: list[str]) -> pa.Table:
        path = inside(
            self.folder,
            fill_template(
                self.info["data_path"], chunk_index=entry["data/chunk_index"], file_index=entry["data/file_index"]
            ),
        )
        try:
            return pq.read_table(
                path, columns=columns, filters=[("episode_index", "=", entry["episode_index"])], partitioning=None
            )
        except (pa.ArrowException, OSError) as error:
            raise EpisodeError(f"{path.relative_to(self.folder)} cannot be read: {error}") from error


def _array(table: pa.Table, key: str) -> np.ndarray:
    """Column of numbers or equally long (nested) lists -> float64 (rows, size)."""
    try:
        values = np.array(table.column(key).to_pylist(), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EpisodeError(f"{key} holds other things than numbers, or rows of different lengths: {error}") from error
    return values.reshape(len(values), -1)
