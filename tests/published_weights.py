"""Keys and shapes of published weights, written down from their layouts, for tests at any size."""

import torch


def timm_tower(width: int, depth: int, intermediate: int, side: int, registers: int = 0, patch: int = 14) -> dict:
    """Key -> shape of timm's DINOv2 with `registers`, or of its SigLIP where there are none."""
    shapes = {"pos_embed": (1, side * side, width), "patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes["patch_embed.proj.bias"] = (width,)
    if registers:
        shapes |= {"cls_token": (1, 1, width), "reg_token": (1, registers, width)}

    def linear(name, outputs, inputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    for block in range(depth):
        name = f"blocks.{block}"
        shapes |= norm(f"{name}.norm1") | norm(f"{name}.norm2")
        shapes |= linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
        shapes |= linear(f"{name}.mlp.fc1", intermediate, width) | linear(f"{name}.mlp.fc2", width, intermediate)
        if registers:
            shapes |= {f"{name}.ls1.gamma": (width,), f"{name}.ls2.gamma": (width,)}
    shapes |= norm("norm")
    if not registers:
        pool = "attn_pool"
        shapes |= {f"{pool}.latent": (1, 1, width)} | norm(f"{pool}.norm")
        shapes |= linear(f"{pool}.q", width, width) | linear(f"{pool}.kv", 2 * width, width)
        shapes |= linear(f"{pool}.proj", width, width)
        shapes |= linear(f"{pool}.mlp.fc1", intermediate, width) | linear(f"{pool}.mlp.fc2", width, intermediate)
    return shapes


def internlm2(rows: int, width: int, layers: int, intermediate: int, heads: int, kv_heads: int, head_dim: int) -> dict:
    """Key -> shape of InternLM2ForCausalLM."""
    shapes = {"model.tok_embeddings.weight": (rows, width), "model.norm.weight": (width,)}
    shapes["output.weight"] = (rows, width)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {
            f"{name}.attention.wqkv.weight": ((heads + 2 * kv_heads) * head_dim, width),
            f"{name}.attention.wo.weight": (width, heads * head_dim),
            f"{name}.feed_forward.w1.weight": (intermediate, width),
            f"{name}.feed_forward.w2.weight": (width, intermediate),
            f"{name}.feed_forward.w3.weight": (intermediate, width),
            f"{name}.attention_norm.weight": (width,),
            f"{name}.ffn_norm.weight": (width,),
        }
    return shapes


def stereovla(siglip: dict, dino: dict, language: dict, expert: dict, stereo: dict, stereo_channels: int) -> dict:
    """Key -> shape of the released StereoVLA with these parts."""
    width, narrow = language["model.norm.weight"][0], expert["model.norm.weight"][0]
    fused = siglip["norm.weight"][0] + dino["norm.weight"][0] + stereo_channels
    parts = {
        "backbone_2d.siglip.model.": siglip,
        "backbone_2d.dino.model.": dino,
        "backbone_2d.stereo.model.": stereo,
        "llm.llm.": language,
        "action_expert.": expert,
    }
    shapes = {prefix + key: shape for prefix, part in parts.items() for key, shape in part.items()}
    layers = {
        "projector.projector.0": (4 * fused, fused),
        "projector.projector.2": (width, 4 * fused),
        "projector.projector.4": (width, width),
        "flow_module.proprior_proj": (narrow, 7),
        "flow_module.action_in_proj": (narrow, 7),
        "flow_module.action_time_mlp.0": (narrow, 2 * narrow),
        "flow_module.action_time_mlp.2": (narrow, narrow),
        "flow_module.action_out_proj": (7, narrow),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal weights, float32, small enough for stable activations."""
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
