"""Left-right attention: the features of both views of a pair read each other, without a cost volume.

The idea of StereoPolicy (arXiv 2605.09989): one 2-D encoder sees each view; two layers of self-attention,
cross-attention to the other view and an MLP fuse them; places enter the queries and keys of the cross-attention by a
2-D rotary embedding; and what comes out takes the place of the features of a single view. No code was published. Chosen
here, as not stated there: norms before each part, weights shared by both directions, and the left view's tokens as what
comes out, so that they lie where those of the other policies lie. Not in StereoVLA's paper: an option to compare with
(`config.right_view`).
"""

import torch
import torch.nn.functional as F
from torch import nn

NUM_LAYERS = 2
HEAD_DIM = 32
PERIOD = 100.0  # of the slowest wave, in tokens: several times the width of a grid


def rotary_2d(grid: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines (grid * grid, `HEAD_DIM`) of a square grid in row order: half of the waves are along u, half
    along v; wave i turns the numbers i and i + HEAD_DIM / 2 of a head.
    """
    waves = HEAD_DIM // 4
    frequencies = PERIOD ** -(torch.arange(waves, device=like.device, dtype=torch.float32) / waves)
    places = torch.arange(grid, device=like.device, dtype=torch.float32)
    v, u = torch.meshgrid(places, places, indexing="ij")
    angles = torch.cat([place.reshape(-1, 1) * frequencies for place in (u, v)], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(heads: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Heads (B, heads, N, `HEAD_DIM`) turned by what `rotary_2d` gives."""
    first, second = heads.chunk(2, dim=-1)
    return heads * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]


class Attention(nn.Module):
    """Of the tokens of one view to those of a view, which may be the same."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(
        self, tokens: torch.Tensor, read: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """tokens (B, N, width), read (B, M, width) -> (B, N, width)."""
        queries, keys, values = (
            project(part).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
            for project, part in ((self.query, tokens), (self.key, read), (self.value, read))
        )
        if rotary is not None:
            queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        return self.out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))


class ViewLayer(nn.Module):
    """Self-attention, cross-attention to the other view, MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.own, self.other = Attention(width), Attention(width)
        self.own_norm, self.other_norm, self.read_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(
        self, tokens: torch.Tensor, other: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The tokens (B, N, width) of a view that has read those of the `other` one."""
        normed = self.own_norm(tokens)
        tokens = tokens + self.own(normed, normed, None)
        tokens = tokens + self.other(self.other_norm(tokens), self.read_norm(other), rotary)
        return tokens + self.mlp(self.mlp_norm(tokens))


class ViewAttention(nn.Module):
    """Features of both views -> those of the left one, which know the right one.

    Args:
        width: channels of a token, a multiple of `HEAD_DIM`. grid: tokens of a view along each side.
    """

    def __init__(self, width: int, grid: int):
        super().__init__()
        self.grid = grid
        self.layers = nn.ModuleList(ViewLayer(width) for _ in range(NUM_LAYERS))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 2, N, width), left view first -> (B, N, width)."""
        left, right = features.unbind(1)
        rotary = rotary_2d(self.grid, features)
        for number, layer in enumerate(self.layers, 1):
            read = layer(left, right, rotary)
            if number < NUM_LAYERS:
                right = layer(right, left, rotary)
            left = read
        return left
