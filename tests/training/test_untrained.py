"""Untrained policies: their tokenizer is made for the prompts that their processor writes."""

from dataclasses import replace

import pytest
import torch

from stereovla.train import TrainingOptions, build
from stereovla.training.models import untrained
from stereovla.training.stereo import StereoOptions
from stereovla.training.stereo import build as build_stereo_encoder

LIMITS = {"q01": [-1.0] * 7, "q99": [1.0] * 7}
META = {
    "tasks": ["pick up the red cube", "red cube"],
    "stats": {"arm": dict.fromkeys(("state", "action", "keyframe_pose"), LIMITS)},
    "fps": 10.0,
    "state_dim": 7,
    "action_dim": 7,
}


@pytest.mark.parametrize(
    "preset, prompt", [("tiny", "In: What action should the robot take to "), ("depthvla-tiny", "")]
)
def test_every_word_of_an_instruction_is_one_token(preset, prompt):
    """Of StereoVLA within its question, of DepthVLA at the beginning."""
    model, processor = untrained(preset, META)
    words = processor.tokenizer.tokenize(prompt + "pick up the red cube")[-5:]
    assert [word.removeprefix("Ġ") for word in words] == ["pick", "up", "the", "red", "cube"]
    assert processor.bins.vocab_size == model.config.action_vocab_size


@pytest.mark.parametrize("preset", ["points", "lab"])
def test_points_of_a_frozen_stereo_encoder_want_a_trained_one(preset, tmp_path):
    options = TrainingOptions(preset=preset, dataset=["d"], output_dir="o", freeze="stereo")
    advice = (
        f"the points would be of noise; give --stereo_encoder, such as .*stereovla pretrain stereo --preset {preset}"
    )
    with pytest.raises(ValueError, match=advice):
        build(options, META)
    encoder = build_stereo_encoder(StereoOptions(preset=preset, dataset=["d"], output_dir="e"))
    encoder.save_pretrained(tmp_path)
    given, _ = build(replace(options, stereo_encoder=str(tmp_path)), META)
    found = given.model.visual_tokens.stereo.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in encoder.state_dict().items())
    options.freeze = ""
    model, processor = build(options, META)
    assert processor.points_frame == model.config.points_frame == "base"
