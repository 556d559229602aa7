"""What is measured of a depth expert: its maps, and what the policy does where it is shown grey or another scene."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from command_lines import evaluate as main
from synthetic_dataset import write_dataset
from tiny_checkpoint import save_tiny_depthvla

from stereovla.evaluation import metrics
from stereovla.evaluation.held_out import read_rows
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline import OfflineEvaluation
from stereovla.evaluation.offline_geometry import GeometryEvaluation, observations, with_another_scene
from stereovla.evaluation.pointed_keyframes import position_errors
from stereovla.evaluation.report import offline_metrics
from stereovla.evaluation.shown_geometry import shown
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.sources import load_checkpoint

LENGTHS = [3, 2, 3]
SHOWN = ("given", "null", "swapped")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("data"), LENGTHS, 2, split="validation", size=64))


@pytest.fixture(scope="module")
def rows(dataset) -> list:
    """Every third also shows the wrist's view, with a depth that is 1.5 m everywhere."""
    found = [replace(row, views={**row.views, "wrist": None}) for row in read_rows(dataset, 100, 1)]
    for number in range(0, len(found), 3):
        row = found[number]
        wrist = np.random.default_rng(number).integers(0, 255, (48, 48, 3), np.uint8)
        depths = {**row.depths, "wrist": np.full((48, 48), 1.5, np.float32)}
        found[number] = replace(row, views={**row.views, "wrist": wrist}, depths=depths)
    return found


def policy_of(folder, **overrides) -> ModelPolicy:
    return ModelPolicy(*load_checkpoint(str(save_tiny_depthvla(folder, **overrides)), run_code=True), "trained")


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> ModelPolicy:
    return policy_of(tmp_path_factory.mktemp("depthvla"), views=["left", "wrist"], use_pointers=True)


def test_another_scene_is_of_another_episode(rows):
    pairs = list(with_another_scene(rows))
    assert [row for row, _ in pairs] == rows
    others = [(other.episode, other.frame) for _, other in pairs]
    assert others == [(1, 0)] * 3 + [(2, 0)] * 2 + [(0, 0)] * 3
    assert [other for _, other in with_another_scene(rows[:3])] == [None] * 3
    assert list(with_another_scene([])) == []


def test_depth_errors_are_those_of_a_plain_loop():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.3, 3, (3, 4, 5))
    truth[rng.random(truth.shape) < 0.3] = 0
    truth[2] = 0
    predicted = rng.uniform(0.3, 3, truth.shape)
    relative, squared, right, l_si = [], [], [], []
    for picture, map_ in zip(predicted[:2], truth[:2], strict=True):
        pairs = [(p, t) for p, t in zip(picture.ravel(), map_.ravel(), strict=True) if t > 0]
        relative += [abs(p - t) / t for p, t in pairs]
        squared += [(p - t) ** 2 for p, t in pairs]
        right += [max(p / t, t / p) < 1.25 for p, t in pairs]
        logs = [np.log(p) - np.log(t) for p, t in pairs]
        l_si.append(np.sqrt(np.mean(np.square(logs)) - 0.3 * np.mean(logs) ** 2))
    expected = {"abs_rel": np.mean(relative), "rmse_m": np.sqrt(np.mean(squared)), "delta_1_25": np.mean(right)}
    expected |= {"l_si": np.mean(l_si), "count": 2}
    assert metrics.depth_map_errors(metrics.depth_map_sums(predicted, truth, 0.3)) == pytest.approx(expected)
    assert metrics.depth_map_errors(metrics.depth_map_sums(predicted, 0 * truth, 0.3)) is None


def test_the_depth_expert_alone_is_shown_something_else(policy, rows):
    evaluation, others = GeometryEvaluation(policy), [other for _, other in with_another_scene(rows)]
    model, inputs, of_others = policy.model, evaluation.inputs(rows), evaluation.inputs(others)
    inputs.pop("depth_map")
    pictures = {"null": torch.full_like(inputs["pixel_values"], 0.5), "swapped": of_others["pixel_values"]}
    with torch.no_grad():
        given = model(**inputs, output_depth=True)
        for name, seen in pictures.items():
            expected = model.model.depth_expert(seen, inputs["view_mask"]).depth
            with shown(model, name, inputs, of_others) as to_give:
                found = model(**to_give, output_depth=True)
            present = inputs["view_mask"]
            torch.testing.assert_close(found.depth[present], expected[present], atol=1e-6, rtol=1e-5)
            assert not torch.allclose(found.depth[present], given.depth[present], rtol=1e-3)
            torch.testing.assert_close(found.logits, given.logits, atol=0, rtol=0)  # the VLM sees what it saw
        assert torch.equal(model(**inputs, output_depth=True).depth, given.depth)  # and all is as before


def test_the_report_has_what_was_predicted(policy, rows):
    report = OfflineEvaluation(policy).evaluate(rows, batch_size=3)
    json.dumps(report, allow_nan=False)
    found, evaluation = report["geometry"], GeometryEvaluation(policy)
    assert tuple(found) == SHOWN
    inputs = evaluation.inputs(rows)
    truth = inputs.pop("depth_map")
    with torch.no_grad():
        depth = policy.model(**inputs, output_depth=True).depth
    known = truth[:, 0] > 0
    expected = ((depth[:, 0] - truth[:, 0]).abs() / truth[:, 0])[known].mean()
    assert found["given"]["depth_map"]["left"]["abs_rel"] == pytest.approx(float(expected), rel=1e-4)
    seen = inputs["view_mask"][:, 1]
    assert seen.sum() == 3 and found["given"]["depth_map"]["wrist"]["count"] == 3
    expected = (depth[seen, 1] / 1.5 - 1).abs().mean()  # a square picture has no bars
    assert found["given"]["depth_map"]["wrist"]["abs_rel"] == pytest.approx(float(expected), rel=1e-4)
    assert found["given"]["action"]["position_mm"] == report["action"]["position_mm"]
    assert found["given"]["keyframe"] == report["pointed_keyframe"]
    for name in ("null", "swapped"):
        for errors, kind in (("action", "position_mm"), ("keyframe", "xy_cm"), ("keyframe", "z_cm")):
            assert found[name][errors][kind]["mean"] != found["given"][errors][kind]["mean"], (name, kind)
        assert found[name]["depth_map"]["left"]["count"] == len(rows)


def test_each_row_is_predicted_once_for_each_that_is_shown(policy, rows, monkeypatch):
    asked, predict = [], policy.model.predict_action

    def predicted(**inputs):
        asked.append(len(inputs["state"]))
        return predict(**inputs)

    monkeypatch.setattr(policy.model, "predict_action", predicted)
    OfflineEvaluation(policy).evaluate(rows, batch_size=5)
    assert asked == [5] * len(SHOWN) + [3] * len(SHOWN)


def test_a_right_way_to_the_keyframe_is_no_error(policy, rows):
    """The way that the processor writes as the target, told by the pointers."""
    targets = policy.processor(
        images=policy.images([row.views for row in rows]),
        text=[row.task for row in rows],
        state=[row.states[-1:] for row in rows],
        embodiment=[row.embodiment for row in rows],
        objective="pose",
        keyframe_pose=[row.keyframe_pose + np.float32([0.03, 0.04, 0.02, 0, 0, 0, 0]) for row in rows],
        target_px=[[10.0, 10.0]] * len(rows),
        return_labels=True,
        check_stereo=False,
    )["displacement"]
    errors = position_errors(policy.processor, rows, targets)
    np.testing.assert_allclose(errors["xy_cm"], [5.0] * len(rows), rtol=1e-3)
    np.testing.assert_allclose(errors["z_cm"], [2.0] * len(rows), rtol=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"depth_config": stereo_encoder()},
        {"depth_config": {"input": "depth"}},
        {"mask": "full"},
        {"depth_config": None, "depth_map_loss_weight": 0.0},
    ],
    ids=["stereo", "depth shown", "full mask", "pi0"],
)
def test_every_kind_of_depth_expert_is_measured(overrides, rows, tmp_path):
    policy = policy_of(tmp_path / "model", **overrides)
    report = OfflineEvaluation(policy).evaluate(rows[:5], batch_size=5)
    json.dumps(report, allow_nan=False)
    if "depth_map_loss_weight" in overrides:
        assert report["geometry"] is None
        return
    found = report["geometry"]
    names = [*SHOWN, "left_twice"] if overrides.get("depth_config") == stereo_encoder() else SHOWN
    assert set(found) == set(names)
    errors = [found[name]["depth_map"]["left"]["abs_rel"] for name in names]
    assert len(set(errors)) == len(names)
    positions = [found[name]["action"]["position_mm"]["mean"] for name in names]
    assert len(set(positions)) == len(names)
    assert found["given"]["keyframe"]["xy_cm"] is None  # of pointers, which it has not


def test_rows_of_one_camera_without_depth(policy, tmp_path):
    gone = ("observation.images.right", "calibration.baseline_m", "target.box_right_px", "observation.depth")
    folder = write_dataset(tmp_path, [2, 2], 1, split="validation", size=64, without=gone)
    found = list(read_rows(str(folder), 10, 1))
    assert [set(row.views) for row in found] == [{"left"}] * 4
    assert all(row.calibration is None and row.depths == {} for row in found)
    assert observations(found)[0].right is None
    with pytest.raises(ValueError, match="trained sees left, wrist, but there is no view wrist here; there are left"):
        OfflineEvaluation(policy).evaluate(found)
    found = [replace(row, views={**row.views, "wrist": None}) for row in found]
    report = OfflineEvaluation(policy).evaluate(found)
    assert report["geometry"]["swapped"]["depth_map"] == {"left": None, "wrist": None}
    assert report["geometry"]["swapped"]["action"]["position_mm"]["count"] > 0
    one = OfflineEvaluation(policy).evaluate(found[:2])["geometry"]
    assert one["null"]["action"]["position_mm"] and one["swapped"]["action"]["position_mm"] is None


def test_the_command_writes_it_and_the_report_names_it(dataset, tmp_path):
    source = str(save_tiny_depthvla(tmp_path / "model"))
    own = ["--model", source, "--dataset", dataset, "--out", str(tmp_path), "--stride", "2", "--run_code", "True"]
    assert main(["offline", *own]) == 0
    offline = json.loads((tmp_path / "offline.json").read_text())
    found = offline["geometry"]
    assert found["null"]["depth_map"]["left"]["count"] == offline["rows"] == 4
    named = {metric["name"]: metric for metric in offline_metrics(offline)}
    errors = [found[name]["depth_map"]["left"]["abs_rel"] for name in SHOWN]
    assert named["depth of the left view, abs_rel"]["value"] == errors[0]
    expected = "{:.3f}; shown grey or no depth: {:.3f}; shown another scene: {:.3f}".format(*errors)
    assert named["depth of the left view, abs_rel"]["text"] == expected
    assert "action error with its geometry, position_mm" in named
    assert "keyframe error with its geometry, z_cm" not in named  # no pointers
    del offline["geometry"]  # results from before
    assert len(offline_metrics(offline)) == len(named) - 5
