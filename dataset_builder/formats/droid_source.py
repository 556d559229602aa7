"""Reads raw episodes of DROID: a folder per episode with metadata, trajectory.h5 and videos of ZED cameras.

Facts of the format, from https://github.com/droid-dataset/droid and its documentation:

- metadata_*.json: uuid, success, current_task, {wrist,ext1,ext2}_cam_serial, and {...}_cam_extrinsics, the pose of the
  left camera in the robot base: x, y, z (m), Euler angles "xyz" (rad), which is R = Rz Ry Rx.
- trajectory.h5: observation/robot_state/cartesian_position (n, 6) (m, rad, the same angles) and gripper_position (n,)
  (0 = open, 1 = closed), action/gripper_position (n,) (what was commanded),
  observation/camera_extrinsics/{serial}_left (n, 6), observation/timestamp/cameras/{serial}_estimated_capture (ms).
- recordings/MP4/{serial}-stereo.mp4: left and right view side by side, rectified, one frame per row of trajectory.h5;
  recordings/MP4/{serial}.mp4: the left view alone, which not every copy of the data has.
- aggregated-annotations-*.json, one file for all: {uuid: {"language_instruction1": ...}}.

Recorded at 15 Hz. The YAML file's `cameras` is {stereo: CAMERA}, or of one view {left: CAMERA}, and any further views,
such as {hand: CAMERA}; a CAMERA is wrist, ext1 or ext2. The intrinsics are not in this data; they come from that file,
where transform_camera_to_base may be "recorded". `tool` should say how our tool frame lies in the frame that the arm
reports. Actions are the changes of the recorded pose from frame to frame.
"""

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.dataset.hdf5 import own_data
from stereovla.dataset_builder.formats.importing import ImportConfig
from stereovla.dataset_builder.formats.rig import STEREO, Rig, Vector
from stereovla.dataset_builder.formats.source import EpisodeError, SourceEpisode
from stereovla.dataset_builder.formats.video import VideoError, frame_times, read_all_frames
from stereovla.extras import extra
from stereovla.processing.rotations import rpy_to_matrix
from stereovla.sources import existing_folder
from stereovla.untrusted import inside

with extra("data"):
    import h5py

FPS = 15.0  # control rate of the DROID platform
MOST_NUMBERS = 10**7  # in a column; 6 numbers at 15 Hz for 30 hours
CAMERAS = ("wrist", "ext1", "ext2")
RECORDED = "recorded"
_SIDE_BY_SIDE = "-stereo"  # at the end of the names of videos that show both views
_FEW = 5  # frames that a recorder may write to one of video and trajectory only
_STATE = Vector("robot_state", position=(0, 1, 2), rpy=(3, 4, 5), gripper=6, gripper_closed_open=(1.0, 0.0))
_ACTION = Vector("gripper_position", kind="from_states", gripper=0, gripper_closed_open=(1.0, 0.0))


@dataclass
class DroidImportConfig(ImportConfig):
    """Imports DROID's raw episodes; every problem of them is named, exit status 1 if there is any."""

    annotations: str = option(
        "", "JSON file of instructions (aggregated-annotations-*.json); without it the metadata's current_task is used."
    )
    cut_frames: int = option(
        0,
        "Where trajectory and video of an episode differ by up to so many frames, keep those that both have: what one "
        "has more at its end is left out, and counted in meta/info.json. 0 refuses such episodes.",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.cut_frames < 0:
            raise ValueError(f"cut_frames={self.cut_frames} must not be negative")


def open_droid(config: DroidImportConfig, rig: Rig) -> tuple["DroidSource", Rig]:
    """The episodes below the folder `config.source`, and the rig with what the format says itself."""
    if rig.state is not None or rig.action is not None or rig.parts_px is not None:
        raise ValueError("leave state, action and parts_px out of the rig: DROID's format says where they are")
    if "right" in rig.cameras or not set(rig.cameras.values()) <= set(CAMERAS):
        raise ValueError(
            f"cameras is {dict(rig.cameras)}; DROID needs {{stereo: one of {', '.join(CAMERAS)}}}, or left in place of "
            "stereo, and any further views of these"
        )
    for key, value in rig.calibration_columns().items():
        if key != "transform_camera_to_base" or value != RECORDED:
            raise ValueError(f"{key} is {value!r}; only transform_camera_to_base can be {RECORDED!r}")
    annotations = None
    if config.annotations:
        annotations = shards.read_json(Path(config.annotations))
        if not isinstance(annotations, dict) or not all(isinstance(entry, dict) for entry in annotations.values()):
            raise ValueError(f"{config.annotations}: expected {{uuid: {{language_instruction1: ...}}, ...}}")
    rig = dataclasses.replace(rig, state=_STATE, action=_ACTION)
    return DroidSource(existing_folder(config.source, "recording of DROID"), rig, annotations, config.cut_frames), rig


class DroidSource:
    """See `source.Source`; episodes are named by their folder below `folder`."""

    def __init__(self, folder: Path, rig: Rig, annotations: dict[str, Any] | None, cut_frames: int = 0):
        self.folder, self.rig, self.annotations, self.cut_frames = folder, rig, annotations, cut_frames
        self.fps = float(rig.fps or FPS)
        # a folder of an episode is one that has its metadata or its trajectory, so that a lost file is noticed
        found = [*folder.glob("**/trajectory.h5"), *folder.glob("**/metadata_*.json")]
        self._names = sorted({path.parent.relative_to(folder).as_posix() for path in found})
        if not self._names:
            raise ValueError(f"{folder} holds no episodes: no trajectory.h5 and no metadata_*.json below it")

    def content(self) -> dict[str, Any]:
        """See `source.Source`."""
        files = sorted(path for name in self._names for path in (self.folder / name).rglob("*") if path.is_file())
        listing = [[path.relative_to(self.folder).as_posix(), path.stat().st_size] for path in files]
        listing.append(["annotations", self.annotations])
        return {"format": "DROID raw", "sha256": hashlib.sha256(json.dumps(listing).encode()).hexdigest()}

    def splits(self) -> dict[str, list[str]]:
        """See `source.Source`."""
        return {"train": self._names}

    def read(self, name: str) -> SourceEpisode:
        """See `source.Source`."""
        metadata = self._metadata(name)
        camera = self._main
        serial = self._serial(name, camera)
        try:
            with h5py.File(inside(self.folder, f"{name}/trajectory.h5")) as file:
                poses = _column(file, "observation/robot_state/cartesian_position", 6)
                opening = _column(file, "observation/robot_state/gripper_position")
                command = _column(file, "action/gripper_position")
                times = _column(file, f"observation/timestamp/cameras/{serial}_estimated_capture")
                try:
                    extrinsics = _column(file, f"observation/camera_extrinsics/{serial}_left", 6)
                except KeyError:
                    extrinsics = None
        except EpisodeError:
            raise
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise EpisodeError(f"trajectory.h5 cannot be read: {error}") from error
        lengths = {"cartesian_position": len(poses), "gripper_position": len(opening), "commands": len(command)}
        lengths |= {"timestamps": len(times)} | ({} if extrinsics is None else {"camera_extrinsics": len(extrinsics)})
        length = len(poses)
        if not length or set(lengths.values()) != {length}:
            raise EpisodeError(f"trajectory.h5 holds columns of different lengths, or nothing: {lengths}")
        problems = []
        if metadata.get("success") is False:
            problems.append("the metadata says that the demonstration failed")
        if metadata.get("trajectory_length", length) != length:
            problems.append(f"trajectory.h5 has {length} frames, the metadata says {metadata['trajectory_length']}")
        if extrinsics is None and metadata.get(f"{camera}_cam_extrinsics") and camera != "wrist":
            extrinsics = np.tile(_six(metadata, f"{camera}_cam_extrinsics"), (length, 1))
        kept, cut = self._common(name, length)
        calibration = self.rig.stated_calibration()
        transforms = calibration.pop("transform_camera_to_base", None)
        if isinstance(transforms, str):
            if extrinsics is None:
                raise EpisodeError(f"there are no extrinsics of the camera {camera} ({serial})")
            transforms = np.tile(np.eye(4), (length, 1, 1))
            transforms[:, :3, :3], transforms[:, :3, 3] = rpy_to_matrix(extrinsics[:, 3:]), extrinsics[:, :3]
        elif transforms is not None:
            calibration["transform_camera_to_base"] = transforms
            transforms = None
        values = {key: np.broadcast_to(value, (length, *np.shape(value))) for key, value in calibration.items()}
        if transforms is not None:
            values["transform_camera_to_base"] = transforms
        return SourceEpisode(
            timestamps_s=(times[:kept] - times[0]) / 1000,
            states=np.concatenate([poses, opening[:, None]], axis=1)[:kept],
            actions=command[:kept, None],
            tasks=[self._instruction(metadata)] * kept,
            calibration={key: value[:kept] for key, value in values.items()},
            problems=problems,
            cut=cut,
        )

    def _common(self, name: str, length: int) -> tuple[int, int]:
        """(how many of `length` frames are kept, how many that only the trajectory or only the video has are cut)."""
        paths = {self._video(name, view) for view in self.rig.cameras}
        if not self.cut_frames or not all(path.is_file() for path in paths):
            return length, 0
        try:
            counts = [length, *(len(frame_times(path)) for path in paths)]
        except VideoError:  # `pictures` says why
            return length, 0
        common, cut = min(counts), max(counts) - min(counts)
        return (common, cut) if common and cut <= self.cut_frames else (length, 0)

    def pictures(self, name: str, episode: SourceEpisode) -> Iterator[dict[str, np.ndarray | None]]:
        """See `source.Source`."""
        streams = [self._views(name, view, episode) for view in self.rig.cameras]
        for images in zip(*streams, strict=True):  # each is as long as the data, or says why not
            found = {view: image for part in images for view, image in part.items()}
            yield {view: found[view] for view in self.rig.views}

    def _views(self, name: str, view: str, episode: SourceEpisode) -> Iterator[dict[str, np.ndarray]]:
        """Pictures of one entry of the rig's cameras."""
        path = self._video(name, view)
        if not path.is_file():
            raise VideoError(f"recordings/MP4/{path.name} is missing")
        length, frame = len(episode.timestamps_s), -1
        for frame, image in enumerate(read_all_frames(path)):
            if frame < length:
                half = image.shape[1] // 2
                if view == STEREO:
                    yield {"left": image[:, :half], "right": image[:, half:]}
                else:
                    yield {view: image[:, :half] if path.stem.endswith(_SIDE_BY_SIDE) else image}
        count = frame + 1
        if not length <= count <= length + episode.cut:
            few = abs(count - length) <= _FEW
            hint = f"; --cut_frames {abs(count - length)} leaves out what only one of them has" if few else ""
            raise VideoError(f"frame {min(count, length)}: {path.name} has {count} frames, the data {length}{hint}")

    def _video(self, name: str, view: str) -> Path:
        start = f"{name}/recordings/MP4/{self._serial(name, self.rig.cameras[view])}"
        alone = inside(self.folder, f"{start}.mp4")
        return alone if view != STEREO and alone.is_file() else inside(self.folder, f"{start}{_SIDE_BY_SIDE}.mp4")

    def _metadata(self, name: str) -> dict[str, Any]:
        files = sorted((self.folder / name).glob("metadata_*.json"))
        if len(files) != 1:
            raise EpisodeError(f"there are {len(files)} files metadata_*.json, expected one")
        try:
            metadata = shards.read_json(inside(self.folder, files[0].relative_to(self.folder)))
        except ValueError as error:
            raise EpisodeError(str(error)) from error
        if not isinstance(metadata, dict):
            raise EpisodeError(f"{files[0].name} is {reprlib.repr(metadata)}, expected keys and values")
        return metadata

    @property
    def _main(self) -> str:
        """The camera whose left view is ours."""
        return self.rig.cameras[STEREO if STEREO in self.rig.cameras else "left"]

    def _serial(self, name: str, camera: str) -> str:
        key = f"{camera}_cam_serial"
        metadata = self._metadata(name)
        serial = metadata.get(key)
        if not serial or not isinstance(serial, str | int):
            raise EpisodeError(f"the metadata has no {key}" if not serial else f"{key} of the metadata is {serial!r}")
        if not re.fullmatch(r"\w{1,40}", str(serial)):
            raise EpisodeError(f"the metadata's {key} is {str(serial)[:60]!r}; a serial number has letters and digits")
        return str(serial)

    def _instruction(self, metadata: dict[str, Any]) -> str:
        """The first annotation, or without a file of these the metadata's task; empty where there is none."""
        if self.annotations is not None:
            said = self.annotations.get(str(metadata.get("uuid")), {}).get("language_instruction1")
        else:
            said = metadata.get("current_task")
        if not isinstance(said, str | None):
            raise EpisodeError(f"the instruction is {reprlib.repr(said)}, expected text")
        return said or ""


def _column(file: h5py.File, key: str, width: int | None = None) -> np.ndarray:
    """Numbers of trajectory.h5 as float64, (n,) or (n, width); EpisodeError names what they are instead, ValueError
    what lies outside of the file, or declares more than an episode has.
    """
    item = own_data(file, key, MOST_NUMBERS)
    shape = () if width is None else (width,)
    if item.dtype.kind not in "fiu" or not item.shape or item.shape[1:] != shape:
        raise EpisodeError(f"{key} of trajectory.h5 is {item}, expected numbers of shape {('n', *shape)}")
    return np.array(item, dtype=np.float64)


def _six(metadata: dict[str, Any], key: str) -> np.ndarray:
    """x, y, z, roll, pitch, yaw of the metadata, float64 (6,)."""
    value = metadata[key]
    numbers = isinstance(value, list) and len(value) == 6 and all(isinstance(item, int | float) for item in value)
    if not numbers or not np.isfinite(value).all():
        raise EpisodeError(f"{key} of the metadata is {reprlib.repr(value)}, expected 6 numbers")
    return np.array(value, dtype=np.float64)
