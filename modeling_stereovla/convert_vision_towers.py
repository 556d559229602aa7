"""timm's SigLIP and DINOv2 with registers -> transformers' vision models.

    stereovla convert vision_towers --checkpoint siglip.safetensors --num_heads 16 --out semantic

The released StereoVLA checkpoint names its towers as timm does (vit_so400m_patch14_siglip_224 and
vit_large_patch14_reg4_dinov2, https://github.com/huggingface/pytorch-image-models). The command tells the two apart by
their keys and writes a SiglipVisionModel (without its pooling head) or a Dinov2WithRegistersModel.

StereoVLA takes the output of the second-to-last block. So of timm's keys the last block, the final norm and SigLIP's
attention pooling influence nothing, and with `features_only` they are known but not kept.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from .convert_files import Part, WeightSource, open_weights
from .convert_output import Output, outline_model, write_model

SIGLIP_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
DINOV2_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
ATTENTION_POOLING = re.compile(r"attn_pool\.(latent|(q|kv|proj|norm|mlp\.fc[12])\.(weight|bias))")
PARAMETER = r"(.+)\.(weight|bias)"


def _block(key: str, depth: int, features_only: bool) -> tuple[int, str, bool] | None:
    """(number, name within the block, whether it is kept) of a block's key; None for other keys."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if match is None:
        return None
    number = int(match[1])
    if number >= depth:
        raise KeyError(key)
    return number, match[2], number < depth - features_only


def convert_siglip_key(
    key: str, tensor: torch.Tensor, depth: int, features_only: bool = True
) -> dict[str, torch.Tensor]:
    """SiglipVisionModel's keys and tensors for one key of timm's SigLIP of `depth` blocks.

    Raises:
        KeyError: the key is not of such a tower.
    """
    if ATTENTION_POOLING.fullmatch(key):
        return {}
    if key == "pos_embed":
        return {"embeddings.position_embedding.weight": tensor[0]}
    if match := re.fullmatch(r"(patch_embed\.proj|norm)\.(weight|bias)", key):
        if match[1] == "norm":
            return {} if features_only else {f"post_layernorm.{match[2]}": tensor}
        return {f"embeddings.patch_embedding.{match[2]}": tensor}
    block = _block(key, depth, features_only)
    match = block and re.fullmatch(PARAMETER, block[1])
    if not match or (match[1] not in SIGLIP_BLOCK and match[1] != "attn.qkv"):
        raise KeyError(key)
    ours = f"encoder.layers.{block[0]}"
    if not block[2]:
        return {}
    if match[1] == "attn.qkv":
        rows = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{ours}.self_attn.{name}_proj.{match[2]}": part for name, part in rows}
    return {f"{ours}.{SIGLIP_BLOCK[match[1]]}.{match[2]}": tensor}


def resize_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """Position table of patches (1, n * n, C) -> (1, side * side, C): antialiased bicubic, as in transformers."""
    old = math.isqrt(table.shape[1])
    if old == side:
        return table
    grid = table.float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    if table.is_meta:
        return table.new_empty(1, side * side, table.shape[-1])
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False, antialias=True)
    return grid.flatten(2).transpose(1, 2).to(table.dtype)


def convert_dinov2_key(
    key: str, tensor: torch.Tensor, depth: int, features_only: bool = True, grid: int | None = None
) -> dict[str, torch.Tensor]:
    """Dinov2WithRegistersModel's keys and tensors for one key of timm's DINOv2 of `depth` blocks.

    timm's position table has no entry for the class token, as it is part of that token: here the entry is zero. The
    mask token of the pre-training, which timm does not keep, is zero too; only masked inputs would use it.

    Args:
        grid: side of the position table in patches; None keeps the table as it is.

    Raises:
        KeyError: the key is not of such a tower.
    """
    if key == "cls_token":
        return {"embeddings.cls_token": tensor, "embeddings.mask_token": torch.zeros_like(tensor[0])}
    if key == "reg_token":
        return {"embeddings.register_tokens": tensor}
    if key == "pos_embed":
        table = resize_positions(tensor, grid or math.isqrt(tensor.shape[1]))
        return {"embeddings.position_embeddings": torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)}
    if match := re.fullmatch(r"(patch_embed\.proj|norm)\.(weight|bias)", key):
        if match[1] == "norm":
            return {} if features_only else {f"layernorm.{match[2]}": tensor}
        return {f"embeddings.patch_embeddings.projection.{match[2]}": tensor}
    block = _block(key, depth, features_only)
    scale = block and re.fullmatch(r"ls([12])\.gamma", block[1])
    match = block and re.fullmatch(PARAMETER, block[1])
    if not scale and (not match or (match[1] not in DINOV2_BLOCK and match[1] != "attn.qkv")):
        raise KeyError(key)
    ours = f"encoder.layer.{block[0]}"
    if not block[2]:
        return {}
    if scale:
        return {f"{ours}.layer_scale{scale[1]}.lambda1": tensor}
    if match[1] == "attn.qkv":
        rows = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{ours}.attention.{name}_proj.{match[2]}": part for name, part in rows}
    return {f"{ours}.{DINOV2_BLOCK[match[1]]}.{match[2]}": tensor}


def tower_depth(outlines: dict[str, torch.Tensor]) -> int:
    """Blocks of a timm vision transformer."""
    numbers = [int(match[1]) for key in outlines if (match := re.match(r"blocks\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def is_dinov2(outlines: dict[str, torch.Tensor]) -> bool:
    """True for DINOv2 with registers, False for SigLIP.

    Raises:
        ValueError: they are neither.
    """
    if "patch_embed.proj.weight" in outlines and "pos_embed" in outlines and tower_depth(outlines):
        if "reg_token" in outlines and "cls_token" in outlines:
            return True
        if "cls_token" not in outlines and any(ATTENTION_POOLING.fullmatch(key) for key in outlines):
            return False
    some = ", ".join(sorted(outlines)[:5])
    raise ValueError(f"neither timm's SigLIP nor its DINOv2 with registers: {len(outlines)} keys, {some}, ...")


def tower_fields(outlines: dict[str, torch.Tensor], num_heads: int) -> dict:
    """Config fields of the transformers model of a timm tower, `model_type` included, from the shapes of its weights.

    Args:
        num_heads: attention heads, which no shape tells; 16 in both of StereoVLA's towers.
    """
    dinov2 = is_dinov2(outlines)
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in outlines]:
        raise ValueError(f"the tower lacks {', '.join(missing)}")
    hidden, _, patch_size, _ = outlines["patch_embed.proj.weight"].shape
    intermediate = outlines["blocks.0.mlp.fc1.weight"].shape[0]
    if hidden % num_heads:
        raise ValueError(f"num_heads is {num_heads}; it must divide the tower's width, {hidden}")
    shared = {
        "hidden_size": hidden,
        "num_hidden_layers": tower_depth(outlines),
        "num_attention_heads": num_heads,
        "image_size": math.isqrt(outlines["pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",  # exact; the tanh form is off by up to 9e-4 of a standard deviation
        "layer_norm_eps": 1e-6,
    }
    if not dinov2:
        return {
            "model_type": "siglip_vision_model",
            **shared,
            "intermediate_size": intermediate,
            "vision_use_head": False,
        }
    if intermediate % hidden:
        raise ValueError(f"mlp.fc1 is {intermediate} wide; DINOv2's is a multiple of its hidden size, {hidden}")
    return {
        "model_type": "dinov2_with_registers",
        **shared,
        "mlp_ratio": intermediate // hidden,
        "num_register_tokens": outlines["reg_token"].shape[1],
    }


def tower_part(source: WeightSource, features_only: bool = True, grid: int | None = None) -> Part:
    """The part that converts a timm tower's keys; `grid` as in `convert_dinov2_key`."""
    depth = tower_depth(source.outlines)
    if is_dinov2(source.outlines):
        return Part(source, lambda key, tensor: convert_dinov2_key(key, tensor, depth, features_only, grid))
    return Part(source, lambda key, tensor: convert_siglip_key(key, tensor, depth, features_only))


@dataclass(kw_only=True)
class Options(Output):
    """timm's SigLIP or DINOv2 with registers -> a SiglipVisionModel or a Dinov2WithRegistersModel.

    stereovla convert vision_towers --checkpoint siglip.safetensors --num_heads 16 --out semantic
    """

    checkpoint: str = field(metadata={"help": "timm's weights: a file, or a folder of the Hub."})
    num_heads: int = field(default=16, metadata={"help": "Attention heads; 16 in SigLIP-so400m and in DINOv2-L."})


def convert(options: Options) -> Path:
    """The folder of the whole tower; ValueError if any key is unknown or missing."""
    source = open_weights(options.checkpoint)
    fields = tower_fields(source.outlines, options.num_heads)
    if fields.pop("model_type") == "dinov2_with_registers":
        model = outline_model(Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**fields))
    else:
        model = outline_model(SiglipVisionModel, SiglipVisionConfig(**fields))
    return write_model(options, model, [tower_part(source, features_only=False)], "timm tower of this size")
