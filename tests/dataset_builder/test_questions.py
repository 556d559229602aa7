"""streaming.questions: mixture, interaction-region points, projection, and what the processor receives."""

from collections import Counter

import numpy as np
import pytest

from stereovla.dataset_builder.streaming import questions
from stereovla.dataset_builder.streaming.questions import OBJECTIVES, QuestionConfig
from stereovla.processing.camera_geometry import Calibration, project_points


def _scene(size=64):
    depth = np.full((size, size), 0.7, np.float32)
    segmentation = np.zeros((size, size), np.uint8)
    segmentation[40:50, 10:20] = 3
    segmentation[5:15, 40:55] = 2
    depth[segmentation == 3] = 0.5
    depth[segmentation == 2] = 0.4
    return depth, segmentation


def test_mixture_has_the_papers_proportions():
    config = QuestionConfig()
    drawn = Counter(
        questions.draw_objectives(config, questions.window_generator(0, 0, episode, frame), OBJECTIVES, 1)[0]
        for episode in range(100)
        for frame in range(40)
    )
    for name, share in {"action": 0.5, "depth": 0.2, "box": 0.2, "pose": 0.1}.items():
        assert abs(drawn[name] / 4000 - share) < 4 * np.sqrt(share * (1 - share) / 4000), drawn
    assert drawn["camera"] == 0


def test_impossible_objectives_are_not_drawn_and_the_others_keep_their_ratio():
    rng = np.random.default_rng(0)
    drawn = Counter(questions.draw_objectives(QuestionConfig(), rng, ["action", "pose"], 1)[0] for _ in range(3000))
    assert set(drawn) == {"action", "pose"} and abs(drawn["action"] / 3000 - 5 / 6) < 0.03
    assert questions.draw_objectives(QuestionConfig(mixture={"box": 1}), rng, ["action"], 1) == []


def test_interaction_points_lie_at_target_and_gripper():
    depth, segmentation = _scene()
    config, rng = QuestionConfig(points_per_question=2), np.random.default_rng(0)
    seen = segmentation > 0
    counts = Counter()
    for _ in range(500):
        points, depths = questions.depth_points(depth, segmentation, np.array([30.2, 30.7]), config, rng)
        assert points.shape == (2, 2) and depths.shape == (2,)
        for (u, v), answer in zip(points, depths, strict=True):
            assert u % 1 == v % 1 == 0.5 and seen[int(v), int(u)]
            assert answer == depth[int(v), int(u)]
            counts["target" if v > 36 else "gripper"] += 1
    assert 0.44 < counts["target"] / 1000 < 0.56
    # where nothing of it is seen, the tool centre stands for the gripper
    segmentation[segmentation == 2] = 0
    seen = segmentation > 0
    found = np.concatenate(
        [questions.depth_points(depth, segmentation, np.array([30.2, 30.7]), config, rng)[0] for _ in range(500)]
    )
    of_tool = (found == 30.5).all(1)
    assert 0.44 < of_tool.mean() < 0.56 and seen[tuple(found[~of_tool].astype(int).T[::-1])].all()


def test_points_avoid_pixels_without_depth():
    depth, segmentation = _scene()
    depth[:, :15] = 0
    config, rng = QuestionConfig(), np.random.default_rng(0)
    outside = np.full(2, np.nan)
    for region in ("interaction", "uniform"):
        config = QuestionConfig(depth_points=region)
        for _ in range(200):
            points, depths = questions.depth_points(depth, segmentation, outside, config, rng)
            assert points[0, 0] > 15 and depths[0] > 0
    assert questions.depth_points(np.zeros_like(depth), segmentation, outside, config, rng) is None
    config = QuestionConfig()
    assert questions.depth_points(depth, np.zeros_like(segmentation), outside, config, rng) is None


def test_uniform_points_cover_the_image():
    depth, segmentation = _scene()
    config, rng = QuestionConfig(depth_points="uniform", points_per_question=4000), np.random.default_rng(0)
    points, _ = questions.depth_points(depth, segmentation, np.full(2, np.nan), config, rng)
    histogram, *_ = np.histogram2d(points[:, 0], points[:, 1], bins=4, range=[[0, 64], [0, 64]])
    assert histogram.min() > 180 and histogram.max() < 320


def test_view_pixels_agree_with_the_processors_projection():
    rng = np.random.default_rng(0)
    positions = rng.uniform([0.3, -0.3, 0.0], [0.7, 0.3, 0.4], (50, 3))
    look = np.array([[0, 0, 1], [-1, 0, 0], [0, -1, 0]], float)
    transforms = np.tile(np.eye(4), (50, 1, 1))
    transforms[:, :3, :3] = look
    transforms[:, :3, 3] = rng.uniform([-0.5, -0.1, 0.0], [0.5, 0.1, 0.2], (50, 3))
    focal, principal = np.full((50, 2), 110.0), np.full((50, 2), 64.0)
    pixels = questions.view_pixels(positions, transforms, focal, principal, (128, 128))
    for index in range(50):
        expected = project_points(
            positions[index], Calibration(focal[index], principal[index], 0.063, transforms[index])
        )
        if np.isfinite(expected).all() and (expected >= 0).all() and (expected < 128).all():
            np.testing.assert_allclose(pixels[index], expected, atol=1e-3)
        else:
            assert np.isnan(pixels[index]).all()
    assert 5 < np.isfinite(pixels).all(axis=1).sum() < 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixture": {"acton": 1}}, "unknown objectives.*acton"),
        ({"mixture": {"action": 0}}, "some > 0"),
        ({"mixture": {"action": -1, "box": 3}}, ">= 0"),
        ({"depth_points": "target"}, "'interaction', 'uniform', 'off'"),
        ({"points_per_question": 0}, "at least 1"),
    ],
)
def test_wrong_configs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuestionConfig(**arguments)


def test_failed_detections_ask_anywhere():
    """The share of points far from both regions is what was asked for, less those that fall into them by chance."""
    depth = np.full((64, 64), 0.5, np.float32)
    segmentation = np.zeros((64, 64), np.uint8)
    segmentation[10:14, 10:14], segmentation[40:44, 40:44] = 3, 2
    unseen = np.full(2, np.nan)
    for chance in (0.0, 0.3, 1.0):
        config = QuestionConfig(points_per_question=4000, detection_failures=chance)
        points, _ = questions.depth_points(depth, segmentation, unseen, config, np.random.default_rng(0))
        inside = segmentation[tuple(points.astype(int).T[::-1])] > 0
        assert 1 - inside.mean() == pytest.approx(chance * (1 - 32 / 4096), abs=0.03)
    with pytest.raises(ValueError, match="detection_failures=2"):
        QuestionConfig(detection_failures=2)


def test_names_are_whole_or_as_short_as_the_scene_allows():
    """With a generator that always shortens, and over many draws both."""

    class Shortens:
        def random(self):
            return 0.0

    names = ["red cube", "green ball", "blue cube", "blue tray"]
    assert questions.called(names, Shortens()) == ["red cube", "ball", "blue cube", "tray"]
    assert questions.called(["cube", "red cube"], Shortens()) == [None, "red cube"]  # "cube" may be either
    assert questions.called(["black bowl", "plate", "black bowl"], Shortens()) == [None, "plate", None]
    assert questions.called(["wine bottle", "oil bottle"], Shortens()) == ["wine bottle", "oil bottle"]
    rng = np.random.default_rng(0)
    drawn = np.array([questions.called(names, rng) for _ in range(400)])
    assert set(drawn[:, 0]) == {"red cube"} and set(drawn[:, 1]) == {"ball", "green ball"}
    assert 160 < (drawn[:, 1] == "ball").sum() < 240
