"""Differences between the views: exact where they can be, noise of the stated size, a function of seed and step."""

import numpy as np
import pytest

from stereovla.simulation import World, WorldConfig
from stereovla.simulation.photometry import Photometry, draw_photometry

VIEW = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)


def test_gain_and_offset_apply_to_the_right_view_only():
    gain = np.array([1.1, 0.9, 1.0])
    left, right = Photometry(gain, 4.0, 0.0, 0).apply(VIEW, VIEW, step=0)
    np.testing.assert_array_equal(left, VIEW)
    np.testing.assert_array_equal(right, np.clip(np.rint(VIEW * gain + 4.0), 0, 255))


def test_noise_is_independent_repeatable_and_as_strong_as_stated():
    grey = np.full((200, 200, 3), 128, np.uint8)
    photometry = Photometry(np.ones(3), 0.0, 3.0, seed=5)
    left, right = photometry.apply(grey, grey, step=2)
    for view in (left, right):
        assert (view.astype(float) - 128).std() == pytest.approx(3.0, rel=0.02)
    assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.02
    again = photometry.apply(grey, grey, step=2)
    np.testing.assert_array_equal(again[0], left)
    assert (photometry.apply(grey, grey, step=3)[0] != left).any()


def test_ideal_cameras_change_nothing():
    config = WorldConfig.from_preset("easy")
    photometry = draw_photometry(config, np.random.default_rng(1))
    left, right = photometry.apply(VIEW, VIEW, step=0)
    assert left is VIEW and right is VIEW


def test_world_draws_within_its_ranges_and_applies_them():
    world = World(WorldConfig.from_preset("easy", image_size=64, right_gain=(0.8, 0.9), right_offset=(5.0, 6.0)))
    world.reset(1)
    assert np.all((world.photometry.gain >= 0.8) & (world.photometry.gain <= 0.9))
    assert 5.0 <= world.photometry.offset <= 6.0
    plain = World(WorldConfig.from_preset("easy", image_size=64))
    plain.reset(1)
    seen, ideal = world.observe(), plain.observe()
    np.testing.assert_array_equal(seen["left"], ideal["left"])
    expected = np.rint(ideal["right"] * world.photometry.gain + world.photometry.offset)
    np.testing.assert_array_equal(seen["right"], np.clip(expected, 0, 255))
    world.close()
    plain.close()
