"""dataset_builder.dataset.schema: valid rows pass, every kind of wrong row is named."""

import numpy as np
import pytest
from datasets import Image
from synthetic_dataset import make_row

from stereovla.dataset_builder.dataset import schema


@pytest.fixture
def row():
    return make_row(np.random.default_rng(0), episode=1, frame=2)


def test_valid_row_passes_and_has_every_column(row):
    schema.validate_row(row)
    assert list(schema.features()) == schema.row_columns()
    assert set(row) == set(schema.row_columns())


def test_features_have_the_shapes_of_the_contract():
    features = schema.features(plan_length=5)
    assert isinstance(features["observation.depth"], Image)
    arrow = features.arrow_schema
    assert arrow.field("action_plan").type.list_size == 5
    assert arrow.field("action_plan").type.value_type.list_size == 7
    assert str(arrow.field("calibration.transform_camera_to_base").type.value_type.value_type) == "float"
    assert str(arrow.field("episode_index").type) == "int64"


def _nan(row):
    row["observation.state"] = row["observation.state"].copy()
    row["observation.state"][1] = np.nan


def _left_handed(row):
    row["calibration.transform_camera_to_base"] = np.diag([1, 1, -1, 1]).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nan, r"observation\.state contains NaN"),
        (
            lambda r: r.update({"observation.state": np.zeros(6, np.float32)}),
            r"state has shape \(6,\), expected \(7,\)",
        ),
        (lambda r: r.update({"observation.state": np.zeros(7)}), "dtype float64, expected float32"),
        (
            lambda r: r.update({"observation.images.right": np.zeros((32, 30, 3), np.uint8)}),
            r"right has shape \(32, 30, 3\)",
        ),
        (lambda r: r.update({"observation.depth": np.zeros((16, 32), np.float32)}), r"depth has shape \(16, 32\)"),
        (lambda r: r.pop("observation.images.left"), r"observation\.images\.left is missing"),
        (lambda r: r.update({"observation.stat": 1}), "did you mean 'observation.state'"),
        (lambda r: r.update({"task": "  "}), "task is empty"),
        (lambda r: r.update({"task": None}), "task is missing"),
        (lambda r: r.update({"calibration.baseline_m": -0.063}), r"baseline_m spans -0\.063"),
        (_left_handed, "no rigid transform"),
        (lambda r: r.update({"action_plan_length": 17}), "action_plan_length is 17"),
        (lambda r: r.update({"action": r["action"] - np.float32(0.01)}), "not the first step"),
        (lambda r: r.update({"target.box_left_px": np.array([5, 5, 40, 9], np.float32)}), "no box within 32x32"),
        (lambda r: r["observation.state"].__setitem__(6, 1.5), r"gripper of observation\.state spans 1\.5"),
        (lambda r: r["observation.state"].__setitem__(4, 4.0), "angles"),
    ],
)
def test_wrong_rows_are_named(row, change, message):
    change(row)
    with pytest.raises(ValueError, match=message):
        schema.validate_row(row, where="episode 1, frame 2")


def test_optional_columns_may_be_missing(row):
    for key in ("observation.depth", "observation.segmentation", "action_plan", "action_plan_length", "keyframe_pose"):
        row.pop(key)
    row["target.box_left_px"] = None
    schema.validate_row(row)


def test_missing_columns_are_named_with_the_nearest():
    names = [name for name in schema.row_columns() if name != "task"] + ["tasks"]
    with pytest.raises(ValueError, match=r"my data has no column task \(there is tasks\)"):
        schema.check_columns(names, source="my data")
    with pytest.raises(ValueError, match=r"no column extra"):
        schema.check_columns(schema.row_columns(), source="my data", needed=["extra"])


def test_vectors_of_the_robot_may_have_any_size_where_the_state_is_no_pose(row):
    for key in ("action_plan", "action_plan_length", "keyframe_pose"):
        row.pop(key)
    row["observation.state"], row["action"] = np.full(14, 9, np.float32), np.full(3, -7, np.float32)
    with pytest.raises(ValueError, match=r"state has shape \(14,\), expected \(7,\)"):
        schema.validate_row(row)
    schema.validate_row({**row, "state_is_pose": False})
    with pytest.raises(ValueError, match=r"keyframe_pose has shape \(13,\), expected \(14,\)"):
        schema.validate_row({**row, "state_is_pose": False, "keyframe_pose": np.zeros(13, np.float32)})


def test_features_of_some_columns_and_other_sizes():
    features = schema.features(state_dim=14, action_dim=3, columns=["observation.state", "action", "task"])
    assert list(features) == ["observation.state", "action", "task"]
    assert features["observation.state"].length == 14 and features["action"].length == 3
