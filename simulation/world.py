"""The world: one episode of "pick up the {color} {object}" with a Franka Panda, seen by a rectified stereo pair."""

import difflib
from dataclasses import dataclass

import mujoco
import numpy as np

from simulation.camera import LOOK_AT_HEIGHT_M, RANGES, all_in_view, calibration, draw_rig_pose
from simulation.geometry import matrix_to_quaternion
from simulation.objects import COLORS, SHAPES, TableObject, draw_objects
from simulation.rendering import StereoRenderer
from simulation.robot import Panda
from simulation.scene import ARM, BACKGROUND, FIRST_OTHER, GRIPPER, TARGET, build_model, draw_appearance, load_panda

SUCCESS_LIFT_M = 0.05
ACTION_SIZE = 7


@dataclass
class WorldConfig:
    """What is random, and how far; every range is (low, high), lengths in m. The same config and seed give the same
    bytes.
    """

    camera_range: str = "small"  # "small", "medium", "large"
    image_size: int | tuple[int, int] = 128  # side, or (height, width), px
    num_objects: int = 3  # the target included
    shapes: tuple[str, ...] = SHAPES
    colors: tuple[str, ...] = tuple(COLORS)
    distinct_colors: bool = False  # True: the colour alone tells the objects of a scene apart
    baseline_m: float = 0.063  # ZED Mini
    fovy_deg: float = 45.0
    workspace_center: tuple[float, float] = (0.50, 0.0)
    workspace_extent: tuple[float, float] = (0.25, 0.30)
    table_height_m: tuple[float, float] = (-0.05, 0.05)  # of the table top over the robot's base
    start_x: tuple[float, float] = (0.40, 0.48)
    start_y: tuple[float, float] = (-0.12, 0.12)
    start_height_m: tuple[float, float] = (0.12, 0.17)  # of the tool over the table
    start_yaw_rad: tuple[float, float] = (-0.35, 0.35)

    def __post_init__(self):
        self.shapes, self.colors = tuple(self.shapes), tuple(self.colors)
        check_choice("camera_range", self.camera_range, tuple(RANGES))
        for name, values, known in (("shapes", self.shapes, SHAPES), ("colors", self.colors, tuple(COLORS))):
            if not values:
                raise ValueError(f"{name} is empty; choose from {', '.join(known)}")
            for value in values:
                check_choice(name, value, known)
        if not 1 <= self.num_objects <= min(5, len(self.shapes) * len(self.colors)):
            raise ValueError(
                f"num_objects is {self.num_objects}; it must be between 1 and 5 and at most "
                f"shapes x colors = {len(self.shapes) * len(self.colors)}"
            )
        if self.distinct_colors and self.num_objects > len(self.colors):
            raise ValueError(
                f"num_objects is {self.num_objects}; with distinct_colors it must be at most {len(self.colors)}, "
                "one for each of the colors"
            )
        if min(self.height, self.width) < 16:
            raise ValueError(f"image_size is {self.image_size}; both sides must be at least 16 px")
        if not 0 < self.fovy_deg < 120 or not 0 < self.baseline_m < 0.5:
            raise ValueError(
                f"fovy_deg is {self.fovy_deg} (must be in (0, 120)) and baseline_m {self.baseline_m} (in (0, 0.5) m)"
            )

    @property
    def height(self) -> int:
        """Image height in px."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[0]

    @property
    def width(self) -> int:
        """Image width in px."""
        return self.image_size if isinstance(self.image_size, int) else self.image_size[1]


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `known`, naming the nearest."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}{hint}")


class World:
    """One table-top episode at a time: reset(seed), then observe() and step(action) at 10 Hz.

    Objects move by contact physics only: free bodies, no welds, no teleports.
    """

    def __init__(self, config: WorldConfig | None = None):
        self.config = config or WorldConfig()
        self._panda_spec = load_panda()
        self._renderer: StereoRenderer | None = None
        self.model: mujoco.MjModel | None = None
        self.robot: Panda | None = None
        self.objects: list[TableObject] = []

    def _check_reset(self) -> None:
        if self.robot is None:
            raise RuntimeError("the world has no episode yet: call reset(seed) first")

    # ------------------------------------------------------------------ episode

    def reset(self, seed: int) -> None:
        """Draws a new episode; everything in it follows from `seed` (an int >= 0) and the config."""
        config = self.config
        streams = [np.random.default_rng(item) for item in np.random.SeedSequence(seed).spawn(4)]
        layout, look, start, camera = streams
        self.table_z = float(layout.uniform(*config.table_height_m))
        self.objects = draw_objects(
            config.num_objects,
            config.shapes,
            config.colors,
            config.workspace_center,
            config.workspace_extent,
            layout,
            config.distinct_colors,
        )
        self.target_index = 0
        self.model = build_model(
            self._panda_spec, self.objects, self.table_z, draw_appearance(look), config.fovy_deg, config.baseline_m,
            (config.height, config.width),
        )  # fmt: skip
        if self._renderer is not None:
            self._renderer.load(self.model)
        self.data = mujoco.MjData(self.model)
        self.robot = Panda(self.model, self.data)
        position = [
            start.uniform(*config.start_x),
            start.uniform(*config.start_y),
            self.table_z + start.uniform(*config.start_height_m),
        ]
        self.robot.place(np.array(position), np.array([0.0, 0.0, start.uniform(*config.start_yaw_rad)]))
        self._bodies = [self.model.body(f"object{i}").id for i in range(len(self.objects))]
        self._pads = (self.model.geom("left_pad").id, self.model.geom("right_pad").id)
        self._segment_ids = self._segmentation_table()
        self.robot.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))  # lets objects settle
        self.rest_z = [float(self.data.xpos[body][2]) for body in self._bodies]
        self._rest_points = self.data.xpos[self._bodies].copy()
        self.redraw_camera(camera)

    def redraw_camera(self, rng: np.random.Generator) -> None:
        """Moves the stereo rig to a new random pose of the configured range from which all objects, as they lay at the
        start, are in both pictures.
        """
        center = np.array([*self.config.workspace_center, self.table_z + LOOK_AT_HEIGHT_M])
        size = (self.config.height, self.config.width)
        for _ in range(200):
            pose = draw_rig_pose(self.config.camera_range, center, rng)
            values = calibration(pose, self.config.fovy_deg, self.config.baseline_m, size)
            if all_in_view(self._rest_points, values, size, margin=0.08):
                break
        else:
            raise RuntimeError(
                f"none of 200 camera poses of range {self.config.camera_range!r} sees all objects: use a wider "
                f"fovy_deg than {self.config.fovy_deg} or a smaller workspace_extent than "
                f"{self.config.workspace_extent}"
            )
        self.calibration = values
        opencv_to_mujoco = np.diag([1.0, -1.0, -1.0])  # MuJoCo cameras look along -z with y up
        self.data.mocap_pos[0] = pose[:3, 3]
        self.data.mocap_quat[0] = matrix_to_quaternion(pose[:3, :3] @ opencv_to_mujoco)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def choose_target(self, name: str) -> None:
        """Makes another object of the scene the target, with its instruction; `name` such as "red cube"."""
        names = [item.name for item in self.objects]
        check_choice("target", name, tuple(names))
        self.target_index = names.index(name)
        self._segment_ids = self._segmentation_table()

    @property
    def target(self) -> TableObject:
        """The object the instruction names."""
        return self.objects[self.target_index]

    @property
    def target_name(self) -> str:
        """Such as "red cube"."""
        return self.target.name

    @property
    def instruction(self) -> str:
        """The task in words."""
        return f"pick up the {self.target_name}"

    # ------------------------------------------------------------------ robot

    def state(self) -> np.ndarray:
        """float32 (7,): tool x, y, z in the base frame (m), roll, pitch, yaw (rad; 0 = pointing straight down, fingers
        opening along base y), gripper opening [0, 1].
        """
        self._check_reset()
        return self.robot.state()

    def step(self, action: np.ndarray) -> None:
        """Runs 0.1 s of physics. `action` (7,): dx, dy, dz (m, base frame), droll, dpitch, dyaw (rad, R_next = R(d)
        R_now), gripper command: < -0.5 closes, > 0.5 opens, otherwise the last command stays. Moves longer than 8 cm
        or 0.5 rad are shortened to that and counted in `robot.shortened`, as an arm's safety controller does.
        """
        self._check_reset()
        action = np.asarray(action, np.float64)
        if action.shape != (ACTION_SIZE,) or not np.isfinite(action).all():
            raise ValueError(
                f"action must be {ACTION_SIZE} finite numbers (dx, dy, dz, droll, dpitch, dyaw, gripper), "
                f"not {action!r}"
            )
        self.robot.step(action)

    def object_pose(self, index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Centre (3,) in m and rotation (3, 3) of an object (default: the target) in the base frame."""
        body = self._bodies[self.target_index if index is None else index]
        return self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy()

    def fingers_touching(self, index: int | None = None) -> tuple[bool, bool]:
        """Whether the left and the right pad touch an object (default: the target)."""
        body = self._bodies[self.target_index if index is None else index]
        touched = [False, False]
        for first, second in self.data.contact.geom:
            for side, pad in enumerate(self._pads):
                if pad in (first, second):
                    other = second if first == pad else first
                    touched[side] |= self.model.geom_bodyid[other] == body
        return bool(touched[0]), bool(touched[1])

    @property
    def held(self) -> bool:
        """Both pads touch the target."""
        return all(self.fingers_touching())

    @property
    def lift_m(self) -> float:
        """Height of the target's centre over where it rested at the start."""
        return float(self.object_pose()[0][2]) - self.rest_z[self.target_index]

    @property
    def success(self) -> bool:
        """The target is held at least 5 cm above where it rested."""
        return self.lift_m >= SUCCESS_LIFT_M and self.held

    @property
    def progress(self) -> float:
        """0 to 1: up to 0.4 for the tool reaching the target (from 20 cm), 0.2 more for holding it, up to 0.4 more for
        lifting it 5 cm.
        """
        distance = float(np.linalg.norm(self.object_pose()[0] - self.robot.tool_pose()[0]))
        if not self.held:
            return 0.4 * max(0.0, 1.0 - distance / 0.2)
        return 0.6 + 0.4 * min(1.0, max(0.0, self.lift_m / SUCCESS_LIFT_M))

    # ------------------------------------------------------------------ pictures

    def observe(self, labels: bool = False) -> dict:
        """Renders the pair: left, right uint8 (H, W, 3); calibration (see camera.calibration).

        With labels also, for the left view, depth float32 (H, W) planar m, segmentation uint8 (H, W): 0 background, 1
        arm, 2 gripper, 3 target, 4.. other objects; and box_left, box_right float32 (4,) x_min, y_min, x_max, y_max px
        (max exclusive) of the visible part of the target, None where it is not visible.
        """
        self._check_reset()
        if self._renderer is None:
            self._renderer = StereoRenderer(self.model, self.config.height, self.config.width)
        renderer = self._renderer
        renderer.update(self.data)
        left, depth = renderer.color(self.data, 0, depth=labels)
        right, _ = renderer.color(self.data, 1)
        result = {
            "left": left,
            "right": right,
            "calibration": {key: value.copy() for key, value in self.calibration.items()},
        }
        if labels:
            segmentation = self._segment_ids[renderer.geom_ids(self.data, 0)]
            right_ids = self._segment_ids[renderer.geom_ids(self.data, 1)]
            result |= {
                "depth": depth,
                "segmentation": segmentation,
                "box_left": mask_box(segmentation == TARGET),
                "box_right": mask_box(right_ids == TARGET),
            }
        return result

    def _segmentation_table(self) -> np.ndarray:
        """uint8 (ngeom + 1,): our id of every geom; the last entry, reached by index -1, is the background."""
        table = np.full(self.model.ngeom + 1, BACKGROUND, np.uint8)
        names = {self.model.body(i).name: i for i in range(self.model.nbody)}
        for geom, body in enumerate(self.model.geom_bodyid):
            if body in (names["hand"], names["left_finger"], names["right_finger"]):
                table[geom] = GRIPPER
            elif names["link0"] <= body <= names["link7"]:
                table[geom] = ARM
            elif body in self._bodies:
                table[geom] = self._object_segment(self._bodies.index(body))
        return table

    def _object_segment(self, index: int) -> int:
        return TARGET if index == self.target_index else FIRST_OTHER + index - (index > self.target_index)

    def close(self) -> None:
        """Frees the renderer; the world may be used again and then opens a new one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def mask_box(mask: np.ndarray) -> np.ndarray | None:
    """float32 (4,) x_min, y_min, x_max, y_max of a bool mask (H, W), max exclusive; None when it is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
