"""LIBERO's own demonstrations, HDF5 files with the simulator's states, rendered again in stereo.

A file of LIBERO holds one task: `data/demo_N/states` (T, n) and `data/demo_N/actions` (T, 7) at 20 Hz, and in the
attribute `model_file` of each demonstration the scene's XML, from which the poses of its fixtures are taken. Every
second state becomes a frame; its action is how the tool moved until the next.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.hdf5 import h5py, own_data
from stereovla.dataset_builder.dataset.shards import encode_row
from stereovla.dataset_builder.recording.recorder import seen_row
from stereovla.processing.rotations import matrix_to_rpy
from stereovla.simulation.libero import LiberoWorld
from stereovla.simulation.libero.robot import SUBSTEPS
from stereovla.simulation.libero.suites import suite_tasks

SUFFIX = "_demo.hdf5"  # behind the task's name
MOST_NUMBERS = 10**7  # of the states of a demonstration
MOST_XML_CHARACTERS = 10**7
NOT_SOLVED = "LIBERO's check does not hold at the end"


@dataclass(frozen=True)
class Demonstration:
    """Where one is: its file, its group in it, and the number of its task in the suite."""

    path: Path
    group: str
    task: int


def find_demonstrations(folder: Path, suite: str) -> list[Demonstration]:
    """Those in a folder, by task and number; ValueError for files that are of no task of the suite."""
    names = {task.definition.stem: number for number, task in enumerate(suite_tasks(suite))}
    files = sorted(folder.glob(f"*{SUFFIX}"))
    unknown = [path.name for path in files if path.name.removesuffix(SUFFIX) not in names]
    if unknown or not files:
        raise ValueError(
            f"{folder} holds {', '.join(unknown) or 'no demonstrations'}; those of {suite} are called "
            f"{', '.join(f'{name}{SUFFIX}' for name in names)}"
        )
    found = []
    for path in files:
        with _opened(path) as file:
            data = file.get("data")
            groups = [name for name in data if name.startswith("demo_")] if isinstance(data, h5py.Group) else []
        if not groups:
            raise ValueError(f"{path} has no groups data/demo_N")
        groups.sort(key=lambda name: (len(name), name))
        found += [Demonstration(path, f"data/{name}", names[path.name.removesuffix(SUFFIX)]) for name in groups]
    return sorted(found, key=lambda one: one.task)


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file; ValueError, which names it, for what cannot be read of it within."""
    try:
        with h5py.File(path) as file:
            yield file
    except (KeyError, OSError) as error:  # h5py's, which do not name the file
        raise ValueError(f"{path} cannot be read: {error}") from error


class Replayer:
    """Renders the demonstrations of a `DemonstrationsConfig`; has the interface of `Recorder`."""

    def __init__(self, config: Any):
        self.config = config
        self.world = LiberoWorld(config.world_config())
        order = np.random.default_rng(config.seed).permutation(len(config.found))
        count = config.validation_episodes
        self._of_split = {"validation": np.sort(order[:count]), "train": np.sort(order[count:])}

    def close(self) -> None:
        """Free the renderer."""
        self.world.close()

    def episode(self, seed: int, split: str, index: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Encoded rows of demonstration `index` of a split, and what is wrong with it."""
        number = int(self._of_split[split][index])
        one = self.config.found[number]
        where = f"{one.path.name}, {one.group}"
        states, actions, fixtures = read_demonstration(one)
        world, rows, poses = self.world, [], []
        camera = np.random.default_rng((seed, number))
        for frame, at in enumerate(range(0, len(states), SUBSTEPS)):
            world.replay(one.task, states[at], fixtures, None if frame else camera)
            if frame and self.config.camera_per_frame:
                world.redraw_camera(camera)
            rows.append(self._row(index, frame))
            poses.append(world.robot.tool_pose())
        world.replay(one.task, states[-1], fixtures)  # which is no frame where their number is even
        solved = world.success
        for frame, row in enumerate(rows):
            row["action"] = _motion(poses, frame, actions[min(SUBSTEPS * (frame + 1), len(actions)) - 1, 6])
            if not frame:
                schema.validate_row(row, where=where)
        return [encode_row(row) for row in rows], [] if solved else [NOT_SOLVED]

    def _row(self, index: int, frame: int) -> dict[str, Any]:
        return seen_row(self.world, self.world.observe(labels=self.config.labels), index, frame)


def _motion(poses: list[tuple[np.ndarray, np.ndarray]], frame: int, gripper: float) -> np.ndarray:
    """float32 (7,): from one pose to the next, and our gripper command for LIBERO's, which closes above 0."""
    (position, rotation), (then, turned) = poses[frame], poses[min(frame + 1, len(poses) - 1)]
    return np.array([*(then - position), *matrix_to_rpy(turned @ rotation.T), -np.sign(gripper)], np.float32)


def read_demonstration(one: Demonstration) -> tuple[np.ndarray, np.ndarray, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """States (T, n), actions (T, 7), and {name of a body: position (3,), quaternion (4,)} of the scene's XML."""
    where = f"{one.path}, {one.group}"
    with _opened(one.path) as file:
        arrays = {}
        for name in ("states", "actions"):
            arrays[name] = np.asarray(own_data(file, f"{one.group}/{name}", MOST_NUMBERS), np.float64)
            if arrays[name].ndim != 2 or not arrays[name].size or not np.isfinite(arrays[name]).all():
                raise ValueError(f"{where}: {name} have shape {arrays[name].shape}; expected finite numbers (T, n)")
        xml = file[one.group].attrs.get("model_file", "")
    if len(arrays["states"]) != len(arrays["actions"]) or arrays["actions"].shape[1] != 7:
        raise ValueError(f"{where}: states {arrays['states'].shape} and actions {arrays['actions'].shape} do not agree")
    return arrays["states"], arrays["actions"], body_poses(xml, where)


def body_poses(xml: Any, where: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name of a body: position (3,), quaternion (4,)} of a scene's XML, text or bytes; ValueError, which names
    `where`, for what is none.
    """
    try:
        text = xml.decode() if isinstance(xml, bytes) else str(xml)
        if not text or len(text) > MOST_XML_CHARACTERS or "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise ValueError(f"it has {len(text)} characters, expected up to {MOST_XML_CHARACTERS} and no declarations")
        poses = {}
        for body in ElementTree.fromstring(text).iter("body"):
            place = body.get("pos", "0 0 0"), body.get("quat", "1 0 0 0")
            position, quaternion = (np.array(numbers.split(), float) for numbers in place)
            if (position.shape, quaternion.shape) != ((3,), (4,)) or not np.isfinite([*position, *quaternion]).all():
                raise ValueError(f"the body {body.get('name')!r} is at {place}, expected 3 and 4 numbers")
            poses[body.get("name", "")] = position, quaternion
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{where}: model_file is no scene's XML: {error}") from error
    return poses
