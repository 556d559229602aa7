"""InternLM2's weights -> a Llama model, and its config.json -> the fields of a LlamaConfig.

    stereovla convert internlm2 --checkpoint internlm2-1_8b --out language_model

InternLM2 (https://huggingface.co/internlm/internlm2-1_8b) is a Llama whose query, key and value weights are one tensor.
The command reads a folder with its config.json and its weights and writes a LlamaForCausalLM folder; nothing of its
remote code is run. The StereoVLA checkpoint uses the same names for its language model and its action expert.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .convert_files import Part, open_weights
from .convert_output import Output, outline_model, write_model

NAMES = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE_LAYERS = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def split_wqkv(weight: torch.Tensor, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Rows of the fused weight -> query (heads * head_dim, hidden), key and value (kv_heads * head_dim, hidden).

    The fused rows are, for each key-value head, those of its query heads, then of its key, then of its value.

    Args:
        weight: ((heads + 2 * kv_heads) * head_dim, hidden).
    """
    groups = num_heads // num_kv_heads
    if num_heads % num_kv_heads or weight.shape[0] % (num_heads + 2 * num_kv_heads):
        raise ValueError(
            f"wqkv has {weight.shape[0]} rows; {num_heads} query and {num_kv_heads} key-value heads need a multiple of "
            f"{num_heads + 2 * num_kv_heads}, and the key-value heads must divide the query heads"
        )
    heads = weight.unflatten(0, (num_kv_heads, groups + 2, -1))  # (kv_heads, groups + 2, head_dim, hidden)
    return heads[:, :groups].flatten(0, 2), heads[:, groups].flatten(0, 1), heads[:, groups + 1].flatten(0, 1)


def convert_key(key: str, tensor: torch.Tensor, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """LlamaForCausalLM's keys and tensors for one key of InternLM2ForCausalLM.

    Raises:
        KeyError: the key is not InternLM2's.
    """
    if key in OUTSIDE_LAYERS:
        return {OUTSIDE_LAYERS[key]: tensor}
    match = re.fullmatch(r"(model\.layers\.\d+)\.(.+)\.weight", key)
    if match and match[2] == "attention.wqkv":
        parts = zip("qkv", split_wqkv(tensor, num_heads, num_kv_heads), strict=True)
        return {f"{match[1]}.self_attn.{name}_proj.weight": rows for name, rows in parts}
    if not match or match[2] not in NAMES:
        raise KeyError(key)
    return {f"{match[1]}.{NAMES[match[2]]}.weight": tensor}


def llama_fields(internlm2: dict) -> dict:
    """Fields of the LlamaConfig that equals InternLM2's config.json.

    Raises:
        ValueError: it lacks a field, or has one that a Llama of these keys cannot express.
    """
    copied = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    if missing := [name for name in (*copied, "rope_theta") if name not in internlm2]:
        raise ValueError(f"InternLM2's config lacks {', '.join(missing)}; it has {', '.join(sorted(internlm2))}")
    if internlm2.get("bias"):
        raise ValueError("InternLM2's config has bias true; only models without biases are converted")
    if internlm2.get("tie_word_embeddings"):
        raise ValueError(
            "InternLM2's config has tie_word_embeddings true; only models with an output layer are converted"
        )
    scaling = internlm2.get("rope_scaling")
    rope = {"rope_type": "default"} if scaling is None else {k: v for k, v in scaling.items() if k != "type"}
    if scaling is not None:
        rope.setdefault("rope_type", scaling.get("type"))
        if rope["rope_type"] not in ("dynamic", "linear"):
            raise ValueError(f"rope_scaling is {scaling}; the types that InternLM2 knows are dynamic and linear")
    return {
        **{name: internlm2[name] for name in copied},
        "head_dim": internlm2["hidden_size"] // internlm2["num_attention_heads"],
        "hidden_act": internlm2.get("hidden_act", "silu"),
        "rope_parameters": {**rope, "rope_theta": internlm2["rope_theta"]},
        "tie_word_embeddings": False,
        "initializer_range": internlm2.get("initializer_range", 0.02),
        "bos_token_id": internlm2.get("bos_token_id", 1),
        "eos_token_id": internlm2.get("eos_token_id", 2),
        "pad_token_id": internlm2.get("pad_token_id", 2),
    }


@dataclass(kw_only=True)
class Options(Output):
    """InternLM2's folder -> a LlamaForCausalLM folder; nothing of its remote code is run.

    stereovla convert internlm2 --checkpoint internlm2-1_8b --out language_model
    """

    checkpoint: str = field(metadata={"help": "Folder with InternLM2's config.json and its weights."})


def convert(options: Options) -> Path:
    """The folder of a LlamaForCausalLM with InternLM2's weights; ValueError if any key is unknown or missing."""
    folder = Path(options.checkpoint)
    config = LlamaConfig(**llama_fields(json.loads((folder / "config.json").read_text())))

    def convert_part(key, tensor):
        return convert_key(key, tensor, config.num_attention_heads, config.num_key_value_heads)

    model = outline_model(LlamaForCausalLM, config)
    return write_model(options, model, [Part(open_weights(folder), convert_part)], "InternLM2 of this config")
