"""recording: recorder and build: the same bytes from the same seed, however often the build is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from command_lines import data as main  # noqa: E402
from killed_runs import KILLS, kill_and_start_again  # noqa: E402

from stereovla.command_line import parse  # noqa: E402
from stereovla.dataset_builder.dataset import schema, shards  # noqa: E402
from stereovla.dataset_builder.dataset.folders import PLAN, check_folder, work_folder  # noqa: E402
from stereovla.dataset_builder.recording.build import BuildConfig, build  # noqa: E402
from stereovla.dataset_builder.recording.parts import plan_shards  # noqa: E402
from stereovla.dataset_builder.recording.recorder import (  # noqa: E402
    COLLISION,
    DROPPED,
    FELL,
    FIRST_SEED,
    Recorder,
    RecordingConfig,
    episode_seed,
)
from stereovla.dataset_builder.streaming.mixture import load_meta  # noqa: E402
from stereovla.dataset_builder.streaming.questions import processor_arguments, view_pixels  # noqa: E402
from stereovla.dataset_builder.streaming.window_stream import WindowStream  # noqa: E402
from stereovla.dataset_builder.streaming.windows import WindowPool  # noqa: E402
from stereovla.simulation import Expert, World, WorldConfig  # noqa: E402
from stereovla.training.models import untrained  # noqa: E402

ROOT = Path(__file__).parents[2]
SIZE = 48
EASY = WorldConfig.from_preset("easy", image_size=SIZE)
TINY = ["--preset", "tiny", "--train-episodes", "6", "--image-size", str(SIZE), "--processes", "2", "--seed", "5"]
TINY += ["--world", '{"preset": "easy"}']


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "stereovla", "data", "build", "--out", str(folder), *TINY]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "dataset"
    subprocess.run(command(folder), env=environment(), check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def recorder():
    recorder = Recorder(EASY, RecordingConfig())
    yield recorder
    recorder.close()


def decoded(rows):
    table = shards.rows_to_table(rows)
    return [shards.decode_row(row) for row in table.to_pylist()]


def test_seeds_are_distinct_repeatable_and_never_evaluations():
    seeds = [
        episode_seed(seed, split, index, attempt)
        for seed in (0, 1)
        for split in ("train", "validation", "test")
        for index in range(200)
        for attempt in range(3)
    ]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= FIRST_SEED == 2**32 and max(seeds) < 2**63
    assert episode_seed(3, "train", 7) == episode_seed(3, "train", 7)
    with pytest.raises(ValueError, match="'tran' is not one of train, validation, test"):
        episode_seed(0, "tran", 0)


def test_rows_are_valid_and_continuous(recorder):
    rows, _ = recorder.episode(0, "train", 3)
    rows = decoded(rows)
    for number, row in enumerate(rows):
        schema.validate_row(row)
        assert (row["episode_index"], row["frame_index"]) == (3, number)
        assert row["timestamp"] == pytest.approx(number / 10)
        assert row["task"] == f"pick up the {row['target.name']}"
        assert 1 <= row["action_plan_length"] <= schema.PLAN_LENGTH
        segmentation, box = row["observation.segmentation"], row.get("target.box_left_px")
        if box is not None:
            lines, columns = np.nonzero(segmentation == schema.SEGMENTATION["target"])
            assert [columns.min(), lines.min(), columns.max() + 1, lines.max() + 1] == box.tolist()
        else:
            assert not (segmentation == schema.SEGMENTATION["target"]).any()
    assert len({row["calibration.transform_camera_to_base"].tobytes() for row in rows}) == len(rows)


def test_an_episode_follows_from_its_seed_alone(recorder):
    first, _ = recorder.episode(0, "train", 3)
    recorder.episode(0, "train", 4)
    again, _ = recorder.episode(0, "train", 3)
    assert str(first) == str(again)
    other, _ = recorder.episode(1, "train", 3)
    assert str(first) != str(other)


def test_labels_are_ideal_while_the_rollout_is_disturbed(recorder):
    """The first label is the plan of an undisturbed expert in the same world; the rollout does not follow it."""
    config = RecordingConfig(relabel=0.0, camera_per_frame=False, noise_m=0.02)
    noisy = Recorder(EASY, config)
    strays = []
    for index in range(3):
        rows, failures = noisy.episode(0, "train", index)
        rows = decoded(rows)
        world = World(EASY)
        world.reset(episode_seed(0, "train", index, len(failures)))
        plan, length, keyframe = Expert(world).plan(schema.PLAN_LENGTH)
        np.testing.assert_array_equal(rows[0]["action_plan"], plan)
        np.testing.assert_array_equal(rows[0]["keyframe_pose"], keyframe)
        np.testing.assert_array_equal(rows[0]["observation.state"], world.state())
        world.close()
        strays += [
            np.linalg.norm(after["observation.state"][:3] - before["observation.state"][:3] - before["action"][:3])
            for before, after in zip(rows, rows[1:], strict=False)
        ]
        assert len({row["calibration.transform_camera_to_base"].tobytes() for row in rows}) == 1
        assert len({row["task"] for row in rows}) == 1
    noisy.close()
    assert np.max(strays) > 0.01


def test_without_labels_the_same_episode_is_recorded_with_views_alone(recorder, tmp_path):
    full = decoded(recorder.episode(0, "train", 3)[0])
    bare = Recorder(EASY, RecordingConfig(labels=False))
    encoded, _ = bare.episode(0, "train", 3)
    bare.close()
    labels = {"observation.depth", "observation.segmentation", "target.box_left_px", "target.box_right_px"}
    for row, wanted in zip(decoded(encoded), full, strict=True):
        schema.validate_row(row)
        assert not labels & set(row)
        for key in set(wanted) - labels:
            np.testing.assert_array_equal(row[key], wanted[key], err_msg=key)
    shards.write_shard(tmp_path / shards.shard_path("train", 0, 1), encoded, temporary=tmp_path / "t")
    shards.write_manifest(tmp_path, {"train": [shards.shard_path("train", 0, 1)]})
    options = {"epochs": 1, "lanes": 1, "mixture": {"action": 1}}
    assert len(list(WindowStream(tmp_path, depth_map_share=0.0, **options))) == len(full)
    with pytest.raises(shards.ShardError, match=r"observation\.depth is null; was the data recorded without labels"):
        next(iter(WindowStream(tmp_path, depth_map_share=1.0, **options)))


@pytest.mark.parametrize(("kind", "symmetry"), [("bar", 2), ("cube", 4), ("ball", 2)])
def test_a_frame_says_how_many_grasps_are_as_right(kind, symmetry, tmp_path):
    """Of the object, wherever it lies, until it is held; and the training batch says it on."""
    world = WorldConfig.from_preset("easy", image_size=32, objects=(kind,), any_yaw=True)
    recorder = Recorder(world, RecordingConfig(labels=False))
    rows, _ = recorder.episode(1, "train", 0)
    recorder.close()
    grasping = [row["keyframe_pose"][-1] == 1 for row in rows]
    assert [row["keyframe_symmetry"] for row in rows] == [symmetry if before else 2 for before in grasping]
    assert any(grasping) and not all(grasping)
    pool = WindowPool([shards.rows_to_table(rows)], history=1, chunk=4)
    windows = [pool.window(index) | {"objective": "action"} for index in (0, len(rows) - 1)]
    for window in windows:
        schema.validate_window(window | {"seed": 0})
    limits = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
    statistics = {"franka_panda": dict.fromkeys(("state", "action", "keyframe_pose"), limits)}
    meta = {"stats": statistics, "tasks": ["x"], "fps": 10, "state_dim": 7, "action_dim": 7}
    model, processor = untrained("tiny", meta, turn_symmetry=2)
    batch = processor(**processor_arguments(windows, processor.pixel_views))
    assert batch["equal_turns"].tolist() == [symmetry, 2]
    yaws = [rows[index]["keyframe_pose"][5] - rows[index]["observation.state"][5] for index in (0, len(rows) - 1)]
    # of a tool that tilts a bit
    np.testing.assert_allclose(np.sin(batch["turns"][:, 0] - np.array(yaws)), 0, atol=0.02)
    assert batch["turns"][1].abs() < 0.2  # what is held is not turned
    # a dataset of before has no such column
    old = WindowPool([shards.rows_to_table(rows).drop_columns("keyframe_symmetry")], history=1, chunk=4)
    assert "keyframe_symmetry" not in old.window(0)


def test_a_frame_says_what_every_object_is_called(tmp_path):
    """Each name stands where the simulator projects that object; whatever the frame is relabelled to."""
    seen = {"image_size": 96, "fovy_deg": 40.0, "workspace_extent": (0.26, 0.30)}
    world = WorldConfig.from_preset("easy", tasks=("move",), keyframes=("grasp", "lift", "place"), **seen)
    recorder = Recorder(world, RecordingConfig(relabel=1.0, camera_per_frame=False))
    rows, _ = recorder.episode(3, "train", 0)
    objects = recorder.world.objects
    assert len({row["target.name"] for row in rows}) > 1
    centres = dict(zip([item.name for item in objects], recorder.world.rest_points, strict=True))
    recorder.close()
    pool = WindowPool([shards.rows_to_table(rows)], history=1, chunk=4)
    first, hidden = decoded(rows[:8]), 0
    for index, row in enumerate(first):
        schema.validate_row(row)
        names, middles = pool.objects(index)
        assert names == [row["target.name"], *row["others.names"]] and sorted(names) == sorted(centres)
        np.testing.assert_array_equal(middles[0], pool.window(index)["points"][0])
        keys = ("transform_camera_to_base", "focal_length_px", "principal_point_px")
        camera = [np.asarray(row[f"calibration.{key}"])[None] for key in keys]
        expected = np.stack([view_pixels(centres[name][None], *camera, (96, 96))[0] for name in names])
        for number, middle in enumerate(middles):
            hidden += bool(np.isnan(middle).all())  # by the hand, which may hide a half of one too
            away = np.abs(middle - expected).max(1)
            assert np.isnan(middle).all() or (away.argmin() == number and away.min() < 12), names[number]
    assert hidden < 10  # of 40
    stream = {"mixture": {"action": 1}, "depth_map_share": 0.0, "epochs": 1, "lanes": 1, "shuffle": False}
    shards.write_shard(tmp_path / shards.shard_path("train", 0, 1), rows, temporary=tmp_path / "t")
    shards.write_manifest(tmp_path, {"train": [shards.shard_path("train", 0, 1)]})
    windows = list(WindowStream(tmp_path, names=True, **stream))
    for index, window in enumerate(windows):
        schema.validate_window(window)
        whole, middles = pool.objects(index)
        for called, place in zip(window["names"], window["names_px"], strict=True):
            (number,) = [n for n, name in enumerate(whole) if f" {name}".endswith(f" {called}")]
            np.testing.assert_array_equal(place, middles[number])
    assert {len(name.split()) for window in windows for name in window["names"]} == {1, 2}
    assert "names" not in next(iter(WindowStream(tmp_path, **stream)))
    with pytest.raises(ValueError, match=r"the segmentation has the id 7, but others.names \['one'\] are of ids"):
        schema.validate_row(first[0] | {"others.names": ["one"]})


def test_relabelled_frames_have_another_objects_plan():
    recorder = Recorder(EASY, RecordingConfig(relabel=1.0))
    rows = decoded(recorder.episode(0, "train", 0)[0])
    recorder.close()
    tasks = [row["task"] for row in rows]
    assert len(set(tasks)) > 1
    grasps = {row["task"]: row["keyframe_pose"][:2] for row in rows if row["keyframe_pose"][6] == 1}
    spread = [np.linalg.norm(a - b) for a in grasps.values() for b in grasps.values() if a is not b]
    assert min(spread) > 0.03  # each instruction leads to its own object
    assert rows[-1]["keyframe_pose"][6] == 0 and tasks[-1] == tasks[-2]  # once held, the target is the one that is held


def test_failures_are_replaced_and_counted():
    hurried = Recorder(
        WorldConfig.from_preset("easy", image_size=16),
        RecordingConfig(max_frames=13, noise_m=0.0, push_probability=0.0),
    )
    failures, lengths = [], []
    for index in range(2):
        rows, failed = hurried.episode(0, "train", index)
        failures += failed
        lengths.append(len(rows))
    assert failures and set(failures) == {"not solved in 13 frames"}
    assert max(lengths) <= 13
    hopeless = Recorder(WorldConfig.from_preset("easy", image_size=16), RecordingConfig(max_frames=1))
    with pytest.raises(RuntimeError, match=r"episode 2 of validation failed 20 times \(not solved in 1 frames\)"):
        hopeless.episode(0, "validation", 2)
    blind = Recorder(WorldConfig.from_preset("easy", image_size=16, fovy_deg=3.0), RecordingConfig())
    with pytest.raises(RuntimeError, match="failed 20 times .no camera pose of the range sees all objects"):
        blind.episode(0, "train", 0)
    for recorder in (hurried, hopeless, blind):
        recorder.close()


@pytest.mark.parametrize("task", ["stack", "move"])
def test_placing_is_recorded_with_its_keyframes_and_relabelled_tasks(task):
    world = WorldConfig(tasks=task, image_size=32)
    recorder = Recorder(world, RecordingConfig(relabel=0.6, noise_m=0.005, push_probability=0.0))
    rows, _ = recorder.episode(1, "train", 0)
    tasks = {task.instruction for task in recorder.world.tasks}
    final = recorder.world.instruction
    recorder.close()
    rows = decoded(rows)
    for row in rows:
        schema.validate_row(row)
    assert {row["task"] for row in rows} <= tasks and len({row["task"] for row in rows}) > 1
    assert rows[-1]["task"] == final
    held = [row["keyframe_pose"][6] for row in rows]
    assert held[0] == 1.0 and held[-1] == 0.0


def test_destinations_are_on_what_the_target_is_put_onto():
    """The pixel of each frame against the mask of the destination, and none for another task than the episode's."""
    world = WorldConfig(tasks="stack", image_size=128, support_share=0.0, object_scale=(1.1, 1.1), table_height_m=0.0)
    recorder = Recorder(world, RecordingConfig(relabel=0.5, noise_m=0.004, push_probability=0.0))
    hits, relabelled = [], 0
    for index in range(6):
        rows, _ = recorder.episode(3, "train", index)
        final, destination = recorder.world.instruction, recorder.world.task.destination
        # 4 and above are the other objects in their order
        others = [number for number in range(len(recorder.world.objects)) if number != recorder.world.target_index]
        label = 4 + others.index(destination)
        pool = WindowPool([shards.rows_to_table(rows)], history=1, chunk=4)
        for number, row in enumerate(decoded(rows)):
            pixel = pool.window(number)["points"][2]
            if row["task"] != final:
                relabelled += 1
                assert np.isnan(pixel).all()
            elif number < 5:
                u, v = pixel.astype(int)
                around = row["observation.segmentation"][v - 2 : v + 3, u - 2 : u + 3]  # a bowl is held by its rim
                hits.append(label in around)
    picks = Recorder(EASY, RecordingConfig())
    pool = WindowPool([shards.rows_to_table(picks.episode(0, "train", 1)[0])], history=1, chunk=4)
    assert all(np.isnan(pool.window(number)["points"][2]).all() for number in range(pool.size))
    for one in (recorder, picks):
        one.close()
    assert relabelled and np.mean(hits) == 1.0


def test_data_show_how_to_go_on_after_a_missed_grasp():
    config = {"relabel": 0.0, "noise_m": 0.0, "push_probability": 0.0, "camera_per_frame": False, "labels": False}
    shown = []
    for chance in (0.0, 0.2):
        recorder = Recorder(EASY, RecordingConfig(miss_probability=chance, **config))
        rows = [row for index in range(6) for row in decoded(recorder.episode(0, "train", index)[0])]
        recorder.close()
        states = np.stack([row["observation.state"] for row in rows])
        # fingers that are shut hold nothing: every object of the world is thicker
        empty = np.flatnonzero(states[:, -1] < 0.05)
        shown.append(len(empty))
        assert all(rows[number]["action"][-1] == 1.0 and rows[number]["keyframe_pose"][-1] == 1.0 for number in empty)
    assert shown[0] == 0 and shown[1] > 10
    with pytest.raises(ValueError, match=r"miss_probability=1.2 must be in \[0, 1\]"):
        RecordingConfig(miss_probability=1.2)


def test_reasons_of_failures():
    """Each by what brings it about: a hand that sweeps the table, and one that lets go on the way."""
    world = WorldConfig(tasks="move", image_size=16)

    class Sweeping(Recorder):
        def _disturbed(self, action, spread, rng):
            other = self.world.object_pose(1)[0] - self.world.state()[:3]
            return np.array([*other / max(1.0, np.linalg.norm(other) / 0.05), 0, 0, 0, -1.0])

    class LettingGo(Recorder):
        def _disturbed(self, action, spread, rng):
            return np.array([*action[:6], 1.0 if self.world.lift_m > 0.05 else action[6]])

    class Throwing(Recorder):
        def _disturbed(self, action, spread, rng):
            away = np.array([0.0, 0.08, 0.01, 0, 0, 0, -1.0 if self.world.object_pose()[0][1] < 0.62 else 1.0])
            return away if self.world.held and self.world.lift_m > 0.05 else action

    config = RecordingConfig(relabel=0.0, camera_per_frame=False, max_frames=60)
    for kind, reason in ((Sweeping, COLLISION), (LettingGo, DROPPED), (Throwing, FELL)):
        recorder = kind(world, config)
        reasons = {recorder._attempt(episode_seed(0, "train", index), "train", index)[1] for index in range(3)}
        recorder.close()
        assert reason in reasons, (kind, reasons)


def test_shards_are_fixed_ranges():
    config = BuildConfig(out="x", train_episodes=7, validation_episodes=2, episodes_per_shard=3)
    assert [(task.path.name, list(task.episodes)) for task in plan_shards(config.content())] == [
        ("train-00000-of-00003.parquet", [0, 1, 2]),
        ("train-00001-of-00003.parquet", [3, 4, 5]),
        ("train-00002-of-00003.parquet", [6]),
        ("validation-00000-of-00001.parquet", [0, 1]),
    ]


def test_built_dataset_is_whole_and_streams(dataset, capsys):
    assert main(["check", str(dataset)]) == 0
    assert "is whole" in capsys.readouterr().out
    meta = load_meta(dataset)
    assert meta["fps"] == 10 and list(meta["stats"]) == ["franka_panda"]
    assert set(meta["stats"]["franka_panda"]) == {"action", "keyframe_pose", "state"}
    seen = list(WindowStream(dataset, epochs=1))
    assert len(seen) == meta["splits"]["train"]["frames"]
    assert len({window["episode_index"] for window in seen}) == meta["splits"]["train"]["episodes"] == 6
    assert {window["task"] for window in seen} <= set(meta["tasks"])
    for window in seen:
        schema.validate_window(window)
    assert len(list(WindowStream(dataset, "validation", epochs=1))) == meta["splits"]["validation"]["frames"]
    assert not (dataset / ".partial").exists()


def test_episodes_do_not_depend_on_shards_or_processes(dataset, recorder):
    rows, _ = recorder.episode(5, "train", 3)
    table = shards.read_table(dataset / shards.shard_path("train", 1, 3))
    stored = [row for row in table.to_pylist() if row["episode_index"] == 3]
    assert [row["observation.images.left"]["bytes"] for row in stored] == [
        row["observation.images.left"] for row in rows
    ]


def _kill_when(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 600
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def _run_killed(dataset: Path, folder: Path, conditions) -> None:
    for condition in conditions:
        process = subprocess.Popen(command(folder), env=environment(), stderr=subprocess.DEVNULL)
        _kill_when(process, condition)
        if (folder / "data").exists():  # what is there is whole
            assert all(shards.open_shard(path) for path in (folder / "data").glob("*.parquet"))
    subprocess.run(command(folder), env=environment(), check=True, capture_output=True)
    assert contents(folder) == contents(dataset)


def test_killed_build_goes_on_to_the_same_bytes(dataset, tmp_path):
    folder = tmp_path / "dataset"
    _run_killed(dataset, folder, [lambda: any(folder.glob("data/*.parquet"))])


@pytest.mark.slow
def test_build_killed_while_it_writes_ends_in_the_same_bytes(dataset, tmp_path):
    folder = tmp_path / "dataset"
    moments = [
        lambda: any(folder.glob(".partial/*/*.parquet.*")),
        lambda: len(list(folder.glob("data/*"))) >= 2,
        lambda: (folder / "meta/stats.json").exists(),
        lambda: (folder / "README.md").exists(),
    ]
    _run_killed(dataset, folder, moments)


@pytest.mark.slow
def test_build_killed_at_random_moments_ends_in_the_same_bytes(tmp_path):
    """Of the building process and the two that record for it; one kill in five hits a single one."""

    def start(folder: Path, log: Path) -> subprocess.Popen:
        with log.open("w") as file:
            return subprocess.Popen(command(folder), env=environment(), stdout=file, stderr=file)

    def check(folder: Path) -> None:
        if (folder / PLAN).exists():
            shards.read_json(folder / PLAN)
        for path in folder.glob("data/*.parquet"):
            shards.read_table(path)  # what is there is whole
        if (folder / shards.MANIFEST).exists():
            assert main(["check", str(folder)]) == 0

    kill_and_start_again(tmp_path, start, str(PLAN), check, contents, kills=KILLS, seed=0, alone=0.2)


def test_finished_dataset_is_left_alone(dataset):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.parquet")}
    build(parse(BuildConfig, "build", ["--out", str(dataset), *TINY]))
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*.parquet")} == before


def test_other_options_in_the_same_folder_are_refused(dataset, tmp_path, capsys):
    assert main(["build", "--out", str(dataset), *TINY, "--noise-m", "0.001"]) == 2
    assert "noise_m was 0.012, now 0.001" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["build", "--out", str(tmp_path), *TINY]) == 2
    assert "holds no dataset of ours" in capsys.readouterr().err


def test_build_killed_before_its_plan_was_written_can_begin(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/.build.json.tmp").write_text("{")
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial/lock").touch()
    check_folder(tmp_path, {})
    (tmp_path / "meta/other.json").touch()
    with pytest.raises(ValueError, match="no dataset of ours"):
        check_folder(tmp_path, {})


def test_two_builds_of_one_folder_are_kept_apart(tmp_path):
    with work_folder(tmp_path, "0-of-1"), pytest.raises(RuntimeError, match="another process is building"):
        build(parse(BuildConfig, "build", ["--out", str(tmp_path), *TINY]))


def test_options_come_from_preset_then_command_line():
    config = parse(
        BuildConfig, "build", ["--out", "x", "--preset", "tiny", "--image-size", "96", "--no-camera-per-frame"]
    )
    assert (config.train_episodes, config.image_size, config.camera_per_frame) == (4, 96, False)
    assert parse(BuildConfig, "build", ["--out", "x"]).train_episodes == 480
    world = parse(
        BuildConfig, "build", ["--out", "x", "--world", '{"table_height_m": [0, 0.1], "fovy_deg": 50}']
    ).world_config()
    assert world.table_height_m == (0, 0.1) and world.fovy_deg == (50, 50) and world.image_size == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "{"], "is no JSON"),
        (["--world", "[1]"], "must be a JSON object, such as"),
        (["--world", '{"table_height_m": "hi"}'], "an option of the world has a value of another kind"),
        (["--world", '{"fovydeg": 50}'], "did you mean 'fovy_deg'"),
        (["--world", '{"preset": "eazy"}'], "did you mean 'easy'"),
        (["--world", '{"image_size": 50}'], "option of its own"),
        (["--camera-range", "smal"], "did you mean 'small'"),
        (["--train-episodes", "0"], "train_episodes=0 must be at least 1"),
        (["--relabel", "1.5"], "relabel=1.5"),
        (["--noise-m", "-1"], "noise_m=-1.0"),
    ],
)
def test_wrong_options_are_named(arguments, message, capsys):
    assert main(["build", "--out", "never-made", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("never-made").exists()


def test_unknown_preset_and_command_are_named(capsys):
    assert main(["build", "--out", "x", "--preset", "dmeo"]) == 2
    assert "'dmeo' is not one of tiny, demo" in capsys.readouterr().err
    assert main(["biuld"]) == 2
    assert main(["build"]) == 2
    assert "--out is empty" in capsys.readouterr().err
    assert main(["check", "nowhere"]) == 2


def test_truncated_shard_is_named_by_check(dataset, tmp_path, capsys):
    import shutil

    folder = shutil.copytree(dataset, tmp_path / "copy")
    path = folder / "data/train-00002-of-00003.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    assert main(["check", str(folder)]) == 1
    assert f"data/{path.name}: truncated, {size // 2} of {size} bytes" in capsys.readouterr().out


def test_recording_processes_do_not_import_torch():
    """Which takes three seconds of each, as long as recording a small shard."""
    program = "import sys, stereovla.dataset_builder.recording.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_readers_do_not_need_the_simulator(fresh):
    script = (
        "import sys; sys.modules['mujoco'] = None; sys.modules['stereovla.simulation'] = None\n"
        "from stereovla.dataset_builder.dataset import card, statistics\n"
        "from stereovla.dataset_builder.streaming import questions, window_stream"
    )
    fresh.run(script)


def test_manifest_counts(dataset):
    manifest = json.loads((dataset / shards.MANIFEST).read_text())
    assert [entry["episodes"] for entry in manifest["shards"]] == [2, 2, 2, 2]
    assert all(shards.sha256(dataset / entry["path"]) == entry["sha256"] for entry in manifest["shards"])
