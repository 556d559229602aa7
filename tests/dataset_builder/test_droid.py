"""Import of DROID raw episodes, written by the test in their layout from a simulated episode."""

import json
import shutil
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import yaml

pytest.importorskip("mujoco")

from command_lines import data as main  # noqa: E402
from mutations import mutate  # noqa: E402

from stereovla.dataset_builder.dataset import schema, shards  # noqa: E402
from stereovla.dataset_builder.formats.droid_source import DroidImportConfig  # noqa: E402
from stereovla.dataset_builder.formats.video import VideoWriter  # noqa: E402
from stereovla.dataset_builder.recording.recorder import Recorder, RecordingConfig  # noqa: E402
from stereovla.processing.rotations import matrix_to_rpy, rpy_to_matrix  # noqa: E402
from stereovla.simulation import WorldConfig  # noqa: E402

SERIAL, SIZE, FPS = "23404442", 96, 15
# pose of our tool frame in the frame that the arm reports: fingertips 12 cm below a flange that looks down
TOOL = [0.0, 0.0, 0.12, np.pi, 0.0, 0.25]


def transform(position, rpy) -> np.ndarray:
    result = np.eye(4)
    result[:3, :3], result[:3, 3] = rpy_to_matrix(rpy), position
    return result


@pytest.fixture(scope="module")
def simulated():
    recorder = Recorder(WorldConfig(image_size=SIZE), RecordingConfig(camera_per_frame=False, relabel=0.0))
    rows, _ = recorder.episode(0, "train", 0)
    recorder.close()
    table = shards.rows_to_table(rows).to_pylist()
    return [shards.decode_row(row) for row in table]


def write_episode(folder: Path, rows: list, uuid: str, task: str = "") -> None:
    """One episode as DROID stores it: metadata, trajectory.h5, a side-by-side mp4."""
    (folder / "recordings/MP4").mkdir(parents=True)
    rate = 1000 / FPS
    flange = [
        transform(row["observation.state"][:3], row["observation.state"][3:6])
        @ np.linalg.inv(transform(TOOL[:3], TOOL[3:]))
        for row in rows
    ]
    poses = np.array([[*pose[:3, 3], *matrix_to_rpy(pose[:3, :3])] for pose in flange])
    camera = np.array(rows[0]["calibration.transform_camera_to_base"], dtype=np.float64)
    extrinsics = np.array([*camera[:3, 3], *matrix_to_rpy(camera[:3, :3])])
    with h5py.File(folder / "trajectory.h5", "w") as file:
        file["observation/robot_state/cartesian_position"] = poses
        file["observation/robot_state/gripper_position"] = 1 - np.array([row["observation.state"][6] for row in rows])
        file["action/gripper_position"] = np.array([float(row["action"][6] < 0) for row in rows])
        file[f"observation/camera_extrinsics/{SERIAL}_left"] = np.tile(extrinsics, (len(rows), 1))
        times = 1_700_000_000_000 + np.round(np.arange(len(rows)) * rate).astype(np.int64)
        file[f"observation/timestamp/cameras/{SERIAL}_estimated_capture"] = times
    metadata = {"uuid": uuid, "success": True, "current_task": task, "trajectory_length": len(rows)}
    metadata |= {"ext1_cam_serial": SERIAL, "ext1_cam_extrinsics": extrinsics.tolist(), "wrist_cam_serial": "1"}
    (folder / f"metadata_{uuid}.json").write_text(json.dumps(metadata))
    with av.open(str(folder / f"recordings/MP4/{SERIAL}-stereo.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=60, options={"crf": "14"})
        stream.width, stream.height, stream.pix_fmt = 2 * SIZE, SIZE, "yuv420p"
        for row in rows:
            image = np.concatenate([row["observation.images.left"], row["observation.images.right"]], axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def raw(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("droid_raw")
    write_episode(folder / "LAB/success/2023-05-01/Mon_May__1_10:00:00_2023", simulated, "LAB+a+1")
    write_episode(folder / "LAB/success/2023-05-01/Mon_May__1_11:00:00_2023", simulated[:12], "LAB+a+2", "unused")
    (folder / "aggregated-annotations-030724.json").write_text(
        json.dumps({f"LAB+a+{n}": {"language_instruction1": f"task {n}", "language_instruction2": "x"} for n in (1, 2)})
    )
    return folder


def command(source: Path, folder: Path, simulated: list, annotated: bool = True, **changes) -> list[str]:
    row = simulated[0]
    calibration = {
        "size_px": [SIZE, SIZE],
        "focal_length_px": row["calibration.focal_length_px"].tolist(),
        "principal_point_px": row["calibration.principal_point_px"].tolist(),
        "baseline_m": float(row["calibration.baseline_m"]),
        "transform_camera_to_base": "recorded",
    }
    rig = {"embodiment": "droid", "license": "cc-by-4.0", "cameras": {"stereo": "ext1"}, "tool": TOOL}
    (folder / "rig.yaml").write_text(yaml.safe_dump({**rig, "calibration": calibration, **changes}))
    annotations = ["--annotations", str(source / "aggregated-annotations-030724.json")] if annotated else []
    out = ["--config", str(folder / "rig.yaml"), "--out", str(folder / "out")]
    return ["import", "droid", "--source", str(source), *out, *annotations]


def test_every_value_of_an_episode_is_imported(raw, simulated, tmp_path):
    assert main(command(raw, tmp_path, simulated)) == 0
    rows = list(shards.read_rows(tmp_path / "out" / shards.shard_path("train", 0, 1)))
    assert [row["task"] for row in rows] == ["task 1"] * len(simulated) + ["task 2"] * 12
    for number, (row, wanted) in enumerate(zip(rows, simulated, strict=False)):
        schema.validate_row(row)
        np.testing.assert_allclose(row["observation.state"][:3], wanted["observation.state"][:3], atol=1e-6)
        np.testing.assert_allclose(
            rpy_to_matrix(row["observation.state"][3:6]), rpy_to_matrix(wanted["observation.state"][3:6]), atol=1e-6
        )
        assert row["observation.state"][6] == pytest.approx(wanted["observation.state"][6], abs=1e-6)
        after = simulated[min(number + 1, len(simulated) - 1)]["observation.state"]
        now = wanted["observation.state"]
        np.testing.assert_allclose(row["action"][:3], after[:3] - now[:3], atol=1e-6)
        np.testing.assert_allclose(
            rpy_to_matrix(row["action"][3:6]) @ rpy_to_matrix(now[3:6]), rpy_to_matrix(after[3:6]), atol=1e-6
        )
        assert row["action"][6] == (-1 if wanted["action"][6] < 0 else 1)
        assert row["timestamp"] == pytest.approx(number / FPS, abs=1e-3)
        for key in schema.CALIBRATION_KEYS:
            np.testing.assert_allclose(row[f"calibration.{key}"], wanted[f"calibration.{key}"], atol=1e-6)
        for side in ("left", "right"):
            image = f"observation.images.{side}"
            assert np.abs(row[image].astype(float) - wanted[image]).mean() < 4
    info = shards.read_json(tmp_path / "out/meta/info.json")
    assert info["fps"] == FPS and info["source"]["format"] == "DROID raw"
    closing = next(n for n, row in enumerate(simulated) if row["action"][6] < 0)
    np.testing.assert_array_equal(rows[0]["keyframe_pose"], rows[closing]["observation.state"])
    assert main(["check", str(tmp_path / "out")]) == 0


def test_one_view_and_further_ones_are_imported(raw, simulated, tmp_path, capsys):
    """The left half of a stereo video, or a video of the left view alone; without a calibration, and with one."""
    source = shutil.copytree(raw, tmp_path / "raw")
    for folder in (path.parent for path in source.rglob("trajectory.h5")):
        rows = simulated if "10:00" in folder.name else simulated[:12]
        with VideoWriter(folder / "recordings/MP4/1.mp4", FPS, (SIZE, SIZE), "libx264", 14) as writer:
            for row in rows:
                writer.write(row["observation.images.right"])
    mono = command(source, tmp_path, simulated, cameras={"left": "ext1", "hand": "wrist"}, calibration=None)
    assert main(mono) == 0
    assert "2 cameras (left, hand), but no right view: StereoVLA cannot train on it" in capsys.readouterr().out
    rows = list(shards.read_rows(tmp_path / "out" / shards.shard_path("train", 0, 1)))
    assert len(rows) == len(simulated) + 12
    for row, wanted in zip(rows, simulated, strict=False):
        schema.validate_row(row)
        for ours, theirs in (("left", "left"), ("hand", "right")):
            ours, theirs = row[f"observation.images.{ours}"], wanted[f"observation.images.{theirs}"]
            assert ours.shape == theirs.shape and np.abs(ours.astype(float) - theirs).mean() < 4
        assert not {schema.RIGHT, *schema.CALIBRATION} & set(row)
    (tmp_path / "three").mkdir()
    three = command(source, tmp_path / "three", simulated, cameras={"stereo": "ext1", "hand": "wrist"})
    assert main(three) == 0
    row = next(shards.read_rows(tmp_path / "three/out" / shards.shard_path("train", 0, 1)))
    assert schema.views_of(row) == ("left", "right", "hand") and schema.BASELINE in row
    assert main(["check", str(tmp_path / "three/out")]) == 0
    for path in source.rglob("1.mp4"):
        path.unlink()
    shutil.rmtree(tmp_path / "out")
    assert main(mono) == 1 and "recordings/MP4/1-stereo.mp4 is missing" in capsys.readouterr().out


def test_extrinsics_of_the_metadata_and_the_task_of_the_metadata(raw, simulated, tmp_path, capsys):
    source = shutil.copytree(raw, tmp_path / "raw")
    for path in source.rglob("trajectory.h5"):
        with h5py.File(path, "a") as file:
            del file["observation/camera_extrinsics"]
    assert main([*command(source, tmp_path, simulated, annotated=False), "--skip-bad-episodes"]) == 0
    (row, *_) = shards.read_rows(tmp_path / "out" / shards.shard_path("train", 0, 1))
    assert row["task"] == "unused"  # the first episode's metadata names no task, so it is left out
    np.testing.assert_allclose(
        row["calibration.transform_camera_to_base"], simulated[0]["calibration.transform_camera_to_base"], atol=1e-6
    )
    dropped = shards.read_json(tmp_path / "out/meta/info.json")["dropped"]
    assert list(dropped) == ["LAB/success/2023-05-01/Mon_May__1_10:00:00_2023"]
    assert dropped.popitem()[1][0] == "frame 0: there is no instruction"


def drop_frames(folder: Path) -> None:
    with h5py.File(folder / "trajectory.h5", "a") as file:
        for name in list(_datasets(file)):
            values = file[name][:-2]
            del file[name]
            file[name] = values


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def add_row(folder: Path) -> None:
    """One more row, for which there is no picture."""
    with h5py.File(folder / "trajectory.h5", "a") as file:
        for name in _datasets(file):
            values = file[name][()]
            step = values[-1] - values[-2] if "timestamp" in name else 0
            del file[name]
            file[name] = np.concatenate([values, values[-1:] + step])
    set_metadata("trajectory_length", 13)(folder)


def test_frames_that_only_trajectory_or_video_has_are_cut_if_asked_and_counted(raw, simulated, tmp_path, capsys):
    source = shutil.copytree(raw, tmp_path / "raw")
    long, short = (f"LAB/success/2023-05-01/Mon_May__1_1{hour}:00:00_2023" for hour in (1, 0))
    add_row(source / long)  # issue 54 of droid: the video is a frame short
    count = len(simulated)
    drop_frames(source / short)
    set_metadata("trajectory_length", count - 2)(source / short)  # here the trajectory is two short
    arguments = command(source, tmp_path, simulated)
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"{long}: frame 12: {SERIAL}-stereo.mp4 has 12 frames, the data 13; --cut_frames 1 leaves out" in printed
    assert f"{short}: frame {count - 2}: {SERIAL}-stereo.mp4 has {count} frames, the data {count - 2}; --cut" in printed
    assert main([*arguments, "--cut_frames", "1"]) == 1  # two are more than one
    printed = capsys.readouterr().out
    assert long not in printed and short in printed
    assert main([*arguments, "--cut_frames", "2"]) == 0
    assert f"{long}: 1 frames at the end left out" in capsys.readouterr().out
    info = shards.read_json(tmp_path / "out/meta/info.json")
    assert info["cut_frames"] == {short: 2, long: 1} and info["dropped"] == {}
    assert info["splits"]["train"]["frames"] == count - 2 + 12
    rows = list(shards.read_rows(tmp_path / "out" / shards.shard_path("train", 0, 1)))
    for row, wanted in zip(rows, [*simulated[: count - 2], *simulated[:12]], strict=True):
        np.testing.assert_allclose(row["observation.state"][:3], wanted["observation.state"][:3], atol=1e-6)
        assert np.abs(row["observation.images.left"].astype(float) - wanted["observation.images.left"]).mean() < 4
    assert f"{long}: 1 frames at the end" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ValueError, match="cut_frames=-1 must not be negative"):
        DroidImportConfig(source="a", config="b", out="c", cut_frames=-1)


def set_data(name: str, place, value):
    def change(folder: Path) -> None:
        with h5py.File(folder / "trajectory.h5", "a") as file:
            file[name][place] = value

    return change


def set_metadata(key: str, value):
    def change(folder: Path) -> None:
        (path,) = folder.glob("metadata_*.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


def write(text: str):
    def change(folder: Path) -> None:
        (path,) = folder.glob("metadata_*.json")
        path.write_text(text)

    return change


def replace_data(name: str, values: np.ndarray):
    def change(folder: Path) -> None:
        with h5py.File(folder / "trajectory.h5", "a") as file:
            del file[name]
            file[name] = values

    return change


def remove(pattern: str):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (drop_frames, "frame 10: 23404442-stereo.mp4 has 12 frames, the data 10"),
        (set_metadata("trajectory_length", 40), "trajectory.h5 has 12 frames, the metadata says 40"),
        (set_metadata("success", False), "the metadata says that the demonstration failed"),
        (set_metadata("ext1_cam_serial", "9"), "trajectory.h5 cannot be read"),
        (set_metadata("uuid", "LAB+b+9"), "frame 0: there is no instruction"),
        (set_data("observation/robot_state/cartesian_position", (4, 2), np.nan), "frame 4: the state is ["),
        (
            set_data(f"observation/timestamp/cameras/{SERIAL}_estimated_capture", 5, 1_700_000_000_000),
            "frame 5: the timestamp does not rise",
        ),
        (set_data("observation/robot_state/gripper_position", 3, 1.5), "frame 3: the state's gripper is 1.5"),
        (remove("recordings/MP4/*"), "recordings/MP4/23404442-stereo.mp4 is missing"),
        (remove("trajectory.h5"), "trajectory.h5 cannot be read"),
        (set_metadata("ext1_cam_serial", [1]), "ext1_cam_serial of the metadata is [1]"),
        (set_metadata("uuid", ["a"]), "frame 0: there is no instruction"),
        (write("[1, 2]"), "metadata_LAB+a+2.json is [1, 2], expected keys and values"),
        (
            replace_data("observation/robot_state/cartesian_position", np.zeros((12, 7))),
            "observation/robot_state/cartesian_position of trajectory.h5 is <HDF5 dataset",
        ),
        (
            replace_data("action/gripper_position", np.array(["a"] * 12, dtype=object)),
            "action/gripper_position of trajectory.h5 is <HDF5 dataset",
        ),
        (replace_data("observation/robot_state", np.zeros(3)), "trajectory.h5 cannot be read"),
        (remove("metadata_*"), "there are 0 files metadata_*.json, expected one"),
    ],
)
def test_damage_is_named_with_episode_and_frame(raw, simulated, tmp_path, capsys, damage, expected):
    source = shutil.copytree(raw, tmp_path / "raw")
    bad = "LAB/success/2023-05-01/Mon_May__1_11:00:00_2023"
    damage(source / bad)
    arguments = command(source, tmp_path, simulated)
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"{bad}: {expected}" in printed, printed
    assert "1 of 2 episodes have problems; nothing was imported" in printed
    assert main([*arguments, "--skip-bad-episodes"]) == 0
    assert list(shards.read_json(tmp_path / "out/meta/info.json")["dropped"]) == [bad]


def test_an_instruction_that_is_no_text_is_named(raw, simulated, tmp_path, capsys):
    source = shutil.copytree(raw, tmp_path / "raw")
    for path in source.rglob("metadata_*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"current_task": 7}))
    assert main(command(source, tmp_path, simulated, annotated=False)) == 1
    assert "11:00:00_2023: the instruction is 7, expected text" in capsys.readouterr().out


@pytest.mark.slow
def test_mutated_metadata_gives_an_error_in_words_or_the_same_rows(raw, simulated, tmp_path, capsys):
    """200 times one value of an episode's metadata, or of the annotations, is gone, renamed or odd."""
    episode = "LAB/success/2023-05-01/Mon_May__1_11:00:00_2023"
    small = tmp_path / "small"
    shutil.copytree(raw / episode, small / episode)
    shutil.copy(raw / "aggregated-annotations-030724.json", small)
    assert main([*command(small, tmp_path, simulated), "--cut_frames", "1"]) == 0
    name = shards.shard_path("train", 0, 1)
    expected = (tmp_path / "out" / name).read_bytes()
    rng, counts = np.random.default_rng(21), {0: 0, 1: 0, 2: 0}
    for number in range(200):
        source = shutil.copytree(small, tmp_path / "mutated/source")
        (path,) = source.glob("*.json" if number % 4 == 0 else f"{episode}/metadata_*.json")
        content = json.loads(path.read_text())
        mutate(content, rng)
        path.write_text(json.dumps(content))
        capsys.readouterr()
        status = main([*command(source, tmp_path / "mutated", simulated), "--cut_frames", "1"])
        said = capsys.readouterr()
        counts[status] += 1
        entry = content.get("LAB+a+2")
        text = entry.get("language_instruction1") if isinstance(entry, dict) else "task 2"
        if status == 0 and text != "task 2":  # another instruction is one
            assert {row["task"] for row in shards.read_rows(tmp_path / "mutated/out" / name)} == {text}
        elif status == 0:
            assert (tmp_path / "mutated/out" / name).read_bytes() == expected, (number, path.read_text())
        else:
            assert "error: " in said.err or "nothing was imported" in said.out, (number, said)
        shutil.rmtree(tmp_path / "mutated")
    print(f"200 mutated files: {counts[0]} imported alike, {counts[1] + counts[2]} refused in words")
    assert counts[0] > 20 and counts[1] > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": {"left": "a", "right": "b"}}, "DROID needs {stereo: one of wrist, ext1, ext2}"),
        ({"state": {"column": "x"}}, "leave state, action and parts_px out"),
    ],
)
def test_rigs_that_do_not_fit_are_named(raw, simulated, tmp_path, capsys, changes, message):
    assert main(command(raw, tmp_path, simulated, **changes)) == 2
    assert message in capsys.readouterr().err
