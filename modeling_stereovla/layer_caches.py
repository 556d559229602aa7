"""How one transformer reads others' keys and values, layer by layer.

transformers' attention layers pass their keys and values through a `Cache`. Small ones replace the mutable
`DynamicCache`, which must be cropped after each denoising step and breaks under activation checkpointing, where layers
run twice.

What a transformer leaves behind is a *stream*: (keys, values) of each of its layers, each (batch, kv_heads, length,
head_dim), keys after rotary embedding.
"""

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

# what transformers calls the argument and the output that hold keys and values: "cache" from 5.24 on
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"

Stream = list[tuple[torch.Tensor, torch.Tensor]]


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

    @property
    def stream(self) -> Stream:
        return [self.states[index] for index in sorted(self.states)]


class PrefixCache(RecordingCache):
    """Records a pass of which keys and values are wanted, and what comes of the last token: in the last layer no more
    is computed (`prefix_layer.py`).
    """


class ContinuingCache(RecordingCache):
    """Serves what one forward pass has left behind to another that goes on from it, and keeps the two together.

    Args:
        before: the stream of the first pass. rows: (B,) int64, which of its rows each row of this one goes on from.
    """

    def __init__(self, before: Stream, rows: torch.Tensor):
        super().__init__()
        self.before, self.rows = before, rows

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = (states.index_select(0, self.rows) for states in self.before[layer_idx])
        return super().update(
            torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2), layer_idx, *args, **kwargs
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.before[0][0].shape[2]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0


class ReadOnlyCache(Cache):
    """Serves the streams, one behind the other, in front of a layer's own keys and values, and remembers nothing."""

    def __init__(self, *streams: Stream):
        super().__init__(layers=[])
        self.streams = streams

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        before = [stream[layer_idx] for stream in self.streams]
        keys = torch.cat([*(keys for keys, _ in before), key_states], dim=2)
        return keys, torch.cat([*(values for _, values in before), value_states], dim=2)


class BufferedCache(Cache):
    """Streams with room behind them, into which a layer writes its own keys and values: a pass copies those of its own
    tokens, where concatenation would copy the streams too. For inference: what is behind `begin` is overwritten in each
    pass, and kept by moving `begin` on.

    Args:
        streams: as in `ReadOnlyCache`, or none; they are copied once, when a layer is first met.
        room: tokens behind them.

    Attributes:
        begin: tokens that a pass finds.
    """

    def __init__(self, *streams: Stream, room: int):
        super().__init__(layers=[])
        self.streams, self.room = streams, room
        self.begin = sum(stream[0][0].shape[2] for stream in streams)
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        own = (key_states, value_states)
        if layer_idx not in self.buffers:
            before = [stream[layer_idx] for stream in self.streams]
            self.buffers[layer_idx] = tuple(
                self._copied([states[part] for states in before], own[part]) for part in (0, 1)
            )
        end = self.begin + key_states.shape[2]
        for buffer, states in zip(self.buffers[layer_idx], own, strict=True):
            buffer[:, :, self.begin : end] = states
        return tuple(buffer[:, :, :end] for buffer in self.buffers[layer_idx])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.begin

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.begin + query_length, 0

    @property
    def stream(self) -> Stream:
        """What the next pass finds."""
        return [tuple(part[:, :, : self.begin] for part in self.buffers[index]) for index in sorted(self.buffers)]

    def _copied(self, parts: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """A buffer for keys, or values, of one layer, that begins with `parts`."""
        batch, heads, _, size = like.shape
        lengths = [part.shape[2] for part in parts]
        buffer = like.new_empty(batch, heads, sum(lengths) + self.room, size)
        for part, place in zip(parts, buffer[:, :, : sum(lengths)].split(lengths, dim=2), strict=True):
            place.copy_(part)
        return buffer
