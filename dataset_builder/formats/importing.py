"""Imports episodes that others recorded into a dataset folder: every one is checked first, then written into shards.

The check decodes everything and keeps its findings episode by episode; the shards are fixed ranges of the good
episodes, written under a temporary name and renamed. So the same command goes on where it was stopped, and the finished
bytes are those of an undisturbed import.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm.auto import tqdm

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.folders import (
    PLAN,
    STATS,
    check_folder,
    count_shards,
    describe_folder,
    work_folder,
)
from stereovla.dataset_builder.dataset.statistics import angles_around_pi, compute_statistics
from stereovla.dataset_builder.formats.import_checks import Finding, check_episode, equal_sizes
from stereovla.dataset_builder.formats.rig import Rig
from stereovla.dataset_builder.formats.rig_calibration import check_value
from stereovla.dataset_builder.formats.robot_mapping import Motion, map_motion
from stereovla.dataset_builder.formats.source import Source
from stereovla.dataset_builder.recording.parts import Task, split_tasks

NO_NAME = "unnamed object"  # target.name of imported rows: their sources do not say which object is meant
# where an import finds what it needs, and whether it may go on; all other options decide what it makes
_NOT_CONTENT = ("out", "config", "source", "skip_bad_episodes")


@dataclass
class ImportConfig:
    """What the import commands can be told."""

    needed: ClassVar[tuple[str, ...]] = ("source", "config", "out")

    source: str = option("", "What to import: a folder, or where the format allows it the id of a dataset on the Hub.")
    config: str = option("", "YAML file about the robot and its cameras; see dataset_builder/formats/rig.py.")
    out: str = option("", "Folder of the dataset; one with an unfinished import of the same source is gone on with.")
    episodes_per_shard: int = option(16, "Episodes per parquet file: what an interruption can cost.")
    validation_episodes: int = option(0, "The last so many episodes of the split train become the split validation.")
    skip_bad_episodes: bool = option(
        False,
        "Leave out the episodes with problems, and say so in meta/info.json. Otherwise any problem stops the import.",
    )

    def __post_init__(self):
        for name in self.needed:
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if self.episodes_per_shard < 1:
            raise ValueError(f"episodes_per_shard={self.episodes_per_shard} must be at least 1")
        if self.validation_episodes < 0:
            raise ValueError(f"validation_episodes={self.validation_episodes} must not be negative")


class ProblemsFound(ValueError):
    """Episodes with problems, and nobody asked to leave them out."""


def import_dataset(config: ImportConfig, rig: Rig, source: Source) -> Path:
    """Import, or go on importing, into `config.out`; returns the folder. A finished one is left as it is."""
    folder = Path(config.out)
    content = _content(config, rig, source)
    check_folder(folder, content)
    with work_folder(folder, "import") as partial:
        if not (folder / shards.MANIFEST).exists():
            # one line per checked episode; of another source or rig, the findings are others
            identity = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
            findings = _check(partial / f"findings-{identity[:16]}.jsonl", rig, source)
            bad = [finding for finding in findings.values() if finding.problems]
            if len(bad) == len(findings) or (bad and not config.skip_bad_episodes):
                raise ProblemsFound("\n".join(problem_lines(bad) + [_advice(bad, findings)]))
            shards.write_json(folder / PLAN, content)
            good = {
                split: [name for name in names if not findings[name].problems]
                for split, names in source.splits().items()
            }
            tasks = _plan(config, good)
            _write(folder, partial, tasks, rig, source, next(iter(f for f in findings.values() if not f.problems)))
            _finish(folder, tasks, rig, source, findings, content)
    return folder


def problem_lines(findings: Sequence[Finding]) -> list[str]:
    """One line per problem, with its episode."""
    return [f"{finding.episode}: {problem}" for finding in findings for problem in finding.problems]


def _advice(bad: Sequence[Finding], findings: Mapping[str, Finding]) -> str:
    text = f"{len(bad)} of {len(findings)} episodes have problems; nothing was imported. Mend them"
    return text if len(bad) == len(findings) else f"{text}, or leave them out with --skip_bad_episodes"


def _content(config: ImportConfig, rig: Rig, source: Source) -> dict[str, Any]:
    """What decides the bytes: options, rig, source, and versions of what decodes and encodes."""
    options = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_CONTENT}
    versions = {name: importlib.metadata.version(name) for name in ("av", "numpy", "pillow", "pyarrow", "datasets")}
    values = {"options": options, "rig": dataclasses.asdict(rig), "source": source.content(), "versions": versions}
    return json.loads(json.dumps(values, default=np.ndarray.tolist))


def _check(path: Path, rig: Rig, source: Source) -> dict[str, Finding]:
    """Findings of all episodes by name. Good ones that an earlier run wrote to `path` are not made again; bad ones are,
    since the recording may have been mended.
    """
    done: dict[str, Finding] = {}
    if path.exists():
        whole = path.read_bytes()
        whole = whole[: whole.rfind(b"\n") + 1]  # a kill may have left half a line
        os.truncate(path, len(whole))
        done = {f.episode: f for f in (Finding(**json.loads(line)) for line in whole.splitlines()) if not f.problems}
    names = [name for split in source.splits().values() for name in split]
    with open(path, "a", encoding="utf-8") as file:
        for name in tqdm(names, desc="checking", unit="episode"):
            if name not in done:
                done[name] = check_episode(source, rig, name)
                file.write(json.dumps(dataclasses.asdict(done[name])) + "\n")
                file.flush()
    return equal_sizes({name: done[name] for name in names})


def _plan(config: ImportConfig, good: Mapping[str, Sequence[str]]) -> list[tuple[Task, list[str]]]:
    """All shards, with the names of their episodes in the source."""
    splits = {split: list(names) for split, names in good.items()}
    if config.validation_episodes:
        if config.validation_episodes >= len(splits.get("train", [])):
            raise ValueError(
                f"validation_episodes={config.validation_episodes} leaves nothing of the "
                f"{len(splits.get('train', []))} good episodes of the split train"
            )
        if "validation" in splits:
            raise ValueError("the source has a split validation; leave --validation_episodes out")
        splits["validation"] = splits["train"][-config.validation_episodes :]
        splits["train"] = splits["train"][: -config.validation_episodes]
    if not splits.get("train"):
        raise ValueError(f"the split train has no good episodes; splits: {', '.join(splits)}")
    return [
        (task, [names[number] for number in task.episodes])
        for split, names in splits.items()
        for task in split_tasks(split, len(names), config.episodes_per_shard)
    ]


def _write(
    folder: Path, partial: Path, tasks: list[tuple[Task, list[str]]], rig: Rig, source: Source, first: Finding
) -> None:
    layout = schema.features(state_dim=first.state_dim, action_dim=first.action_dim, columns=row_keys(rig))
    with tqdm(total=sum(len(names) for _, names in tasks), desc="importing", unit="episode") as bar:
        for task, names in tasks:
            path = folder / task.path
            # of an import that left out an episode which was mended since, shards of this name hold others
            if not (path.exists() and shards.shard_info(path).get("sources") == names):
                rows = [
                    row
                    for index, name in zip(task.episodes, names, strict=True)
                    for row in episode_rows(source, rig, name, index)
                ]
                temporary = partial / f"{task.path.name}.{os.getpid()}"
                info = {"episodes": len(names), "sources": names}
                shards.write_shard(path, rows, temporary=temporary, info=info, layout=layout)
            bar.update(len(names))


def row_keys(rig: Rig) -> list[str]:
    """Columns of what is imported."""
    calibration = [key for key in schema.CALIBRATION if rig.calibration and (rig.is_pair or key != schema.BASELINE)]
    return [
        *map(schema.image_key, rig.views),
        "observation.state",
        "action",
        "keyframe_pose",
        "state_is_pose",
        *calibration,
        "target.name",
        "task",
        "embodiment",
        "episode_index",
        "frame_index",
        "timestamp",
    ]


def episode_rows(source: Source, rig: Rig, name: str, index: int) -> Iterator[dict[str, Any]]:
    """Encoded rows of one checked episode, which becomes number `index` of its split."""
    episode = source.read(name)
    motion: Motion = map_motion(rig, episode.states, episode.actions)
    length = len(episode.timestamps_s)
    for frame, images in enumerate(islice(source.pictures(name, episode), length)):
        calibration = {
            key: check_value(key, values[frame], rig.size_px, name, rig.accept)
            for key, values in episode.calibration.items()
        }
        row = {
            **{
                schema.image_key(view): None if image is None else rig.stored(rig.part(image, view), view)
                for view, image in images.items()
            },
            "observation.state": motion.states[frame],
            "action": motion.actions[frame],
            "keyframe_pose": motion.keyframes[frame],
            "state_is_pose": rig.is_pose,
            **{f"calibration.{key}": value for key, value in (rig.moved(calibration) if calibration else {}).items()},
            "target.name": NO_NAME,
            "task": episode.tasks[frame],
            "embodiment": rig.embodiment,
            "episode_index": index,
            "frame_index": frame,
            "timestamp": float(episode.timestamps_s[frame]),
        }
        schema.validate_row(row, where=f"{name}, frame {frame}")
        yield shards.encode_row(row)


def _finish(
    folder: Path,
    tasks: list[tuple[Task, list[str]]],
    rig: Rig,
    source: Source,
    findings: Mapping[str, Finding],
    content: dict[str, Any],
) -> None:
    """Statistics, info, card, and at last the manifest, which says that the dataset is whole."""
    imported = [(task.split, task.path, len(names)) for task, names in tasks]
    splits, sentences = count_shards(folder, imported)
    stats = compute_statistics([folder / task.path for task, _ in tasks if task.split == "train"])
    shards.write_json(folder / STATS, stats)
    around = angles_around_pi(stats[rig.embodiment]["state"]) if rig.is_pose else []
    if around:
        print(
            f"{', '.join(around)} lies around pi, where its sign flips from frame to frame; the statistics go on "
            "beyond pi, so that training sees no leap. Zero is a gripper that points straight down: does the rig lack "
            "`tool`? A flange that looks down needs about [0, 0, 0.1, 3.14159, 0, 0]"
        )
    first = next(finding for finding in findings.values() if not finding.problems)
    info = {
        "fps": source.fps,
        "embodiments": [rig.embodiment],
        "tasks": sentences,
        "splits": splits,
        "columns": row_keys(rig),
        "views": list(rig.views),
        "state_dim": first.state_dim,
        "action_dim": first.action_dim,
        "state_is_pose": rig.is_pose,
        "angles_around_pi": around,
        **({"vertical_misalignment_px": rig.stored_misalignment_px} if rig.is_pair else {}),
        "license": rig.license,
        "source": content["source"],
        "dropped": {name: finding.problems for name, finding in findings.items() if finding.problems},
        "cut_frames": {name: finding.cut for name, finding in findings.items() if finding.cut and not finding.problems},
        "not_judged": [name for name, finding in findings.items() if not finding.judged],
        "import": content,
    }
    describe_folder(folder, info, imported)
