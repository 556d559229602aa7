"""Rotary embeddings of type "dynamic" (InternLM2's), whose frequencies follow the length of a text."""

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding


class DynamicRotaryEmbedding(LlamaRotaryEmbedding):
    """As in transformers, but a function of the positions alone. Theirs keeps the longest length that it has seen, for
    which it looks at values: in every pass the device waits, and a graph breaks.
    """

    @torch.no_grad()
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B, L, head_dim) of positions (B, L), in the dtype of `x`."""
        known, factor = self.config.max_position_embeddings, self.config.rope_parameters["factor"]
        # neural tangent kernel scaling: 1 up to the length that is known
        longer = ((position_ids.max() + 1) / known).clamp(min=1) - 1
        pairs = len(self.original_inv_freq)
        power = -torch.arange(pairs, device=x.device) / max(1, pairs - 1)
        frequencies = self.original_inv_freq.to(x.device).float() * (1 + factor * longer) ** power
        angles = (position_ids[..., None].float() * frequencies).repeat(1, 1, 2)
        return tuple((part * self.attention_scaling).to(x.dtype) for part in (angles.cos(), angles.sin()))


def without_waiting(transformer: PreTrainedModel) -> PreTrainedModel:
    """The transformer, whose rotary embedding no longer looks at values."""
    if transformer.rotary_emb.rope_type == "dynamic":
        transformer.rotary_emb = DynamicRotaryEmbedding(transformer.config)
    return transformer
