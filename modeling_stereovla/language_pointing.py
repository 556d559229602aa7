"""The language model's own attention points: where it looks among the visual tokens while it writes an answer.

Not in the papers: an option (off in the `full` preset). A cross-entropy makes half of the heads of one layer look, from
the tokens that an answer is predicted from, at the visual token that the answer is about (`objectives.py`). It adds no
parameters and nothing at inference. Without it the answers' losses alone hardly train this attention: after 115,000
samples boxes are off by 24 of 256 bins, while `pointing.Pointers`, which a cross-entropy trains, find the same objects
among the same tokens in 90 %.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.models.llama.modeling_llama import rotate_half


@contextmanager
def recorded_outputs(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """A list that the outputs of `module` are appended to."""
    outputs: list[torch.Tensor] = []
    hook = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def log_attention(
    queries: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    keys: torch.Tensor,
    rows: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """Log of attention weights (T, heads, L) with rotary position embedding, grouped-query attention included.

    Args:
        queries: (T, heads, head_dim), not yet rotated. rotation: cosines and sines (T, head_dim) of their positions.
        keys: (B, kv_heads, L, head_dim), rotated.
        rows: (T,) int64, the row of `keys` that each query looks at. visible: (T, L) bool, which keys it may see.
    """
    cosines, sines = (part[:, None] for part in rotation)
    queries = queries * cosines + rotate_half(queries) * sines
    grouped = queries.unflatten(1, (keys.shape[1], -1))  # (T, kv_heads, heads of a group, head_dim)
    logits = (grouped @ keys[rows].transpose(-1, -2)).flatten(1, 2) / queries.shape[-1] ** 0.5
    return logits.float().masked_fill(~visible[:, None], float("-inf")).log_softmax(-1)
