"""Angles around pi, from an imported recording to what is trained on; and which numbers are angles at all."""

import json
import shutil
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot_folder import AS_THEY_ARE, WRITTEN, import_config, import_folder, rows_of, write_lerobot
from synthetic_dataset import write_training_dataset

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.questions import processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.processing.state_entries import POSES
from stereovla.training.models import untrained


@pytest.fixture(scope="module")
def flange(tmp_path_factory):
    """A recording whose flange looks down: its roll is pi +- 0.01, and its sign flips from frame to frame."""
    folder = tmp_path_factory.mktemp("flange")
    shutil.copytree(WRITTEN, folder / "source")
    for path in (folder / "source/data").rglob("*.parquet"):
        table = pq.read_table(path)
        for key in ("observation.state", "action"):
            values = np.array(table.column(key).to_pylist())
            values[:, 3] = (np.pi - 0.01) * (-1.0) ** np.arange(len(values))
            values[:, 4:6] = 0
            column = pa.array(values.astype(np.float32).tolist(), table.schema.field(key).type)
            table = table.set_column(table.schema.get_field_index(key), key, column)
        pq.write_table(table, path)
    return folder


def test_a_roll_around_pi_is_told_and_leaps_nowhere(flange, capsys):
    out = import_folder(import_config(flange / "source", flange))
    said = capsys.readouterr().out
    assert "roll lies around pi" in said and "does the rig lack `tool`" in said
    assert json.loads((out / "meta/info.json").read_text())["angles_around_pi"] == ["roll"]
    assert np.abs(np.diff([row["observation.state"][3] for row in rows_of(out, "train")][:4])).max() > 6  # as recorded
    meta = load_meta(out)
    assert meta["state_names"] == {"test_arm": list(POSES[7])}
    np.testing.assert_allclose(
        [meta["stats"]["test_arm"]["state"][end][3] for end in ("min", "max")], [np.pi - 0.01, np.pi + 0.01], atol=1e-5
    )
    _, processor = untrained("tiny", meta)
    windows = list(islice(WindowStream(out, epochs=1, mixture={"pose": 1}, depth_map_share=0.0), 12))
    batch = processor(**processor_arguments(windows, processor.pixel_views))
    states = np.array([window["state_history"] for window in windows])
    # within the range of the statistics, 0.02 rad wide: were +-pi, 314 of its halves apart in a dataset that flips once
    roll = np.where(states[..., 3] > 0, -1.0, 1.0)
    np.testing.assert_allclose(batch["state"][..., 3], roll, atol=1e-2)
    keyframes = np.array([window["keyframe_pose"] for window in windows])
    turn = np.angle(np.exp(1j * (keyframes[:, 3] - states[:, -1, 3]).astype(np.float64)))
    scale = (meta["stats"]["test_arm"]["state"]["q99"][3] - meta["stats"]["test_arm"]["state"]["q01"][3]) / 2
    assert 0 < np.abs(turn).max() < 0.03
    np.testing.assert_allclose(batch["displacement"][:, 3], turn / scale, atol=1e-2)  # was up to 6.27 / scale


def test_a_tool_in_the_rig_turns_it_to_zero(flange, capsys):
    tool = {"tool": [0.0, 0.0, 0.1, float(np.pi), 0.0, 0.0]}
    out = import_folder(import_config(flange / "source", flange, "turned", rig=tool))
    assert "around pi" not in capsys.readouterr().out
    assert np.abs([row["observation.state"][3] for row in rows_of(out, "train")]).max() < 0.02
    assert json.loads((out / "meta/info.json").read_text())["angles_around_pi"] == []


def test_states_that_are_no_poses_have_no_angles(tmp_path):
    """Six joints and a gripper are as many numbers as a pose."""
    joints = np.zeros((8, 7))
    joints[:, 3] = np.where(np.arange(8) % 2, 3.1, -3.1)
    source = write_lerobot(tmp_path / "source", joints, joints)
    out = import_folder(import_config(source, tmp_path, rig=AS_THEY_ARE))
    meta = load_meta(out)
    assert meta["state_names"] == {"test_arm": []}
    _, processor = untrained("tiny", meta)
    assert processor.state_names == {"test_arm": []}
    windows = list(WindowStream(out, epochs=1, mixture={"pose": 1}, depth_map_share=0.0, shuffle=False))
    batch = processor(**processor_arguments(windows, processor.pixel_views))
    assert batch["displacement"][0, 3] == pytest.approx(6.2 / 3.1)  # from -3.1 to the last frame's 3.1, the only way


def test_one_robot_has_one_kind_of_state(tmp_path):
    for name in ("first", "second"):
        write_training_dataset(tmp_path / name)
    paths = [(tmp_path / name, 1.0) for name in ("first", "second")]
    assert load_meta(paths)["state_names"] == {"franka_panda": list(POSES[7])}
    info = json.loads((tmp_path / "second/meta/info.json").read_text())
    shards.write_json(tmp_path / "second/meta/info.json", info | {"state_is_pose": False})
    with pytest.raises(ValueError, match="states of 'franka_panda' are no poses in .*second, elsewhere"):
        load_meta(paths)
