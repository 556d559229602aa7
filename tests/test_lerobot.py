"""Import from and export to LeRobot v3.0, against a dataset that lerobot wrote and readers that know the format."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hub_folder import serve
from stereo_scene import poses, textured_pair
from synthetic_dataset import write_dataset

from dataset_builder import importing, schema, shards
from dataset_builder.__main__ import main
from dataset_builder.checking import find_problems
from dataset_builder.importing import ProblemsFound, check_episode, import_dataset
from dataset_builder.lerobot_source import LeRobotImportConfig, open_lerobot
from dataset_builder.rig import read_rig
from dataset_builder.streaming import WindowStream
from dataset_builder.video import VideoWriter

ROOT = Path(__file__).parent.parent
WRITTEN = ROOT / "tests/lerobot_written/dataset"  # by lerobot itself, see make.py beside it
SIZE, FPS, LENGTHS = 96, 12, (7, 5, 6)
TASKS = ("pick up the cup", "open the drawer", "pick up the cup")
TRANSFORM = [[0, 0, 1, -0.8], [-1, 0, 0, 0], [0, -1, 0, 0.1], [0, 0, 0, 1]]
PLACE = {"position": [0, 1, 2], "rpy": [3, 4, 5], "gripper": 6, "gripper_closed_open": [0, 1]}
RIG = {
    "embodiment": "test_arm",
    "license": "mit",
    "cameras": {"left": "observation.images.eye_a", "right": "observation.images.eye_b"},
    "calibration": {
        "size_px": [SIZE, SIZE],
        "focal_length_px": [100.0, 100.0],
        "principal_point_px": [48.0, 48.0],
        "baseline_m": 0.063,
        "transform_camera_to_base": TRANSFORM,
    },
    "state": {"column": "observation.state", **PLACE},
    "action": {"column": "action", "kind": "absolute", **PLACE},
}


def write_rig(folder: Path, **changes) -> Path:
    path = folder / "rig.yaml"
    path.write_text(yaml.safe_dump({**RIG, **changes}))
    return path


def config(source: Path, folder: Path, name: str = "out", **options) -> LeRobotImportConfig:
    rig = options.pop("rig", {})
    return LeRobotImportConfig(
        source=str(source),
        config=str(write_rig(folder, **rig)),
        out=str(folder / name),
        **{"episodes_per_shard": 1, **options},
    )


def run(options: LeRobotImportConfig) -> Path:
    rig = read_rig(Path(options.config))
    return import_dataset(options, rig, open_lerobot(options, rig))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(WRITTEN, tmp_path / "source")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return run(config(WRITTEN, tmp_path_factory.mktemp("imported"), validation_episodes=1))


def rows_of(folder: Path, split: str) -> list[dict]:
    return [row for path in sorted((folder / "data").glob(f"{split}-*")) for row in shards.read_rows(path)]


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


def rewrite_shard(folder: Path, change) -> None:
    """The first shard as `change` leaves its table, with a manifest that agrees."""
    paths = sorted(path.relative_to(folder) for path in (folder / "data").glob("*.parquet"))
    pq.write_table(change(pq.read_table(folder / paths[0])), folder / paths[0])
    by_split = {split: [path for path in paths if path.name.startswith(split)] for split in ("train", "validation")}
    shards.write_manifest(folder, by_split)


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
    options = config(WRITTEN, tmp_path, validation_episodes=1)
    whole, count = importing.map_motion, []

    def stopping(*arguments):
        count.append(1)
        if len(count) == calls:
            raise Stopped
        return whole(*arguments)

    monkeypatch.setattr(importing, "map_motion", stopping)
    with pytest.raises(Stopped):
        run(options)
    assert not (tmp_path / "out/meta/manifest.json").exists()
    count.clear()
    calls_before, calls = calls, 0
    run(options)
    assert len(count) == 6 - (calls_before - 1)  # what was done is not done again
    assert contents(tmp_path / "out") == contents(imported)
    run(options)
    assert contents(tmp_path / "out") == contents(imported)


def test_a_killed_process_goes_on(imported, tmp_path):
    options = config(WRITTEN, tmp_path, validation_episodes=1)
    command = [sys.executable, "-m", "dataset_builder", "import-lerobot"]
    command += ["--source", options.source, "--config", options.config, "--out", options.out]
    command += ["--episodes-per-shard", "1", "--validation-episodes", "1"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any((tmp_path / "out/data").glob("*.parquet")) or any((tmp_path / "out/.partial").glob("findings-*")):
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for findings in (tmp_path / "out/.partial").glob("findings-*"):
        findings.write_bytes(findings.read_bytes() + b'{"episode": "episo')  # as a kill may leave it
    assert main(command[3:]) == 0
    assert contents(tmp_path / "out") == contents(imported)


def test_a_dataset_on_the_hub_is_imported(imported, tmp_path):
    """In a process of its own, since the address of the Hub is read when huggingface_hub is imported."""
    options = config(WRITTEN, tmp_path)
    command = [sys.executable, "-m", "dataset_builder", "import-lerobot", "--source", "someone/demonstrations"]
    command += ["--config", options.config, "--out", options.out]
    command += ["--episodes-per-shard", "1", "--validation-episodes", "1"]
    with serve(WRITTEN) as server:
        hub = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        environment = os.environ | hub | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(imported)


def test_another_source_or_rig_does_not_go_on(imported, tmp_path):
    run(config(WRITTEN, tmp_path))
    with pytest.raises(ValueError, match="begun with other options: rig was"):
        run(config(WRITTEN, tmp_path, rig={"resize_px": [48, 48]}))


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
    options = config(copy, tmp_path)
    command = ["import-lerobot", "--source", str(copy), "--config", options.config, "--out", options.out]
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
            run(config(copy, tmp_path, rig=rig, validation_episodes=1))
    video.write_bytes(whole)
    run(config(copy, tmp_path, validation_episodes=1))
    assert contents(tmp_path / "out") == contents(imported)


def test_swapped_views_and_wrong_calibrations_are_named(tmp_path):
    swapped = {"left": "observation.images.eye_b", "right": "observation.images.eye_a"}
    with pytest.raises(ProblemsFound, match="episode 0: frame 3: left and right are swapped: 9.%") as caught:
        run(config(WRITTEN, tmp_path, rig={"cameras": swapped}))
    assert len(str(caught.value).splitlines()) == 3 * 3 + 1
    larger = {**RIG["calibration"], "size_px": [128, 96]}
    with pytest.raises(
        ProblemsFound, match="episode 2: frame 5: the right view is 96x96 px, the calibration is of 128x96"
    ):
        run(config(WRITTEN, tmp_path, "other", rig={"calibration": larger}))
    for changes, message in (
        ({"cameras": {"left": "observation.images.eye_a", "right": "wrist"}}, "no camera 'wrist' for the right view"),
        ({"cameras": {"left": "observation.images.eye_a", "right": "observation.images.eye_a"}}, "parts_px must say"),
        ({"state": {"column": "joints", **PLACE}}, "no column 'joints'"),
    ):
        with pytest.raises(ValueError, match=message):
            run(config(WRITTEN, tmp_path, "third", rig=changes))
    old = shutil.copytree(WRITTEN, tmp_path / "old")
    info = json.loads((old / "meta/info.json").read_text())
    (old / "meta/info.json").write_text(json.dumps({**info, "codebase_version": "v2.1"}))
    with pytest.raises(ValueError, match="version v2.1; v3.0 is needed"):
        run(config(old, tmp_path, "fourth"))


def write_lerobot(folder: Path, states: np.ndarray, actions: np.ndarray, rows: int = 0) -> Path:
    """One episode of wide pictures that hold both views, and vectors of any size, by plain pyarrow."""
    length, size = len(states), (SIZE, 2 * SIZE)
    (folder / "videos/eyes/chunk-000").mkdir(parents=True)
    with VideoWriter(folder / "videos/eyes/chunk-000/file-000.mp4", FPS, size[::-1], "libx264", 12) as writer:
        for frame in range(length):
            writer.write(np.concatenate(textured_pair(frame, SIZE, SIZE, rows=rows), axis=1))
    numbers = np.arange(length)
    columns = {"joints": list(states.astype(np.float32)), "targets": list(actions.astype(np.float32))}
    columns |= {"timestamp": (numbers / FPS).astype(np.float32), "frame_index": numbers, "index": numbers}
    columns |= {"episode_index": 0 * numbers, "task_index": 0 * numbers}
    (folder / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), folder / "data/chunk-000/file-000.parquet")
    entry = {"episode_index": 0, "length": length, "data/chunk_index": 0, "data/file_index": 0}
    entry |= {"videos/eyes/chunk_index": 0, "videos/eyes/file_index": 0}
    entry |= {"videos/eyes/from_timestamp": 0.0, "videos/eyes/to_timestamp": length / FPS}
    (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([entry]), folder / "meta/episodes/chunk-000/file-000.parquet")
    pd.DataFrame({"task_index": [0]}, index=["fold the towel"]).to_parquet(folder / "meta/tasks.parquet")
    info = {"codebase_version": "v3.0", "fps": FPS, "total_episodes": 1, "splits": {"train": "0:1"}}
    info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    info |= {"video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    info["features"] = {"eyes": {"dtype": "video"}, "joints": {"dtype": "float32"}, "targets": {"dtype": "float32"}}
    (folder / "meta/info.json").write_text(json.dumps(info))
    return folder


AS_THEY_ARE = {
    "cameras": {"left": "eyes", "right": "eyes"},
    "parts_px": {"left": [0, 0, SIZE, SIZE], "right": [SIZE, 0, SIZE, SIZE]},
    "state": {"column": "joints"},
    "action": {"column": "targets"},
    "crop_px": [0, 16, 96, 64],
    "resize_px": [48, 32],
}


def test_vectors_of_any_size_and_views_in_one_picture(tmp_path):
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(8, 14)), rng.normal(size=(8, 5))
    source = write_lerobot(tmp_path / "source", states, actions)
    out = run(config(source, tmp_path, rig=AS_THEY_ARE))
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


def test_views_that_are_not_rectified_are_named(tmp_path):
    source = write_lerobot(tmp_path / "source", np.zeros((5, 3)), np.zeros((5, 3)), rows=2)
    options = config(source, tmp_path, rig=AS_THEY_ARE)
    rig = read_rig(Path(options.config))
    finding = check_episode(open_lerobot(options, rig), rig, "episode 0")
    assert [line.split(":")[0] for line in finding.problems] == ["frame 0", "frame 2", "frame 4"]
    assert all("not rectified: matching points lie 2.0 rows apart" in line for line in finding.problems)


@pytest.fixture(scope="module")
def exported(imported, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "lerobot"
    assert main(["export-lerobot", "--dataset", str(imported), "--out", str(out)]) == 0
    return out


def test_the_export_has_the_layout_that_lerobot_writes(exported):
    """Names, types and nesting of everything in meta/, compared with lerobot's own files."""
    ours, theirs = (json.loads((folder / "meta/info.json").read_text()) for folder in (exported, WRITTEN))
    assert set(ours) == set(theirs)
    for key in ("codebase_version", "data_path", "video_path", "total_frames", "total_episodes", "total_tasks", "fps"):
        assert ours[key] == theirs[key], key
    assert ours["splits"] == {"train": "0:2", "validation": "2:3"}
    names = {
        "observation.images.left": "observation.images.eye_a",
        "observation.images.right": "observation.images.eye_b",
    }
    for key, feature in ours["features"].items():
        if key.startswith("calibration."):
            continue
        expected = theirs["features"][names.get(key, key)]
        assert set(feature) == set(expected) and set(feature.get("info", ())) == set(expected.get("info", ()))
        assert (feature["dtype"], feature["shape"], feature["names"]) == (
            expected["dtype"],
            expected["shape"],
            expected["names"],
        )

    def layout(folder, path):
        types = {}
        for field in pq.read_schema(folder / path):
            name = field.name.replace("eye_a", "left").replace("eye_b", "right")
            if "calibration." not in name:
                types[name] = str(field.type)
        return types

    for path in ("meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"):
        assert layout(exported, path) == layout(WRITTEN, path), path
    ours, theirs = (json.loads((folder / "meta/stats.json").read_text()) for folder in (exported, WRITTEN))
    assert set(ours["action"]) == set(theirs["action"])
    for name in ("min", "max", "mean", "std"):  # lerobot only estimates quantiles
        np.testing.assert_allclose(ours["observation.state"][name], theirs["observation.state"][name], atol=1e-3)
        left = np.array(ours["observation.images.left"][name])
        assert left.shape == np.array(theirs["observation.images.eye_a"][name]).shape == (3, 1, 1)
    assert ours["timestamp"]["count"] == theirs["timestamp"]["count"] == [18]
    tasks = pd.read_parquet(exported / "meta/tasks.parquet")
    assert set(tasks.index) == set(TASKS) and sorted(tasks["task_index"]) == [0, 1]


def test_plain_readers_find_every_frame_in_the_export(imported, exported):
    """pyarrow and PyAV alone, by the rules of the format: the picture at from_timestamp + timestamp."""
    rows = rows_of(imported, "train") + rows_of(imported, "validation")
    data = [r for path in sorted((exported / "data").glob("*/*.parquet")) for r in pq.read_table(path).to_pylist()]
    episodes = pq.read_table(exported / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [row["index"] for row in data] == list(range(18))
    pictures = {}
    for path in (exported / "videos").rglob("*.mp4"):
        with av.open(str(path)) as container:
            decoded = [(float(f.pts * f.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        pictures[path.relative_to(exported / "videos").as_posix()] = decoded
    for row, wanted in zip(data, rows, strict=True):
        assert row["frame_index"] == wanted["frame_index"] and row["timestamp"] == pytest.approx(
            row["frame_index"] / FPS
        )
        np.testing.assert_array_equal(np.float32(row["observation.state"]), wanted["observation.state"])
        np.testing.assert_array_equal(np.float32(row["action"]), wanted["action"])
        entry = episodes[row["episode_index"]]
        assert entry["dataset_from_index"] <= row["index"] < entry["dataset_to_index"]
        for key in ("observation.images.left", "observation.images.right"):
            place = entry[f"videos/{key}/chunk_index"], entry[f"videos/{key}/file_index"]
            when = entry[f"videos/{key}/from_timestamp"] + row["timestamp"]
            times = pictures[f"{key}/chunk-{place[0]:03d}/file-{place[1]:03d}.mp4"]
            time_s, image = min(times, key=lambda item: abs(item[0] - when))
            assert abs(time_s - when) < 1e-4  # lerobot's own tolerance
            assert np.abs(image.astype(float) - wanted[key]).mean() < 6


def test_there_and_back(imported, exported, tmp_path):
    command = ["import-lerobot", "--source", str(exported), "--config", str(exported / "meta/rig.yaml")]
    assert main([*command, "--out", str(tmp_path / "back")]) == 0
    for split in ("train", "validation"):
        for row, wanted in zip(rows_of(tmp_path / "back", split), rows_of(imported, split), strict=True):
            assert set(row) == set(wanted)
            for key, value in wanted.items():
                if key.startswith("observation.images."):
                    assert np.abs(row[key].astype(float) - value).mean() < 8
                elif isinstance(value, np.ndarray):
                    np.testing.assert_allclose(row[key], value, atol=2e-6)
                else:
                    assert row[key] == pytest.approx(value) if isinstance(value, float) else row[key] == value


def test_depth_and_masks_are_exported_as_they_are(tmp_path):
    folder = write_dataset(tmp_path / "data", [3, 2], 2)
    (path,) = (folder / "data").glob("*.parquet")
    info = {"fps": 10, "columns": schema.row_columns(), "embodiments": ["franka_panda"], "state_is_pose": True}
    shards.write_json(folder / "meta/info.json", {**info, "state_dim": 7, "action_dim": 7})
    out = tmp_path / "lerobot"
    assert main(["export-lerobot", "--dataset", str(folder), "--out", str(out), "--with-depth"]) == 0
    exported = pq.read_table(out / "data/chunk-000/file-000.parquet")
    for key in ("observation.depth", "observation.segmentation"):
        assert exported.column(key).to_pylist() == pq.read_table(path).column(key).to_pylist()
        feature = json.loads((out / "meta/info.json").read_text())["features"][key]
        assert (feature["dtype"], feature["shape"]) == ("image", [32, 32, 1])


def test_wrong_exports_are_named(imported, exported, capsys):
    command = ["export-lerobot", "--dataset", str(imported), "--out"]
    assert main([*command, str(exported)]) == 2 and "exists; choose another --out" in capsys.readouterr().err
    assert main([*command, "x", "--codec", "mpeg4"]) == 2 and "codec='mpeg4' is unknown" in capsys.readouterr().err
    assert main([*command, "x", "--with-depth"]) == 2 and "has no observation.depth" in capsys.readouterr().err
