"""The last layer of a language model, of whose tokens all but the last are only there to be read.

What the last layer makes of a token is what the next token is predicted from. Of a picture's tokens nothing is: others
read their keys and values alone. So queries, attention and MLP of all but the last token are left out, and so are their
gradients. Of a small model, whose visual tokens are many and whose layers are two, that is a large part of what the
language model computes.
"""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaModel,
    eager_attention_forward,
    rotate_half,
)

from .layer_caches import CACHE, PrefixCache


class PrefixLayer(LlamaDecoderLayer):
    """A Llama's layer that gives a `PrefixCache` the keys and values of all tokens (B, L, hidden), and returns the last
    token alone, (B, 1, hidden).
    """

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, *args, **kwargs) -> torch.Tensor:
        cache, attention = kwargs.get(CACHE), self.self_attn
        if not isinstance(cache, PrefixCache):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        cosines, sines = (part[:, None] for part in kwargs["position_embeddings"])
        normed = self.input_layernorm(hidden_states)
        queries, keys, values = (
            project(tokens).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, heads, 1 or L, head_dim)
            for project, tokens in (
                (attention.q_proj, normed[:, -1:]),
                (attention.k_proj, normed),
                (attention.v_proj, normed),
            )
        )
        queries = queries * cosines[:, :, -1:] + rotate_half(queries) * sines[:, :, -1:]
        keys = keys * cosines + rotate_half(keys) * sines
        cache.update(keys, values, attention.layer_idx)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
            attention_mask = attention_mask[:, :, -1:]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        read, _ = attend(attention, queries, keys, values, attention_mask, dropout=0.0, scaling=attention.scaling)
        last = hidden_states[:, -1:] + attention.o_proj(read.flatten(2))
        return last + self.mlp(self.post_attention_layernorm(last))


def with_prefix_layer(transformer: LlamaModel) -> LlamaModel:
    """The transformer, whose last layer is a `PrefixLayer` with the weights that it has."""
    transformer.layers[-1].__class__ = PrefixLayer
    return transformer
