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
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.episode_checks import (
    chosen_frames,
    pair_problems,
    timestamp_problems,
    view_problems,
)
from stereovla.dataset_builder.dataset.folders import (
    PLAN,
    STATS,
    check_folder,
    count_shards,
    describe_folder,
    work_folder,
)
from stereovla.dataset_builder.dataset.statistics import angles_around_pi, compute_statistics
from stereovla.dataset_builder.formats import plausibility
from stereovla.dataset_builder.formats.rig import SHAPES, Rig, check_value
from stereovla.dataset_builder.formats.robot_mapping import Motion, map_motion
from stereovla.dataset_builder.formats.source import EpisodeError, Source, SourceEpisode
from stereovla.dataset_builder.formats.video import VideoError
from stereovla.dataset_builder.recording.parts import Task, split_tasks

NO_NAME = "unnamed object"  # target.name of imported rows: their sources do not say which object is meant
COLUMNS = (
    *schema.PAIR,
    "observation.state",
    "action",
    "keyframe_pose",
    "state_is_pose",
    *(f"calibration.{key}" for key in schema.CALIBRATION_KEYS),
    "target.name",
    "task",
    "embodiment",
    "episode_index",
    "frame_index",
    "timestamp",
)
# where an import finds what it needs, and whether it may go on; all other options decide what it makes
_NOT_CONTENT = ("out", "config", "source", "skip_bad_episodes")


@dataclass
class ImportConfig:
    """What the import commands can be told."""

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
        for name in ("source", "config", "out"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing")
        if self.episodes_per_shard < 1:
            raise ValueError(f"episodes_per_shard={self.episodes_per_shard} must be at least 1")
        if self.validation_episodes < 0:
            raise ValueError(f"validation_episodes={self.validation_episodes} must not be negative")


@dataclass(frozen=True)
class Finding:
    """What the check of one episode found."""

    episode: str
    problems: list[str]
    state_dim: int = 0
    action_dim: int = 0
    judged: bool = True  # False: no pair has enough structure to be matched
    cut: int = 0  # frames at the end that were left out, as was asked


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
        path.write_bytes(whole)
        done = {f.episode: f for f in (Finding(**json.loads(line)) for line in whole.splitlines()) if not f.problems}
    names = [name for split in source.splits().values() for name in split]
    with open(path, "a", encoding="utf-8") as file:
        for name in tqdm(names, desc="checking", unit="episode"):
            if name not in done:
                done[name] = check_episode(source, rig, name)
                file.write(json.dumps(dataclasses.asdict(done[name])) + "\n")
                file.flush()
    return _equal_sizes({name: done[name] for name in names})


def _equal_sizes(findings: dict[str, Finding]) -> dict[str, Finding]:
    """A problem for every episode whose vectors have other sizes than those of the first good one."""
    first = next((f for f in findings.values() if not f.problems), None)
    for name, finding in findings.items():
        if finding.problems:
            continue
        sizes, expected = (finding.state_dim, finding.action_dim), (first.state_dim, first.action_dim)
        if sizes != expected:
            text = f"state and action have {sizes} numbers, those of {first.episode} {expected}"
            findings[name] = dataclasses.replace(finding, problems=[text])
    return findings


def check_episode(source: Source, rig: Rig, name: str) -> Finding:
    """Read and decode one episode, and name everything that is wrong with it."""
    try:
        episode = source.read(name)
    except EpisodeError as error:
        return Finding(name, [str(error)])
    times = np.asarray(episode.timestamps_s, dtype=np.float32)  # as they are stored
    problems = [*episode.problems, *timestamp_problems(times, source.fps)]
    if times[0] < 0:
        problems.append(f"frame 0: the timestamp is {times[0]:.4f} s, expected 0 or more: from the episode's start")
    problems += [f"frame {frame}: there is no instruction" for frame, t in enumerate(episode.tasks) if not t.strip()]
    calibration = _calibration_problems(rig, episode)
    motion = map_motion(rig, episode.states, episode.actions)
    problems += calibration + motion.problems
    if not calibration and not motion.problems:
        problems += _motion_problems(rig, episode, motion, source.fps)
    found, judged = _picture_problems(source, rig, name, episode)
    sizes = (motion.states.shape[1], motion.actions.shape[1])
    return Finding(name, problems + found, *sizes, judged, episode.cut)


def _motion_problems(rig: Rig, episode: SourceEpisode, motion: Motion, fps: float) -> list[str]:
    """What is not plausible of poses and actions: units, kinds, and a tool that the camera does not see."""
    if not rig.is_pose:
        return []
    problems: list[str] = []
    if "units" not in rig.accept:
        vectors = [("state", rig.state, episode.states)]
        if rig.action.kind == "absolute":
            vectors.append(("action", rig.action, episode.actions))
        for name, vector, values in vectors:
            positions, angles = values[:, vector.position], values[:, vector.rpy]
            problems += plausibility.pose_problems(name, positions, angles)
        problems = problems or plausibility.step_problems(motion.actions[:, :6])
        if rig.action.kind == "delta":
            problems = problems or plausibility.delta_problems(motion.states[:, :6], motion.actions[:, :6], fps)
    if "camera_pose" not in rig.accept and not problems:
        calibration = {
            key: np.reshape(episode.calibration[key], (len(motion.states), *shape))
            for key, shape in SHAPES.items()
            if key != "baseline_m"
        }
        problems += filter(None, [plausibility.view_of_tool_problem(motion.states[:, :3], calibration, rig.size_px)])
    return problems


def _calibration_problems(rig: Rig, episode: SourceEpisode) -> list[str]:
    """Problems of those calibrations that differ from the frame before."""
    problems, before = [], None
    for frame in range(len(episode.timestamps_s)):
        given = {key: values[frame] for key, values in episode.calibration.items()}
        if before is not None and all(np.array_equal(given[key], before[key]) for key in given):
            continue
        before, where = given, f"frame {frame}"
        try:
            checked = {key: check_value(key, value, rig.size_px, where, rig.accept) for key, value in given.items()}
        except ValueError as error:
            problems.append(str(error))
            continue
        point = rig.moved(checked)["principal_point_px"]
        if not ((point >= 0) & (point <= rig.stored_size_px)).all():
            problems.append(
                f"{where}: after crop_px and resize_px, the principal point {point.tolist()} lies outside the view of "
                f"{list(rig.stored_size_px)} px"
            )
    return problems


def _picture_problems(source: Source, rig: Rig, name: str, episode: SourceEpisode) -> tuple[list[str], bool]:
    """Problems of the pictures, all of which are decoded, and whether a pair could be judged."""
    problems: list[str] = []
    taken, stored = {}, {}  # some pairs as they were taken, and as the files that will be written
    length = len(episode.timestamps_s)
    chosen = chosen_frames(length)
    try:
        for frame, images in enumerate(source.pairs(name, episode)):
            views = [rig.part(image, side) for image, side in zip(images, ("left", "right"), strict=True)]
            sizes = [(view.shape[1], view.shape[0]) for view in views]
            for side, size in zip(("left", "right"), sizes, strict=True):
                if size != rig.size_px:
                    problems.append(
                        f"frame {frame}: the {side} view is {size[0]}x{size[1]} px, "
                        f"the calibration is of {rig.size_px[0]}x{rig.size_px[1]} px"
                    )
            if frame in chosen and sizes == [rig.size_px] * 2:
                taken[frame] = views
                stored[frame] = [shards.encode_image(schema.PAIR[0], rig.view(view)) for view in views]
    except VideoError as error:
        return [*problems, str(error)], True
    found, judged = view_problems(stored, rig.stored_misalignment_px)
    if (rig.crop_px or rig.resize_px) and not found:  # the whole views show more
        found, more = pair_problems(taken, rig.vertical_misalignment_px)
        found, judged = [f"{line}, before crop and resize" for line in found], judged or more
    return problems + found, judged or not stored


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
    layout = schema.features(state_dim=first.state_dim, action_dim=first.action_dim, columns=COLUMNS)
    with tqdm(total=sum(len(names) for _, names in tasks), desc="importing", unit="episode") as bar:
        for task, names in tasks:
            if not (folder / task.path).exists():
                rows = [
                    row
                    for index, name in zip(task.episodes, names, strict=True)
                    for row in episode_rows(source, rig, name, index)
                ]
                temporary = partial / f"{task.path.name}.{os.getpid()}"
                info = {"episodes": len(names), "sources": names}
                shards.write_shard(folder / task.path, rows, temporary=temporary, info=info, layout=layout)
            bar.update(len(names))


def episode_rows(source: Source, rig: Rig, name: str, index: int) -> Iterator[dict[str, Any]]:
    """Encoded rows of one checked episode, which becomes number `index` of its split."""
    episode = source.read(name)
    motion: Motion = map_motion(rig, episode.states, episode.actions)
    length = len(episode.timestamps_s)
    for frame, images in enumerate(islice(source.pairs(name, episode), length)):
        left, right = (rig.view(rig.part(image, side)) for image, side in zip(images, ("left", "right"), strict=True))
        calibration = {
            key: check_value(key, values[frame], rig.size_px, name, rig.accept)
            for key, values in episode.calibration.items()
        }
        row = {
            "observation.images.left": left,
            "observation.images.right": right,
            "observation.state": motion.states[frame],
            "action": motion.actions[frame],
            "keyframe_pose": motion.keyframes[frame],
            "state_is_pose": rig.is_pose,
            **{f"calibration.{key}": value for key, value in rig.moved(calibration).items()},
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
        "columns": list(COLUMNS),
        "state_dim": first.state_dim,
        "action_dim": first.action_dim,
        "state_is_pose": rig.is_pose,
        "angles_around_pi": around,
        "vertical_misalignment_px": rig.stored_misalignment_px,
        "license": rig.license,
        "source": content["source"],
        "dropped": {name: finding.problems for name, finding in findings.items() if finding.problems},
        "cut_frames": {name: finding.cut for name, finding in findings.items() if finding.cut and not finding.problems},
        "not_judged": [name for name, finding in findings.items() if not finding.judged],
        "import": content,
    }
    describe_folder(folder, info, imported)
