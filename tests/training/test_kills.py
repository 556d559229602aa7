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
from training_runs import ENVIRONMENT, ROOT, arguments, losses, wait_for

from stereovla.training.checkpoint_folders import checkpoints, damage, step_of

KILLS = int(os.environ.get("STEREOVLA_KILLS", "100"))  # of each number of processes
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configs/ddp.yaml", "--num_processes", "2"]
STARTS = {1: [], 2: [*LAUNCH, "--main_process_port", "0"]}


def start(processes: int, dataset: Path, output: Path, log: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, *STARTS[processes], "train.py", *arguments(str(dataset), output), *more]
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
    process = start(processes, dataset, reference, log)
    wait_for(reference / "options.json", process)
    startup = time.monotonic() - begin  # and of a whole run the length, so that kills fall everywhere in one
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    length = time.monotonic() - begin
    expected, lines = result(reference), losses(reference)
    rng, kills, runs, before_options = np.random.default_rng(processes), 0, 0, 0
    while kills < KILLS:
        output, runs = tmp_path / f"run-{runs}", runs + 1
        finished = False
        while not finished:
            process, begin = start(processes, dataset, output, log), time.monotonic()
            try:
                moment = rng.uniform(0, startup) if rng.random() < 0.3 else rng.uniform(startup, length)
                code = process.wait(timeout=moment if kills < KILLS else 600)
                assert code == 0, log.read_text()[-3000:]
                finished = True
                # the machine may have less to do than at first, and a kill that comes too late is none
                taken = min(length, time.monotonic() - begin)
                startup, length = startup * taken / length, taken
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
    wait_for(output / "options.json", process)
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


@pytest.mark.slow
def test_ctrl_c_at_two_processes_saves_what_both_have_done(tmp_path):
    """As a terminal does it: every process gets the signal, and from the launcher a second one."""
    dataset, output = write_finished_dataset(tmp_path / "data"), tmp_path / "told"
    more = ["--steps", "60", "--checkpoint_every", "100"]
    assert start(2, dataset, tmp_path / "whole", tmp_path / "log", *more).wait(timeout=600) == 0
    process = start(2, dataset, output, tmp_path / "log", *more)
    wait_for(output / "losses.jsonl", process)
    for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        member.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) != 0
    (saved,) = checkpoints(output)
    assert damage(saved) == "" and 0 < step_of(saved) < 60
    assert start(2, dataset, output, tmp_path / "log", *more).wait(timeout=600) == 0
    assert result(output) == result(tmp_path / "whole") and losses(output) == losses(tmp_path / "whole")
