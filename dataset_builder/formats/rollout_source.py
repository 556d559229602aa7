"""Reads the rollouts that a robot's computer recorded: folders episode_000007 of `serving/recording.py`.

They say themselves what a rig says, so that no file about the robot is needed; one may still crop and resize, state the
camera's pose, or accept what is not plausible.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stereovla.command_line import option
from stereovla.dataset_builder.dataset.schema import CALIBRATION_KEYS
from stereovla.dataset_builder.formats.importing import ImportConfig
from stereovla.dataset_builder.formats.rig import Rig, make_rig
from stereovla.dataset_builder.formats.source import EpisodeError, SourceEpisode
from stereovla.dataset_builder.formats.video import VideoError
from stereovla.processing.state_entries import POSES
from stereovla.sources import existing_folder
from stereovla.untrusted import inside, open_image, read_yaml

FORMAT = "stereovla rollout 1"
HEADER, STEPS = "episode.json", "steps.jsonl"
NAME = re.compile(r"episode_\d{6,}")
SHARED = ("embodiment", "state_names", "rate_hz", "views")  # the same in all episodes of a dataset
NEEDED = {"format": str, "embodiment": str, "state_names": list, "rate_hz": float, "instruction": str, "steps": int}
NEEDED |= {"success": bool, "views": dict}
FAILURE = "failure"  # the split of failed episodes
RECORDED = "recorded"  # of the rig's calibration: each episode has its own


@dataclass
class RolloutImportConfig(ImportConfig):
    """Imports the rollouts that a robot recorded; every problem of them is named, exit status 1 if there is any."""

    needed: ClassVar[tuple[str, ...]] = ("source", "license", "out")

    config: str = option("", "YAML file with what is to be otherwise than recorded, by the keys of a rig: crop_px, ...")
    license: str = option("", "Of the data, for the dataset's card, such as cc-by-4.0.")
    failures: str = option(
        "leave_out",
        "What becomes of failed episodes: left out, or a split of their own.",
        choices=["leave_out", "split"],
    )


def open_rollouts(config: RolloutImportConfig) -> tuple["RolloutSource", Rig]:
    """The episodes in the folder `config.source`, and the rig that they were recorded with."""
    source = RolloutSource(existing_folder(config.source, "folder of rollouts"), config.failures == "split")
    first = source.first
    is_pose = tuple(first["state_names"]) == POSES[7]
    pose = {"position": [0, 1, 2], "rpy": [3, 4, 5], "gripper": 6} if is_pose else {}
    content: dict[str, Any] = {
        "embodiment": first["embodiment"],
        "license": config.license,
        "cameras": {view: view for view in first["views"]},
        "state": {"column": "state", **pose, **({"gripper_closed_open": [0, 1]} if is_pose else {})},
        "action": {
            "column": "action",
            **pose,
            **({"kind": "delta", "gripper_closed_open": [-1, 1]} if is_pose else {}),
        },
    }
    recorded = first.get("calibration") or {}
    if recorded:
        content["calibration"] = {"size_px": first["views"]["left"]}
        content["calibration"] |= {key: RECORDED for key in CALIBRATION_KEYS if key in recorded}
    if config.config:
        path = Path(config.config)
        given = read_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        if not isinstance(given, Mapping):
            raise ValueError(f"{path} is {reprlib.repr(given)}, expected keys and values of a rig")
        calibration = {**content.get("calibration", {}), **(given.get("calibration") or {})}
        content |= {**given, **({"calibration": calibration} if calibration else {})}
    source.rig = make_rig(content, config.config or f"{source.folder} as recorded")
    return source, source.rig


class RolloutSource:
    """See `source.Source`; episodes are named by their folder.

    Args:
        keep_failures: as a split of their own.
    """

    rig: Rig

    def __init__(self, folder: Path, keep_failures: bool):
        self.folder, self.keep_failures = folder, keep_failures
        self._names = sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))
        if not self._names:
            raise ValueError(f"{folder} holds no rollouts: no folder episode_000000, episode_000001, ... in it")
        self._headers: dict[str, dict[str, Any] | EpisodeError] = {}
        for name in self._names:
            try:
                self._headers[name] = _header(self.folder, name)
            except EpisodeError as error:
                self._headers[name] = error
        good = [header for header in self._headers.values() if isinstance(header, dict)]
        if not good:
            raise ValueError(f"{folder}, {self._names[0]}: {self._headers[self._names[0]]}")
        self.first = good[0]
        self.fps = float(self.first["rate_hz"])

    def content(self) -> dict[str, Any]:
        """See `source.Source`."""
        files = sorted(path for name in self._names for path in (self.folder / name).rglob("*") if path.is_file())
        listing: list[Any] = [[path.relative_to(self.folder).as_posix(), path.stat().st_size] for path in files]
        listing += [path.read_text(encoding="utf-8", errors="replace") for path in files if path.name == HEADER]
        return {"format": FORMAT, "sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest()}

    def splits(self) -> dict[str, list[str]]:
        """See `source.Source`. Episodes that cannot be read are among those of train, whose problem is named."""
        failed = [name for name, header in self._headers.items() if isinstance(header, dict) and not header["success"]]
        splits = {"train": [name for name in self._names if name not in failed]}
        return splits | ({FAILURE: failed} if self.keep_failures and failed else {})

    def read(self, name: str) -> SourceEpisode:
        """See `source.Source`."""
        header = self._headers[name]
        if isinstance(header, EpisodeError):
            raise header
        for key in SHARED:
            if header[key] != self.first[key]:
                raise EpisodeError(f"{key} is {header[key]!r}, that of the first episode {self.first[key]!r}")
        lines = _steps(self.folder, name)
        if len(lines) != header["steps"]:
            raise EpisodeError(f"{STEPS} has {len(lines)} lines, {HEADER} says {header['steps']} steps")
        times = np.array([line["timestamp"] for line in lines], dtype=np.float64)
        recorded, calibration = header.get("calibration") or {}, {}
        for key, value in self.rig.stated_calibration().items():
            if isinstance(value, str) and key not in recorded:
                raise EpisodeError(f"the calibration has no {key}; it has {', '.join(recorded) or 'nothing'}")
            try:
                own = np.asarray(recorded[key] if isinstance(value, str) else value, dtype=np.float64)
            except (TypeError, ValueError) as error:
                raise EpisodeError(f"{key} of the calibration is {reprlib.repr(recorded[key])}") from error
            calibration[key] = np.broadcast_to(own, (len(lines), *own.shape))
        return SourceEpisode(
            timestamps_s=times - times[0],
            states=np.array([line["state"] for line in lines], dtype=np.float64),
            actions=np.array([line["action"] for line in lines], dtype=np.float64),
            tasks=[header["instruction"]] * len(lines),
            calibration=calibration,
        )

    def pictures(self, name: str, episode: SourceEpisode) -> Iterator[dict[str, np.ndarray | None]]:
        """See `source.Source`."""
        for step in range(len(episode.timestamps_s)):
            yield {view: self._picture(name, self.rig.cameras[view], step) for view in self.rig.views}

    def _picture(self, name: str, camera: str, step: int) -> np.ndarray:
        path = f"{name}/{camera}/{step:06d}.jpg"
        try:
            return np.asarray(open_image(inside(self.folder, path).read_bytes(), ("JPEG",)).convert("RGB"))
        except (OSError, ValueError) as error:
            raise VideoError(f"{path} cannot be read: {error}") from error


def _header(folder: Path, name: str) -> dict[str, Any]:
    try:
        header = json.loads(inside(folder, f"{name}/{HEADER}").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EpisodeError(f"{HEADER} cannot be read: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise EpisodeError(f"{HEADER} is no header of {FORMAT!r}")
    for key, kind in NEEDED.items():
        if not isinstance(header.get(key), kind):
            raise EpisodeError(f"{key} of {HEADER} is {reprlib.repr(header.get(key))}, expected a {kind.__name__}")
    if "left" not in header["views"]:
        raise EpisodeError(f"the views are {', '.join(header['views'])}; left, the main one, must be there")
    return header


def _steps(folder: Path, name: str) -> list[dict[str, Any]]:
    """Checked lines of the steps, all of the same sizes."""
    try:
        text = inside(folder, f"{name}/{STEPS}").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EpisodeError(f"{STEPS} cannot be read: {error}") from error
    lines: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines()):
        try:
            found = json.loads(line)
        except ValueError as error:
            raise EpisodeError(f"line {number} of {STEPS} is no JSON: {error}") from error
        if not isinstance(found, dict) or not _is_number(found.get("timestamp")):
            raise EpisodeError(f"line {number} of {STEPS} has no timestamp: {reprlib.repr(found)}")
        for key in ("state", "action"):
            value = found.get(key)
            size = len(lines[0][key]) if lines else None
            if not _are_numbers(value) or size not in (None, len(value)):
                wanted = "numbers" if size is None else f"{size} numbers"
                raise EpisodeError(f"line {number} of {STEPS}: {key} is {reprlib.repr(value)}, expected {wanted}")
        lines.append(found)
    if not lines:
        raise EpisodeError(f"{STEPS} is empty")
    return lines


def _is_number(value: Any) -> bool:
    small = not isinstance(value, int) or abs(value) < 2**53  # beyond, no float has it
    return isinstance(value, int | float) and not isinstance(value, bool) and small


def _are_numbers(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(map(_is_number, value))
