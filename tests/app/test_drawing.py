"""Where a look is drawn, in the picture and in space, against geometry written out here."""

from types import SimpleNamespace

import numpy as np
import pytest

from stereovla.app import drawing, space
from stereovla.app.frames import Frame
from stereovla.app.look import Look, depth_seen
from stereovla.processing.camera_geometry import Calibration
from stereovla.processing.image_processing_stereovla import ViewGeometry

STATE = np.array([0.5, 0.1, 0.2, 0, 0, 0, 1], np.float32)
# 1 m above the base, looking straight down, picture x along base x, picture y along -y
DOWN = np.array([[1.0, 0, 0, 0.5], [0, -1, 0, 0.0], [0, 0, -1, 1.0], [0, 0, 0, 1]])
SOURCE, TARGET = (120, 160), (64, 64)  # (height, width)
FOCAL = 200.0


def look_of(**changes) -> Look:
    actions = np.zeros((4, 7), np.float32)
    actions[:, 0], actions[:, 2] = 0.05, -0.02
    values = {"answered": None, "pointed": None, "attention": {}, "disparity": None, "depth": None, "chunk_ms": 1.0}
    return Look(**{"actions": actions, "geometry": ViewGeometry.fit(SOURCE, TARGET), **values, **changes})


def frame_of(**known) -> Frame:
    calibration = Calibration(np.array([FOCAL, FOCAL]), np.array([80.0, 60.0]), 0.1, DOWN)
    view = np.full((*SOURCE, 3), 128, np.uint8)
    given = {"views": {"left": view, "right": view}, "instruction": "pick", "embodiment": "arm", "states": STATE[None]}
    return Frame(**{**given, "calibration": calibration, **known})


def pixel(point) -> tuple[int, int]:
    """(row, column) of a base point (3,) in the drawn picture."""
    x, y, z = point
    depth = 1.0 - z
    u, v = 80 + FOCAL * (x - 0.5) / depth, 60 - FOCAL * y / depth
    scale = drawing.SIDE_PX / SOURCE[1]
    return round(v * scale), round(u * scale)


def test_the_chunk_and_the_keyframe_are_where_they_project_to():
    look = look_of(pointed=np.array([0.65, 0.0, 0.1]), answered=np.array([0.4, -0.05, 0.05, 0, 0, 0, 1]))
    picture = np.asarray(drawing.draw_chunk(frame_of(), look, posed=True)).astype(int)
    assert picture.shape == (420, 560, 3)
    place = STATE[:3].astype(float)
    assert np.abs(picture[pixel(place)] - drawing.INK).max() <= 2
    for action, colour in zip(look.actions, drawing.ramp(4), strict=True):
        place = place + action[:3]
        assert np.abs(picture[pixel(place)] - colour).max() <= 12, colour
    assert np.abs(picture[pixel([0.65, 0.0, 0.1])] - drawing.POINTED).max() <= 2
    assert np.abs(picture[pixel([0.4, -0.05, 0.05])] - drawing.ANSWERED).max() <= 2
    assert (picture[5, 5] == 128).all()
    keyframes = {"keyframe answered", "keyframe pointed at"}
    assert set(drawing.legend(look)) == {"tool now", "first action", "last action"} | keyframes


def test_nothing_is_drawn_that_has_no_place():
    frame = frame_of()
    plain = np.asarray(drawing.magnified(frame.views["left"]))
    unplaced = frame_of(calibration=Calibration(np.array([FOCAL, FOCAL]), np.array([80.0, 60.0])))
    for given, posed in ((unplaced, True), (frame_of(calibration=None), True), (frame, False)):
        assert np.array_equal(drawing.draw_chunk(given, look_of(), posed), plain)
    behind = np.diag([1.0, -1, -1, 1])
    behind[:3, 3] = [0.5, 0, -1]  # the tool is behind this camera
    turned = frame_of(calibration=Calibration(np.array([FOCAL, FOCAL]), np.array([80.0, 60.0]), 0.1, behind))
    assert np.array_equal(drawing.draw_chunk(turned, look_of(), True), plain)
    assert space.draw_space(frame_of(calibration=None), look_of(), posed=False) is None
    assert drawing.draw_pointing(frame, look_of()) is None and drawing.draw_distances(look_of()) is None


def test_pointing_colours_the_place_of_its_token():
    target, gripper = np.zeros((8, 8)), np.zeros((8, 8))
    target[2, 6] = gripper[5, 1] = 1.0  # tokens of 8 px; the 160x120 source is 64x48 of 64x64, 8 px below a bar
    picture = np.asarray(drawing.draw_pointing(frame_of(), look_of(attention={"target": target, "gripper": gripper})))
    scale = drawing.SIDE_PX / 64
    for (row, column), colour in (((2, 6), drawing.SEEN["target"]), ((5, 1), drawing.SEEN["gripper"])):
        at = picture[int((8 * row + 4 - 8) * scale), int((8 * column + 4) * scale)].astype(int)
        grey = 0.75 * 128 + 50
        expected = grey * (1 - drawing.STRONGEST) + np.array(colour) * drawing.STRONGEST
        assert np.abs(at - expected).max() <= 14
    assert (picture[int(40 * scale), int(60 * scale)] == round(grey)).all()


def test_disparity_and_depth_have_one_scale_of_colours():
    slope = np.tile(np.linspace(4, 16, 16, dtype=np.float32), (16, 1))
    near = np.asarray(drawing.draw_distances(look_of(disparity=slope)))
    assert near.shape == (420, 560, 3)
    assert near[100, 545, 0] > near[100, 545, 2] and near[100, 14, 2] > near[100, 14, 0]  # near = red, far = blue
    depth = np.tile(np.linspace(2.0, 0.5, 64, dtype=np.float32), (64, 1))
    far = np.asarray(drawing.draw_distances(look_of(depth=depth)))
    assert far[100, 545, 0] > far[100, 545, 2] and far[100, 14, 2] > far[100, 14, 0]


def test_a_crop_is_put_back_where_it_was_cut():
    geometry = ViewGeometry.fit((20, 40), (16, 16), crop=(20, 20))
    found = drawing.on_source(np.ones((4, 4), np.float32), geometry)
    assert found.shape == (20, 40)
    assert (found[:, 10:30] == 1).all() and (found[:, :10] == 0).all() and (found[:, 30:] == 0).all()


@pytest.mark.parametrize("known", ["disparity", "depth"])
def test_points_in_space_are_those_of_the_camera(known):
    """A plane 0.9 m in front of the camera that looks down lies 0.1 m above the base."""
    focal = FOCAL * 64 / 160  # of the processed view
    seen = {"disparity": np.full((16, 16), focal * 0.1 / 0.9, np.float32), "depth": np.full((64, 64), 0.9, np.float32)}
    frame, look = frame_of(), look_of(**{known: seen[known]}, pointed=np.array([0.6, 0.1, 0.1]))
    np.testing.assert_allclose(depth_seen(look, frame)[10:50], 0.9, rtol=1e-5)
    figure = space.draw_space(frame, look, posed=True)
    traces = {trace.name: trace for trace in figure.data}
    cloud = traces["what it sees"]
    assert len(cloud.x) == 64 * 48  # every pixel that is picture and no bar
    np.testing.assert_allclose(cloud.z, 0.1, atol=1e-4)
    half = np.array([80, 60]) * 0.9 / FOCAL
    np.testing.assert_allclose([min(cloud.x), max(cloud.x)], [0.5 - half[0], 0.5 + half[0]], atol=0.01)
    np.testing.assert_allclose([min(cloud.y), max(cloud.y)], [-half[1], half[1]], atol=0.01)
    assert set(cloud.marker.color) == {"rgb(128,128,128)"}
    chunk = np.array([traces["chunk"].x, traces["chunk"].y, traces["chunk"].z]).T
    np.testing.assert_allclose(chunk, STATE[:3] + np.arange(5)[:, None] * [0.05, 0, -0.02], atol=1e-4)
    assert (traces["keyframe pointed at"].x[0], traces["keyframe pointed at"].z[0]) == (0.6, 0.1)
    eye = SimpleNamespace(**figure.layout.scene.camera.eye.to_plotly_json())
    assert eye.z > 0.5  # from above, where the camera is


def test_without_a_baseline_a_disparity_has_no_depth():
    lens = {"focal_length_px": np.array([FOCAL, FOCAL]), "principal_point_px": np.array([80.0, 60.0])}
    frame = frame_of(calibration=Calibration(**lens, transform_camera_to_base=DOWN))
    assert depth_seen(look_of(disparity=np.ones((16, 16), np.float32)), frame) is None
