"""StereoProcessor: every objective and its inverse, batches, errors, saving, remote loading."""

import copy
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

from stereovla.processing import StereoImageProcessorPil, StereoProcessor, build_tokenizer
from stereovla.processing.answers import CameraParameters, action_prompt
from stereovla.processing.camera_geometry import Calibration, StereoPairError, project_points
from stereovla.processing.rotations import matrix_to_rpy, rotation_vector_to_matrix, rpy_to_matrix
from stereovla.processing.state_entries import POSES

RNG = np.random.default_rng(0)
LOW, HIGH = np.array([0.2, -0.4, 0.0, -0.5, -0.5, -1.0, 0.0]), np.array([0.8, 0.4, 0.5, 0.5, 0.5, 1.0, 1.0])
POSE = np.array([0.5, 0.1, 0.2, 0.0, 0.1, -0.3, 1.0])
CALIBRATION = {
    "focal_length_px": [60.0, 60.0],
    "principal_point_px": [32.0, 32.0],
    "baseline_m": 0.063,
    "transform_camera_to_base": [[0, -0.6, 0.8, -0.1], [-1, 0, 0, 0.1], [0, -0.8, -0.6, 0.7], [0, 0, 0, 1.0]],
}
BOXES = [[10, 12, 30, 40], [4, 12, 24, 40]]


def statistics(low, high):
    return {"q01": list(low), "q99": list(high)}


STATS = {
    "arm": {
        "state": statistics(LOW, HIGH),
        "action": statistics([-0.05] * 6 + [-1], [0.05] * 6 + [1]),
        "keyframe_pose": statistics(LOW, HIGH),
    },
    "other": {"state": statistics(LOW - 1, HIGH + 1), "action": statistics([-0.1] * 7, [0.1] * 7)},
}


def make_processor(**options):
    tokenizer = build_tokenizer(["pick up the red cube", "red cube", "blue ball"], num_bins=64)
    options = {"num_visual_tokens": 16, "num_bins": 64, "norm_stats": STATS, "check_stereo": False} | options
    return StereoProcessor(StereoImageProcessorPil(size={"height": 64, "width": 64}), tokenizer, **options)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def pair(seed=0, size=64):
    views = np.random.default_rng(seed).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(view) for view in views]


def robot(**more):
    return {"text": "pick up the red cube", "state": POSE, "embodiment": "arm"} | more


# ------------------------------------------------------------------------------------------------ objectives, inverses


def answer_ids(batch, row=0):
    labels = batch["labels"][row]
    return labels[labels != -100].tolist()


def test_action(processor):
    actions = RNG.uniform(-0.05, 0.05, (5, 7))
    mask = [True, True, True, False, False]
    batch = processor(pair(), **robot(actions=actions, action_mask=mask, keyframe_pose=POSE, return_labels=True))
    assert batch["actions"].shape == (1, 8, 7) and batch["state"].shape == (1, 4, 7)
    assert batch["action_mask"].tolist() == [mask + [False] * 3] and batch["is_action"].tolist() == [True]
    np.testing.assert_allclose(processor.decode_actions(batch["actions"], "arm")[0, :5], actions, atol=1e-6)
    assert (batch["actions"][0, 5:] == 0).all()
    ids = answer_ids(batch)  # current state, pose, EOS
    assert len(ids) == 15 and ids[-1] == processor.tokenizer.eos_token_id and ids[:7] == ids[7:14]
    poses, valid = processor.decode_poses([ids[7:]], "arm")
    np.testing.assert_allclose(poses[0], POSE, atol=((HIGH - LOW) / 126).max() + 1e-6)
    assert valid.tolist() == [True] and poses.dtype == np.float32
    row = batch["input_ids"][0].tolist()
    text = processor.tokenizer(action_prompt("pick up the red cube"), add_special_tokens=False)["input_ids"]
    assert row[: 17 + len(text)] == [1] + [processor.image_token_id] * 16 + text
    assert processor.bins.is_bin(row[17 + len(text) : -1]).all() and len(row) == 17 + len(text) + 28 + 7 + 1


def test_a_short_chunk_of_a_robot_that_never_does_zero():
    """Targets between 100.0 and 100.001: the zeros behind a short chunk are not the robot's, and no error."""
    stats = {"arm": STATS["arm"] | {"action": statistics([100.0] * 7, [100.001] * 7)}}
    batch = make_processor(norm_stats=stats)(pair(), **robot(actions=np.full((3, 7), 100.001)))
    np.testing.assert_allclose(batch["actions"][0, :3], 1.0, atol=1e-4)
    assert not batch["actions"][0, 3:].any()


def test_pose_has_no_action_loss(processor):
    action = processor(pair(), **robot(actions=np.zeros((8, 7)), keyframe_pose=POSE, return_labels=True))
    pose = processor(pair(), **robot(objective="pose", keyframe_pose=POSE, return_labels=True))
    assert torch.equal(action["input_ids"], pose["input_ids"]) and torch.equal(action["labels"], pose["labels"])
    assert torch.equal(action["state"], pose["state"])
    assert action["is_action"].all() and not pose["is_action"].any() and not pose["actions"].any()


def test_box(processor):
    batch = processor(pair(), "red cube", objective="box", boxes=BOXES, return_labels=True)
    ids = answer_ids(batch)
    assert len(ids) == 8 and batch["input_ids"][0, -1] == ids[-1]  # no EOS
    boxes, valid = processor.decode_boxes([ids])
    np.testing.assert_allclose(boxes[0], BOXES, atol=64 / 126 + 1e-3)
    assert valid.tolist() == [True]
    assert not batch["state"].any()
    bad = [ids[:7] + [5], ids[2:4] + ids[:2] + ids[4:]]  # no bin; corners in the wrong order
    assert processor.decode_boxes(bad)[1].tolist() == [False, False]


def test_boxes_come_back_in_source_pixels(processor):
    boxes = np.array([[100, 20, 180, 90], [80, 20, 160, 90]])
    wide = [view.resize((240, 120)) for view in pair()]
    batch = processor(wide, "red cube", objective="box", boxes=boxes, return_labels=True)
    decoded, _ = processor.decode_boxes([answer_ids(batch)], source_size=(120, 240))
    np.testing.assert_allclose(decoded[0], boxes, atol=240 / 126 + 0.1)


def test_depth(processor):
    points, depths = [[16.2, 21.7], [3, 5]], [0.532, 1.205]
    batch = processor(pair(), objective="depth", points_px=points, depths_m=depths, return_labels=True)
    text = processor.tokenizer.decode(batch["input_ids"][0][17:])
    assert text == "In: What is the depth at (16, 21), (3, 5) in the image?\nOut: [0.53,1.21]</s>"
    ids = answer_ids(batch)
    assert processor.decode_depths([ids + [7, 8], ids[:3] + [0] * 3, []]) == [[0.53, 1.21], None, None]


def test_camera(processor):
    batch = processor(pair(), objective="camera", calibration=CALIBRATION, return_labels=True)
    camera, garbage = processor.decode_cameras([answer_ids(batch), [5, 6, 7]])
    assert garbage is None
    assert camera.focal_length == (0.938, 0.938) and camera.principal_point == (0.5, 0.5) and camera.baseline_m == 0.063
    np.testing.assert_allclose(camera.position_m, [-0.1, 0.1, 0.7])
    assert isinstance(camera, CameraParameters)
    # A camera of twice the size with twice the focal length is the same camera.
    double = {k: np.multiply(v, 2) if k.endswith("_px") else v for k, v in CALIBRATION.items()}
    large = processor(pair(size=128), objective="camera", calibration=double, return_labels=True)
    assert answer_ids(large) == answer_ids(batch)


def test_inference_prompts_stop_where_the_answer_begins(processor):
    for objective, answer in (
        ("action", robot(actions=np.zeros((8, 7)), keyframe_pose=POSE)),
        ("pose", robot(keyframe_pose=POSE)),
        ("box", {"text": "red cube", "boxes": BOXES}),
        ("depth", {"points_px": [5, 5], "depths_m": 0.5}),
        ("camera", {"calibration": CALIBRATION}),
    ):
        trained = processor(pair(), objective=objective, **answer, return_labels=True)
        asked = {k: v for k, v in answer.items() if k not in ("actions", "keyframe_pose", "boxes", "depths_m")}
        prompt = processor(pair(), objective=objective, **asked)
        assert set(prompt) == {"pixel_values", "input_ids", "attention_mask", "state"}
        length = prompt["input_ids"].shape[1]
        assert torch.equal(prompt["input_ids"], trained["input_ids"][:, :length])
        supervised = (trained["labels"][0] != -100).nonzero()[0, 0]
        assert length == supervised + (7 if objective in ("action", "pose") else 0)  # the current state is given


def test_disparity_and_points(processor):
    depth = RNG.uniform(0.4, 1.0, (64, 64)).astype(np.float32)
    depth[:3] = 0
    depth[3, 3] = np.nan
    batch = processor(
        pair(), **robot(calibration=CALIBRATION, depth_map=depth, target_px=[10.5, 20], gripper_px=[70, 3])
    )
    expected = np.where(depth > 0, 60 * 0.063 / np.where(depth > 0, depth, 1), 0)
    np.testing.assert_allclose(batch["disparity"][0].numpy(), expected, rtol=1e-5)
    assert batch["points"][0, 0].tolist() == [10.5, 20] and batch["points"][0, 1].isnan().all()
    twice = {name: [value] * 2 for name, value in robot().items()}
    whole = processor([pair()] * 2, **twice, target_px=[[10.5, 20], None], destination_px=[None, [30, 40]])["points"]
    assert whole.isnan().all(-1).tolist() == [[False, True, True], [True, True, False]]
    assert whole[1, 2].tolist() == [30, 40]
    packed = processor(
        pair(), **robot(calibration=CALIBRATION, depth_map=np.nan_to_num(depth * 1e4).round().astype(np.uint16))
    )
    np.testing.assert_allclose(packed["disparity"], batch["disparity"], atol=2e-3)


def test_answer_points_are_what_each_label_is_about(processor):
    """Boxes and poses are about the target, a depth question about its pixel, a camera about nothing; the present
    state is no answer.
    """
    target, gripper, asked = [10.5, 20.0], [30.0, 3.0], [40.2, 50.7]
    batch = processor(
        [pair()] * 6,
        ["pick up the red cube", "pick up the red cube", "red cube", None, None, "blue ball"],
        [POSE, POSE, None, None, None, None],
        ["arm", "arm", None, None, None, None],
        ["action", "pose", "box", "depth", "camera", "box"],
        actions=[np.zeros((8, 7)), *[None] * 5],
        keyframe_pose=[POSE, POSE, *[None] * 4],
        boxes=[None, None, BOXES, None, None, BOXES],
        points_px=[None, None, None, [asked], None, None],
        depths_m=[None, None, None, [0.5], None, None],
        calibration=[CALIBRATION] * 6,
        target_px=[target, target, target, None, None, [70.0, 3.0]],
        gripper_px=[gripper] * 6,
        target_name=["red cube", "blue ball", None, "red cube", None, None],
        return_labels=True,
    )
    points, labels = batch["answer_points"], batch["labels"]
    assert batch["asked_words"].shape == labels.shape and batch["asked_words"].dtype == torch.bool
    words = [
        processor.tokenizer.decode(ids[said])
        for ids, said in zip(batch["input_ids"], batch["asked_words"], strict=True)
    ]
    assert words == [" red cube", "", " red cube", "4050", "", " blue ball"]
    assert points.shape == (*labels.shape, 2) and points.dtype == torch.float32
    for row, (about, skipped) in enumerate([(target, 7), (target, 7), (target, 0), (asked, 0), (None, 0), (None, 0)]):
        places = (labels[row] != -100).nonzero()[skipped:, 0] if about else torch.tensor([], dtype=torch.int64)
        assert points[row].isfinite().all(-1).nonzero()[:, 0].tolist() == places.tolist()
        for place in places:
            np.testing.assert_allclose(points[row, place], about, rtol=1e-6)
    # one label cannot be about two pixels
    two = {"points_px": [asked, [3, 5]], "depths_m": [0.5, 0.6], "gripper_px": gripper}
    assert processor(pair(), objective="depth", **two, return_labels=True)["answer_points"].isnan().all()
    assert "answer_points" not in processor(pair(), **robot(target_px=target))
    scaled = processor(
        pair(size=128), "red cube", objective="box", boxes=BOXES, target_px=target, return_labels=True
    )  # in px of the processed view
    np.testing.assert_allclose(scaled["answer_points"][0, -1], [5.25, 10.0])


def displacement(processor, state, keyframe, embodiment="arm"):
    values = {"state": state, "keyframe_pose": keyframe, "embodiment": embodiment, "target_px": [3.0, 4.0]}
    batch = processor(pair(), "pick up the red cube", objective="pose", return_labels=True, **values)
    return batch["displacement"][0].double().numpy()


def turned(pose, rotation_vector):
    """The pose after a turn about the axes of the base."""
    rotation = rotation_vector_to_matrix(rotation_vector) @ rpy_to_matrix(pose[3:6])
    return np.concatenate([pose[:3], matrix_to_rpy(rotation), pose[6:]])


def test_displacement_from_state_to_keyframe(processor):
    """In the state's scales the way leads to the keyframe: numbers are added, the rotation R(d) is applied."""
    turn = np.array([0.2, -0.1, 0.4])
    keyframe = turned(POSE + [0.03, -0.02, 0.01, 0, 0, 0, -1], turn)
    found = displacement(processor, POSE, keyframe)
    scale = (HIGH - LOW) / 2
    np.testing.assert_allclose(found[[0, 1, 2, 6]] * scale[[0, 1, 2, 6]], [0.03, -0.02, 0.01, -1], atol=1e-6)
    np.testing.assert_allclose(found[3:6] * 1.0, turn, atol=1e-6)  # 1.0: the largest of the angles' scales, of the yaw
    box = processor(pair(), objective="box", text="blue ball", boxes=BOXES, target_px=[3.0, 4.0], return_labels=True)
    assert box["displacement"].isnan().all()
    assert "displacement" not in processor(pair(), **robot(target_px=[3.0, 4.0]))


UNIT = statistics([-1.0] * 7, [1.0] * 7)


@pytest.mark.parametrize("angle", [3, 4, 5])
def test_a_small_turn_across_pi_is_a_small_displacement(angle):
    """From pi - 0.02 to -pi + 0.02 about each axis is 0.04 rad, and not -6.24."""
    processor = make_processor(norm_stats={"arm": {"state": UNIT, "keyframe_pose": UNIT}})
    here, there = np.zeros(7), np.zeros(7)
    here[angle], there[angle] = np.pi - 0.02, 0.02 - np.pi
    expected = np.zeros(7)
    expected[angle] = 0.04
    np.testing.assert_allclose(displacement(processor, here, there), expected, atol=1e-6)
    np.testing.assert_allclose(displacement(processor, there, here), -expected, atol=1e-6)


def test_a_turn_is_as_large_at_every_attitude():
    """Of 0.04 rad about any axis, from any attitude, gimbal lock (pitch 90 degrees) among them."""
    processor = make_processor(norm_stats={"arm": {"state": UNIT, "keyframe_pose": UNIT}})
    rng = np.random.default_rng(0)
    for pitch in (0.3, np.pi / 2 - 1e-3, -np.pi / 2 + 1e-3, np.pi / 2):
        pose = np.array([0.1, 0.2, 0.3, rng.uniform(-3, 3), pitch, rng.uniform(-3, 3), 1.0])
        turn = rng.normal(size=3)
        turn *= 0.04 / np.linalg.norm(turn)
        found = displacement(processor, pose, turned(pose, turn))
        np.testing.assert_allclose(found, [0, 0, 0, *turn, 0], atol=1e-5)


def test_a_state_s_names_say_what_is_a_rotation():
    """A yaw alone goes the shorter way round, two arms have a rotation each, joints none, whatever their number."""
    five = [0.1, 0.2, 0.3, 3.1, 1.0], [0.1, 0.2, 0.3, -3.1, 1.0]
    seven = [0.0] * 3 + [3.1, 0.0, 0.0, 1.0], [0.0] * 3 + [-3.1, 0.0, 0.0, 1.0]
    short, long = 2 * np.pi - 6.2, -6.2
    arms = [f"{side}_{name}" for side in ("left", "right") for name in POSES[7]]
    joints = [*(f"joint_{i}" for i in range(6)), "gripper"]
    for state_names, (state, keyframe), index, expected in (
        (None, five, 3, short),
        (None, seven, 3, short),
        ({"arm": joints}, seven, 3, long),
        ({"arm": []}, seven, 3, long),
        ({"arm": ["a", "b", "c", "wrist_roll", "d", "e", "f"]}, seven, 3, long),
        ({"arm": arms}, [part * 2 for part in seven], 10, short),
        (None, [part * 2 for part in seven], 10, long),
    ):
        unit = statistics([-1.0] * len(state), [1.0] * len(state))
        processor = make_processor(
            norm_stats={"arm": {"state": unit, "keyframe_pose": unit}}, state_dim=len(state), state_names=state_names
        )
        found = displacement(processor, state, keyframe)
        assert found[index] == pytest.approx(expected, abs=1e-6), state_names
        assert not np.delete(found, [3, index]).any()


def test_keyframes_that_hold_alike_are_written_and_told_alike():
    """With turn_symmetry 2 a keyframe and the same after half a turn of the tool differ in nothing but the turn."""
    processor = make_processor(norm_stats={"arm": {"state": UNIT, "keyframe_pose": UNIT}}, turn_symmetry=2)
    values = {"objective": "pose", "target_px": [3.0, 4.0], "return_labels": True, "embodiment": "arm"}
    state = np.array([0.1, 0.2, 0.3, 0.0, 0.0, -0.5, 1.0])
    keyframe = np.array([0.2, 0.2, 0.1, 0.0, 0.0, 0.9, 1.0])
    other = keyframe - [0, 0, 0, 0, 0, np.pi, 0]
    first, second = (
        processor(pair(), "pick up the red cube", state=state, keyframe_pose=pose, **values)
        for pose in (keyframe, other)
    )
    assert torch.equal(first["input_ids"], second["input_ids"]) and torch.equal(first["labels"], second["labels"])
    np.testing.assert_allclose(first["displacement"], second["displacement"], atol=1e-6)
    np.testing.assert_allclose(first["displacement"][0], keyframe - state - [0, 0, 0, 0, 0, 1.4, 0], atol=1e-6)
    assert first["turns"].shape == (1, 1) and first["turns"].dtype == torch.float32
    assert first["turns"].item() == pytest.approx(1.4) and second["turns"].item() == pytest.approx(1.4 - np.pi)
    assert first["equal_turns"].tolist() == [2.0]
    assert first["facing"].tolist() == second["facing"].tolist() == [[-0.5]]
    asked = processor(pair(), "pick up the red cube", state=state, embodiment="arm")
    assert asked["facing"].tolist() == [[-0.5]] and "facing" in processor.model_input_names
    assert "facing" not in processor(pair(), "red cube", objective="box")  # which `generate` does not know
    assert "facing" not in make_processor()(pair(), **robot()) and "facing" not in make_processor().model_input_names
    # as it is decoded again, the keyframe is the one within half a turn of 0
    ids = [first["input_ids"][0, -8:-1]]
    np.testing.assert_allclose(processor.decode_poses(np.stack(ids), "arm")[0][0], keyframe, atol=0.02)
    # of a cube four hold alike, which cannot be said of three
    cube = processor(pair(), "x", state=state, keyframe_pose=keyframe, keyframe_symmetry=4, **values)
    assert cube["equal_turns"].tolist() == [4.0] and torch.equal(cube["turns"], first["turns"])
    with pytest.raises(ValueError, match="keyframe_symmetry is 3; it must be a multiple of .* turn_symmetry, 2"):
        processor(pair(), "x", state=state, keyframe_pose=keyframe, keyframe_symmetry=3, **values)
    box = processor(pair(), objective="box", text="blue ball", boxes=BOXES, target_px=[3.0, 4.0], return_labels=True)
    assert box["turns"].isnan().all()


def test_names_are_the_words_of_a_sentence_and_the_places_those_of_the_processed_view():
    processor = make_processor()
    given = {"names": ["red cube", "blue ball"], "names_px": [[64.0, 32.0], [10.0, 150.0]]}
    views = [view.crop((0, 0, 128, 64)) for view in pair(size=128)]
    one = processor(views, "blue ball", objective="box", **given)
    words = processor(views, "red cube", objective="box")["input_ids"][0].tolist()
    red, blue = one["names"][0].tolist()
    assert any(words[n : n + len(red)] == red for n in range(len(words)))
    assert processor.tokenizer.decode(red).split() == ["red", "cube"]
    assert processor.tokenizer.decode([i for i in blue if i != -100]).split() == ["blue", "ball"]
    geometry = processor.image_processor.geometry((64, 128))
    np.testing.assert_allclose(one["name_points"][0, 0], geometry.points(np.array([[64.0, 32.0]]))[0])
    assert one["name_points"][0, 1].isnan().all()  # below the picture
    batch = {key: [None, value] for key, value in given.items()}
    both = processor([views, views], ["red cube", "blue ball"], objective="box", **batch)
    assert (both["names"][0] == -100).all() and both["name_points"][0].isnan().all()
    assert torch.equal(both["names"][1], one["names"][0])
    for wrong, message in (
        ({"names": "red cube"}, "names is 'red cube'; expected a list of names"),
        ({"names": ["red cube", " "]}, "none of them empty"),
        ({"names_px": None}, "needs names_px"),
        ({"names_px": [[1.0, 2.0]]}, r"names_px has shape \(1, 2\); expected \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            processor(views, "red cube", objective="box", **(given | wrong))


def test_a_robot_without_turns_beside_one_with_two():
    """Two arms, and fourteen joints: as many numbers, of which none is a rotation."""
    arms = [f"{side}_{name}" for side in ("left", "right") for name in POSES[7]]
    unit = statistics([-1.0] * 14, [1.0] * 14)
    stats = {name: {"state": unit, "keyframe_pose": unit} for name in ("arms", "joints")}
    names = {"arms": arms, "joints": []}
    processor = make_processor(norm_stats=stats, state_dim=14, state_names=names, turn_symmetry=2)
    assert processor.num_turns == 2
    state, keyframe = np.zeros(14), np.zeros(14)
    keyframe[[5, 12]] = 0.3, -0.2
    batch = processor(
        [pair(), pair()],
        ["x", "x"],
        state=[state, state],
        keyframe_pose=[keyframe, keyframe],
        embodiment=["arms", "joints"],
        objective="pose",
        target_px=[[3.0, 4.0]] * 2,
        return_labels=True,
    )
    np.testing.assert_allclose(batch["turns"], [[0.3, -0.2], [np.nan, np.nan]], atol=1e-6)
    np.testing.assert_allclose(batch["displacement"], [np.zeros(14), keyframe], atol=1e-6)
    assert batch["facing"].tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="turn_symmetry is 3; it must be 0, 1 or 2"):
        make_processor(turn_symmetry=3)


@pytest.mark.parametrize(
    "names, message",
    [
        (["x", "y"], r"state_names\['arm'\] are \['x', 'y'\]; a state has 7 numbers"),
        (["x"] * 7, "each needs a name of its own"),
        ("roll", "is 'roll'; expected a list of names"),
    ],
)
def test_wrong_state_names(names, message):
    with pytest.raises(ValueError, match=message):
        make_processor(state_names={"arm": names})


def test_disparity_of_a_letterboxed_view(processor):
    """A point at known depth: its disparity in processed px is the distance of its two processed projections."""
    wide = [view.resize((160, 120)) for view in pair()]
    camera = Calibration.from_mapping(CALIBRATION | {"focal_length_px": [150, 150], "principal_point_px": [80, 60]})
    point = camera.transform_camera_to_base @ [0.02, -0.03, 0.6, 1]
    right_pose = camera.transform_camera_to_base.copy()
    right_pose[:3, 3] += right_pose[:3, 0] * 0.063
    right = Calibration(camera.focal_length_px, camera.principal_point_px, 0.063, right_pose)
    geometry = processor.image_processor.geometry((120, 160))
    left_u, right_u = (geometry.points(project_points(point[:3], c))[0] for c in (camera, right))
    calibration = {name: getattr(camera, name) for name in camera.__dataclass_fields__}
    batch = processor(wide, **robot(calibration=calibration, depth_map=np.full((120, 160), 0.6)))
    np.testing.assert_allclose(batch["disparity"][0, 32, 32], left_u - right_u, rtol=1e-5)
    assert not batch["disparity"][0, :8].any() and not batch["disparity"][0, 56:].any()


def test_batch_equals_samples(processor):
    samples = [
        robot(objective="action", actions=np.zeros((8, 7)), keyframe_pose=POSE, target_px=[3.0, 4.0]),
        {"objective": "box", "text": "blue ball", "boxes": BOXES},
        {"objective": "depth", "points_px": [5, 5], "depths_m": 0.5, "depth_map": np.full((64, 64), 0.5, np.float32)},
        {"objective": "camera", "gripper_px": [5.0, 6.0]},
        robot(objective="pose", state=np.stack([POSE, POSE + 0.01]), keyframe_pose=POSE),
    ]
    for sample in samples:
        sample["calibration"] = CALIBRATION
    pairs = [pair(i) for i in range(5)]
    names = sorted(set().union(*samples) - {"embodiment"})
    columns = {name: [sample.get(name) for sample in samples] for name in names}
    batch = processor(pairs, embodiment="arm", return_labels=True, **columns)
    assert batch["is_action"].tolist() == [True] + [False] * 4
    by_token = {"input_ids", "labels", "attention_mask", "answer_points", "asked_words"}
    for row, sample in enumerate(samples):
        single = processor(pairs[row], return_labels=True, **sample)
        length = single["input_ids"].shape[1]
        for name in by_token & set(single):
            torch.testing.assert_close(batch[name][row, :length], single[name][0], equal_nan=True, rtol=0, atol=0)
        assert batch["answer_points"][row, length:].isnan().all() and not batch["asked_words"][row, length:].any()
        assert not batch["attention_mask"][row, length:].any() and (batch["labels"][row, length:] == -100).all()
        for name in set(single) - by_token:
            torch.testing.assert_close(batch[name][row], single[name][0], equal_nan=True)
    left = processor(pairs, embodiment="arm", return_labels=True, padding_side="left", **columns)
    for row in range(5):
        on_the_left, on_the_right = left["attention_mask"][row] == 1, batch["attention_mask"][row] == 1
        assert torch.equal(left["input_ids"][row][on_the_left], batch["input_ids"][row][on_the_right])
        assert torch.equal(left["labels"][row][on_the_left], batch["labels"][row][on_the_right])
    assert left["attention_mask"][:, -1].all()


def test_inference_batches_are_padded_on_the_left(processor):
    batch = processor([pair(0), pair(1)], ["pick up the red cube", "pick up"], [POSE, POSE], "arm", return_tensors="np")
    assert batch["attention_mask"][:, -1].all() and batch["attention_mask"][1, 0] == 0
    assert all(isinstance(value, np.ndarray) for value in batch.values())


def test_embodiments_have_their_own_statistics(processor):
    batch = processor([pair(0), pair(1)], ["pick up"] * 2, [POSE, POSE], ["arm", "other"])
    single = processor(pair(0), "pick up", POSE, "other")
    assert torch.equal(batch["state"][1], single["state"][0]) and not torch.equal(batch["state"][0], batch["state"][1])
    chunk = torch.ones(2, 8, 7, dtype=torch.bfloat16)
    decoded = processor.decode_actions(chunk, ["arm", "other"])
    np.testing.assert_allclose(decoded[:, 0, 0], [0.05, 0.1], rtol=1e-6)
    assert decoded.dtype == np.float32 and decoded.shape == (2, 8, 7)


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call, message",
    [
        (robot(text=""), "text is ''; objective 'action' needs an instruction"),
        (robot(text=" \n"), "text is ' .*n'"),
        (robot(text="pick up <image>"), "contains the reserved token '<image>'"),
        (robot(state=None), "objective 'action' needs state"),
        (robot(state=POSE[:6]), r"state has shape \(6,\); expected \(7,\)"),
        (robot(state=POSE * np.nan), r"state\[0\] is nan"),
        (robot(embodiment="leg"), r"unknown embodiment 'leg'; valid embodiments: \['arm', 'other'\]"),
        (robot(embodiment=None), "unknown embodiment None"),
        (robot(objective="act"), "unknown objective 'act'"),
        (robot(return_labels=True), "needs keyframe_pose"),
        (robot(return_labels=True, keyframe_pose=POSE), "needs actions"),
        (robot(embodiment="other", keyframe_pose=POSE, objective="pose", return_labels=True), "has no 'keyframe_pose'"),
        (robot(padding_side="middle"), "padding_side='middle'"),
        ({"objective": "depth"}, "needs points_px"),
        ({"objective": "depth", "points_px": [64, 3]}, r"points_px \[\[64.0, 3.0\]\] are not in the processed part"),
        ({"objective": "depth", "points_px": [6, 3], "return_labels": True}, "needs depths_m"),
        ({"objective": "camera", "return_labels": True}, "needs calibration"),
        ({"objective": "box", "text": "red cube", "return_labels": True}, "needs boxes"),
    ],
)
def test_bad_samples(processor, call, message):
    with pytest.raises(ValueError, match=message) as single:
        processor(pair(), **call)
    assert not str(single.value).startswith("sample 0")
    shared = ("return_labels", "padding_side")
    # What is checked for the whole batch at once does not name the sample; an objective names it in its own way.
    if not any(part in message for part in ("padding_side", "reserved", "no 'keyframe", "objective 'act'")):
        good = {"objective": "camera", "calibration": CALIBRATION}
        columns = {k: [good.get(k), call.get(k)] for k in {*good, *call} - {*shared, "objective"}}
        objectives = ["camera", call.get("objective", "action")]
        with pytest.raises(ValueError, match=f"sample 1: .*{message}"):
            processor([pair(), pair()], objective=objectives, return_labels=call.get("return_labels", False), **columns)


def test_bad_views(processor):
    left, right = pair()
    with pytest.raises(ValueError, match="has 1 of 2 views"):
        processor([left, None], **robot())
    with pytest.raises(ValueError, match=r"left view is \(64, 64\).*right view \(32, 64\)"):
        processor([left, right.resize((64, 32))], **robot())


def test_decoding_errors(processor):
    with pytest.raises(ValueError, match=r"normalised action\[0, 1, 2\] is nan"):
        chunk = np.zeros((1, 8, 7))
        chunk[0, 1, 2] = np.nan
        processor.decode_actions(chunk, "arm")
    with pytest.raises(ValueError, match=r"shape \(8, 7\); expected 3 dimensions"):
        processor.decode_actions(np.zeros((8, 7)), "arm")
    with pytest.raises(ValueError, match="1 embodiments for a batch of 2"):
        processor.decode_actions(np.zeros((2, 8, 7)), ["arm"])
    with pytest.raises(ValueError, match="unknown embodiment"):
        processor.decode_actions(np.zeros((2, 8, 7)), ["arm", "leg"])


def test_missing_statistics():
    bare = make_processor(norm_stats=None)
    with pytest.raises(ValueError, match="no statistics: pass norm_stats"):
        bare(pair(), **robot())
    with pytest.raises(ValueError, match="no statistics"):
        bare.decode_actions(np.zeros((1, 8, 7)), "arm")
    assert bare(pair(), "red cube", objective="box")["input_ids"].shape[0] == 1


def test_too_long_is_an_error():
    text = "pick up the red cube " * 10
    length = make_processor(max_length=300)(pair(), **robot(text=text))["input_ids"].shape[1]
    assert make_processor(max_length=length + 8)(pair(), **robot(text=text))["input_ids"].shape[1] == length
    message = rf"has {length + 8} tokens .16 of them visual, 8 for the answer., the limit is {length + 7}"
    with pytest.raises(ValueError, match=message):
        make_processor(max_length=length + 7)(pair(), **robot(text=text))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"state": np.full(7, 3e38, np.float32)}, r"sample 0: state\[0, 0\] is 3e\+38, .* at most 10000 is taken"),
        ({"state": POSE + [0, 0, 1e6, 0, 0, 0, 0]}, r"state\[0, 2\] is 1e\+06, 4e\+06 normalised for 'arm'"),
        ({"state": ["0.5"] * 7}, "state is .*; expected numbers"),
        ({"state": [True] * 7}, "state is .*; expected numbers"),
        ({"state": [0.5, [0.1]]}, "state is no array of numbers"),
        ({"state": [None] * 7}, "state is .*; expected numbers"),
        ({"state": {"x": 1}}, "state is .*; expected numbers"),
        ({"text": "cube " * 2000}, "a text has 10,0.. characters, at most 8,192 are read"),
        ({"text": ["a"] * 10**6}, r"text is \['a', 'a', 'a', 'a', 'a', 'a', \.\.\.\];"),
        ({"embodiment": "leg" * 10**6}, r"unknown embodiment 'leg.*\.\.\..*'; valid"),
        ({"embodiment": ["arm"]}, r"unknown embodiment \['arm'\]; valid"),
    ],
)
def test_what_is_refused_before_it_is_worked_on(processor, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        processor([pair()], **{name: [value] for name, value in (robot() | changes).items()})
    assert len(str(error.value)) < 400


def test_the_bounds_themselves_are_taken(processor):
    """A number at the limit, and a text whose tokens still fit, are answered."""
    state = LOW + 1e4 * (HIGH - LOW) / 2
    assert processor(pair(), **robot(state=state))["state"].max() == pytest.approx(1e4 - 1)
    wide = make_processor(max_length=20_000)
    longest = " ".join(["cube"] * 1600)
    assert wide(pair(), **robot(text=longest))["input_ids"].shape[1] > 1600


def test_pair_check():
    """On by default outside training, off in training, and either way at the caller's word."""
    processor = make_processor(check_stereo=True)
    left, _ = pair()
    with pytest.raises(StereoPairError, match=r"images: the left and the right view are the same"):
        processor([left, left], **robot())
    with pytest.raises(StereoPairError, match=r"images\[1\]: the left and the right view are the same"):
        processor([pair(), [left, left]], ["pick up"] * 2, [POSE] * 2, "arm")
    processor([left, left], **robot(check_stereo=False))
    train = robot(objective="pose", keyframe_pose=POSE, return_labels=True)
    processor([left, left], **train)
    with pytest.raises(StereoPairError):
        processor([left, left], **train, check_stereo=True)


# ------------------------------------------------------------------------------------------------- options that change


EDITS = {
    "norm_stats edited": lambda p: p.norm_stats["arm"]["state"]["q99"].__setitem__(0, 1.0),
    "norm_stats assigned": lambda p: setattr(p, "norm_stats", {"arm": STATS["other"] | {"keyframe_pose": UNIT}}),
    "normalization": lambda p: setattr(p, "normalization", "min_max"),
    "chunk_size": lambda p: setattr(p, "chunk_size", 3),
    "state_history": lambda p: setattr(p, "state_history", 2),
    "max_length": lambda p: setattr(p, "max_length", 64),
    "num_visual_tokens": lambda p: setattr(p, "num_visual_tokens", 9),
    "num_bins": lambda p: setattr(p, "num_bins", 32),
    "depth_unit_m": lambda p: setattr(p, "depth_unit_m", 1e-3),
    "state_names": lambda p: setattr(p, "state_names", {"arm": []}),
    "size": lambda p: p.image_processor.size.__setitem__("height", 32),
}


def outcome(processor) -> str:
    """All that a training sample becomes, or what is said of it."""
    depth = np.full((64, 64), 5000, np.uint16)
    values = robot(actions=np.full((3, 7), 0.01), keyframe_pose=turned(POSE, [0.2, -0.1, 0.4]), target_px=[3.0, 4.0])
    try:
        batch = processor(pair(), **values, calibration=CALIBRATION, depth_map=depth, return_labels=True)
    except ValueError as error:
        return str(error)
    sums = {name: (tuple(tensor.shape), tensor.double().nan_to_num().sum().item()) for name, tensor in batch.items()}
    return str(sums) + str(processor.decode_actions(np.full((1, 2, 7), 0.3), "arm").tolist())


@pytest.mark.parametrize("edit", EDITS)
def test_what_counts_after_an_edit_is_what_is_saved(edit, tmp_path):
    """The processor that was edited does what the one does that is loaded from what it saved; before, it did other."""
    numbers = {"min": (LOW - 1).tolist(), "max": (HIGH + 2).tolist()}
    stats = {key: {**value, **numbers} for key, value in STATS["arm"].items()}
    processor = make_processor(norm_stats={"arm": copy.deepcopy(stats)})
    before = outcome(processor)
    EDITS[edit](processor)
    after = outcome(processor)
    processor.save_pretrained(tmp_path)
    assert after == outcome(StereoProcessor.from_pretrained(tmp_path))
    assert after != before


def test_an_edit_to_a_value_that_cannot_be_used_is_refused_and_not_saved(tmp_path):
    for name, value, message in (
        ("normalization", "quantile", "valid modes"),
        ("chunk_size", 0, "chunk_size is 0"),
        ("norm_stats", {"arm": {"state": {"q01": [0.0]}}}, "lacks"),
        ("num_bins", 10_000, "below the vocabulary size"),
    ):
        processor = make_processor()
        setattr(processor, name, value)
        with pytest.raises(ValueError, match=message):
            processor.save_pretrained(tmp_path)
        assert not (tmp_path / "processor_config.json").exists()


def test_tokens_that_are_added_move_no_bin(tmp_path):
    """None counts the tokenizer once; what was counted is kept and saved."""
    processor = make_processor()
    counted, before = len(processor.tokenizer), processor(pair(), **robot())["input_ids"]
    assert processor.action_vocab_size == counted
    processor.tokenizer.add_tokens(["<late>"])
    assert torch.equal(processor(pair(), **robot())["input_ids"], before)
    processor.save_pretrained(tmp_path)
    again = StereoProcessor.from_pretrained(tmp_path)
    assert len(again.tokenizer) == counted + 1 and again.action_vocab_size == counted
    assert torch.equal(again(pair(), **robot())["input_ids"], before)


def test_bins_of_a_tokenizer_with_more_after_them_are_found(tmp_path):
    """A folder that was saved before the number was, and whose tokenizer has grown since."""
    processor = make_processor()
    before, counted = processor(pair(), **robot())["input_ids"], processor.action_vocab_size
    processor.tokenizer.add_tokens(["<late>"])
    processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"action_vocab_size": None}))
    again = StereoProcessor.from_pretrained(tmp_path)
    assert again.action_vocab_size == counted and torch.equal(again(pair(), **robot())["input_ids"], before)


def test_keyframes_of_another_size_than_the_state(tmp_path):
    """A state of 9 numbers whose keyframes are poses of 7."""
    nine = statistics([-1.0] * 9, [1.0] * 9)
    stats = {"arm": STATS["arm"] | {"state": nine}}
    processor = make_processor(norm_stats=stats, state_dim=9, pose_dim=7)
    values = robot(state=np.zeros(9), keyframe_pose=POSE, objective="pose", target_px=[3.0, 4.0])
    batch = processor(pair(), **values, return_labels=True)
    ids = answer_ids(batch)  # current state, pose, EOS
    assert len(ids) == 9 + 7 + 1 and "displacement" not in batch and "points" in batch
    poses, valid = processor.decode_poses([ids[9:]], "arm")
    np.testing.assert_allclose(poses[0], POSE, atol=((HIGH - LOW) / 126).max() + 1e-6)
    assert valid.tolist() == [True]
    length = processor(pair(), **robot(state=np.zeros(9)))["input_ids"].shape[1]
    processor.max_length = length + 7
    with pytest.raises(ValueError, match="8 for the answer"):  # seven numbers and EOS
        processor(pair(), **robot(state=np.zeros(9)))
    processor.max_length = None
    with pytest.raises(ValueError, match=r"keyframe_pose has shape \(9,\); expected \(7,\)"):
        processor(pair(), **values | {"keyframe_pose": np.zeros(9)}, return_labels=True)
    processor.save_pretrained(tmp_path)
    assert StereoProcessor.from_pretrained(tmp_path).pose_dim == 7 and make_processor(state_dim=5).pose_dim == 5


# ---------------------------------------------------------------------------------------------------------- save, load


def test_save_and_load(tmp_path):
    options = {"chunk_size": 5, "control_rates_hz": {"arm": 10.0}, "depth_decimals": 3, "check_stereo": True}
    ours = make_processor(**options)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["norm_stats"] == STATS and saved["num_visual_tokens"] == 16 and saved["chunk_size"] == 5
    again = StereoProcessor.from_pretrained(tmp_path)
    assert again.to_dict() | {"auto_map": ours.auto_map} == ours.to_dict()
    assert torch.equal(again(pair(), **robot())["input_ids"], ours(pair(), **robot())["input_ids"])
    files = {path.name for path in tmp_path.iterdir()}
    code = {"processing_stereovla", "image_processing_stereovla", "camera_geometry", "normalization", "answers"}
    assert {f"{name}.py" for name in (*code, "prompt_tokens", "sample_values")} <= files
    assert "text_tokenizer.py" not in files and "__init__.py" not in files


def test_remote_code_in_a_fresh_process(fresh, tmp_path):
    """Loads through the Auto classes in another folder, in an interpreter that cannot import our packages."""
    folder = tmp_path / "checkpoint"
    ours = make_processor(check_stereo=True)
    ours.save_pretrained(folder)
    views = [np.asarray(view) for view in pair()]
    np.savez(tmp_path / "views.npz", left=views[0], right=views[1])
    script = """
import json, sys
import numpy as np
from transformers import AutoImageProcessor, AutoProcessor
folder = sys.argv[1]
views = np.load("views.npz")
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).target_size == (64, 64)
processor.save_pretrained("again")
processor = AutoProcessor.from_pretrained("again", trust_remote_code=True)
assert type(processor).__module__.startswith("transformers_modules."), type(processor)
assert type(processor.image_processor).__module__.startswith("transformers_modules.")
assert "stereovla" not in sys.modules and "torchvision" not in sys.modules
batch = processor([views["left"], views["right"]], "pick up the red cube", json.loads(sys.argv[2]), "arm")
actions = processor.decode_actions(np.full((1, 8, 7), 0.5), "arm")
np.savez("out.npz", actions=actions, **{name: value.numpy() for name, value in batch.items()})
"""
    fresh.run(script, str(folder), json.dumps(POSE.tolist()), folder=tmp_path)
    out = np.load(tmp_path / "out.npz")
    expected = ours(pair(), **robot())
    for name in ("pixel_values", "input_ids", "attention_mask", "state"):
        np.testing.assert_array_equal(out[name], expected[name].numpy())
    np.testing.assert_array_equal(out["actions"], ours.decode_actions(np.full((1, 8, 7), 0.5), "arm"))


def test_training_batches_are_fast():
    """A batch of 48 at 128 px: about 30 ms on an idle core; the limit leaves room for a busy machine."""
    processor = make_processor(num_visual_tokens=64)
    processor = StereoProcessor(
        StereoImageProcessorPil(size={"height": 128, "width": 128}), processor.tokenizer, STATS, num_bins=64
    )
    size, objectives = 48, ["action", "action", "box", "depth"] * 12
    arguments = {
        "images": [pair(i, 128) for i in range(size)],
        "text": ["pick up the red cube"] * size,
        "state": [np.stack([POSE] * 4)] * size,
        "embodiment": "arm",
        "objective": objectives,
        "actions": [np.zeros((8, 7))] * size,
        "keyframe_pose": [POSE] * size,
        "boxes": [BOXES] * size,
        "points_px": [[5, 5]] * size,
        "depths_m": [0.5] * size,
        "calibration": [CALIBRATION] * size,
        "depth_map": [np.full((128, 128), 5000, np.uint16)] * size,
        "target_px": [[5, 5]] * size,
        "return_labels": True,
    }
    processor(**arguments)
    start = time.process_time()
    for _ in range(5):
        processor(**arguments)
    assert (time.process_time() - start) / 5 < 0.25
