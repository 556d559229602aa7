"""The folders that checkpoints lie in: written whole or not at all, found again, verified, and removed when old.

A checkpoint is a folder checkpoint-STEP with a SHA-256 of each of its files. It is filled under another name and
renamed when it is complete; one that is damaged all the same (by a disk, or a copy that was cut off) is set aside.
Nothing else in the folder of a run is read, renamed or removed.
"""

import json
import os
import re
import shutil
from itertools import count
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from stereovla.dataset_builder.dataset.shards import sha256, write_json

SUMS = "checksums.json"
FILLED = re.compile(r"checkpoint-\d+")
PARTIAL = re.compile(r"checkpoint(-\d+)?\.(partial|old)")


def step_of(checkpoint: Path) -> int:
    """Steps that were trained before a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def complete_checkpoint(partial: Path, folder: Path) -> None:
    """Adds the checksums to all that a checkpoint holds, and gives it its name."""
    write_json(partial / SUMS, {name: sha256(partial / name) for name in files_of(partial)})
    os.replace(partial, folder)


def files_of(checkpoint: Path) -> list[str]:
    """Names of what it holds beside the checksums, links among them."""
    paths = [path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if not path.is_dir()]
    return sorted(name for name in paths if name != SUMS)


def damage(checkpoint: Path) -> str:
    """In words what differs from what was saved; "" = nothing. Files that were added are none."""
    try:
        sums = json.loads((checkpoint / SUMS).read_text(encoding="utf-8"))
        if not isinstance(sums, dict):
            return f"{SUMS} is no table of checksums"
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read: {error}"
    found = []
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif sha256(path) != expected:
            found.append(f"{name} is not what was saved")
    return ", ".join(found)


def checkpoints(output: Path) -> list[Path]:
    """Checkpoints in the folder of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if FILLED.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=step_of)


def last_checkpoint(output: Path, state: Accelerator | PartialState) -> Path | None:
    """The last one that is whole, the same in all processes; None where there is none. Those after it are set aside,
    which is told.
    """
    whole: list[Path | None] = [None]
    if state.is_main_process:
        for folder in reversed(checkpoints(output)):
            if not (problem := damage(folder)):
                whole = [folder]
                break
            names = (f"{folder.name}.damaged" + (f"-{number}" if number else "") for number in count())
            aside = next(folder.with_name(name) for name in names if not folder.with_name(name).exists())
            os.replace(folder, aside)
            print(
                f"{folder} is damaged ({problem}): set aside as {aside.name}; the training goes on from the checkpoint "
                f"before it, or begins anew without one, and takes the steps up to {step_of(folder)} again"
            )
    return broadcast_object_list(whole)[0]


def remove_old(output: Path, keep: int) -> None:
    """Removes all checkpoints but the last `keep`, and leaves those to which somebody added files."""
    for folder in checkpoints(output)[:-keep]:
        try:
            written = json.loads((folder / SUMS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # not written by a training
        if set(files_of(folder)) <= set(written):
            going = folder.with_name(f"{folder.name}.old")  # half removed it would look damaged
            os.replace(folder, going)
            shutil.rmtree(going)


def remove_partial(output: Path) -> None:
    """Removes what kills left of checkpoints that were being written or removed."""
    for folder in output.glob("checkpoint*"):
        if PARTIAL.fullmatch(folder.name):
            shutil.rmtree(folder)
