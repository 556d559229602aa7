"""Transformers with weights and widths of their own that share one attention at every layer: a mixture of transformers.

pi0 (arXiv 2410.24164, section IV), and with a depth expert DepthVLA (arXiv 2510.13375, section III). At every layer
attention is over [VLM | depth | state, actions] under a block mask: each of the first two sees itself alone, the last
sees everything. So the first two never need each other: each runs once, by itself, and leaves its keys and values
behind, which is the same attention without the masked products. With the mask "full", the ablation, the two see each
other and run layer by layer together; what they leave behind is used in the same way.
"""

from collections.abc import Sequence

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GemmaConfig, GemmaModel, LlamaConfig, LlamaModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .layer_caches import CACHE, Stream
from .rotary_embedding import without_waiting

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines of the positions, (B, L, head_dim)


@strict
class NarrowLlamaConfig(LlamaConfig):
    """A Llama whose width need not be a multiple of its heads: it has another's heads and head size."""

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""


# the transformers that can be mixed, by model type: their blocks have the same parts
MIXED = {"llama": (NarrowLlamaConfig, LlamaModel), "gemma": (GemmaConfig, GemmaModel)}


def transformer_beside(text, hidden_size: int, intermediate_size: int) -> PreTrainedModel:
    """A transformer whose attention can be shared with that of `text`, a config: its layers, heads and head size, with
    widths of its own. Its inputs are embeddings.
    """
    config_class, model_class = MIXED[text.model_type]
    config = config_class(
        **{
            **text.to_dict(),
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "head_dim": text.head_dim,
            "vocab_size": 1,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    )
    config._attn_implementation = text._attn_implementation
    return without_embedding(without_waiting(model_class._from_config(config)))


def without_embedding(transformer: PreTrainedModel) -> PreTrainedModel:
    """The transformer without its token embedding, ready to be checkpointed while a cache is read or recorded."""
    transformer.embed_tokens = None
    for layer in transformer.layers:
        layer._can_checkpoint_with_cache = True  # read-only, or `RecordingCache`, which may be written twice
    return transformer


def attention_mask(transformer: PreTrainedModel, allowed: torch.Tensor | None, dtype: torch.dtype):
    """`allowed`, bool (B, 1, queries, keys), True = may attend, None = all, as the transformer's attention takes it.
    Given what it has returned, it returns it.
    """
    config = transformer.config
    if "flash" in config._attn_implementation:
        config._attn_implementation = "sdpa"  # flash kernels take no mask of blocks
    if allowed is None or allowed.dtype != torch.bool or config._attn_implementation == "sdpa":
        return allowed
    minimum = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, minimum)


def run_layers(
    transformer: PreTrainedModel,
    hidden: torch.Tensor,
    cache: Cache | None,
    allowed: torch.Tensor | None,
    rotary: Rotary,
) -> torch.Tensor:
    """Last hidden states, the shape of `hidden` (B, L, width). The transformer's own `forward` would make the mask and
    the rotary embedding anew in every call, such as every denoising step.
    """
    mask = attention_mask(transformer, allowed, hidden.dtype)
    for layer in transformer.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, is_causal=False, **{CACHE: cache})
    return transformer.norm(hidden)


def joint_mask(
    valid: torch.Tensor, token_type_ids: torch.Tensor | None, beside: torch.Tensor | None = None
) -> torch.Tensor:
    """What a prefix sees of itself, bool (B, 1, L, L): the prompt all of the prompt; an answer the prompt and what is
    before it in the answer (PaliGemma's prefix mask). With `beside`, a second stream, (B, 1, L + M, L + M): the two see
    each other, but the second no answer.

    Args:
        valid: (B, L), nonzero = token; token_type_ids: (B, L), 0 = prompt, 1 = answer; None = no answers.
        beside: (B, M), nonzero = token of the second stream.
    """
    length = valid.shape[1]
    answer = torch.zeros_like(valid, dtype=torch.bool) if token_type_ids is None else token_type_ids.bool()
    if beside is not None:
        valid = torch.cat([valid.bool(), beside.bool()], dim=1)
        answer = torch.cat([answer, torch.zeros_like(beside, dtype=torch.bool)], dim=1)
    order = torch.arange(valid.shape[1], device=valid.device)
    order = order.masked_fill(order >= length, -1)  # the second stream comes before all answers
    allowed = ~answer[:, None, :] | (order[None, :] <= order[:, None])
    return (allowed & valid.bool()[:, None, :])[:, None]


def run_together(
    transformers: Sequence[PreTrainedModel],
    hidden: Sequence[torch.Tensor],
    allowed: torch.Tensor,
    rotary: Sequence[Rotary],
) -> tuple[list[torch.Tensor], Stream]:
    """Runs several transformers layer by layer with one attention over the tokens of all.

    Args:
        hidden: (B, L_i, width_i) of each; rotary: of each. allowed: bool (B, 1, L, L), L the sum of the L_i.

    Returns:
        the last hidden states of each, and the keys and values of all, one behind the other.
    """
    first = transformers[0]
    mask = attention_mask(first, allowed, hidden[0].dtype)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(first.config._attn_implementation, eager_attention_forward)
    hidden, stream = list(hidden), []
    for layers in zip(*(transformer.layers for transformer in transformers), strict=True):
        if layers[0].gradient_checkpointing and layers[0].training:
            hidden, *states = checkpoint(_joint_layer, layers, hidden, mask, rotary, attend, use_reentrant=False)
        else:
            hidden, *states = _joint_layer(layers, hidden, mask, rotary, attend)
        stream.append(tuple(states))
    return [transformer.norm(part) for transformer, part in zip(transformers, hidden, strict=True)], stream


def _joint_layer(layers: Sequence[nn.Module], hidden, mask, rotary, attend):
    """One layer of each: hidden states, and the keys and values of all."""
    parts = [_projected(layer, part, turns) for layer, part, turns in zip(layers, hidden, rotary, strict=True)]
    queries, keys, values = (torch.cat(states, dim=2) for states in zip(*parts, strict=True))
    attention = layers[0].self_attn
    read, _ = attend(attention, queries, keys, values, mask, dropout=0.0, scaling=attention.scaling, is_causal=False)
    lengths = [part.shape[1] for part in hidden]
    out = []
    for layer, part, mine in zip(layers, hidden, read.flatten(2).split(lengths, dim=1), strict=True):
        part = part + layer.self_attn.o_proj(mine)
        out.append(part + layer.mlp(layer.post_attention_layernorm(part)))
    return out, keys, values


def _projected(layer: nn.Module, hidden: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values (B, heads, L, head_dim) of a layer."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    queries, keys, values = (
        project(normed).view(shape).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return *apply_rotary_pos_emb(queries, keys, *rotary), values
