"""Datasets of one view and of further named ones: rows, checks, windows, and what the processors are given."""

from itertools import islice

import numpy as np
import pytest
import torch
from datasets import load_dataset
from synthetic_dataset import list_shards, make_row, write_dataset
from views_dataset import MONO, SMALL, WRIST, WRIST_DEPTH, views_row, write_views

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.card import sample_picture
from stereovla.dataset_builder.dataset.checking import find_problems
from stereovla.dataset_builder.dataset.episode_checks import dataset_problems
from stereovla.dataset_builder.streaming.augmentation import PhotometricAugmentation
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.questions import processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.processing import DepthVLAProcessor, StereoImageProcessorPil, build_tokenizer

PLAIN = {"lanes": 2, "mixture": {"action": 1}, "depth_map_share": 0.0, "epochs": 1}
LENGTHS = (4, 3, 5)


@pytest.fixture(scope="module")
def mono(tmp_path_factory):
    """One camera, without calibration, and a wrist's view that is absent in some rows."""
    return write_views(tmp_path_factory.mktemp("mono"), LENGTHS, MONO, depth_source="sensor")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("pair"), [4, 3], 1)


@pytest.fixture
def row():
    return views_row(np.random.default_rng(0), 0, 0)


def test_columns_of_further_views_stand_behind_those_of_the_pair(row):
    keys = list(schema.features(columns=list(row)))
    assert keys.index(WRIST) == keys.index(schema.RIGHT) + 1
    assert keys.index(WRIST_DEPTH) == keys.index(schema.DEPTH) + 1
    assert set(keys) == set(row) and schema.columns_of(schema.row_columns()) == schema.ROW
    assert schema.views_of([WRIST, "observation.images.above", *schema.PAIR]) == ("left", "right", "above", "wrist")


def test_rows_of_further_views_and_of_one_camera_are_valid(row):
    schema.validate_row(row)
    schema.validate_row({key: value for key, value in row.items() if key not in MONO})
    schema.validate_row({key: value for key, value in row.items() if key not in (schema.RIGHT, schema.BASELINE)})
    decoded = shards.decode_row(
        shards.rows_to_table([shards.encode_row(row)], schema.features(columns=list(row))).to_pylist()[0]
    )
    np.testing.assert_allclose(decoded[WRIST_DEPTH], row[WRIST_DEPTH], rtol=1e-6)
    assert np.abs(decoded[WRIST].astype(int) - row[WRIST]).max() <= 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({WRIST_DEPTH: np.ones((20, 20), np.float32)}, r"depth.wrist has shape \(20, 20\), expected \(20, 24\)"),
        ({WRIST: np.ones((20, 24), np.uint8)}, r"images.wrist has shape \(20, 24\)"),
        ({"observation.images.Hand": None}, "unknown key 'observation.images.Hand'"),
        ({"observation.depth.left": None}, "unknown key 'observation.depth.left'"),
        ({schema.LEFT: None}, "observation.images.left is missing"),
        ({schema.RIGHT: None}, "the calibration has .*baseline_m.*; without a right view it is"),
        ({schema.BASELINE: None}, "the calibration has .*; with a right view it is .*baseline_m"),
        ({"calibration.focal_length_px": None}, "it is calibration.focal_length_px, .*, or nothing"),
    ],
)
def test_wrong_views_and_half_calibrations_are_named(row, change, message):
    with pytest.raises(ValueError, match=message):
        schema.validate_row({**row, **change})


def test_what_a_model_needs_is_said_in_words(mono):
    assert schema.for_whom(("left", "right", "wrist")) == ""
    assert schema.for_whom(("left",)) == "one camera: StereoVLA cannot train on it, DepthVLA can"
    cameras = r"\(2 cameras \(left, wrist\), but no right view: StereoVLA cannot train on it"
    with pytest.raises(ValueError, match=f"has no column observation.images.right.*{cameras}"):
        WindowStream(mono, **PLAIN)


def test_whole_datasets_have_no_problems_and_others_are_named(mono, tmp_path):
    assert find_problems(mono) == [] and dataset_problems(mono) == []
    wrong = write_views(tmp_path / "a", [3], MONO, depth_source="a guess", views=["left"])
    problems = "\n".join(find_problems(wrong))
    assert "meta/info.json: views is ['left'], data/train-00000-of-00001.parquet has left, wrist" in problems
    assert (
        "meta/info.json: depth_source is 'a guess'; valid: sensor, simulation, estimated by CHECKPOINT@REV" in problems
    )
    half = write_views(tmp_path / "b", [3])
    table = shards.read_table(half / "data/train-00000-of-00001.parquet").to_pylist()
    table[1][schema.RIGHT] = table[2]["calibration.transform_camera_to_base"] = None
    rows = [{**row, **{key: (row[key] or {}).get("bytes") for key in row if key in IMAGES}} for row in table]
    layout = schema.features(columns=list(rows[0]))
    path = shards.shard_path("train", 0, 1)
    shards.write_shard(half / path, rows, temporary=tmp_path / "t", layout=layout)
    shards.write_manifest(half, {"train": [path]})
    problems = "\n".join(find_problems(half))
    assert "row 1: observation.images.right is null; it is in all rows of a dataset or in none" in problems
    assert "row 2: calibration.transform_camera_to_base is null" in problems


IMAGES = (*schema.PAIR, WRIST, schema.DEPTH, WRIST_DEPTH, "observation.segmentation")


def test_windows_show_the_views_that_are_asked_for(mono):
    seen = set()
    for window in WindowStream(mono, views=("left", "wrist"), **{**PLAIN, "depth_map_share": 1.0}):
        schema.validate_window(window)
        frame = window["frame_index"]
        seen.add((window["episode_index"], frame))
        assert window["left"].shape == (32, 32, 3) and "right" not in window and "depth" in window
        assert not [key for key in window if key.startswith("calibration.")]
        assert np.isnan(window["points"][1]).all() and np.isnan(window["boxes"][1]).all()
        if frame % 3 == 2:
            assert window["view.wrist"] is None and window["depth.wrist"] is None
        else:
            assert window["view.wrist"].shape == (*SMALL, 3)
            np.testing.assert_allclose(window["depth.wrist"], (1 + frame) / 10, atol=1e-6)
    assert seen == {(episode, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)}
    window = next(iter(WindowStream(mono, views=("left",), **PLAIN)))
    assert not [key for key in window if key.startswith(("view.", "depth"))]


def test_views_that_another_dataset_lacks_are_absent(mono, pair):
    mixed = WindowStream([(mono, 1.0), (pair, 1.0)], views=("left", "wrist"), **PLAIN)
    windows = list(mixed)
    assert len(windows) == 12 + 7
    with_calibration = [window for window in windows if schema.BASELINE in window]
    assert len(with_calibration) == 7 and all(window["view.wrist"] is None for window in with_calibration)
    schema.validate_window(with_calibration[0])
    for views, message in (
        (("left", "hand"), "no dataset has the view hand; there are: left, wrist in .*; left, right in"),
        (("wrist",), r"views=\['wrist'\] must name left"),
        (("left", "left"), "none twice"),
        (("left", "right"), "has no column observation.images.right"),
    ):
        with pytest.raises(ValueError, match=message):
            WindowStream([(mono, 1.0), (pair, 1.0)], views=views, **PLAIN)


def test_what_needs_a_pair_is_not_asked_of_one_camera(mono, tmp_path):
    with pytest.raises(ValueError, match="camera is asked, which needs a stereo pair; views="):
        WindowStream(mono, views=("left",), **{**PLAIN, "mixture": {"camera": 1}})
    uncalibrated = write_views(tmp_path, [4], schema.CALIBRATION)
    with pytest.raises(ValueError, match="has no column calibration.focal_length_px"):
        WindowStream(uncalibrated, **{**PLAIN, "mixture": {"camera": 1}})
    boxes = list(WindowStream(mono, views=("left",), **{**PLAIN, "mixture": {"box": 1}}))
    assert len(boxes) == 12  # in every frame the left view shows the target; of a pair every fifth lacks the right box
    assert {window["objective"] for window in boxes} == {"box"}


def test_rows_without_a_calibration_have_none_in_their_windows(tmp_path):
    """Null in one row of an episode: nothing is made up for it, and no camera parameters are asked of it."""
    rows = [views_row(np.random.default_rng(0), 0, frame) for frame in range(4)]
    rows[2] |= dict.fromkeys(schema.CALIBRATION)
    path = shards.shard_path("train", 0, 1)
    encoded = [shards.encode_row(row) for row in rows]
    shards.write_shard(
        tmp_path / path, encoded, temporary=tmp_path / "t", layout=schema.features(columns=list(rows[0]))
    )
    list_shards(tmp_path)
    windows = {window["frame_index"]: window for window in WindowStream(tmp_path, **PLAIN)}
    for frame, window in windows.items():
        there = [key for key in schema.CALIBRATION if key in window]
        assert there == ([] if frame == 2 else [*schema.CALIBRATION])
        assert np.isnan(window["points"][1]).all() or frame != 2
        schema.validate_window(window)
        if there:
            wanted = rows[frame]["calibration.transform_camera_to_base"]
            np.testing.assert_array_equal(window["calibration.transform_camera_to_base"], wanted)
    stream = WindowStream(tmp_path, **{**PLAIN, "mixture": {"camera": 1}})
    assert sorted(window["frame_index"] for window in stream) == [0, 1, 3] and stream.left_out_windows == 1


def test_windows_of_a_pair_do_not_depend_on_further_views(tmp_path, pair):
    """The same rows with a wrist's view: the same windows, augmented alike."""
    both = write_views(tmp_path, [4, 3])
    options = {**PLAIN, "mixture": None, "augmentation": PhotometricAugmentation(), "epochs": 2, "depth_map_share": 0.5}
    for views in (("left", "right"), ("left", "right", "wrist"), ("left", "wrist", "right")):
        for window, wanted in zip(
            WindowStream(both, views=views, **options), WindowStream(pair, **options), strict=True
        ):
            for key, value in wanted.items():
                if isinstance(value, np.ndarray) and key in ("left", "right", "depth", "boxes"):
                    np.testing.assert_array_equal(window[key], value)
            assert window["objective"] == wanted["objective"]


def test_every_view_is_augmented():
    views = {name: np.full((4, 4, 3), 120, np.uint8) for name in ("left", "right", "wrist")} | {"hand": None}
    new = PhotometricAugmentation(between_views=0.3)(views, (0, 0, 1, 2))
    assert list(new) == list(views) and new["hand"] is None
    levels = [float(new[name].mean()) for name in ("left", "right", "wrist")]
    assert len({120.0, *levels}) == 4
    same = PhotometricAugmentation(between_views=0.0)(views, (0, 0, 1, 2))
    np.testing.assert_array_equal(same["wrist"], same["left"])


def test_arguments_of_either_processor(mono, pair):
    windows = list(islice(WindowStream(mono, views=("left", "wrist"), **{**PLAIN, "shuffle": False, "lanes": 1}), 3))
    arguments = processor_arguments(windows, ("left", "wrist"))
    assert [list(images) for images in arguments["images"]] == [["left", "wrist"]] * 3
    assert [images["wrist"] is None for images in arguments["images"]] == [False, False, True]
    assert arguments["calibration"] == [None] * 3 and "depth_map" not in arguments
    assert np.array(arguments["boxes"]).shape == (3, 1, 4)
    some = list(WindowStream(mono, views=("left", "wrist"), **{**PLAIN, "depth_map_share": 0.5}))
    maps = processor_arguments(some, ("left", "wrist"))["depth_map"]
    assert {type(entry) for entry in maps} == {dict, type(None)}
    for window, entry in zip(some, maps, strict=True):
        assert (entry is None) == ("depth" not in window)
        if entry is not None:
            assert entry["left"] is window["depth"] and entry["wrist"] is window["depth.wrist"]
    stereo = next(iter(WindowStream(pair, **{**PLAIN, "depth_map_share": 1.0})))
    ours = processor_arguments([stereo], ("left", "right"))
    assert ours["images"][0]["left"] is stereo["left"] and ours["images"][0]["right"] is stereo["right"]
    assert ours["depth_map"][0] is stereo["depth"] and set(ours["calibration"][0]) == set(schema.CALIBRATION_KEYS)
    assert ours["boxes"][0].shape == (2, 4)


def test_depth_vla_s_processor_makes_a_batch_of_one_camera_and_an_absent_one(mono):
    """Every objective that one camera can be asked, and every number of the windows in the model's inputs."""
    views = ("left", "wrist")
    mixture = {"action": 1, "depth": 1, "box": 1, "pose": 1}
    options = {
        **PLAIN,
        "mixture": mixture,
        "depth_map_share": 1.0,
        "depth_points": "uniform",
        "epochs": 3,
        "history": 1,
    }
    windows = list(WindowStream(mono, views=views, **options))
    assert {window["objective"] for window in windows} == set(mixture)
    processor = DepthVLAProcessor(
        StereoImageProcessorPil(size={"height": 32, "width": 32}),
        build_tokenizer(["pick up the red cube", "red cube"], images_first=True),
        norm_stats=load_meta(mono)["stats"],
        views=list(views),
        num_visual_tokens=4,
    )
    batch = processor(**processor_arguments(windows, processor.pixel_views))
    assert batch["pixel_values"].shape == (len(windows), 2, 3, 32, 32)
    for number, window in enumerate(windows):
        there = window["view.wrist"] is not None
        assert batch["view_mask"][number].tolist() == [True, there]
        left = torch.from_numpy(window["left"]).permute(2, 0, 1) / 255
        torch.testing.assert_close(batch["pixel_values"][number, 0], left)
        assert bool(batch["pixel_values"][number, 1].any()) == there == bool(batch["depth_map"][number, 1].any())
        torch.testing.assert_close(batch["depth_map"][number, 0], torch.from_numpy(window["depth"]))
        if there:
            known = batch["depth_map"][number, 1]
            torch.testing.assert_close(known[known > 0].mean().item(), float(window["depth.wrist"].mean()))


def test_the_picture_and_readers_show_all_views(mono):
    first = sorted((mono / "data").glob("*.parquet"))[0]
    picture = np.asarray(sample_picture(list(shards.read_rows(first))))
    wide = round(SMALL[1] * 32 / SMALL[0])
    assert picture.shape == (4 * 32 + 3 * 4, 2 * (32 + 4 + wide) + 4, 3)  # left, wrist, and the disparity of both
    assert (picture[2 * 36 + 8 : 2 * 36 + 24, 40 : 36 + wide - 4] == 128).all()  # absent in the third row
    frames = load_dataset(str(mono), split="train", streaming=True)
    found = list(frames)
    assert found[0]["observation.images.wrist"].size == SMALL[::-1] and found[2]["observation.images.wrist"] is None


def test_rows_of_before_are_read_as_before(pair):
    """Without `views` and `depth_source` in meta/info.json a dataset is a pair."""
    rng = np.random.default_rng(0)
    rows = [row for path in sorted((pair / "data").glob("*")) for row in shards.read_rows(path)]
    for row in rows:
        wanted = make_row(rng, row["episode_index"], row["frame_index"])
        np.testing.assert_allclose(row["observation.depth"], wanted["observation.depth"], rtol=1e-6)
    assert len(list(WindowStream(pair, **{**PLAIN, "mixture": {"camera": 1}}))) == 7
