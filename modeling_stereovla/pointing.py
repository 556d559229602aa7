"""Pointing: the policy marks the instructed object and its own gripper among the visual tokens, and reads those tokens
out.

Not in the papers: an option (off in the `full` preset) without which a small policy trained from scratch for minutes
hardly finds its
target. The cross-entropy of the two attention maps is an auxiliary loss; the attended tokens join the action expert's
state tokens.
"""

import torch
from torch import nn


def soft_token_targets(points: torch.Tensor, grid: int, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear weights of pixel positions over the token grid.

    Args:
        points: (..., 2) pixels (u, v), NaN = unknown.

    Returns:
        weights (..., grid * grid) that sum to 1 (0 where unknown), and known (...), bool. Points outside the image are
        unknown.
    """
    size = grid * patch_size
    known = (points >= 0).all(-1) & (points <= size).all(-1)  # NaN compares false
    # in token units, centres at whole numbers; the outer half tokens belong to the border tokens
    position = torch.where(known[..., None], points, points.new_zeros(())) / patch_size - 0.5
    position = position.clamp(0, grid - 1)
    cells = torch.arange(grid, device=points.device, dtype=points.dtype)
    hat = (1 - (position[..., None] - cells).abs()).clamp(min=0)  # (..., 2, grid)
    weights = (hat[..., 1, :, None] * hat[..., 0, None, :]).flatten(-2)
    return weights * known[..., None], known


class Pointers(nn.Module):
    """Two queries over the visual tokens: the instruction's (for the target) and a learned one (for the gripper)."""

    def __init__(self, config):
        super().__init__()
        hidden, width = config.text_config.hidden_size, config.expert_hidden_size
        self.grid, self.patch_size = config.image_size // config.patch_size, config.patch_size
        self.instruction_query = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.gripper_query = nn.Embedding(1, hidden)
        self.position = nn.Embedding(self.grid**2, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, visual_tokens: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention logits (B, 2, N) and read-out tokens (B, 2, width), target first.

        Args:
            visual_tokens: (B, N, hidden).
            text: (B, L, hidden) token embeddings; text_mask: (B, L) bool, True = a word of the prompt.
        """
        weight = text_mask.to(text.dtype)[..., None]
        words = (text * weight).sum(1) / weight.sum(1).clamp(min=1)
        gripper = self.gripper_query.weight.expand(words.shape[0], -1)
        queries = torch.stack([self.instruction_query(words), gripper.to(words.dtype)], dim=1)
        tokens = self.norm(visual_tokens) + self.position.weight
        logits = queries @ self.key(tokens).transpose(1, 2) / tokens.shape[-1] ** 0.5
        # value first, attention after: the MLP sees single tokens, as the sub-token offset is not linear in them
        return logits, logits.softmax(-1) @ self.value(tokens)

    def loss(self, logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of `logits` (B, 2, N) with the tokens at `points` (B, 2, 2) px, mean over the known points."""
        targets, known = soft_token_targets(points.to(logits.dtype), self.grid, self.patch_size)
        losses = -(targets * logits.log_softmax(-1)).sum(-1)
        return losses.sum() / known.sum().clamp(min=1)
