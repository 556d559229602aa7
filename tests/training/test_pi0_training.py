"""transformers' own PI0 by the same loop: it learns, goes on where it was stopped, and acts as the others do."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from training_runs import losses, recorded, result, run_here

from stereovla.command_line import parse
from stereovla.evaluation.held_out import read_rows
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline import OfflineEvaluation
from stereovla.evaluation.offline_geometry import observations
from stereovla.sharing.architecture import Architecture
from stereovla.sources import load_checkpoint
from stereovla.train import TrainingOptions, train

pytest.importorskip("mujoco")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return recorded(tmp_path_factory.mktemp("recorded") / "dataset")


def arguments(dataset: str, output: Path, *more: str) -> list[str]:
    own = ["--steps", "12", "--batch_size", "8", "--checkpoint_every", "6", "--log_every", "2", "--tracker", "none"]
    own += ["--validation_batches", "0", "--pool_episodes", "2", "--learning_rate", "5e-3"]
    own += ["--config", '{"flow_draws": 2}']
    return ["--preset", "pi0-tiny", "--dataset", dataset, "--output_dir", str(output), *own, *more]


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run")
    run_here(arguments(dataset, output, "--views", "left,right"))
    return output


def test_it_learns_and_goes_on_in_the_same_bits(dataset, trained):
    lines = losses(trained)
    assert {key for key in lines[0] if key.startswith("loss/")} == {"loss/action", "loss/total"}
    assert lines[-1]["loss/action"] < 0.8 * lines[0]["loss/action"]
    before = result(trained)
    shutil.rmtree(trained / "model")
    shutil.rmtree(trained / "checkpoint-0000012")
    run_here(arguments(dataset, trained, "--views", "left,right"))
    assert losses(trained) == lines and result(trained) == before


def test_what_was_trained_acts_as_a_policy(dataset, trained):
    model, processor = load_checkpoint(str(trained / "model"))
    rows = list(read_rows(dataset, 4, 1))
    policy = ModelPolicy(model, processor, "trained")
    chunks = policy.act(observations(rows))
    inputs = policy.inputs(observations(rows))
    noise = policy.noise([(row.episode, row.frame) for row in rows])
    expected = model.pi0.sample_actions(
        state=inputs["state"][:, -1],
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=2 * inputs["pixel_values"] - 1,
        pixel_attention_mask=inputs["view_mask"],
        noise=noise,
    )
    robot = [row.embodiment for row in rows]
    np.testing.assert_allclose(np.stack(chunks), processor.decode_actions(expected, robot), atol=1e-6)
    report = OfflineEvaluation(policy).evaluate(rows)
    assert set(report["geometry"]) == {"given", "left_twice", "swapped"} and report["box"]["invalid"] is None
    assert report["pointed_keyframe"]["xy_cm"] is None


def test_the_card_counts_its_parts(trained):
    folder = trained / "model"
    config, processor = (json.loads((folder / f"{name}config.json").read_text()) for name in ("", "processor_"))
    found = Architecture.of(folder, config, processor, False)
    assert found.name == "pi0" and set(found.counts) == {
        "vision encoder of PI0",
        "projector of PI0",
        "language model of PI0",
        "action expert of PI0",
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mixture", "5:2:2:1"], "language_loss_weight is 0"),
        (["--max_delay", "2"], "it begins every chunk anew"),
        (["--gradient_checkpointing", "True"], "does not support activation checkpointing"),
        (["--freeze", "pointers"], "cannot freeze pointers; this model has vision, projector, language_model"),
        (["--stereo_encoder", "nowhere"], "nowhere"),
    ],
)
def test_what_it_has_not_is_refused(dataset, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train(parse(TrainingOptions, "train", arguments(dataset, tmp_path / "run", *more)))
    with pytest.raises(ValueError, match="--depth_input are options of a DepthVLA, but --preset pi0-tiny is transform"):
        parse(TrainingOptions, "train", arguments(dataset, tmp_path, "--depth_input", "none"))
