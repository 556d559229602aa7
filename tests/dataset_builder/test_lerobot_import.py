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
from PIL import Image
from stereo_scene import poses, textured_pair

from stereovla.dataset_builder.dataset import schema, shards
from stereovla.dataset_builder.dataset.checking import find_problems
from stereovla.dataset_builder.formats import import_checks, importing
from stereovla.dataset_builder.formats.importing import ProblemsFound
from stereovla.dataset_builder.formats.video import VideoWriter
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

    for module in (import_checks, importing):
        monkeypatch.setattr(module, "map_motion", stopping)
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


@pytest.mark.slow
def test_a_shard_of_other_episodes_is_written_again(imported, tmp_path):
    """As one lies there that was written before an episode was mended which had been left out."""
    out = Path(shutil.copytree(imported, tmp_path / "out"))
    (out / "meta/manifest.json").unlink()
    path = out / shards.shard_path("train", 0, 2)
    info = shards.shard_info(path) | {"sources": ["episode 9"]}
    shards.write_table(path, shards.read_table(path), temporary=tmp_path / "shard", info=info)
    import_folder(import_config(WRITTEN, tmp_path, validation_episodes=1))
    assert contents(out) == contents(imported)


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
        (set_value("timestamp", 7, -0.05), ["episode 1: frame 0: the timestamp is -0.0500 s, expected 0 or more"]),
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
            [
                "episode 1: frame 0: it is picture 7 of file-000.mp4 of observation.images.eye_a, which is shown at "
                "0.5833 s; from_timestamp and timestamp ask for the one at 3.0000 s"
            ],
        ),
        # frames are missing somewhere: no episode of the file is sure to have its own
        (cut_video, [f"episode {n}: file-000.mp4 of observation.images.eye_b has 9 frames, its" for n in range(3)]),
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


def number(row):
    """Which of the episodes' frames, counted through, the right view of a row of `filmed` shows: its grey says it."""
    return round(float(row["observation.images.right"].mean()) / 12)


@pytest.fixture
def filmed(tmp_path):
    """Three episodes of 6 rows whose pictures are grey, frame k of all being 12 * k bright: none can be mistaken."""
    states = np.cumsum(np.random.default_rng(0).normal(0, 0.01, (6, 5)), axis=0)
    source = write_lerobot(tmp_path / "source", states, states, rows=(0, 0, 0))
    with VideoWriter(source / "videos/eyes/chunk-000/file-000.mp4", FPS, (2 * SIZE, SIZE), "libx264", 12) as writer:
        for frame in range(18):
            writer.write(np.full((SIZE, 2 * SIZE, 3), 12 * frame, np.uint8))
    return source


def imported_numbers(source, tmp_path):
    return [number(row) for row in rows_of(import_folder(import_config(source, tmp_path, rig=AS_THEY_ARE)), "train")]


def test_every_row_has_its_own_picture(filmed, tmp_path):
    assert imported_numbers(filmed, tmp_path) == list(range(18))


def shifted(frames, key="from_timestamp"):
    def change(rows):
        rows[1][f"videos/eyes/{key}"] += frames / FPS

    return change


def all_drift(rows):
    for episode, row in enumerate(rows):  # as durations that are too long by a twentieth add up
        for key in ("from_timestamp", "to_timestamp"):
            row[f"videos/eyes/{key}"] += 0.3 * episode / FPS


def exchanged(rows):
    for key in ("from_timestamp", "to_timestamp"):
        rows[0][f"videos/eyes/{key}"], rows[1][f"videos/eyes/{key}"] = (
            rows[1][f"videos/eyes/{key}"],
            rows[0][f"videos/eyes/{key}"],
        )


def by_one(rows):
    for key in ("from_timestamp", "to_timestamp"):
        shifted(1, key)(rows)


def not_a_number(key):
    def change(rows):
        rows[1][f"videos/eyes/{key}"] = float("nan")

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (not_a_number("from_timestamp"), ["episode 1: the video eyes spans nan frames", "ask for the one at nan s"]),
        (not_a_number("to_timestamp"), ["episode 1: the video eyes spans nan frames, the data 6"]),
        (
            by_one,
            ["episode 1: frame 0: it is picture 6 of file-000.mp4 of eyes, which is shown at 0.5000 s", "0.5833 s"],
        ),
        (exchanged, ["episode 0: frame 0: it is picture 0 of", "episode 1: frame 0: it is picture 6 of"]),
        (all_drift, ["episode 1: frame 0: it is picture 6 of", "episode 2: frame 0: it is picture 12 of"]),
        (shifted(-1.4), ["episode 1: the video eyes spans 7.4 frames, the data 6"]),
        (shifted(0.2), None),  # containers round times
    ],
)
def test_times_that_name_other_pictures_are_refused(filmed, tmp_path, change, expected):
    edit_episodes(filmed, change)
    if expected is None:
        assert imported_numbers(filmed, tmp_path) == list(range(18))
        return
    with pytest.raises(ProblemsFound) as error:
        imported_numbers(filmed, tmp_path)
    assert all(line in str(error.value) for line in expected), error.value


@pytest.mark.parametrize("lost", [0, 8, 17])
def test_a_frame_that_the_recorder_lost_refuses_every_episode_of_the_file(filmed, tmp_path, lost):
    """The frames after it carry the times of those before: nothing but their number tells."""
    with VideoWriter(filmed / "videos/eyes/chunk-000/file-000.mp4", FPS, (2 * SIZE, SIZE), "libx264", 12) as writer:
        for frame in range(18):
            if frame != lost:
                writer.write(np.full((SIZE, 2 * SIZE, 3), 12 * frame, np.uint8))
    with pytest.raises(ProblemsFound) as error:
        imported_numbers(filmed, tmp_path)
    for episode in range(3):
        assert f"episode {episode}: file-000.mp4 of eyes has 17 frames, its episodes 18" in str(error.value)


def test_lengths_that_only_add_up_are_refused(filmed, tmp_path):
    def change(rows):
        rows[0]["length"], rows[1]["length"] = 7, 5

    edit_episodes(filmed, change)
    with pytest.raises(ProblemsFound, match="episode 0: the data has 6 frames, meta/episodes says 7"):
        imported_numbers(filmed, tmp_path)


def test_instructions_that_meta_episodes_does_not_list_are_refused(copy, tmp_path):
    tasks = pq.read_table(copy / "meta/tasks.parquet").to_pydict()
    pq.write_table(pa.table(tasks | {"task_index": tasks["task_index"][::-1]}), copy / "meta/tasks.parquet")
    with pytest.raises(ProblemsFound, match="episode 0: frame 0: its instruction is 'open the drawer', meta/episodes"):
        import_folder(import_config(copy, tmp_path))


def test_a_rate_that_is_not_that_of_the_timestamps_is_refused(copy, tmp_path):
    path = copy / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fps": 13}))
    with pytest.raises(ProblemsFound, match="episode 1: the timestamps run at 12.00 Hz, meta/info.json says 13 Hz"):
        import_folder(import_config(copy, tmp_path))


def as_files(source, place=lambda row: f"images/{row}.png"):
    """The wide pictures of `write_lerobot` as files of their own, which the column names."""
    (source / "images").mkdir()
    path = source / "data/chunk-000/file-000.parquet"
    table, values = pq.read_table(path), []
    for row in range(table.num_rows):
        Image.fromarray(np.concatenate(textured_pair(row % 5, SIZE, SIZE), axis=1)).save(source / f"images/{row}.png")
        values.append({"bytes": None, "path": place(row)})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(table.append_column("eyes", pa.array(values, kind)), path)
    info = json.loads((source / "meta/info.json").read_text())
    info["features"]["eyes"]["dtype"] = "image"
    (source / "meta/info.json").write_text(json.dumps(info))
    shutil.rmtree(source / "videos")


def test_pictures_that_are_stored_as_files_are_read(tmp_path):
    states = np.arange(10, dtype=np.float32).reshape(5, 2)
    source = write_lerobot(tmp_path / "source", states, states, [0, 0])
    as_files(source)
    whole = {"crop_px": None, "resize_px": None}
    rows = rows_of(import_folder(import_config(source, tmp_path, rig=AS_THEY_ARE | whole)), "train")
    assert len(rows) == 10
    for row in rows:
        for side, image in zip(("left", "right"), textured_pair(row["frame_index"], SIZE, SIZE), strict=True):
            assert np.abs(row[f"observation.images.{side}"].astype(float) - image).mean() < 4
    (source / "images/3.png").write_bytes(b"no picture")
    with pytest.raises(
        ProblemsFound, match="episode 0: frame 3: eyes in 'images/3.png' cannot be read: cannot identify"
    ):
        import_folder(import_config(source, tmp_path, "other", rig=AS_THEY_ARE))
    (source / "images/3.png").unlink()
    with pytest.raises(
        ProblemsFound, match="episode 0: frame 3: eyes in 'images/3.png' cannot be read: .*No such file"
    ):
        import_folder(import_config(source, tmp_path, "other", rig=AS_THEY_ARE))


def test_a_column_of_pictures_without_any_is_named(tmp_path):
    states = np.arange(10, dtype=np.float32).reshape(5, 2)
    source = write_lerobot(tmp_path / "source", states, states)
    as_files(source, place=lambda row: None)
    with pytest.raises(ProblemsFound, match="episode 0: frame 0: eyes holds neither a picture nor the path of one"):
        import_folder(import_config(source, tmp_path, rig=AS_THEY_ARE))


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 1), (2, 9), (14, 5)])
def test_a_state_of_any_size_is_imported_and_read(tmp_path, sizes):
    rng = np.random.default_rng(0)
    states, actions = (rng.normal(size=(5, size)).astype(np.float32) for size in sizes)
    source = write_lerobot(tmp_path / "source", states, actions)
    out = import_folder(import_config(source, tmp_path, rig=AS_THEY_ARE))
    assert find_problems(out) == []
    stream = WindowStream(out, mixture={"action": 1.0}, depth_map_share=0.0, epochs=1, lanes=1, shuffle=False)
    windows = list(stream)
    np.testing.assert_array_equal([window["state_history"][-1] for window in windows], states)
    np.testing.assert_array_equal([window["actions"][0] for window in windows], actions)


def test_numbers_that_no_row_can_hold_are_found_before_anything_is_written(tmp_path):
    states = np.ones((5, 3))
    states[2, 1] = 1e30
    source = write_lerobot(tmp_path / "source", states, states)
    path = source / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    values = [[1.0, 1e300 if row == 2 else 1.0, 1.0] for row in range(5)]  # finite, but not in float32
    pq.write_table(table.set_column(table.column_names.index("joints"), "joints", pa.array(values)), path)
    with pytest.raises(ProblemsFound, match=r"episode 0: frame 2: the state is \[1.0, 1e\+300, 1.0\]"):
        import_folder(import_config(source, tmp_path, rig=AS_THEY_ARE))


def test_a_principal_point_that_the_crop_leaves_out_is_found_by_the_check(tmp_path):
    with pytest.raises(
        ProblemsFound, match=r"frame 0: after crop_px and resize_px, the principal point \[-12.0, 48.0\]"
    ):
        import_folder(import_config(WRITTEN, tmp_path, rig={"crop_px": [60, 0, 36, 96]}))
