"""The grounding stage: TRL's loss is ours, answers get better, and a killed run ends in the same bits."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from command_lines import data as build_dataset
from command_lines import pretrain as main
from datasets import IterableDataset
from safetensors.torch import load_file
from synthetic_dataset import write_training_dataset
from training_runs import result
from transformers import AutoModel, AutoProcessor
from trl import SFTConfig
from views_dataset import MONO, write_views

from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.questions import processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla.objectives import objectives_of
from stereovla.training.grounding import AnswerBatches, GroundingOptions, GroundingTrainer
from stereovla.training.models import trained, untrained
from stereovla.training.stage import freeze_unused, trainer_arguments

ROOT = Path(__file__).parents[2]
# one thread: with several, sums are taken in an order that is not the same in every run
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
ANSWERS = ("depth", "box", "pose", "camera")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return write_training_dataset(tmp_path_factory.mktemp("grounding") / "dataset")


def arguments(dataset: Path, output: Path) -> list[str]:
    own = ["--preset", "tiny", "--steps", "24", "--checkpoint_every", "12", "--learning_rate", "3e-3"]
    data = ["--dataset", str(dataset), "--pool_episodes", "2", "--validation_batches", "1"]
    return ["grounding", *own, *data, "--output_dir", str(output)]


def run_here(command: list[str]) -> None:
    """In this process, which saves the start; on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main(command) == 0
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def grounded(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("grounded") / "run"
    run_here(arguments(dataset, output))
    return output


def losses(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "losses.jsonl").read_text().splitlines()]


def validations(output: Path) -> list[dict]:
    return [line for line in losses(output) if "validation/loss/box" in line]


@pytest.fixture
def batch(dataset):
    """An untrained model, its processor, and a batch of all four kinds of questions."""
    torch.manual_seed(0)
    model, processor = untrained("tiny", load_meta(dataset))
    mixture = {name: 1.0 for name in ANSWERS}
    stream = WindowStream(dataset, mixture=mixture, depth_map_share=0.0, history=model.config.state_history)
    windows = list(islice(stream, 12))
    assert {window["objective"] for window in windows} == set(ANSWERS)
    return model.eval(), processor, AnswerBatches(stream, 12, processor, model.config).collate(windows)


def test_the_trainers_loss_and_gradients_are_those_of_our_own_forward(batch, tmp_path):
    model, processor, inputs = batch
    freeze_unused(model, [])
    own = model(**inputs)
    own.language_loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    options = GroundingOptions(dataset=["unused"], output_dir=str(tmp_path), batch_size=12)
    trainer = GroundingTrainer(
        None,
        model=model,
        args=SFTConfig(**trainer_arguments(options), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=IterableDataset.from_generator(lambda: iter([inputs])),
        data_collator=lambda rows: rows,
        processing_class=processor,
    )
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    AcceleratorState._reset_state(reset_partial_state=True)  # the next one may be of another kind
    assert loss.item() == pytest.approx(own.language_loss.item(), rel=1e-6)
    assert gradients.keys() == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any(name.startswith("model.visual_tokens.stereo") for name in gradients)
    assert not any(name.startswith("action_expert") for name in gradients)
    for name, weight in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-6)
    tokens = (inputs["labels"][:, 1:] != -100).sum(-1)
    accuracy = (own.sample_token_accuracy * tokens).sum() / tokens.sum()
    assert trainer._metrics["eval"]["mean_token_accuracy"] == pytest.approx([accuracy.item()], abs=1e-6)


def test_batches_hold_what_answers_are_learned_from_and_no_more(batch):
    _, processor, inputs = batch
    assert set(inputs) == {"pixel_values", "input_ids", "attention_mask", "labels"}
    given = inputs["labels"][0][inputs["labels"][0] != -100]
    assert torch.equal(given, inputs["input_ids"][0][inputs["labels"][0] != -100])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Trains a DepthVLA of two views, one of which may be absent, that is shown depth and has no language loss yet."""
    place = tmp_path_factory.mktemp("depthvla")
    data = write_views(place / "data", [3, 4], without=MONO)
    torch.manual_seed(0)
    shown = {"views": ["left", "wrist"], "depth_config": {"input": "depth"}}
    for part in untrained("depthvla-tiny", load_meta(str(data)), **shown):
        part.save_pretrained(place / "base")
    return place


def test_a_depthvla_learns_answers(small_run):
    own = ["--preset", "depthvla-tiny", "--model", str(small_run / "base"), "--steps", "2", "--batch_size", "4"]
    data = ["--dataset", str(small_run / "data"), "--pool_episodes", "2", "--validation_batches", "0"]
    run_here(["grounding", *own, *data, "--output_dir", str(small_run / "run"), "--learning_rate", "1e-2"])
    lines = [line["loss/total"] for line in losses(small_run / "run") if "loss/total" in line]
    assert len(lines) == 2 and np.isfinite(lines).all()
    told = json.loads((small_run / "run/model/training.json").read_text())
    assert told["mixture"] == "2:2:1 (depth : box : pose)"  # one camera knows no baseline
    config = json.loads((small_run / "run/model/config.json").read_text())
    assert config["language_loss_weight"] == 1.0
    before, after = (load_file(small_run / name / "model.safetensors") for name in ("base", "run/model"))
    changed = [name for name, weight in before.items() if not torch.equal(weight, after[name])]
    assert changed and all(name.startswith("model.vlm.") for name in changed)


def test_the_answers_of_a_depthvla_are_those_of_its_processor(small_run, tmp_path):
    """What it is taught, and TRL's loss of it against its own forward."""
    model, processor = trained(str(small_run / "base"), load_meta(str(small_run / "data")))
    model.config.language_loss_weight = 1.0
    model.objectives = objectives_of(model.config)
    views = tuple(processor.pixel_views)
    stream = WindowStream(str(small_run / "data"), mixture={name: 1.0 for name in ANSWERS[:3]}, views=views, history=1)
    windows = list(islice(stream, 8))
    inputs = AnswerBatches(stream, 8, processor, model.config).collate(windows)
    assert {window["objective"] for window in windows} == {"depth", "box", "pose"}
    assert not inputs["view_mask"].all()  # the wrist's view is absent in some
    whole = processor(**processor_arguments(windows, views))
    for name in inputs:
        assert torch.equal(inputs[name], whole[name]), name
    answers = inputs["labels"] != -100
    assert torch.equal(inputs["labels"][answers], inputs["input_ids"][answers])
    freeze_unused(model.eval(), [])
    assert set(model.frozen) == {"action_expert", "depth_expert"}
    options = GroundingOptions(dataset=["unused"], output_dir=str(tmp_path), batch_size=8)
    trainer = GroundingTrainer(
        None,
        model=model,
        args=SFTConfig(**trainer_arguments(options), dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=IterableDataset.from_generator(lambda: iter([inputs])),
        data_collator=lambda rows: rows,
        processing_class=processor,
    )
    loss = trainer.compute_loss(model, dict(inputs)).item()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert loss == pytest.approx(model(**inputs).language_loss.item(), rel=1e-5)


def test_a_stereo_encoder_that_learns_from_disparity_alone_is_left_as_it_is(dataset):
    model, _ = untrained("demo", load_meta(dataset))
    freeze_unused(model, ["projector"])
    assert set(model.frozen) == {"projector", "action_expert", "pointers", "stereo"}
    assert not any(weight.requires_grad for weight in model.model.visual_tokens.stereo.parameters())
    assert not any(module.training for module in model.train().model.visual_tokens.stereo.modules())


def test_losses_fall_and_held_out_answers_improve(grounded):
    lines = [line for line in losses(grounded) if "loss/total" in line]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert np.mean([line["loss/total"] for line in lines[-4:]]) < 0.7 * np.mean([x["loss/total"] for x in lines[:4]])
    first, *_, last = validations(grounded)
    assert (first["step"], last["step"]) == (0, 24)
    for name in ("box", "camera", "pose"):
        assert last[f"validation/loss/{name}"] < first[f"validation/loss/{name}"]
    assert last["validation/accuracy/depth"] > first["validation/accuracy/depth"] + 0.2  # "[0." and "]"


def test_only_the_language_side_was_trained(grounded, dataset):
    torch.manual_seed(0)
    before, _ = untrained("tiny", load_meta(dataset))
    loaded = AutoModel.from_pretrained(grounded / "model", trust_remote_code=True).state_dict()
    changed = {
        name.split(".")[0] for name, weight in before.state_dict().items() if not torch.equal(weight, loaded[name])
    }
    assert changed == {"model", "lm_head"}


def test_the_result_loads_and_predicts_as_recorded(grounded):
    folder = grounded / "model"
    recorded = load_file(folder / "reference_prediction.safetensors")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    told = json.loads((folder / "training.json").read_text())
    inputs = processor(
        images=[recorded["left"].numpy(), recorded["right"].numpy()],
        text=told["example_instruction"],
        state=recorded["state"].numpy(),
        embodiment="franka_panda",
        check_stereo=False,
    )
    actions = processor.decode_actions(model.predict_action(**inputs, noise=recorded["noise"]), "franka_panda")
    assert actions == pytest.approx(recorded["actions"].numpy(), abs=1e-5)
    assert "SFTTrainer" in told["summary"] and told["mixture"] == "2:2:1:1 (depth : box : pose : camera)"


def test_a_killed_run_goes_on_in_the_same_bits_from_safetensors_alone(grounded, dataset, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(grounded / "checkpoint-12", output / "checkpoint-12")
    shutil.copytree(grounded / "checkpoint-24", output / "checkpoint-24")
    (output / "checkpoint-24" / "scheduler.json").unlink()
    shutil.copy(grounded / "losses.jsonl", output)
    run_here(arguments(dataset, output))
    assert result(output) == result(grounded)  # weights, configs, recorded prediction
    assert losses(output) == losses(grounded)
    endings = {path.suffix for path in output.glob("checkpoint-*/*")}
    assert endings == {".safetensors", ".json", ".py"}
    shutil.rmtree(output / "model")
    run_here(arguments(dataset, output))  # as if killed after the last step: it takes none more
    assert result(output) == result(grounded)
    assert losses(output) == losses(grounded)
    shutil.rmtree(output / "model")
    assert main([*arguments(dataset, output), "--learning_rate", "1e-4"]) == 2
    assert "other options (learning_rate)" in capsys.readouterr().err


def test_the_command_line_names_what_is_wrong(capsys, tmp_path):
    assert main(["ground"]) == 2
    assert "unknown command stereovla pretrain ground; did you mean grounding?" in capsys.readouterr().err
    assert main([]) == 2 and main(["--help"]) == 0
    assert "stereovla pretrain COMMAND" in capsys.readouterr().out
    data = ["--dataset", "d", "--output_dir", str(tmp_path)]
    assert main(["grounding", *data, "--steps", "0"]) == 2
    assert "--steps is 0; it must be at least 1" in capsys.readouterr().err
    assert main(["grounding", *data, "--step", "3"]) == 2
    assert "unknown option --step; did you mean --steps?" in capsys.readouterr().err
    data[1] = str(write_training_dataset(tmp_path / "d"))
    assert main(["grounding", *data, "--mixture", "1:1"]) == 2
    assert "needs shares depth:box:pose:camera" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_improves_answers_survives_a_kill_and_train_goes_on(tmp_path):
    data, output = str(tmp_path / "data"), tmp_path / "run"
    assert build_dataset(["build", "--preset", "tiny", "--out", data, "--image_size", "64"]) == 0
    own = [
        "--preset",
        "tiny",
        "--steps",
        "120",
        "--batch_size",
        "16",
        "--learning_rate",
        "2e-3",
        "--pool_episodes",
        "4",
    ]
    command = [
        sys.executable,
        "-m",
        "stereovla",
        "pretrain",
        "grounding",
        *own,
        "--checkpoint_every",
        "40",
        "--dataset",
        data,
    ]
    process = subprocess.Popen([*command, "--output_dir", str(output)], cwd=ROOT, env=ENVIRONMENT)
    deadline = time.monotonic() + 600
    while not (output / "checkpoint-40").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*command, "--output_dir", str(output)], cwd=ROOT, env=ENVIRONMENT, check=True)
    steps = [line["step"] for line in losses(output) if "loss/total" in line]
    assert steps == list(range(1, 121))
    first, *_, last = validations(output)
    for name in ANSWERS:
        assert last[f"validation/loss/{name}"] < 0.9 * first[f"validation/loss/{name}"], name
        assert last[f"validation/accuracy/{name}"] > first[f"validation/accuracy/{name}"], name
    more = ["train.py", "--preset", "tiny", "--steps", "2", "--batch_size", "4", "--model", str(output / "model")]
    more += ["--dataset", data, "--output_dir", str(tmp_path / "policy"), "--pool_episodes", "2"]
    subprocess.run([sys.executable, *more], cwd=ROOT, env=ENVIRONMENT, check=True)
    assert (tmp_path / "policy" / "model" / "training.json").exists()
