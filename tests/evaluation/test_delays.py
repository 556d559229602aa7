"""Rollouts with a policy that answers late: what an arm executes when, by hand; the command, its table, going on."""

import json

import numpy as np
import pytest

pytest.importorskip("mujoco")

from tiny_checkpoint import save_tiny_checkpoint  # noqa: E402

from stereovla.__main__ import main  # noqa: E402
from stereovla.evaluation.delays import DelayedArm, Delivery, deliveries  # noqa: E402
from stereovla.evaluation.options import DelayOptions  # noqa: E402
from stereovla.evaluation.policies import ExpertPolicy  # noqa: E402
from stereovla.evaluation.rollouts import RolloutConfig, run_episodes  # noqa: E402
from stereovla.serving.executor import MODES  # noqa: E402
from stereovla.simulation import WorldConfig  # noqa: E402
from stereovla.simulation.robot import POSE  # noqa: E402

WORLD = WorldConfig(image_size=64)
STATE = np.array([0.4, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0])


def along_x(step_m: float) -> np.ndarray:
    return np.tile([step_m, 0, 0, 0, 0, 0, 1.0], (8, 1))


def executed(
    delivery: Delivery, requests: int, horizon: int = 3, seed: int = 0
) -> tuple[list[list[float]], DelayedArm]:
    """How far along x an arm that follows exactly is moved in each period, between the requests; each chunk moves as
    many cm per step as its number.
    """
    arm, state = DelayedArm(delivery, POSE, horizon, seed), STATE.copy()
    arm.begin(state)
    moves: list[list[float]] = []
    for number in range(1, requests + 1):
        moves.append([])
        for action in arm.actions(along_x(0.01 * number), lambda: state):
            moves[-1].append(round(100 * action[0], 6))
            state[0] += action[0]
    return moves, arm


def test_a_synchronous_arm_waits_in_every_chunk():
    moves, arm = executed(Delivery("synchronous", 0.2), 3)
    assert moves == [[0, 0, 1, 1, 1], [0, 0, 2, 2, 2], [0, 0, 3, 3, 3]]
    assert arm.executor.counts["hold"] == 6


@pytest.mark.parametrize("mode", ["asynchronous", "real_time"])
def test_an_asynchronous_arm_waits_for_the_first_alone(mode):
    moves, arm = executed(Delivery(mode, 0.2), 4)
    # the first is asked at 0 s and there at 0.2 s; from 0.3 s on the horizon of 3 steps counts. The second continues
    # from where the arm was when it was asked: at its third step it is a cm of 2 steps ahead of the first chunk's way
    assert moves[0] == [0, 0, 1] and moves[1] == [1, 1, 4] and moves[2] == [2, 2, 5]
    assert arm.executor.counts["hold"] == 2 and arm.executor.expected_delay_s == pytest.approx(0.2)


def test_jitter_is_drawn_from_the_seed_alone():
    first, second, other = (executed(Delivery("asynchronous", 0.3, 0.3), 8, seed=seed)[0] for seed in (1, 1, 2))
    assert first == second != other


def test_no_request_leaves_without_a_picture():
    whole, some = (executed(Delivery("asynchronous", 0.0, dropped_frames=share), 12)[0] for share in (0.0, 0.5))
    assert [len(moves) for moves in whole] == [3] * 12
    assert {len(moves) for moves in some} > {3} and min(len(moves) for moves in some) == 3


def test_a_restart_loses_what_waits_and_the_arm_goes_on_afterwards():
    moves, arm = executed(Delivery("asynchronous", 0.2, restart_s=1.0), 8, seed=4)
    counts = arm.executor.counts
    assert 0 < arm._away_s < 1 and counts["lost"] >= 10  # every period of the second in which it is away, one asks
    assert counts["hold"] > 2 and counts["chunks"] >= 6
    assert sum(len(found) for found in moves) > 10


def test_without_latency_an_episode_is_the_undelayed_one():
    """The scripted expert, which sees the world: with chunks that are executed as ways, step for step."""
    plain = RolloutConfig(WORLD, execution_horizon=2, max_steps=60)
    delayed = RolloutConfig(WORLD, execution_horizon=2, max_steps=60, delivery=Delivery("synchronous"))
    found = [list(run_episodes(ExpertPolicy(), iter([3, 4]), config, 2)) for config in (plain, delayed)]
    for one, other in zip(*found, strict=True):
        assert one["success"] and other["success"] and abs(one["steps"] - other["steps"]) <= 1
        assert other["executor"]["commands"] == other["steps"] and "executor" not in one


def test_an_episode_depends_on_its_seed_alone():
    config = RolloutConfig(WORLD, 3, 30, delivery=Delivery("real_time", 0.3, 0.2, 0.2, 0.5))
    together = {r["seed"]: r for r in run_episodes(ExpertPolicy(), iter([5, 6, 7]), config, 3)}
    alone = {r["seed"]: r for r in run_episodes(ExpertPolicy(), iter([7, 6]), config, 1)}
    assert together[6] == alone[6] and together[7] == alone[7]


def test_the_command_measures_every_mode_and_goes_on(tmp_path, capsys):
    model = save_tiny_checkpoint(tmp_path / "first/model")
    other = save_tiny_checkpoint(tmp_path / "second/model")  # where `stereovla train` leaves them
    out = tmp_path / "out"
    command = ["evaluate", "delays", "--preset", "tiny", "--models", str(model), str(other), "--out", str(out)]
    command += ["--latencies_ms", "300"]
    assert main(command) == 0
    rows = json.loads((out / "delays.json").read_text())
    assert [row["mode"] for row in rows[::4]] == ["synchronous", "asynchronous", "real_time", "real_time"]
    assert len(rows) == 16 and {row["episodes"] for row in rows} == {1} and (out / "delays.png").stat().st_size > 10_000
    asked = [row["delivery"] for row in rows[:4]]
    assert asked == [f"synchronous-{kind}" for kind in ("300ms", "jitter", "dropped", "restart")]
    assert rows[0]["held_share"] == pytest.approx(5 / 8)  # of 8 periods the arm moved in 3
    (log,) = (out / "delays/first--model/synchronous-300ms").glob("episodes.jsonl")
    before = log.read_bytes()
    capsys.readouterr()
    assert main(command) == 0
    assert log.read_bytes() == before and json.loads((out / "delays.json").read_text()) == rows
    assert main([*command, "--execution_horizon", "4"]) != 0
    assert "execution_horizon was 3 and is now 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "fast"}, "mode is 'fast'; valid: synchronous"),
        ({"latency_s": 0.1, "jitter_s": 0.2}, r"jitter_s is 0.2; it must be in \[0, latency_s\]"),
        ({"dropped_frames": 1.0}, "dropped_frames is 1.0"),
        ({"restart_s": -1.0}, "restart_s -1.0"),
    ],
)
def test_deliveries_that_cannot_be(values, words):
    with pytest.raises(ValueError, match=words):
        Delivery(**values)


def test_the_conditions_of_a_table():
    options = DelayOptions(out="x", models=["y"], latencies_ms=[0, 500], disturbed_ms=100, jitter_ms=50)
    found = deliveries(options, MODES)
    assert len(found) == 15 and found["real_time-500ms"] == Delivery("real_time", 0.5)
    assert found["asynchronous-jitter"] == Delivery("asynchronous", 0.1, 0.05)
    for given, words in (({"models": []}, "--models is missing"), ({"latencies_ms": []}, "--latencies_ms is empty")):
        with pytest.raises(ValueError, match=words):
            DelayOptions(**{"out": "x", "models": ["y"], **given})
