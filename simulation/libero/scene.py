"""One task's scene: LIBERO's environment without its cameras, and what is where in it, in the robot's base frame."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import mujoco
import numpy as np

from stereovla.simulation.libero.suites import Goal, SuiteTask, kind_of

COLLISION_GROUP = 0  # robosuite's geom group of what touches; what is seen is in group 1
SURFACES = ("table", "floor")  # fixtures that are no things
UNMOVED = (("pos", "0 0 0"), ("quat", "1 0 0 0"))
RING = 12  # points on each rim of a cylinder
RAY_HITS = 12  # things that a ray may pass on its way down
PLACEMENTS = 20  # attempts at a layout


@dataclass(frozen=True)
class Thing:
    """An object or a fixture: LIBERO's name of it, ours in words, its root body, and all bodies that belong to it."""

    key: str
    name: str
    body: int
    bodies: frozenset[int]
    movable: bool


@contextlib.contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Within, numpy's global generator, which robosuite draws layouts from, follows from `seed`."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed).generate_state(8))
    try:
        yield
    finally:
        np.random.set_state(before)


class Scene:
    """LIBERO's environment of one task. `env` is its own, whose `_check_success` decides."""

    def __init__(self, task: SuiteTask):
        from libero.libero.envs.env_wrapper import ControlEnv

        self.task = task
        with numpy_seeded(0):  # it draws a first layout
            wrapper = ControlEnv(
                bddl_file_name=str(task.definition),
                has_offscreen_renderer=False,
                use_camera_obs=False,
                hard_reset=False,  # the model stays, as a layout changes poses alone: see `lay_out`
                ignore_done=True,
            )
        self.env = wrapper.env
        self.env._observables.clear()  # nobody asks for them, and they take half the time of a step
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.goals = list(task.goals)
        self.things = self._find_things()
        self._loaded = {
            self.model.body(fixture.root_body).id: [
                np.array((fixture.get_obj().get(name) or zero).split(), float) for name, zero in UNMOVED
            ]
            for key, fixture in self.env.fixtures_dict.items()
            if not any(word in key for word in SURFACES)
        }
        self._points = {geom: _local_points(self.model, geom) for geom in range(self.model.ngeom) if self._solid(geom)}

    def _solid(self, geom: int) -> bool:
        return self.model.geom_group[geom] == COLLISION_GROUP and bool(
            self.model.geom_contype[geom] or self.model.geom_conaffinity[geom]
        )

    def _find_things(self) -> list[Thing]:
        """Movable ones first; names that two share have a number behind, but for the one that the task describes."""
        env, keys = self.env, [*self.env.objects_dict]
        keys += [key for key in env.fixtures_dict if not any(word in key for word in SURFACES)]
        words = {key: kind_of(key).replace("_", " ") for key in keys}
        things = []
        for key in keys:
            name = words[key]
            if list(words.values()).count(name) > 1:
                name = key.replace("_", " ")
            body = env.obj_body_id[key]
            things.append(Thing(key, name, body, self.subtree(body), key in env.objects_dict))
        return things

    def subtree(self, body: int) -> frozenset[int]:
        """A body and all below it."""
        found = {body}
        for child in range(body + 1, self.model.nbody):  # parents come first
            if self.model.body_parentid[child] in found:
                found.add(child)
        return frozenset(found)

    def close(self) -> None:
        self.env.close()

    # ------------------------------------------------------------------ episodes

    def lay_out(self, seed: int) -> None:
        """A layout as LIBERO draws it; also of the fixtures, which an official initial state does not hold."""
        from robosuite.utils.errors import RandomizationError

        for body, (position, quaternion) in self._loaded.items():  # what lies in a fixture is placed relative to these
            self.model.body_pos[body], self.model.body_quat[body] = position, quaternion
        with numpy_seeded(seed):
            for _ in range(PLACEMENTS):
                with contextlib.suppress(RandomizationError):
                    self.env.reset()
                    gripper = self.env.robots[0].gripper
                    gripper.current_action = np.zeros(gripper.dof)  # as of one that was just loaded
                    return
        raise RuntimeError(f"none of {PLACEMENTS} layouts of {self.task.definition.name} has room for all objects")

    def place_fixtures(self, poses: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Puts the fixtures where {name of a body: position (3,), quaternion (4,)} says, which a state does not."""
        for body in self._loaded:
            name = self.model.body(body).name
            if name not in poses:
                raise ValueError(f"the recorded scene has no {name}; {self.task.definition.name} has one")
            self.model.body_pos[body], self.model.body_quat[body] = poses[name]

    def restore(self, state: np.ndarray) -> None:
        """The simulator's flattened state (n,): time, positions, velocities; as LIBERO's `set_init_state`."""
        size = 1 + self.model.nq + self.model.nv
        if state.shape != (size,):
            raise ValueError(
                f"the state has shape {state.shape}; {self.task.definition.name} has one of {size} numbers"
            )
        self.env.sim.set_state_from_flattened(state)
        self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()

    def flattened(self) -> np.ndarray:
        """The state that `restore` takes."""
        return np.concatenate([[self.data.time], self.data.qpos, self.data.qvel])

    def fulfilled(self, goal: Goal) -> bool:
        """Whether LIBERO's own check of one condition holds."""
        parts = [goal.predicate, goal.target, *([] if goal.destination is None else [goal.destination])]
        return bool(self.env._eval_predicate(parts))

    # ------------------------------------------------------------------ geometry; positions in LIBERO's world frame

    def thing_of(self, key: str) -> Thing:
        """The thing of LIBERO's name `key`, or of the region `key`: what moves with it, such as a drawer."""
        for thing in self.things:
            if thing.key == key:
                return thing
        owner = max((thing for thing in self.things if key.startswith(thing.key)), key=lambda t: len(t.key))
        site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, key)
        body = owner.body if site < 0 else int(self.model.site_bodyid[site])
        return Thing(owner.key, owner.name, body, self.subtree(body), owner.movable)

    def place_of(self, key: str) -> np.ndarray:
        """(3,) where a thing or region is."""
        site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, key)
        if any(thing.key == key for thing in self.things) or site < 0:
            return self.data.xpos[self.thing_of(key).body].copy()
        return self.data.site_xpos[site].copy()

    def points(self, bodies: frozenset[int]) -> list[np.ndarray]:
        """For each solid geom of the bodies, (n, 3) corners of it."""
        return [
            self.data.geom_xpos[geom] + local @ self.data.geom_xmat[geom].reshape(3, 3).T
            for geom, local in self._points.items()
            if self.model.geom_bodyid[geom] in bodies
        ]

    def heights(self, xy: np.ndarray, above: float, ignored: frozenset[int]) -> np.ndarray:
        """(n,) height of what is solid at `xy` (n, 2) below the height `above`, but for the bodies `ignored`; -inf
        where there is nothing.
        """
        groups = np.zeros(6, np.uint8)
        groups[COLLISION_GROUP] = 1
        down, geom = np.array([0.0, 0.0, -1.0]), np.array([-1], np.int32)
        result = np.full(len(xy), -np.inf)
        for number, (x, y) in enumerate(xy):
            start = np.array([x, y, above])
            for _ in range(RAY_HITS):
                distance = mujoco.mj_ray(self.model, self.data, start, down, groups, 1, -1, geom)
                if distance < 0:
                    break
                start[2] -= distance
                if self._solid(geom[0]) and self.model.geom_bodyid[geom[0]] not in ignored:
                    result[number] = start[2]
                    break
                start[2] -= 1e-4
        return result


def _local_points(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """(n, 3) corners of a geom in its own frame."""
    kind, size = model.geom_type[geom], model.geom_size[geom]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        mesh = model.geom_dataid[geom]
        start = model.mesh_vertadr[mesh]
        return model.mesh_vert[start : start + model.mesh_vertnum[mesh]].astype(np.float64)
    if kind in (mujoco.mjtGeom.mjGEOM_CYLINDER, mujoco.mjtGeom.mjGEOM_CAPSULE):
        angle = np.linspace(0, 2 * np.pi, RING, endpoint=False)
        half = size[1] + (size[0] if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0.0)
        ring = np.stack([size[0] * np.cos(angle), size[0] * np.sin(angle), np.full(RING, half)], axis=1)
        return np.concatenate([ring, ring * [1, 1, -1]])
    half = model.geom_aabb[geom, 3:]
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return model.geom_aabb[geom, :3] + signs * half
