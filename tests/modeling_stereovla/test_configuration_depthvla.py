"""Configurations of DepthVLA: what is refused, in words that name value and limit, and what survives saving."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_depthvla import tiny, tiny_config

from stereovla.modeling_stereovla import DepthExpertConfig, DepthVLAConfig, DepthVLAForActionPrediction
from stereovla.modeling_stereovla.configuration_depthvla import PRESETS, stereo_encoder

SHARED = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
COUNTS = ("state_dim", "state_history", "action_dim", "chunk_size", "pose_dim", "flow_draws", "num_inference_steps")
# overrides of the tiny preset: what is said
REFUSED = {
    "mask": ({"mask": "blok"}, "mask is 'blok'; it must be one of block, full"),
    "no views": ({"views": []}, r"views are \[\]; they must be different names, at least one"),
    "the same view twice": ({"views": ["left", "left"]}, r"views are \['left', 'left'\]; they must be different"),
    "a view that is the stereo encoder's": (
        {"views": ["left", "right"], "depth_config": stereo_encoder()},
        "'right' is the stereo encoder's",
    ),
    "vision model": (
        {"vlm_config": {"vision_config": {"image_size": 32}}},
        "vision_config has image_size 32 and patch_size 16; both must equal the model's, 64 and 16",
    ),
    "image_size": (
        {"depth_expert": False, "image_size": 72, "vlm_config": {"vision_config": {"image_size": 72}}},
        r"image_size is 72; it must be divisible by patch_size \(16\)",
    ),
    "projection": (
        {"vlm_config": {"projection_dim": 128}},
        "projection_dim is 128; it must be the language model's hidden_size, 64",
    ),
    "depth loss without an expert": (
        {"depth_expert": False, "depth_map_loss_weight": 1.0},
        "depth_map_loss_weight is 1.0, but depth_config is None",
    ),
    "size of the depth expert's views": (
        {"depth_config": {"image_size": 96}},
        "depth_config.image_size is 96; it must be 64",
    ),
    "pointers beside finer depth": (
        {"use_pointers": True, "depth_config": {"merge_size": 2, "encoder_config": {"patch_size": 8}}},
        r"merge_size\) have 8 px; pointers read them .* it must be 16",
    ),
    "odd width": ({"expert_hidden_size": 63}, "expert_hidden_size is 63; the time embedding needs an even width"),
    "bins": ({"action_vocab_size": 256}, r"256; it must lie above num_bins \(256\)"),
    "vocabulary": ({"action_vocab_size": 1025}, r"1025; .* not above the language model's vocab_size \(1024\)"),
    "image token": ({"image_token_id": -1}, "image_token_id is -1; it must be at least 0"),
    "time embedding": ({"time_embedding_dtype": "half"}, "'half'; it must be 'float32' or 'model'"),
    "noise": ({"noise_scale": 1.5}, r"noise_scale is 1.5; it must be in \[0, 1\]"),
    "lambda": ({"silog_lambda": -0.5}, r"silog_lambda is -0.5; it must be in \[0, 1\]"),
    "times": ({"time_min": 1.0}, "time_min, time_max are 1.0, 1.0; 0 <= time_min < time_max <= 1 must hold"),
    "field": ({"chunk_sise": 3}, "DepthVLAConfig has no field 'chunk_sise'; did you mean 'chunk_size'"),
    "field of the depth expert": (
        {"depth_config": {"merge_sise": 3}},
        "DepthExpertConfig has no field 'merge_sise'; did you mean 'merge_size'",
    ),
    # of the depth expert alone
    "two encoders": ({"depth_config": {"stereo_config": {}}}, "both given; the depth expert has one encoder"),
    "input": ({"depth_config": {"input": "disparity"}}, "'disparity'; it must be one of pictures, depth"),
    "depth for two eyes": (
        {"depth_config": {**stereo_encoder(), "input": "depth"}},
        "a stereo encoder compares pictures; give encoder_config instead",
    ),
    "patches": ({"depth_config": {"patch_size": 24}}, r"image_size is 64; it must be divisible by patch_size \(24\)"),
    "pairs": (
        {"depth_config": {**stereo_encoder(), "image_size": 48}},
        "image_size is 48; it must be divisible by 32",
    ),
    "merge": ({"depth_config": {"merge_size": 3}}, r"merge_size is 3; it must divide patch_size \(16\)"),
    "no merge": ({"depth_config": {"merge_size": 0}}, "merge_size is 0; it must divide"),
    "cells": (
        {"depth_config": {"merge_size": 2}},
        "encoder_config has patch_size 16; it must be patch_size / merge_size, 8",
    ),
    **{
        name: ({"depth_config": {"decoder_config": {name: 8}}}, rf"decoder_config.{name} is 8; it must be the language")
        for name in SHARED
    },
    **{name: ({name: 0}, f"{name} is 0; it must be at least 1") for name in COUNTS},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case):
    overrides, message = REFUSED[case]
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        DepthVLAConfig.from_preset("depthvla-tiny", **overrides)


def test_other_language_models_and_presets_are_refused():
    vlm = tiny_config().vlm_config.to_dict()
    vlm["text_config"]["model_type"] = "gemma2"
    with pytest.raises(StrictDataclassError, match="text_config is a 'gemma2'; it must be a 'gemma'"):
        DepthVLAConfig(vlm_config=vlm, action_vocab_size=1024)
    for kind in (DepthVLAConfig, DepthExpertConfig):
        with pytest.raises(ValueError, match="'depthvla-huge'; the presets are depthvla-tiny, .*, depthvla-full"):
            kind.from_preset("depthvla-huge")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [{}, {"depth_expert": False}, {"mask": "full", "views": ["left", "wrist"]}])
def test_presets_survive_saving(tmp_path, preset, options):
    config = DepthVLAConfig.from_preset(preset, **options)
    config.save_pretrained(tmp_path)
    again = DepthVLAConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"transformers_version": 0} == config.to_dict() | {"transformers_version": 0}
    assert (again.depth_config is None) == ("depth_expert" in options)


def test_a_depth_expert_has_the_config_of_its_policy(tmp_path):
    for preset in PRESETS:
        config = DepthExpertConfig.from_preset(preset)
        config.save_pretrained(tmp_path / preset)
        again = DepthExpertConfig.from_pretrained(tmp_path / preset)
        assert again.to_dict() | {"transformers_version": 0} == config.to_dict() | {"transformers_version": 0}
        ours = DepthVLAConfig.from_preset(preset).depth_config
        assert config.decoder_config.to_dict() == ours.decoder_config.to_dict()
        assert config.cell_size == ours.cell_size and config.num_tokens == ours.num_tokens


def test_views_in_pixel_values_end_with_the_stereo_encoder_s():
    assert tiny_config(views=["left", "wrist"]).pixel_views == ["left", "wrist"]
    assert tiny_config(views=["left", "wrist"], depth_config=stereo_encoder()).pixel_views == ["left", "wrist", "right"]
    assert tiny_config(views=["left", "right"]).pixel_views == ["left", "right"]
    assert tiny_config(depth_expert=False).stereo_config is None


def test_unknown_keys_of_a_saved_config_are_left_out_with_a_warning(tmp_path, caplog):
    """Such as a newer version may write; misspelt keywords are refused."""
    model = tiny(torch.float32)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["attention_sinks"], saved["depth_config"]["sharpness"] = 3, 1.0
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with caplog.at_level("WARNING"):
        again = DepthVLAForActionPrediction.from_pretrained(tmp_path)
    assert "DepthVLAConfig: unknown keys of the saved config are left out: attention_sinks" in caplog.text
    assert "DepthExpertConfig: unknown keys of the saved config are left out: sharpness" in caplog.text
    assert not hasattr(again.config, "attention_sinks") and not hasattr(again.config.depth_config, "sharpness")
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_unknown_keys_of_a_part_of_a_part_are_left_out_too(caplog):
    values = tiny_config(depth_config=stereo_encoder()).to_dict()
    values["depth_config"]["stereo_config"]["sharpness"] = 1.0
    with caplog.at_level("WARNING"):
        again = DepthVLAConfig.from_dict(values)
    assert "StereoEncoderConfig: unknown keys of the saved config are left out: sharpness" in caplog.text
    del values["depth_config"]["stereo_config"]["sharpness"]
    assert again.to_dict() == DepthVLAConfig.from_dict(values).to_dict()


def test_a_tied_output_layer_is_the_language_model_s_choice():
    config = tiny_config()
    assert config.tie_word_embeddings and config.text_config.tie_word_embeddings
    config.tie_word_embeddings = False
    assert not config.text_config.tie_word_embeddings
