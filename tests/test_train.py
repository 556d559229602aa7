"""Training at tiny size on a real recorded dataset: losses fall into the log, a killed run ends in the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset_builder.__main__ import main as build_dataset
from push_to_hub import PushOptions, check_folder, check_fresh_load, push
from train import learning_rate, mixture_weights, parse_options, train

ROOT = Path(__file__).parent.parent
# one thread: with several, sums are taken in an order that is not the same in every run
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    out = str(tmp_path_factory.mktemp("data") / "dataset")
    assert build_dataset(["build", "--preset", "tiny", "--out", out, "--image_size", "64"]) == 0
    return out


def arguments(dataset: str, output: Path) -> list[str]:
    own = ["--steps", "6", "--batch_size", "4", "--checkpoint_every", "2", "--validation_batches", "1"]
    return ["--preset", "tiny", "--dataset", dataset, "--output_dir", str(output), *own, "--pool_episodes", "2"]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("training") / "run"
    subprocess.run([sys.executable, "train.py", *arguments(dataset, output)], cwd=ROOT, env=ENVIRONMENT, check=True)
    return output


def losses(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_s"} for line in lines]


def test_killed_run_ends_in_the_same_bits(dataset, trained, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "train.py", *arguments(dataset, output)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **quiet)
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-0000002").exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "model").exists()
    finished = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert finished.returncode == 0 and "going on from checkpoint-" in finished.stdout, finished.stderr[-2000:]
    expected, weights = (load_file(run / "model" / "model.safetensors") for run in (trained, output))
    assert expected.keys() == weights.keys()
    assert all(torch.equal(expected[key], weights[key]) for key in expected)
    assert losses(trained) == losses(output)


def test_finished_run_is_left_alone_and_other_options_are_refused(dataset, trained, capsys):
    before = (trained / "model" / "model.safetensors").stat().st_mtime_ns
    train(parse_options(arguments(dataset, trained)))
    assert "is complete" in capsys.readouterr().out
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileNotFoundError, match="lacks"):
        check_folder(trained)  # the run's folder is not the model's


def test_log_keeps_each_objective_apart(trained):
    keys = set().union(*losses(trained))
    assert {"loss/action", "loss/depth", "loss/box", "loss/pose", "lr", "validation/loss/action"} <= keys


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    options = parse_options(["--dataset", "d", "--output_dir", "o", "--steps", "100", "--warmup_steps", "10"])
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(options.learning_rate / 10)
    assert rates[9] == rates[30] == options.learning_rate
    assert (
        all(a >= b for a, b in zip(rates[30:], rates[31:], strict=False)) and rates[-1] < 0.01 * options.learning_rate
    )


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5:2:2:1"):
        mixture_weights("5:2:2")
    with pytest.raises(ValueError, match="--steps is 0"):
        parse_options(["--dataset", "d", "--output_dir", "o", "--steps", "0"])
    with pytest.raises(ValueError, match="finished dataset"):
        train(parse_options(["--preset", "tiny", "--dataset", str(tmp_path), "--output_dir", str(tmp_path / "o")]))


def test_dry_run_writes_a_card_and_keeps_a_persons_edits(trained):
    folder = trained / "model"
    push(PushOptions(folder=str(folder), license="apache-2.0", dry_run=True))
    card = folder / "README.md"
    text = card.read_text()
    assert "pipeline_tag: robotics" in text and "from_pretrained" in text and "action expert" in text
    card.write_text(text + "\nA person's remark.\n")
    push(PushOptions(folder=str(folder), license="apache-2.0", dry_run=True))
    assert card.read_text().count("A person's remark.") == 1
    assert card.read_text().count("## Parts") == 1


def test_other_weights_under_the_same_config_are_noticed(trained, tmp_path):
    """A load that succeeds is not yet a load of these weights."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    weights = load_file(folder / "model.safetensors")
    key = "action_expert.action_out_proj.weight"
    save_file(weights | {key: torch.randn_like(weights[key])}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="differ from the trained model's"):
        check_fresh_load(str(folder), folder / "reference_prediction.safetensors")
