"""Closed-loop rollouts: many worlds in lockstep with one policy, success counted by physics."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from stereovla.evaluation.delays import DelayedArm, Delivery
from stereovla.evaluation.metrics import success_rate
from stereovla.evaluation.policies import Observation, Policy
from stereovla.evaluation.worlds import make_world
from stereovla.processing.rotations import rotation_vector_to_matrix
from stereovla.simulation import WorldConfig

RUNNING = ("running_actions", "delay")  # what a request says of the chunk that is executed
WRONG_LIFT_M = 0.05  # another object held this high was picked by mistake; the target counts from the same height


@dataclass
class RolloutConfig:
    """What the result of an episode depends on, beside the policy and the seed.

    world: a WorldConfig, or another that `make_world` knows.
    execution_horizon: actions executed of each predicted chunk before the policy looks again.
    max_steps: steps of 0.1 s after which an episode has failed.
    calibration_error_deg: by so much the camera's rotation that the policy is told is wrong, about an axis that follows
        from the seed: what an extrinsic calibration that has slipped costs.
    shown: what a model's geometry is shown, one of `shown_geometry.SHOWN`; "swapped" is the first moment of the next
        seed's episode.
    delivery: how late the answers are and what the arm does meanwhile; None = the world waits for the policy.
    """

    world: Any = field(default_factory=WorldConfig)
    execution_horizon: int = 3
    max_steps: int = 60
    calibration_error_deg: float = 0.0
    shown: str = "given"
    delivery: Delivery | None = None

    def __post_init__(self):
        for name in ("execution_horizon", "max_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.calibration_error_deg <= 180:
            raise ValueError(f"calibration_error_deg is {self.calibration_error_deg}; it must be in [0, 180]")


class Episode:
    """One world with one policy's slot in it: the states so far, and what became of it."""

    def __init__(self, slot: int, world: Any, config: RolloutConfig):
        self.slot, self.world, self.config = slot, world, config

    def reset(self, seed: int) -> None:
        """Begins the episode of `seed`."""
        self.another = None
        if self.config.shown == "swapped":
            self.world.reset(self.world.next_seed(seed))
            self.another = self.world.observe(labels=True)
        self.world.reset(seed)
        self.seed = seed
        self.states = [self.world.state()]
        self.wrong_object: str | None = None
        self.best_progress = self.world.progress
        self.done = self.success = False
        self.arm: DelayedArm | None = None
        if self.config.delivery is not None:
            axes, horizon = self.world.robot.axes, self.config.execution_horizon
            self.arm = DelayedArm(self.config.delivery, axes, horizon, seed)
            self.arm.begin(self.world.state())

    @property
    def steps(self) -> int:
        return len(self.states) - 1

    def observation(self, images: bool, depth: bool = False) -> Observation:
        """What the policy may know now; renders only if it needs `images` or `depth`."""
        views = self.world.observe(labels=depth) if images or depth else {"left": None, "right": None}
        now = Observation(
            slot=self.slot,
            seed=self.seed,
            step=self.steps,
            instruction=self.world.instruction,
            embodiment=self.world.robot.embodiment,
            states=np.stack(self.states),
            **self.seen(views, depth),
        )
        another = None if self.another is None else replace(now, **self.seen(self.another, depth))
        return replace(
            now,
            another=another,
            **({} if self.arm is None else {name: getattr(self.arm.request, name) for name in RUNNING}),
        )

    def seen(self, views: dict[str, Any], depth: bool) -> dict[str, Any]:
        """What an observation says of a world's `views`."""
        if depth and "depth" not in views:
            raise ValueError("the policy sees depth, of which this world tells nothing; --control osc is without")
        return {
            "left": views["left"],
            "right": views["right"],
            "views": {name: views.get(name) for name in self.world.views},
            "depths": {"left": views["depth"]} if depth else {},
            "calibration": self.told_calibration(views.get("calibration")),
        }

    def told_calibration(self, calibration: dict[str, Any] | None) -> dict[str, Any] | None:
        """The calibration with the config's error: the camera turned where it stands."""
        if calibration is None or not self.config.calibration_error_deg:
            return calibration
        axis = np.random.default_rng(self.seed).standard_normal(3)
        axis *= math.radians(self.config.calibration_error_deg) / np.linalg.norm(axis)
        pose = np.array(calibration["transform_camera_to_base"], dtype=np.float64)
        pose[:3, :3] = pose[:3, :3] @ rotation_vector_to_matrix(axis)
        return {**calibration, "transform_camera_to_base": pose}

    def execute(self, chunk: np.ndarray) -> Iterator[None]:
        """Executes the chunk's first `execution_horizon` actions, or what the arm does until it asks again, less where
        the episode ends; yields after each.
        """
        horizon = self.config.execution_horizon
        if len(chunk) < horizon:
            raise ValueError(f"execution_horizon is {horizon}, but the policy predicts {len(chunk)} actions")
        for action in chunk[:horizon] if self.arm is None else self.arm.actions(chunk, self.world.state):
            self.world.step(action)
            self.states.append(self.world.state())
            self.best_progress = max(self.best_progress, self.world.progress)
            self.success = bool(self.world.success)
            self.done = self.success or self.steps >= self.config.max_steps
            yield
            if self.done:
                break
        self.wrong_object = self.wrong_object or lifted_other(self.world)

    def record(self) -> dict[str, Any]:
        """The episode's result as JSON."""
        return {
            "seed": self.seed,
            "success": self.success,
            "steps": self.steps,
            "progress": round(self.best_progress, 4),
            "instruction": self.world.instruction,
            "target": self.world.target_name,
            "objects": [item.name for item in self.world.objects],
            "wrong_object": self.wrong_object,
            "shortened_moves": int(self.world.robot.shortened),
            **self.world.facts,
            **({} if self.arm is None else {"executor": dict(sorted(self.arm.executor.counts.items()))}),
        }


def lifted_other(world: Any) -> str | None:
    """Name of an object that is not the target and is held at least 5 cm above where it rested."""
    for index, item in enumerate(world.objects):
        if index != world.target_index and all(world.fingers_touching(index)):
            if world.object_pose(index)[0][2] - world.rest_z[index] >= WRONG_LIFT_M:
                return item.name
    return None


def run_episodes(
    policy: Policy, seeds: Iterator[int], config: RolloutConfig, environments: int = 8
) -> Iterator[dict[str, Any]]:
    """Runs the episodes of `seeds` in up to `environments` worlds in lockstep; yields each record as it is finished.

    One seed is taken whenever a world is free, so several processes may share `seeds`. The policy acts on all worlds at
    once. An episode's result does not depend on its neighbours, but for the float rounding of a batched model.
    """
    free = [Episode(slot, make_world(config.world), config) for slot in range(environments)]
    worlds = [episode.world for episode in free]
    active: list[Episode] = []
    try:
        while True:
            for seed in islice(seeds, len(free)):
                episode = free.pop()
                episode.reset(seed)
                policy.reset(episode.slot, episode.world)
                active.append(episode)
            if not active:
                return
            chunks = policy.act([episode.observation(policy.needs_images, policy.needs_depth) for episode in active])
            for episode, chunk in zip(active, chunks, strict=True):
                for _ in episode.execute(chunk):
                    pass
                if episode.done:
                    yield episode.record()
                    free.append(episode)
            active = [episode for episode in active if not episode.done]
    finally:
        for world in worlds:
            world.close()


def config_json(config: RolloutConfig) -> dict[str, Any]:
    """The config as it is saved beside the results."""
    values = asdict(config)
    if config.shown == "given":  # results from before there were others do not say
        del values["shown"]
    for key, value in values.pop("world").items():
        values[f"world.{key}"] = list(value) if isinstance(value, tuple) else value
    return values


def film(policy: Policy, seed: int, config: RolloutConfig) -> tuple[list[Observation], dict[str, Any]]:
    """Every step of one episode with both views, and its record."""
    episode = Episode(0, make_world(config.world), config)
    try:
        episode.reset(seed)
        policy.reset(0, episode.world)
        frames = [episode.observation(True, policy.needs_depth)]
        while not episode.done:
            (chunk,) = policy.act(frames[-1:])
            for _ in episode.execute(chunk):
                frames.append(episode.observation(True, policy.needs_depth))
        return frames, episode.record()
    finally:
        episode.world.close()


def summarise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Success with its interval, steps of the successes, progress and wrong objects of one policy's episodes."""
    steps = [record["steps"] for record in records if record["success"]]
    return {
        **success_rate([record["success"] for record in records]),
        "mean_steps_to_success": float(np.mean(steps)) if steps else None,
        "mean_progress": float(np.mean([record["progress"] for record in records])),
        "wrong_object_rate": float(np.mean([record["wrong_object"] is not None for record in records])),
    }
