"""What does not train does not change: running statistics of batch norm under freezing, by hand and by PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_modeling_stereovla import make_training_inputs

from stereovla.modeling_stereovla import StereoEncoderModel, StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.training.adapters import LORA_TARGETS


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith(names)}


@pytest.fixture
def model() -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("demo", turn_symmetry=0))


def step(model: torch.nn.Module) -> None:
    inputs = make_training_inputs(model.config)
    size = model.config.image_size
    model(**inputs, disparity=torch.full((4, size, size), 3.0)).loss.backward()


def by_peft(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=LORA_TARGETS))


def by_peft_in_the_middle_of_training(model):
    model.train()
    step(model)
    return by_peft(model)


def by_hand(model):
    model.requires_grad_(False)
    model.action_expert.requires_grad_(True)
    return model


@pytest.mark.parametrize("freeze", [by_peft, by_peft_in_the_middle_of_training, by_hand])
def test_statistics_of_what_does_not_train_stay(model, freeze):
    frozen = freeze(model)
    if freeze is not by_peft_in_the_middle_of_training:
        frozen.train()
    before = statistics(frozen)
    assert len(before) > 30
    for _ in range(2):
        step(frozen)
    assert all(torch.equal(value, before[name]) for name, value in statistics(frozen).items())


def test_statistics_of_what_trains_follow_the_data(model):
    before = statistics(model.train())
    step(model)
    changed = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
    assert changed == before.keys()
    model.freeze("stereo")
    before = statistics(model)
    step(model)
    changed = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".stereo." not in name}


def test_they_follow_again_once_the_weights_train_again(model):
    by_hand(model).train()
    step(model)
    model.requires_grad_(True).train()
    before = statistics(model)
    step(model)
    assert not any(torch.equal(value, before[name]) for name, value in statistics(model).items())


def test_the_stereo_encoder_alone_keeps_them_too():
    torch.manual_seed(0)
    encoder = StereoEncoderModel(StereoVLAConfig.from_preset("demo").stereo_config).train()
    encoder.requires_grad_(False)
    before = statistics(encoder)
    encoder(torch.rand(2, 2, 3, 64, 64))
    assert before and all(torch.equal(value, before[name]) for name, value in statistics(encoder).items())


def test_what_an_adapter_loads_as_is_what_was_trained(model, tmp_path):
    """Trained by hand with PEFT, without this project's commands: saved, and loaded on the saved base."""
    model.save_pretrained(tmp_path / "base")
    adapted = by_peft(StereoVLAForActionPrediction.from_pretrained(tmp_path / "base")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        step(adapted)
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = {
        name: value
        for name, value in make_training_inputs(model.config).items()
        if name in ("input_ids", "attention_mask", "pixel_values", "state")
    }
    noise = torch.randn(4, model.config.chunk_size, model.config.action_dim)
    live = adapted.eval().predict_action(**inputs, noise=noise)
    loaded = StereoVLAForActionPrediction.from_pretrained(tmp_path / "base").eval()
    untouched = loaded.predict_action(**inputs, noise=noise)
    loaded.load_adapter(str(tmp_path / "adapter"))
    again = loaded.eval().predict_action(**inputs, noise=noise)
    assert (live - untouched).abs().max() > 1e-2
    torch.testing.assert_close(again, live, atol=1e-5, rtol=1e-5)
