"""Trainings that are killed at random moments, start-up included, and started again by the same command, end in the
same bits as one that nobody stopped; docs/reliability.md has the figures.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from synthetic_dataset import write_finished_dataset
from training_runs import ENVIRONMENT, ROOT, arguments, losses

from stereovla.training.checkpoint_folders import checkpoints, damage

KILLS = int(os.environ.get("STEREOVLA_KILLS", "100"))  # of each number of processes
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configs/ddp.yaml", "--num_processes", "2"]
STARTS = {1: [], 2: [*LAUNCH, "--main_process_port", "0"]}


def start(processes: int, dataset: Path, output: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, *STARTS[processes], "train.py", *arguments(str(dataset), output)]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def kill(process: subprocess.Popen, alone: bool, rng: np.random.Generator) -> None:
    """SIGKILL for a training and all of its processes, or for one of these `alone`, after which the launcher ends the
    others; returns once none is left.
    """
    leader = psutil.Process(process.pid)
    leader.suspend()  # it is not to start another one meanwhile
    family = leader.children(recursive=True)
    if alone and family:
        family[int(rng.integers(len(family)))].kill()
        leader.resume()
    else:
        for member in (leader, *family):
            member.kill()
    process.wait(timeout=120)
    psutil.wait_procs(family, timeout=120)


def whole(output: Path) -> None:
    """What may lie in the folder of a run at any moment."""
    if (output / "options.json").exists():
        json.loads((output / "options.json").read_text())
    assert not [problem for folder in checkpoints(output) if (problem := damage(folder))]
    assert not (output / "model").exists() or (output / "model/training.json").exists()


def result(output: Path) -> dict[str, bytes]:
    """All files of the result, but for the options, which name the output."""
    files = {path.name: path.read_bytes() for path in (output / "model").iterdir() if path.is_file()}
    files["training.json"] = files["training.json"].replace(str(output).encode(), b"")
    return files


@pytest.mark.slow
@pytest.mark.parametrize("processes", STARTS)
def test_killed_trainings_end_in_the_same_bits(processes, tmp_path):
    dataset = write_finished_dataset(tmp_path / "data")
    begin = time.monotonic()
    reference, log = tmp_path / "reference", tmp_path / "log"
    assert start(processes, dataset, reference, log).wait(timeout=600) == 0, log.read_text()[-3000:]
    length = time.monotonic() - begin  # of a whole run, so that kills fall everywhere in one
    expected, lines = result(reference), losses(reference)
    rng, kills, runs, before_options = np.random.default_rng(processes), 0, 0, 0
    while kills < KILLS:
        output, runs = tmp_path / f"run-{runs}", runs + 1
        finished = False
        while not finished:
            process = start(processes, dataset, output, log)
            try:
                # the last kills are given up, so that the last run too comes to its end
                code = process.wait(timeout=rng.uniform(0, length) if kills < KILLS else 600)
                assert code == 0, log.read_text()[-3000:]
                finished = True
            except subprocess.TimeoutExpired:
                kill(process, processes > 1 and rng.random() < 0.2, rng)
                kills += 1
                before_options += not (output / "options.json").exists()
            whole(output)
        assert result(output) == expected and losses(output) == lines
    print(f"{kills} kills of {processes} processes, {before_options} before the options were written, {runs} runs")
    assert kills == KILLS


@pytest.mark.slow
def test_a_training_that_lost_its_launcher_holds_its_folder(tmp_path):
    """Orphaned processes go on; a second training beside them would write into the same files."""
    dataset, output = write_finished_dataset(tmp_path / "data"), tmp_path / "run"
    process = start(2, dataset, output, tmp_path / "log")
    deadline = time.monotonic() + 300
    while not (output / "options.json").exists():
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.01)
    orphans = psutil.Process(process.pid).children(recursive=True)
    for orphan in orphans:
        orphan.suspend()  # so that they do not end before the second one begins
    process.send_signal(signal.SIGKILL)
    process.wait()
    second = start(1, dataset, output, tmp_path / "second")
    assert second.wait(timeout=300) == 2
    assert f"error: another process is training in {output}" in (tmp_path / "second").read_text()
    for orphan in orphans:
        orphan.kill()
    psutil.wait_procs(orphans, timeout=60)
    assert start(1, dataset, output, tmp_path / "log").wait(timeout=600) == 0
