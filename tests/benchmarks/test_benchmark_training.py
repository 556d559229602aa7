"""benchmarks.training: ways take turns in one run, a version before in a process of its own."""

import pytest
from synthetic_dataset import write_training_dataset

from stereovla.benchmarks.training import TrainingBenchmarkOptions, main

# what a checkout of an earlier version is asked for
CHECKOUT = """
import torch
from stereovla.benchmarks.training import Batches, Feed, Way, WindowStream, load_meta, untrained
"""


def checkout(folder, program: str) -> str:
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks/training.py").write_text(program)
    return str(folder)


def arguments(dataset, before, *ways: str) -> list[str]:
    options = ["--dataset", str(dataset), "--preset", "tiny", "--batch_size", "4", "--steps", "1", "--rounds", "1"]
    return [*options, "--before", before, "--ways", *ways]


def test_a_version_before_and_ours_take_turns(tmp_path, capfd):
    dataset = write_training_dataset(tmp_path / "dataset")
    main(arguments(dataset, checkout(tmp_path / "before", CHECKOUT), "before", "shared", "pi0"))
    printed = capfd.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in printed if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == [
        "| the version before",
        "| ours, two questions of a frame",
        "| PI0 of equal sizes",
    ]
    assert rows[1][2] == "1.00" and all(float(row[1]) > 0 and float(row[2]) > 0 for row in rows[1:])


def test_a_version_that_cannot_train_is_told(tmp_path, capfd):
    dataset = write_training_dataset(tmp_path / "dataset")
    with pytest.raises(RuntimeError, match="the version before ended with status 1; its error is above"):
        main(arguments(dataset, checkout(tmp_path / "before", "raise ValueError('no such model')"), "before"))
    assert "no such model" in capfd.readouterr().err


def test_a_version_before_needs_its_checkout():
    with pytest.raises(ValueError, match="--before CHECKOUT and the way `before` belong together"):
        TrainingBenchmarkOptions("dataset", ways=["before", "ours"])
    with pytest.raises(ValueError, match="--before CHECKOUT and the way `before` belong together"):
        TrainingBenchmarkOptions("dataset", before="checkout", ways=["ours"])
    assert TrainingBenchmarkOptions("dataset").ways[:2] == ["ours", "same-batch"]
    assert "before" in TrainingBenchmarkOptions("dataset", before="checkout").ways
