"""The SCARA arm through the upper rooms: recorded, checked, described, streamed, prepared for a model, evaluated."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mujoco")

from command_lines import data as dataset_main  # noqa: E402
from command_lines import evaluate as evaluation_main  # noqa: E402

from stereovla.dataset_builder.dataset import schema, shards  # noqa: E402
from stereovla.dataset_builder.dataset.checking import find_problems  # noqa: E402
from stereovla.dataset_builder.streaming.mixture import load_meta  # noqa: E402
from stereovla.dataset_builder.streaming.questions import processor_arguments  # noqa: E402
from stereovla.dataset_builder.streaming.window_stream import WindowStream  # noqa: E402
from stereovla.evaluation import metrics  # noqa: E402
from stereovla.evaluation.policies import ExpertPolicy, StillPolicy  # noqa: E402
from stereovla.evaluation.rollouts import RolloutConfig, run_episodes  # noqa: E402
from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction  # noqa: E402
from stereovla.processing import StereoImageProcessorPil, StereoProcessor, build_tokenizer  # noqa: E402
from stereovla.simulation import WorldConfig  # noqa: E402

NAME = "lift_scara"
WORLD = '{"preset": "easy", "robot": "scara"}'
SIZES = {"state_dim": 5, "action_dim": 5}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "dataset"
    options = ["--train_episodes", "3", "--validation_episodes", "1", "--image_size", "64", "--world", WORLD]
    assert dataset_main(["build", "--out", str(folder), "--preset", "tiny", *options]) == 0
    return folder


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory) -> Path:
    """A tiny model with random weights and a processor with the statistics of the dataset."""
    folder, meta = tmp_path_factory.mktemp("checkpoint"), load_meta(dataset)
    config = StereoVLAConfig.from_preset("tiny")
    tokenizer = build_tokenizer(meta["tasks"])
    processor = StereoProcessor(
        StereoImageProcessorPil(size={"height": config.image_size, "width": config.image_size}),
        tokenizer,
        norm_stats=meta["stats"],
        control_rates_hz={NAME: meta["fps"]},
        chunk_size=config.chunk_size,
        num_visual_tokens=config.num_visual_tokens,
        **SIZES,
    )
    torch.manual_seed(0)
    model = StereoVLAForActionPrediction(
        StereoVLAConfig.from_preset(
            "tiny",
            image_token_id=processor.image_token_id,
            action_vocab_size=processor.bins.vocab_size,
            text_config={"vocab_size": -(-len(tokenizer) // 64) * 64},
            pose_dim=5,
            **SIZES,
        )
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_the_dataset_is_whole_and_says_whose_it_is(dataset):
    assert find_problems(dataset) == []
    info = json.loads((dataset / "meta/info.json").read_text())
    assert (info["embodiments"], info["state_dim"], info["action_dim"]) == ([NAME], 5, 5)
    stats = load_meta(dataset)["stats"][NAME]
    assert {name: len(values["mean"]) for name, values in stats.items()} == dict.fromkeys(
        ("action", "keyframe_pose", "state"), 5
    )
    card = (dataset / "README.md").read_text()
    assert NAME in card and "belong to x, y, z, yaw, gripper." in " ".join(card.split()) and "| state[4] |" in card
    assert "state[5]" not in card


def test_rows_are_continuous_and_ideal(dataset):
    rows = [row for path in sorted((dataset / "data").glob("train-*")) for row in shards.read_rows(path)]
    for before, after in zip(rows, rows[1:], strict=False):
        schema.validate_row(before)
        assert before["embodiment"] == NAME
        for key in ("observation.state", "action", "keyframe_pose"):
            assert before[key].shape == (5,)
        if after["frame_index"]:  # within the largest noise and push of the commanded tool, and in the gripper's range
            moved = after["observation.state"][:3] - before["observation.state"][:3] - before["action"][:3]
            assert np.linalg.norm(moved) < 0.12
    last = [row for row, after in zip(rows, rows[1:], strict=False) if after["frame_index"] == 0]
    assert last and all(row["observation.state"][4] < 0.9 for row in last)  # something is in the gripper


def test_a_row_of_another_size_is_no_pose(dataset):
    row = next(shards.read_rows(next((dataset / "data").glob("train-*"))))
    with pytest.raises(ValueError, match=r"action has shape \(7,\), expected \(5,\)"):
        schema.validate_row({**row, "action": np.zeros(7, np.float32)})
    with pytest.raises(ValueError, match=r"state has shape \(6,\), expected \(7,\)"):
        schema.validate_row({**row, "observation.state": np.zeros(6, np.float32)})
    turned = row["observation.state"].copy()
    turned[3] = 4.0
    with pytest.raises(ValueError, match="angles"):
        schema.validate_row({**row, "observation.state": turned})


def test_windows_know_the_tool_and_become_a_batch_of_a_model(dataset, checkpoint):
    windows = list(WindowStream(str(dataset), chunk_size=8, epochs=1, lanes=1, mixture={"action": 1.0}))
    for window in windows:
        schema.validate_window(window)
        assert window["state_history"].shape == (4, 5) and window["actions"].shape == (8, 5)
    tool = np.array([window["points"][1] for window in windows])
    seen = np.isfinite(tool).all(axis=1)
    assert seen.mean() > 0.5
    window = next(window for window, found in zip(windows, seen, strict=True) if found)
    pose = window["calibration.transform_camera_to_base"].astype(np.float64)  # projected here by hand
    x, y, z = pose[:3, :3].T @ (window["state_history"][-1, :3] - pose[:3, 3])
    focal, centre = window["calibration.focal_length_px"], window["calibration.principal_point_px"]
    np.testing.assert_allclose(window["points"][1], focal * np.array([x, y]) / z + centre, atol=1e-2)

    processor = StereoProcessor.from_pretrained(checkpoint)
    batch = processor(**processor_arguments(windows[:6], processor.pixel_views))
    assert batch["state"].shape == (6, 4, 5) and batch["actions"].shape == (6, 8, 5)
    back = processor.decode_actions(batch["actions"], NAME)
    given = windows[0]["action_mask"]
    low, high = (np.array(load_meta(dataset)["stats"][NAME]["action"][key]) for key in ("q01", "q99"))
    inside = ((windows[0]["actions"] > low) & (windows[0]["actions"] < high))[given]
    np.testing.assert_allclose(back[0][given][inside], windows[0]["actions"][given][inside], atol=1e-5)
    assert torch.isfinite(StereoVLAForActionPrediction.from_pretrained(checkpoint)(**batch).loss)


def test_the_expert_and_a_still_policy_drive_it():
    config = RolloutConfig(WorldConfig.from_preset("easy", robot="scara", image_size=32), max_steps=50)
    records = list(run_episodes(ExpertPolicy(), iter(range(4)), config, environments=2))
    assert len(records) == 4 and all(record["success"] and record["shortened_moves"] == 0 for record in records)
    (still,) = run_episodes(StillPolicy(), iter([0]), RolloutConfig(config.world, max_steps=3), 1)
    assert not still["success"] and still["steps"] == 3


def test_the_commands_evaluate_a_model_of_its_sizes(dataset, checkpoint, tmp_path):
    out, model = str(tmp_path / "report"), str(checkpoint)
    assert evaluation_main(["rollout", "--model", model, "--out", out, "--preset", "tiny", "--world", WORLD]) == 0
    assert evaluation_main(["offline", "--model", model, "--dataset", str(dataset), "--out", out, "--rows", "4"]) == 0
    assert evaluation_main(["report", "--out", out]) == 0
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert report["options"]["trained"]["world.robot"] == "scara"
    assert report["offline"]["action"]["rotation_deg"]["count"] > 0
    assert "simulated Scara at a table" in report["metrics"][0]["dataset"]


def test_errors_of_short_actions_are_those_of_the_whole_ones():
    rng = np.random.default_rng(0)
    short, truth = rng.uniform(-1, 1, (2, 3, 4, 5))
    valid = np.ones((3, 4), bool)
    whole = [np.concatenate([v[..., :3], np.zeros((3, 4, 2)), v[..., 3:]], axis=-1) for v in (short, truth)]
    first, second = metrics.action_errors(short, truth, valid), metrics.action_errors(*whole, valid)
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    turns = np.degrees(np.abs(short - truth)[..., 3])
    np.testing.assert_allclose(first["rotation_deg"], turns.ravel(), atol=1e-6)
    with pytest.raises(ValueError, match="14 numbers"):
        metrics.whole_pose(np.zeros(14))
