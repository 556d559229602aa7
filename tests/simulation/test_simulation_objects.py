"""The library: every entry can be grasped, rests as it is put, and is drawn where it collides."""

import mujoco
import numpy as np
import pytest

from stereovla.simulation.appearance import draw_appearance
from stereovla.simulation.config import WorldConfig
from stereovla.simulation.expert import TURN_RAD
from stereovla.simulation.grasps import choose_grasp
from stereovla.simulation.objects import (
    COLORS,
    CONTAINERS,
    GRASPABLES,
    KINDS,
    MAX_GRASP_M,
    NATURAL,
    PRIMITIVES,
    TableObject,
    footprint,
)
from stereovla.simulation.robots import ROBOTS
from stereovla.simulation.scene import build_model, load_robot

PANDA = load_robot("panda.xml")


def made(name: str, seed: int, scale: tuple[float, float] = (1.0, 1.0)) -> TableObject:
    half = KINDS[name].draw_half_size(np.random.default_rng(seed), scale)
    return TableObject(name, None if name in NATURAL else "red", half, (0.5, 0.0), 0.3)


def alone(item: TableObject) -> tuple[mujoco.MjModel, mujoco.MjData, int]:
    """Model, data and body of one object on a table at z = 0."""
    look = draw_appearance(WorldConfig(), np.random.default_rng(0))
    model = build_model(PANDA, [item], 0.0, look, (16, 16))
    return model, mujoco.MjData(model), model.body("object0").id


def test_library_is_broad():
    assert len(GRASPABLES) >= 12 and len(CONTAINERS) >= 3
    sizes = [2 * size for name in GRASPABLES for half in (KINDS[name].low, KINDS[name].high) for size in [max(half)]]
    assert min(sizes) <= 0.015 and max(sizes) >= 0.08


@pytest.mark.parametrize("name", [*GRASPABLES, *CONTAINERS])
def test_rests_as_it_is_put(name):
    item = made(name, 1)
    model, data, body = alone(item)
    mujoco.mj_forward(model, data)
    before = data.xpos[body].copy()
    for _ in range(250):  # 1 s
        mujoco.mj_step(model, data)
    assert np.abs(data.xpos[body] - before).max() < 2e-3
    assert data.xmat[body].reshape(3, 3)[2, 2] > 0.995
    assert np.abs(data.qvel[model.body_dofadr[body] :]).max() < 0.02


@pytest.mark.parametrize("name", [*GRASPABLES, *CONTAINERS])
def test_is_drawn_where_it_collides(name):
    """What is drawn and the solids reach equally far, and the faces that are drawn look outwards."""
    item = made(name, 2)
    geometry, reach = KINDS[name].geometry(item.half_size), footprint(name, item.half_size)
    signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
    points = []
    for solid in geometry.solids:
        corners = solid.points if solid.kind == "hull" else signs * solid.size
        if solid.kind == "sphere":
            corners = np.concatenate([np.eye(3), -np.eye(3)]) * solid.size[0]
        points.append((corners if solid.rotation is None else corners @ solid.rotation.T) + solid.position)
    points = np.concatenate(points)
    assert np.abs(points[:, 2]).max() == pytest.approx(item.half_size[2], abs=2e-3)
    assert np.hypot(*points.T[:2]).max() == pytest.approx(reach, rel=0.06)
    if geometry.mesh is not None:
        vertices, faces = geometry.mesh
        assert np.abs(vertices[:, 2]).max() == pytest.approx(item.half_size[2], rel=0.02)
        assert np.hypot(*vertices.T[:2]).max() <= reach + 1e-3
        a, b, c = (vertices[faces[:, k]] for k in range(3))
        assert np.einsum("ij,ij->i", a, np.cross(b, c)).sum() > 0  # six times the enclosed volume


@pytest.mark.parametrize("name", GRASPABLES)
def test_fits_between_the_fingers_at_every_scale(name):
    for seed in range(40):
        for scale in ((1.0, 1.0), (0.5, 2.0)):
            item = made(name, seed, scale)
            grasp = choose_grasp(item, np.array([0.5, 0.0, item.half_size[2]]), np.eye(3), 0.0, 0.0)
            assert 0.008 < grasp.width <= MAX_GRASP_M < min(robot.opening_m for robot in ROBOTS.values())
            assert max(item.half_size) <= 0.0525 and max(item.half_size) >= 0.0075 - 1e-9
            assert grasp.position[2] >= 0.0109 and grasp.rise <= 0.0351
            assert abs(grasp.yaw) <= np.pi / 2


def test_scale_reaches_both_ways():
    cubes = [made("cube", seed, (0.5, 2.0)).half_size[0] * 2 for seed in range(200)]
    assert min(cubes) < 0.022 and max(cubes) > 0.065


@pytest.mark.parametrize("name, period", [("cube", np.pi / 2), ("mug", np.pi), ("nut", np.pi / 3), ("bowl", np.pi / 6)])
def test_equal_sides_give_equal_grasps(name, period):
    item = made(name, 3)
    for yaw in np.linspace(-3, 3, 13):
        grasp = choose_grasp(item, np.array([0.5, 0.0, 0.03]), about_z(yaw), 0.0, 0.0)
        assert abs(grasp.yaw) <= period / 2 + 1e-6
        assert (grasp.yaw - yaw) / period == pytest.approx(round((grasp.yaw - yaw) / period), abs=1e-6)


def about_z(yaw):
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def test_as_many_grasps_are_as_right_as_there_are_pairs_of_sides():
    center = np.array([0.5, 0.0, 0.03])
    symmetries = {name: choose_grasp(made(name, 0), center, about_z(0.1), 0.0, 0.0).symmetry for name in GRASPABLES}
    sides = {"cube": 4, "dice": 4, "bar": 2, "pen": 2, "domino": 2, "mug": 2, "nut": 6, "bowl": 12, "ball": 2, "can": 2}
    assert {name: symmetries[name] for name in sides} == sides
    for name in GRASPABLES:  # an object that is turned on by one of them is grasped at the same yaw
        grasps = [
            choose_grasp(made(name, 0), center, about_z(0.1 + turn), 0.0, 0.2)
            for turn in (0, 2 * np.pi / symmetries[name])
        ]
        assert grasps[0].yaw == pytest.approx(grasps[1].yaw, abs=1e-6) and grasps[0].width == grasps[1].width


def test_once_the_tool_turns_noise_does_not_change_the_choice():
    """The choice between two yaws has to leap somewhere, but the tool's own yaw remembers it: after one step towards it
    the noise of a recording (0.05 rad) flips none.
    """
    bar, center = made("bar", 0), np.array([0.5, 0.0, 0.015])
    leaps = 0
    for angle in np.linspace(-np.pi, np.pi, 145):
        for start in np.linspace(-0.5, 0.5, 11):
            chosen = choose_grasp(bar, center, about_z(angle), 0.0, start).yaw
            now = start + np.clip(chosen - start, -TURN_RAD, TURN_RAD)
            for noise in (-0.05, 0.05):
                leaps += abs(choose_grasp(bar, center, about_z(angle), 0.0, now + noise).yaw - chosen) > 1e-6
    assert leaps == 0


def test_a_lying_can_is_taken_across():
    item = made("can", 0)
    rotation = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # its axis along base x
    grasp = choose_grasp(item, np.array([0.5, 0.0, item.half_size[0]]), rotation, 0.0, 0.0)
    assert grasp.yaw == pytest.approx(0.0, abs=1e-6) and grasp.width == pytest.approx(2 * item.half_size[0])


def test_names():
    assert made("cube", 0).name == "red cube" and made("lemon", 0).name == "lemon"
    assert set(PRIMITIVES) <= set(GRASPABLES) and not set(GRASPABLES) & set(CONTAINERS)
    assert all(name.isalpha() and name.islower() for name in [*KINDS, *COLORS])
