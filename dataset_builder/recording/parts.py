"""Parts of a dataset, recorded at different times and on different machines, and what makes one dataset of them.

The plan says which shards there are; each is recorded by somebody, written under a temporary name and renamed. When all
are there, `finish` writes statistics, info, card and manifest, from the shards alone.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.folders import PLAN, STATS, changes, count_shards, describe_folder, work_folder
from stereovla.dataset_builder.dataset.statistics import camera_ranges, compute_statistics

_NAMED = 5  # missing shards that a message lists


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    split: str
    path: Path  # inside the folder
    episodes: range


def plan_shards(content: Mapping[str, Any]) -> list[Task]:
    """All shards of a dataset with their episodes, from its plan (meta/build.json)."""
    step = content["episodes_per_shard"]
    return [
        task for split in ("train", "validation") for task in split_tasks(split, content[f"{split}_episodes"], step)
    ]


def split_tasks(split: str, total: int, step: int) -> list[Task]:
    """The shards of a split of `total` episodes, `step` in each."""
    starts = range(0, total, step)
    return [
        Task(split, shards.shard_path(split, number, len(starts)), range(start, min(total, start + step)))
        for number, start in enumerate(starts)
    ]


def merge(folder: Path, parts: Sequence[Path] = ()) -> Path:
    """Join `parts` in `folder` and finish the dataset; returns the folder.

    Without parts, `folder` is one that all machines recorded into. Shards are linked where parts and folder lie on one
    file system, else copied. Interrupted, the same call goes on. ValueError for parts of different datasets, or with
    different bytes for one shard; RuntimeError that names shards that nobody recorded.
    """
    sources = [*parts, *([folder] if (folder / PLAN).exists() else [])]
    if not sources:
        raise ValueError(f"{folder} holds no part of a dataset, and no other parts are named")
    content = shards.read_json(sources[0] / PLAN)
    if "episodes_per_shard" not in content:
        raise ValueError(
            f"{sources[0]} is no part that `build` recorded, but a whole dataset; several of these are trained on "
            "together as they are: --dataset A B"
        )
    for source in sources[1:]:
        if changed := changes(content, shards.read_json(source / PLAN)):
            raise ValueError(f"{sources[0]} and {source} are parts of different datasets: {changed}")
    tasks = plan_shards(content)
    with work_folder(folder, "finish") as partial:
        shards.write_json(folder / PLAN, content, temporary=partial / PLAN.name)
        for part in parts:
            for task in tqdm(tasks, desc=f"joining {part}", unit="shard"):
                if (part / task.path).exists():
                    _join(part / task.path, folder / task.path, partial)
        missing = [task.path.as_posix() for task in tasks if not (folder / task.path).exists()]
        if missing:
            listed = ", ".join(missing[:_NAMED]) + (" ..." if len(missing) > _NAMED else "")
            raise RuntimeError(
                f"{len(missing)} of {len(tasks)} shards are missing in {folder}: {listed}. Name the part that has "
                "them, let its machine finish, or record them here by the same `build` command without --shard-index"
            )
        if not (folder / shards.MANIFEST).exists():
            finish(folder, content)
    return folder


def _join(source: Path, target: Path, partial: Path) -> None:
    with shards.open_shard(source):  # ShardError names one that was cut on its way here
        pass
    if target.exists():
        if not target.samefile(source) and shards.sha256(target) != shards.sha256(source):
            raise ValueError(f"{source} and {target} have different bytes: recorded by different machines or versions?")
        return
    temporary = partial / f"{target.name}.joined"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # another file system
        shutil.copyfile(source, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    os.replace(temporary, target)


def finish(folder: Path, content: Mapping[str, Any]) -> None:
    """Statistics, info, card, and at last the manifest, which says that the dataset is whole.

    The caller holds `work_folder(folder, "finish")`.
    """
    failures: Counter[str] = Counter()
    objects: set[str] = set()
    tasks = plan_shards(content)
    recorded = [(task.split, task.path, len(task.episodes)) for task in tasks]
    splits, sentences = count_shards(folder, recorded)
    for task in tasks:
        failures.update(shards.shard_info(folder / task.path)["failures"])
        objects |= set(shards.read_table(folder / task.path, ["target.name"]).column("target.name").to_pylist())
    train = [folder / task.path for task in tasks if task.split == "train"]
    stats = compute_statistics(train)
    shards.write_json(folder / STATS, stats)
    with shards.open_shard(train[0]) as file:
        layout = file.schema_arrow
    info = {
        "fps": content["fps"],
        "embodiments": sorted(stats),
        "tasks": sentences,
        "objects": sorted(objects),
        "splits": splits,
        "failed_attempts": dict(sorted(failures.items())),
        "columns": layout.names,
        "views": list(schema.views_of(layout.names)),
        **({"depth_source": "simulation"} if content["labels"] else {}),
        "state_dim": layout.field("observation.state").type.list_size,
        "action_dim": layout.field("action").type.list_size,
        "state_is_pose": True,
        "vertical_misalignment_px": max(map(abs, content["world"].get("vertical_misalignment_px", (0.0,)))),
        "cameras": camera_ranges([folder / task.path for task in tasks]),
        "build": content,
    }
    describe_folder(folder, info, recorded)
