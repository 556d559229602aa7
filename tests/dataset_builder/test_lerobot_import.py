"""Import of LeRobot v3.0, from a dataset that lerobot wrote and from others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_lines import data as main
from hub_server import serve
from lerobot_folder import (
    AS_THEY_ARE,
    FPS,
    LENGTHS,
    PLACE,
    RIG,
    SIZE,
    TASKS,
    TRANSFORM,
    WRITTEN,
    contents,
    import_config,
    import_folder,
    rewrite_shard,
    rows_of,
    write_lerobot,
)
from stereo_scene import poses, textured_pair

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.checking import find_problems
from stereovla.dataset_builder.formats import importing
from stereovla.dataset_builder.formats.importing import ProblemsFound
from stereovla.dataset_builder.streaming.window_stream import WindowStream

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(WRITTEN, tmp_path / "source")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return import_folder(import_config(WRITTEN, tmp_path_factory.mktemp("imported"), validation_episodes=1))


def test_what_lerobot_wrote_is_imported(imported):
    """Every value against the functions that fed lerobot; the pictures within the loss of AV1 and JPEG."""
    splits = {"train": [0, 1], "validation": [2]}
    for split, episodes in splits.items():
        rows = rows_of(imported, split)
        assert [(r["episode_index"], r["frame_index"]) for r in rows] == [
            (number, frame) for number, episode in enumerate(episodes) for frame in range(LENGTHS[episode])
        ]
        for row in rows:
            schema.validate_row(row)
            episode, frame = episodes[row["episode_index"]], row["frame_index"]
            reported = poses(episode, LENGTHS[episode] + 1)
            np.testing.assert_allclose(row["observation.state"], reported[frame], atol=1e-6)
            np.testing.assert_allclose(row["action"][:3], reported[frame + 1, :3] - reported[frame, :3], atol=1e-6)
            assert row["action"][6] == pytest.approx(2 * reported[frame + 1, 6] - 1)
            assert row["task"] == TASKS[episode] and row["embodiment"] == "test_arm"
            assert row["timestamp"] == pytest.approx(frame / FPS)
            np.testing.assert_array_equal(row["calibration.transform_camera_to_base"], np.float32(TRANSFORM))
            for side, image in zip(("left", "right"), textured_pair(100 * episode + frame, SIZE, SIZE), strict=True):
                difference = np.abs(row[f"observation.images.{side}"].astype(float) - image).mean()
                assert difference < 8, (episode, frame, side, difference)  # another frame differs by 45
    info = shards.read_json(imported / "meta/info.json")
    assert (info["fps"], info["state_dim"], info["action_dim"], info["state_is_pose"]) == (FPS, 7, 7, True)
    assert info["tasks"] == sorted(set(TASKS)) and info["dropped"] == {} and info["license"] == "mit"
    assert find_problems(imported) == []
    assert "LeRobot v3.0" in (imported / "README.md").read_text()


def test_imported_data_trains(imported):
    stream = WindowStream(imported, chunk_size=4, mixture={"action": 1.0}, depth_map_share=0.0, epochs=1, lanes=2)
    windows = list(stream)
    assert len(windows) == 12
    for window in windows:
        schema.validate_window(window)
        assert np.isfinite(window["points"][1]).all() or window["episode_index"] >= 0


def test_check_looks_at_timestamps_and_views_too(imported, tmp_path, capsys):
    assert main(["check", str(imported)]) == 0
    swapped = shutil.copytree(imported, tmp_path / "swapped")
    left, right = "observation.images.left", "observation.images.right"
    names = {left: right, right: left}
    rewrite_shard(swapped, lambda table: table.rename_columns([names.get(n, n) for n in table.column_names]))
    assert main(["check", str(swapped)]) == 1
    printed = capsys.readouterr().out
    for frame in (0, 3, 6):
        assert f"data/train-00000-of-00002.parquet: episode 0, frame {frame}: left and right are swapped" in printed
    late = shutil.copytree(imported, tmp_path / "late")

    def delay(table):
        times = table.column("timestamp").to_numpy() + np.float32(1) * (np.arange(table.num_rows) > 4)
        return table.set_column(table.column_names.index("timestamp"), "timestamp", pa.array(times, pa.float32()))

    rewrite_shard(late, delay)
    assert main(["check", str(late)]) == 1
    assert "episode 0, frame 5: the timestamp leaps 13.0 frames ahead" in capsys.readouterr().out


class Stopped(BaseException):
    """As if the process were killed: nothing may catch it."""


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 6])
def test_a_stopped_import_loses_and_repeats_nothing(imported, tmp_path, monkeypatch, calls):
    """Stopped before any of the three checks or three conversions, then started again: the same bytes."""
    options = import_config(WRITTEN, tmp_path, validation_episodes=1)
    whole, count = importing.map_motion, []

    def stopping(*arguments):
        count.append(1)
        if len(count) == calls:
            raise Stopped
        return whole(*arguments)

    monkeypatch.setattr(importing, "map_motion", stopping)
    with pytest.raises(Stopped):
        import_folder(options)
    assert not (tmp_path / "out/meta/manifest.json").exists()
    count.clear()
    calls_before, calls = calls, 0
    import_folder(options)
    assert len(count) == 6 - (calls_before - 1)  # what was done is not done again
    assert contents(tmp_path / "out") == contents(imported)
    import_folder(options)
    assert contents(tmp_path / "out") == contents(imported)


def test_a_killed_process_goes_on(imported, tmp_path):
    options = import_config(WRITTEN, tmp_path, validation_episodes=1)
    command = [sys.executable, "-m", "stereovla", "data", "import", "lerobot"]
    command += ["--source", options.source, "--config", options.config, "--out", options.out]
    command += ["--episodes-per-shard", "1", "--validation-episodes", "1"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if any((tmp_path / "out/data").glob("*.parquet")) or any((tmp_path / "out/.partial").glob("findings-*")):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for findings in (tmp_path / "out/.partial").glob("findings-*"):
        findings.write_bytes(findings.read_bytes() + b'{"episode": "episo')  # as a kill may leave it
    assert main(command[4:]) == 0
    assert contents(tmp_path / "out") == contents(imported)


def test_a_dataset_on_the_hub_is_imported(imported, tmp_path):
    """In a process of its own, since the address of the Hub is read when huggingface_hub is imported."""
    options = import_config(WRITTEN, tmp_path)
    command = [sys.executable, "-m", "stereovla", "data", "import", "lerobot", "--source", "someone/demonstrations"]
    command += ["--config", options.config, "--out", options.out]
    command += ["--episodes-per-shard", "1", "--validation-episodes", "1"]
    with serve() as server:
        server.add("dataset", "someone/demonstrations", WRITTEN)
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | hub | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(imported)


def test_another_source_or_rig_does_not_go_on(imported, tmp_path):
    import_folder(import_config(WRITTEN, tmp_path))
    with pytest.raises(ValueError, match="begun with other options: rig was"):
        import_folder(import_config(WRITTEN, tmp_path, rig={"resize_px": [48, 48]}))


def edit_data(source: Path, change) -> None:
    """Rewrite the data file with the columns (lists of python values) as `change` leaves them."""
    path = source / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=table.schema), path)


def edit_episodes(source: Path, change) -> None:
    path = source / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def set_value(key, row, value):
    def change(columns):
        columns[key][row] = value

    return lambda source: edit_data(source, change)


def lose_row(row):
    def change(columns):
        for values in columns.values():
            del values[row]

    return lambda source: edit_data(source, change)


def set_entry(key, value):
    def change(rows):
        rows[1][key] = value

    return lambda source: edit_episodes(source, change)


def cut_video(source):
    path = source / "videos/observation.images.eye_b/chunk-000/file-000.mp4"
    path.write_bytes(path.read_bytes()[: -path.stat().st_size // 2])


# rows 7 to 11 are episode 1
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lose_row(9), ["episode 1: the data has 4 frames, meta/episodes says 5", "frame 2: its frame_index is 3"]),
        (set_value("timestamp", 9, 0.05), ["episode 1: frame 2: the timestamp does not rise"]),
        (set_value("timestamp", 11, 2.0), ["episode 1: frame 4: the timestamp leaps 21.0 frames ahead"]),
        (set_value("task_index", 8, 7), ["episode 1: frame 1: task_index 7 is not in meta/tasks.parquet"]),
        (set_value("action", 10, [float("nan")] * 7), ["episode 1: frame 3: the action is [nan"]),
        (set_value("observation.state", 7, [0, 0, 0, 0, 0, 0, 3]), ["episode 1: frame 0: the state's gripper is 3"]),
        (
            set_entry("videos/observation.images.eye_a/to_timestamp", 1.5),
            ["episode 1: the video observation.images.eye_a spans 11.0 frames, the data 5"],
        ),
        (
            set_entry("videos/observation.images.eye_a/from_timestamp", 3.0),
            ["episode 1: frame 0: file-000.mp4 ends after 0 of 5 frames"],
        ),
        (cut_video, [f"episode {episode}: frame {frame}: file-000.mp4" for episode, frame in ((0, 6), (1, 0), (2, 0))]),
    ],
)
def test_damage_is_named_with_episode_and_frame(copy, tmp_path, damage, expected, capsys):
    damage(copy)
    options = import_config(copy, tmp_path)
    command = ["import", "lerobot", "--source", str(copy), "--config", options.config, "--out", options.out]
    bad = sorted({line.split(":")[0] for line in expected if line.startswith("episode")})
    assert main(command) == 1
    printed = capsys.readouterr().out
    for line in expected:
        assert line in printed, printed
    assert f"{len(bad)} of 3 episodes have problems; nothing was imported" in printed
    assert not list(tmp_path.glob("out/data/*"))
    if len(bad) == 3:
        return
    assert main([*command, "--skip-bad-episodes"]) == 0
    info = shards.read_json(tmp_path / "out/meta/info.json")
    assert list(info["dropped"]) == bad and info["splits"]["train"]["episodes"] == 2
    assert [len([r for r in rows_of(tmp_path / "out", "train") if r["episode_index"] == n]) for n in (0, 1)] == [7, 6]
    assert "Left out: 1 of 3 episodes" in (tmp_path / "out/README.md").read_text()


def test_a_mended_recording_goes_in_by_the_same_command(imported, copy, tmp_path):
    """What was found good stays so, what was bad is looked at again; a corrected rig needs no other folder."""
    video = copy / "videos/observation.images.eye_b/chunk-000/file-000.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[:1000] + bytes(len(whole) - 1000))
    swapped = {"cameras": {"left": "observation.images.eye_b", "right": "observation.images.eye_a"}}
    for rig in ({}, swapped):
        with pytest.raises(ProblemsFound):
            import_folder(import_config(copy, tmp_path, rig=rig, validation_episodes=1))
    video.write_bytes(whole)
    import_folder(import_config(copy, tmp_path, validation_episodes=1))
    assert contents(tmp_path / "out") == contents(imported)


def test_swapped_views_and_wrong_calibrations_are_named(tmp_path):
    swapped = {"left": "observation.images.eye_b", "right": "observation.images.eye_a"}
    with pytest.raises(ProblemsFound, match="episode 0: frame 3: left and right are swapped: 9.%") as caught:
        import_folder(import_config(WRITTEN, tmp_path, rig={"cameras": swapped}))
    assert len(str(caught.value).splitlines()) == 3 * 3 + 1
    larger = {**RIG["calibration"], "size_px": [128, 96]}
    with pytest.raises(
        ProblemsFound, match="episode 2: frame 5: the right view is 96x96 px, the calibration is of 128x96"
    ):
        import_folder(import_config(WRITTEN, tmp_path, "other", rig={"calibration": larger}))
    for changes, message in (
        ({"cameras": {"left": "observation.images.eye_a", "right": "wrist"}}, "no camera 'wrist' for the right view"),
        ({"cameras": {"left": "observation.images.eye_a", "right": "observation.images.eye_a"}}, "parts_px must say"),
        ({"state": {"column": "joints", **PLACE}}, "no column 'joints'"),
    ):
        with pytest.raises(ValueError, match=message):
            import_folder(import_config(WRITTEN, tmp_path, "third", rig=changes))
    old = shutil.copytree(WRITTEN, tmp_path / "old")
    info = json.loads((old / "meta/info.json").read_text())
    (old / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match="version v2.1; v3.0 is needed"):
        import_folder(import_config(old, tmp_path, "fourth"))


def test_vectors_of_any_size_and_views_in_one_picture(tmp_path):
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(8, 14)), rng.normal(size=(8, 5))
    source = write_lerobot(tmp_path / "source", states, actions)
    out = import_folder(import_config(source, tmp_path, rig=AS_THEY_ARE))
    rows = rows_of(out, "train")
    np.testing.assert_array_equal([row["observation.state"] for row in rows], states.astype(np.float32))
    np.testing.assert_array_equal([row["action"] for row in rows], actions.astype(np.float32))
    for row in rows:
        schema.validate_row(row)
        assert row["state_is_pose"] is False and row["task"] == "fold the towel"
        np.testing.assert_allclose(row["calibration.principal_point_px"], [24, 16])
        np.testing.assert_allclose(row["calibration.focal_length_px"], [50, 50])
        for side, image in zip(("left", "right"), textured_pair(row["frame_index"], SIZE, SIZE), strict=True):
            halves = image[16:80].reshape(32, 2, 48, 2, 3).mean(axis=(1, 3))  # an independent reduction by two
            assert np.abs(row[f"observation.images.{side}"] - halves).mean() < 8
    info = shards.read_json(out / "meta/info.json")
    assert (info["state_dim"], info["action_dim"], info["state_is_pose"]) == (14, 5, False)
    assert len(shards.read_json(out / "meta/stats.json")["test_arm"]["state"]["mean"]) == 14
    (window, *_) = WindowStream(out, chunk_size=3, mixture={"action": 1.0}, depth_map_share=0.0, epochs=1, lanes=1)
    schema.validate_window(window)
    assert window["state_history"].shape == (4, 14) and window["actions"].shape == (3, 5)
    assert np.isnan(window["points"]).all()  # nothing points at a tool whose pose is not known
