"""A calibration that is not the camera's is noticed by where the gripper is seen."""

import math

import numpy as np
import pytest
import torch
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint

from stereovla.modeling_stereovla.pointing import Pointed
from stereovla.processing.camera_geometry import Calibration, project_points
from stereovla.processing.rotations import rpy_to_matrix
from stereovla.serving.calibration_watch import FRAMES, LIMIT, watch_of
from stereovla.sources import load_checkpoint

TOOL = np.array([0.5, 0.05, 0.1])


def calibration(turned_deg: float = 0.0) -> dict:
    """Of a camera 0.6 m over the table that looks down, turned about its own x axis."""
    pose = np.eye(4)
    pose[:3, :3] = rpy_to_matrix([math.pi, 0.0, math.pi / 2]) @ rpy_to_matrix([math.radians(turned_deg), 0.0, 0.0])
    pose[:3, 3] = [0.5, 0.0, 0.6]
    values = {"focal_length_px": [88.0, 88.0], "principal_point_px": [32.0, 32.0], "baseline_m": 0.06}
    return values | {"transform_camera_to_base": pose}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("points"), points_frame="base", use_pointers=True)
    return load_checkpoint(str(folder), "cpu")


def point_at(pixel: np.ndarray) -> Pointed:
    """Pointers that see the gripper at a pixel of the 4 x 4 tokens of 64 px, between the two nearest centres."""
    position = pixel / 16 - 0.5
    corner = np.floor(position).astype(int)
    share = position - corner
    weights = torch.full((4, 4), 1e-9)
    for v in range(2):
        for u in range(2):
            weight = abs(1 - u - share[0]) * abs(1 - v - share[1])
            weights[corner[1] + v, corner[0] + u] = max(weight, 1e-9)
    return Pointed(weights.flatten().log().expand(1, 2, -1))


@pytest.mark.parametrize("turned, wrong", [(0.0, False), (1.0, False), (5.0, True)])
def test_a_camera_that_was_turned_is_noticed(parts, turned, wrong):
    model, processor = parts
    watch = watch_of(model, processor)
    state = np.array([*TOOL, 0.0, 0.0, 0.0, 1.0])
    seen = project_points(TOOL, Calibration.from_mapping(calibration()))  # by the true one
    for number in range(FRAMES):
        assert watch.problem is None, number
        watch._note(None, None, point_at(seen))
        watch.compare([processor.tool_px(state, calibration(turned), EMBODIMENT, (64, 64))])
    expected = 88 * math.tan(math.radians(turned))  # of a tool near the middle of the view
    assert np.median(watch.offsets_px) == pytest.approx(expected, abs=0.6)
    assert (watch.problem is not None) == wrong == (expected > LIMIT * 64)
    assert watch.news() == watch.problem and watch.news() is None  # once
    if wrong:
        assert "8 px beside where the calibration puts the tool" in watch.problem


def test_what_says_nothing_is_not_counted(parts):
    model, processor = parts
    state = np.array([*TOOL, 0.0, 0.0, 0.0, 1.0])
    away = state + [3.0, 0, 0, 0, 0, 0, 0]  # not in view
    unknown = calibration() | {"transform_camera_to_base": None}
    for given in ((state, None), (state, unknown), (away, calibration())):
        assert np.isnan(processor.tool_px(*given, EMBODIMENT, (64, 64))).all()
    watch = watch_of(model, processor)
    watch._note(None, None, point_at(np.array([30.0, 30.0])))
    watch.compare([np.full(2, np.nan)])
    assert not watch.offsets_px and watch.problem is None


def test_a_model_without_points_is_not_watched(tmp_path):
    assert watch_of(*load_checkpoint(str(save_tiny_checkpoint(tmp_path)), "cpu")) is None
