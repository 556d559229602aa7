"""What a training asks follows from what its data has; wishes that the data cannot meet are refused by their names."""

import json
from pathlib import Path

import pytest
from lerobot_folder import WRITTEN, import_config, import_folder
from synthetic_dataset import write_dataset, write_finished_dataset
from training_runs import arguments, losses, run_here

from stereovla.command_line import parse
from stereovla.dataset_builder.dataset.schema import CALIBRATION, PAIR
from stereovla.dataset_builder.dataset.shards import write_json
from stereovla.dataset_builder.dataset.statistics import compute_statistics
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.dataset_builder.streaming.windows import DEPTH, SEGMENTATION
from stereovla.training.grounding import GroundingOptions
from stereovla.training.grounding import train as ground
from stereovla.training.reward import RewardOptions
from stereovla.training.reward import train as reward
from stereovla.training.terms import (
    BOXES,
    Contents,
    depth_map_share,
    frames_in_words,
    held_out_batches,
    questions,
    terms,
)

SEEN = {*PAIR, *CALIBRATION}
ALL = frozenset({*SEEN, DEPTH, SEGMENTATION, *BOXES, "keyframe_pose"})
BOTH = ("train", "validation")
SIMULATED = Contents({"sim": BOTH}, {"sim": ALL})
IMPORTED = Contents({"arm": ("train",)}, {"arm": frozenset({*SEEN, "keyframe_pose"})})
MIXED = Contents({"sim": BOTH, "arm": ("train",)}, {"sim": ALL, "arm": IMPORTED.columns["arm"]})
WITHOUT_MASKS = Contents({"rgbd": BOTH}, {"rgbd": ALL - {SEGMENTATION}})


@pytest.mark.parametrize(
    ("data", "text", "points"),
    [
        (SIMULATED, "5:2:2:1 (action : depth : box : pose)", "interaction"),
        (IMPORTED, "5:0:0:1 (action : depth : box : pose)", "uniform"),
        (MIXED, "5:0:0:1 (action : depth : box : pose)", "uniform"),
        (WITHOUT_MASKS, "5:2:2:1 (action : depth : box : pose)", "uniform"),
    ],
)
def test_what_is_not_wished_for_follows_from_the_data(data, text, points):
    asked = questions(data, None, "5:2:2:1", None)
    assert (asked.text, asked.depth_points) == (text, points)


def test_shares_of_disparity_and_held_out_batches_follow_too():
    assert depth_map_share(SIMULATED, None, 0.125, 1.0) == 0.125
    assert depth_map_share(SIMULATED, None, 0.125, 0.0) == 0  # a model without such a loss
    assert depth_map_share(IMPORTED, None, 0.125, 1.0) == depth_map_share(MIXED, None, 0.125, 1.0) == 0
    assert depth_map_share(SIMULATED, 0.5, 0.125, 1.0) == 0.5 and depth_map_share(IMPORTED, 0.0, 0.125, 1.0) == 0
    assert held_out_batches(SIMULATED, None, 2) == 2 and held_out_batches(MIXED, None, 2) == 0
    assert held_out_batches(SIMULATED, 0, 2) == held_out_batches(IMPORTED, 0, 2) == 0


def test_one_line_tells_what_is_asked():
    asked = questions(MIXED, None, "5:2:2:1", None)
    assert terms(MIXED, asked, "", 0.0) == (
        "arm has no depth, no boxes, no masks, no held-out split: mixture 5:0:0:1 (action : depth : box : pose), "
        "no disparity, nothing held out to score"
    )
    asked = questions(SIMULATED, "5:2:2:1:1", "5:2:2:1", "uniform")
    assert terms(SIMULATED, asked, "2 held-out batches", 0.125) == (
        "mixture 5:2:2:1:1 (action : depth : box : pose : camera), depth points uniform, "
        "disparity on 12.5 % of the samples, 2 held-out batches scored at each checkpoint"
    )


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (
            lambda: questions(IMPORTED, "5:2:2:1", "5:2:2:1", None),
            r"--mixture 5:2:2:1 asks for depth \(arm lacks observation.depth\), box \(arm lacks target.box_left_px.*"
            r"can be asked: action, pose, camera;",
        ),
        (lambda: questions(IMPORTED, "0:1:0:0", "5:2:2:1", None), r"--mixture 0:1:0:0 asks for depth"),
        (
            lambda: questions(WITHOUT_MASKS, None, "5:2:2:1", "interaction"),
            "--depth_points interaction needs .*observation.segmentation, which rgbd lacks",
        ),
        (lambda: questions(IMPORTED, None, "1:1", None, ("depth", "box"), 0), "none of depth, box can be learned"),
        (
            lambda: depth_map_share(MIXED, 0.25, 0.125, 1.0),
            "--depth_map_share is 0.25, but arm lacks one of observation.depth, calibration",
        ),
        (
            lambda: depth_map_share(SIMULATED, 0.25, 0.125, 0.0),
            r"--depth_map_share is 0.25, but this model learns from no",
        ),
        (
            lambda: held_out_batches(IMPORTED, 1, 2),
            r"--validation_batches is 1, but arm has no split 'validation'; it has: train",
        ),
        (lambda: held_out_batches(SIMULATED, -1, 2), r"--validation_batches is -1; it must be at least 0"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_by_its_name(wish, message):
    with pytest.raises(ValueError, match=message):
        wish()


MONO = Contents({"mono": BOTH}, {"mono": frozenset({PAIR[0], "keyframe_pose", DEPTH, BOXES[0]})})
WRIST = Contents({"hand": BOTH}, {"hand": frozenset({PAIR[0], "observation.images.wrist", "keyframe_pose"})})


def test_what_one_camera_can_be_asked():
    asked = questions(MONO, None, "5:2:2:1:1", None, views=("left",))
    assert asked.text == "5:2:2:1 (action : depth : box : pose)"  # no camera parameters without a calibrated pair
    assert terms(MONO, asked, "") == (
        "mono has no right view, no calibration, no masks: mixture 5:2:2:1 (action : depth : box : pose), "
        "depth points uniform, nothing held out to score"
    )
    both = Contents(MONO.splits | WRIST.splits, MONO.columns | WRIST.columns)
    assert questions(both, None, "5:2:2:1", None, views=("left", "wrist")).views == ("left", "wrist")
    assert questions(SIMULATED, None, "5:2:2:1:1", None, views=("left",)).text == asked.text  # of a pair, one is seen
    for data in (MONO, SIMULATED):
        with pytest.raises(ValueError, match=r"asks for camera \(this model sees no right view\)"):
            questions(data, "1:0:0:0:1", "5:2:2:1", None, views=("left",))


def test_data_without_a_view_that_the_model_needs_are_refused():
    message = (
        "mono, hand has no right view, which this model needs; one camera: StereoVLA cannot train on it, DepthVLA can"
    )
    with pytest.raises(ValueError, match=message):
        questions(Contents(MONO.splits | WRIST.splits, MONO.columns | WRIST.columns), None, "5:2:2:1", None)
    with pytest.raises(ValueError, match="no dataset has the view wrist, which this model sees: mono has left"):
        questions(MONO, None, "5:2:2:1", None, views=("left", "wrist"))


def test_off_needs_no_depth_whatever_the_mixture_says():
    assert questions(IMPORTED, "5:2:0:1", "5:2:2:1", "off").depth_points == "off"


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> str:
    """Three episodes of a robot: no depth, no boxes, no held-out split."""
    return str(import_folder(import_config(WRITTEN, tmp_path_factory.mktemp("imported"))))


def test_contents_are_those_of_the_files(imported, tmp_path):
    simulated = str(write_finished_dataset(tmp_path / "data"))
    found = Contents.of([(imported, 1.0), (simulated, 1.0)])
    assert set(found.splits[imported]) == {"train"} and set(found.splits[simulated]) == set(BOTH)
    assert ALL & found.columns[imported] == {*SEEN, "keyframe_pose"} and found.columns[simulated] >= ALL
    first, *_ = sorted(Path(simulated, "data").glob("train-*"))
    first.write_bytes(first.read_bytes()[:-100])
    assert Contents.of(simulated, skip=True).columns[simulated] >= ALL


def test_the_command_trains_on_a_robots_recording_without_further_options(imported, tmp_path, capsys):
    given = ["--preset", "tiny", "--dataset", imported, "--output_dir", str(tmp_path / "run"), "--tracker", "none"]
    run_here([*given, "--steps", "3", "--batch_size", "4"])
    assert "has no depth, no boxes, no masks, no held-out split: mixture 5:0:0:1" in capsys.readouterr().out
    names = set().union(*losses(tmp_path / "run"))
    assert {"loss/action", "loss/pose"} <= names and not {"loss/depth", "loss/box"} & names
    with pytest.raises(ValueError, match=r"--validation_batches is 1, but .* has no split 'validation'"):
        run_here(arguments(imported, tmp_path / "other"))  # which asks for a held-out batch


@pytest.mark.filterwarnings("ignore:skipped what is left of a shard:RuntimeWarning")
@pytest.mark.parametrize("held_out", ["1", "0"])
def test_a_training_without_a_shard_says_what_it_streamed(tmp_path, capsys, held_out):
    """Shards of 7 and 5 frames."""
    dataset = write_finished_dataset(tmp_path / "data")
    run = [*arguments(str(dataset), tmp_path / "run"), "--validation_batches", held_out, "--steps", "2"]
    path = dataset / "data/train-00000-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-1000])
    run_here([*run, "--on_bad_shard", "skip"])
    streamed = "at least 5 of 12 frames, without all or part of train-00000-of-00002.parquet (7 frames)"
    assert f"streamed: {streamed}" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run/model/training.json").read_text())["summary"]
    assert summary.startswith(f"2 steps of 4 samples from {streamed}, AdamW")


def test_a_shard_that_breaks_while_it_is_read_counts_as_unread(tmp_path):
    dataset = write_finished_dataset(tmp_path / "data")
    assert frames_in_words(12, WindowStream(dataset)) == "12 frames"
    stream = WindowStream(dataset, epochs=1, lanes=1, shuffle=False, pool_episodes=1, on_bad_shard="skip", backoff_s=0)
    path = dataset / "data/train-00000-of-00002.parquet"
    with open(path, "r+b") as file:  # of the second episode; what is read at once stays as it was
        file.seek(path.stat().st_size // 2)
        file.write(bytes(100))
    with pytest.warns(RuntimeWarning, match="skipped what is left of a shard"):
        assert len(list(stream)) < 12
    assert frames_in_words(12, stream).startswith("at least 5 of 12 frames, without all or part of train-00000")


def test_the_stages_take_what_the_data_has_or_say_what_they_lack(imported, tmp_path, capsys):
    given = ["--preset", "tiny", "--dataset", imported, "--output_dir"]
    ground(parse(GroundingOptions, "", [*given, str(tmp_path / "a"), "--steps", "2", "--pool_episodes", "2"]))
    assert "mixture 0:0:1:1 (depth : box : pose : camera), nothing held out to score" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of depth, box can be learned"):
        reward(parse(RewardOptions, "", [*given, str(tmp_path / "b"), "--model", str(tmp_path / "a/model")]))
    simulated = write_dataset(tmp_path / "data", [4, 4], 1, size=64)
    info = {"fps": 10, "state_dim": 7, "action_dim": 7, "tasks": ["pick up the red cube"]}
    write_json(simulated / "meta/info.json", info | {"splits": {"train": {"episodes": 2, "frames": 8, "shards": 2}}})
    write_json(simulated / "meta/stats.json", compute_statistics(sorted((simulated / "data").iterdir())))
    given[3] = str(simulated)
    with pytest.raises(ValueError, match="has no split 'validation': rewards are judged on"):
        reward(parse(RewardOptions, "", [*given, str(tmp_path / "c"), "--model", str(tmp_path / "a/model")]))
