"""Training on from an adapter: it goes on, or is refused in words; the recorded prediction is the trained model's."""

import json

import pytest
import torch
from command_lines import main
from safetensors.torch import load_file
from synthetic_dataset import write_training_dataset
from training_runs import arguments, run_here

from stereovla.command_line import parse
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import StereoVLAForActionPrediction
from stereovla.processing import StereoProcessor
from stereovla.train import TrainingOptions, build
from stereovla.training.models import untrained
from stereovla.training.result import complete, predict_one


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dataset, a base and an adapter of it."""
    place = tmp_path_factory.mktemp("adapters")
    dataset = write_training_dataset(place / "data")
    torch.manual_seed(0)
    model, processor = untrained("tiny", load_meta(str(dataset)))
    model.save_pretrained(place / "base")
    processor.save_pretrained(place / "base")
    run_here([*told(place, "first"), "--model", str(place / "base"), "--learning_rate", "0.01"])
    return place


def told(place, name: str) -> list[str]:
    own = ["--lora_rank", "2", "--steps", "2", "--warmup_steps", "1"]
    return [*arguments(str(place / "data"), place / name), *own]


def weights(place, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / name / "model" / "adapter_model.safetensors")


def test_an_adapter_goes_on(place):
    adapter = ["--model", str(place / "first/model")]
    run_here([*told(place, "still"), *adapter, "--learning_rate", "1e-20"])
    run_here([*told(place, "further"), *adapter, "--learning_rate", "0.01"])
    first, still, further = (weights(place, name) for name in ("first", "still", "further"))
    assert first.keys() == still.keys() == further.keys()
    assert all(torch.equal(first[name], still[name]) for name in first)  # it begins with what was given
    changed = [name for name in first if not torch.equal(first[name], further[name])]
    assert any(".lora_A." in name for name in changed) and any("action_out_proj" in name for name in changed)
    config = json.loads((place / "further/model/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(place / "base")  # not the adapter that it began with


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--lora_rank", "3"], "is an adapter of rank 2, and --lora_rank is 3; 2 goes on with it"),
        (["--lora_rank", "0"], "is an adapter: `stereovla train --lora_rank` goes on with it; to train all weights"),
    ],
)
def test_what_cannot_go_on_is_refused_in_words(place, tmp_path, own, message, capsys):
    words = [*told(place, "first"), "--output_dir", str(tmp_path / "run"), "--model", str(place / "first/model"), *own]
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_stage_refuses_an_adapter(place, tmp_path, capsys):
    words = ["--preset", "tiny", "--dataset", str(place / "data"), "--output_dir", str(tmp_path), "--steps", "1"]
    assert main(["pretrain", "grounding", *words, "--model", str(place / "first/model")]) == 2
    assert "is an adapter" in capsys.readouterr().err


def test_vision_is_frozen_by_default(place):

    options = parse(TrainingOptions, "train", [*told(place, "x"), "--model", str(place / "base")])
    model, _ = build(options, load_meta(str(place / "data")))
    assert model.get_base_model().frozen == ("semantic", "spatial", "stereo")
    assert not any(module.training for module in model.get_base_model().model.visual_tokens.stereo.modules())


def test_a_result_that_loads_as_something_else_is_an_error(place, tmp_path):
    """As when weights that changed are not among those that are saved."""

    model = StereoVLAForActionPrediction.from_pretrained(place / "base")
    processor = StereoProcessor.from_pretrained(place / "base")

    window = next(
        iter(WindowStream(str(place / "data"), "train", seed=0, mixture={"action": 1.0}, chunk_size=8, history=4))
    )
    model.save_pretrained(tmp_path / "partial")
    with torch.no_grad():
        model.action_expert.action_out_proj.bias += 0.1  # after it was saved
    prediction = predict_one(model, processor, window)
    with pytest.raises(RuntimeError, match="loaded again it predicts actions that differ by 0\\.[1-9]"):
        complete(tmp_path / "partial", tmp_path / "model", processor, prediction, {})
    assert not (tmp_path / "model").exists()
