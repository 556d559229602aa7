"""An episode written for the Rerun viewer, read back by Rerun's own reader and compared with the dataset's values."""

from pathlib import Path

import numpy as np
import pytest
from command_lines import data
from rerun.chunk import RrdReader
from synthetic_dataset import list_shards, make_row, write_dataset
from views_dataset import MONO, WRIST, WRIST_DEPTH, write_views

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.streaming.episodes import read_episode


def read_back(path: Path) -> dict[tuple[str, str], dict[int | None, object]]:
    """{(entity, component): {frame, None for what holds at all times: its values}}."""
    found: dict[tuple[str, str], dict] = {}
    for chunk in RrdReader(path).stream().to_chunks():
        batch = chunk.to_record_batch()
        frames = [None] * len(batch) if chunk.is_static else batch.column("frame").to_pylist()
        if not chunk.is_static:  # time in s, to a millionth
            seconds = [value.total_seconds() for value in batch.column("time").to_pylist()]
            np.testing.assert_allclose(seconds, np.array(frames) / 10, atol=1e-6)
        for name in batch.schema.names:
            if ":" in name:
                values = batch.column(name).to_pylist()
                found.setdefault((chunk.entity_path, name), {}).update(zip(frames, values, strict=True))
    return found


def one(value) -> np.ndarray:
    """The only value of a component."""
    (only,) = value
    return np.asarray(only)


@pytest.fixture
def saved(tmp_path):
    """Rows of the last episode of a dataset, its images as they are stored, and what the command wrote of it."""

    def save(folder: Path, *more: str) -> tuple[list[dict], dict]:
        path = tmp_path / "out" / "episode.rrd"
        assert data(["view", str(folder), "--episode", "1", *more, "--save", str(path)]) == 0
        assert [found.name for found in path.parent.iterdir()] == ["episode.rrd"]
        assert b"/tmp/" not in path.read_bytes()  # nothing of this machine
        return read_episode(folder, more[1] if more else "train", 1), read_back(path)

    return save


def test_views_depth_cameras_and_boxes(saved, tmp_path, capsys):
    rows, found = saved(write_dataset(tmp_path / "data", [4, 6], 1, split="validation"), "--split", "validation")
    assert capsys.readouterr().out.startswith("data/validation/1: 6 frames, 'pick up the red cube', in ")
    for frame, row in enumerate(rows):
        pose = row["calibration.transform_camera_to_base"]
        for view, shift in (("left", 0.0), ("right", row["calibration.baseline_m"])):
            at = f"/world/{view}"
            blob = found[f"{at}/picture", "EncodedImage:blob"][frame]
            assert bytes(one(blob).astype(np.uint8)) == row[schema.image_key(view)]
            # Rerun stores matrices by columns
            turned = one(found[at, "Transform3D:mat3x3"][frame]).reshape(3, 3).T
            np.testing.assert_allclose(turned, pose[:3, :3], atol=1e-7)
            centre = one(found[at, "Transform3D:translation"][frame])
            np.testing.assert_allclose(centre, (pose @ [shift, 0, 0, 1])[:3], atol=1e-6)
            lens = one(found[at, "Pinhole:image_from_camera"][frame]).reshape(3, 3).T
            assert lens.tolist() == [[40, 0, 16], [0, 40, 16], [0, 0, 1]]
            assert one(found[at, "Pinhole:resolution"][frame]).tolist() == [32, 32]
        blob = found["/world/left/depth", "EncodedDepthImage:blob"][frame]
        assert bytes(one(blob).astype(np.uint8)) == row["observation.depth"]
        assert one(found["/world/left/depth", "EncodedDepthImage:meter"][frame]) == pytest.approx(1e4)
        labels = one(found["/world/left/segmentation", "SegmentationImage:buffer"][frame])
        stored = shards.decode_image("observation.segmentation", row["observation.segmentation"])
        np.testing.assert_array_equal(labels.reshape(32, 32), stored)
        middle = one(found["/world/left/target", "Boxes2D:centers"][frame])
        half = one(found["/world/left/target", "Boxes2D:half_sizes"][frame])
        assert [*(middle - half), *(middle + half)] == [5, 10, 12, 20]
    assert found["/world/left/target", "Boxes2D:labels"][0] == ["red cube"]
    cleared = found["/world/right/target", "Clear:is_recursive"]
    assert list(cleared) == [4]  # the frame whose right view does not show the target
    assert ("/world/right/depth", "EncodedDepthImage:blob") not in found


def test_path_plan_keyframes_numbers_and_instruction(saved, tmp_path):
    rows, found = saved(write_dataset(tmp_path / "data", [4, 6], 1))
    (path,) = found["/world/path", "LineStrips3D:strips"][None]
    np.testing.assert_array_equal(path, [row["observation.state"][:3] for row in rows])
    for frame, row in enumerate(rows):
        state = row["observation.state"]
        plan = one(found["/world/plan", "LineStrips3D:strips"][frame])
        assert len(plan) == 1 + row["action_plan_length"]  # without the steps that only hold still
        place = state[:3].astype(np.float64)
        for point, action in zip(plan, [np.zeros(7), *row["action_plan"]], strict=False):
            place = place + action[:3]
            np.testing.assert_allclose(point, place, atol=1e-6)
        np.testing.assert_array_equal(one(found["/world/tool", "Transform3D:translation"][frame]), state[:3])
        roll, pitch, yaw = state[3:6].astype(np.float64)
        turned = one(found["/world/tool", "Transform3D:mat3x3"][frame]).reshape(3, 3).T
        lowest = [-np.sin(pitch), np.sin(roll) * np.cos(pitch), np.cos(roll) * np.cos(pitch)]
        np.testing.assert_allclose(turned[2], lowest, atol=1e-6)
        np.testing.assert_allclose(np.arctan2(turned[1, 0], turned[0, 0]), yaw, atol=1e-6)
        np.testing.assert_array_equal(
            one(found["/world/keyframe", "Points3D:positions"][frame]), row["keyframe_pose"][:3]
        )
        for key, prefix, column in (("state", "", "observation.state"), ("action", "d", "action")):
            names = [f"{prefix}{name}" for name in ("x", "y", "z", "roll", "pitch", "yaw")] + ["gripper"]
            values = [one(found[f"/{key}/{name}", "Scalars:scalars"][frame]) for name in names]
            np.testing.assert_array_equal(np.float32(values), row[column])
        (told,) = found["/instruction", "TextDocument:text"][frame]
        assert told == "pick up the red cube\n\ntarget: red cube"


def test_one_camera_without_a_calibration_and_a_wrist_that_is_absent(saved, tmp_path):
    rows, found = saved(write_views(tmp_path / "data", [3, 4], without=MONO))
    shown = [frame for frame, row in enumerate(rows) if WRIST in row]
    assert shown == [0, 1, 3]
    assert list(found["/views/wrist/picture", "EncodedImage:blob"]) == shown
    assert list(found["/views/wrist/depth", "EncodedDepthImage:blob"]) == shown
    blob = found["/views/wrist/depth", "EncodedDepthImage:blob"][3]
    assert bytes(one(blob).astype(np.uint8)) == rows[3][WRIST_DEPTH]
    assert list(found["/views/wrist/picture", "Clear:is_recursive"]) == [2]
    assert list(found["/views/left/picture", "EncodedImage:blob"]) == [0, 1, 2, 3]
    assert not any("Pinhole" in component for _, component in found)


def test_numbers_that_are_no_pose_draw_no_path(saved, tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "data"
    for episode in range(2):
        rows = [make_row(rng, episode, frame) | {"state_is_pose": False} for frame in range(3)]
        path = folder / shards.shard_path("train", episode, 2)
        shards.write_shard(path, [shards.encode_row(row) for row in rows], temporary=folder / ".temporary")
    rows, found = saved(list_shards(folder))
    assert not {"/world/path", "/world/tool", "/world/plan", "/world/keyframe"} & {entity for entity, _ in found}
    for number, value in enumerate(rows[2]["action"]):
        assert one(found[f"/action/{number}", "Scalars:scalars"][2]) == value


def test_what_cannot_be_shown_is_told_in_words(tmp_path, monkeypatch, capsys):
    folder = str(write_dataset(tmp_path / "data", [4, 6], 1))
    save = ["--save", str(tmp_path / "episode.rrd")]
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    for arguments, words in (
        ([], "DATASET is missing"),
        ([folder], "say --save FILE.rrd"),
        ([folder, "--save", "episode.mp4"], "end in .rrd"),
        ([folder, "--episode", "2", *save], "has no episode 2; it has 2, from 0 to 1"),
        ([folder, "--split", "test", *save], "has no split 'test'; it has: train"),
        ([str(tmp_path / "none"), *save], "no dataset is there"),
    ):
        assert data(["view", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
