"""What the page's fields say, there and back; frames of a dataset; what is wrong, in words."""

import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from synthetic_dataset import write_dataset
from views_dataset import MONO, write_views

from stereovla.app.frames import calibration_text, dataset_frame, read_calibration, read_states, read_view, states_text
from stereovla.dataset_builder.dataset import schema
from stereovla.dataset_builder.dataset.shards import read_rows

POSE = [[0, 0, 1, -0.8], [-1, 0, 0, 0], [0, -1, 0, 0.1], [0, 0, 0, 1]]
KNOWN = {"focal_length_px": [40.25, 41], "principal_point_px": [16, 15.5], "baseline_m": 0.063}


def test_states_come_back_to_the_last_bit():
    states = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    assert np.array_equal(read_states(states_text(states), 7), states)
    assert read_states(" [1, 2,3]\n\n4;5 6 ", 3).tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("known", [KNOWN, KNOWN | {"transform_camera_to_base": POSE}])
def test_a_calibration_comes_back(known):
    found = read_calibration(calibration_text(read_calibration(json.dumps(known))))
    for key, value in known.items():
        np.testing.assert_allclose(getattr(found, key), value, rtol=1e-7)
    assert read_calibration("  ") is None and read_calibration(None) is None and calibration_text(None) == ""


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda: read_states(None, 7), "the state is missing: a line of 7 numbers"),
        (lambda: read_states("", 7), "the state is missing: a line of 7 numbers"),
        (lambda: read_states("1, 2\n1, x", 2), "line 2 of the state is '1, x'; expected 2 numbers"),
        (lambda: read_states("1, 2, 3", 7), "line 1 of the state has 3 numbers; this model's have 7"),
        (lambda: read_calibration("{"), "the calibration is no JSON"),
        (lambda: read_calibration("[1]"), "expected an object with focal_length_px"),
        (lambda: read_calibration('{"focal": 1}'), "unknown keys ['focal']"),
        (lambda: read_calibration('{"focal_length_px": [1, 1]}'), "lacks 'principal_point_px'"),
        (lambda: read_calibration(json.dumps(KNOWN | {"baseline_m": "x"})), "the calibration cannot be used: could"),
        (lambda: read_calibration(json.dumps(KNOWN | {"focal_length_px": {}})), "the calibration cannot be used: "),
    ],
)
def test_what_is_wrong_with_a_field_is_told(read, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read()


def test_pictures_are_read_as_rgb_and_nothing_else_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 4), np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(read_view(str(tmp_path / "a.png"), "left"), pixels[..., :3])
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., :3]).save(buffer, "JPEG")
    for name, data in {"cut.jpg": buffer.getvalue()[:300], "text.png": b"hello", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="the right view is no picture of JPEG, PNG, WEBP: "):
            read_view(str(tmp_path / name), "right")


def test_a_frame_of_a_dataset_is_its_row(tmp_path):
    folder = str(write_dataset(tmp_path, [4, 6], 2))
    frame = dataset_frame(folder, "train", 1, 3, ("left", "right"), history=2)
    (path,) = tmp_path.glob("data/*.parquet")
    rows = [row for row in read_rows(path) if row["episode_index"] == 1]
    row = rows[3]
    for view in ("left", "right"):
        assert np.array_equal(frame.views[view], row[schema.image_key(view)])
    assert np.array_equal(frame.carried.depths["left"], row["observation.depth"]) and not frame.carried.drawn
    assert np.array_equal(frame.states, [rows[2]["observation.state"], row["observation.state"]])
    assert (frame.instruction, frame.embodiment) == ("pick up the red cube", "franka_panda")
    assert np.array_equal(frame.calibration.transform_camera_to_base, row["calibration.transform_camera_to_base"])
    assert frame.calibration.baseline_m == pytest.approx(0.063)
    with pytest.raises(ValueError, match="episode 1 has no frame 6; it has 6, from 0 to 5"):
        dataset_frame(folder, "train", 1, 6, ("left",), 1)


def test_views_that_a_dataset_lacks(tmp_path):
    folder = str(write_views(tmp_path, [4], without=MONO))
    frame = dataset_frame(folder, "train", 0, 2, ("left", "wrist"), 4)
    assert list(frame.views) == ["left"] and frame.calibration is None  # the wrist is absent in this frame
    assert list(dataset_frame(folder, "train", 0, 1, ("left", "wrist"), 4).views) == ["left", "wrist"]
    with pytest.raises(ValueError, match="has no view right; it has left"):
        dataset_frame(folder, "train", 0, 2, ("left", "right"), 4)
