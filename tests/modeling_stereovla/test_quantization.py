"""8 and 4 bit: quantised layers get their inputs whole, and the parts that must stay whole do."""

import pytest
import torch
from test_modeling_stereovla import make_inputs
from torch import nn

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.modeling_stereovla.quantization import WHOLE


class Int8Linear(nn.Module):
    """Keeps its weight as int8 and computes in the dtype of its input, as bitsandbytes' Linear8bitLt does."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, inputs):
        assert inputs.is_floating_point(), f"a quantised layer was given {inputs.dtype}"
        return inputs @ (self.weight.float() * self.scale).T + self.bias


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny")).save_pretrained(folder)
    return folder


def act(model, inputs) -> torch.Tensor:
    noise = torch.zeros(2, model.config.chunk_size, model.config.action_dim)
    return model.eval().predict_action(**inputs, noise=noise, chain_of_thought=False).float()


@pytest.mark.parametrize("name", ["state_proj", "action_in_proj", "action_time_mlp_in"])
def test_a_quantised_projection_is_given_floating_point(folder, name):
    model = StereoVLAForActionPrediction.from_pretrained(folder)
    inputs = make_inputs(model.config)
    expected = act(model, inputs)
    setattr(model.action_expert, name, Int8Linear(getattr(model.action_expert, name)))
    torch.testing.assert_close(act(model, inputs), expected, atol=0.1, rtol=0.05)
    other = act(model, inputs | {"state": inputs["state"] + 0.3})
    assert (other - expected).abs().max() > 1e-3  # the state arrives


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantises_the_transformers_alone(folder, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    options = {"load_in_8bit": True} if bits == 8 else {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}
    model = StereoVLAForActionPrediction.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    quantised = [
        name for name, module in model.named_modules() if type(module).__name__ in ("Linear8bitLt", "Linear4bit")
    ]
    assert quantised and all(".layers." in name and not name.startswith(WHOLE) for name in quantised)
    whole = StereoVLAForActionPrediction.from_pretrained(folder)
    inputs = make_inputs(model.config)
    limit = 0.3 if bits == 8 else 1.5  # of normalised actions of an untrained model
    assert (act(model, inputs) - act(whole, inputs)).abs().max() < limit
