"""Rollouts on the robot's computer become a dataset: every number, success and failure apart, and it trains."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")

from command_lines import data as main  # noqa: E402

from stereovla.dataset_builder.dataset import schema, shards  # noqa: E402
from stereovla.dataset_builder.streaming.window_stream import WindowStream  # noqa: E402
from stereovla.serving.motion import PoseMotion, VectorMotion  # noqa: E402
from stereovla.serving.recording import EpisodeRecorder, ask_outcome  # noqa: E402
from stereovla.simulation import Expert, World, WorldConfig  # noqa: E402
from stereovla.simulation.robot import POSE  # noqa: E402

SIZE, STEPS = 96, 10


def record(folder: Path, seeds: list[int], outcomes: list[bool | None]) -> list[list[dict]]:
    """Episodes of the expert; what was seen and executed in each step."""
    world, found = World(WorldConfig(image_size=SIZE)), []
    for seed, success in zip(seeds, outcomes, strict=True):
        world.reset(seed)
        expert, motion, target, steps = Expert(world), PoseMotion(POSE), None, []
        seen = world.observe()
        calibration = {"size_px": [SIZE, SIZE], **seen["calibration"]}
        recorder = EpisodeRecorder(folder, "franka_panda", POSE, motion, 10, calibration, {"model": "expert"})
        recorder.begin(world.instruction)
        for step in range(STEPS):
            seen, state = world.observe(), world.state()
            recorder.add(0.1 * step, state, {"left": seen["left"], "right": seen["right"]}, target)
            action = expert.plan(1)[0][0]
            target = motion.targets(state, action[None])[0]
            steps.append({**seen, "state": state, "action": action, "task": world.instruction})
            world.step(action)
        if success is None:
            recorder.discard()
        else:
            recorder.end(success, target)
            found.append(steps)
    world.close()
    return found


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    return folder, record(folder, [3, 4, 5, 6], [True, None, False, True])


def imported(source: Path, out: Path, *more: str) -> int:
    return main(["import", "rollouts", "--source", str(source), "--license", "mit", "--out", str(out), *more])


def test_every_number_arrives_and_it_trains(rollouts, tmp_path, capsys):
    folder, executed = rollouts
    assert sorted(path.name for path in folder.iterdir()) == ["episode_000000", "episode_000001", "episode_000002"]
    assert imported(folder, tmp_path / "out", "--failures", "split") == 0
    assert main(["check", str(tmp_path / "out")]) == 0, capsys.readouterr().out
    rows = list(shards.read_rows(tmp_path / "out" / shards.shard_path("train", 0, 1)))
    assert len(rows) == 2 * STEPS
    for row, step in zip(rows, executed[0] + executed[2], strict=True):
        schema.validate_row(row)
        np.testing.assert_allclose(row["observation.state"], step["state"], atol=1e-5)
        np.testing.assert_allclose(row["action"], step["action"], atol=2e-5)
        assert row["task"] == step["task"] and row["embodiment"] == "franka_panda"
        for view in ("left", "right"):
            difference = row[f"observation.images.{view}"].astype(int) - step[view].astype(int)
            assert np.abs(difference).mean() < 3
        for key, value in step["calibration"].items():
            np.testing.assert_allclose(row[f"calibration.{key}"], value, atol=1e-5)
    failed = list(shards.read_rows(tmp_path / "out" / shards.shard_path("failure", 0, 1)))
    assert {row["task"] for row in failed} == {executed[1][0]["task"]} and len(failed) == STEPS
    stream = WindowStream(
        str(tmp_path / "out"), chunk_size=4, mixture={"action": 1.0}, depth_map_share=0.0, epochs=1, lanes=2
    )
    assert sum(1 for window in stream if window["actions"].shape == (4, 7)) == 2 * STEPS


def test_failures_are_left_out_unless_asked_for(rollouts, tmp_path):
    folder, executed = rollouts
    assert imported(folder, tmp_path / "out") == 0
    info = json.loads((tmp_path / "out/meta/info.json").read_text())
    assert set(info["splits"]) == {"train"} and info["splits"]["train"]["episodes"] == 2
    assert main(["check", str(tmp_path / "out")]) == 0


def test_a_file_states_what_is_to_be_otherwise(rollouts, tmp_path):
    folder, _ = rollouts
    (tmp_path / "rig.yaml").write_text("embodiment: my_arm\nresize_px: [64, 64]\n")
    assert imported(folder, tmp_path / "out", "--config", str(tmp_path / "rig.yaml")) == 0
    row = next(iter(shards.read_rows(tmp_path / "out" / shards.shard_path("train", 0, 1))))
    assert row["embodiment"] == "my_arm" and row["observation.images.left"].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "left/000004.jpg").unlink(), "left/000004.jpg cannot be read"),
        (lambda folder: (folder / "left/000004.jpg").write_bytes(b"GIF89a"), "left/000004.jpg cannot be read"),
        (lambda folder: (folder / "steps.jsonl").write_text("{}\n"), "line 0 of steps.jsonl has no timestamp"),
        (lambda folder: (folder / "steps.jsonl").write_text(""), "steps.jsonl is empty"),
        (lambda folder: cut(folder / "steps.jsonl"), "steps.jsonl has 9 lines, episode.json says 10 steps"),
        (lambda folder: change(folder, steps="ten"), "steps of episode.json is 'ten', expected a int"),
        (lambda folder: change(folder, format="other"), "no header of 'stereovla rollout 1'"),
        (lambda folder: change(folder, rate_hz=5.0), "rate_hz is 5.0, that of the first episode 10.0"),
        (lambda folder: change(folder, calibration={}), "the calibration has no focal_length_px; it has nothing"),
        (lambda folder: (folder / "episode.json").write_text("{"), "episode.json cannot be read"),
    ],
)
def test_damage_is_named(rollouts, tmp_path, capsys, damage, words):
    shutil.copytree(rollouts[0], tmp_path / "rollouts")
    damage(tmp_path / "rollouts/episode_000002")
    assert imported(tmp_path / "rollouts", tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "episode_000002: " in said and words in said, said
    assert imported(tmp_path / "rollouts", tmp_path / "out", "--skip_bad_episodes") == 0


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change(folder: Path, **values) -> None:
    header = json.loads((folder / "episode.json").read_text())
    (folder / "episode.json").write_text(json.dumps(header | values))


def test_a_robot_with_numbers_of_its_own_is_taken_as_it_is(tmp_path):
    recorder = EpisodeRecorder(tmp_path / "rollouts", "two_arms", [], VectorMotion(3), 10)
    recorder.begin("fold the towel")
    view = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for step in range(4):
        target = None if step == 0 else np.full(3, step / 10)
        recorder.add(step / 10, np.full(5, step), {"left": view}, target)
    assert recorder.end(True, np.full(3, 0.4)).name == "episode_000000"
    assert imported(tmp_path / "rollouts", tmp_path / "out") == 0
    rows = list(shards.read_rows(tmp_path / "out" / shards.shard_path("train", 0, 1)))
    np.testing.assert_allclose(
        [row["action"] for row in rows], np.repeat([[0.1], [0.2], [0.3], [0.4]], 3, 1), atol=1e-6
    )
    assert [row["state_is_pose"] for row in rows] == [False] * 4


def test_what_is_not_finished_is_no_episode(tmp_path):
    recorder = EpisodeRecorder(tmp_path, "arm", POSE, PoseMotion(POSE), 10)
    with pytest.raises(ValueError, match="no episode has begun"):
        recorder.add(0.0, np.zeros(7), {}, None)
    recorder.begin("pick it up")
    with pytest.raises(ValueError, match="is not finished"):
        recorder.begin("again")
    with pytest.raises(ValueError, match="no episode with a step"):
        recorder.end(True, np.zeros(7))
    view = np.zeros((8, 8, 3), np.uint8)
    recorder.add(0.0, np.zeros(7), {"left": view}, None)
    with pytest.raises(ValueError, match="say what the arm was told"):
        recorder.add(0.1, np.zeros(7), {"left": view}, None)
    with pytest.raises(ValueError, match="step 1 has the views"):
        recorder.add(0.1, np.zeros(7), {"left": view[:4]}, np.zeros(7))
    other = EpisodeRecorder(tmp_path, "arm", POSE, PoseMotion(POSE), 10)
    other.begin("beside what was killed")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".episode_000000", ".episode_000001"]
    with pytest.raises(ValueError, match="the instruction is empty"):
        EpisodeRecorder(tmp_path, "arm", POSE, PoseMotion(POSE), 10).begin(" ")
    with pytest.raises(TypeError):
        EpisodeRecorder(tmp_path, "arm", POSE, PoseMotion(POSE), 10, about={"model": object()})


def test_a_key_says_what_became_of_it():
    keys = iter(["", "x", "S", "f", "d "])
    assert [ask_outcome(lambda _: next(keys)) for _ in range(3)] == [True, False, None]
