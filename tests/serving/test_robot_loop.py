"""The loop that drives a robot: a real server in virtual time, a recording that is a dataset, what ends a run."""

import threading
import time
from concurrent.futures import Executor, Future

import numpy as np
import pytest
from command_lines import data as main
from serving_thread import policy_server, serve_in_thread
from tiny_checkpoint import EMBODIMENT, save_tiny_checkpoint, stereo_pair

from stereovla.serving.client import PolicyClient, PolicyError
from stereovla.serving.executor import ChunkExecutor, ExecutorOptions
from stereovla.serving.limits import PoseLimits
from stereovla.serving.motion import PoseMotion
from stereovla.serving.recording import EpisodeRecorder
from stereovla.serving.robot_loop import RobotLoop, Sensed
from stereovla.sources import load_checkpoint

WORDS, STATE = "pick up the red cube", np.array([0.5, 0.0, 0.2, 0.0, 0.0, 0.0, 1.0])
SPEED = 0.2  # m/s


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return load_checkpoint(str(save_tiny_checkpoint(tmp_path_factory.mktemp("model"))))


@pytest.fixture
def served(parts):
    url, stop = serve_in_thread(policy_server(parts))
    yield url
    stop()


class VirtualTime:
    """A clock that moves when somebody sleeps."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class LateAnswers(Executor):
    """Asks at once; the answer is done when `latency_s` of virtual time has passed."""

    def __init__(self, clock: VirtualTime, latency_s: float):
        self.clock, self.latency_s = clock, latency_s

    def submit(self, call, *arguments):
        clock, due_s = self.clock, self.clock.now_s + self.latency_s

        class Late(Future):
            def done(self) -> bool:
                return clock.now_s >= due_s - 1e-9

        future = Late()
        try:
            future.set_result(call(*arguments))
        except PolicyError as error:
            future.set_exception(error)
        return future


class Arm:
    """Is where it was told to be; what it was told, and when it was stopped."""

    def __init__(self):
        self.state, self.told, self.stops, self.seen = STATE.copy(), [], 0, 0
        self.left, self.right = stereo_pair()

    def observe(self) -> Sensed:
        self.seen += 1
        return Sensed(self.state.copy(), {"left": self.left, "right": self.right}, fresh=self.seen % 4 != 3)

    def command(self, target, seconds) -> None:
        assert seconds == pytest.approx(0.05) and self.stops == 0
        self.told.append(target)
        self.state = np.concatenate([target[:6], [1.0 if target[6] > 0 else 0.0]])

    def stop(self) -> None:
        self.stops += 1


def executor(mode: str = "real_time", **options) -> ChunkExecutor:
    limits = PoseLimits(speed_m_s=SPEED, workspace_m=([0.3, -0.3, 0.05], [0.7, 0.3, 0.4]))
    return ChunkExecutor(PoseMotion(limits=limits), ExecutorOptions(mode, control_hz=20, **options))


@pytest.mark.parametrize("mode", ["synchronous", "real_time"])
def test_an_episode_is_executed_and_recorded(served, tmp_path, mode):
    clock, arm, said = VirtualTime(), Arm(), []
    with PolicyClient(served) as client:
        calibration = {
            "size_px": [64, 64],
            "focal_length_px": [80.0, 80.0],
            "principal_point_px": [32.0, 32.0],
            "baseline_m": 0.06,
            "transform_camera_to_base": [[0, 0, 1, -0.3], [-1, 0, 0, 0], [0, -1, 0, 0.2], [0, 0, 0, 1]],
        }
        names = client.metadata["embodiments"][EMBODIMENT]["state_names"]
        arms = executor(mode)
        recorder = EpisodeRecorder(tmp_path / "rollouts", EMBODIMENT, names, arms.motion, 10, calibration)
        loop = RobotLoop(
            client, arm, arms, EMBODIMENT, recorder, clock=clock, sleep=clock.sleep, pool=LateAnswers(clock, 0.12)
        )
        client.reset(seed=0)
        counts = loop.run(WORDS, 3.0, outcome=lambda: True, say=said.append)
    assert counts["commands"] == len(arm.told) == 60 and arm.stops == 1 and counts["late"] == 0
    assert counts["chunks"] > 2 and counts["lost"] == 0 and arms.expected_delay_s == pytest.approx(0.15)
    way = np.diff([STATE[:3], *(target[:3] for target in arm.told)], axis=0)
    assert np.linalg.norm(way, axis=1).max() <= SPEED * 0.05 + 1e-8
    # three periods before each answer: of an arm that goes on meanwhile, before the first
    assert counts["hold"] == 3 if mode == "real_time" else counts["hold"] >= 3 * counts["chunks"]
    assert counts["speed"] > 0 and any(line.startswith("speed: ") for line in said)
    out = tmp_path / "out"
    done = ["import", "rollouts", "--source", str(tmp_path / "rollouts"), "--license", "mit", "--out", str(out)]
    assert main(done) == 0 and main(["check", str(out)]) == 0
    lines = (tmp_path / "rollouts/episode_000000/steps.jsonl").read_text().splitlines()
    assert len(lines) == 30


def test_lost_answers_are_asked_again_and_a_server_that_is_gone_ends_the_run(served):
    clock, arm, said = VirtualTime(), Arm(), []
    with PolicyClient(served) as client:
        numbers, plain = iter(range(1, 10_000)), client.predict

        def predict(*given, **more):
            if (number := next(numbers)) in (2, 3) or number > 8:
                raise PolicyError("lost", "the cable was pulled")
            return plain(*given, **more)

        client.predict = predict
        loop = RobotLoop(
            client,
            arm,
            executor(watchdog_s=0.5),
            EMBODIMENT,
            give_up_s=1.0,
            clock=clock,
            sleep=clock.sleep,
            pool=LateAnswers(clock, 0.05),
        )
        with pytest.raises(PolicyError, match="nothing to execute for 1 s; stopped: no fresh chunk") as error:
            loop.run(WORDS, 60.0, say=said.append)
    assert error.value.kind == "timeout" and arm.stops == 1
    counts = loop.executor.counts
    assert counts["chunks"] == 6 and counts["lost"] > 10 and counts["stopped"] > 0
    assert any("lost: the cable was pulled" in line for line in said)


def test_what_cannot_be_mended_by_asking_again_ends_the_run(served):
    clock, arm = VirtualTime(), Arm()
    with PolicyClient(served) as client:
        loop = RobotLoop(
            client, arm, executor(), "no_such_robot", clock=clock, sleep=clock.sleep, pool=LateAnswers(clock, 0.05)
        )
        with pytest.raises(PolicyError, match="invalid_input: unknown embodiment 'no_such_robot'"):
            loop.run(WORDS, 60.0)
        assert arm.stops == 1
        broken = Arm()
        broken.command = lambda *_: 1 / 0
        with pytest.raises(ZeroDivisionError):
            RobotLoop(client, broken, executor(), EMBODIMENT).run(WORDS, 1.0)
        assert broken.stops == 1
        with pytest.raises(ValueError, match="outcome is missing"):
            RobotLoop(client, arm, executor(), EMBODIMENT, recorder=object()).run(WORDS, 1.0)
        with pytest.raises(ValueError, match="seconds is 0; it must be above 0"):
            RobotLoop(client, arm, executor(), EMBODIMENT).run(WORDS, 0)


def test_the_policy_is_told_the_states_of_its_steps(served):
    """Four states 0.1 s apart, of an arm that is asked every 0.05 s."""
    clock, arm, told = VirtualTime(), Arm(), []
    with PolicyClient(served) as client:
        assert client.metadata["state_history"] == 4
        plain = client.predict
        client.predict = lambda *given, **more: told.append(given[3]) or plain(*given, **more)
        loop = RobotLoop(
            client, arm, executor(), EMBODIMENT, clock=clock, sleep=clock.sleep, pool=LateAnswers(clock, 0.05)
        )
        loop.run(WORDS, 2.0, say=lambda _: None)
    where = np.array([STATE[:6], *(target[:6] for target in arm.told)])  # at the begin of each period
    assert len(told) > 3 and (told[0] == told[0][0]).all()
    for states in told[1:]:
        (now,) = np.flatnonzero(np.abs(where - states[-1][:6]).max(axis=1) < 1e-9)[-1:]
        for back in range(4):
            np.testing.assert_allclose(states[3 - back][:6], where[max(0, now - 2 * back)], atol=1e-9)


def test_in_real_time_the_arm_is_told_something_whatever_comes(served):
    """A thread of its own asks a real server by the real clock: only what does not depend on how fast this is."""
    arm = Arm()
    with PolicyClient(served) as client:
        counts = RobotLoop(client, arm, executor(), EMBODIMENT).run(WORDS, 0.6, say=lambda _: None)
        assert counts["commands"] == len(arm.told) > 0 and arm.stops == 1
        way = np.diff([STATE[:3], *(target[:3] for target in arm.told)], axis=0)
        assert np.linalg.norm(way, axis=1).max() <= SPEED * 0.05 + 1e-8
        end = time.monotonic() + 60
        while (left := [t for t in threading.enumerate() if t.name.startswith("policy")]) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left
