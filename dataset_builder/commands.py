"""What the commands of `stereovla data` do around the functions that they call."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stereovla.command_line import option
from stereovla.sources import existing_folder


@dataclass
class MergeOptions:
    """Joins what machines recorded by `stereovla data build --shard_index I --num_shards N`, into one folder or into
    folders of their own, and finishes the dataset.
    """

    dir: str = option("", "Folder of the dataset, which may hold a part already; the first argument.")
    parts: list[str] = option([], "Folders that machines recorded into; the further arguments.")

    def __post_init__(self):
        require_dir(self)


@dataclass
class CheckOptions:
    """Compares a dataset with its manifest and the schema, checks timestamps and views, and names every problem; the
    exit status is 1 if there is any.
    """

    dir: str = option("", "Folder of the dataset; the first argument.")
    quick: bool = option(False, "Look into the first row of each shard only.")

    def __post_init__(self):
        require_dir(self)


@dataclass
class CardOptions:
    """Writes the card of a dataset anew; what a person wrote into it stays."""

    dir: str = option("", "Folder of the dataset; the first argument.")

    def __post_init__(self):
        require_dir(self)


def require_dir(options: Any) -> None:
    if not options.dir:
        raise ValueError("DIR is missing: the folder of the dataset")


def merge_parts(options: MergeOptions) -> Path:
    from stereovla.dataset_builder.recording.parts import merge

    return merge(Path(options.dir), [existing_folder(part, "part of a dataset") for part in options.parts])


def check(options: CheckOptions) -> int:
    from stereovla.dataset_builder.dataset.checking import find_problems
    from stereovla.dataset_builder.dataset.episode_checks import dataset_problems

    folder = existing_folder(options.dir, "dataset")
    problems = find_problems(folder, quick=options.quick)
    if not problems:  # what cannot be read cannot be looked at
        problems = dataset_problems(folder)
    print("\n".join(problems) if problems else f"{folder} is whole")
    return 1 if problems else 0


def card(options: CardOptions) -> Path:
    from stereovla.dataset_builder.dataset.card import write_card

    return write_card(existing_folder(options.dir, "dataset"))


def import_lerobot(options: Any) -> int:
    from stereovla.dataset_builder.formats.lerobot_source import open_lerobot
    from stereovla.dataset_builder.formats.rig import read_rig

    rig = read_rig(Path(options.config))
    return _import(options, rig, open_lerobot(options, rig))


def import_droid(options: Any) -> int:
    from stereovla.dataset_builder.formats.droid_source import open_droid
    from stereovla.dataset_builder.formats.rig import read_rig

    source, rig = open_droid(options, read_rig(Path(options.config)))
    return _import(options, rig, source)


def import_rollouts(options: Any) -> int:
    from stereovla.dataset_builder.formats.rollout_source import open_rollouts

    source, rig = open_rollouts(options)
    return _import(options, rig, source)


def _import(options: Any, rig: Any, source: Any) -> int:
    from stereovla.dataset_builder.dataset.folders import INFO
    from stereovla.dataset_builder.dataset.schema import for_whom
    from stereovla.dataset_builder.dataset.shards import read_json
    from stereovla.dataset_builder.formats.importing import ProblemsFound, import_dataset

    try:
        folder = import_dataset(options, rig, source)
    except ProblemsFound as error:
        print(error)
        return 1
    info = read_json(folder / INFO)
    for name, problems in info["dropped"].items():
        print("\n".join(f"{name}: {problem}" for problem in problems))
    for name, count in info["cut_frames"].items():
        print(f"{name}: {count} frames at the end left out, which video or trajectory lack")
    for name in info["not_judged"]:
        print(f"{name}: no pair has enough structure to check order and rectification")
    print(f"dataset: {folder}; {len(info['dropped'])} episodes left out")
    if words := for_whom(info["views"]):
        print(words)
    return 0
