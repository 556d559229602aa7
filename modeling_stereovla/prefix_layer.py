"""The last layer of a language model, of whose tokens some are there to be read.

What the last layer makes of a token is what the next token is predicted from. Of a picture's tokens, and of a prompt
whose answer nobody asks for, nothing is predicted: others read their keys and values alone. Queries, attention and MLP
of these are left out, and so are their gradients. Of a small model, whose visual tokens are many and whose layers are
two, that is a large part of what the language model computes.
"""

import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel, rotate_half

from .layer_caches import CACHE, PrefixCache


class PrefixLayer(LlamaDecoderLayer):
    """A Llama's layer that gives a `PrefixCache` the keys and values of its tokens, and the tokens back as they are."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        cache, attention = kwargs.get(CACHE), self.self_attn
        if not isinstance(cache, PrefixCache):
            return super().forward(hidden_states, *args, **kwargs)
        normed = self.input_layernorm(hidden_states)
        keys, values = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, kv_heads, L, head_dim)
            for project in (attention.k_proj, attention.v_proj)
        )
        cosines, sines = (part[:, None] for part in kwargs["position_embeddings"])
        cache.update(keys * cosines + rotate_half(keys) * sines, values, attention.layer_idx)
        return hidden_states


def with_prefix_layer(transformer: LlamaModel) -> LlamaModel:
    """The transformer, whose last layer is a `PrefixLayer`: the same weights, drawn once."""
    transformer.layers[-1].__class__ = PrefixLayer
    return transformer
