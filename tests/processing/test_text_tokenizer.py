"""The tokenizer for training from scratch: whole words and pixels, reserved bins, the same from the same texts."""

import random

import pytest
from transformers import AutoTokenizer

from stereovla.processing import build_tokenizer
from stereovla.processing.answers import (
    BinTokens,
    CameraParameters,
    action_prompt,
    box_prompt,
    depth_prompt,
    value_text,
)

NAMES = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("cube", "cylinder", "ball")]
TEXTS = [*NAMES, *(f"pick up the {name}" for name in NAMES)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(TEXTS, num_bins=64)


def pieces(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    return [tokenizer.decode([i]) for i in ids]


def test_words_are_whole_tokens(tokenizer):
    words = pieces(tokenizer, action_prompt("pick up the red cylinder"))
    assert " ".join(w.strip() for w in words[:2] + words[9:15]) == "In : pick up the red cylinder ?"
    assert [" green", " ball"] == pieces(tokenizer, box_prompt("green ball"))[8:10]


def test_pixels_and_two_decimals_are_whole(tokenizer):
    assert pieces(tokenizer, value_text([0.53, 12.1], 2)) == ["[", "0", ".53", ",", "12", ".10", "]"]
    first = len(tokenizer) - 64 - 100
    assert tokenizer.convert_tokens_to_ids([".00", ".07", ".99"]) == [first, first + 7, first + 99]
    assert pieces(tokenizer, depth_prompt([[16, 5]]))[7:13] == [" (", "16", ",", " ", "5", ")"]
    assert pieces(tokenizer, depth_prompt([[116, 5]]))[7:14] == [" (", "1", "16", ",", " ", "5", ")"]
    of_larger = build_tokenizer(TEXTS, num_bins=64, image_size=128)
    assert pieces(of_larger, depth_prompt([[116, 5]]))[7:13] == [" (", "116", ",", " ", "5", ")"]
    assert pieces(of_larger, "1.207") == ["1", ".20", "7"]
    with pytest.raises(ValueError, match="image_size is 1001; it must be 1 to 1000 px"):
        build_tokenizer(TEXTS, image_size=1001)


@pytest.mark.parametrize("text", ["the Würfel 立方体 🤖", "", "a\tb\n\n c", "x" * 50, "0123456789"])
def test_any_text_survives(tokenizer, text):
    assert "".join(pieces(tokenizer, text)) == text or "\ufffd" in "".join(pieces(tokenizer, text))


def test_camera_answers_survive(tokenizer):
    camera = CameraParameters((1.2, 1.2), (0.5, 0.5), 0.063, (0.5, -0.4, 0.6), (0.2, -0.6, 0.6, -0.2))
    assert "".join(pieces(tokenizer, camera.text())) == camera.text()


def test_layout(tokenizer):
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<pad>", "<s>", "</s>", "<image>")] == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    bins = BinTokens(64, len(tokenizer))
    assert tokenizer.convert_ids_to_tokens([len(tokenizer) - 1, bins.first_id]) == ["<bin_1>", "<bin_64>"]
    plain = tokenizer(" ".join(TEXTS), add_special_tokens=False)["input_ids"]
    assert not bins.is_bin(plain).any()
    assert tokenizer("red")["input_ids"][0] == 1  # BOS by default


def test_same_texts_same_tokenizer(tokenizer):
    shuffled = TEXTS * 2
    random.Random(0).shuffle(shuffled)
    again = build_tokenizer(shuffled, num_bins=64)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<s>pick up the red cube</s><image><bin_7> é"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert len(again) == len(tokenizer) and again.model_max_length == tokenizer.model_max_length


@pytest.mark.parametrize("texts", [[], ["red cube", " "]])
def test_bad_texts(texts):
    with pytest.raises(ValueError, match="no empty one"):
        build_tokenizer(texts)
