"""How one transformer reads another's keys and values, layer by layer.

transformers' attention layers pass their keys and values through a `Cache`. Small ones replace the mutable
`DynamicCache`, which must be cropped after each denoising step and breaks under activation checkpointing, where layers
run twice.
"""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# what transformers calls the argument and the output that hold keys and values: "cache" from 5.24 on
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


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
    """Serves fixed prefix keys and values in front of a layer's own, and remembers nothing.

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


class ChunkCache(Cache):
    """A prefix with room behind it, into which a layer writes its own keys and values: a denoising step copies those of
    its chunk, where concatenation would copy the prefix too. For inference: the room is overwritten in each pass.

    Args:
        states: the prefix, as in `ReadOnlyCache`; it is copied once, when a layer is first met.
        room: tokens of state and chunk together.
    """

    def __init__(self, states: list[tuple[torch.Tensor, torch.Tensor]], room: int):
        super().__init__(layers=[])
        self.states, self.room = states, room
        self.begin = states[0][0].shape[2]
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx not in self.buffers:
            self.buffers[layer_idx] = tuple(F.pad(kept, (0, 0, 0, self.room)) for kept in self.states[layer_idx])
        end = self.begin + key_states.shape[2]
        keys, values = self.buffers[layer_idx]
        keys[:, :, self.begin : end] = key_states
        values[:, :, self.begin : end] = value_states
        return keys[:, :, :end], values[:, :, :end]
