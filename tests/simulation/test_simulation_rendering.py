"""The rig: depth, disparity, calibration and segmentation against independent computations; renderer reuse."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reprojection import shifts_of

from stereovla.simulation import World, WorldConfig
from stereovla.simulation.camera import RANGES, project
from stereovla.simulation.rendering import HIDDEN_GROUP, StereoRenderer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=list(RANGES))
def seen(request):
    world = World(WorldConfig.from_preset("easy", camera_range=request.param, image_size=(192, 256), objects=("ball",)))
    world.reset(11)
    yield world, world.observe(labels=True)
    world.close()


def rays(calibration: dict, height: int, width: int) -> np.ndarray:
    """(H, W, 3) directions in the base frame with unit depth along the optical axis, from the calibration alone."""
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    (fx, fy), (cx, cy) = calibration["focal_length_px"], calibration["principal_point_px"]
    local = np.stack([(column - cx) / fx, (row - cy) / fy, np.ones_like(row)], axis=-1)
    return local @ calibration["transform_camera_to_base"][:3, :3].T


def test_shapes_and_types(seen):
    _, result = seen
    for view in ("left", "right"):
        assert result[view].shape == (192, 256, 3) and result[view].dtype == np.uint8
    assert result["depth"].shape == (192, 256) and result["depth"].dtype == np.float32
    assert result["segmentation"].shape == (192, 256) and result["segmentation"].dtype == np.uint8
    calibration = result["calibration"]
    assert {key: np.shape(value) for key, value in calibration.items()} == {
        "focal_length_px": (2,),
        "principal_point_px": (2,),
        "baseline_m": (),
        "transform_camera_to_base": (4, 4),
    }
    assert all(value.dtype == np.float32 for value in calibration.values())
    assert calibration["focal_length_px"][0] == pytest.approx(96 / np.tan(np.radians(22.5)), rel=1e-6)


def test_depth_of_the_table_is_where_the_rays_meet_it(seen):
    world, result = seen
    calibration, depth = result["calibration"], result["depth"]
    direction = rays(calibration, *depth.shape)
    origin = calibration["transform_camera_to_base"][:3, 3]
    expected = (world.table_z - origin[2]) / direction[..., 2]
    point = origin + expected[..., None] * direction
    inside = (np.abs(point[..., 0] - 0.55) < 0.3) & (np.abs(point[..., 1]) < 0.5) & (expected > 0)
    table = inside & (result["segmentation"] == 0)
    assert table.sum() > 5000
    assert np.abs(depth - expected)[table].max() < 1e-3
    assert 0 < depth.min() and depth.max() < 6.0


def test_balls_are_seen_where_the_calibration_projects_them(seen):
    world, result = seen
    calibration = result["calibration"]
    center = world.object_pose()[0]
    pose = calibration["transform_camera_to_base"].astype(np.float64)
    args = calibration["focal_length_px"], calibration["principal_point_px"]
    left = project(center[None], pose, *args)[0]
    pose[:3, 3] += pose[:3, 0] * calibration["baseline_m"]
    right = project(center[None], pose, *args)[0]
    for pixel, box in ((left, result["box_left"]), (right, result["box_right"])):
        assert np.abs(pixel - (box[:2] + box[2:]) / 2).max() < 1.0  # the box is whole pixels wide
    rows, columns = np.nonzero(result["segmentation"] == 3)
    assert np.abs(left - [columns.mean() + 0.5, rows.mean() + 0.5]).max() < 0.5
    # rectified: same row; disparity = focal * baseline / depth
    depth = (np.linalg.inv(calibration["transform_camera_to_base"]) @ [*center, 1.0])[2]
    disparity = calibration["focal_length_px"][0] * calibration["baseline_m"] / depth
    np.testing.assert_allclose(left - right, [disparity, 0.0], atol=0.01)


def reprojection_shifts(**options) -> np.ndarray:
    """(n, 2) px: how far the right view, warped by focal * baseline / depth, lies from the left one, over two seeds."""
    world = World(
        WorldConfig(
            **{"image_size": (256, 320), "right_gain": 1.0, "right_offset": 0.0, "right_color": 1.0, "noise_std": 0.0}
            | {"vertical_misalignment_px": 0.0, "texture_contrast": 0.25, "tasks": "pick", "headlight": 0.0}
            | options
        )
    )
    measured = []
    for seed in (3, 5):
        world.reset(seed)
        measured.append(shifts_of(world.observe(labels=True)))
    world.close()
    return np.concatenate(measured)


@pytest.mark.parametrize("camera_range", list(RANGES))
@pytest.mark.parametrize("fovy_deg", [45.0, 60.0, 75.0])
def test_disparity_is_focal_times_baseline_over_depth(camera_range, fovy_deg):
    """The photometric proof: textured patches of the warped right view lie on the left view."""
    found = reprojection_shifts(camera_range=camera_range, fovy_deg=fovy_deg)
    assert len(found) > 40
    assert np.percentile(np.abs(found), 95) < 0.5
    assert np.abs(np.median(found, axis=0)).max() < 0.1


def test_a_wrong_baseline_would_be_seen(monkeypatch):
    """The proof can fail: a baseline that is wrong by 5 % shifts the patches by more than half a pixel."""
    right = World.redraw_camera

    def wrong(self, rng):
        right(self, rng)
        self.calibration["baseline_m"] = np.float32(1.05) * self.calibration["baseline_m"]

    monkeypatch.setattr(World, "redraw_camera", wrong)
    assert np.median(np.abs(reprojection_shifts()[:, 0])) > 0.5


@pytest.mark.parametrize("lower_px", [-1.0, 0.8])
def test_vertical_misalignment_is_rendered_and_not_told(lower_px):
    found = reprojection_shifts(vertical_misalignment_px=lower_px)
    # the warped right picture lies lower, so the left patch is found above it
    assert np.median(found[:, 1]) == pytest.approx(lower_px, abs=0.2)
    assert abs(np.median(found[:, 0])) < 0.1


def test_labels_are_only_rendered_when_asked(seen):
    world, result = seen
    plain = world.observe()
    assert set(plain) == {"left", "right", "calibration"}
    np.testing.assert_array_equal(plain["left"], result["left"])
    np.testing.assert_array_equal(plain["right"], result["right"])


def test_drawing_leaves_the_model_as_it_was(seen):
    world, _ = seen
    groups = world.model.geom_group.copy()
    assert groups.max() < HIDDEN_GROUP  # nothing is hidden from rays, and from another renderer of the model
    world.observe()
    np.testing.assert_array_equal(world.model.geom_group, groups)


def test_culling_does_not_change_the_pictures(seen, monkeypatch):
    world, result = seen
    renderer = StereoRenderer(world.model, 192, 256)
    monkeypatch.setattr(renderer, "_seen", lambda data: np.ones(world.model.ngeom, bool))
    renderer.update(world.data)
    left, depth = renderer.color(world.data, 0, depth=True)
    np.testing.assert_array_equal(left, result["left"])
    np.testing.assert_array_equal(depth, result["depth"])
    np.testing.assert_array_equal(world._segment_ids[renderer.geom_ids(world.data, 0)], result["segmentation"])
    renderer.close()


def test_segmentation_knows_arm_gripper_target_and_others(seen):
    world, result = seen
    ids = set(np.unique(result["segmentation"]))
    assert {0, 2, 3, 4, 5} <= ids <= {0, 1, 2, 3, 4, 5}
    others = [item.name for item in world.objects[1:]]
    world.choose_target(others[0])
    again = world.observe(labels=True)["segmentation"]
    np.testing.assert_array_equal(again == 3, result["segmentation"] == 4)
    np.testing.assert_array_equal(again == 4, result["segmentation"] == 3)
    world.choose_target(world.objects[0].name)


def test_two_worlds_share_a_process():
    worlds = [World(WorldConfig(image_size=size)) for size in (48, 64)]
    alone = []
    for world in worlds:
        world.reset(1)
        alone.append(world.observe()["left"])
    for world, picture in zip(worlds, alone, strict=True):
        np.testing.assert_array_equal(world.observe()["left"], picture)
    worlds[0].close()
    np.testing.assert_array_equal(worlds[1].observe()["left"], alone[1])
    np.testing.assert_array_equal(worlds[0].observe()["left"], alone[0])  # opens a new renderer
    for world in worlds:
        world.close()


def test_a_forgotten_world_does_not_spoil_the_next_ones_pictures():
    config = WorldConfig.from_preset("easy", image_size=64)
    first = World(config)
    first.reset(1)
    expected = first.observe(labels=True)
    second = World(config)
    second.reset(1)
    second.observe(labels=True)
    del first  # not closed; collected while the second renderer is in use
    gc.collect()
    again = second.observe(labels=True)
    for key in ("left", "right", "depth", "segmentation"):
        np.testing.assert_array_equal(again[key], expected[key])
    second.close()
    second.close()


def test_missing_egl_names_the_packages():
    code = "from stereovla.simulation import World; w = World(); w.reset(0); w.observe()"
    environment = {**os.environ, "MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "99"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "apt-get install -y libegl1 libgl1 libegl-mesa0 libgl1-mesa-dri" in run.stderr


def test_a_process_that_closes_nothing_ends_without_a_word():
    """With a finalizer of something else before MuJoCo is imported, which decides when Python runs all of them."""
    code = "import weakref; kept = type('Kept', (), {})(); weakref.finalize(kept, int)\n"
    code += "from stereovla.simulation import World; w = World(); w.reset(0); w.observe()"
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
