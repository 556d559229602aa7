"""Metrics against definitions, brute force and loops."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest

from stereovla.evaluation import metrics
from stereovla.processing.rotations import rpy_to_matrix


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (1, 3), (83, 100), (399, 400)])
def test_wilson_bounds_are_the_rates_that_are_just_compatible(successes, trials):
    """Wilson's bounds solve |k/n - p| = z sqrt(p (1 - p) / n): found here by bisection."""
    z, rate = 1.959964, successes / trials

    def bisect(low: float, high: float) -> float:
        sign = low < high
        for _ in range(200):
            middle = (low + high) / 2
            compatible = abs(rate - middle) <= z * math.sqrt(middle * (1 - middle) / trials)
            low, high = (middle, high) if compatible else (low, middle)
        return low if sign else high

    low, high = metrics.wilson_interval(successes, trials)
    assert high == pytest.approx(1.0 if successes == trials else bisect(rate, 1.0), abs=1e-9)
    assert low == pytest.approx(0.0 if successes == 0 else bisect(rate, 0.0), abs=1e-9)


def test_wilson_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.5, 0.9):
        draws = rng.binomial(100, rate, 4000)
        bounds = {k: metrics.wilson_interval(int(k), 100) for k in set(draws)}
        covered = np.mean([bounds[k][0] <= rate <= bounds[k][1] for k in draws])
        assert 0.92 < covered < 0.98


def test_impossible_counts_are_refused():
    for successes, trials in ((3, 2), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="successes"):
            metrics.wilson_interval(successes, trials)


def test_rotation_error_is_the_angle_between():
    assert metrics.rotation_error_deg(np.array([0, 0, 0.1]), np.array([0, 0, -0.2])) == pytest.approx(np.degrees(0.3))
    assert metrics.rotation_error_deg(np.zeros(3), np.array([math.pi, 0, 0])) == pytest.approx(180)
    tiny = metrics.rotation_error_deg(np.zeros(3), np.array([1e-7, 0, 0]))
    assert tiny == pytest.approx(np.degrees(1e-7), rel=1e-6)
    first, second = np.random.default_rng(1).uniform(-3, 3, (2, 50, 3))
    a, b = rpy_to_matrix(first), rpy_to_matrix(second)
    cosine = (np.einsum("nij,nij->n", a, b) - 1) / 2
    np.testing.assert_allclose(metrics.rotation_error_deg(first, second), np.degrees(np.arccos(cosine)), atol=1e-6)


def test_action_errors_equal_a_loop():
    rng = np.random.default_rng(0)
    predicted, truth = rng.normal(size=(2, 3, 4, 7))
    lengths = [4, 2, 0]
    valid = np.arange(4) < np.array(lengths)[:, None]
    errors = metrics.action_errors(predicted, truth, valid)
    steps = [(b, t) for b in range(3) for t in range(lengths[b])]
    assert errors["position_mm"] == pytest.approx(
        [1000 * math.dist(predicted[b, t, :3], truth[b, t, :3]) for b, t in steps]
    )
    assert errors["still_mm"] == pytest.approx([1000 * math.hypot(*truth[b, t, :3]) for b, t in steps])
    ends = [
        1000 * math.dist(predicted[b, : lengths[b], :3].sum(0), truth[b, : lengths[b], :3].sum(0)) for b in range(2)
    ]
    assert errors["chunk_position_mm"] == pytest.approx(ends)
    assert len(errors["rotation_deg"]) == len(errors["gripper_right"]) == len(steps)


def test_gripper_commands_have_three_classes():
    assert metrics.gripper_class(np.array([-1, -0.51, -0.5, 0, 0.5, 0.51, 1])).tolist() == [-1, -1, 0, 0, 0, 1, 1]


def test_depth_errors_count_other_text_as_no_answer():
    errors = metrics.depth_errors([[0.53], None, [0.5, 0.6], [1.0]], np.array([0.5, 0.5, 0.5, 1.25]))
    assert errors[[0, 3]] == pytest.approx([3, 25])
    assert np.isnan(errors[[1, 2]]).all()


def test_box_iou_equals_counting_pixels():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 12, (2, 400, 2, 2))
    corners[:, 50:] = np.sort(corners[:, 50:], axis=-2)  # the first ones may be turned inside out: no area
    corners = corners.reshape(2, 400, 4)
    counted = []
    for first, second in zip(*corners, strict=True):
        masks = np.zeros((2, 12, 12), bool)
        for mask, box in zip(masks, (first, second), strict=True):
            mask[box[1] : box[3], box[0] : box[2]] = True
        union = (masks[0] | masks[1]).sum()
        counted.append((masks[0] & masks[1]).sum() / union if union else 0)
    assert max(counted) > 0.5
    np.testing.assert_allclose(metrics.box_iou(*corners), counted)


def test_keyframe_errors():
    truth = np.zeros((1, 7))
    predicted = np.array([[0.03, 0.04, -0.02, 0, 0, math.radians(10), 1]])
    errors = metrics.keyframe_errors(predicted, truth)
    assert [errors[name][0] for name in ("xy_cm", "z_cm", "rotation_deg")] == pytest.approx([5, 2, 10])
    assert not errors["gripper_right"][0]


def test_a_keyframe_that_holds_alike_is_no_error():
    """Of two fingers, the tool turned by half a turn about its own axis, also where it is tilted."""
    rng = np.random.default_rng(0)
    truth = np.concatenate([np.zeros((20, 3)), rng.uniform(-1.4, 1.4, (20, 3)), np.ones((20, 1))], axis=1)
    turned = rpy_to_matrix(truth[:, 3:6]) @ np.diag([-1.0, -1.0, 1.0])
    predicted = truth.copy()
    predicted[:, 3] = np.arctan2(turned[:, 2, 1], turned[:, 2, 2])
    predicted[:, 4] = np.arcsin(-turned[:, 2, 0])
    predicted[:, 5] = np.arctan2(turned[:, 1, 0], turned[:, 0, 0])
    np.testing.assert_allclose(metrics.keyframe_errors(predicted, truth)["rotation_deg"], 180, atol=1e-4)
    for given in (predicted, truth):
        np.testing.assert_allclose(metrics.keyframe_errors(given, truth, 2)["rotation_deg"], 0, atol=1e-4)


def test_disparity_errors_are_in_full_resolution_px_where_the_truth_is_known():
    truth = np.zeros((1, 8, 8))
    truth[0, 2, 2], truth[0, 2, 6] = 10, 12
    predicted = np.array([[[8.0, 14.0], [36.0, 36.0]]])
    assert sorted(metrics.disparity_errors(predicted, truth)) == pytest.approx([2, 2])


def test_summary_of_nothing_is_none():
    assert metrics.summary(np.array([])) is None
    assert metrics.summary(np.array([1.0, 2.0, 6.0]))["mean"] == pytest.approx(3)


def test_box_iou_through_hugging_face_evaluate(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", tmp_path)
    metric = evaluate.load("evaluation/box_iou", cache_dir=str(tmp_path))
    truth = [[0, 0, 10, 10], [0, 0, 10, 10], [5, 5, 9, 9]]
    for predicted, true in zip([[0, 0, 10, 10], [0, 0, 10, 4], [0, 0, 0, 0]], truth, strict=True):
        metric.add_batch(predictions=[predicted], references=[true])
    assert metric.compute() == pytest.approx({"mean_iou": 1.4 / 3, "accuracy": 1 / 3})
