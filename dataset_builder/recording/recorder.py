"""Recording: noisy rollouts of the scripted expert, each frame labelled with what the expert would ideally do then.

Seeds. Episode `index` of a split depends on (seed, split, index) alone, whatever the number of shards, processes and
episodes: its n-th attempt resets the world with `episode_seed(seed, split, index, n)`. These seeds are all at least
2**32; evaluation resets the world with seeds below 2**32, so that no evaluated episode can have been recorded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stereovla.command_line import option
from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.shards import encode_row
from stereovla.simulation import Expert, World
from stereovla.simulation.base_world import BaseWorld, NoViewError
from stereovla.simulation.tasks import Task

FPS = 10
SPLITS = ("train", "validation", "test")
FIRST_SEED = 2**32  # evaluation's seeds are smaller
MAX_ATTEMPTS = 20
# why attempts are thrown away
NO_VIEW = "no camera pose of the range sees all objects"
NO_LAYOUT = "no layout of the objects leaves room to grasp them"
DIVERGED = "the physics diverged"
COLLISION = "collision: pushed another object away"
FELL = "target fell off the table"
DROPPED = "target dropped on the way"
OPEN = 0.9  # a gripper that is open wider has not begun its grasp
MOVED_M = 0.02  # an object that rose or sank further is no target to relabel to
PUSHED_M = 0.03  # an object other than the target that moves further was hit
MISSED_STEPS, MISSED_RISE_M, CLOSING_STEPS = 8, 0.025, 3  # most steps of a missed grasp and of each; frames it closes
CARRIED_M = 0.03  # a target that was held this high and then is not was dropped, unless it was placed


def seen_row(world: BaseWorld, seen: dict[str, Any], index: int, frame: int) -> dict[str, Any]:
    """What a dataset's row says of a world and of what is `seen` of it by `observe`, whoever moved it there."""
    return {
        "observation.images.left": seen["left"],
        "observation.images.right": seen["right"],
        **{schema.image_key(view): seen[view] for view in world.views},
        "observation.state": world.state(),
        "state_is_pose": True,
        **{f"calibration.{key}": seen["calibration"][key] for key in schema.CALIBRATION_KEYS},
        "observation.depth": seen.get("depth"),
        "observation.segmentation": seen.get("segmentation"),
        "target.name": world.target_name,
        "target.box_left_px": seen.get("box_left"),
        "target.box_right_px": seen.get("box_right"),
        "others.names": world.other_names,
        "task": world.instruction,
        "embodiment": world.robot.embodiment,
        "episode_index": index,
        "frame_index": frame,
        "timestamp": frame / FPS,
    }


@dataclass
class RecordingConfig:
    """How the expert is disturbed and what is recorded. Lengths in m, angles in rad."""

    noise_m: float = option(
        0.012,
        "Largest standard deviation of the execution noise per step and axis, m; each episode draws its own from 0.",
    )
    noise_rad: float = option(0.05, "The same for the rotation, rad.")
    push_probability: float = option(0.04, "Chance per step of a larger push of the tool.")
    push_m: float = option(0.05, "Longest push, m; pushes are at least 2 cm.")
    miss_probability: float = option(
        0.03,
        "Chance per step before the grasp that the gripper closes on nothing and rises for up to a second, so that the "
        "data show how to go on after a missed grasp.",
    )
    camera_per_frame: bool = option(
        True,
        "Draw the camera pose anew for every recorded frame, not once per episode: more views of the same physics.",
    )
    relabel: float = option(
        0.5,
        "Share of the frames before the grasp that are labelled for a random task of the scene, with its instruction "
        "and plan, so that the heading of the arm does not give the target away.",
    )
    labels: bool = option(True, "Record depth, segmentation and boxes too: three more images are rendered per frame.")
    plan_length: int = option(schema.PLAN_LENGTH, "Steps of the ideal plan that is recorded with each frame.")
    max_frames: int = option(120, "An episode that takes longer counts as failed.")

    def __post_init__(self):
        for name in ("noise_m", "noise_rad", "push_m"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 0.5)")
        for name in ("push_probability", "miss_probability", "relabel"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1]")
        for name in ("plan_length", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def episode_seed(seed: int, split: str, index: int, attempt: int = 0) -> int:
    """Seed of `World.reset` for one attempt at one episode, in [2**32, 2**63)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    (number,) = np.random.SeedSequence((seed, SPLITS.index(split), index, attempt)).generate_state(1, np.uint64)
    return FIRST_SEED + int(number) % (2**63 - FIRST_SEED)


class Recorder:
    """Records episodes of one world, one after the other; `close` frees its renderer."""

    world_type, expert_type = World, Expert

    def __init__(self, world_config: Any, config: RecordingConfig):
        self.world = self.world_type(world_config)
        self.expert = self.expert_type(self.world)
        self.config = config

    def close(self) -> None:
        """Free the renderer."""
        self.world.close()

    def episode(self, seed: int, split: str, index: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Encoded rows of episode `index` (see `shards.encode_row`) and why the attempts before it failed."""
        failures: list[str] = []
        for attempt in range(MAX_ATTEMPTS):
            rows, failure = self._attempt(episode_seed(seed, split, index, attempt), split, index)
            if failure is None:
                return rows, failures
            failures.append(failure)
        raise RuntimeError(
            f"episode {index} of {split} failed {MAX_ATTEMPTS} times ({', '.join(sorted(set(failures)))}); "
            "is the noise too large, or the world's config impossible?"
        )

    def _attempt(self, world_seed: int, split: str, index: int) -> tuple[list[dict[str, Any]], str | None]:
        """(rows, None) of a solved episode, or (rows so far, why it failed)."""
        world, expert, config = self.world, self.expert, self.config
        # the world spawns its own generators from world_seed; a second entry keeps these apart from them
        streams = np.random.SeedSequence((world_seed, 1)).spawn(4)
        noise, camera, relabel, misses = (np.random.default_rng(stream) for stream in streams)
        try:
            self._reset(world_seed, split, index)
        except NoViewError:
            return [], NO_VIEW
        except RuntimeError:
            return [], NO_LAYOUT
        spread = noise.uniform()
        rows: list[dict[str, Any]] = []
        carried = dropped = False
        missing: list[np.ndarray] = []  # what is left of a missed grasp
        while not expert.done:
            if len(rows) == config.max_frames:
                return rows, DROPPED if dropped else f"not solved in {config.max_frames} frames"
            if world.object_pose()[0][2] < world.table_z - 0.05:
                return rows, FELL
            if self._pushed():
                return rows, COLLISION
            held = world.held
            dropped |= carried and not held and not expert.situation().released
            carried = held and world.lift_m > CARRIED_M
            if config.camera_per_frame and rows:
                try:
                    world.redraw_camera(camera)
                except NoViewError:
                    return rows, NO_VIEW
            task = world.task
            before = not held and not world.placed and world.lift_m < MOVED_M and world.state()[-1] > OPEN
            if relabel.random() < config.relabel and before:
                world.choose_task(self._standing(relabel))
            row = self._row(index, len(rows))
            if not rows:  # 1 ms: once per episode is enough to see that the world keeps the contract
                schema.validate_row(row, where=f"world seed {world_seed}")
            rows.append(encode_row(row))
            action = row["action"]
            if world.task != task:
                world.choose_task(task)
                action = expert.plan(1)[0][0]
            if held or world.placed:
                missing = []
            elif not missing and world.state()[-1] > OPEN and misses.random() < config.miss_probability:
                missing = self._miss(misses)
            try:
                world.step(self._disturbed(missing.pop() if missing else action, spread, noise))
            except RuntimeError:
                return rows, DIVERGED
        return rows, None

    def _miss(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Actions of a missed grasp, the last one first: the gripper closes, and the arm rises as it would with what it
        takes itself to hold.
        """
        closed = self.world.robot.idle(gripper=-1.0)
        rises = closed.copy()
        rises[2] = rng.uniform(0.0, MISSED_RISE_M)
        return [rises] * int(rng.integers(MISSED_STEPS)) + [closed] * CLOSING_STEPS

    def _reset(self, world_seed: int, split: str, index: int) -> None:
        self.world.reset(world_seed)

    def _pushed(self) -> bool:
        """Whether an object that is not the target lies elsewhere than at the start."""
        world = self.world
        return any(
            np.linalg.norm(world.object_pose(number)[0] - world.rest_points[number]) > PUSHED_M
            for number in range(len(world.objects))
            if number != world.target_index
        )

    def _standing(self, rng: np.random.Generator) -> Task:
        """A random task of the scene whose objects still stand where they stood, the present one included."""
        world = self.world
        heights = [world.object_pose(number)[0][2] for number in range(len(world.objects))]
        stands = [abs(height - rest) < MOVED_M for height, rest in zip(heights, world.rest_z, strict=True)]
        tasks = [
            task
            for task in world.tasks
            if task == world.task or (stands[task.target] and (task.destination is None or stands[task.destination]))
        ]
        return tasks[int(rng.integers(len(tasks)))]

    def _row(self, index: int, frame: int) -> dict[str, Any]:
        world, seen = self.world, self.world.observe(labels=self.config.labels)
        plan, length, keyframe = self.expert.plan(self.config.plan_length)
        return {
            **seen_row(world, seen, index, frame),
            "action": plan[0],
            "action_plan": plan,
            "action_plan_length": int(length),
            "keyframe_pose": keyframe,
            "keyframe_symmetry": self.expert.keyframe_symmetry(),
        }

    def _disturbed(self, action: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
        """The action that is executed: the ideal one with noise of `spread` (0..1) times the config's, now and then a
        push.
        """
        config = self.config
        action = action.astype(np.float64)
        action[:3] += rng.normal(0.0, spread * config.noise_m, 3) if config.noise_m else 0.0
        turns = action[3:-1]
        turns += rng.normal(0.0, spread * config.noise_rad, len(turns)) if config.noise_rad else 0.0
        if rng.random() < config.push_probability:
            direction = rng.normal(size=3)
            action[:3] += direction / np.linalg.norm(direction) * rng.uniform(min(0.02, config.push_m), config.push_m)
        return action
