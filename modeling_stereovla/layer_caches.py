"""How one transformer reads another's keys and values, layer by layer.

transformers' attention layers pass their keys and values through a `Cache`. Small ones replace the mutable
`DynamicCache`, which must be cropped after each denoising step and breaks under activation checkpointing, where layers
run twice.
"""

import torch
from transformers.cache_utils import Cache


class RecordingCache(Cache):
    """Keeps the keys and values of each layer of one forward pass; the layer sees only its own.

    Writing a layer twice (activation checkpointing recomputes it) is harmless.
    """

    def __init__(self):
        super().__init__(layers=[])
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.states[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # nothing precedes this forward pass

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


class ReadOnlyCache(Cache):
    """Serves fixed prefix keys and values in front of a layer's own, and remembers nothing: one object serves every
    denoising step.

    Args:
        states: (keys, values) of each layer, each (batch, kv_heads, prefix_length, head_dim), keys after rotary
            embedding.
    """

    def __init__(self, states: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(layers=[])
        self.states = states

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = self.states[layer_idx]
        return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.states[layer_idx][0].shape[2]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0


class ExtendedCache(ReadOnlyCache):
    """A ReadOnlyCache that also keeps what it served, prefix and own, in `extended`: the prefix of what comes next."""

    def __init__(self, states: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(states)
        self.extended: list[tuple[torch.Tensor, torch.Tensor]] = list(states)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        self.extended[layer_idx] = super().update(key_states, value_states, layer_idx)
        return self.extended[layer_idx]
