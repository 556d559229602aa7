"""Small models of transformers, as their makers publish them: PI0 in its three layouts, PaliGemma, Depth Anything."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0ForConditionalGeneration,
    PreTrainedModel,
)

VOCABULARY, IMAGE_TOKEN, SIDE, PATCH = 320, 300, 48, 16
VISUAL_TOKENS = (SIDE // PATCH) ** 2
GEMMA = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}


def paligemma_config(image_token: int = IMAGE_TOKEN, **text) -> PaliGemmaConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 40, "intermediate_size": 56}
    return PaliGemmaConfig(
        text_config={"model_type": "gemma", **GEMMA, **sizes, **text},
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "intermediate_size": 32,
            "vision_use_head": False,
        },
        projection_dim=40,
        hidden_size=40,
        image_token_index=image_token,
    )


@torch.no_grad()
def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Every weight random, the norms too, which begin as zeros; outputs of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        size = parameter.shape[1:].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.normal_(0, size, generator=generator)
    return model.eval()


def pi0(image_token: int = IMAGE_TOKEN, **text) -> PI0ForConditionalGeneration:
    vlm = paligemma_config(image_token, **text)
    expert = {"model_type": "gemma", **GEMMA, "hidden_size": 32, "intermediate_size": 48}
    sizes = {"chunk_size": 5, "num_inference_steps": 3}
    return randomized(PI0ForConditionalGeneration(PI0Config(vlm_config=vlm.to_dict(), dit_config=expert, **sizes)))


def paligemma(image_token: int = IMAGE_TOKEN, **text) -> PaliGemmaForConditionalGeneration:
    return randomized(PaliGemmaForConditionalGeneration(paligemma_config(image_token, **text)), seed=1)


def depth_anything(patch: int = PATCH) -> DepthAnythingForDepthEstimation:
    backbone = {**VISION, "model_type": "dinov2", "num_hidden_layers": 4, "image_size": 5 * patch, "patch_size": patch}
    backbone |= {"mlp_ratio": 2, "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=patch,
        reassemble_hidden_size=24,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    return randomized(DepthAnythingForDepthEstimation(config), seed=2)


def openpi_key(key: str) -> str:
    """The name in openpi's PyTorch export of PI0ForConditionalGeneration's weight, from openpi's modules."""
    table = [
        (r"model\.vlm\.vision_tower\.(.+)", "paligemma_with_expert.paligemma.model.vision_tower.vision_model.{}"),
        # tied, and written once, under the name that sorts first
        (r"model\.vlm\.language_model\.embed_tokens\.(weight)", "paligemma_with_expert.paligemma.lm_head.{}"),
        (r"model\.vlm\.(.+)", "paligemma_with_expert.paligemma.model.{}"),
        (r"model\.dit\.embed_tokens\.(weight)", "paligemma_with_expert.gemma_expert.lm_head.{}"),
        (r"model\.dit\.(.+)", "paligemma_with_expert.gemma_expert.model.{}"),
        (r"embed_action_time\.(.+)", "{}"),
        (r"(action_out_proj\..+)", "{}"),
    ]
    found = next((name.format(match[1]) for pattern, name in table if (match := re.fullmatch(pattern, key))), None)
    assert found is not None, key
    return found


def hub_paligemma_key(key: str) -> str:
    """The name on the Hub, google/paligemma-3b-pt-224, of PaliGemmaForConditionalGeneration's weight."""
    name = key.removeprefix("model.")
    name = re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return f"language_model.{name}" if name == "lm_head.weight" else name


def write(folder: Path, weights: dict[str, torch.Tensor], description: dict) -> Path:
    folder.mkdir(parents=True)
    save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def write_pi0(folder: Path, model: PI0ForConditionalGeneration, layout: str) -> Path:
    """transformers' (as `save_pretrained` writes it, or by the modules' names), openpi's or LeRobot's."""
    state = model.state_dict()
    if layout == "saved":
        model.save_pretrained(folder)
        return folder
    if layout == "transformers":
        return write(folder, state, model.config.to_dict())
    openpi = {openpi_key(key): tensor for key, tensor in state.items()}
    if layout == "openpi":
        described = {"action_dim": 32, "action_horizon": 5, "paligemma_variant": "gemma_2b", "precision": "float32"}
        return write(folder, openpi, described)
    # LeRobot's own module ties the embedding again, and its file has both names
    openpi["paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"] = openpi[
        "paligemma_with_expert.paligemma.lm_head.weight"
    ]
    described = {"type": "pi0", "chunk_size": 5, "num_inference_steps": 3, "max_state_dim": 32, "max_action_dim": 32}
    return write(folder, {f"model.{key}": tensor for key, tensor in openpi.items()}, described)
