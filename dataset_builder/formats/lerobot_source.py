"""Reads LeRobot datasets of the format v3.0 (parquet and mp4), without lerobot.

A frame's picture is the one at from_timestamp + timestamp of its episode, see `lerobot_metadata`. The episodes of a
video follow one another in it without gaps, so its number follows from the lengths too; both must name the same one.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import snapshot_download

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.formats.importing import ImportConfig
from stereovla.dataset_builder.formats.lerobot_metadata import INFO, read_episodes, read_info, read_tasks
from stereovla.dataset_builder.formats.rig import STEREO, Rig
from stereovla.dataset_builder.formats.source import EpisodeError, SourceEpisode
from stereovla.dataset_builder.formats.video import VideoError, first_beside, frame_times, read_frames
from stereovla.sources import source_of
from stereovla.untrusted import fill_template, inside, open_image, open_parquet

_RATE = 0.01  # timestamps are frame_index / fps, to the rounding of float32


@dataclass
class LeRobotImportConfig(ImportConfig):
    """Imports a LeRobot dataset v3.0; every problem of its episodes is named, exit status 1 if there is any."""

    revision: str | None = option(None, "Of a dataset on the Hub.")


def open_lerobot(config: LeRobotImportConfig, rig: Rig) -> "LeRobotSource":
    """The dataset in the folder `config.source`, or that of this id on the Hub, whose files are downloaded."""
    with source_of(config.source, "dataset") as folder:
        if folder is None:
            patterns = [
                "meta/*",
                "data/*",
                "images/*",
                *(f"videos/{key}/*" for key in dict.fromkeys(rig.cameras.values())),
            ]
            folder = Path(
                snapshot_download(config.source, repo_type="dataset", revision=config.revision, allow_patterns=patterns)
            )
    return LeRobotSource(folder, rig)


class LeRobotSource:
    """See `source.Source`; episodes are named "episode 7"."""

    def __init__(self, folder: Path, rig: Rig):
        self.folder, self.rig = folder, rig
        self.info = read_info(folder)
        self.fps = self.info.fps
        if STEREO in rig.cameras:
            raise ValueError(f"cameras is {dict(rig.cameras)}; {STEREO} is DROID's, name the views left and right here")
        features = self.info.features
        images = [key for key, feature in features.items() if feature["dtype"] in ("video", "image")]
        for side, key in rig.cameras.items():
            if key not in images:
                raise ValueError(f"{folder} has no camera {key!r} for the {side} view; it has: {', '.join(images)}")
        for view, key in rig.cameras.items():
            sharing = [name for name, other in rig.cameras.items() if other == key]
            if len(sharing) > 1 and view not in (rig.parts_px or {}):
                raise ValueError(f"{' and '.join(sharing)} come from {key!r}: parts_px must say where each is in it")
        if rig.state is None or rig.action is None:
            raise ValueError("the rig lacks state or action: say where they are in the source")
        self._videos = [key for key in dict.fromkeys(rig.cameras.values()) if features[key]["dtype"] == "video"]
        self._images = [key for key in dict.fromkeys(rig.cameras.values()) if features[key]["dtype"] == "image"]
        wanted = [rig.state.column, rig.action.column, *rig.calibration_columns().values()]
        self._columns = [key for key in dict.fromkeys(wanted) if key is not None]
        for key in self._columns:
            if key not in features:
                raise ValueError(f"{folder} has no column {key!r}; it has: {', '.join(features)}")
        self._tasks = read_tasks(folder)
        entries = read_episodes(folder, self._videos)
        self._episodes = {f"episode {entry['episode_index']}": entry for entry in entries}
        # {(video, its file): lengths of the episodes in it, by their index}
        self._filmed: dict[tuple[str, Path], dict[int, int]] = {}
        for key in self._videos:
            for entry in entries:
                in_file = self._filmed.setdefault((key, self._video_file(entry, key)), {})
                in_file[entry["episode_index"]] = entry["length"]
        self._times: dict[Path, np.ndarray] = {}
        self._names: dict[Path, list[str]] = {}  # columns of the files of data

    def content(self) -> dict[str, Any]:
        """See `source.Source`."""
        names = ["info.json", "tasks.parquet"]
        hashes = {name: shards.sha256(self.folder / "meta" / name) for name in names}
        hashes |= {
            path.relative_to(self.folder / "meta").as_posix(): shards.sha256(path)
            for path in sorted((self.folder / "meta/episodes").glob("*/*.parquet"))
        }
        folders = ["data", *(f"videos/{key}" for key in self._videos), *(["images"] if self._images else [])]
        files = sorted(path for name in folders for path in (self.folder / name).rglob("*") if path.is_file())
        listing = [[path.relative_to(self.folder).as_posix(), path.stat().st_size] for path in files]
        hashes["files"] = hashlib.sha256(json.dumps(listing).encode()).hexdigest()  # of their names and sizes
        return {"format": f"LeRobot {self.info.version}", "sha256": hashes}

    def splits(self) -> dict[str, list[str]]:
        """See `source.Source`."""
        splits = {
            split: [name for name, entry in self._episodes.items() if entry["episode_index"] in numbers]
            for split, numbers in self.info.splits.items()
        }
        placed = sorted(name for names in splits.values() for name in names)
        if placed != sorted(self._episodes) or len(placed) != self.info.total_episodes:
            ranges = {split: f"{numbers.start}:{numbers.stop}" for split, numbers in self.info.splits.items()}
            raise ValueError(
                f"{self.folder}: info.json counts {self.info.total_episodes} episodes, meta/episodes holds "
                f"{len(self._episodes)}, the splits {ranges} {len(placed)}; each must be in one split"
            )
        return splits

    def read(self, name: str) -> SourceEpisode:
        """See `source.Source`."""
        entry = self._episodes[name]
        table = self._table(entry, [*self._columns, "timestamp", "frame_index", "task_index"])
        length = table.num_rows
        problems = []
        if length != entry["length"]:
            problems.append(f"the data has {length} frames, meta/episodes says {entry['length']}")
        if not length:
            raise EpisodeError("; ".join(problems) or "no frames")
        frames, times, indices = (_column(table, key) for key in ("frame_index", "timestamp", "task_index"))
        problems += [
            f"frame {i}: its frame_index is {frames[i]:g}" for i in np.flatnonzero(frames != np.arange(length))
        ]
        rate = (length - 1) / (times[-1] - times[0]) if length > 1 and times[-1] > times[0] else self.fps
        if not abs(rate / self.fps - 1) <= _RATE:
            problems.append(f"the timestamps run at {rate:.2f} Hz, {INFO} says {self.fps:g} Hz")
        for key in self._videos:
            seconds = entry[f"videos/{key}/to_timestamp"] - entry[f"videos/{key}/from_timestamp"]
            count = seconds * self.fps
            if not abs(count - length) <= 0.5:
                problems.append(f"the video {key} spans {count:.1f} frames, the data {length}")
        sentences = [self._tasks.get(index) for index in indices.tolist()]
        for frame, sentence in enumerate(sentences):
            if sentence is None:
                problems.append(f"frame {frame}: task_index {indices[frame]:g} is not in meta/tasks.parquet")
            elif entry["tasks"] is not None and sentence not in entry["tasks"]:
                problems.append(
                    f"frame {frame}: its instruction is {sentence!r}, meta/episodes lists {entry['tasks']} as tasks"
                )
        values = {key: _array(table, key) for key in self._columns}
        return SourceEpisode(
            timestamps_s=times,
            states=values[self.rig.state.column],
            actions=None if self.rig.action.column is None else values[self.rig.action.column],
            tasks=["unknown" if sentence is None else sentence for sentence in sentences],
            calibration={
                key: values[value] if isinstance(value, str) else np.broadcast_to(value, (length, *np.shape(value)))
                for key, value in self.rig.stated_calibration().items()
            },
            problems=problems,
        )

    def pictures(self, name: str, episode: SourceEpisode) -> Iterator[dict[str, np.ndarray | None]]:
        """See `source.Source`."""
        entry = self._episodes[name]
        streams = {key: self._video(entry, key, episode.timestamps_s) for key in self._videos}
        if self._images:
            table = self._table(entry, self._images)
            streams |= {key: self._stored(table, key) for key in self._images}
        for _ in range(len(episode.timestamps_s)):
            images = {key: next(stream) for key, stream in streams.items()}
            yield {view: images[self.rig.cameras[view]] for view in self.rig.views}

    def _video_file(self, entry: dict[str, Any], key: str) -> Path:
        place = {name: entry[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        return inside(self.folder, fill_template(self.info.video_path, video_key=key, **place))

    def _video(self, entry: dict[str, Any], key: str, timestamps_s: np.ndarray) -> Iterator[np.ndarray]:
        """Pictures of one episode; VideoError where lengths and times do not name the same ones."""
        path = self._video_file(entry, key)
        if path not in self._times:
            self._times[path] = frame_times(path)
        found, lengths = self._times[path], self._filmed[key, path]
        if len(found) != sum(lengths.values()):
            raise VideoError(f"{path.name} of {key} has {len(found)} frames, its episodes {sum(lengths.values())}")
        first = sum(length for index, length in lengths.items() if index < entry["episode_index"])
        found = found[first : first + len(timestamps_s)]
        wanted = entry[f"videos/{key}/from_timestamp"] + np.asarray(timestamps_s, dtype=np.float64)
        if len(found) != len(wanted):
            raise VideoError(f"frame {len(found)}: {path.name} of {key} ends there, the data has {len(wanted)} frames")
        if (beside := first_beside(found, wanted, self.fps)) is not None:
            raise VideoError(
                f"frame {beside}: it is picture {first + beside} of {path.name} of {key}, which is shown at "
                f"{found[beside]:.4f} s; from_timestamp and timestamp ask for the one at {wanted[beside]:.4f} s"
            )
        return read_frames(path, found, self.fps)

    def _stored(self, table: pa.Table, key: str) -> Iterator[np.ndarray | None]:
        """Pictures that the data holds, or whose files it names (as `datasets` writes them without embedding); None
        where a view is absent that may be.
        """
        may_lack = not any(self.rig.cameras.get(side) == key for side in ("left", "right"))
        for frame, value in enumerate(table.column(key).to_pylist()):
            content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
            if content is None and name is None and may_lack:
                yield None
                continue
            try:
                if content is None and isinstance(name, str):
                    content = inside(self.folder, name).read_bytes()
                if not isinstance(content, bytes):
                    raise VideoError(f"frame {frame}: {key} holds neither a picture nor the path of one")
                with open_image(content) as image:
                    yield np.array(image.convert("RGB"))
            except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for broken files
                text = f"{key} in {name!r}" if isinstance(name, str) else key
                raise VideoError(f"frame {frame}: {text} cannot be read: {error}") from error

    def _table(self, entry: dict[str, Any], columns: list[str]) -> pa.Table:
        """The rows of one episode; EpisodeError where they cannot be read, or a column is missing."""
        place = {name: entry[f"data/{name}"] for name in ("chunk_index", "file_index")}
        name = fill_template(self.info.data_path, **place)
        path = inside(self.folder, name)
        try:
            if path not in self._names:
                with open_parquet(path) as file:
                    self._names[path] = file.schema_arrow.names
            names = self._names[path]
            missing = [key for key in (*columns, "episode_index") if key not in names]
            if not missing:
                filters = [("episode_index", "=", entry["episode_index"])]
                return pq.read_table(path, columns=columns, filters=filters, partitioning=None)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise EpisodeError(f"{name} cannot be read: {error}") from error
        raise EpisodeError(f"{name} has no column {missing[0]!r}; it has: {', '.join(names)}")


def _array(table: pa.Table, key: str) -> np.ndarray:
    """Column of numbers or equally long (nested) lists -> float64 (rows, size)."""
    try:
        values = np.array(table.column(key).to_pylist(), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EpisodeError(f"{key} holds other things than numbers, or rows of different lengths: {error}") from error
    values = values.reshape(len(values), -1)
    if not values.shape[1]:
        raise EpisodeError(f"{key} holds no numbers")
    return values


def _column(table: pa.Table, key: str) -> np.ndarray:
    """Column of one number per row -> float64 (rows,)."""
    values = _array(table, key)
    if values.shape[1] != 1:
        raise EpisodeError(f"{key} holds {values.shape[1]} numbers in each row, expected one")
    return values[:, 0]
