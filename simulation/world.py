"""The world: one episode of picking up, stacking or moving with a robot arm, seen by a stereo pair."""

import mujoco
import numpy as np

from stereovla.processing.rotations import matrix_to_quaternion, rpy_to_matrix
from stereovla.simulation.appearance import draw_appearance
from stereovla.simulation.base_world import BaseWorld, NoViewError
from stereovla.simulation.camera import LOOK_AT_HEIGHT_M, in_view
from stereovla.simulation.config import WorldConfig, check_choice
from stereovla.simulation.layout import FINGER_REACH_M, HAND_REACH_M, draw_layout
from stereovla.simulation.objects import TableObject
from stereovla.simulation.photometry import draw_photometry
from stereovla.simulation.rendering import StereoRenderer
from stereovla.simulation.rig import draw_rig
from stereovla.simulation.robot import Robot
from stereovla.simulation.robots import ROBOTS
from stereovla.simulation.scene import ARM, BACKGROUND, FIRST_OTHER, GRIPPER, TARGET, build_model, load_robot
from stereovla.simulation.tasks import Task, draw_objects, draw_wording, first_task, possible_tasks

SUCCESS_LIFT_M = 0.05
STILL_STEPS = 3  # a placed object must lie still and alone this long
STILL_M_S, STILL_RAD_S = 0.02, 0.5
SCENE_DRAWS, CAMERA_DRAWS = 200, 300
VIEW_TRIES = 8  # scenes that are drawn until cameras see one
VIEW_MARGIN = 0.08  # of the picture's size, between the objects' centres and its border
# of the widest open gripper, in the tool's frame, whose z points up: finger tips, hand, flange
GRIPPER_POINTS = np.array(
    [
        [0, s * y, z]
        for s in (-1, 0, 1)
        for y, z in ((FINGER_REACH_M, -0.01), (HAND_REACH_M, 0.05), (HAND_REACH_M, 0.12))
    ]
)


class World(BaseWorld):
    """One table-top episode at a time: reset(seed), then observe() and step(action) at 10 Hz.

    Objects move by contact physics only: free bodies, no welds, no teleports.
    """

    def __init__(self, config: WorldConfig | None = None):
        self.config = config or WorldConfig()
        self._robot_type = ROBOTS[self.config.robot]
        self._robot_spec = load_robot(self._robot_type.model_file)
        self._renderer: StereoRenderer | None = None
        self.model: mujoco.MjModel | None = None
        self.robot: Robot | None = None
        self.objects: list[TableObject] = []

    # ------------------------------------------------------------------ episode

    @staticmethod
    def next_seed(seed: int) -> int:
        """Of another episode."""
        return seed + 1

    def reset(self, seed: int) -> None:
        """Draws a new episode; everything in it follows from `seed` (an int >= 0) and the config. NoViewError where no
        camera sees any of the scenes that are drawn.
        """
        streams = [np.random.default_rng(item) for item in np.random.SeedSequence(seed).spawn(4)]
        for further in reversed(range(VIEW_TRIES)):
            try:
                return self._draw_episode(*streams)
            except NoViewError:
                if not further:
                    raise

    def _draw_episode(
        self,
        layout: np.random.Generator,
        look: np.random.Generator,
        start: np.random.Generator,
        camera: np.random.Generator,
    ) -> None:
        config = self.config
        self.table_z = float(layout.uniform(*config.table_height_m))
        self._draw_scene(layout)
        self.model = build_model(
            self._robot_spec, self.objects, self.table_z, draw_appearance(config, look), (config.height, config.width)
        )
        if self._renderer is not None:
            self._renderer.load(self.model)
        self.data = mujoco.MjData(self.model)
        self.robot = self._robot_type(self.model, self.data)
        position = [
            start.uniform(*config.start_x),
            start.uniform(*config.start_y),
            self.table_z + start.uniform(*config.start_height_m),
        ]
        self.robot.place(np.array(position), start.uniform(*config.start_yaw_rad))
        self._bodies = [self.model.body(f"object{i}").id for i in range(len(self.objects))]
        self._pads = (self.model.geom("left_pad").id, self.model.geom("right_pad").id)
        self.steps = 0
        self.choose_task(self.tasks[0])
        self.robot.step(self.robot.idle(gripper=1.0))  # lets objects settle
        self.rest_z = [float(self.data.xpos[body][2]) for body in self._bodies]
        self.rest_points = self.data.xpos[self._bodies].copy()
        self._hidden = None if config.start_in_view else self._gripper_points()
        self.redraw_camera(camera)
        self._hidden = None  # at the start only

    def _draw_scene(self, rng: np.random.Generator) -> None:
        """Task, wording, objects and where they lie."""
        config = self.config
        kind = config.tasks[rng.integers(len(config.tasks))]
        wording = draw_wording(config.wording, rng)
        for _ in range(SCENE_DRAWS):
            items = draw_objects(kind, config, rng)
            self.tasks = possible_tasks(kind, items, wording)
            # the first task is that of the target and destination drawn first, unless their sizes do not allow it
            if not self.tasks or (self.tasks[0].target, self.tasks[0].destination) != first_task(kind, items):
                continue
            workspace = config.workspace_center, config.workspace_extent
            laid_out = draw_layout(items, *workspace, rng, config.any_yaw)
            if laid_out is not None:
                self.objects = laid_out
                return
        raise RuntimeError(
            f"none of {SCENE_DRAWS} scenes for the task {kind!r} can be laid out on {config.workspace_extent[0]:.2f} x "
            f"{config.workspace_extent[1]:.2f} m: use fewer objects, a larger workspace or another object_scale"
        )

    def _gripper_points(self) -> np.ndarray:
        position, rotation = self.robot.tool_pose()
        return position + GRIPPER_POINTS @ rotation.T

    def redraw_camera(self, rng: np.random.Generator) -> None:
        """Draws the stereo rig and its cameras anew, within the configured ranges and such that all objects, as they
        lay at the start, are in both pictures.
        """
        config, size = self.config, (self.config.height, self.config.width)
        center = np.array([*config.workspace_center, self.table_z + LOOK_AT_HEIGHT_M])
        for _ in range(CAMERA_DRAWS):
            rig = draw_rig(config, self._robot_type.mount, center, rng)
            values = rig.calibration(size)
            shown = self._hidden is not None and in_view(self._hidden, values, size, margin=0.0).any()
            if not shown and in_view(self.rest_points, values, size, VIEW_MARGIN).all():
                break
        else:
            hidden = "" if self._hidden is None else " and not the gripper"
            raise NoViewError(
                f"none of {CAMERA_DRAWS} camera poses of range {config.camera_range!r} sees all objects{hidden}: use a "
                f"wider fovy_deg than {config.fovy_deg} or a smaller workspace_extent than {config.workspace_extent}"
            )
        self.calibration = values
        self.photometry = draw_photometry(config, rng)
        opencv_to_mujoco = np.diag([1.0, -1.0, -1.0])  # MuJoCo cameras look along -z with y up
        self.data.mocap_pos[0] = rig.pose[:3, 3]
        self.data.mocap_quat[0] = matrix_to_quaternion(rig.pose[:3, :3] @ opencv_to_mujoco)
        for name, side, pitch in (("left", -1, 0.0), ("right", 1, rig.right_pitch_rad)):
            camera = self.model.camera(name).id
            self.model.cam_fovy[camera] = rig.fovy_deg
            self.model.cam_pos[camera] = [side * rig.baseline_m / 2, 0.0, 0.0]
            self.model.cam_quat[camera] = matrix_to_quaternion(rpy_to_matrix(np.array([pitch, 0.0, 0.0])))
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)

    def choose_target(self, name: str, destination: str | None = None) -> None:
        """Asks for another task of this scene: the one with the target `name`, such as "red cube", and `destination`.
        Without one, the present destination stays where that can be asked, else it is the first that can.
        """
        check_choice("target", name, tuple(dict.fromkeys(self.objects[task.target].name for task in self.tasks)))
        tasks = [task for task in self.tasks if self.objects[task.target].name == name]
        named = {self.objects[task.destination].name: task for task in tasks if task.destination is not None}
        if destination is not None:
            check_choice("destination", destination, tuple(named))
            self.choose_task(named[destination])
        else:
            self.choose_task(named.get(self.destination_name, tasks[0]))

    def choose_task(self, task: Task) -> None:
        """Asks for one of `self.tasks`."""
        self.task = task
        self._still = 0
        self._segment_ids = self._segmentation_table()

    @property
    def target_index(self) -> int:
        """Of the target among the objects."""
        return self.task.target

    @property
    def target(self) -> TableObject:
        """The object the instruction names."""
        return self.objects[self.task.target]

    @property
    def target_name(self) -> str:
        """Such as "red cube"."""
        return self.target.name

    @property
    def facts(self) -> dict[str, float]:
        """See `BaseWorld`: the target's narrowest side, in cm, and in px of the left view at the start."""
        side = 2 * min(self.target.half_size)
        pose = self.calibration["transform_camera_to_base"]
        depth = (self.rest_points[self.target_index] - pose[:3, 3]) @ pose[:3, 2]
        px = self.calibration["focal_length_px"].min() * side / depth
        return {"target_side_cm": round(1e2 * side, 2), "target_side_px": round(float(px), 2)}

    @property
    def other_names(self) -> list[str]:
        """See `BaseWorld`."""
        return [item.name for number, item in enumerate(self.objects) if number != self.target_index]

    @property
    def destination(self) -> TableObject | None:
        """What the target is stacked onto or moved to; None when it is only picked up."""
        return None if self.task.destination is None else self.objects[self.task.destination]

    @property
    def destination_name(self) -> str | None:
        """Such as "blue tray"."""
        return None if self.destination is None else self.destination.name

    @property
    def instruction(self) -> str:
        """The task in words."""
        return self.task.instruction

    # ------------------------------------------------------------------ robot

    def state(self) -> np.ndarray:
        """float32 (n,): tool x, y, z in the base frame (m), roll, pitch, yaw (rad; 0 = pointing straight down, fingers
        opening along base y), gripper opening [0, 1]; those of them that are among the `axes` of the robot.
        """
        self._check_reset()
        return self.robot.state()

    def step(self, action: np.ndarray) -> None:
        """Runs 0.1 s of physics. `action` (n,): dx, dy, dz (m, base frame), droll, dpitch, dyaw (rad, R_next = R(d)
        R_now), gripper command: < -0.5 closes, > 0.5 opens, otherwise the last command stays; those of them that are
        among the `axes` of the robot. Moves longer than its `max_step_m` and `max_step_rad` are shortened to that and
        counted in `robot.shortened`, as an arm's safety controller does.
        """
        self._check_reset()
        action = np.asarray(action, np.float64)
        axes = self.robot.axes
        if action.shape != (len(axes),) or not np.isfinite(action).all():
            names = ", ".join(axis if axis == "gripper" else f"d{axis}" for axis in axes)
            raise ValueError(f"action must be {len(axes)} finite numbers ({names}), not {action!r}")
        self.robot.step(action)
        self.steps += 1
        self._still = self._still + 1 if self.placed and self._is_still() else 0

    def object_pose(self, index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Centre (3,) in m and rotation (3, 3) of an object (default: the target) in the base frame."""
        body = self._bodies[self.target_index if index is None else index]
        return self.data.xpos[body].copy(), self.data.xmat[body].reshape(3, 3).copy()

    def touching(self, index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Geoms (n,) and their bodies (n,) that touch an object (default: the target)."""
        body = self._bodies[self.target_index if index is None else index]
        geoms = self.data.contact.geom
        bodies = self.model.geom_bodyid[geoms]
        other = np.concatenate([geoms[bodies[:, 0] == body, 1], geoms[bodies[:, 1] == body, 0]])
        return other, self.model.geom_bodyid[other]

    def fingers_touching(self, index: int | None = None) -> tuple[bool, bool]:
        """Whether the left and the right pad touch an object (default: the target)."""
        geoms, _ = self.touching(index)
        return self._pads[0] in geoms, self._pads[1] in geoms

    @property
    def placed(self) -> bool:
        """The target touches its destination and nothing else, and lies over its inside."""
        if self.task.destination is None:
            return False
        _, bodies = self.touching()
        if not len(bodies) or (bodies != self._bodies[self.task.destination]).any():
            return False
        center, rotation = self.object_pose(self.task.destination)
        return self.destination.holds_at(rotation.T @ (self.object_pose()[0] - center))

    def _is_still(self) -> bool:
        address = self.model.body_dofadr[self._bodies[self.target_index]]
        velocity = self.data.qvel[address : address + 6]
        return bool(np.linalg.norm(velocity[:3]) < STILL_M_S and np.linalg.norm(velocity[3:]) < STILL_RAD_S)

    @property
    def success(self) -> bool:
        """Pick: the target is held at least 5 cm above where it rested. Stack and move: released, it has rested on or
        in its destination alone, and still, for 0.3 s.
        """
        if self.task.destination is None:
            return self.lift_m >= SUCCESS_LIFT_M and self.held
        return self._still >= STILL_STEPS

    @property
    def progress(self) -> float:
        """0 to 1: up to 0.4 for the tool reaching the target (from 20 cm), 0.2 more for holding it, and up to 0.4 more
        for lifting it 5 cm; in stack and move up to 0.1 for that, up to 0.2 for carrying it to the destination (from
        20 cm), and the rest for success. A placed target counts 0.9.
        """
        if self.success:
            return 1.0
        if self.placed:
            return 0.9
        center = self.object_pose()[0]
        if not self.held:
            distance = float(np.linalg.norm(center - self.robot.tool_pose()[0]))
            return 0.4 * max(0.0, 1.0 - distance / 0.2)
        lifted = min(1.0, max(0.0, self.lift_m / SUCCESS_LIFT_M))
        if self.task.destination is None:
            return 0.6 + 0.4 * lifted
        away = float(np.linalg.norm(center[:2] - self.object_pose(self.task.destination)[0][:2]))
        return 0.6 + 0.1 * lifted + 0.2 * max(0.0, 1.0 - away / 0.2)

    # ------------------------------------------------------------------ pictures

    def observe(self, labels: bool = False) -> dict:
        """See `BaseWorld.observe`; the pictures are as the episode's cameras take them, noise and all."""
        self._check_reset()
        if self._renderer is None:
            self._renderer = StereoRenderer(self.model, self.config.height, self.config.width)
        renderer = self._renderer
        renderer.update(self.data)
        left, depth = renderer.color(self.data, 0, depth=labels)
        right, _ = renderer.color(self.data, 1)
        left, right = self.photometry.apply(left, right, self.steps)
        shown = {"left": left, "right": right, **self._told()}
        return shown | (self._labels(renderer, depth, self._segment_ids) if labels else {})

    def _segmentation_table(self) -> np.ndarray:
        """uint8 (ngeom + 1,): our id of every geom; the last entry, reached by index -1, is the background."""
        table = np.full(self.model.ngeom + 1, BACKGROUND, np.uint8)
        gripper = [self.model.body(name).id for name in ("hand", "left_finger", "right_finger")]
        for geom, body in enumerate(self.model.geom_bodyid):
            if body in gripper:
                table[geom] = GRIPPER
            elif self.model.body_rootid[body] == self.model.body_rootid[gripper[0]]:
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
