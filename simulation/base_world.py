"""What every world is: one episode at a time of an arm at a table, seen by a stereo pair."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import mujoco
import numpy as np

from stereovla.simulation.rendering import StereoRenderer
from stereovla.simulation.scene import TARGET


class NoViewError(RuntimeError):
    """No camera pose of the configured range shows what it must."""


class BaseWorld(ABC):
    """One episode at a time: reset(seed), then observe() and step(action).

    Attributes:
        views: names of those beside the pair.
        facts: what else is recorded of an evaluated episode.
        robot: its arm; None before the first episode.
        data: of the simulator.
        rest_z: heights in m, in the base frame, of the objects at the start.
        target_index: of the target among the objects.
        calibration: see `camera.calibration`.
    """

    views: ClassVar[tuple[str, ...]] = ()
    facts: dict[str, Any]
    robot: Any = None
    data: mujoco.MjData
    rest_z: list[float]
    target_index: int
    calibration: dict[str, np.ndarray]

    @staticmethod
    @abstractmethod
    def next_seed(seed: int) -> int:
        """Of another episode, of the same task where `seed` names one."""

    @abstractmethod
    def reset(self, seed: int) -> None:
        """Begins the episode of `seed`, an int >= 0."""

    def _check_reset(self) -> None:
        if self.robot is None:
            raise RuntimeError("the world has no episode yet: call reset(seed) first")

    @property
    @abstractmethod
    def other_names(self) -> list[str]:
        """Of the objects that are not the target, in the order of their ids in the segmentation."""

    @abstractmethod
    def state(self) -> np.ndarray:
        """float32 (n,): what the robot reports."""

    @abstractmethod
    def step(self, action: np.ndarray) -> None:
        """Runs the physics for one action (n,)."""

    @abstractmethod
    def object_pose(self, index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) in m and rotation (3, 3) of an object (default: the target) in the base frame."""

    @abstractmethod
    def fingers_touching(self, index: int | None = None) -> tuple[bool, bool]:
        """Whether the one and the other pad touch an object (default: the target)."""

    @property
    def held(self) -> bool:
        """Both pads touch the target."""
        return all(self.fingers_touching())

    @property
    def lift_m(self) -> float:
        """Height of the target over where it rested at the start."""
        return float(self.object_pose()[0][2]) - self.rest_z[self.target_index]

    @abstractmethod
    def observe(self, labels: bool = False) -> dict[str, Any]:
        """Renders the pair: left, right uint8 (H, W, 3); calibration (see camera.calibration).

        With labels also, for the left view, depth float32 (H, W) planar m, segmentation uint8 (H, W): 0 background, 1
        arm, 2 gripper, 3 target, 4.. other objects; and box_left, box_right float32 (4,) x_min, y_min, x_max, y_max px
        (max exclusive) of the visible part of the target, None where it is not visible.
        """

    def _told(self) -> dict[str, dict[str, np.ndarray]]:
        """What `observe` says of the cameras: values of its own, which may be kept."""
        return {"calibration": {key: value.copy() for key, value in self.calibration.items()}}

    def _labels(self, renderer: StereoRenderer, depth: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
        """What `observe` gives with labels; `ids` uint8 (ngeom + 1,): our id of every geom, that of -1 last."""
        left, right = (ids[renderer.geom_ids(self.data, camera)] for camera in (0, 1))
        boxes = {"box_left": mask_box(left == TARGET), "box_right": mask_box(right == TARGET)}
        return {"depth": depth, "segmentation": left, **boxes}


def mask_box(mask: np.ndarray) -> np.ndarray | None:
    """float32 (4,) x_min, y_min, x_max, y_max of a bool mask (H, W), max exclusive; None when it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
