"""Batches of ids: padding, labels, limits, and the ids that no text may contain."""

import numpy as np
import pytest

from stereovla.processing import build_tokenizer
from stereovla.processing.prompt_tokens import IGNORE_INDEX, PromptTokens


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["red cube", "pick up the red cube"], num_bins=16)


def prompt_tokens(tokenizer, **options):
    defaults = {"image_token": "<image>", "num_visual_tokens": 4, "num_bins": 16, "action_vocab_size": None}
    return PromptTokens(tokenizer, **(defaults | {"max_length": None} | options))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_labels(tokenizer, side):
    sequences = [([1, 3, 9, 8, 7], 3, 0), ([1, 3], 2, 0), ([1, 3, 5], 0, 0)]
    out = prompt_tokens(tokenizer).pad(sequences, side)
    for row, (ids, first, _) in enumerate(sequences):
        padding = [0] * (5 - len(ids))
        ignored = [IGNORE_INDEX] * len(padding)
        answer = [IGNORE_INDEX] * first + ids[first:]
        left = side == "left"
        assert out["input_ids"][row].tolist() == (padding + ids if left else ids + padding)
        mask = [1] * len(ids)
        assert out["attention_mask"][row].tolist() == (padding + mask if left else mask + padding)
        assert out["labels"][row].tolist() == (ignored + answer if left else answer + ignored)
    assert all(value.dtype == np.int64 for value in out.values())


def test_start(tokenizer):
    assert prompt_tokens(tokenizer).start == [1, 3, 3, 3, 3]


def test_layouts(tokenizer):
    """BOS first, or every view's image tokens first; and how each puts a question."""
    ours, paligemma = prompt_tokens(tokenizer), prompt_tokens(tokenizer, images_first=True)
    assert ours.start_of(2) == [1] + [3] * 8 and ours.form.format("Why {x}?") == "In: Why {x}?\nOut: "
    assert paligemma.start_of(2) == [3] * 8 + [1] and paligemma.form.format("Why {x}?") == "Why {x}?\n"
    assert paligemma.start == paligemma.start_of(1) == [3, 3, 3, 3, 1] and paligemma.start_of(0) == [1]


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("red cube", "In: What action should the robot take to pick up the red cube?\nOut: "),
        ("red cube", "put the red cube on the other red cube"),  # the first of them
        ("(16, 21), (3, 5)", "the depth at (16, 21), (3, 5) in the image?"),
        ("cube", "cube"),
        ("zebra", "pick up the zebra now"),  # a word that falls apart
    ],
)
def test_places_of_a_part(tokenizer, part, text):
    tokens = prompt_tokens(tokenizer)
    ids, places = tokens.encode([text])[0], tokens.places_of(part, text)
    assert tokenizer.decode(ids[places]).strip() == part
    before = tokenizer.decode(ids[: places.start])
    assert text.startswith(before) and before.strip() == text[: text.index(part)].strip()
    with pytest.raises(ValueError, match="'green' is not in"):
        tokens.places_of("green", text)


def test_nothing_is_cut(tokenizer):
    tokens = prompt_tokens(tokenizer, max_length=5)
    assert tokens.pad([([1] * 5, 5, 0)], "left")["input_ids"].shape == (1, 5)
    with pytest.raises(
        ValueError, match=r"sample 1 has 6 tokens \(4 of them visual, 2 for the answer\), the limit is 5"
    ):
        tokens.pad([([1], 1, 0), ([3] * 4, 4, 2)], "left")
    with pytest.raises(ValueError, match=r"padding_side='top' is unknown; valid sides: \['left', 'right'\]"):
        tokens.pad([([1], 1, 0)], "top")


@pytest.mark.parametrize("text", ["the <image> cube", "cube</s>", "<s>", "a <bin_3>", "<pad>"])
def test_reserved_tokens_in_texts(tokenizer, text):
    with pytest.raises(ValueError, match="contains the reserved token '<"):
        prompt_tokens(tokenizer).encode(["red cube", text])


def test_special_tokens_are_checked(tokenizer):
    with pytest.raises(ValueError, match="no token '<picture>'; add it with"):
        prompt_tokens(tokenizer, image_token="<picture>")
    with pytest.raises(ValueError, match=r"the image token has id 3, which is also a bin: .* the bins are 1 \.\.\. 16"):
        prompt_tokens(tokenizer, action_vocab_size=17, num_bins=16)


def test_appended_pad_token(tokenizer):
    """The released layout: the pad token stands after the bins and is not counted."""
    import copy

    appended = copy.deepcopy(tokenizer)
    size = len(appended)
    appended.add_special_tokens({"pad_token": "<late_pad>"})
    with pytest.raises(ValueError, match="the pad token has id .* set action_vocab_size to the size without"):
        prompt_tokens(appended)
    tokens = prompt_tokens(appended, action_vocab_size=size)
    assert tokens.bins.encode([-1.0]).tolist() == [size - 1]
    assert tokens.pad([([1], 1, 0), ([1, 1], 2, 0)], "right")["input_ids"][0].tolist() == [1, size]


def test_remembered_texts(tokenizer, monkeypatch):
    """Repeated texts are tokenized once; the memory is bounded and never changes an answer."""
    monkeypatch.setattr("processing.prompt_tokens._REMEMBERED_TEXTS", 3)
    tokens = prompt_tokens(tokenizer)
    texts = [f"cube {i % 7}" for i in range(40)]
    expected = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert tokens.encode(texts) == expected
    for text, ids in zip(texts, expected, strict=True):
        assert tokens.encode([text, text]) == [ids, ids]
        assert len(tokens._seen) <= 7 + 1
