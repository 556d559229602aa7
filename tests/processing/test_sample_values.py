"""The values of a sample: what is accepted, how it is brought to the processed view, and what every error says."""

import numpy as np
import pytest

from stereovla.processing.image_processing_stereovla import ViewGeometry
from stereovla.processing.sample_values import SampleReader, split_batch

READER = SampleReader(state_history=4, state_dim=7, chunk_size=8, action_dim=7, depth_unit_m=1e-4)
GEOMETRY = ViewGeometry.fit((48, 80), (64, 64))  # scale 0.8, 13 rows of bars above
EMPTY = dict.fromkeys(("text", "state", "actions", "action_mask", "keyframe_pose", "boxes", "points_px", "depths_m"))
EMPTY |= {"objective": "action", "calibration": None, "depth_map": None, "target_px": None, "gripper_px": None}
CALIBRATION = {
    "focal_length_px": [100.0, 100.0],
    "principal_point_px": [40.0, 24.0],
    "baseline_m": 0.06,
    "transform_camera_to_base": np.eye(4),
}


def sample(**values):
    return EMPTY | values


def test_split_batch():
    columns = {"text": ["a", "b"], "state": None, "embodiment": "arm", "objective": ["action", "box"]}
    rows = split_batch(columns, 2, batched=True)
    assert rows[1] == {"text": "b", "state": None, "embodiment": "arm", "objective": "box"}
    single = {"text": "a", "state": [0.0] * 7, "embodiment": "arm", "objective": "pose"}
    assert split_batch(single, 1, batched=False) == [single]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"text": "a", "objective": "action"}, "text has 'a', but there are 2 image pairs; a batch needs a list"),
        ({"state": [[0.0] * 7], "objective": "action"}, "state has 1 entries, but there are 2 image pairs"),
        ({"calibration": {}, "objective": "action"}, "calibration has {}, but there are 2"),
        ({"objective": ["action", "act"]}, "sample 1: unknown objective 'act'; valid objectives: .*'camera'"),
    ],
)
def test_bad_batches(columns, message):
    with pytest.raises(ValueError, match=message):
        split_batch(columns, 2, batched=True)


def test_states_are_filled_up_with_the_oldest():
    states = np.arange(14.0).reshape(2, 7)
    assert READER.states(sample(state=states)).tolist() == [*[states[0].tolist()] * 3, states[1].tolist()]
    assert (READER.states(sample(state=states[0])) == states[0]).all()


def test_actions():
    chunk, mask, given = READER.actions(sample(actions=np.ones((3, 7)), action_mask=[True, True, False]))
    assert chunk[:3].all() and not chunk[3:].any() and chunk.shape == (8, 7) and given == 3
    assert mask.tolist() == [True, True] + [False] * 6
    assert READER.actions(sample(actions=np.ones((3, 7))))[1].sum() == 3


def test_points_and_boxes_move_with_the_view():
    np.testing.assert_allclose(READER.question_points(sample(points_px=[10, 10]), GEOMETRY), [[8, 13 + 10 * 38 / 48]])
    boxes = READER.boxes(sample(boxes=[[10, 10, 20, 20], [0, 0, 80, 48]]), GEOMETRY)
    np.testing.assert_allclose(boxes[0], [8, 13 + 10 * 38 / 48, 16, 13 + 20 * 38 / 48])
    np.testing.assert_allclose(boxes[1], [0, 13, 64, 51])
    values = sample(target_px=[10, 10], gripper_px=None)
    points = READER.view_points(values, ("target_px", "gripper_px"), GEOMETRY)
    np.testing.assert_allclose(points[0], [8, 13 + 10 * 38 / 48])
    assert np.isnan(points[1]).all()
    outside = READER.view_points(
        sample(target_px=[81, 10], gripper_px=[np.nan, 3]), ("target_px", "gripper_px"), GEOMETRY
    )
    assert np.isnan(outside).all()


def test_depth_map_becomes_disparity():
    depth = np.full((48, 80), 0.5)
    for source in (depth, (depth * 1e4).astype(np.uint16)):
        processed, product = READER.depth_map(sample(depth_map=source, calibration=CALIBRATION), GEOMETRY)
        np.testing.assert_allclose(product / processed[20, 20], 0.8 * 100 * 0.06 / 0.5)
        assert processed[0, 0] == 0


def test_depth_maps_in_metres():
    """By name, or the first view's; each through its own geometry, 0 where it is not known."""
    square = ViewGeometry.fit((64, 64), (64, 64))
    depth = np.full((64, 64), 5000, np.uint16)
    depth[0, 0] = 0
    maps = {"left": np.full((48, 80), 0.75), "wrist": depth, "agent": None}
    out = READER.depth_maps(sample(depth_map=maps), {"left": GEOMETRY, "wrist": square, "agent": square})
    assert list(out) == ["left", "wrist"] and all(item.dtype == np.float32 for item in out.values())
    assert (out["left"][13:51] == 0.75).all() and not out["left"][:13].any() and not out["left"][51:].any()
    np.testing.assert_allclose(out["wrist"].reshape(-1), [0] + [0.5] * (64 * 64 - 1), rtol=1e-6)
    first = READER.depth_maps(sample(depth_map=maps["left"]), {"left": GEOMETRY, "wrist": square})
    np.testing.assert_array_equal(first["left"], out["left"])
    with pytest.raises(ValueError, match=r"depth_map has the views \['agent'\]; of this sample it may have \['left'\]"):
        READER.depth_maps(sample(depth_map={"agent": depth}), {"left": GEOMETRY})
    with pytest.raises(ValueError, match=r"depth_map of the view 'left': labels have shape \(64, 64\)"):
        READER.depth_maps(sample(depth_map={"left": depth}), {"left": GEOMETRY})


def test_boxes_of_a_model_without_a_right_view():
    reader = SampleReader(4, 7, 8, 7, 1e-4, has_right=False)
    expected = [[8, 13 + 10 * 38 / 48, 16, 13 + 20 * 38 / 48]]
    for boxes in ([10, 10, 20, 20], [[10, 10, 20, 20]], [[10, 10, 20, 20], [0, 0, 0, 0]]):
        np.testing.assert_allclose(reader.boxes(sample(boxes=boxes), GEOMETRY), expected)
    for boxes in ([10, 10, 20], np.zeros((3, 4)), np.zeros((2, 2))):
        with pytest.raises(ValueError, match=r"expected \(2, 4\): .* left and right, or \(4,\), left alone"):
            reader.boxes(sample(boxes=boxes), GEOMETRY)


def test_camera_is_relative_to_the_image():
    camera = READER.camera(sample(calibration=CALIBRATION), GEOMETRY)
    np.testing.assert_allclose(camera.focal_length, [100 / 80, 100 * 38 / 48 / 64])
    np.testing.assert_allclose(camera.principal_point, [0.5, 0.5])
    assert camera.quaternion == (1, 0, 0, 0) and camera.baseline_m == 0.06


@pytest.mark.parametrize(
    "read, values, message",
    [
        ("text", {"text": "  "}, "text is '  '; objective 'action' needs an instruction"),
        ("text", {}, "text is None"),
        ("states", {}, "objective 'action' needs state"),
        ("states", {"state": [0.0] * 6}, r"state has shape \(6,\); expected \(7,\) or \(k, 7\) with k = 1 ... 4"),
        ("states", {"state": np.zeros((5, 7))}, r"state has shape \(5, 7\)"),
        ("states", {"state": [0, 0, np.nan, 0, 0, 0, 0]}, r"state\[2\] is nan"),
        ("pose", {"keyframe_pose": [0.0]}, r"keyframe_pose has shape \(1,\); expected \(7,\)"),
        ("pose", {"keyframe_pose": [0, 0, 0, 0, 0, 0, np.inf]}, r"keyframe_pose\[6\] is inf"),
        ("actions", {"actions": np.zeros((9, 7))}, r"actions has shape \(9, 7\); expected \(n, 7\) with n = 1 ... 8"),
        ("actions", {"actions": np.full((2, 7), np.nan)}, r"actions\[0, 0\] is nan"),
        (
            "actions",
            {"actions": np.zeros((2, 7)), "action_mask": [True]},
            r"action_mask is bool \(1,\); expected bool \(2,\)",
        ),
        ("actions", {"actions": np.zeros((2, 7)), "action_mask": [1, 0]}, "action_mask is int64"),
    ],
)
def test_bad_robot_values(read, values, message):
    with pytest.raises(ValueError, match=message):
        getattr(READER, read)(sample(**values))


@pytest.mark.parametrize(
    "read, values, message",
    [
        ("boxes", {}, "needs boxes"),
        ("boxes", {"boxes": [[0, 0, 1, 1]]}, r"boxes has shape \(1, 4\); expected \(2, 4\)"),
        ("boxes", {"boxes": [[0, 0, 1, np.nan], [0, 0, 1, 1]]}, r"boxes\[0, 3\] is nan"),
        ("boxes", {"boxes": [[5, 5, 5, 9], [0, 0, 1, 1]]}, "are empty or outside"),
        ("boxes", {"boxes": [[90, 5, 99, 9], [0, 0, 1, 1]]}, "are empty or outside"),
        (
            "question_points",
            {"points_px": [[1, 1], [80, 1]]},
            r"points_px \[\[80.0, 1.0\]\] are not in the processed part",
        ),
        ("question_points", {"points_px": [1, np.nan]}, "are not in the processed part"),
        ("camera", {}, "needs calibration"),
        (
            "camera",
            {"calibration": {k: CALIBRATION[k] for k in list(CALIBRATION)[:3]}},
            "lacks .'transform_camera_to_base'",
        ),
        ("depth_map", {"depth_map": np.zeros((48, 80))}, "needs calibration"),
        ("depth_map", {"depth_map": np.zeros((48, 80), bool)}, r"depth_map is bool \(48, 80\); expected \(h, w\)"),
        ("depth_map", {"depth_map": np.zeros((4, 8)), "calibration": CALIBRATION}, r"labels have shape \(4, 8\)"),
    ],
)
def test_bad_view_values(read, values, message):
    with pytest.raises(ValueError, match=message):
        getattr(READER, read)(sample(**values), GEOMETRY)


@pytest.mark.parametrize(
    "depths, message",
    [
        ([1.0], "1 values for 2 points"),
        ([1.0, 0.0], r"must be positive, got \[1.0, 0.0\]"),
        ([1.0, np.nan], r"depths_m\[1\] is nan"),
    ],
)
def test_bad_depths(depths, message):
    with pytest.raises(ValueError, match=message):
        READER.depths(sample(depths_m=depths), 2)
