"""The SCARA arm, and what every robot must be: conventions of the tool, tracking, gripper, grasps by contact alone."""

import mujoco
import numpy as np
import pytest
from test_simulation_expert import TASKS, pushed, rollout

from stereovla.simulation import Expert, World, WorldConfig
from stereovla.simulation.layout import FINGER_REACH_M, HAND_REACH_M
from stereovla.simulation.objects import MAX_GRASP_M
from stereovla.simulation.robot import POSE, TIPS_M
from stereovla.simulation.robots import ROBOTS

PALM_M = 0.045


@pytest.fixture(scope="module")
def scara():
    return World(WorldConfig.from_preset("easy", robot="scara", image_size=32, num_objects=1))


@pytest.fixture
def world(scara):
    scara.reset(3)
    return scara


def act(*values: float, gripper: float = 1.0) -> np.ndarray:
    return np.array([*values, *[0.0] * (4 - len(values)), gripper])


def corners(world: World, bodies: tuple[str, ...]) -> np.ndarray:
    """(n, 3) in the base frame: vertices of the meshes and corners of the boxes around other geoms of some bodies."""
    model, data = world.model, world.data
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1).T
    points = []
    for geom in range(model.ngeom):
        if model.body(model.geom_bodyid[geom]).name in bodies:
            mesh = model.geom_dataid[geom]
            if mesh >= 0:
                start = model.mesh_vertadr[mesh]
                local = model.mesh_vert[start : start + model.mesh_vertnum[mesh]]
            else:
                local = model.geom_aabb[geom, :3] + signs * model.geom_aabb[geom, 3:]
            points.append(local @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(points)


@pytest.mark.parametrize("name", list(ROBOTS))
def test_every_robot_keeps_the_conventions(name):
    options = {"start_yaw_rad": 0.0, "start_x": 0.45, "start_y": 0.0, "num_objects": 1, "image_size": 32}
    world = World(WorldConfig.from_preset("easy", robot=name, **options))
    world.reset(0)
    robot, (tool, rotation) = world.robot, world.robot.tool_pose()
    np.testing.assert_allclose(rotation, np.eye(3), atol=2e-3)
    pads = [world.model.geom(pad).id for pad in ("left_pad", "right_pad")]
    np.testing.assert_allclose(world.data.geom_xpos[pads].mean(0), tool, atol=1e-3)
    inner = [abs(world.data.geom_xpos[pad][1] - tool[1]) - world.model.geom_size[pad][1] for pad in pads]
    np.testing.assert_allclose(inner, robot.opening_m / 2, atol=5e-4)
    assert MAX_GRASP_M < robot.opening_m
    fingers = corners(world, ("left_finger", "right_finger")) - tool
    assert -TIPS_M - 0.0025 < fingers[:, 2].min() < -TIPS_M + 0.001  # the Panda's meshes end 2.4 mm lower
    low = fingers[fingers[:, 2] < 0.03]
    assert np.abs(low[:, 1]).max() <= FINGER_REACH_M
    hand = corners(world, ("hand",)) - tool
    assert np.abs(hand[:, 1]).max() <= HAND_REACH_M + 1e-3
    palm = hand[np.abs(hand[:, 1]) < FINGER_REACH_M, 2]  # what is above an object; the Panda's hand has feet beside it
    assert palm.min() > PALM_M - 0.008
    closed = [robot.opening()]
    for _ in range(7):
        world.step(robot.idle(gripper=-1.0))
        closed.append(robot.opening())
    assert -np.diff(closed)[:3].mean() == pytest.approx(robot.closing_rate, abs=0.05) and closed[-1] < 0.02
    whole = np.arange(1.0, 8.0)
    own = robot.from_pose(whole)
    assert own.shape == world.state().shape == (len(robot.axes),)
    np.testing.assert_array_equal(robot.from_pose(robot.to_pose(own)), own)
    assert set(robot.to_pose(own)) - {0.0} == set(own) and robot.axes[-1] == POSE[-1] == "gripper"


def test_the_two_robots_differ_in_what_a_model_sees_and_does():
    worlds = [World(WorldConfig.from_preset("default", robot=name, image_size=32)) for name in ROBOTS]
    for world in worlds:
        world.reset(5)
    panda, scara = worlds
    assert len(panda.state()) == 7 and len(scara.state()) == 5
    assert panda.robot.embodiment != scara.robot.embodiment
    np.testing.assert_allclose(panda.state()[[0, 1, 2, 5, 6]], scara.state(), atol=2e-3)
    assert panda.objects == scara.objects and panda.instruction == scara.instruction  # one seed, one scene
    first, second = (world.calibration for world in worlds)
    assert second["focal_length_px"][0] > 1.1 * first["focal_length_px"][0]
    assert second["baseline_m"] > 1.05 * first["baseline_m"]
    assert np.linalg.norm((first["transform_camera_to_base"] - second["transform_camera_to_base"])[:3, 3]) > 0.15
    mine = scara.observe(labels=True)["segmentation"]
    assert {1, 2, 3} <= set(np.unique(mine).tolist())
    for world in worlds:
        world.close()


def test_presets_and_changes_compose_with_the_robot():
    panda, scara = (WorldConfig.from_preset("easy", robot=name) for name in ROBOTS)
    assert scara.fovy_deg[0] == pytest.approx(0.8 * panda.fovy_deg[0]) and scara.tasks == panda.tasks
    given = WorldConfig.from_preset("geometry", robot="scara", fovy_deg=60.0, start_x=[0.3, 0.4])
    assert given.fovy_deg == (60.0, 60.0) and given.start_x == (0.3, 0.4) and not given.start_in_view
    for make in (WorldConfig, WorldConfig.from_preset):
        with pytest.raises(ValueError, match="robot: 'scarra' is not one of panda, scara; did you mean 'scara'"):
            make(robot="scarra")


def test_inverse_kinematics_reaches_the_workspace(world):
    robot, rng = world.robot, np.random.default_rng(0)
    check = mujoco.MjData(world.model)
    for _ in range(200):
        goal = np.array([rng.uniform(0.25, 0.70), rng.uniform(-0.25, 0.25), rng.uniform(-0.10, 0.55)])
        yaw = rng.uniform(-1.5, 1.5)
        rotation = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
        check.qpos[robot.qpos] = robot.solve(goal, rotation, world.data.qpos[robot.qpos])
        mujoco.mj_kinematics(world.model, check)
        np.testing.assert_allclose(check.site_xpos[robot.tool], goal, atol=1e-9)
        np.testing.assert_allclose(check.site_xmat[robot.tool].reshape(3, 3), rotation, atol=1e-9)


def test_delta_is_reached_within_its_step(world):
    rng = np.random.default_rng(1)
    world.step(act(0, 0, 0.05))  # away from the objects
    for _ in range(20):
        before, yaw = world.robot.tool_pose()[0], world.state()[3]
        move = rng.uniform(-1, 1, 3)
        move *= 0.025 / np.linalg.norm(move)
        turn = rng.uniform(-0.2, 0.2)
        world.step(act(*move, turn))
        assert np.linalg.norm(world.robot.tool_pose()[0] - before - move) < 2e-4
        assert abs(world.state()[3] - yaw - turn) < 0.01
    before = world.robot.tool_pose()[0]
    for _ in range(20):
        world.step(act())
    assert np.linalg.norm(world.robot.tool_pose()[0] - before) < 3e-4


def test_limits(world):
    world.step(act(0, 0, 0.05))
    before = world.robot.tool_pose()[0]
    world.step(act(0, 0, 0.5, 2.0))
    assert world.robot.shortened == 2
    assert 0.04 < np.linalg.norm(world.robot.tool_pose()[0] - before) <= 0.065
    for _ in range(30):  # beyond its reach it stays at the end of it, and nothing breaks
        world.step(act(0.06, 0.0, 0.03))
    assert 0.70 < world.state()[0] < 0.79 and np.isfinite(world.data.qpos).all()
    with pytest.raises(ValueError, match=r"5 finite numbers \(dx, dy, dz, dyaw, gripper\)"):
        world.step(np.zeros(7))
    with pytest.raises(ValueError, match="out of reach"):
        World(WorldConfig.from_preset("easy", robot="scara", start_x=0.7, start_y=0.5)).reset(0)


def test_nothing_of_the_arm_is_in_the_table(scara):
    for seed in range(6):
        scara.reset(seed)
        expert = Expert(scara)
        for _ in range(40):
            if expert.done:
                break
            scara.step(expert.plan(1)[0][0])
            points = corners(scara, ("upper_arm", "forearm", "shaft", "hand", "left_finger", "right_finger"))
            assert points[:, 2].min() > scara.table_z - 1e-3
        assert scara.success


def test_a_grasp_holds_by_friction_alone(world):
    """Without friction at the pads the same motion lifts nothing; opened fingers let it fall."""
    assert world.model.neq == 1  # the coupled fingers; no welds

    def lift(friction: float) -> float:
        world.reset(3)
        for pad in ("left_pad", "right_pad"):
            world.model.geom(pad).friction[:] = friction
        expert = Expert(world)
        for _ in range(16):
            world.step(expert.plan(1)[0][0])
        return world.lift_m

    assert lift(0.0) < 0.01
    world.reset(3)
    expert = Expert(world)
    while not expert.done:
        world.step(expert.plan(1)[0][0])
    for _ in range(10):  # it does not creep out of the grip
        world.step(act(gripper=0.0))
    assert world.held and world.lift_m > 0.05
    for _ in range(5):
        world.step(act())
    assert not world.held and world.lift_m < 0.01


@pytest.mark.parametrize("preset", ["default", "geometry"])
@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_every_task_without_pushing_others(preset, task):
    world = World(WorldConfig.from_preset(preset, robot="scara", tasks=task, image_size=32))
    for seed in range(1000, 1002):
        assert rollout(world, seed) and pushed(world) == []


def test_expert_solves_easy_picks_with_noise():
    world = World(WorldConfig.from_preset("easy", robot="scara", image_size=32))
    assert sum(rollout(world, seed, 0.01) for seed in range(10)) >= 9


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "geometry"])
@pytest.mark.parametrize("task", TASKS)
def test_expert_succeeds_on_100_seeds(preset, task):
    world = World(WorldConfig.from_preset(preset, robot="scara", tasks=task, image_size=32))
    assert sum(rollout(world, seed, steps=120) for seed in range(100)) >= 95
