"""LIBERO with the interface of our own world: reset, observe, step; seen by a rectified pair at the agent view."""

from collections.abc import Mapping

import mujoco
import numpy as np

from stereovla.simulation.base_world import BaseWorld, NoViewError
from stereovla.simulation.camera import calibration, focal_length, in_view
from stereovla.simulation.libero.cameras import draw_view
from stereovla.simulation.libero.config import LiberoConfig
from stereovla.simulation.libero.robot import LiberoRobot
from stereovla.simulation.libero.scene import COLLISION_GROUP, Scene, Thing
from stereovla.simulation.libero.suites import (
    ASKED,
    INITIAL_STATES,
    Goal,
    initial_states,
    kind_of,
    names_by_place,
    suite_tasks,
)
from stereovla.simulation.rendering import StereoRenderer
from stereovla.simulation.scene import ARM, BACKGROUND, FIRST_OTHER, GRIPPER, TARGET

FIRST_DRAWN = 2**32  # seeds from here on draw their layout, smaller ones name an official initial state
WAITING_STEPS = 10  # of 20 Hz before an episode, in which objects come to rest
AGENT_VIEW, SPARE_CAMERA, WRIST_CAMERA = "agentview", "frontview", "robot0_eye_in_hand"
LAYOUTS = 20  # drawn
SETTLED_M = (0.1, 0.1, 0.25)  # that things may roll, slide and sink in those steps; LIBERO drops some from 16 cm
CAMERA_DRAWS = 300
VIEW_MARGIN = 0.05  # of the picture's size, between what the goal names and its border
MAX_GEOMS = 2000  # of a scene, decoration included
OPENCV = np.diag([1.0, -1.0, -1.0])  # MuJoCo cameras look along -z with y up


class LiberoWorld(BaseWorld):
    """One episode of a suite at a time: reset(seed), then observe() and step(action).

    Seeds below 2**32 are LIBERO's official episodes: number of the task * 50 + number of the initial state. Those from
    2**32 on draw a layout as LIBERO's tasks define it, and never are an official one.
    """

    def __init__(self, config: LiberoConfig | None = None):
        self.config = config or LiberoConfig()
        self.scene: Scene | None = None
        self.facts: dict[str, int] = {}  # of the episode: its task, and which official initial state it began with
        self._number = -1
        self._renderer: StereoRenderer | None = None

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the views beside the pair."""
        return ("wrist",) if self.config.wrist else ()

    # ------------------------------------------------------------------ episode

    @staticmethod
    def next_seed(seed: int) -> int:
        """Of another episode of the same task, where the seed is an official one's."""
        if seed >= FIRST_DRAWN:
            return seed + 1
        task, state = divmod(seed, INITIAL_STATES)
        return task * INITIAL_STATES + (state + 1) % INITIAL_STATES

    def reset(self, seed: int, number: int | None = None) -> None:
        """Begins the episode of `seed`; the task `number` of a drawn one follows from the seed where it is None."""
        layout, camera = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
        if seed < FIRST_DRAWN:
            official, state = divmod(seed, INITIAL_STATES)
            if official not in self.config.tasks or number not in (None, official):
                raise ValueError(
                    f"seed {seed} is initial state {state} of task {official}; this world has the tasks "
                    f"{', '.join(map(str, self.config.tasks))} of {self.config.suite}"
                )
            number = official
        elif number is None:
            number = int(self.config.tasks[layout.integers(len(self.config.tasks))])
        self._open(number)
        self.facts = {"task": number} | ({"initial_state": state} if seed < FIRST_DRAWN else {})
        if seed < FIRST_DRAWN:
            self.scene.lay_out(seed)
            self.scene.restore(initial_states(self.scene.task)[state])
            self.robot.wait(WAITING_STEPS)
        else:
            self._draw_layout(layout)
        self._settled(camera)

    def _draw_layout(self, rng: np.random.Generator) -> None:
        """One in which all things stay near where they were placed: LIBERO's sampler lets some overlap, which then fly
        away.
        """
        bodies = [item.body for item in self.objects]
        for _ in range(LAYOUTS):
            self.scene.lay_out(int(rng.integers(2**63)))
            place = self.data.xpos[bodies].copy()
            self.robot.wait(WAITING_STEPS)
            if (np.abs(self.data.xpos[bodies] - place) < SETTLED_M).all():
                return
        raise RuntimeError(f"in none of {LAYOUTS} layouts of {self.instruction!r} do all things stay where they are")

    def replay(
        self,
        number: int,
        state: np.ndarray,
        fixtures: Mapping[str, tuple[np.ndarray, np.ndarray]],
        camera: np.random.Generator | None = None,
    ) -> None:
        """The scene of a task in a recorded state, see `Scene.restore` and `Scene.place_fixtures`: nothing waits or
        moves. With `camera` an episode begins, whose pair is drawn.
        """
        self._open(number)
        self.scene.place_fixtures(fixtures)
        self.scene.restore(state)
        if camera is not None:
            self._settled(camera)

    def _open(self, number: int) -> None:
        """The scene of a task; the present one where it is that."""
        if number == self._number:
            return
        self.close()
        self._number, self.scene = number, Scene(suite_tasks(self.config.suite)[number])
        self.data, self.model = self.scene.data, self.scene.model
        self.robot = LiberoRobot(self.scene.env, self.config.control)
        self.objects = self.scene.things
        self._targets = [self.scene.thing_of(goal.target) for goal in self.scene.goals]

    def _settled(self, camera: np.random.Generator) -> None:
        self.steps = 0
        self.robot.begin()
        self.rest_points = self.data.xpos[[item.body for item in self.objects]] - self.robot.base
        self.rest_z = [float(point[2]) for point in self.rest_points]
        ids = [self.model.camera(name).id for name in (AGENT_VIEW, SPARE_CAMERA)]
        mujoco.mj_camlight(self.model, self.data)
        self._stock = self.camera_pose(ids[0])
        self.redraw_camera(camera)

    def camera_pose(self, camera: int) -> np.ndarray:
        """(4, 4) pose of a camera of the model, OpenCV axes, in the base frame."""
        pose = np.eye(4)
        pose[:3, :3] = self.data.cam_xmat[camera].reshape(3, 3) @ OPENCV
        pose[:3, 3] = self.data.cam_xpos[camera] - self.robot.base
        return pose

    def redraw_camera(self, rng: np.random.Generator) -> None:
        """Draws the pair anew within the configured range, such that what the task is about is in both pictures."""
        size = self.config.height, self.config.width
        keys = {key for goal in self.scene.goals for key in (goal.target, goal.destination) if key}
        focal = focal_length(float(self.model.camera(AGENT_VIEW).fovy[0]), self.config.height)
        named = np.stack([self.scene.place_of(key) for key in sorted(keys)]) - self.robot.base
        for _ in range(CAMERA_DRAWS):
            pose = draw_view(self.config.camera_range, self._stock, self.table_z, rng)
            values = calibration(pose, focal, float(rng.uniform(*self.config.baseline_m)), size)
            if self.config.camera_range == "stock" or in_view(named, values, size, VIEW_MARGIN).all():
                self.calibration = values
                return
        raise NoViewError(
            f"none of {CAMERA_DRAWS} camera poses of range {self.config.camera_range!r} has "
            f"{', '.join(sorted(keys))} of {self.instruction!r} in both views of a pair {self.config.baseline_m[1]} m "
            "apart; take a smaller baseline_m, the camera range stock, which asks for nothing, or other tasks"
        )

    # ------------------------------------------------------------------ task

    @property
    def task(self) -> Goal:
        """The condition that is worked at: the one whose target is held, else the first that is not fulfilled, else
        the last one.
        """
        goals = self.scene.goals
        for goal, thing in zip(goals, self._targets, strict=True):
            if goal.by_placing and all(self._pads_touch(thing)):
                return goal
        return next((goal for goal in goals if not self.scene.fulfilled(goal)), goals[-1])

    @property
    def target(self) -> Thing:
        """What `task` is about."""
        return self._targets[self.scene.goals.index(self.task)]

    @property
    def target_index(self) -> int:
        """Of the target among the objects."""
        key = self.target.key
        return next(number for number, item in enumerate(self.objects) if item.key == key)

    @property
    def target_name(self) -> str:
        """In words; where a scene has several of a kind, those of the instruction."""
        target, found = self.target, ASKED.fullmatch(self.instruction)
        if found and target.name == target.key.replace("_", " "):
            return found["target"]
        return target.name

    @property
    def other_names(self) -> list[str]:
        """See `BaseWorld`; where a scene has several of a kind, as another task of the suite calls the one that it asks
        for there: who learns from it has to read which one is meant.
        """
        told, places = names_by_place(self.config.suite), self.scene.task.places
        names = []
        for item in self.objects:
            if item.key != self.target.key:
                words = told.get((kind_of(item.key), places.get(item.key, "")), item.name)
                names.append(words if item.name == item.key.replace("_", " ") else item.name)
        return names

    @property
    def instruction(self) -> str:
        """The task in words."""
        return self.scene.task.instruction

    @property
    def success(self) -> bool:
        """LIBERO's own check, now or after any of the last step's 20 Hz steps: LIBERO ends an episode at the first."""
        return self.robot.reached or bool(self.scene.env._check_success())

    @property
    def progress(self) -> float:
        """Share of the task's conditions that are fulfilled."""
        goals = self.scene.goals
        return sum(map(self.scene.fulfilled, goals)) / len(goals)

    # ------------------------------------------------------------------ robot

    def state(self) -> np.ndarray:
        """float32 (7,): tool x, y, z in the base frame (m), roll, pitch, yaw (rad; 0 = pointing straight down, fingers
        opening along base y), gripper opening [0, 1]; or LIBERO's own (8,), see `LiberoRobot`.
        """
        self._check_reset()
        return self.robot.state()

    def step(self, action: np.ndarray) -> None:
        """0.1 s of physics with an action (7,) as `World.step` has it, or 0.05 s with LIBERO's own, see
        `LiberoRobot`.
        """
        self._check_reset()
        action = np.asarray(action, np.float64)
        if action.shape != (self.robot.size,) or not np.isfinite(action).all():
            raise ValueError(f"action must be {self.robot.size} finite numbers, not {action!r}")
        self.robot.step(action)
        self.steps += 1

    def object_pose(self, index: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) in m and rotation (3, 3) of an object's body (default: the target's) in the base frame."""
        body = self.target.body if index is None else self.objects[index].body
        return self.data.xpos[body] - self.robot.base, self.data.xmat[body].reshape(3, 3).copy()

    def _pads_touch(self, thing: Thing) -> tuple[bool, bool]:
        geoms = self.data.contact.geom
        bodies = self.model.geom_bodyid[geoms]
        inside = np.isin(bodies, list(thing.bodies))
        touching = {*geoms[inside[:, 0], 1].tolist(), *geoms[inside[:, 1], 0].tolist()}
        return self.robot.pads[0] in touching, self.robot.pads[1] in touching

    def fingers_touching(self, index: int | None = None) -> tuple[bool, bool]:
        """Whether the one and the other pad touch an object (default: the target)."""
        return self._pads_touch(self.target if index is None else self.objects[index])

    @property
    def placed(self) -> bool:
        """Whether the present condition is fulfilled, as LIBERO checks it."""
        return self.scene.fulfilled(self.task)

    @property
    def table_z(self) -> float:
        """Height in m of the lowest thing at the start."""
        return min(self.rest_z)

    # ------------------------------------------------------------------ pictures

    def observe(self, labels: bool = False) -> dict:
        """See `BaseWorld.observe`; and wrist (H, W, 3) where the config has it. With LIBERO's own control the pictures
        are mirrored left to right, as in its datasets once they are turned by 180 degrees, and there is neither
        calibration nor label.
        """
        self._check_reset()
        renderer = self._aimed_renderer()
        renderer.update(self.data)
        left, depth = renderer.color(self.data, 0, depth=labels)
        result = {"left": left, "right": renderer.color(self.data, 1)[0]}
        if self.config.wrist:
            result["wrist"] = renderer.color(self.data, 2)[0]
        if self.config.control == "osc":
            return {name: np.ascontiguousarray(view[:, ::-1]) for name, view in result.items()}
        result |= self._told()
        return result | (self._labels(renderer, depth, self._segmentation_table()) if labels else {})

    def _aimed_renderer(self) -> StereoRenderer:
        """The renderer, its pair where the calibration says."""
        cameras = [AGENT_VIEW, SPARE_CAMERA, *([WRIST_CAMERA] if self.config.wrist else [])]
        ids = [self.model.camera(name).id for name in cameras]
        pose = self.calibration["transform_camera_to_base"].astype(np.float64)
        baseline = float(self.calibration["baseline_m"])
        for camera, shift in zip(ids[:2], (0.0, baseline), strict=True):
            self.data.cam_xpos[camera] = pose[:3, 3] + shift * pose[:3, 0] + self.robot.base
            self.data.cam_xmat[camera] = (pose[:3, :3] @ OPENCV).ravel()
        self.model.cam_fovy[ids[1]] = self.model.cam_fovy[ids[0]]
        if self._renderer is None:
            self.model.vis.quality.offsamples = 0
            self.model.vis.global_.offwidth = max(self.config.width, self.model.vis.global_.offwidth)
            self.model.vis.global_.offheight = max(self.config.height, self.model.vis.global_.offheight)
            self._renderer = StereoRenderer(
                self.model,
                self.config.height,
                self.config.width,
                cameras,
                effects=True,
                hidden_groups=(COLLISION_GROUP,),
                max_geoms=MAX_GEOMS,
            )
        return self._renderer

    def _segmentation_table(self) -> np.ndarray:
        """uint8 (ngeom + 1,): our id of every geom; the last entry, reached by index -1, is the background."""
        model, target = self.model, self.target
        body_ids = np.full(model.nbody, BACKGROUND, np.uint8)
        base = model.body_rootid[model.body("robot0_base").id]
        for body in range(model.nbody):
            if model.body_rootid[body] == base:
                body_ids[body] = GRIPPER if model.body(body).name.startswith("gripper0_") else ARM
        others = [item for item in self.objects if item.key != target.key]
        for number, item in enumerate(others, FIRST_OTHER):
            body_ids[list(item.bodies)] = number
        body_ids[list(target.bodies)] = TARGET  # of a cabinet whose drawer is the target, the rest is background
        return np.append(body_ids[model.geom_bodyid], np.uint8(BACKGROUND))

    def close(self) -> None:
        """Frees renderer and scene; the world may be used again, from another `reset` on, and then opens new ones."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self.scene is not None:
            self.scene.close()
            self.scene, self.robot, self._number = None, None, -1
