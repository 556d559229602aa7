"""Projection and disparity against homogeneous coordinates; the pair check on rendered-like, real and broken pairs."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stereovla.processing import camera_geometry as cg
from stereovla.processing.rotations import rpy_to_matrix

ZED = Path(__file__).parents[2] / ".." / "shared" / "data" / "zed_mini"
needs_zed = pytest.mark.skipif(not ZED.is_dir(), reason="the real pair is not here")


def calibration(**changes):
    transform = np.eye(4)
    transform[:3, :3] = rpy_to_matrix([2.5, 0.3, -1.2])
    transform[:3, 3] = [0.6, -0.4, 0.5]
    values = {
        "focal_length_px": [150.0, 151.0],
        "principal_point_px": [64.0, 62.0],
        "baseline_m": 0.063,
        "transform_camera_to_base": transform,
    }
    return cg.Calibration.from_mapping(values | changes)


@settings(max_examples=50)
@given(st.tuples(st.floats(-0.3, 0.3), st.floats(-0.3, 0.3), st.floats(0.2, 2.0)))
def test_projection(camera_point):
    camera = calibration()
    base = camera.transform_camera_to_base @ [*camera_point, 1]
    pixel = cg.project_points(base[:3], camera)
    matrix = np.array([[150, 0, 64], [0, 151, 62], [0, 0, 1.0]])
    homogeneous = matrix @ (np.linalg.inv(camera.transform_camera_to_base) @ base)[:3]
    np.testing.assert_allclose(pixel, homogeneous[:2] / homogeneous[2], atol=1e-8)
    np.testing.assert_allclose(cg.unproject_points(pixel, camera_point[2], camera), base[:3], atol=1e-9)
    # The right camera stands baseline_m along its x axis: it sees the point `disparity` further left, in the same row.
    right_pose = camera.transform_camera_to_base.copy()
    right_pose[:3, 3] += right_pose[:3, 0] * 0.063
    right = cg.project_points(base[:3], calibration(transform_camera_to_base=right_pose))
    disparity = cg.depth_to_disparity(camera_point[2], camera)
    np.testing.assert_allclose(pixel - right, [disparity, 0], atol=1e-4)


def test_points_behind_the_camera_have_no_pixel():
    camera = calibration(transform_camera_to_base=np.eye(4))
    assert np.isnan(cg.project_points([[0, 0, -1.0], [0, 0, 0]], camera)).all()
    np.testing.assert_allclose(cg.project_points([[0, 0, 1.0]], camera), [[64, 62]])


def test_disparity_and_depth_invert():
    camera = calibration()
    depth = np.array([[0.4, 1.0, 0.0], [np.nan, np.inf, -1.0]])
    disparity = cg.depth_to_disparity(depth, camera)
    np.testing.assert_allclose(disparity, [[150 * 0.063 / 0.4, 150 * 0.063, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(cg.disparity_to_depth(disparity, camera), [[0.4, 1.0, 0], [0, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"focal_length": 1}, r"unknown keys \['focal_length'\]; valid keys"),
        ({"focal_length_px": None}, "lacks 'focal_length_px'"),
        ({"focal_length_px": [1.0, -2.0]}, "must be positive, got"),
        ({"principal_point_px": [1.0, np.nan]}, r"\(2,\) finite numbers"),
        ({"transform_camera_to_base": np.eye(3)}, r"\(4, 4\) finite numbers"),
        ({"baseline_m": 0}, "positive number of metres, got 0"),
    ],
)
def test_calibration_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        calibration(**changes)


def test_unknown_fields_are_missed_when_they_are_needed():
    camera = calibration(baseline_m=None, transform_camera_to_base=None)
    with pytest.raises(ValueError, match=r"lacks \['baseline_m'\]"):
        cg.depth_to_disparity(1.0, camera)
    with pytest.raises(ValueError, match=r"lacks \['transform_camera_to_base'\]"):
        cg.project_points([0, 0, 1], camera)


def textured_pair(seed, size=128, near=22.0, far=6.0):
    """Random blobs on a slanted plane: each row of the right view is the left one, shifted by its disparity in px."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size // 4, size // 2, 3), dtype=np.uint8)
    texture = np.asarray(Image.fromarray(coarse).resize((2 * size, size), Image.Resampling.BICUBIC), np.float32)
    columns = np.arange(size)
    left, right = np.empty((2, size, size, 3), np.uint8)
    for row in range(size):
        shift = far + (near - far) * row / size
        for out, start in ((left, size / 2), (right, size / 2 + shift)):
            for channel in range(3):
                out[row, :, channel] = np.interp(columns + start, np.arange(2 * size), texture[row, :, channel])
    return left, right


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [96, 128, 224, 320])
def test_textured_pairs(seed, size):
    left, right = textured_pair(seed, size, near=size / 6, far=size / 20)
    report = cg.check_stereo_pair(left, right)
    assert report.status == "ok" and report.vertical_offset_px < 0.3 * -(-size // 160)
    assert abs(report.disparity_px - size * (1 / 6 + 1 / 20) / 2) < size / 20
    with pytest.raises(cg.StereoPairError, match=r"seem to be swapped: .*check_stereo=False"):
        cg.check_stereo_pair(right, left)
    for rows in (size // 40, size // 20):
        with pytest.raises(cg.StereoPairError, match="not rectified: matching points differ by"):
            cg.check_stereo_pair(left[:-rows], right[rows:])
    report = cg.measure_stereo_pair(left, np.asarray(Image.fromarray(right).rotate(5, Image.Resampling.BICUBIC)))
    assert report.status == "unrectified"


def test_pairs_that_say_nothing():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 128, 128, 3), dtype=np.uint8)
    grey = np.full((128, 128, 3), 90, np.uint8)
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[:, None], (128, 128, 3))
    tiny = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for left, right in (noise, (grey, grey), (grey, noise[0]), (noise[0], grey), (ramp, ramp[:, ::-1] + 1), tiny):
        assert cg.check_stereo_pair(left, right).status == "unknown"


def test_one_view_twice():
    left, _ = textured_pair(0)
    with pytest.raises(cg.StereoPairError, match="are the same image"):
        cg.check_stereo_pair(left, left.copy())


@needs_zed
@pytest.mark.parametrize("size", [(72, 128), (128, 224), (252, 448), (540, 960)])
def test_real_pair(size):
    left, right = (
        np.asarray(Image.open(ZED / f"{side}.png").convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS))
        for side in ("left", "right")
    )
    assert cg.check_stereo_pair(left, right).status == "ok"
    assert cg.measure_stereo_pair(right, left).status == "swapped"
    rows = -(-size[1] // 160) * 2
    assert cg.measure_stereo_pair(left[:-rows], right[rows:]).status == "unrectified"


def test_the_check_is_cheap():
    """About 5 ms on an idle core; the limit leaves room for a busy machine."""
    left, right = textured_pair(0, 224)
    cg.measure_stereo_pair(left, right)
    start = time.process_time()
    for _ in range(10):
        cg.measure_stereo_pair(left, right)
    assert (time.process_time() - start) / 10 < 0.05


def calls_of(function, *arguments) -> int:
    """How many calls of Python and C functions one call makes: its work in operations, whatever the machine."""
    count = 0

    def watch(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def test_the_check_grows_with_the_pixels_alone():
    """A view of 1 x 200,000 px took 40 s: its blocks were added up one row and column of a block at a time."""
    narrow, wide = (np.zeros((2, 16, width, 3), np.uint8) for width in (320, 16_384))
    assert calls_of(cg.measure_stereo_pair, *wide) == calls_of(cg.measure_stereo_pair, *narrow)


@pytest.mark.parametrize("size", [(96, 128), (250, 330), (720, 1280), (1, 16_384), (30, 16_000)])
def test_block_means_are_exact(size):
    image = np.random.default_rng(3).integers(0, 256, (*size, 3), np.uint8)
    factor = -(-size[1] // 160)
    height, width = size[0] // factor, size[1] // factor
    blocks = image[: height * factor, : width * factor].astype(np.float64).reshape(height, factor, width, factor, 3)
    np.testing.assert_array_equal(cg._gray(image, factor), blocks.mean(axis=(1, 3, 4)).astype(np.float32))
