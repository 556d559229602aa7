"""formats.rig and robot_mapping: a strict YAML file, calibration that follows the pixels, and motions."""

import copy

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutate
from stereo_scene import poses

from stereovla.dataset_builder.dataset.schema import CALIBRATION_KEYS
from stereovla.dataset_builder.formats.rig import make_rig, read_rig
from stereovla.dataset_builder.formats.robot_mapping import map_motion, next_keyframes
from stereovla.processing.rotations import matrix_to_rpy

TRANSFORM = [[0, 0, 1, -0.8], [-1, 0, 0, 0], [0, -1, 0, 0.1], [0, 0, 0, 1]]
PLACE = {"position": [0, 1, 2], "rpy": [3, 4, 5], "gripper": 6}
CONTENT = {
    "embodiment": "arm",
    "license": "mit",
    "cameras": {"left": "a", "right": "b"},
    "calibration": {
        "size_px": [640, 480],
        "focal_length_px": [500.0, 510.0],
        "principal_point_px": [320.0, 235.0],
        "baseline_m": 0.12,
        "transform_camera_to_base": TRANSFORM,
    },
    "state": {"column": "s", **PLACE, "gripper_closed_open": [0, 1]},
    "action": {"column": "a", "kind": "absolute", **PLACE, "gripper_closed_open": [0, 1]},
}


def rig(**changes):
    return make_rig({**copy.deepcopy(CONTENT), **changes}, "rig.yaml")


def changed(path: str, value):
    content = copy.deepcopy(CONTENT)
    place = content
    *parts, last = path.split(".")
    for part in parts:
        place = place[part]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed("lisense", "x"), "no key 'lisense'; did you mean 'license'"),
        (changed("embodiment", " "), "embodiment is ' '"),
        (changed("calibration.baseline_m", None), "calibration lacks baseline_m"),
        (changed("calibration.baseline_m", 63), "baseline_m is 63.0, must be in 0.001 ... 1 m"),
        (changed("calibration.focal_length_px", 500), r"focal_length_px is 500, expected \(2,\) finite"),
        (changed("calibration.principal_point_px", [700, 1]), "lies outside the view of"),
        (changed("calibration.transform_camera_to_base", np.diag([1, 1, -1, 1]).tolist()), "no rigid transform"),
        (changed("calibration.focal_length", 1), "no key 'focal_length'; did you mean"),
        (changed("state.gripper", None), "state lacks gripper; give all of them, or none"),
        (changed("state.rpy", [3, 4]), "rpy is .*, expected 3 whole numbers"),
        (changed("state.gripper_closed_open", [1, 1]), "must differ"),
        (changed("state.position", [-1, 0, 1]), "indices count from 0"),
        (changed("action.kind", "velocity"), "kind is 'velocity'; valid: absolute, delta, from_states"),
        (changed("action", {"column": "a"}), "must both be poses"),
        (changed("crop_px", [200, 0, 480, 480]), "crop_px .* within the view"),
        (changed("resize_px", [0, 10]), "must be positive"),
        (changed("tool", [0, 0]), "tool is .*expected 6 numbers"),
        (changed("parts_px", {"left": [0, 0, 10, 10], "right": [0, 0, 10, 10]}), "must be the calibration's size_px"),
        (changed("fps", 0), "fps is 0"),
        (changed("fps", float("nan")), r"fps is \[nan\], expected 1 numbers"),
        (changed("fps", float("inf")), r"fps is \[inf\], expected 1 numbers"),
        (changed("fps", True), r"fps is \[True\], expected 1 numbers"),
        (changed("tool", [float("nan")] * 6), "tool is .*nan.*, expected 6 numbers"),
        (changed("state.gripper_closed_open", [0, float("nan")]), "gripper_closed_open is .*nan.*, expected 2 numbers"),
        (changed("calibration.size_px", [640, 0]), r"size_px is \[640, 0\], expected 1 ... 16384 px"),
        (changed("calibration.baseline_m", 1e300), "baseline_m is 1e.300, expected .* finite numbers"),
        (changed("cameras", {"left": ["a"], "right": "b"}), r"cameras is .*\['a'\].*, expected names such as"),
        (changed("vertical_misalignment_px", -1), "vertical_misalignment_px is -1, expected 0 ... 480 rows"),
        (changed("vertical_misalignment_px", "1"), "vertical_misalignment_px is '1', expected 0 ... 480 rows"),
        ({}, "lacks embodiment, license, cameras"),
        (None, "is None, expected keys and values"),
    ],
)
def test_wrong_files_are_named(content, message):
    with pytest.raises(ValueError, match=message):
        make_rig(content, "rig.yaml")


FULL = {"crop_px": [80, 0, 480, 480], "resize_px": [240, 120], "tool": [0.0] * 6, "fps": 10, "accept": ["units"]}
FULL |= {"parts_px": {"left": [0, 0, 640, 480], "right": [640, 0, 640, 480]}, "vertical_misalignment_px": 1.0}


def test_whatever_stands_in_the_file_is_a_rig_or_an_error_in_words():
    """1,000 contents of which one or two values are of other kinds, gone, or under another name."""
    rng, counts = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(1000):
        content = copy.deepcopy(CONTENT | FULL)
        for _ in range(rng.integers(1, 3)):
            mutate(content, rng)
        try:
            found = make_rig(content, "rig.yaml")
        except ValueError as error:
            assert str(error).startswith("rig.yaml"), error
            counts[False] += 1
            continue
        counts[True] += 1
        if not found.calibration_columns():
            moved = found.moved({key: found.calibration[key] for key in CALIBRATION_KEYS})
            assert all(np.isfinite(value).all() for value in moved.values())
    assert min(counts.values()) > 20


@pytest.mark.parametrize(
    "text", ["license: 2020-13-40", "a: \xff", "[" * 1500, "a: &a [*a, *a]", "? [1, 2]\n: 3", "a: 0x_"]
)
def test_text_that_is_no_yaml_is_named(tmp_path, text):
    path = tmp_path / "rig.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="rig.yaml"):
        read_rig(path)


def test_a_file_is_read(tmp_path):
    path = tmp_path / "rig.yaml"
    with pytest.raises(ValueError, match="rig.yaml is missing"):
        read_rig(path)
    path.write_text(yaml.safe_dump(CONTENT))
    assert read_rig(path).state.position == (0, 1, 2)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="no valid YAML"):
        read_rig(path)


def test_calibration_follows_the_pixels():
    """A bright point stays where the moved calibration projects it."""
    it = rig(crop_px=[80, 0, 480, 480], resize_px=[240, 120])
    calibration = {key: value for key, value in CONTENT["calibration"].items() if key != "size_px"}
    moved = it.moved(calibration)
    slope = np.array([0.12, -0.2])  # x / z, y / z
    before = slope * calibration["focal_length_px"] + calibration["principal_point_px"]
    v, u = np.mgrid[:480, :640] + 0.5
    image = np.uint8(255 * np.exp(-((u - before[0]) ** 2 + (v - before[1]) ** 2) / 200))
    view = it.stored(np.repeat(image[..., None], 3, axis=2), "left").astype(float)[..., 0]
    assert view.shape == (120, 240)
    v, u = np.mgrid[:120, :240] + 0.5
    found = np.array([(u * view).sum(), (v * view).sum()]) / view.sum()
    np.testing.assert_allclose(found, slope * moved["focal_length_px"] + moved["principal_point_px"], atol=0.05)
    assert moved["baseline_m"] == 0.12


def test_one_image_may_hold_both_views():
    it = rig(parts_px={"left": [0, 0, 640, 480], "right": [640, 0, 640, 480]})
    both = np.zeros((480, 1280, 3), np.uint8)
    both[:, 640:] = 9
    assert it.part(both, "left").max() == 0 and it.part(both, "right").min() == 9


def rotation(rpy):
    """Rz(yaw) Ry(pitch) Rx(roll), turn by turn."""
    (sr, sp, sy), (cr, cp, cy) = np.sin(rpy), np.cos(rpy)
    about_x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    about_z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def transforms(values):
    result = np.tile(np.eye(4), (len(values), 1, 1))
    result[:, :3, :3] = [rotation(rpy) for rpy in values[:, 3:6]]
    result[:, :3, 3] = values[:, :3]
    return result


def applied(state, action):
    """The pose that an action of ours asks for: (position, rotation)."""
    return state[:3] + action[:3], rotation(action[3:6]) @ rotation(state[3:6])


TOOL = [0.02, -0.01, 0.17, np.pi, 0.1, 0.3]


@pytest.mark.parametrize("tool", [[0.0] * 6, TOOL])
@pytest.mark.parametrize("kind", ["absolute", "delta", "from_states"])
def test_actions_lead_from_pose_to_pose(kind, tool):
    """States and the poses that actions ask for are the robot's own ones times the tool's, whatever their kind."""
    reported = poses(0, 13).astype(np.float64)
    states, targets = reported[:-1], reported[1:]
    frames = transforms(reported) @ transforms(np.array([tool]))[0]
    if kind == "absolute":
        actions, changes = targets, {}
    elif kind == "delta":
        turn = matrix_to_rpy(transforms(targets)[:, :3, :3] @ transforms(states)[:, :3, :3].transpose(0, 2, 1))
        actions = np.concatenate([targets[:, :3] - states[:, :3], turn, targets[:, 6:]], axis=1)
        changes = {"action": {**CONTENT["action"], "kind": "delta"}}
    else:
        states, actions, changes = reported, None, {"action": {"kind": "from_states"}}
    motion = map_motion(rig(**changes, tool=tool), states, actions)
    assert motion.problems == [] and motion.states.dtype == motion.actions.dtype == np.float32
    np.testing.assert_allclose(transforms(motion.states), frames[: len(states)], atol=2e-6)
    np.testing.assert_array_equal(motion.states[:, 6], reported[: len(states), 6].astype(np.float32))
    for frame in range(12):
        position, turned = applied(motion.states[frame], motion.actions[frame])
        np.testing.assert_allclose(position, frames[frame + 1, :3, 3], atol=2e-6)
        np.testing.assert_allclose(turned, frames[frame + 1, :3, :3], atol=2e-6)
    np.testing.assert_allclose(motion.actions[:12, 6], 2 * reported[1:13, 6] - 1, atol=1e-6)
    if kind == "from_states":
        np.testing.assert_allclose(motion.actions[-1, :6], 0, atol=1e-12)


def test_polarity_and_range_of_the_gripper():
    states = poses(0, 4)
    states[:, 6] = [0.0, 0.02, 0.0408, 0.04]
    it = rig(state={**CONTENT["state"], "gripper_closed_open": [0.04, 0.0]})
    motion = map_motion(it, states, poses(0, 4))
    np.testing.assert_allclose(motion.states[:, 6], [1, 0.5, 0, 0], atol=1e-6)  # 2 % beyond closed is closed
    states[2, 6] = 0.05
    (problem,) = map_motion(it, states, poses(0, 4)).problems
    assert problem == "frame 2: the state's gripper is 0.05, outside of closed = 0.04 ... open = 0"
    wrong = poses(0, 4)
    wrong[3, 6] = -2
    assert map_motion(rig(), poses(0, 4), wrong).problems[0].startswith("frame 3: the action's gripper is -2")


def test_commands_of_the_gripper_beside_actions_from_states():
    it = rig(action={"kind": "from_states", "column": "c", "gripper": 0, "gripper_closed_open": [1, 0]})
    motion = map_motion(it, poses(0, 4), np.array([[0.0], [1.0], [1.0], [0.5]]))
    np.testing.assert_allclose(motion.actions[:, 6], [1, -1, -1, 0], atol=1e-6)


def test_vectors_of_any_size_are_taken_as_they_are():
    it = rig(state={"column": "s"}, action={"column": "a"})
    states, actions = np.random.default_rng(0).normal(size=(5, 14)), np.random.default_rng(1).normal(size=(5, 9))
    motion = map_motion(it, states, actions)
    np.testing.assert_array_equal(motion.states, states.astype(np.float32))
    np.testing.assert_array_equal(motion.actions, actions.astype(np.float32))
    np.testing.assert_array_equal(motion.keyframes, np.repeat(states[-1:], 5, axis=0).astype(np.float32))


def test_broken_vectors_are_named():
    states, actions = poses(0, 4), poses(0, 4)
    states[1, 2], actions[3, 0] = np.nan, np.inf
    found = map_motion(rig(), states, actions).problems
    assert [line[:18] for line in found] == ["frame 1: the state", "frame 3: the actio"]
    found = map_motion(rig(), poses(0, 4)[:, :6], poses(0, 4)).problems
    assert found == ["the state has 6 numbers, index 6 is asked for"]


@settings(max_examples=60)
@given(st.lists(st.sampled_from([-1.0, -0.3, 0.0, 0.3, 1.0]), min_size=1, max_size=20))
def test_keyframes_are_the_next_changes_of_the_gripper(command):
    held, changes = None, []
    for frame, value in enumerate(command):
        said = held if abs(value) <= 0.5 else value > 0
        if held is not None and said != held:
            changes.append(frame)
        held = said
    expected = [min((c for c in changes if c > frame), default=len(command) - 1) for frame in range(len(command))]
    assert next_keyframes(np.array(command)).tolist() == expected
