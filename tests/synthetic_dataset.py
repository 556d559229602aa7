"""A small dataset with known content, written through the real shard writer, for the tests of the data rooms."""

from pathlib import Path

import numpy as np

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.folders import count_shards, describe_folder
from stereovla.dataset_builder.dataset.manifest import count_splits, read_manifest
from stereovla.dataset_builder.dataset.statistics import camera_ranges, compute_statistics


def make_row(
    rng: np.random.Generator, episode: int, frame: int, size: int = 32, plan: int = 16, embodiment: str = "franka_panda"
) -> dict:
    """A valid row; its numbers say which frame it is: state[0] = frame / 100, plan[i, 0] = i / 1000."""
    state = rng.uniform(-0.5, 0.5, 7).astype(np.float32)
    state[0], state[6] = frame / 100, 1.0
    actions = rng.uniform(-0.02, 0.02, (plan, 7)).astype(np.float32)
    actions[:, 0] = np.arange(plan) / 1000
    actions[:, 6] = 1.0
    transform = np.eye(4, dtype=np.float32)
    transform[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]  # looks along base x
    transform[:3, 3] = [-0.8, 0.0, 0.1]
    depth = np.round(rng.uniform(0.4, 1.2, (size, size)), 4).astype(np.float32)
    depth[:4] = 0
    segmentation = np.zeros((size, size), np.uint8)
    segmentation[10:20, 5:12] = 3
    segmentation[8:12, 20:26] = 2
    colour = np.full((size, size, 3), [(episode * 40) % 256, (frame * 20) % 256, 128], np.uint8)
    return {
        "observation.images.left": colour,
        "observation.images.right": 255 - colour,
        "observation.state": state,
        "action": actions[0],
        "action_plan": actions,
        "action_plan_length": plan - frame % 3,
        "keyframe_pose": state,
        "keyframe_symmetry": 2,
        "state_is_pose": True,
        "calibration.focal_length_px": np.array([40.0, 40.0], np.float32),
        "calibration.principal_point_px": np.array([size / 2, size / 2], np.float32),
        "calibration.baseline_m": 0.063,
        "calibration.transform_camera_to_base": transform,
        "observation.depth": depth,
        "observation.segmentation": segmentation,
        "target.name": "red cube",
        "target.box_left_px": np.array([5, 10, 12, 20], np.float32),
        "target.box_right_px": None if frame % 5 == 4 else np.array([3, 10, 10, 20], np.float32),
        "others.names": ["blue ball"],
        "task": "pick up the red cube",
        "embodiment": embodiment,
        "episode_index": episode,
        "frame_index": frame,
        "timestamp": frame / 10,
    }


def generator_of(split: str) -> np.random.Generator:
    """What the rows of a split are drawn from; no split repeats the other."""
    return np.random.default_rng(["train", "validation"].index(split))


def write_dataset(
    folder: Path,
    lengths: list[int],
    episodes_per_shard: int,
    *,
    split: str = "train",
    without: tuple[str, ...] = (),
    size: int = 32,
    embodiment: str = "franka_panda",
) -> Path:
    """Shards with episodes of these lengths; the columns in `without` are left out of the files."""
    import pyarrow.parquet as pq

    rng = generator_of(split)
    count = -(-len(lengths) // episodes_per_shard)
    for index in range(count):
        numbers = range(index * episodes_per_shard, min(len(lengths), (index + 1) * episodes_per_shard))
        rows = [
            shards.encode_row(make_row(rng, e, f, size, embodiment=embodiment))
            for e in numbers
            for f in range(lengths[e])
        ]
        path = shards.shard_path(split, index, count)
        shards.write_shard(folder / path, rows, temporary=folder / ".temporary")
        if without:
            pq.write_table(pq.read_table(folder / path).drop_columns(list(without)), folder / path)
    return list_shards(folder)


def write_training_dataset(folder: Path) -> Path:
    """A dataset with all that training reads: 8 episodes and 2 held-out ones, statistics and what it says of itself."""
    write_dataset(folder, [6, 6], 2, split="validation")
    write_dataset(folder, [6] * 8, 4)
    shards.write_json(folder / "meta/stats.json", compute_statistics(sorted(folder.glob("data/train-*"))))
    info = {"fps": 10, "state_dim": 7, "action_dim": 7, "tasks": ["pick up the red cube"]}
    shards.write_json(folder / "meta/info.json", {**info, "splits": count_splits(read_manifest(folder))})
    return folder


def list_shards(folder: Path) -> Path:
    """A manifest of the shards that lie in `folder`, which then opens as a dataset."""
    splits: dict[str, list[Path]] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        splits.setdefault(path.name.partition("-")[0], []).append(path.relative_to(folder))
    shards.write_manifest(folder, splits)
    return folder


def write_finished_dataset(folder: Path, embodiment: str = "franka_panda", size: int = 64) -> Path:
    """A whole dataset of 3 + 1 episodes in 2 + 1 shards, with statistics, description, card and manifest."""
    lengths = {"train": [4, 3, 5], "validation": [3]}
    tasks = []
    for split, episodes in lengths.items():
        write_dataset(folder, episodes, 2, split=split, size=size, embodiment=embodiment)
        for index, start in enumerate(range(0, len(episodes), 2)):
            path = shards.shard_path(split, index, -(-len(episodes) // 2))
            tasks.append((split, path, len(episodes[start : start + 2])))
    train = [folder / path for split, path, _ in tasks if split == "train"]
    shards.write_json(folder / "meta/stats.json", compute_statistics(train))
    splits, sentences = count_shards(folder, tasks)
    build = {"noise_m": 0.01, "noise_rad": 0.05, "push_m": 0.05, "push_probability": 0.04, "relabel": 0.5}
    info = {
        "fps": 10,
        "tasks": sentences,
        "splits": splits,
        "embodiments": [embodiment],
        "state_dim": 7,
        "action_dim": 7,
        "state_is_pose": True,
        "vertical_misalignment_px": 0.0,
        "failed_attempts": {},
        "cameras": camera_ranges(train),
        "columns": list(shards.open_shard(train[0]).schema_arrow.names),
        "build": {**build, "camera_range": "small", "camera_per_frame": True, "world": {"preset": "easy"}},
    }
    describe_folder(folder, info, tasks)
    return folder
