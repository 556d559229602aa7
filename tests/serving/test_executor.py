"""The chunk executor: every command of small cases by hand, in every mode; what it refuses, counts and stops."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stereovla.serving.executor import ChunkExecutor, ExecutorOptions
from stereovla.serving.gripper import Gripper
from stereovla.serving.limits import PoseLimits
from stereovla.serving.motion import PoseMotion, VectorMotion

STATE = np.array([0.4, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0])


def chunk(step_m: float, length: int = 8, gripper: float = 1.0) -> np.ndarray:
    """Along x, by `step_m` in every step."""
    return np.tile([step_m, 0, 0, 0, 0, 0, gripper], (length, 1))


def made(mode: str, limits: PoseLimits | None = None, gripper: Gripper | None = None, **options) -> ChunkExecutor:
    return ChunkExecutor(PoseMotion(limits=limits), ExecutorOptions(mode, **options), gripper)


def moved(state: np.ndarray, x: float) -> np.ndarray:
    return np.concatenate([[state[0] + x], state[1:]])


def test_a_synchronous_arm_waits_for_each_chunk_and_skips_nothing_of_it():
    arm, x = made("synchronous", horizon=3), []
    first = arm.request(0.0, STATE)
    for now in (0.0, 0.1):
        command = arm.tick(now, STATE)
        assert command.holds and not command.stopped
        x.append(command.target[0])
    assert arm.deliver(first, chunk(0.01), 0.2) == ""
    for now in (0.2, 0.3, 0.4):
        assert not arm.wants(now)
        x.append(arm.tick(now, STATE).target[0])
    assert arm.wants(0.5)
    second = arm.request(0.5, moved(STATE, 0.03))
    assert second.running_actions is None
    x.append(arm.tick(0.5, STATE).target[0])
    arm.deliver(second, chunk(0.02), 0.6)
    x += [arm.tick(now, STATE).target[0] for now in (0.6, 0.7, 0.8, 0.9)]
    expected = [0.4, 0.4, 0.41, 0.42, 0.43, 0.43, 0.45, 0.47, 0.49, 0.49]
    np.testing.assert_allclose(x, expected, atol=1e-12)
    assert arm.counts["hold"] == 4 and arm.counts["commands"] == 10 and arm.counts["chunks"] == 2


@pytest.mark.parametrize("mode", ["asynchronous", "real_time"])
def test_an_asynchronous_arm_moves_on_and_skips_what_was_executed(mode):
    arm = made(mode, horizon=3)
    arm.deliver(arm.request(0.0, STATE), chunk(0.01), 0.0)
    x = [arm.tick(now, STATE).target[0] for now in (0.0, 0.1, 0.2)]
    assert arm.wants(0.3)
    # the controller has left 2 mm behind: the chunk is the way from there
    asked = arm.request(0.3, moved(STATE, 0.028))
    x += [arm.tick(now, STATE).target[0] for now in (0.3, 0.4)]
    assert not arm.wants(0.5)
    arm.deliver(asked, chunk(0.02), 0.5)
    x += [arm.tick(now, STATE).target[0] for now in (0.5, 0.6)]
    expected = [0.41, 0.42, 0.43, 0.44, 0.45, 0.428 + 0.06, 0.428 + 0.08]
    np.testing.assert_allclose(x, expected, atol=1e-12)
    assert arm.counts["hold"] == 0 and arm.wants(0.6) and arm.expected_delay_s == pytest.approx(0.2)


def test_the_rest_of_the_chunk_is_told_with_the_measured_delay():
    arm = made("real_time", horizon=3, first_delay_s=0.15)
    first = arm.request(0.0, STATE)
    assert first.running_actions is None and first.delay == 0
    actions = chunk(0.01)
    actions[:, 6] = np.linspace(-1, 1, 8)
    arm.deliver(first, actions, 0.0)
    for now in (0.0, 0.1, 0.2):
        arm.tick(now, STATE)
    arm._delays_s.append(0.15)
    asked = arm.request(0.3, moved(STATE, 0.028))
    assert asked.delay == 2  # the longest of 0 and 0.15 s, in whole steps of 0.1 s
    # what the controller left behind is made up for in the first
    expected = actions[3:].copy()
    expected[0, 0] = 0.012
    np.testing.assert_allclose(asked.running_actions, expected, atol=1e-7)
    assert made("asynchronous")._rest(0.0) is None


def test_a_delay_is_not_longer_than_what_is_left():
    arm = made("real_time", horizon=3)
    arm.deliver(arm.request(0.0, STATE), chunk(0.01, length=4), 0.0)
    arm._delays_s.append(0.9)
    for now in (0.0, 0.1, 0.2):
        arm.tick(now, STATE)
    asked = arm.request(0.3, STATE)
    assert asked.delay == len(asked.running_actions) == 1


def test_what_the_arm_waited_is_not_skipped():
    """The chunk ended before its follower came: of 5 periods the arm moved in 3, and 3 steps are skipped."""
    arm = made("asynchronous", horizon=1, watchdog_s=5)
    arm.deliver(arm.request(0.0, STATE), chunk(0.01, length=4), 0.0)
    arm.tick(0.0, STATE)
    asked = arm.request(0.1, moved(STATE, 0.01))
    holds = [arm.tick(now, STATE).holds for now in (0.1, 0.2, 0.3, 0.4, 0.5)]
    assert holds == [False] * 3 + [True] * 2
    arm.deliver(asked, chunk(0.02), 0.6)
    assert arm.tick(0.6, STATE).target[0] == pytest.approx(0.41 + 0.02 * 4)


@pytest.mark.parametrize("control_hz", [10, 20, 50, 1000])
def test_a_faster_controller_gets_what_lies_between(control_hz):
    arm = made("synchronous", horizon=3, control_hz=control_hz)
    actions = chunk(0.01)
    actions[1] = [0, 0.03, 0, 0, 0, 0.2, -1]
    arm.deliver(arm.request(0.0, STATE), actions, 0.0)
    count = 3 * control_hz // 10
    commands = [arm.tick(n / control_hz, STATE) for n in range(count)]
    assert not any(command.holds for command in commands) and arm.tick(0.3, STATE).holds
    found = np.array([command.target for command in commands])
    steps = (np.arange(count) + 1) / (control_hz / 10)
    np.testing.assert_allclose(found[:, 0], 0.4 + np.interp(steps, [0, 1, 2, 3], [0, 0.01, 0.01, 0.02]), atol=1e-9)
    np.testing.assert_allclose(found[:, 1], np.interp(steps, [0, 1, 2, 3], [0, 0, 0.03, 0.03]), atol=1e-9)
    np.testing.assert_allclose(found[:, 5], np.interp(steps, [0, 1, 2, 3], [0, 0, 0.2, 0.2]), atol=1e-9)
    np.testing.assert_array_equal(found[:, 6], np.where((steps > 1 + 1e-9) & (steps < 2 + 1e-9), -1, 1))


def test_a_slower_arm_arrives_later_and_closes_its_gripper_there():
    limits = PoseLimits(speed_m_s=0.05)
    arm = made("synchronous", limits, horizon=3)
    actions = chunk(0.01, length=3)
    actions[2] = [0, 0, 0, 0, 0, 0, -1]
    arm.deliver(arm.request(0.0, STATE), actions, 0.0)
    commands = [arm.tick(n / 10, STATE) for n in range(6)]
    np.testing.assert_allclose([c.target[0] for c in commands[:5]], [0.405, 0.41, 0.415, 0.42, 0.42], atol=1e-12)
    assert [c.target[6] for c in commands] == [1, 1, 1, 1, -1, -1] and commands[5].holds
    assert arm.counts["speed"] == 3 and "at most 0.05 m/s" in commands[0].notes[0]


def test_a_chunk_that_is_asked_for_meanwhile_begins_as_much_later():
    arm = made("asynchronous", PoseLimits(speed_m_s=0.05), horizon=1)
    arm.deliver(arm.request(0.0, STATE), chunk(0.01), 0.0)
    arm.tick(0.0, STATE)
    asked = arm.request(0.1, STATE)
    for now in (0.1, 0.2):
        arm.tick(now, STATE)
    assert asked.waited_s == pytest.approx(0.1)  # half of each period


def test_a_gripper_that_does_not_chatter():
    gripper = Gripper(dwell_s=0.3)
    found = [gripper.update(value, n / 10) for n, value in enumerate([0.2, 0.9, 0.0, -0.4, -0.9, -0.9, 0.9, 0.9, 0.9])]
    assert [command for command, _ in found] == [0.2, 1, 1, 1, -1, -1, -1, 1, 1]
    assert [bool(note) for _, note in found] == [False] * 6 + [True] + [False] * 2
    own = Gripper(0.2, 0.8, closed=0.0, opened=0.08)
    assert [own.update(value, 0.0)[0] for value in (0.9, 0.5, 0.1, 0.5)] == [0.08, 0.08, 0.0, 0.0]
    for wrong in ({"close_below": 1.0, "open_above": 0.0}, {"dwell_s": -1}):
        with pytest.raises(ValueError, match="it must"):
            Gripper(**wrong)
    arm = made("synchronous", gripper=Gripper(dwell_s=10))
    actions = chunk(0.0)
    actions[1, 6] = -1
    arm.deliver(arm.request(0.0, STATE), actions, 0.0)
    commands = [arm.tick(n / 10, STATE) for n in range(2)]
    assert commands[1].target[6] == 1 and "gripper: changed 0.10 s ago" in commands[1].notes[0]
    assert arm.counts["gripper"] == 1


def test_the_watchdog_stops_an_arm_whose_chunk_is_old_where_it_is():
    arm = made("asynchronous", horizon=1, watchdog_s=0.35)
    arm.deliver(arm.request(0.0, STATE), chunk(0.01), 0.0)
    commands = [arm.tick(n / 10, moved(STATE, 0.01 * n - 0.003)) for n in range(6)]
    assert [c.stopped for c in commands] == [False] * 4 + [True] * 2
    # where the arm was at 0.4 s, although the chunk has steps left
    np.testing.assert_allclose([c.target[0] for c in commands[4:]], 0.4 + 0.04 - 0.003, atol=1e-12)
    assert arm.counts["stopped"] == 2 and arm.wants(0.6)
    asked = arm.request(0.6, moved(STATE, 0.037))
    assert asked.running_actions is None
    arm.tick(0.6, STATE)
    arm.deliver(asked, chunk(0.01), 0.7)
    command = arm.tick(0.7, STATE)
    assert not command.stopped and command.target[0] == pytest.approx(0.447)


def test_a_chunk_that_is_refused_leaves_the_present_one_running():
    arm = made("asynchronous", PoseLimits(step_m=0.05), horizon=1)
    arm.deliver(arm.request(0.0, STATE), chunk(0.01), 0.0)
    arm.tick(0.0, STATE)
    bad = chunk(0.01)
    bad[3, 1] = np.nan
    for actions, words in (
        (chunk(0.06), "action 0 moves the tool by 0.060 m, at most 0.05 m"),
        (bad, "action 3 has nan as number 1"),
        (chunk(0.01)[:, :6], r"shape \(8, 6\); expected \(n, 7\)"),
        (chunk(0.01, length=0), r"shape \(0, 7\)"),
    ):
        with pytest.raises(AssertionError, match=words):
            assert arm.deliver(arm.request(0.1, STATE), actions, 0.1) == ""
    assert arm.counts["refused"] == 4 and arm.told.startswith("the chunk has shape")
    assert arm.tick(0.1, STATE).target[0] == pytest.approx(0.42)


def test_answers_that_come_too_late_or_never():
    arm = made("asynchronous", horizon=1, watchdog_s=9)
    arm.deliver(arm.request(0.0, STATE), chunk(0.01, length=20), 0.0)
    arm.tick(0.0, STATE)
    asked = arm.request(0.1, STATE)
    with pytest.raises(ValueError, match="the request of 0.1 s has no answer yet"):
        arm.request(0.2, STATE)
    for n in range(1, 9):
        arm.tick(n / 10, STATE)
    assert "took 0.80 s, after which nothing of it is left" in arm.deliver(asked, chunk(0.01), 0.9)
    lost = arm.request(0.9, STATE)
    arm.lose(lost)
    with pytest.raises(ValueError, match="not the one that waits"):
        arm.deliver(lost, chunk(0.01), 1.0)
    assert (arm.counts["outdated"], arm.counts["lost"], arm.counts["chunks"]) == (1, 1, 1)


def test_episodes_are_apart_but_for_the_measured_delays():
    arm = made("real_time")
    arm.deliver(arm.request(0.0, STATE), chunk(0.01), 0.2)
    arm.tick(0.2, STATE)
    arm.reset()
    assert arm.expected_delay_s == pytest.approx(0.2) and not arm.counts and arm.wants(0.0)
    assert arm.tick(5.0, moved(STATE, 0.1)).target[0] == pytest.approx(0.5)


def test_joint_angles_are_executed_alike():
    arm = ChunkExecutor(VectorMotion(3), ExecutorOptions("asynchronous", control_hz=20))
    arm.deliver(arm.request(0.0, np.zeros(3)), np.array([[0.1, 0, 0], [0.1, 0.2, 0]]), 0.0)
    found = [arm.tick(n / 20, np.zeros(3)).target for n in range(4)]
    np.testing.assert_allclose(found, [[0.05, 0, 0], [0.1, 0, 0], [0.1, 0.1, 0], [0.1, 0.2, 0]], atol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_whatever_comes_when_no_command_leaps_or_leaves_the_workspace(data):
    """Random delays, losses, chunks and modes: every command is within reach of the one before, and one is given."""
    mode = data.draw(st.sampled_from(["synchronous", "asynchronous", "real_time"]))
    control_hz = data.draw(st.sampled_from([10.0, 25.0, 40.0]))
    limits = PoseLimits(0.3, 2.0, 0.2, 1.0, ([0.3, -0.1, 0.1], [0.5, 0.1, 0.3]))
    arm = made(mode, limits, horizon=data.draw(st.integers(1, 5)), control_hz=control_hz)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    state, waiting, last = STATE.copy(), None, STATE[:3]
    for n in range(60):
        now = n / control_hz
        if waiting is not None and now >= waiting[1]:
            if random.random() < 0.2:
                arm.lose(waiting[0])
            else:
                actions = random.normal(size=(8, 7)) * [0.04, 0.04, 0.04, 0.2, 0.2, 0.2, 1]
                arm.deliver(waiting[0], actions, now)
            waiting = None
        if arm.wants(now):
            waiting = (arm.request(now, state), now + random.uniform(0, 0.6))
            left = waiting[0].running_actions
            assert left is None or (mode == "real_time" and 0 <= waiting[0].delay <= len(left) <= 8)
        command = arm.tick(now, state)
        assert np.isfinite(command.target).all()
        assert np.linalg.norm(command.target[:3] - last) <= 0.3 / control_hz + 1e-8
        assert (command.target[:3] >= [0.3, -0.1, 0.1]).all() and (command.target[:3] <= [0.5, 0.1, 0.3]).all()
        last, state = command.target[:3], np.concatenate([command.target[:6], [1.0]])
    assert arm.counts["commands"] == 60
    answered = arm.counts["chunks"] + arm.counts["lost"] + arm.counts["refused"] + arm.counts["outdated"]
    assert arm.counts["requests"] == answered + (waiting is not None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "fast"}, "mode is 'fast'; valid: synchronous, asynchronous, real_time"),
        ({"horizon": 0}, "horizon is 0"),
        ({"control_hz": 5.0}, "must not be slower"),
        ({"watchdog_s": 0.2}, "watchdog_s is 0.2; it must be longer than the 0.3 s of 3 steps"),
        ({"first_delay_s": -1.0}, "first_delay_s is -1.0"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        ExecutorOptions(**options)


def test_a_robot_computer_needs_no_torch():
    program = (
        "import sys, stereovla.serving.executor, stereovla.serving.client; "
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"
