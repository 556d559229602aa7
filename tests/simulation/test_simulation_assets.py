"""The shipped Panda: complete, small, licensed, and the command that makes it."""

from pathlib import Path

import mujoco
import numpy as np
import pytest

from stereovla.simulation.assets_from_robosuite import OBJECTS, colour_of, write_obj

ASSETS = Path(__file__).parents[2] / "simulation" / "assets"


def test_files_are_small_and_licensed():
    files = list(ASSETS.iterdir())
    assert sum(file.stat().st_size for file in files) < 1_000_000
    assert "Apache License" in (ASSETS / "LICENSE-franka_description.txt").read_text()
    assert "MIT License" in (ASSETS / "LICENSE-robosuite.txt").read_text()
    text = (ASSETS / "LICENSES.md").read_text()
    assert "franka_description" in text and "robosuite" in text


def test_every_mesh_is_used_and_light():
    model = mujoco.MjModel.from_xml_path(str(ASSETS / "panda.xml"))
    objects = [f"object_{name}" for name in OBJECTS]
    assert sorted(file.stem for file in ASSETS.glob("object_*.obj")) == sorted(objects)
    assert model.nmesh == len(list(ASSETS.glob("*.obj"))) - len(objects)
    visual = [i for i in range(model.nmesh) if not model.mesh(i).name.endswith("_collision")]
    assert sum(model.mesh_facenum[visual]) < 12_000


def test_reach_and_limits_of_the_real_arm():
    model = mujoco.MjModel.from_xml_path(str(ASSETS / "panda.xml"))
    data = mujoco.MjData(model)
    # Franka's published kinematics: at zero angles the flange is at (0.088, 0, 0.333 + 0.316 + 0.384 - 0.107)
    mujoco.mj_kinematics(model, data)
    tool = data.site_xpos[model.site("tool").id]
    np.testing.assert_allclose(tool, [0.088, 0.0, 0.926 - 0.1034], atol=1e-6)
    assert model.jnt_range[:7, 0] == pytest.approx([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])


def test_command_pieces(tmp_path):
    assert [colour_of(rgba) for rgba in ("0.9 0.92 0.93 1", "0.25 0.25 0.25 1", "1 0 0 1")] == ["white", "dark", "dark"]
    write_obj(tmp_path / "a.obj", np.array([[0, 0, -0.00001], [1, 0, 0], [0, 1, 0.12345]]), np.array([[0, 1, 2]]))
    lines = (tmp_path / "a.obj").read_text().splitlines()
    assert lines[1:] == ["v 0.0000 0.0000 0.0000", "v 1.0000 0.0000 0.0000", "v 0.0000 1.0000 0.1235", "f 1 2 3"]
    assert not list(tmp_path.glob("*.tmp"))
