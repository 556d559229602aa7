"""The expert: solves every task by physics, also when pushed around; plans are pure, bounded and smooth."""

from dataclasses import replace

import numpy as np
import pytest

from stereovla.simulation import Expert, World, WorldConfig
from stereovla.simulation.config import KEYFRAMES
from stereovla.simulation.expert import LIFT_M, SPEED_M, TURN_RAD, decide, keyframe_of, needed_height
from stereovla.simulation.objects import GRASPABLES

TASKS = ("pick", "stack", "move")


def rollout(world: World, seed: int, noise_m: float = 0.0, steps: int = 80) -> bool:
    """Whether the expert succeeds on a seed when gaussian noise of `noise_m` moves every executed step."""
    world.reset(seed)
    expert, rng = Expert(world), np.random.default_rng(seed)
    for _ in range(steps):
        if expert.done:
            break
        action = expert.plan(1)[0][0].copy()
        action[:3] += rng.normal(0.0, noise_m, 3)
        world.step(action)
    return world.success


def pushed(world: World) -> list[str]:
    """Names of the objects, other than the target, that lie 2 cm or more from where they were."""
    others = [index for index in range(len(world.objects)) if index != world.target_index]
    moved = [np.linalg.norm(world.object_pose(index)[0] - world.rest_points[index]) for index in others]
    return [world.objects[index].name for index, distance in zip(others, moved, strict=True) if distance > 0.02]


@pytest.fixture(scope="module")
def world():
    return World(WorldConfig.from_preset("easy", image_size=32))


@pytest.mark.parametrize("noise_m", [0.0, 0.01])
def test_expert_succeeds_in_the_easy_world(world, noise_m):
    assert sum(rollout(world, 1000 + seed, noise_m) for seed in range(6)) >= 5


@pytest.mark.parametrize("preset", ["default", "geometry"])
@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_every_task_without_pushing_others(preset, task):
    world = World(WorldConfig.from_preset(preset, tasks=task, image_size=32))
    solved = 0
    for seed in range(1000, 1003):
        solved += rollout(world, seed)
        assert pushed(world) == []
    assert solved == 3


@pytest.mark.parametrize("kind", GRASPABLES)
def test_every_kind_of_object_is_picked_up(kind):
    options = {"objects": kind, "num_objects": 1, "tasks": "pick", "image_size": 32}
    world = World(WorldConfig.from_preset("default", **options))
    assert rollout(world, 7) and world.target.kind == kind


@pytest.mark.parametrize("seed", range(3))
def test_every_object_can_be_the_target(world, seed):
    world.reset(seed)
    for name in [item.name for item in world.objects]:
        world.reset(seed)
        world.choose_target(name)
        expert = Expert(world)
        for _ in range(40):
            if expert.done:
                break
            world.step(expert.plan(1)[0][0])
        assert world.success, name


def test_planning_changes_nothing_and_repeats(world):
    world.reset(0)
    before = world.data.qpos.copy()
    first, second = Expert(world).plan(16), Expert(world).plan(16)
    np.testing.assert_array_equal(world.data.qpos, before)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def test_plan_is_bounded_and_padded(world):
    for seed in range(4):
        world.reset(seed)
        actions, length, keyframe = Expert(world).plan(40)
        assert actions.shape == (40, 7) and actions.dtype == np.float32
        assert keyframe.shape == (7,) and keyframe.dtype == np.float32
        assert 8 < length < 30
        assert np.linalg.norm(actions[:, :3], axis=1).max() <= SPEED_M + 1e-6
        assert np.abs(actions[:, 3:6]).max() <= TURN_RAD + 1e-6
        assert set(actions[:, 6]) == {-1.0, 1.0}
        np.testing.assert_array_equal(actions[length:], np.tile([0, 0, 0, 0, 0, 0, -1], (40 - length, 1)))
        # open, then closed, once
        assert np.count_nonzero(np.diff(actions[:, 6])) == 1
        short, short_length, _ = Expert(world).plan(5)
        np.testing.assert_array_equal(short, actions[:5])
        assert short_length == 5


def test_the_plan_executed_blindly_mostly_works(world):
    successes = 0
    for seed in range(5):
        world.reset(seed)
        actions, length, _ = Expert(world).plan(40)
        for action in actions[: length + 2]:
            world.step(action)
        successes += world.success
    assert successes >= 4


def test_keyframes_are_the_grasp_and_then_the_lift(world):
    world.reset(0)
    expert = Expert(world)
    grasp = expert.plan(1)[2]
    np.testing.assert_allclose(grasp[:3], world.object_pose()[0], atol=2e-3)
    assert grasp[6] == 1.0
    closed_at = None
    for _ in range(40):
        if expert.done:
            break
        keyframe = expert.plan(1)[2]
        if keyframe[6] == 0.0 and closed_at is None:
            closed_at = world.state()
            assert keyframe[2] == pytest.approx(closed_at[2] + LIFT_M, abs=0.01)
        world.step(expert.plan(1)[0][0])
    assert closed_at is not None
    np.testing.assert_allclose(closed_at[:3], grasp[:3], atol=0.01)  # it grasped where it said
    assert closed_at[5] == pytest.approx(grasp[5], abs=0.1)


def test_a_dropped_object_is_picked_up_again(world):
    world.reset(1)
    expert = Expert(world)
    for _ in range(40):
        if world.held and world.lift_m > 0.03:
            break
        world.step(expert.plan(1)[0][0])
    assert world.held
    for _ in range(3):
        world.step(np.array([0.01, 0, 0.01, 0, 0, 0, 1.0]))
    assert not world.held
    for _ in range(60):
        if expert.done:
            break
        world.step(expert.plan(1)[0][0])
    assert world.success


def test_a_closed_gripper_opens_above_the_object(world):
    world.reset(2)
    expert = Expert(world)
    for _ in range(40):
        if np.linalg.norm(world.state()[:3] - expert.plan(1)[2][:3]) < 0.06:
            break
        world.step(expert.plan(1)[0][0])
    for _ in range(5):
        world.step(np.array([0, 0, 0.01, 0, 0, 0, -1.0]))
    assert world.state()[6] < 0.02
    assert expert.plan(1)[0][0][6] == 1.0
    for _ in range(60):
        if expert.done:
            break
        world.step(expert.plan(1)[0][0])
    assert world.success


def test_approach_is_a_smooth_function_of_the_state(world):
    """A tool 1 mm away gets nearly the same action: no hidden switches on the way to the object."""
    world.reset(5)
    expert = Expert(world)
    for _ in range(5):
        here = expert.plan(1)[0][0]
        now = expert.situation()
        for axis in range(3):
            moved = now.position.copy()
            moved[axis] += 1e-3
            assert np.abs(decide(replace(now, position=moved)) - here)[:3].max() < 4e-3
        world.step(here)


@pytest.mark.parametrize("task", TASKS)
def test_keyframes_come_in_their_order_and_are_reached(task):
    world = World(WorldConfig(tasks=task, image_size=32))
    world.reset(2)
    expert, seen, path = Expert(world), [], []
    for _ in range(60):
        if expert.done:
            break
        name, pose = keyframe_of(expert.situation())
        if not seen or seen[-1][0] != name:
            seen.append((name, pose))
        path.append(world.state()[:3])
        world.step(expert.plan(1)[0][0])
    names = [name for name, _ in seen]
    assert names == list(KEYFRAMES[: 3 if task == "pick" else 5])
    for name, pose in seen:
        assert pose.dtype == np.float32 and pose[6] == (1.0 if "grasp" in name else 0.0)
        # those where something happens are reached exactly, the others are passed
        close = 0.01 if name in ("grasp", "place") else 0.07
        assert np.linalg.norm(np.array(path) - pose[:3], axis=1).min() < close, name


def test_only_the_keyframes_that_are_asked_for_are_named():
    world = World(WorldConfig(tasks="move", keyframes=("grasp", "place"), image_size=32))
    world.reset(2)
    expert, now = Expert(world), []
    for _ in range(60):
        if expert.done:
            break
        now.append(keyframe_of(expert.situation(), world.config.keyframes)[0])
        np.testing.assert_array_equal(expert.plan(1)[2], keyframe_of(expert.situation(), world.config.keyframes)[1])
        world.step(expert.plan(1)[0][0])
    assert world.success and list(dict.fromkeys(now)) == ["grasp", "place"]


@pytest.mark.parametrize("task", ["stack", "move"])
def test_the_plan_of_a_placing_task_is_bounded_and_ends_open(task):
    world = World(WorldConfig(tasks=task, image_size=32))
    for seed in range(4):
        world.reset(seed)
        actions, length, _ = Expert(world).plan(80)
        assert 20 < length < 60
        assert np.linalg.norm(actions[:, :3], axis=1).max() <= SPEED_M + 1e-6
        np.testing.assert_array_equal(actions[length:], np.tile([0, 0, 0, 0, 0, 0, 1], (80 - length, 1)))
        # open, closed, open
        assert np.count_nonzero(np.diff(actions[:, 6])) == 2


@pytest.mark.parametrize("task", ["stack", "move"])
def test_a_target_dropped_on_the_way_is_fetched_again(task):
    world = World(WorldConfig(tasks=task, image_size=32, objects=("cube", "bowl", "bread"), support_share=0.0))
    world.reset(4)
    expert = Expert(world)
    for _ in range(40):
        if world.held and world.lift_m > 0.02:
            break
        world.step(expert.plan(1)[0][0])
    for _ in range(3):
        world.step(np.array([0, 0, 0.01, 0, 0, 0, 1.0]))
    assert not world.held and not world.placed
    for _ in range(80):
        if expert.done:
            break
        world.step(expert.plan(1)[0][0])
    assert world.success


def test_travels_over_what_is_in_the_way():
    """A start behind a tall neighbour: the tool goes over it, and never through."""
    world = World(WorldConfig.from_preset("geometry", tasks="pick", image_size=32))
    for seed in range(1000, 1004):
        world.reset(seed)
        expert = Expert(world)
        for _ in range(60):
            if expert.done:
                break
            now = expert.situation()
            inside = np.hypot(*(now.obstacles[:, :2] - now.position[:2]).T) < now.obstacles[:, 2]
            assert (now.position[2] - now.depth > now.obstacles[inside, 3] - 0.002).all()
            world.step(expert.plan(1)[0][0])
    now = replace(now, obstacles=np.array([[0.5, 0.0, 0.02, 0.10]]))
    over, beside = (needed_height(now, np.array(xy)) for xy in ((0.5, 0.0), (0.5, 0.2)))
    assert over == pytest.approx(0.12 + now.depth) and beside < over - 0.2
