"""The whole way, each step the command that a person gives: data, training, the Hub, a server from the Hub's id, a
robot that is driven by it and records, and training on what was recorded.
"""

import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import pytest
import torch
from hub_client import environment
from hub_server import serve
from safetensors.torch import load_file

from stereovla.serving.client import PolicyClient
from stereovla.serving.executor import ChunkExecutor, ExecutorOptions
from stereovla.serving.limits import PoseLimits
from stereovla.serving.motion import PoseMotion
from stereovla.serving.recording import EpisodeRecorder
from stereovla.serving.robot_loop import RobotLoop, Sensed

pytest.importorskip("mujoco")

ROOT = Path(__file__).parents[1]
NAME, ROBOT, SIZE = "someone/policy", "franka_panda", 64


def command(environ: dict, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stereovla", *words], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-1500:]}{done.stderr[-3000:]}"


class AtOnce(Executor):
    """Answers are there when they are asked for."""

    def submit(self, call, *arguments):
        future: Future = Future()
        future.set_result(call(*arguments))
        return future


class Simulated:
    """A robot in the simulator; its clock is that of the world, so that nothing depends on how fast this machine is."""

    def __init__(self, world, motion):
        self.world, self.motion, self.now_s = world, motion, 0.0

    def observe(self) -> Sensed:
        seen = self.world.observe()
        return Sensed(self.world.state(), {"left": seen["left"], "right": seen["right"]})

    def command(self, target, seconds) -> None:
        self.world.step(self.motion.actions(self.world.state(), target[None])[0])

    def stop(self) -> None:
        pass

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    from stereovla.simulation import World, WorldConfig

    with serve() as hub:
        environ = environment(hub.url, tmp_path / "home") | {"MUJOCO_GL": os.environ.get("MUJOCO_GL", "egl")}
        data, run, again = (str(tmp_path / name) for name in ("data", "run", "again"))
        command(environ, "data", "build", "--preset", "tiny", "--out", data, "--image_size", str(SIZE))
        small = [
            "--preset",
            "tiny",
            "--steps",
            "2",
            "--batch_size",
            "2",
            "--validation_batches",
            "0",
            "--tracker",
            "none",
        ]
        small += ["--pool_episodes", "1", "--warmup_steps", "1"]
        command(environ, "train", *small, "--dataset", data, "--output_dir", run, "--max_delay", "3")
        command(environ, "push", "--folder", f"{run}/model", "--repo_id", NAME, "--license", "apache-2.0")
        words = [sys.executable, "-m", "stereovla", "serve", "--model", NAME, "--port", "0"]
        with subprocess.Popen(words, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True) as server:
            try:
                url = next(line.split()[-1] for line in server.stdout if line.startswith("serving "))
                with PolicyClient(url) as client:
                    assert client.metadata["model"] == NAME and client.metadata["max_delay"] == 3
                    told = client.metadata["embodiments"][ROBOT]
                    motion = PoseMotion(told["state_names"], PoseLimits(speed_m_s=0.3))
                    world = World(WorldConfig(image_size=SIZE))
                    world.reset(0)
                    robot = Simulated(world, motion)
                    camera = {"size_px": [SIZE, SIZE], **world.observe()["calibration"]}
                    recorder = EpisodeRecorder(
                        tmp_path / "rollouts", ROBOT, told["state_names"], motion, told["rate_hz"], camera
                    )
                    executor = ChunkExecutor(motion, ExecutorOptions("real_time", told["rate_hz"]))
                    loop = RobotLoop(
                        client,
                        robot,
                        executor,
                        ROBOT,
                        recorder,
                        clock=lambda: robot.now_s,
                        sleep=robot.sleep,
                        pool=AtOnce(),
                    )
                    # untrained, it does not succeed by itself: whoever watches says so, here to have something to learn
                    counts = loop.run(world.instruction, 2.0, outcome=lambda: True, say=lambda _: None)
                    world.close()
            finally:
                server.terminate()
        assert counts["commands"] == 20 and counts["chunks"] >= 6 and counts["hold"] == 0
        rollouts = str(tmp_path / "out")
        source = str(tmp_path / "rollouts")
        command(environ, "data", "import", "rollouts", "--source", source, "--license", "mit", "--out", rollouts)
        command(environ, "data", "check", rollouts)
        own = ["--model", NAME, "--mixture", "1:0:0:0", "--depth_map_share", "0"]
        command(environ, "train", *small, "--dataset", rollouts, "--output_dir", again, *own)
        before, after = (load_file(f"{folder}/model/model.safetensors") for folder in (run, again))
        name = "action_expert.action_out_proj.weight"
        assert not torch.equal(before[name], after[name])
