"""LeRobot datasets to import: one that lerobot wrote, and small ones that are written here by plain pyarrow."""

import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from stereo_scene import textured_pair

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.formats.importing import import_dataset
from stereovla.dataset_builder.formats.lerobot_source import LeRobotImportConfig, open_lerobot
from stereovla.dataset_builder.formats.rig import read_rig
from stereovla.dataset_builder.formats.video import VideoWriter

ROOT = Path(__file__).parent.parent
WRITTEN = ROOT / "tests/lerobot_written/dataset"  # by lerobot itself, see make.py beside it
SIZE, FPS, LENGTHS = 96, 12, (7, 5, 6)
TASKS = ("pick up the cup", "open the drawer", "pick up the cup")
TRANSFORM = [[0, 0, 1, -0.8], [-1, 0, 0, 0], [0, -1, 0, 0.1], [0, 0, 0, 1]]
PLACE = {"position": [0, 1, 2], "rpy": [3, 4, 5], "gripper": 6, "gripper_closed_open": [0, 1]}
RIG = {
    "embodiment": "test_arm",
    "license": "mit",
    "cameras": {"left": "observation.images.eye_a", "right": "observation.images.eye_b"},
    "calibration": {
        "size_px": [SIZE, SIZE],
        "focal_length_px": [100.0, 100.0],
        "principal_point_px": [48.0, 48.0],
        "baseline_m": 0.063,
        "transform_camera_to_base": TRANSFORM,
    },
    "state": {"column": "observation.state", **PLACE},
    "action": {"column": "action", "kind": "absolute", **PLACE},
}


def write_rig(folder: Path, **changes) -> Path:
    path = folder / "rig.yaml"
    path.write_text(yaml.safe_dump({**RIG, **changes}))
    return path


def import_config(source: Path, folder: Path, name: str = "out", **options) -> LeRobotImportConfig:
    rig = options.pop("rig", {})
    return LeRobotImportConfig(
        source=str(source),
        config=str(write_rig(folder, **rig)),
        out=str(folder / name),
        **{"episodes_per_shard": 1, **options},
    )


def import_folder(options: LeRobotImportConfig) -> Path:
    """Import as the command does; returns the dataset."""
    rig = read_rig(Path(options.config))
    return import_dataset(options, rig, open_lerobot(options, rig))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(folder: Path, split: str) -> list[dict]:
    return [row for path in sorted((folder / "data").glob(f"{split}-*")) for row in shards.read_rows(path)]


def rewrite_shard(folder: Path, change) -> None:
    """The first shard as `change` leaves its table, with a manifest that agrees."""
    paths = sorted(path.relative_to(folder) for path in (folder / "data").glob("*.parquet"))
    table = pq.read_table(folder / paths[0])
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), folder / paths[0])
    by_split = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "validation")}
    shards.write_manifest(folder, by_split)


def write_lerobot(folder: Path, states: np.ndarray, actions: np.ndarray, rows: Sequence[float] = (0,)) -> Path:
    """Wide pictures that hold both views, and vectors of any size, by plain pyarrow: one episode per item of `rows`,
    whose right views are so many rows lower.
    """
    length, count, size = len(states), len(rows), (SIZE, 2 * SIZE)
    (folder / "videos/eyes/chunk-000").mkdir(parents=True)
    with VideoWriter(folder / "videos/eyes/chunk-000/file-000.mp4", FPS, size[::-1], "libx264", 12) as writer:
        for lower in rows:
            for frame in range(length):
                writer.write(np.concatenate(textured_pair(frame, SIZE, SIZE, rows=lower), axis=1))
    frames, episodes = np.tile(np.arange(length), count), np.repeat(np.arange(count), length)
    vectors = {"joints": states, "targets": actions}
    columns = {key: list(np.tile(values.astype(np.float32), (count, 1))) for key, values in vectors.items()}
    columns |= {"timestamp": (frames / FPS).astype(np.float32), "frame_index": frames, "index": np.arange(len(frames))}
    columns |= {"episode_index": episodes, "task_index": 0 * frames}
    (folder / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), folder / "data/chunk-000/file-000.parquet")
    place = {"data/chunk_index": 0, "data/file_index": 0, "videos/eyes/chunk_index": 0, "videos/eyes/file_index": 0}
    entries = [
        {
            **place,
            "episode_index": number,
            "length": length,
            "videos/eyes/from_timestamp": number * length / FPS,
            "videos/eyes/to_timestamp": (number + 1) * length / FPS,
        }
        for number in range(count)
    ]
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(entries), folder / "meta/episodes/chunk-000/file-000.parquet")
    pd.DataFrame({"task_index": [0]}, index=["fold the towel"]).to_parquet(folder / "meta/tasks.parquet")
    info = {"codebase_version": "v3.0", "fps": FPS, "total_episodes": count, "splits": {"train": f"0:{count}"}}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    info |= {"video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    info["features"] = {"eyes": {"dtype": "video"}, "joints": {"dtype": "float32"}, "targets": {"dtype": "float32"}}
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def write_cameras(
    folder: Path,
    sizes: dict[str, tuple[int, int]],
    lengths: Sequence[int] = (4, 3),
    *,
    videos: Sequence[str] = (),
    absent: Collection[tuple[str, int]] = (),
) -> Path:
    """Cameras of these names and sizes (width, height), by plain pyarrow as LIBERO has them: stored in the rows but for
    the `videos`; null at `absent`, (camera, index of the frame). Frame n of camera c shows `camera_picture(c, n, ...)`.
    """
    total, frames = sum(lengths), np.concatenate([np.arange(length) for length in lengths])
    columns = {"observation.state": [np.full(8, n, np.float32) for n in range(total)]}
    columns |= {"action": [np.full(7, -n, np.float32) for n in range(total)]}
    columns |= {"timestamp": (frames / FPS).astype(np.float32), "frame_index": frames, "index": np.arange(total)}
    columns |= {"episode_index": np.repeat(np.arange(len(lengths)), lengths), "task_index": 0 * frames}
    for number, (key, size) in enumerate(sizes.items()):
        pictures = [camera_picture(number, n, size) for n in range(total)]
        if key in videos:
            path = folder / f"videos/{key}/chunk-000/file-000.mp4"
            path.parent.mkdir(parents=True)
            with VideoWriter(path, FPS, size, "libx264", 12) as writer:
                for picture in pictures:
                    writer.write(picture)
            continue
        columns[key] = []
        for n, picture in enumerate(pictures):
            Image.fromarray(picture).save(buffer := io.BytesIO(), format="PNG")
            columns[key].append(None if (key, n) in absent else {"bytes": buffer.getvalue(), "path": f"{n}.png"})
    (folder / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), folder / "data/chunk-000/file-000.parquet")
    entries = []
    for number, (start, length) in enumerate(zip(np.cumsum([0, *lengths]), lengths, strict=False)):
        entry = {"episode_index": number, "length": length, "data/chunk_index": 0, "data/file_index": 0}
        for key in videos:
            entry |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": 0}
            times = {"from_timestamp": start / FPS, "to_timestamp": (start + length) / FPS}
            entry |= {f"videos/{key}/{name}": float(time) for name, time in times.items()}
        entries.append(entry)
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(entries), folder / "meta/episodes/chunk-000/file-000.parquet")
    pd.DataFrame({"task_index": [0]}, index=["open the drawer"]).to_parquet(folder / "meta/tasks.parquet")
    info = {"codebase_version": "v3.0", "fps": FPS, "total_episodes": len(lengths)}
    info |= {"splits": {"train": f"0:{len(lengths)}"}}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    info |= {"video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    info["features"] = {key: {"dtype": "video" if key in videos else "image"} for key in sizes}
    info["features"] |= {key: {"dtype": "float32"} for key in ("observation.state", "action")}
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


def camera_picture(camera: int, frame: int, size: tuple[int, int]) -> np.ndarray:
    """What `write_cameras` shows, uint8 (height, width, 3)."""
    return textured_pair(1000 * camera + frame, *size)[0]


def import_cameras(source: Path, folder: Path, cameras: dict[str, str], name: str = "out", **options) -> Path:
    """Import vectors as they are and these views, without a calibration unless `rig` has one."""
    rig = {"state": {"column": "observation.state"}, "action": {"column": "action"}, **options.pop("rig", {})}
    return import_folder(
        import_config(source, folder, name, rig={"cameras": cameras, "calibration": None, **rig}, **options)
    )


AS_THEY_ARE = {
    "cameras": {"left": "eyes", "right": "eyes"},
    "parts_px": {"left": [0, 0, SIZE, SIZE], "right": [SIZE, 0, SIZE, SIZE]},
    "state": {"column": "joints"},
    "action": {"column": "targets"},
    "crop_px": [0, 16, 96, 64],
    "resize_px": [48, 32],
}
