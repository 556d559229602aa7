"""Scenes: the instruction fits one object, all lie apart and inside the workspace."""

import numpy as np
import pytest

from simulation.objects import COLORS, FINGER_REACH_M, SHAPES, draw_kinds, draw_objects

CENTER, EXTENT = (0.5, 0.0), (0.25, 0.30)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_scenes_are_unambiguous_apart_and_inside(count):
    for seed in range(100):
        objects = draw_objects(count, SHAPES, tuple(COLORS), CENTER, EXTENT, np.random.default_rng(seed))
        assert len({item.name for item in objects}) == count
        for index, item in enumerate(objects):
            assert np.all(np.abs(np.array(item.xy) - CENTER) <= np.array(EXTENT) / 2)
            assert 0.025 <= 2 * item.half_size[1] <= 0.047
            for other in objects[:index]:
                distance = np.hypot(*np.subtract(item.xy, other.xy))
                assert distance >= FINGER_REACH_M + max(item.radius, other.radius)


def test_distractors_often_share_colour_or_shape_but_never_both():
    shared_shape = shared_color = 0
    for seed in range(300):
        pairs = draw_kinds(3, SHAPES, tuple(COLORS), np.random.default_rng(seed))
        assert len(set(pairs)) == 3
        shared_shape += any(pair[0] == pairs[0][0] for pair in pairs[1:])
        shared_color += any(pair[1] == pairs[0][1] for pair in pairs[1:])
    assert min(shared_shape, shared_color) > 100


def test_every_kind_becomes_a_target():
    first = {draw_kinds(3, SHAPES, tuple(COLORS), np.random.default_rng(seed))[0] for seed in range(400)}
    assert len(first) == len(SHAPES) * len(COLORS)


def test_impossible_layout_names_the_limit():
    with pytest.raises(RuntimeError, match="larger workspace"):
        draw_objects(4, SHAPES, tuple(COLORS), CENTER, (0.05, 0.05), np.random.default_rng(0))
