"""Camera poses and projection by hand."""

import numpy as np
import pytest

from stereovla.simulation.camera import camera_rotation, project


def test_camera_looks_forward_and_is_level():
    rotation = camera_rotation(np.array([-1.0, 0.5, -1.0]))
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    np.testing.assert_allclose(rotation[:, 2], np.array([-1.0, 0.5, -1.0]) / 1.5, atol=1e-12)
    assert rotation[2, 0] == pytest.approx(0.0)  # its x axis is horizontal
    assert rotation[2, 1] < 0  # its y axis points down


def test_projection_by_hand():
    pose = np.eye(4)
    pose[:3, 3] = [1.0, 2.0, 3.0]
    pixels = project(
        np.array([[1.2, 1.9, 5.0], [1.0, 2.0, 1.0]]), pose, np.array([100.0, 110.0]), np.array([64.0, 48.0])
    )
    np.testing.assert_allclose(pixels[0], [64 + 100 * 0.2 / 2, 48 - 110 * 0.1 / 2])
    assert np.isnan(pixels[1]).all()  # behind the camera
