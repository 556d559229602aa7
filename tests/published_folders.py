"""Small published folders: the StereoVLA release, and the parts that a model can be assembled from."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from published_weights import internlm2, random_weights, stereovla, timm_tower
from released_miniature import STEREO, release_config, write_preprocessor
from safetensors.torch import save_file

from stereovla.modeling_stereovla import (
    StereoEncoderConfig,
    StereoEncoderModel,
    convert_parts,
    convert_stereovla,
    convert_vision_towers,
)

INTERNLM2 = {
    "model_type": "internlm2",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "bias": False,
}
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 8}
SIGLIP = timm_tower(16, 3, 20, side=16)
DINO = timm_tower(8, 3, 32, side=16, registers=4)
RELEASE = {
    "image_size": 224,
    "expert": {"hidden_size_scale": 2, "intermediate_size_scale": 2},
    "flow": {"beta_alpha": 1.5, "beta_beta": 1.0, "time_min": 0.001, "time_max": 1.0},
    "action_token_num": 64,
    "proprio_dim": 7,
    "action_dim": 7,
    "goal_dim": 7,
    "proprio_steps": 4,
    "action_steps": 5,
}


def released_shapes(rows: int = 320) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a small release without stereo weights."""
    language, expert = internlm2(rows, 32, 2, 48, **HEADS), internlm2(rows, 16, 2, 24, **HEADS)
    return stereovla(SIGLIP, DINO, language, expert, {}, stereo_channels=24)


def release(folder: Path, weights: dict[str, torch.Tensor], vocabulary: int = 300) -> convert_stereovla.Options:
    """Writes a small release without stereo weights, laid out as the published one."""
    (folder / "checkpoint").mkdir(parents=True)
    save_file(weights, folder / "checkpoint" / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(release_config(RELEASE)))
    (folder / "internlm2.json").write_text(json.dumps(INTERNLM2 | {"vocab_size": vocabulary}))
    write_preprocessor(folder / "preprocessor.npz")
    torch.manual_seed(0)
    StereoEncoderModel(StereoEncoderConfig(**STEREO)).save_pretrained(folder / "stereo")
    return convert_stereovla.Options(
        checkpoint=str(folder / "checkpoint" / "model.safetensors"),
        internlm2_config=str(folder / "internlm2.json"),
        out=str(folder / "converted"),
        stereo=str(folder / "stereo"),
        semantic_heads=2,
        spatial_heads=2,
    )


def write_internlm2(folder: Path, vocabulary: int = 300) -> dict[str, torch.Tensor]:
    folder.mkdir(parents=True)
    weights = random_weights(internlm2(vocabulary, 32, 2, 48, **HEADS), seed=1)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(INTERNLM2 | {"vocab_size": vocabulary}))
    return weights


def write_parts(folder: Path, vocabulary: int = 300) -> Path:
    """Parts in their formats: InternLM2, timm's SigLIP, transformers' DINOv2 of another size, a folder of ours."""
    write_internlm2(folder / "language_model", vocabulary)
    save_file(random_weights(SIGLIP, seed=2), folder / "siglip.safetensors")
    dino = timm_tower(8, 3, 32, side=5, registers=4)
    torch.save({"model": random_weights(dino, seed=3)}, folder / "dino.pth")
    convert_vision_towers.convert(
        convert_vision_towers.Options(checkpoint=str(folder / "dino.pth"), out=str(folder / "dino"), num_heads=2)
    )
    torch.manual_seed(4)
    StereoEncoderModel(StereoEncoderConfig(**STEREO)).save_pretrained(folder / "stereo")
    return folder


def assembly(parts: Path, out: Path, **changes) -> convert_parts.Options:
    """Options to assemble the folder of `write_parts`, with some of them changed."""
    options = convert_parts.Options(
        language_model=str(parts / "language_model"),
        semantic=str(parts / "siglip.safetensors"),
        spatial=str(parts / "dino"),
        stereo=str(parts / "stereo"),
        out=str(out),
        semantic_heads=2,
        overrides='{"num_bins": 64, "chunk_size": 5}',
        dtype="float32",
    )
    return replace(options, **changes)
