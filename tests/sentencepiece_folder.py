"""A small folder as InternLM2 publishes its tokenizer: sentencepiece's file, and code that must not be run."""

import io
import json
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

VOCABULARY, SPARE = 560, 64  # pieces; the last ones are spare as in InternLM2, whose bins are written on them
TEXTS = [
    "In: What action should the robot take to pick up the red cube?\nOut: ",
    "In: What action should the robot take to move the small red toy elephant to the blue wooden container?\nOut: ",
    "In: What is the bounding box of green apple in the images?\nOut: ",
    "In: What is the depth at (16, 21), (3, 115) in the image?\nOut: [0.53,1.25]",
    "f [1.207,1.207] c [0.500,0.500] b [0.063] t [0.550,-0.400,0.620] q [0.271,-0.653,0.653,-0.271]",
    "pick up the orange can and stack it,  or   not: 1234567890\n\n\tüber naïve café 立方体",
]


def train(**options) -> ModelProto:
    """A sentencepiece model of VOCABULARY pieces: a BPE with single digits that falls back to bytes, and SPARE pieces.

    As in InternLM2's file, the text "\\x00" is a piece although sentencepiece's own training never makes such a one.
    """
    written = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False} | options
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=written,
        vocab_size=VOCABULARY - SPARE - 1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    proto = ModelProto.FromString(written.getvalue())
    for number, piece in enumerate(["\x00", *(f"[UNUSED_TOKEN_{index}]" for index in range(SPARE))]):
        proto.pieces.add(piece=piece, score=-1000.0 - number)
    return proto


def write_tokenizer(folder: Path, proto: ModelProto, listed: dict[int, str] | None = None) -> SentencePieceProcessor:
    """Writes the folder and returns sentencepiece's own tokenizer.

    Args:
        listed: special tokens at ids, for tokenizer_config.json.
    """
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    code = "tokenization_internlm2_fast.InternLM2TokenizerFast"
    description = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": [None, code]}}
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    description["added_tokens_decoder"] = {
        str(index): {"content": token, "special": True} | flags for index, token in (listed or {}).items()
    }
    description["chat_template"] = "{{ messages }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(description))
    (folder / "tokenization_internlm2_fast.py").write_text("raise AssertionError('remote code was run')\n")
    return SentencePieceProcessor(model_proto=proto.SerializeToString())
