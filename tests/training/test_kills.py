"""Trainings and stages that are killed at random moments, start-up included, and started again by the same command, end
in the same bits as one that nobody stopped.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from killed_runs import KILLS, kill_and_start_again
from stereo_sets import write_kitti
from synthetic_dataset import write_finished_dataset
from training_runs import ENVIRONMENT, ROOT, arguments, losses, result, wait_for

from stereovla.training.checkpoint_folders import checkpoints, damage, step_of

LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", "configs/ddp.yaml", "--num_processes", "2"]
STARTS = {1: [], 2: [*LAUNCH, "--main_process_port", "0"]}
STAGE = ["--steps", "30", "--batch_size", "4", "--checkpoint_every", "5", "--log_every", "1"]
OF_STAGES = {
    "stereo": ["--preset", "tiny", "--format", "kitti2015", "--held_out", "0.25", "--validation_pairs", "4"],
    "depth": ["--preset", "depthvla-tiny", "--pool_episodes", "2", "--validation_pictures", "4"],
    "grounding": ["--preset", "tiny", "--pool_episodes", "2", "--validation_batches", "1"],
}


def popen(command: list[str], log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=file, stderr=file)


def start(processes: int, dataset: Path, output: Path, log: Path, *more: str) -> subprocess.Popen:
    return popen([*STARTS[processes], "train.py", *arguments(str(dataset), output), *more], log)


def check(output: Path) -> None:
    """What may lie in the folder of a run at any moment."""
    if (output / "options.json").exists():
        json.loads((output / "options.json").read_text())
    assert not [problem for folder in checkpoints(output) if (problem := damage(folder))]
    assert not (output / "model").exists() or (output / "model/training.json").exists()


def result_and_losses(output: Path) -> tuple:
    return result(output), losses(output)


@pytest.mark.slow
@pytest.mark.parametrize("processes", STARTS)
def test_killed_trainings_end_in_the_same_bits(processes, tmp_path):
    dataset = write_finished_dataset(tmp_path / "data")
    kill_and_start_again(
        tmp_path,
        lambda output, log: start(processes, dataset, output, log),
        "options.json",
        check,
        result_and_losses,
        kills=KILLS,
        seed=processes,
        alone=0.2 if processes > 1 else 0.0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", OF_STAGES)
def test_killed_stages_end_in_the_same_bits(stage, tmp_path):
    dataset = tmp_path / "data"
    if stage == "stereo":
        write_kitti(dataset, 24)
    else:
        write_finished_dataset(dataset)
    command = ["-m", "stereovla", "pretrain", stage, *STAGE, *OF_STAGES[stage], "--dataset", str(dataset)]
    kill_and_start_again(
        tmp_path,
        lambda output, log: popen([*command, "--output_dir", str(output)], log),
        "options.json",
        check,
        result_and_losses,
        kills=KILLS // 10,
        seed=0,
    )


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
