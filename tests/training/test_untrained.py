"""Untrained policies: their tokenizer is made for the prompts that their processor writes."""

import pytest

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
