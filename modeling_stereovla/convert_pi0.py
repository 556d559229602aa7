r"""pi0's published weights -> a DepthVLA without depth expert, and back.

    stereovla convert pi0 --checkpoint DepthVLA-without-depth --out PI0

pi0 (arXiv 2410.24164) is a DepthVLA without depth expert. It is published in three layouts: transformers'
PI0ForConditionalGeneration (model.vlm.*, model.dit.*); openpi's PyTorch export
(https://github.com/Physical-Intelligence/openpi, paligemma_with_expert.*, from which `save_pretrained` of transformers
takes its names too); LeRobot's (https://huggingface.co/lerobot/pi0_base), which is openpi's behind "model.". All mean
the same by their numbers: t = 1 is noise, a norm's weight w scales by 1 + w, visual tokens are not scaled and word
embeddings by the root of their width, pixels are in [-1, 1] (which our model makes of [0, 1]). openpi computes its time
embedding in float64, transformers and we in float32: the angles differ by up to 1e-4.

The action expert's inputs are embeddings and its output a velocity: the token embedding or output layer that the files
hold for it is used by nothing. It is left out, and zeros on the way back. State and action vectors keep their 32
entries; a robot's own come first, zeros after them. pi0.5 has adaptive norms and no state token: it is refused.

The command writes a PI0ForConditionalGeneration; `stereovla convert depthvla --pi0` reads one.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PI0Config, PI0ForConditionalGeneration

from .configuration_depthvla import DepthVLAConfig
from .configuration_pi0 import FIELDS, pi0_config
from .configuration_policy import own_fields
from .convert_files import Part, WeightSource, converted_keys, open_weights, read_description
from .convert_output import Output, outline_model, write_model
from .convert_paligemma import EMBEDDING, HEAD, VLM, with_tied_head
from .convert_paligemma import convert_key as convert_paligemma_key

EXPERT = "action_expert."
PROJECTIONS = "state_proj|action_in_proj|action_time_mlp_in|action_time_mlp_out|action_out_proj"
UNUSED = ("dit.embed_tokens.weight", "paligemma_with_expert.gemma_expert.lm_head.weight")
ADAPTIVE = re.compile(r"(^|\.)time_mlp_(in|out)\.|norm\.dense\.")
DESCRIBED = (*FIELDS.values(), "time_sampling_offset", "time_sampling_scale")  # LeRobot's config has these names too
# what the action expert has in common with the language model, whose keys and values it reads
SHARED = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
)


def convert_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our keys for one of pi0's, in any of the layouts; {} for what pi0 does not use.

    Raises:
        KeyError: the key is not pi0's.
    """
    name = key.removeprefix("model.")
    if name in UNUSED:
        return {}
    if match := re.fullmatch(r"(?:vlm|paligemma_with_expert\.paligemma)\.(.+)", name):
        return convert_paligemma_key(match[1], tensor)
    if match := re.fullmatch(r"(?:dit|paligemma_with_expert\.gemma_expert\.model)\.((?:layers|norm)\..+)", name):
        return {f"{EXPERT}transformer.{match[1]}": tensor}
    if match := re.fullmatch(rf"(?:embed_action_time\.)?((?:{PROJECTIONS})\.(?:weight|bias))", name):
        return {EXPERT + match[1]: tensor}
    raise KeyError(key)


def config_of_shapes(shapes: dict[str, tuple[int, ...]], vision_heads: int, described: dict[str, Any]) -> PI0Config:
    """The config that openpi and LeRobot do not write: sizes from shapes, with the one key-value head that all of
    openpi's variants have.

    Args:
        shapes: our key -> shape.
        vision_heads: attention heads of SigLIP, which no shape tells.
        described: PI0Config's fields that are known, chunk_size at least.
    """

    def layers(prefix: str) -> int:
        numbers = (re.match(re.escape(prefix) + r"layers\.(\d+)\.", key) for key in shapes)
        return max((int(match[1]) for match in numbers if match), default=-1) + 1

    def gemma(prefix: str) -> dict[str, Any]:
        first = f"{prefix}layers.0."
        width, queries = shapes[f"{first}self_attn.o_proj.weight"]
        size = shapes[f"{first}self_attn.k_proj.weight"][0]
        return {
            "model_type": "gemma",
            "hidden_size": width,
            "intermediate_size": shapes[f"{first}mlp.gate_proj.weight"][0],
            "num_hidden_layers": layers(prefix),
            "num_attention_heads": queries // size,
            "num_key_value_heads": 1,
            "head_dim": size,
            "vocab_size": shapes[EMBEDDING][0],
        }

    tower = f"{VLM}vision_tower."
    width, _, patch, _ = shapes[f"{tower}embeddings.patch_embedding.weight"]
    if width % vision_heads:
        raise ValueError(f"vision_heads is {vision_heads}; it must divide the vision tower's width, {width}")
    text = gemma(f"{VLM}language_model.")
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes[f"{tower}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": layers(f"{tower}encoder."),
        "num_attention_heads": vision_heads,
        "image_size": patch * math.isqrt(shapes[f"{tower}embeddings.position_embedding.weight"][0]),
        "patch_size": patch,
        "vision_use_head": False,
    }
    return PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": vision,
            "projection_dim": text["hidden_size"],
            "hidden_size": text["hidden_size"],
            "image_token_index": 257152,  # <image>, appended to Gemma's tokens and PaliGemma's places
        },
        dit_config=gemma(f"{EXPERT}transformer."),
        **{
            **described,
            "max_state_dim": shapes[f"{EXPERT}state_proj.weight"][1],
            "max_action_dim": shapes[f"{EXPERT}action_in_proj.weight"][1],
        },
    )


def policy_fields(config: PI0Config) -> dict[str, Any]:
    """DepthVLAConfig fields of a pi0.

    Raises:
        ValueError: its action expert is not a Gemma of the language model's layers and heads.
    """
    text, expert = config.vlm_config.text_config, config.dit_config
    pairs = {name: (getattr(expert, name, None), getattr(text, name, None)) for name in SHARED}
    if wrong := [f"{name} is {mine!r}, not {its!r}" for name, (mine, its) in pairs.items() if mine != its]:
        raise ValueError(f"dit_config must be a transformer beside the language model's: {'; '.join(wrong)}")
    return {
        **{ours: getattr(config, theirs) for ours, theirs in FIELDS.items()},
        "vlm_config": own_fields(config.vlm_config),
        "depth_config": None,
        "depth_map_loss_weight": 0.0,
        "image_size": config.vlm_config.vision_config.image_size,
        "patch_size": config.vlm_config.vision_config.patch_size,
        "image_token_id": config.vlm_config.image_token_id,
        "expert_hidden_size": expert.hidden_size,
        "expert_intermediate_size": expert.intermediate_size,
        "time_min": config.time_sampling_offset,
        "time_max": config.time_sampling_offset + config.time_sampling_scale,
    }


def open_pi0(path: str | Path, chunk_size: int | None = None, vision_heads: int = 16) -> tuple[dict[str, Any], Part]:
    """DepthVLAConfig fields and weights, under our keys, of a published pi0 in any of the three layouts.

    Args:
        chunk_size: steps of a chunk, where the folder does not say it; no shape tells.
        vision_heads: attention heads of SigLIP, where the folder does not say it.

    Raises:
        ValueError: it is a pi0.5 or another model, or its sizes are not known.
    """
    described, part = read_description(path), Part(open_weights(path), convert_key)
    adaptive = sorted(key for key in part.source.outlines if ADAPTIVE.search(key))
    if adaptive or described.get("type") == "pi05" or described.get("model_type") == "pi05":
        found = f" (it has {adaptive[0]})" if adaptive else ""
        raise ValueError(
            f"{path} is a pi0.5{found}: its time enters by adaptive norms and its state as words, which DepthVLA's "
            "action expert does not have; valid: pi0, such as lerobot/pi0_base"
        )
    part = with_tied_head(part)
    if described.get("model_type") == PI0Config.model_type:
        return policy_fields(PI0Config.from_pretrained(path)), part
    if (kind := described.get("model_type", described.get("type", "pi0"))) != "pi0":
        raise ValueError(f"{path} is a {kind!r}; valid: 'pi0', of transformers, openpi or LeRobot")
    steps = chunk_size or described.get("chunk_size", described.get("action_horizon"))
    if steps is None:
        raise ValueError(
            f"{path} does not say how many steps a chunk has: add it as --overrides '{{\"chunk_size\": 50}}'"
        )
    known = {name: described[name] for name in DESCRIBED if name in described} | {"chunk_size": steps}
    shapes = {ours: tuple(part.source.outlines[key].shape) for ours, key in converted_keys(part).items()}
    try:
        config = config_of_shapes(shapes, vision_heads, known)
    except KeyError as error:
        raise ValueError(f"{path} is no pi0: it lacks the weight that becomes {error.args[0]}") from error
    return policy_fields(config), part


def convert_back(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """PI0ForConditionalGeneration's keys for one of a DepthVLA without depth expert.

    Raises:
        KeyError: PI0 has no such weight.
    """
    if key.startswith(VLM):
        return convert_paligemma_key(key.removeprefix(VLM), tensor)
    if key == HEAD:
        return {}  # the embedding under another name
    place, _, name = key.partition(".")
    if place != "action_expert":
        raise KeyError(key)
    if name.startswith("transformer."):
        return {f"model.dit.{name.removeprefix('transformer.')}": tensor}
    return {name if name.startswith("action_out_proj.") else f"embed_action_time.{name}": tensor}


@dataclass(kw_only=True)
class Options(Output):
    """A DepthVLA without depth expert -> transformers' PI0ForConditionalGeneration, which computes the same.

    stereovla convert pi0 --checkpoint DepthVLA-without-depth --out PI0

    The way here is `stereovla convert depthvla --pi0 PI0`. PI0's action expert has a token embedding that nothing uses;
    it becomes zeros.
    """

    checkpoint: str = field(metadata={"help": "Folder of a DepthVLA without depth expert."})


def convert(options: Options) -> Path:
    """The folder of a PI0ForConditionalGeneration; ValueError if the policy is more than a pi0."""
    kind = read_description(options.checkpoint).get("model_type")
    if kind != DepthVLAConfig.model_type:
        raise ValueError(f"{options.checkpoint} is a {kind!r}; valid: the folder of a 'depthvla'")
    config = pi0_config(DepthVLAConfig.from_pretrained(options.checkpoint))
    source = open_weights(options.checkpoint)
    dtype = next(iter(source.outlines.values())).dtype
    size = (config.dit_config.vocab_size, config.dit_config.hidden_size)
    unused = WeightSource.of("zeros", {"model.dit.embed_tokens.weight": torch.zeros(1, 1, dtype=dtype).expand(size)})
    parts = [Part(source, convert_back), Part(unused, lambda key, tensor: {key: tensor})]
    return write_model(options, outline_model(PI0ForConditionalGeneration, config), parts, "DepthVLA of this config")
