"""Runs of train.py at tiny size, for the tests of training: how they are started, and what of them is compared."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from command_lines import data as build_dataset
from safetensors.torch import load_file

from stereovla.command_line import parse
from stereovla.train import TrainingOptions, train

ROOT = Path(__file__).parent.parent
# one thread: with several, sums are taken in an order that is not the same in every run
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def recorded(out: Path) -> str:
    """A small recorded dataset."""
    assert build_dataset(["build", "--preset", "tiny", "--out", str(out), "--image_size", "64"]) == 0
    return str(out)


def arguments(dataset: str, output: Path) -> list[str]:
    own = ["--steps", "6", "--batch_size", "4", "--checkpoint_every", "2", "--validation_batches", "1"]
    own += ["--tracker", "none"]
    return ["--preset", "tiny", "--dataset", dataset, "--output_dir", str(output), *own, "--pool_episodes", "2"]


def losses(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("samples_per_s", "waiting")} for line in lines]


def result(output: Path) -> dict[str, bytes]:
    """All files of the result, but for the options, which name the output."""
    files = {path.name: path.read_bytes() for path in (output / "model").iterdir() if path.is_file()}
    files["training.json"] = files["training.json"].replace(str(output).encode(), b"")
    return files


@contextmanager
def one_thread() -> Iterator[None]:
    """For a training in this process: with several, sums are taken in an order that is not the same in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)  # the next one may choose another precision


def run_here(arguments: list[str]) -> None:
    """train.py in this process, which saves the start."""
    with one_thread():
        train(parse(TrainingOptions, "train.py", arguments))


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a running process has written `path`."""
    deadline = time.monotonic() + 600
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"{path.name} was not written"
        time.sleep(0.01)


def run_two(config: str, arguments: list[str], *stage: str) -> str:
    """train.py, or `python -m` with the names in `stage`, in two processes without GPUs, as configs/`config`.yaml says;
    what was printed.
    """
    launch = ["-m", "accelerate.commands.launch", "--config_file", f"configs/{config}.yaml", "--num_processes", "2"]
    trained = ["--module", *stage] if stage else ["train.py"]
    command = [sys.executable, *launch, "--main_process_port", "0", *trained, *arguments]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def held_share(printed: str, kind: str) -> float:
    """The share of the weights that the first of two processes holds, as `training.processes.prepare` prints it."""
    held, weights = re.search(rf"2 processes \({kind}\), ([\d,]+) of ([\d,]+) weights", printed).groups()
    return int(held.replace(",", "")) / int(weights.replace(",", ""))


def assert_same_training(first: Path, second: Path, rounding: float = 1e-4) -> None:
    """The same losses at every step and the same weights in the end, but for the order of sums."""
    for mine, other in zip(losses(first), losses(second), strict=True):
        # validation runs in batches of the size of a part
        mine, other = ({k: v for k, v in line.items() if not k.startswith("validation")} for line in (mine, other))
        assert mine == pytest.approx(other, rel=10 * rounding, abs=rounding)
    names = [path.relative_to(first) for path in first.rglob("*model.safetensors")]
    assert names
    for name in names:
        weights = load_file(first / name)
        others = load_file(second / name)
        assert weights.keys() == others.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(others[key], tensor, atol=rounding, rtol=10 * rounding)


def same_bits(first: Path, second: Path) -> bool:
    """Whether two runs have the same losses and the same weights in the end."""
    mine, other = (load_file(run / "model" / "model.safetensors") for run in (first, second))
    return losses(first) == losses(second) and all(torch.equal(other[name], tensor) for name, tensor in mine.items())


def assert_same_part(first: Path, second: Path) -> None:
    """Of a part trained for 4 steps, the same but for the order of sums: Adam also enlarges gradients that are nothing
    but rounding.
    """
    for mine, other in zip(losses(first), losses(second), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-4)
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (first, second)]
    differences = [(weights[1][name] - tensor).abs().flatten() for name, tensor in weights[0].items()]
    assert torch.cat(differences).mean() < 1e-5  # in 4 steps they move by about 1e-3


def end_after_its_first_line(stage: str, arguments: list[str], output: Path) -> int:
    """Tells `stereovla pretrain stage` to end once losses.jsonl is there; the step of the checkpoint that it saved."""
    command = [sys.executable, "-m", "stereovla", "pretrain", stage, *arguments]
    environment = ENVIRONMENT | {"ACCELERATE_USE_CPU": "true"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    wait_for(output / "losses.jsonl", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 128 + signal.SIGTERM
    (saved,) = output.glob("checkpoint-*")
    return int(saved.name[-7:])
