"""Writes a dataset of ours as a LeRobot dataset of the format v3.0, as lerobot 0.4 itself lays it out.

One data file and one mp4 per camera for each of our shards; the episodes of all splits are counted through. A view that
is absent in some frames is no video but stored with them, null where it is absent. Beside images, state and action,
every frame carries its calibration, where the data has one. Depth is stored in m, as float32, and marked as LeRobot
marks it. LeRobot finds a picture by its time, so timestamps become frame_index / fps exactly. `meta/rig.yaml` is what
`data import lerobot` needs to read the folder again.
"""

import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from tqdm.auto import tqdm

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.folders import INFO
from stereovla.dataset_builder.dataset.manifest import read_manifest
from stereovla.dataset_builder.formats.lerobot_card import write_card
from stereovla.dataset_builder.formats.plausibility import CHECKS
from stereovla.dataset_builder.formats.video import VideoWriter
from stereovla.sources import existing_folder
from stereovla.untrusted import inside

SEGMENTATION = "observation.segmentation"
CODECS = {"libx264": ("h264", 18), "libsvtav1": ("av1", 20)}  # encoder: (name of the codec, quality)
CHUNK = 1000  # files per folder, LeRobot's default
_PATH = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH, VIDEO_PATH = f"data/{_PATH}.parquet", f"videos/{{video_key}}/{_PATH}.mp4"
_INDICES = ("timestamp", "frame_index", "episode_index", "index", "task_index")
_QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
_PICTURES = 10  # frames per episode that enter the statistics of a camera
_PIXELS = 32  # rows of such a frame, as LeRobot takes reduced ones too


@dataclass
class LeRobotExportConfig:
    """Writes a dataset of this project as a LeRobot dataset v3.0."""

    dataset: str = option("", "Folder of a dataset of ours.")
    out: str = option("", "Folder to write; it must not exist. It appears when it is whole.")
    codec: str = option("libx264", f"Encoder of the videos: {', '.join(CODECS)}.")
    with_depth: bool = option(
        False, "Also write depth (m, as float32 TIFF) and segmentation (8-bit PNG) into the data files."
    )

    def __post_init__(self):
        for name in ("dataset", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if self.codec not in CODECS:
            raise ValueError(f"codec={self.codec!r} is unknown; valid: {', '.join(CODECS)}")


def export_lerobot(config: LeRobotExportConfig) -> Path:
    """Write the LeRobot dataset; returns its folder."""
    folder, out = existing_folder(config.dataset, "dataset"), Path(config.out)
    if out.exists():
        raise ValueError(f"{out} exists; choose another --out")
    info = shards.read_json(folder / INFO)
    entries = read_manifest(folder)
    splits = [*dict.fromkeys(entry["split"] for entry in entries)]
    entries = sorted(entries, key=lambda entry: splits.index(entry["split"]))  # LeRobot's are ranges of episodes
    views = [schema.image_key(view) for view in schema.views_of(info["columns"])]
    maps = [key for key in info["columns"] if config.with_depth and (schema.is_depth(key) or key == SEGMENTATION)]
    total = sum(entry["rows"] for entry in entries)
    absent = {key: 0 if key in schema.PAIR else _absent(folder, entries, key) for key in [*views, *maps]}
    views, maps = ([key for key in keys if absent[key] < total] for keys in (views, maps))
    if config.with_depth and not maps:
        raise ValueError(f"{folder} has no {schema.DEPTH} and no {SEGMENTATION}; leave --with_depth out")
    videos = [key for key in views if not absent[key]]
    maps = [*(key for key in views if absent[key]), *maps]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a kill left: an export starts anew
    (partial / "meta").mkdir(parents=True)
    tasks: dict[str, int] = {}
    episodes: list[dict[str, Any]] = []
    collected: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, tuple[int, ...]] = {}
    for number, entry in enumerate(tqdm(entries, desc="exporting", unit="shard")):
        place = {"chunk_index": number // CHUNK, "file_index": number % CHUNK}
        table = shards.read_table(inside(folder, entry["path"]))
        for key in [*videos, *maps]:
            if key not in sizes and (stored := table.column(key).drop_null()):
                sizes[key] = shards.decode_image(key, stored[0].as_py()["bytes"]).shape
        videos_px = {key: sizes[key] for key in videos}
        found = _write_file(partial, table, place, info, config, maps, tasks, episodes, videos_px)
        for key, values in found.items():
            collected.setdefault(key, []).append(values)
    everything = {key: np.concatenate(values) for key, values in collected.items()}
    shards.write_json(partial / "meta/stats.json", {key: _statistics(values) for key, values in everything.items()})
    pd.DataFrame({"task_index": list(tasks.values())}, index=pd.Index(list(tasks), name="task")).to_parquet(
        partial / "meta/tasks.parquet"
    )
    path = partial / "meta/episodes" / f"{_PATH.format(chunk_index=0, file_index=0)}.parquet"
    path.parent.mkdir(parents=True)
    names = dict.fromkeys(
        name for entry in episodes for name in entry
    )  # an episode may lack a view, and its statistics
    pq.write_table(pa.Table.from_pylist([{name: entry.get(name) for name in names} for entry in episodes]), path)
    content = _info(info, entries, config, videos, sizes, len(episodes), len(tasks))
    shards.write_json(partial / "meta/info.json", content)
    (partial / "meta/rig.yaml").write_text(
        yaml.safe_dump(_rig(info, sizes[schema.LEFT]), sort_keys=False), encoding="utf-8"
    )
    write_card(partial)
    os.replace(partial, out)
    return out


def _absent(folder: Path, entries: Sequence[Mapping[str, Any]], key: str) -> int:
    """How many rows lack an image."""
    return sum(shards.read_table(inside(folder, e["path"]), [key]).column(key).null_count for e in entries)


def _write_file(
    partial: Path,
    table: pa.Table,
    place: Mapping[str, int],
    info: Mapping[str, Any],
    config: LeRobotExportConfig,
    maps: Sequence[str],
    tasks: dict[str, int],
    episodes: list[dict[str, Any]],
    videos: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """One data file and its videos, {camera: shape of its pictures}; adds to `tasks` and `episodes`, and returns what
    the statistics are made of.
    """
    fps, rows = float(info["fps"]), table.num_rows
    numbers = {key: shards.numbers(table, key).reshape(rows, -1) for key in _vectors(info)}
    starts = np.flatnonzero(np.diff(shards.numbers(table, "episode_index"), prepend=-1))
    lengths = np.diff(starts, append=rows)
    first = episodes[-1]["dataset_to_index"] if episodes else 0
    frames = np.concatenate([np.arange(length) for length in lengths])
    sentences = table.column("task").to_pylist()
    for sentence in sentences:
        tasks.setdefault(sentence, len(tasks))
    columns = {
        **{key: list(values) if values.shape[1] > 1 else values[:, 0] for key, values in numbers.items()},
        "timestamp": (frames / fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.repeat(np.arange(len(lengths)) + len(episodes), lengths),
        "index": first + np.arange(rows),
        "task_index": np.array([tasks[sentence] for sentence in sentences]),
        **{key: _stored(table, key) for key in maps},
    }
    target = _columns(info, maps).arrow_schema
    path = partial / DATA_PATH.format(**place)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [pa.array(columns[item.name], type=item.type) for item in target]
    pq.write_table(pa.Table.from_arrays(arrays, schema=target), path)
    values = {key: columns[key].reshape(-1, 1) for key in _INDICES} | numbers
    spans = np.split(np.arange(rows), starts[1:])
    chosen = [_some_of(numbers) for numbers in spans]
    pictures = {
        key: _write_video(partial, table, key, place, fps, config.codec, size, chosen) for key, size in videos.items()
    }
    pictures |= {key: _stored_pictures(table, key, spans) for key in maps}
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        part = slice(int(start), int(start + length))
        statistics = {key: _statistics(array[part]) for key, array in values.items()}
        statistics |= {key: _statistics(found[number]) for key, found in pictures.items() if len(found[number])}
        episodes.append(
            {
                "episode_index": len(episodes),
                "tasks": list(dict.fromkeys(sentences[part])),
                "length": int(length),
                **{f"data/{name}": index for name, index in place.items()},
                "dataset_from_index": first + part.start,
                "dataset_to_index": first + part.stop,
                **{f"videos/{key}/{name}": index for key in videos for name, index in place.items()},
                **{f"videos/{key}/from_timestamp": part.start / fps for key in videos},
                **{f"videos/{key}/to_timestamp": part.stop / fps for key in videos},
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                **{f"stats/{key}/{name}": v for key, stats in statistics.items() for name, v in stats.items()},
            }
        )
    # LeRobot wants statistics of every camera, in every episode that has one
    there = {key: [some for some in found if len(some)] for key, found in pictures.items()}
    return values | {key: np.concatenate(found) for key, found in there.items() if found}


def _write_video(
    partial: Path,
    table: pa.Table,
    key: str,
    place: Mapping[str, int],
    fps: float,
    codec: str,
    size: tuple[int, int, int],
    chosen: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """All frames of one camera of one shard as mp4; returns those that are `chosen` of every episode, reduced,
    (n, h, w, 3) uint8.
    """
    path = partial / VIDEO_PATH.format(video_key=key, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = {number for numbers in chosen for number in numbers}
    kept: dict[int, np.ndarray] = {}
    with VideoWriter(path, fps, (size[1], size[0]), codec, CODECS[codec][1]) as writer:
        for number, image in enumerate(_images(table, key)):
            if image.shape != size:
                raise ValueError(f"row {number}: {key} is {image.shape}, the others {size}; a video has one size")
            writer.write(image)
            if number in wanted:
                kept[number] = _reduced(image)
    return [np.stack([kept[number] for number in sorted(set(numbers))]) for numbers in chosen]


def _stored_pictures(table: pa.Table, key: str, spans: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of a column of images in the data file, some of those that are there in every episode, whose rows are a span,
    reduced: (n, h, w, channels), uint8, or of depth float32 in m; (0,) where there is none.
    """
    column, found = table.column(key), []
    is_there = ~np.asarray(column.is_null())
    for numbers in spans:
        images = [shards.decode_image(key, column[n].as_py()["bytes"]) for n in _some_of(numbers[is_there[numbers]])]
        found.append(np.stack([_reduced(np.atleast_3d(image)) for image in images]) if images else np.empty(0))
    return found


def _some_of(numbers: np.ndarray) -> list[int]:
    """At most `_PICTURES` of them, at equal distances."""
    if not len(numbers):
        return []
    return numbers[np.linspace(0, len(numbers) - 1, min(_PICTURES, len(numbers))).round().astype(int)].tolist()


def _reduced(image: np.ndarray) -> np.ndarray:
    step = max(1, min(image.shape[:2]) // _PIXELS)
    return image[::step, ::step]


def _stored(table: pa.Table, key: str) -> list[dict[str, Any] | None]:
    """A column of images as the data file has it: as it is, but depth in m, of which LeRobot knows no finer unit for
    whole numbers than mm.
    """
    if not schema.is_depth(key):
        return table.column(key).to_pylist()
    found = []
    for value in table.column(key).to_pylist():
        if value is not None:
            buffer = io.BytesIO()
            depth_m = shards.decode_image(key, value["bytes"])
            Image.fromarray(depth_m).save(buffer, format="TIFF", compression="tiff_adobe_deflate")
            value = {"bytes": buffer.getvalue(), "path": None}
        found.append(value)
    return found


def _images(table: pa.Table, key: str) -> Iterator[np.ndarray]:
    for value in table.column(key).combine_chunks().field("bytes"):
        yield shards.decode_image(key, value.as_py())


def _statistics(values: np.ndarray) -> dict[str, Any]:
    """LeRobot's statistics of vectors (n, size); those of pictures (n, h, w, channels) are (channels, 1, 1), of uint8
    in 0..1.
    """
    pictures = values.ndim == 4
    array = values.reshape(-1, values.shape[-1]).astype(np.float64)
    if pictures and values.dtype == np.uint8:
        array /= 255
    whole = values if np.issubdtype(values.dtype, np.integer) and not pictures else array  # whole numbers stay whole
    result = {"min": whole.min(0), "max": whole.max(0), "mean": array.mean(0), "std": array.std(0)}
    result |= dict(zip(_QUANTILES, np.quantile(array, list(_QUANTILES.values()), axis=0), strict=True))
    lists = {name: (value.reshape(-1, 1, 1) if pictures else value).tolist() for name, value in result.items()}
    return lists | {"count": [len(values)]}


def _vectors(info: Mapping[str, Any]) -> dict[str, int]:
    """Columns of numbers with their sizes, in their order."""
    sizes = {"observation.state": info["state_dim"], "action": info["action_dim"]}
    shapes = {column.key: column.shape for column in schema.ROW}
    calibration = [key for key in schema.CALIBRATION if key in info["columns"]]
    return sizes | {key: int(np.prod(shapes[key], dtype=int)) for key in calibration}


def _columns(info: Mapping[str, Any], maps: Sequence[str]) -> Features:
    """Features of a data file, as `datasets` knows them from LeRobot's: numbers of size 1 are no lists."""
    number = Value("float32")
    vectors = {key: List(number, length=size) if size > 1 else number for key, size in _vectors(info).items()}
    indices = {key: Value("float32" if key == "timestamp" else "int64") for key in _INDICES}
    return Features({**{key: ImageFeature() for key in maps}, **vectors, **indices})


def _info(
    info: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    config: LeRobotExportConfig,
    videos: Sequence[str],
    sizes: Mapping[str, tuple[int, ...]],
    episodes: int,
    tasks: int,
) -> dict[str, Any]:
    """Content of meta/info.json; `sizes` are the shapes of the videos' pictures and of the stored images."""
    fps = int(info["fps"]) if float(info["fps"]).is_integer() else info["fps"]
    features: dict[str, Any] = {}
    for key, (height, width, *channels) in sizes.items():
        shape = {"shape": [height, width, *(channels or [1])], "names": ["height", "width", "channels"]}
        features[key] = {"dtype": "video" if key in videos else "image", **shape}
        if key in videos:
            features[key]["info"] = {
                "video.height": height,
                "video.width": width,
                "video.codec": CODECS[config.codec][0],
                "video.pix_fmt": "yuv420p",
                "video.is_depth_map": False,
                "video.fps": fps,
                "video.channels": 3,
                "has_audio": False,
            }
        elif schema.is_depth(key):
            features[key]["info"] = {"is_depth_map": True, "depth_unit": "m"}
    for key, count in _vectors(info).items():
        of_pose = key in ("observation.state", "action") and info["state_is_pose"]
        features[key] = {"dtype": "float32", "shape": [count], "names": list(schema.POSES[count]) if of_pose else None}
    for key in _INDICES:
        features[key] = {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    splits: dict[str, str] = {}
    start = 0
    for split in dict.fromkeys(entry["split"] for entry in entries):
        count = sum(entry["episodes"] for entry in entries if entry["split"] == split)
        splits[split] = f"{start}:{start + count}"
        start += count
    return {
        "codebase_version": "v3.0",
        "robot_type": info["embodiments"][0],
        "total_episodes": episodes,
        "total_frames": sum(entry["rows"] for entry in entries),
        "total_tasks": tasks,
        "chunks_size": CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": fps,
        "splits": splits,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }


def _rig(info: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, Any]:
    """What `data import lerobot` needs to read the exported folder, see `rig`; `size` is that of the left view."""
    views = schema.views_of(info["columns"])
    calibration = [key for key in schema.CALIBRATION_KEYS if f"calibration.{key}" in info["columns"]]
    stated: dict[str, Any] = {}
    if calibration:
        places = {key: f"calibration.{key}" for key in calibration}
        stated["calibration"] = {"size_px": [size[1], size[0]], **places}
    if "right" in views:
        stated["vertical_misalignment_px"] = info["vertical_misalignment_px"]
    state: dict[str, Any] = {"column": "observation.state"}
    action: dict[str, Any] = {"column": "action"}
    if info["state_is_pose"] and info["state_dim"] == schema.STATE_DIM:  # a rig knows whole poses only
        for vector, kind, closed in ((state, {}, 0.0), (action, {"kind": "delta"}, -1.0)):
            vector |= {
                **kind,
                "position": [0, 1, 2],
                "rpy": [3, 4, 5],
                "gripper": 6,
                "gripper_closed_open": [closed, 1.0],
            }
    return {
        "embodiment": info["embodiments"][0],
        "license": info.get("license", "apache-2.0"),
        "cameras": {view: schema.image_key(view) for view in views},
        "state": state,
        "action": action,
        **stated,
        "accept": list(CHECKS),  # views that were cropped, tools out of view: judged when the data was made
    }
