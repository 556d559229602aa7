"""What `forward` and the config are given: nothing vanishes, and what transformers passes means what it says there."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from test_modeling_stereovla import make_inputs, make_training_inputs
from torch.nn import functional as F
from transformers.utils import logging

from stereovla.modeling_stereovla import (
    DepthVLAConfig,
    StereoEncoderModel,
    StereoVLAConfig,
    StereoVLAForActionPrediction,
)


@pytest.fixture(scope="module")
def model() -> StereoVLAForActionPrediction:
    torch.manual_seed(0)
    return StereoVLAForActionPrediction(StereoVLAConfig.from_preset("tiny")).eval()


def test_an_unknown_input_is_named(model):
    inputs = make_training_inputs(model.config)
    with pytest.raises(TypeError, match="forward has no input 'is_actoin'; did you mean 'is_action'"):
        model(**inputs, is_actoin=inputs["is_action"])


@torch.no_grad()
def test_a_tuple_on_request(model):
    inputs = make_training_inputs(model.config)
    draws = {"noise": torch.zeros(4, 1, 8, 7), "time": torch.full((4, 1), 0.5)}
    named = model(**inputs, **draws)
    plain = model(**inputs, **draws, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], named.loss)
    assert len(plain) == len([value for value in named.values() if value is not None])


@torch.no_grad()
def test_hidden_states_on_request(model):
    inputs = make_inputs(model.config)
    del inputs["state"]
    output = model(**inputs, output_hidden_states=True)
    layers = model.config.text_config.num_hidden_layers
    assert len(output.hidden_states) == layers + 1
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
    assert model(**inputs).hidden_states is None


@torch.no_grad()
def test_embeddings_in_place_of_ids(model):
    inputs = make_inputs(model.config)
    del inputs["state"]
    expected = model(**inputs).logits
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    torch.testing.assert_close(model(**inputs, inputs_embeds=embeds).logits, expected)
    text = {"attention_mask": inputs["attention_mask"]}
    without = model(input_ids=inputs["input_ids"], **text).logits
    torch.testing.assert_close(model(inputs_embeds=embeds, **text).logits, without)
    with pytest.raises(ValueError, match="input_ids is missing: beside inputs_embeds too"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], **text)


@torch.no_grad()
def test_steps_that_are_masked_have_no_loss(model):
    inputs = make_training_inputs(model.config)
    config = model.config
    noise, time = torch.randn(4, 1, config.chunk_size, config.action_dim), torch.full((4, 1), 0.3)
    mask = torch.ones(4, config.chunk_size, dtype=torch.bool)
    draws = {"noise": noise, "time": time}
    whole = model(**inputs, **draws)
    torch.testing.assert_close(model(**inputs, **draws, action_mask=mask).action_loss, whole.action_loss)
    mask[0, 3:], mask[2] = False, False  # one sample has three steps, the other none
    found = model(**inputs, **draws, action_mask=mask)
    flow = noise[0, 0] - inputs["actions"][0]
    expected = F.mse_loss(found.velocity[0, 0, :3], flow[:3])
    torch.testing.assert_close(found.action_loss, expected)
    assert torch.isnan(found.sample_action_loss).tolist() == [False, True, True, True]
    assert model.loss_counts(**inputs, action_mask=mask)["action"] == 1


def test_a_key_of_the_future_is_a_warning_and_a_typed_one_an_error(model, tmp_path, caplog):
    model.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved |= {"use_cache": False, "of_transformers_9": 1}
    saved["stereo_config"]["also_new"] = 2
    (tmp_path / "config.json").write_text(json.dumps(saved))
    logging.enable_propagation()
    logging.set_verbosity_warning()
    try:
        config = StereoVLAConfig.from_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
    assert "of_transformers_9" in caplog.text and "also_new" in caplog.text and "use_cache" not in caplog.text
    assert config.to_diff_dict()["stereo_config"] == model.config.to_diff_dict()["stereo_config"]
    with pytest.raises(ValueError, match="StereoVLAConfig has no field 'chunk_siz'; did you mean 'chunk_size'"):
        StereoVLAConfig.from_preset("tiny", chunk_siz=4)
    with pytest.raises(ValueError, match="LlamaConfig has no field 'hidden_sise'; did you mean 'hidden_size'"):
        StereoVLAConfig.from_preset("tiny", text_config={"hidden_sise": 64})
    with pytest.raises(ValueError, match="GemmaConfig has no field 'hidden_sise'; did you mean 'hidden_size'"):
        DepthVLAConfig.from_preset("depthvla-tiny", vlm_config={"text_config": {"hidden_sise": 64}})


def test_a_whole_number_is_a_number():
    """In JSON a weight of 5 is written so."""
    config = StereoVLAConfig.from_preset("tiny", keyframe_loss_weight=5, language_loss_weight=0)
    assert (config.keyframe_loss_weight, config.language_loss_weight) == (5, 0)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("action_loss_weight", -1.0, "action_loss_weight is -1.0; it must be a finite number, at least 0"),
        ("keyframe_loss_weight", float("nan"), "keyframe_loss_weight is nan"),
        ("num_bins", 0, "num_bins is 0; it must be at least 2"),
    ],
)
def test_weights_and_bins_that_cannot_be_learnt_with_are_refused(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        StereoVLAConfig.from_preset("tiny", **{field: value})


def test_the_experts_width_need_not_be_a_multiple_of_its_heads():
    """As in miniatures of the released model: 6 heads, an expert 40 wide."""
    text = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 96, "head_dim": 16}
    config = StereoVLAConfig.from_preset("tiny", text_config=text, expert_hidden_size=40)
    torch.manual_seed(0)
    model = StereoVLAForActionPrediction(config)
    model(**make_training_inputs(config)).loss.backward()
    attention = model.action_expert.transformer.layers[0].self_attn
    assert attention.q_proj.weight.shape == (96, 40) and attention.q_proj.weight.grad.abs().sum() > 0
    assert model.eval().predict_action(**make_inputs(config)).shape == (2, 8, 7)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_tied_where_the_text_config_says_so(tied, tmp_path):
    config = StereoVLAConfig.from_preset("tiny", text_config={"tie_word_embeddings": tied})
    torch.manual_seed(0)
    model = StereoVLAForActionPrediction(config)
    model.save_pretrained(tmp_path)
    loaded = StereoVLAForActionPrediction.from_pretrained(tmp_path)
    for one in (model, loaded):
        assert (one.lm_head.weight is one.get_input_embeddings().weight) == tied
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)


def test_reentrant_checkpoints_are_refused(model):
    with pytest.raises(ValueError, match="use_reentrant=True gives wrong gradients here"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"preserve_rng_state": False})
    function = model.model.language_model.layers[0]._gradient_checkpointing_func
    model.gradient_checkpointing_disable()
    assert function.keywords["use_reentrant"] is False


def test_saved_names_are_accepted_by_load_state_dict(model, tmp_path):
    """As `Trainer` resumes: every weight of the file arrives, those of the DINOv2 tower too."""
    from safetensors.torch import load_file

    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    other = StereoVLAForActionPrediction(model.config)
    report = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not report.missing_keys and not report.unexpected_keys
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


def test_what_never_trains_does_not_thaw_when_it_is_loaded(model, tmp_path):
    stereo = StereoVLAConfig.from_preset("tiny").stereo_config.to_dict()
    backbone = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "out_indices": [1, 2, 3, 4]}
    backbone |= {"model_type": "dinov2", "patch_size": 14, "image_size": 518, "reshape_hidden_states": False}
    backbone |= {"apply_layernorm": True, "use_mask_token": False}
    prior = {"backbone_config": backbone, "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 16}
    prior |= {"model_type": "depth_anything", "reassemble_hidden_size": 32, "patch_size": 14}
    stereo = type(model.config.stereo_config)(**{**stereo, "depth_anything_config": prior})
    for kind, config in ((StereoEncoderModel, stereo), (StereoVLAForActionPrediction, model.config)):
        torch.manual_seed(0)
        made = kind(config)
        made.save_pretrained(tmp_path / kind.__name__)
        loaded = kind.from_pretrained(tmp_path / kind.__name__)
        trained = [{name for name, p in one.named_parameters() if p.requires_grad} for one in (made, loaded)]
        assert trained[0] == trained[1] and not any(".mask_token" in name or "prior." in name for name in trained[1])
