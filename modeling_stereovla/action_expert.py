"""The action expert: a transformer that denoises an action chunk while it reads the language model's keys and values
at every layer.

Shared by StereoVLA (arXiv 2512.21970, section III-C) and DepthVLA (arXiv 2510.13375). Its tokens are [state history |
pointers | action chunk];
state tokens see the valid prefix and each other, action tokens see everything before them and their own chunk.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from .flow_matching import time_embedding
from .layer_caches import BufferedCache, ReadOnlyCache, Stream
from .mixture_of_transformers import attention_mask, run_layers, transformer_beside
from .quantization import input_dtype


@dataclass
class Prefix:
    """What the experts before it leave to the action expert.

    streams: their keys and values, one behind the other, P tokens in all.
    mask: (B, P), nonzero = valid token; None = all are, when it acts.
    length: (B, 1), where the positions of the expert's tokens begin, or one number for all.
    """

    streams: tuple[Stream, ...]
    mask: torch.Tensor | None
    length: torch.Tensor | int

    @classmethod
    def of(cls, stream: Stream, mask: torch.Tensor | None) -> "Prefix":
        """Of one expert: positions continue after its last valid token."""
        return cls((stream,), mask, stream[0][0].shape[2] if mask is None else mask.sum(-1, keepdim=True))

    def rows(self, rows: torch.Tensor) -> "Prefix":
        """Of the samples `rows`, (R,) int64, alone, in training."""
        streams = tuple(
            [tuple(part.index_select(0, rows) for part in states) for states in stream] for stream in self.streams
        )
        return Prefix(streams, self.mask[rows], self.length[rows])


@dataclass
class ReadPrefix:
    """What every denoising step of one chunk needs: nothing in it changes from step to step.

    cache: keys and values of prefix and state tokens, with room for the chunk's, or without where gradients are wanted.
    mask: (B, 1, chunk, prefix + state + chunk), which of them the chunk sees, as attention takes it; None = all.
    position_embeddings: cosines and sines of the chunk's positions.
    """

    cache: BufferedCache | ReadOnlyCache
    mask: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor]

    def for_gradients(self) -> "ReadPrefix":
        """For steps whose gradient is wanted: what they write would belong to their graph, which ends with them."""
        return replace(self, cache=ReadOnlyCache(self.cache.stream))


def expert_mask(prefix_mask: torch.Tensor, num_state: int, chunk: int, num_chunks: int = 1) -> torch.Tensor:
    """Block mask of the expert, bool (B, 1, S, prefix + S), True = may attend, with S = num_state + num_chunks * chunk.

    Several chunks (flow-matching draws of one sample) share the prefix and the state tokens and do not see each other.

    Args:
        prefix_mask: (B, prefix), nonzero = valid token.
    """
    # block 0 = state tokens, then one block for each chunk
    place = torch.arange(-num_state, num_chunks * chunk, device=prefix_mask.device)
    block = torch.where(place < 0, 0, 1 + place // max(1, chunk))
    own = (block[None, :] == 0) | (block[None, :] == block[:, None])  # (S, S)
    batch, size = prefix_mask.shape[0], block.shape[0]
    prefix = prefix_mask.bool()[:, None, None, :].expand(-1, 1, size, -1)
    return torch.cat([prefix, own[None, None].expand(batch, 1, -1, -1)], dim=-1)


class ActionExpert(nn.Module):
    """Velocity of a noisy action chunk, given the state history and the prefix's keys and values.

    Same depth, key-value heads and head size as the language model; hidden and intermediate sizes are its own.
    """

    def __init__(self, config):
        super().__init__()
        self.transformer = transformer_beside(
            config.text_config, config.expert_hidden_size, config.expert_intermediate_size
        )
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
        """noisy_actions (..., chunk, action_dim), embedded_time (width,), (..., 1, width) or one for each step ->
        (..., chunk, width).
        """
        actions = self.action_in_proj(noisy_actions)
        time = embedded_time.to(actions.dtype).expand_as(actions)
        merged = torch.cat([actions, time], dim=-1)
        return self.action_time_mlp_out(nn.functional.silu(self.action_time_mlp_in(merged)))

    def forward(
        self, prefix: Prefix, state_tokens: torch.Tensor, noisy_actions: torch.Tensor, time: torch.Tensor
    ) -> torch.Tensor:
        """Velocity, the shape of `noisy_actions`, in one pass: for training.

        Args:
            state_tokens: (B, S, width), the embedded state history (and pointers).
            noisy_actions: (B, K, chunk, action_dim): K flow-matching draws of each sample.
            time: (B, K), or (B, K, chunk) where steps have times of their own.
        """
        _, draws, chunk, _ = noisy_actions.shape
        num_state = state_tokens.shape[1]
        time = time[..., None] if time.ndim == 2 else time
        actions = self.embed_actions(noisy_actions, self.embed_time(time)).flatten(1, 2)  # (B, K * chunk, width)
        embeds = torch.cat([state_tokens.to(actions.dtype), actions], dim=1)
        # the draws all take the same positions
        places = torch.arange(num_state + chunk, device=embeds.device)
        offset = torch.cat([places[:num_state], places[num_state:].repeat(draws)])
        rotary = self.transformer.rotary_emb(embeds, prefix.length + offset)
        mask = expert_mask(prefix.mask, num_state, chunk, draws)
        hidden = run_layers(self.transformer, embeds, ReadOnlyCache(*prefix.streams), mask, rotary)
        return self.action_out_proj(hidden[:, num_state:]).unflatten(1, (draws, chunk))

    def read_prefix(self, prefix: Prefix, state_tokens: torch.Tensor, chunk: int) -> ReadPrefix:
        """What `denoise` needs in every step. State tokens do not see the chunk, so they are read here, once."""
        num_state = state_tokens.shape[1]
        cache = BufferedCache(*prefix.streams, room=num_state + chunk)
        positions = prefix.length + torch.arange(num_state + chunk, device=state_tokens.device)[None]
        cosines, sines = self.transformer.rotary_emb(state_tokens, positions)
        rotary = cosines[:, :num_state], sines[:, :num_state]
        of_state = mask = None  # attention without one reads the keys of grouped heads without repeating them
        if prefix.mask is not None:
            of_state = expert_mask(prefix.mask, num_state, 0, 0)
            mask = expert_mask(prefix.mask, num_state, chunk)[:, :, num_state:]
            mask = attention_mask(self.transformer, mask, state_tokens.dtype)  # which eager attention wants as numbers
        run_layers(self.transformer, state_tokens, cache, of_state, rotary)
        cache.begin += num_state
        return ReadPrefix(cache, mask, (cosines[:, num_state:], sines[:, num_state:]))

    def denoise(self, prefix: ReadPrefix, noisy_actions: torch.Tensor, embedded_time: torch.Tensor) -> torch.Tensor:
        """Velocity of chunks (B, chunk, action_dim) at one time, embedded: (width,), or at one for each step: (B,
        chunk, width). Compiles in one graph.
        """
        embeds = self.embed_actions(noisy_actions, embedded_time)
        hidden = run_layers(self.transformer, embeds, prefix.cache, prefix.mask, prefix.position_embeddings)
        return self.action_out_proj(hidden)
