"""What a dataset folder holds beside its shards, and how one process at a time fills it, going on where one stopped."""

import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.card import write_card

INFO = Path("meta/info.json")
PLAN = Path("meta/build.json")  # the options that decide the bytes, written first
STATS = Path("meta/stats.json")
PARTIAL = ".partial"


def check_folder(folder: Path, content: Mapping[str, Any]) -> None:
    """ValueError when `folder` holds something else than this build or import."""
    if not (folder / PLAN).exists():
        inside = [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []
        if all(PARTIAL in path.parts or path.suffix == ".tmp" for path in inside):  # killed before it wrote the plan
            return
        if not (folder / PLAN).exists():  # else another machine has just begun its part
            raise ValueError(f"{folder} is not empty and holds no dataset of ours; choose another --out")
    changed = changes(shards.read_json(folder / PLAN), content)
    if changed:
        raise ValueError(f"{folder} was begun with other options: {changed}. Use them, or another --out")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two plans, in words; "" = nothing."""
    return "; ".join(
        f"{key} was {before.get(key)}, now {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    )


@contextmanager
def work_folder(folder: Path, part: str) -> Iterator[Path]:
    """Folder for unfinished files of one part of the work on a dataset.

    Two processes with the same part are kept apart by a lock (RuntimeError), which the operating system frees however
    the process ends.
    """
    partial = folder / PARTIAL / part
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f"another process is building {folder}; wait for it or choose another --out") from error
        for left in partial.glob("*.parquet.*"):  # halves of a build that was killed
            left.unlink()
        yield partial
    shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):  # other parts are at work
        partial.parent.rmdir()


def count_shards(folder: Path, tasks: Sequence[tuple[str, Path, int]]) -> tuple[dict[str, dict[str, int]], list[str]]:
    """{split: {"episodes", "frames", "shards"}} and the sorted instructions of recorded shards, each given as (split,
    path in the folder, number of episodes).
    """
    splits: dict[str, dict[str, int]] = {}
    sentences: set[str] = set()
    for split, path, episodes in tqdm(tasks, desc="summing up", unit="shard"):
        table = shards.read_table(folder / path, ["task"])
        sentences |= set(table.column("task").to_pylist())
        entry = splits.setdefault(split, {"episodes": 0, "frames": 0, "shards": 0})
        entry["episodes"] += episodes
        entry["frames"] += table.num_rows
        entry["shards"] += 1
    return splits, sorted(sentences)


def describe_folder(folder: Path, info: Mapping[str, Any], tasks: Sequence[tuple[str, Path, int]]) -> None:
    """Writes info, card, and at last the manifest, which says that the dataset is whole."""
    shards.write_json(folder / INFO, info)
    write_card(folder)
    by_split: dict[str, list[Path]] = {}
    for split, path, _ in tasks:
        by_split.setdefault(split, []).append(path)
    shards.write_manifest(folder, by_split)
