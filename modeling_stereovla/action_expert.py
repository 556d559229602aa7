"""The action expert: a transformer that denoises an action chunk while it reads the language model's keys and values
at every layer.

Shared by StereoVLA (arXiv 2512.21970, section III-C) and DepthVLA (arXiv 2510.13375). Its tokens are [state history |
pointers | action chunk];
state tokens see the valid prefix and each other, action tokens see everything before them and their own chunk.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import LlamaConfig, LlamaModel

from .flow_matching import time_embedding
from .layer_caches import CACHE, ChunkCache, ReadOnlyCache
from .quantization import input_dtype


@dataclass
class ReadPrefix:
    """What every denoising step of one chunk needs: nothing in it changes from step to step.

    cache: keys and values of prefix and state tokens, with room for the chunk's.
    mask: (B, 1, chunk, prefix + state + chunk), which of them the chunk sees; None = all.
    position_embeddings: cosines and sines of the chunk's positions.
    """

    cache: ChunkCache
    mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]


def expert_mask(prefix_mask: torch.Tensor, num_state: int, chunk: int, num_chunks: int = 1) -> torch.Tensor:
    """Block mask of the expert, bool (B, 1, S, prefix + S), True = may attend, with S = num_state + num_chunks * chunk.

    Several chunks (flow-matching draws of one sample) share the prefix and the state tokens and do not see each other.

    Args:
        prefix_mask: (B, prefix), nonzero = valid token.
    """
    # block 0 = state tokens, then one block for each chunk
    block = torch.cat(
        [
            torch.zeros(num_state, dtype=torch.long),
            torch.arange(1, num_chunks + 1).repeat_interleave(chunk),
        ]
    ).to(prefix_mask.device)
    own = (block[None, :] == 0) | (block[None, :] == block[:, None])  # (S, S)
    batch, size = prefix_mask.shape[0], block.shape[0]
    prefix = prefix_mask.bool()[:, None, None, :].expand(-1, 1, size, -1)
    return torch.cat([prefix, own[None, None].expand(batch, 1, -1, -1)], dim=-1)


@strict
class ExpertConfig(LlamaConfig):
    """A Llama whose width need not be a multiple of its heads: it has the language model's heads and head size."""

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""


class ActionExpert(nn.Module):
    """Velocity of a noisy action chunk, given the state history and the prefix's keys and values.

    Same depth, key-value heads and head size as the language model; hidden and intermediate sizes are its own.
    """

    def __init__(self, config):
        super().__init__()
        text = config.text_config
        expert_config = ExpertConfig(
            **{
                **text.to_dict(),
                "hidden_size": config.expert_hidden_size,
                "intermediate_size": config.expert_intermediate_size,
                "head_dim": text.head_dim,
                "vocab_size": 1,
                "pad_token_id": None,
                "bos_token_id": None,
                "eos_token_id": None,
            }
        )
        expert_config._attn_implementation = text._attn_implementation
        self.transformer = LlamaModel._from_config(expert_config)
        self.transformer.embed_tokens = None  # its inputs are embeddings
        for layer in self.transformer.layers:
            layer._can_checkpoint_with_cache = True  # the cache is read-only
        width = config.expert_hidden_size
        self.state_proj = nn.Linear(config.state_dim, width)
        self.action_in_proj = nn.Linear(config.action_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.action_out_proj = nn.Linear(width, config.action_dim)
        self.min_period, self.max_period = config.min_period, config.max_period
        self.time_embedding_dtype = config.time_embedding_dtype

    def embed_time(self, time: torch.Tensor) -> torch.Tensor:
        """Flow-matching times (...) -> (..., width), in the model's dtype."""
        dtype = input_dtype(self.action_in_proj, self.transformer.dtype)
        embedded = time_embedding(
            time,
            self.transformer.config.hidden_size,
            self.min_period,
            self.max_period,
            dtype if self.time_embedding_dtype == "model" else torch.float32,
        )
        return embedded.to(dtype)

    def embed_actions(self, noisy_actions: torch.Tensor, embedded_time: torch.Tensor) -> torch.Tensor:
        """noisy_actions (..., chunk, action_dim), embedded_time (..., width) -> (..., chunk, width)."""
        actions = self.action_in_proj(noisy_actions)
        time = embedded_time[..., None, :].to(actions.dtype).expand_as(actions)
        merged = torch.cat([actions, time], dim=-1)
        return self.action_time_mlp_out(nn.functional.silu(self.action_time_mlp_in(merged)))

    def forward(
        self,
        prefix_states: list[tuple[torch.Tensor, torch.Tensor]],
        prefix_mask: torch.Tensor,
        state_tokens: torch.Tensor,
        noisy_actions: torch.Tensor,
        time: torch.Tensor,
    ) -> torch.Tensor:
        """Velocity, the shape of `noisy_actions`, in one pass: for training.

        Args:
            prefix_states: the language model's (keys, values) of each layer, (B, kv_heads, P, head_dim).
            prefix_mask: (B, P), nonzero = valid.
            state_tokens: (B, S, width), the embedded state history (and pointers).
            noisy_actions: (B, K, chunk, action_dim): K flow-matching draws of each sample.
            time: (B, K).
        """
        _, draws, chunk, _ = noisy_actions.shape
        num_state = state_tokens.shape[1]
        actions = self.embed_actions(noisy_actions, self.embed_time(time)).flatten(1, 2)  # (B, K * chunk, width)
        embeds = torch.cat([state_tokens.to(actions.dtype), actions], dim=1)
        # positions continue after the last valid prefix token; the draws all take the same positions
        offset = torch.cat([torch.arange(num_state), (num_state + torch.arange(chunk)).repeat(draws)]).to(embeds.device)
        rotary = self.transformer.rotary_emb(embeds, prefix_mask.sum(-1, keepdim=True) + offset)
        mask = expert_mask(prefix_mask, num_state, chunk, draws)
        hidden = self._transform(embeds, ReadOnlyCache(prefix_states), mask, rotary)
        return self.action_out_proj(hidden[:, num_state:]).unflatten(1, (draws, chunk))

    def read_prefix(
        self,
        prefix_states: list[tuple[torch.Tensor, torch.Tensor]],
        prefix_mask: torch.Tensor,
        state_tokens: torch.Tensor,
        chunk: int,
    ) -> ReadPrefix:
        """What `denoise` needs in every step. State tokens do not see the chunk, so they are read here, once."""
        num_state = state_tokens.shape[1]
        cache = ChunkCache(prefix_states, num_state + chunk)
        positions = prefix_mask.sum(-1, keepdim=True) + torch.arange(num_state + chunk, device=prefix_mask.device)
        cosines, sines = self.transformer.rotary_emb(state_tokens, positions)
        rotary = cosines[:, :num_state], sines[:, :num_state]
        self._transform(state_tokens, cache, expert_mask(prefix_mask, num_state, 0, 0), rotary)
        cache.begin += num_state
        mask = None  # attention without one reads the keys of grouped heads without repeating them
        if not prefix_mask.all():
            mask = expert_mask(prefix_mask, num_state, chunk)[:, :, num_state:]
        return ReadPrefix(cache, mask, (cosines[:, num_state:], sines[:, num_state:]))

    def denoise(self, prefix: ReadPrefix, noisy_actions: torch.Tensor, embedded_time: torch.Tensor) -> torch.Tensor:
        """Velocity of chunks (B, chunk, action_dim) at one time, embedded: (width,). Compiles in one graph."""
        embeds = self.embed_actions(noisy_actions, embedded_time)
        return self.action_out_proj(self._transform(embeds, prefix.cache, prefix.mask, prefix.position_embeddings))

    def _transform(
        self,
        embeds: torch.Tensor,
        cache: ReadOnlyCache | ChunkCache,
        mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Last hidden states, the shape of `embeds` (B, S, width). `LlamaModel.forward` would compute mask and rotary
        embedding anew in every denoising step.
        """
        config = self.transformer.config
        if "flash" in config._attn_implementation:
            config._attn_implementation = "sdpa"  # flash kernels take no mask of blocks
        if mask is not None and config._attn_implementation != "sdpa":
            minimum = torch.finfo(embeds.dtype).min
            mask = torch.zeros(mask.shape, dtype=embeds.dtype, device=embeds.device).masked_fill(~mask, minimum)
        hidden = embeds
        for layer in self.transformer.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                is_causal=False,
                **{CACHE: cache},
            )
        return self.transformer.norm(hidden)
