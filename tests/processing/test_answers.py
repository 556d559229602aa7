"""Prompts, answers and bin tokens against the recorded official examples."""

import json
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stereovla.processing import answers

GOLDENS = Path(__file__).parents[2] / ".." / "shared" / "goldens" / "stereovla_miniature"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="recorded reference tensors are not here")


@pytest.fixture(scope="module")
def case():
    return json.loads((GOLDENS / "case.json").read_text())


@needs_goldens
def test_prompts_and_value_text_are_the_released_ones(case):
    texts = case["case"]["texts"]
    recorded = [entry["text"] for entry in case["train_texts"]]
    assert recorded == [
        answers.action_prompt(texts["long"]),
        answers.action_prompt(texts["short"]),
        answers.box_prompt(texts["bbox"]),
        answers.value_prompt(texts["value"]),
        answers.value_text(texts["values"], 2),
    ]
    assert answers.depth_prompt([16.4, 21.9]) == recorded[3]


@needs_goldens
@pytest.mark.parametrize("number", [0, 1])
def test_bin_tokens_are_the_released_ones(case, number):
    recorded = case["uniform_tokenizer"][number]
    bins = answers.BinTokens(recorded["token_num"], recorded["vocab_size"])
    assert bins.encode(recorded["values"]).tolist() == recorded["ids"]
    assert bins.decode(recorded["ids"]).tolist() == recorded["decoded"]
    assert bins.decode(recorded["other_ids"]).tolist() == recorded["other_decoded"]


@needs_goldens
def test_released_box_tokens(case):
    """20, 30, 120, 200 and 24, 30, 124, 200 of a 224 px view give the recorded ids: left view first."""
    from safetensors.numpy import load_file

    recorded = load_file(GOLDENS / "tensors.safetensors")["train_input_ids"][2]
    bins = answers.BinTokens(case["case"]["action_token_num"], case["case"]["llm"]["vocab_size"])
    boxes = [[20, 30, 120, 200], [24, 30, 124, 200]]
    text_ids = case["train_texts"][2]["ids"]
    assert bins.encode_boxes(boxes, (224, 224)).reshape(-1).tolist() == recorded[len(text_ids) :][:8].tolist()


@settings(max_examples=100)
@given(value=st.floats(-1.2, 1.2), num_bins=st.integers(2, 300))
def test_bins_invert_within_half_a_bin(value, num_bins):
    bins = answers.BinTokens(num_bins, 1000)
    token = bins.encode(value)
    assert bins.is_bin(token) and bins.first_id <= token <= 999
    clipped = min(max(value, -1), 1)
    # Exact arithmetic: bin b holds the values from edge b - 1 up to edge b, the last one only the value 1.
    edge = Fraction(2, num_bins - 1)
    expected = min(num_bins, int((Fraction(clipped) + 1) / edge) + 1)
    assert abs(1000 - token - expected) <= (
        abs((Fraction(clipped) + 1) / edge - round((Fraction(clipped) + 1) / edge)) < 1e-12
    )
    assert abs(bins.decode(token) - clipped) <= float(edge) / 2 + 1e-12


def test_bins_reject_nan_and_impossible_sizes():
    with pytest.raises(ValueError, match="NaN"):
        answers.BinTokens(8, 100).encode([0.0, np.nan])
    for num_bins, size in ((1, 100), (100, 100)):
        with pytest.raises(ValueError, match=f"num_bins={num_bins}"):
            answers.BinTokens(num_bins, size)
    assert answers.BinTokens(8, 100).is_bin([91, 92, 99, 100]).tolist() == [False, True, True, False]


def test_boxes_round_trip():
    bins = answers.BinTokens(256, 1000)
    boxes = np.random.default_rng(0).uniform(0, [320, 240, 320, 240], (20, 4))
    np.testing.assert_allclose(
        bins.decode_boxes(bins.encode_boxes(boxes, (240, 320)), (240, 320)), boxes, atol=320 / 255 / 2
    )


@settings(max_examples=100)
@given(values=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=4), decimals=st.integers(0, 4))
def test_value_text_round_trip(values, decimals):
    text = answers.value_text(values, decimals)
    parsed = answers.parse_values(text)
    for value, got, written in zip(values, parsed, text[1:-1].split(","), strict=True):
        assert abs(Decimal(value) - Decimal(written)) <= Decimal(1).scaleb(-decimals) / 2
        assert got == float(written)
        assert written.lstrip("-0.") or not written.startswith("-")  # no negative zero


def test_value_text_rounds_halves_up_on_the_binary_value():
    assert answers.value_text([0.125, 0.375, 2.5, -0.001], 2) == "[0.13,0.38,2.50,0.00]"
    assert answers.value_text([1.005, 1.015], 2) == "[1.00,1.01]"  # as floats both lie below the half
    assert answers.value_text(2.5, 0) == "[3]"


@pytest.mark.parametrize("text", ["", "0.5", "[]", "[0.5", "[0.5,]", "[a]", "[.5]", "[0.5] m", "[1e3]", "[nan]"])
def test_garbage_is_no_value(text):
    with pytest.raises(ValueError, match="no list of numbers"):
        answers.parse_values(text)


def test_values_may_stand_between_spaces():
    assert answers.parse_values(" [0.5,0.6] ") == [0.5, 0.6]


def test_camera_text_round_trip():
    camera = answers.CameraParameters(
        (1.20749, 1.2), (0.5, 0.4996), 0.063, (0.55, -0.4, 0.62), (0.2706, -0.6533, 0.6533, -0.2706)
    )
    text = camera.text()
    assert text == "f [1.207,1.200] c [0.500,0.500] b [0.063] t [0.550,-0.400,0.620] q [0.271,-0.653,0.653,-0.271]"
    parsed = answers.CameraParameters.parse(text)
    assert parsed.text() == text
    np.testing.assert_allclose(parsed.position_m, camera.position_m, atol=5e-4)
    assert parsed.baseline_m == 0.063


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "does not have the form"),
        ("f [1,1] c [1,1] b [1] t [1,2,3]", "does not have the form"),
        ("c [1,1] f [1,1] b [1] t [1,2,3] q [1,0,0,0]", "does not have the form"),
        ("f [1,1] c [1,1] b [1,2] t [1,2,3] q [1,0,0,0]", "field 'b' has 2 numbers, expected 1"),
    ],
)
def test_garbage_is_no_camera(text, message):
    with pytest.raises(ValueError, match=message):
        answers.CameraParameters.parse(text)
