"""Training at tiny size on a real recorded dataset: losses fall into the log, a killed run ends in the same bits."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from synthetic_dataset import write_dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import ENVIRONMENT, ROOT, arguments, assert_same_training, losses, recorded, run_here, wait_for
from transformers import AutoModel

from stereovla.command_line import parse
from stereovla.dataset_builder.dataset.shards import write_json
from stereovla.dataset_builder.dataset.statistics import compute_statistics
from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.processing import StereoProcessor
from stereovla.push_to_hub import check_folder, check_fresh_load
from stereovla.train import TrainingOptions, learning_rate, parameter_groups, train
from stereovla.training.checkpoints import Average
from stereovla.training.options import dataset_mixture, mixture_weights


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return recorded(tmp_path_factory.mktemp("data") / "dataset")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("training") / "run"
    subprocess.run([sys.executable, "train.py", *arguments(dataset, output)], cwd=ROOT, env=ENVIRONMENT, check=True)
    return output


def test_parts_of_a_step_train_as_the_whole(dataset, tmp_path):
    # without batch norm, whose statistics are those of a part
    own = ["--freeze", "stereo", "--batch_size", "8", "--steps", "4"]
    run_here([*arguments(dataset, tmp_path / "whole"), *own])
    run_here([*arguments(dataset, tmp_path / "parts"), *own, "--accumulation", "2"])
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_parts_train_as_the_whole_with_weights_of_the_losses(dataset, tmp_path):
    own = ["--mixture", "4:1:2:1:1", "--mixture_as", "losses", "--detection_failures", "0.5", "--augmentation", "0.2"]
    more = ["--freeze", "stereo", "--batch_size", "8", "--steps", "2"]
    for name, parts in {"whole": "1", "parts": "2"}.items():
        run_here([*arguments(dataset, tmp_path / name), *own, *more, "--accumulation", parts])
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    assert "loss/camera" in set().union(*losses(tmp_path / "whole"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_told_to_end_it_saves_and_goes_on_in_the_same_bits(dataset, tmp_path, number):
    """With workers, parts, running means and learning rates by part: everything that a checkpoint must hold."""
    rates = json.dumps({"language_model": 0.5})
    own = ["--workers", "2", "--accumulation", "2", "--ema_decay", "0.5", "--part_rates", rates, "--steps", "8"]
    command = [*arguments(dataset, tmp_path / "whole"), *own, "--checkpoint_every", "100"]
    run_here(command)
    told = [*command, "--output_dir", str(tmp_path / "told")]
    process = subprocess.Popen(
        [sys.executable, "train.py", *told], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "told" / "losses.jsonl", process)
    process.send_signal(number)
    assert "told to end: a checkpoint is saved after this step" in process.communicate(timeout=600)[1]
    assert process.returncode == 128 + number
    (saved,) = (tmp_path / "told").glob("checkpoint-*")
    assert int(saved.name[-7:]) < 8
    run_here(told)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "told")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses(tmp_path / "whole") == losses(tmp_path / "told")
    last = load_file(tmp_path / "whole" / "checkpoint-0000008" / "model.safetensors")
    mean = load_file(tmp_path / "whole" / "checkpoint-0000008" / "average.safetensors")
    name = "action_expert.action_out_proj.weight"
    assert torch.equal(weights[0][name], mean[name]) and not torch.equal(last[name], mean[name])


def test_several_datasets_are_mixed(dataset, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(dataset, again)
    run_here([*arguments(dataset, tmp_path / "run"), "--steps", "1", "--dataset", dataset, f"{again}=0.5"])
    (state,) = json.loads((tmp_path / "run" / "checkpoint-0000001" / "stream-00000.json").read_text())
    assert state["stream"]["weights"] == [1.0, 0.5] and len(state["stream"]["num_shards"]) == 2
    with pytest.raises(ValueError, match="a weight must be a number"):
        dataset_mixture(["a", "b=much"])


def test_adapters_train_alone_and_load_with_their_base(dataset, trained, tmp_path):
    base, output = trained / "model", tmp_path / "run"
    run_here([*arguments(dataset, output), "--model", str(base), "--lora_rank", "2"])
    saved = load_file(output / "model" / "adapter_model.safetensors")
    heads = ("state_proj", "action_in_proj", "action_out_proj")
    layers = re.compile(r"(language_model|action_expert\.transformer)\.layers\.\d+\.\w+\.\w+_proj\.lora_[AB]\.weight")
    assert all(layers.search(name) or any(f"action_expert.{head}." in name for head in heads) for name in saved)
    prediction = load_file(output / "model" / "reference_prediction.safetensors")
    processor = StereoProcessor.from_pretrained(output / "model")
    inputs = processor(
        images=[prediction["left"].numpy(), prediction["right"].numpy()],
        text=json.loads((output / "model" / "training.json").read_text())["example_instruction"],
        state=prediction["state"].numpy(),
        embodiment="franka_panda",
    )
    bases = StereoVLAForActionPrediction.from_pretrained(base).eval()
    unadapted = bases.predict_action(**inputs, noise=prediction["noise"])
    loaded = {
        "peft": PeftModel.from_pretrained(StereoVLAForActionPrediction.from_pretrained(base), output / "model"),
        "auto": AutoModel.from_pretrained(output / "model", trust_remote_code=True),
    }
    loaded["merged"] = PeftModel.from_pretrained(bases, output / "model").merge_and_unload()
    for way, model in loaded.items():
        chunk = model.eval().predict_action(**inputs, noise=prediction["noise"])
        actions = processor.decode_actions(chunk, embodiment="franka_panda")
        assert actions == pytest.approx(prediction["actions"].numpy(), abs=1e-5), way
        assert (chunk - unadapted).abs().max() > 1e-3, way
    with pytest.raises(ValueError, match="--lora_rank needs --model"):
        parse(TrainingOptions, "train.py", [*arguments(dataset, output), "--lora_rank", "2"])


def test_exploding_gradients_stop_with_the_batch_saved(dataset, tmp_path):
    with pytest.raises(FloatingPointError, match="bad-batch-0000000-0.safetensors"):
        run_here([*arguments(dataset, tmp_path / "run"), "--stop_grad_norm", "1e-6"])
    saved = load_file(tmp_path / "run" / "bad-batch-0000000-0.safetensors")
    assert saved["0.pixel_values"].shape == (4, 2, 3, 64, 64) and "0.noise" in saved
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_bfloat16_checkpointing_and_tensorboard(dataset, tmp_path):
    own = ["--mixed_precision", "bf16", "--gradient_checkpointing", "True", "--tracker", "auto", "--steps", "2"]
    run_here([*arguments(dataset, tmp_path / "run"), *own])
    (events,) = (tmp_path / "run" / "stereovla").glob("events.out.tfevents.*")  # options lie in a folder of their own
    shown = EventAccumulator(str(events)).Reload()
    for line in losses(tmp_path / "run"):  # of training and of validation
        for name in line.keys() & {"loss/action", "validation/loss/action", "grad_norm"}:
            (value,) = [event.value for event in shown.Scalars(name) if event.step == line["step"]]
            assert value == pytest.approx(line[name])
    assert "validation/loss/action" in shown.Tags()["scalars"]
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")["lm_head.weight"].dtype == torch.float32


def test_running_means_follow_their_definition():
    layer = torch.nn.Linear(2, 1)
    average, expected = Average(layer, 0.75), layer.weight.detach().clone()
    for step in range(3):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        average.update()
        expected = 0.75 * expected + 0.25 * step
    with average.in_place():
        torch.testing.assert_close(layer.weight.detach(), expected)
    assert (layer.weight == 2).all()


def test_rates_by_part():
    options = parse(
        TrainingOptions,
        "train.py",
        ["--dataset", "d", "--output_dir", "o", "--part_rates", '{"lm_head": 0.1, "pointers": 2}'],
    )
    model = StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny", use_pointers=True)).freeze("stereo")
    groups = {group["factor"]: group["params"] for group in parameter_groups(model, options)}
    assert groups.keys() == {0.1, 1.0, 2}
    assert [id(p) for p in groups[0.1]] == [id(model.lm_head.weight)]
    assert {id(p) for p in groups[2]} == {id(p) for p in model.pointers.parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in groups.values() for p in group} == trained
    options.part_rates = '{"head": 1}'
    with pytest.raises(ValueError, match="--part_rates names head; parts are semantic"):
        parameter_groups(model, options)


def test_killed_run_ends_in_the_same_bits(dataset, trained, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "train.py", *arguments(dataset, output)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **quiet)
    wait_for(output / "checkpoint-0000002", process)
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
    train(parse(TrainingOptions, "train.py", arguments(dataset, trained)))
    assert "is complete" in capsys.readouterr().out
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileNotFoundError, match="lacks"):
        check_folder(trained)  # the run's folder is not the model's


def test_log_keeps_each_objective_apart(trained):
    keys = set().union(*losses(trained))
    assert {"loss/action", "loss/depth", "loss/box", "loss/pose", "lr", "validation/loss/action"} <= keys


def test_learning_rate_warms_up_stays_and_falls_to_zero():
    options = parse(
        TrainingOptions, "train.py", ["--dataset", "d", "--output_dir", "o", "--steps", "100", "--warmup_steps", "10"]
    )
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(options.learning_rate / 10)
    assert rates[9] == rates[30] == options.learning_rate
    assert (
        all(a >= b for a, b in zip(rates[30:], rates[31:], strict=False)) and rates[-1] < 0.01 * options.learning_rate
    )


def test_a_dataset_without_held_out_episodes_is_refused_at_once_or_trained_without(tmp_path):
    write_dataset(tmp_path / "data", [4, 4], 1, size=64)
    meta = {"fps": 10, "state_dim": 7, "action_dim": 7, "tasks": ["pick up the red cube"]}
    write_json(
        tmp_path / "data" / "meta/info.json", meta | {"splits": {"train": {"episodes": 2, "frames": 8, "shards": 2}}}
    )
    write_json(tmp_path / "data" / "meta/stats.json", compute_statistics(sorted((tmp_path / "data/data").iterdir())))
    own = [*arguments(str(tmp_path / "data"), tmp_path / "run"), "--steps", "1"]
    with pytest.raises(ValueError, match="no split 'validation'; it has: train"):
        run_here(own)
    run_here([*own, "--validation_batches", "0"])
    assert (tmp_path / "run" / "model" / "reference_prediction.safetensors").exists()


def test_the_demo_asks_for_more_depth(dataset, tmp_path):
    run_here([*arguments(dataset, tmp_path), "--preset", "demo", "--steps", "1", "--batch_size", "4"])
    told = json.loads((tmp_path / "model" / "training.json").read_text())
    assert told["mixture"] == "5:3:2:1 (action : depth : box : pose)"


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5:2:2:1"):
        mixture_weights("5:2:2")
    assert mixture_weights("5:2:2:1") == {"action": 5, "depth": 2, "box": 2, "pose": 1, "camera": 0}
    with pytest.raises(ValueError, match="--steps is 0"):
        parse(TrainingOptions, "train.py", ["--dataset", "d", "--output_dir", "o", "--steps", "0"])
    with pytest.raises(ValueError, match="finished dataset"):
        train(
            parse(
                TrainingOptions,
                "train.py",
                ["--preset", "tiny", "--dataset", str(tmp_path), "--output_dir", str(tmp_path / "o")],
            )
        )


def test_other_weights_under_the_same_config_are_noticed(trained, tmp_path):
    """A load that succeeds is not yet a load of these weights."""
    folder = tmp_path / "model"
    shutil.copytree(trained / "model", folder)
    weights = load_file(folder / "model.safetensors")
    key = "action_expert.action_out_proj.weight"
    save_file(weights | {key: torch.randn_like(weights[key])}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="differ from the trained model's"):
        check_fresh_load(str(folder), folder / "reference_prediction.safetensors")


@pytest.mark.slow
def test_the_policy_lowers_its_loss(dataset, tmp_path):
    """The command at tiny size, as typed."""
    longer = ["--steps", "80", "--learning_rate", "1e-3", "--checkpoint_every", "80", "--batch_size", "8"]
    command = [sys.executable, "train.py", *arguments(dataset, tmp_path / "run"), *longer]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True)
    totals = [line["loss/total"] for line in losses(tmp_path / "run") if "loss/total" in line]
    assert len(totals) == 80 and sum(totals[-20:]) < 0.7 * sum(totals[:20])


@pytest.mark.slow
def test_compiled_training_takes_the_same_steps(dataset, tmp_path):
    for name, own in {"plain": [], "compiled": ["--compile", "True"]}.items():
        run_here([*arguments(dataset, tmp_path / name), "--freeze", "stereo", "--steps", "3", *own])
    assert_same_training(tmp_path / "plain", tmp_path / "compiled")
