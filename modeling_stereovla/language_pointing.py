"""The language model's own attention reads what is asked for and points at it, while it writes an answer.

Not in the papers: an option (off in the `full` preset). Two cross-entropies (`objectives.py`) act on half of the heads
of two layers that follow each other, at the tokens that an answer is predicted from. In the first layer these heads
read the words that say what is asked for, each a part of them; in the second they look at the visual token that the
answer is about. It adds no parameters and nothing at inference.

Both are needed. Attention begins spread over 10 times as many visual tokens as words. Pointing alone did not make it
read: after 200 steps of the demo 58 % of the answers looked at the right token, and 0.7 % of them elsewhere when
another object was named, as the gripper's heading gives the target away that often.
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
    asked: tuple[torch.Tensor, torch.Tensor],
    valid: torch.Tensor,
) -> torch.Tensor:
    """Log of causal attention weights (T, heads, L) at T tokens, with rotary position embedding; of the first half of
    the heads, rounded up.

    Args:
        queries: (B, Q, heads * head_dim), of the last Q of the L tokens, not yet rotated. rotation: cosines and sines
            (B, Q, head_dim).
        keys: (B, kv_heads, L, head_dim), rotated.
        asked: rows and places (T,) int64 of the tokens, ordered by rows. valid: (B, L) bool, False = padding.
    """
    rows, places = asked
    own = places - (keys.shape[2] - queries.shape[1])
    cosines, sines = (part[rows, own][:, None] for part in rotation)
    queries = queries[rows, own].unflatten(-1, (-1, keys.shape[-1]))  # (T, heads, head_dim)
    queries = queries * cosines + rotate_half(queries) * sines
    count = (queries.shape[1] + 1) // 2
    # the tokens of a row beside each other, as many as the fullest has: so its keys are not copied for each of them
    counts = torch.bincount(rows, minlength=len(keys))
    numbers = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    most, group = int(counts.max()), queries.shape[1] // keys.shape[1]
    beside = queries.new_zeros(len(keys), most, *queries.shape[1:]).index_put((rows, numbers), queries)
    grouped = beside.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)  # (B, kv_heads, most * group, head_dim)
    logits = (grouped @ keys.transpose(-1, -2)).unflatten(2, (most, group)).transpose(1, 2).flatten(2, 3)
    logits = logits.flatten(0, 1).index_select(0, rows * most + numbers)[:, :count] / queries.shape[-1] ** 0.5
    before = torch.arange(keys.shape[2], device=places.device) <= places[:, None]
    visible = before & valid[rows]
    return logits.float().masked_fill(~visible[:, None], float("-inf")).log_softmax(-1)


def chosen_keys(attention: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Those of (T, heads, L) that are `chosen`, (T, L) bool, `count` in each row: (T, heads, count)."""
    keys = chosen.nonzero()[:, 1].view(-1, 1, count)
    return attention.gather(2, keys.expand(-1, attention.shape[1], -1))


def log_share(attention: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Log of the sum of the weights (T, heads, L) whose keys are `chosen`, (T, L) bool: (T, heads); 0 where none is.

    The heads divide the chosen keys among them, in their order: of the two numbers of a pixel one head reads the first
    and the other the second, as their sum does not say which is which. Where there are fewer keys than heads, the heads
    that are left over read all of them.
    """
    heads = torch.arange(attention.shape[1], device=chosen.device)[:, None]
    reader = (chosen.cumsum(-1) - 1) * len(heads) // chosen.sum(-1, keepdim=True).clamp(min=1)  # (T, L)
    own = chosen[:, None] & (reader[:, None] == heads)  # (T, heads, L)
    own |= chosen[:, None] & ~own.any(-1, keepdim=True)
    own |= ~own.any(-1, keepdim=True)
    return attention.masked_fill(~own, float("-inf")).logsumexp(-1)
