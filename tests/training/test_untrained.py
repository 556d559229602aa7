"""Untrained policies: their tokenizer is made for the prompts that their processor writes."""

import pytest

from stereovla.train import TrainingOptions, build
from stereovla.training.models import untrained

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


def test_points_of_a_frozen_stereo_encoder_want_a_trained_one():
    options = TrainingOptions(preset="points", dataset=["d"], output_dir="o", freeze="stereo")
    with pytest.raises(ValueError, match="the points would be of noise; give --stereo_encoder"):
        build(options, META)
    options.freeze = ""
    model, processor = build(options, META)
    assert processor.points_frame == model.config.points_frame == "base"
