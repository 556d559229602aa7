"""PaliGemma's published weights -> the VLM of a DepthVLA.

PaliGemma (https://huggingface.co/google/paligemma-3b-pt-224, under Gemma's terms of use) is SigLIP, a linear projector
and a Gemma, by transformers' own classes in our model too: only names differ. The Hub has those of older versions
(language_model.model.*, vision_tower.vision_model.*), transformers 5 has model.language_model.*, model.vision_tower.*.
The output layer is the embedding.
"""

import re
from pathlib import Path

import torch
from transformers import PaliGemmaConfig

from .configuration_policy import own_fields
from .convert_files import Part, converted_keys, open_weights, read_description
from .saved_names import present_name

VLM = "model.vlm."
EMBEDDING, HEAD = f"{VLM}language_model.embed_tokens.weight", "lm_head.weight"


def convert_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our keys for one of PaliGemmaForConditionalGeneration's.

    Raises:
        KeyError: the key is not PaliGemma's.
    """
    name = present_name(key.removeprefix("model.")).replace("vision_tower.vision_model.", "vision_tower.")
    if name in (HEAD, f"language_model.{HEAD}"):
        return {HEAD: tensor}
    if not re.match(r"(vision_tower|multi_modal_projector|language_model)\.", name):
        raise KeyError(key)
    return {VLM + name: tensor}


def with_tied_head(part: Part) -> Part:
    """The part with the embedding alone, where the file has the output layer beside it or in its place.

    Raises:
        ValueError: it has both, and they differ.
    """
    published = converted_keys(part)
    if HEAD not in published:
        return part
    both = [part.source.read(published[name]) for name in (EMBEDDING, HEAD) if name in published]
    if len(both) == 2 and not torch.equal(*both):
        raise ValueError(
            f"{part.source.name} has a {published[HEAD]} that differs from {published[EMBEDDING]}, but its config has "
            "tie_word_embeddings true: one of them is wrong"
        )
    place = {} if len(both) == 2 else {HEAD: EMBEDDING}

    def convert(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        converted = part.convert(key, tensor)
        return {place.get(name, name): value for name, value in converted.items() if name != HEAD or place}

    return Part(part.source, convert)


def open_paligemma(path: str | Path) -> tuple[dict, Part]:
    """PaliGemmaConfig fields and weights, under our keys, of a folder of a PaliGemmaForConditionalGeneration.

    Raises:
        ValueError: it is another model.
    """
    kind = read_description(path).get("model_type")
    if kind != PaliGemmaConfig.model_type:
        raise ValueError(f"{path} is a {kind!r}; valid: the folder of a 'paligemma', such as paligemma-3b-pt-224")
    config = PaliGemmaConfig.from_pretrained(path)
    if (text := config.text_config.model_type) != "gemma":
        raise ValueError(f"{path} has a {text!r} for its language model; valid: 'gemma', of the first PaliGemma")
    part = Part(open_weights(path), convert_key)
    return own_fields(config), with_tied_head(part) if config.text_config.tie_word_embeddings else part
