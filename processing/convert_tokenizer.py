"""The tokenizer of a published language model -> the tokenizer of a StereoVLA, without running any remote code.

InternLM2 (https://huggingface.co/internlm/internlm2-1_8b) publishes sentencepiece's tokenizer.model, a BPE of bytes and
pieces, and a tokenizer class as remote code. What that class does is in the file: whether a text gets a leading space,
the pieces and their scores, and which of them stand for bytes. A tokenizer_config.json beside it may give pieces other
names. Ids are the same; decoding is sentencepiece's, which keeps the space that a text began with, where that class
always drops one. Reading the file needs sentencepiece and protobuf (the extra `convert`); the result needs neither.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, SpmConverter, generate_merges

PAD_TOKEN, IMAGE_TOKEN = "<PAD>", "<image>"  # appended in this order; the release appended <PAD>
# of sentencepiece's file: the type of models, and the types of pieces
BPE = 2
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


def _listed_tokens(folder: Path) -> dict[int, AddedToken]:
    """id -> token that tokenizer_config.json lists, in place of a piece or after the last one."""
    path = folder / "tokenizer_config.json"
    listed = json.loads(path.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if path.is_file() else {}
    return {int(index): AddedToken(**token) for index, token in listed.items()}


def read_sentencepiece(path: Path) -> Tokenizer:
    """sentencepiece's tokenizer.model, with the tokens of the tokenizer_config.json beside it.

    Ids and decoded texts are those of sentencepiece itself. Control symbols are special tokens.

    Raises:
        ValueError: it is no BPE, or normalises texts in a way that is not expressed here.
    """
    proto = SentencePieceExtractor(str(path)).proto
    known = {"model_type": (proto.trainer_spec.model_type, BPE)}
    known |= {
        name: (getattr(proto.normalizer_spec, name), value)
        for name, value in (("remove_extra_whitespaces", False), ("escape_whitespaces", True))
    }
    if wrong := [f"{name} is {found!r}, not {value!r}" for name, (found, value) in known.items() if found != value]:
        raise ValueError(f"{path} is no sentencepiece model as InternLM2's or Llama's: {'; '.join(wrong)}")
    added = {
        index: AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
        for index, piece in enumerate(proto.pieces)
        if piece.type in (CONTROL, USER_DEFINED)
    }
    added |= _listed_tokens(path.parent)
    names = [added[index].content if index in added else piece.piece for index, piece in enumerate(proto.pieces)]
    vocabulary = {name: index for index, name in enumerate(names)}
    # by score, as sentencepiece merges; bytes and tokens that are matched as a whole are never merged into
    scores = [(name, piece.score) for name, piece in zip(names, proto.pieces, strict=True)]
    whole = {name for index, name in enumerate(names) if proto.pieces[index].type != NORMAL or index in added}
    merges = generate_merges(vocabulary, scores, skip_tokens=whole)
    tokenizer = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary, merges)
    if proto.normalizer_spec.add_dummy_prefix:
        tokenizer.normalizer = normalizers.Sequence([tokenizer.normalizer, normalizers.Prepend("▁")])
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", left=1)])
    tokenizer.add_tokens([added[index] for index in sorted(added)])
    if wrong := {i: token.content for i, token in added.items() if tokenizer.id_to_token(i) != token.content}:
        raise ValueError(f"{path.parent / 'tokenizer_config.json'} lists tokens at ids that they cannot have: {wrong}")
    return tokenizer


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a published folder: its tokenizer.json, or else its tokenizer.model.

    Raises:
        FileNotFoundError: it has neither.
    """
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder / "tokenizer.model")
    raise FileNotFoundError(f"{folder} has neither tokenizer.json nor tokenizer.model")


def convert_tokenizer(folder: str | Path, config: dict) -> PreTrainedTokenizerFast:
    """The language model's tokenizer with <PAD> and then <image> appended; it writes BOS before a text, and no EOS.

    Args:
        folder: of the language model as published.
        config: the model's config.json, which says the ids of BOS, EOS, <PAD> and <image>.

    Raises:
        ValueError: the ids are others in this tokenizer.
    """
    text = config["text_config"]
    backend = read_tokenizer(Path(folder))
    special = {index: token.content for index, token in backend.get_added_tokens_decoder().items() if token.special}
    ends = {name: text[f"{name}_token_id"] for name in ("bos", "eos")}
    for name, index in ends.items():
        if not isinstance(index, int) or index not in special:
            raise ValueError(
                f"the model's config has {name}_token_id {index}, which is no special token of {folder}: {special}"
            )
    unknown, size = backend.model.unk_token, backend.get_vocab_size()
    others = [token for index, token in special.items() if index not in ends.values() and token != unknown]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": special[index] for name, index in ends.items()},
        unk_token=unknown,
        pad_token=PAD_TOKEN,
        extra_special_tokens=[*others, IMAGE_TOKEN],
        add_bos_token=True,
        add_eos_token=False,
        model_max_length=text["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
    )
    expected = {PAD_TOKEN: text["pad_token_id"], IMAGE_TOKEN: config["image_token_id"]}
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    if found != expected:
        raise ValueError(
            f"the model's config has the ids {expected}; the tokenizer of {folder} has {size} tokens, which gives "
            f"{found}: it is not the tokenizer of this model's language model"
        )
    return tokenizer
