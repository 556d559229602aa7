"""8 and 4 bit: quantised layers get their inputs whole, and the parts that must stay whole do."""

import re

import pytest
import torch
from test_modeling_stereovla import make_inputs
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from stereovla.modeling_stereovla import (
    DepthVLAConfig,
    DepthVLAForActionPrediction,
    StereoVLAConfig,
    StereoVLAForActionPrediction,
)
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.modeling_stereovla.quantization import WHOLE
from stereovla.training.adapters import LORA_TARGETS

OPTIONS = {8: {"load_in_8bit": True}, 4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}}
LIMITS = {8: 0.3, 4: 1.5}  # of normalised actions of an untrained model
DEPTHVLA = ("model.vlm.language_model", "model.depth_expert.decoder", "action_expert.transformer")


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


@pytest.mark.parametrize(
    "fields", [{"use_pointers": True}, {"depth_config": stereo_encoder()}, {"depth_config": None}], ids=str
)
def test_of_a_depthvla_the_layers_that_share_attention_are_quantised_alone(fields):
    """As transformers' quantisers read the names."""
    weights = {} if fields.get("depth_config", True) else {"depth_map_loss_weight": 0.0}
    with torch.device("meta"):
        model = DepthVLAForActionPrediction(DepthVLAConfig.from_preset("depthvla-tiny", **fields, **weights))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quantised = {name for name in linear if should_convert_module(name, list(WHOLE))}
    assert quantised == {name for name in linear if re.fullmatch(LORA_TARGETS, name)}
    experts = {name.partition(".layers.")[0] for name in quantised}
    assert experts == {name for name in DEPTHVLA if name in dict(model.named_modules())}


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantises_a_depthvla(tmp_path, bits):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    # its 4-bit kernel for CPUs takes no narrower ones
    config = DepthVLAConfig.from_preset("depthvla-tiny", depth_config={"decoder_config": {"hidden_size": 64}})
    torch.manual_seed(0)
    DepthVLAForActionPrediction(config).save_pretrained(tmp_path)
    whole = DepthVLAForActionPrediction.from_pretrained(tmp_path).eval()
    model = DepthVLAForActionPrediction.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**OPTIONS[bits]), device_map={"": "cpu"}
    )
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    assert sum(isinstance(module, kinds) for module in model.modules()) == 3 * 7 * config.text_config.num_hidden_layers
    image = torch.full((2, config.num_visual_tokens), config.image_token_id)
    inputs = {
        "input_ids": torch.cat([image, torch.randint(10, 200, (2, 6))], dim=1),
        "pixel_values": torch.rand(2, 1, 3, config.image_size, config.image_size),
        "state": torch.randn(2, config.state_history, config.state_dim),
        "noise": torch.zeros(2, config.chunk_size, config.action_dim),
    }
    difference = (model.eval().predict_action(**inputs).float() - whole.predict_action(**inputs)).abs().max()
    assert 0 < difference < LIMITS[bits]


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_quantises_the_transformers_alone(folder, bits):
    pytest.importorskip("bitsandbytes")
    model = StereoVLAForActionPrediction.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**OPTIONS[bits]), device_map={"": "cpu"}
    )
    quantised = [
        name for name, module in model.named_modules() if type(module).__name__ in ("Linear8bitLt", "Linear4bit")
    ]
    assert quantised and all(".layers." in name and not name.startswith(WHOLE) for name in quantised)
    whole = StereoVLAForActionPrediction.from_pretrained(folder)
    inputs = make_inputs(model.config)
    assert (act(model, inputs) - act(whole, inputs)).abs().max() < LIMITS[bits]
