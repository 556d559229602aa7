"""Tokenizers of published language models, converted, against sentencepiece itself."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece_folder import SPARE, TEXTS, VOCABULARY, train, write_tokenizer
from transformers import AutoTokenizer

from stereovla.processing.convert_tokenizer import convert_tokenizer, read_tokenizer

CONFIG = {
    "text_config": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": VOCABULARY, "max_position_embeddings": 512},
    "image_token_id": VOCABULARY + 1,
}
VARIED = [
    *TEXTS,
    "",
    " ",
    "   three spaces before, two after  ",
    "\nOut: \n\n",
    "\tif x:\n\t\treturn -1.5e-3  # tabs",
    "3.14159 1,000,000 ½ ٣ 42nd",
    "Würfel 立方体 🤖👩‍🔧 é e\u0301 \u200b\ufeff ﬁ",
    "already▁marked ▁▁ words",
    "a byte <0x0A>, and [UNUSED_TOKEN_7]",
    "aaaaaaaaaaaaaaaaaaaaaaaa thethethe 00000",
]


@pytest.fixture(scope="module", params=[False, True], ids=["no_prefix", "prefix"])
def pair(request, tmp_path_factory):
    """sentencepiece's tokenizer and ours, without and with a space put before every text."""
    folder = tmp_path_factory.mktemp("tokenizer")
    return write_tokenizer(folder, train(add_dummy_prefix=request.param)), convert_tokenizer(folder, CONFIG)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", VARIED)
def test_ids_and_texts_are_those_of_sentencepiece(pair, text):
    reference, ours = pair
    assert ids(ours, text) == reference.encode(text)
    assert ours.decode(ids(ours, text)) == reference.decode(reference.encode(text))


# but for "\x00", a piece of InternLM2's file: sentencepiece takes the byte in its place, tokenizers the piece
CHARACTERS = st.one_of(st.sampled_from("Intheo \n▁019.,[]-"), st.characters(exclude_categories=["Cs"], min_codepoint=1))


@settings(max_examples=300, derandomize=True)
@given(text=st.text(CHARACTERS))
def test_ids_of_any_text_are_those_of_sentencepiece(pair, text):
    reference, ours = pair
    assert ids(ours, text) == reference.encode(text)
    assert ours.decode(ids(ours, text)) == reference.decode(reference.encode(text))


def test_merges_follow_the_scores_not_the_ids(tmp_path):
    proto = train()
    places = [index for index, piece in enumerate(proto.pieces) if piece.type == 1]
    pieces = [(proto.pieces[index].piece, proto.pieces[index].score) for index in places]
    random.Random(0).shuffle(pieces)
    for index, (piece, score) in zip(places, pieces, strict=True):
        proto.pieces[index].piece, proto.pieces[index].score = piece, score
    reference = write_tokenizer(tmp_path, proto)
    ours = read_tokenizer(tmp_path)
    for text in VARIED:
        assert ours.encode(text).ids == reference.encode(text)


def test_texts_are_never_merged_into_a_byte(tmp_path):
    """Not even where pieces lead to its name."""
    proto = train()
    known = {piece.piece for piece in proto.pieces}
    for piece in ("<", ">", "A", "x", "0", "<0", "x0", "<0x0", "A>"):
        if piece not in known:
            proto.pieces.add(piece=piece, score=1.0)
    reference = write_tokenizer(tmp_path, proto)
    assert (
        read_tokenizer(tmp_path).encode("<0x0A>").tokens == reference.encode("<0x0A>", out_type=str) == ["<0x0", "A>"]
    )


def test_special_tokens(pair):
    reference, ours = pair
    assert ours("the red cube")["input_ids"] == [1, *reference.encode("the red cube")]  # BOS, and no EOS
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert (ours.pad_token, ours.pad_token_id) == ("<PAD>", VOCABULARY)
    assert ours.convert_tokens_to_ids("<image>") == VOCABULARY + 1 == len(ours) - 1
    assert ours.model_max_length == 512 and ours.chat_template is None
    assert ours.decode([1, *ids(ours, "the red"), 2], skip_special_tokens=True) == "the red"


def test_saved_and_loaded_by_the_auto_class_it_is_the_same(pair, tmp_path):
    _, ours = pair
    ours.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in VARIED:
        assert again(text)["input_ids"] == ours(text)["input_ids"]
        assert again.decode(ids(again, text)) == ours.decode(ids(ours, text))
    assert len(again) == len(ours) and again.all_special_ids == ours.all_special_ids


def test_tokenizer_json_is_taken_as_it_is(pair, tmp_path):
    _, ours = pair
    ours.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"is not looked at")
    again = convert_tokenizer(tmp_path, CONFIG)
    assert [again(text)["input_ids"] for text in VARIED] == [ours(text)["input_ids"] for text in VARIED]


def test_tokens_of_the_config_stand_in_place_of_spare_pieces(tmp_path):
    """As in InternLM2's chat models: <|im_start|> is the last spare piece."""
    last = VOCABULARY - 1
    reference = write_tokenizer(tmp_path, train(), {0: "<unk>", 1: "<s>", 2: "</s>", last: "<|im_start|>"})
    ours = convert_tokenizer(tmp_path, CONFIG)
    assert ids(ours, "red<|im_start|>red") == [*reference.encode("red"), last, *reference.encode("red")]
    assert ids(ours, f"[UNUSED_TOKEN_{SPARE - 1}]") != [last] and last in ours.all_special_ids
    assert len(ours) == VOCABULARY + 2


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.model"):
        read_tokenizer(tmp_path)
    write_tokenizer(tmp_path, train())
    larger = {**CONFIG, "image_token_id": 570}
    with pytest.raises(ValueError, match=r"'<image>': 570}; the tokenizer of .* has 560 tokens, which gives .* 561}"):
        convert_tokenizer(tmp_path, larger)
    text = CONFIG["text_config"]
    for wrong in (300, [2, 7], None):
        with pytest.raises(ValueError, match=r"eos_token_id .*, which is no special token of .*'<s>'"):
            convert_tokenizer(tmp_path, {**CONFIG, "text_config": text | {"eos_token_id": wrong}})
    write_tokenizer(tmp_path, train(), {VOCABULARY + 5: "<|im_start|>"})
    with pytest.raises(ValueError, match="lists tokens at ids that they cannot have: {565: '<|im_start|>'}"):
        convert_tokenizer(tmp_path, CONFIG)
    proto = train()
    proto.normalizer_spec.remove_extra_whitespaces = True
    write_tokenizer(tmp_path, proto)
    with pytest.raises(ValueError, match="remove_extra_whitespaces is True, not False"):
        read_tokenizer(tmp_path)
    proto = train()
    proto.trainer_spec.model_type = 1
    write_tokenizer(tmp_path, proto)
    with pytest.raises(ValueError, match="model_type is 1, not 2"):
        read_tokenizer(tmp_path)
