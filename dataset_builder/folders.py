"""What a dataset folder holds beside its shards, and how one process at a time fills it, going on where one stopped."""

import fcntl
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset_builder import shards

INFO = Path("meta/info.json")
PLAN = Path("meta/build.json")  # the options that decide the bytes, written first
STATS = Path("meta/stats.json")
PARTIAL = ".partial"


def check_folder(folder: Path, content: dict[str, Any]) -> None:
    """ValueError when `folder` holds something else than this build or import."""
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
def lock_folder(folder: Path):
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
