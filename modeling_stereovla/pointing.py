"""Pointing: the policy marks the instructed object and its own gripper among the visual tokens, and reads those out.

Not in the papers: an option (off in the `full` preset) without which a small policy that is trained from scratch for
minutes hardly finds its target. The cross-entropy of the two attention maps is an auxiliary loss. The attended tokens,
and the way from the present state to the keyframe pose that a small network regresses from them, join the action
expert's state tokens. The difference, not the pose: told the exact poses as two tokens, a small expert's first action
is still 6 mm off when the keyframe is within 3 cm (the action itself is 5 mm); told their difference, 2.4 mm.
"""

import torch
from torch import nn

from .turns import TurnHead

# the last centimetres before a keyframe are the ones that matter: a few hundredths of the range
DISPLACEMENT_GAIN = 4.0


def in_picture(points: torch.Tensor, size: int) -> torch.Tensor:
    """Which pixel positions (..., 2) lie in a square picture of side `size` px, (...) bool; NaN does not."""
    return (points >= 0).all(-1) & (points <= size).all(-1)


def soft_token_targets(points: torch.Tensor, grid: int, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear weights of pixel positions over the token grid.

    Args:
        points: (..., 2) pixels (u, v), NaN = unknown.

    Returns:
        weights (..., grid * grid) that sum to 1 (0 where unknown), and known (...), bool. Points outside the image are
        unknown.
    """
    known = in_picture(points, grid * patch_size)
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
        self.word_norm = nn.LayerNorm(hidden)
        self.word_query = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.gripper_query = nn.Embedding(1, hidden)
        self.token_norm = nn.LayerNorm(hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.place = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Linear(width, width))
        self.displacement = nn.Sequential(
            nn.Linear(3 * width, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Linear(width, config.pose_dim),
        )
        self.displacement_token = nn.Sequential(nn.Linear(config.pose_dim, width), nn.GELU(), nn.Linear(width, width))
        self.turns = None
        if config.turn_symmetry:
            self.turns = TurnHead(width, width, config.num_turns, config.turn_symmetry)

    def centres(self, like: torch.Tensor) -> torch.Tensor:
        """(u, v) of each visual token in [-1, 1], (N, 2), of the dtype and device of `like`."""
        cells = (torch.arange(self.grid, device=like.device, dtype=like.dtype) + 0.5) * 2 / self.grid - 1
        v, u = torch.meshgrid(cells, cells, indexing="ij")
        return torch.stack([u, v], dim=-1).flatten(0, 1)

    def forward(
        self, visual_tokens: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention logits (B, 2, N) and read-out tokens (B, 2, width), target first.

        Args:
            visual_tokens: (B, N, hidden).
            text: (B, L, hidden) token embeddings; text_mask: (B, L) bool, True = a word of the prompt.
        """
        # every word asks on its own and the evidence adds up: "red" and "cube" together point at the red cube. A
        # query of the mean embedding dilutes the two words that matter in a dozen that are always there
        words = self.word_query(self.word_norm(text))
        instruction = (words * text_mask[..., None].to(words.dtype)).sum(1)
        gripper = self.gripper_query.weight.expand(len(instruction), -1).to(words.dtype)
        tokens = self.token_norm(visual_tokens)
        logits = torch.stack([instruction, gripper], dim=1) @ self.key(tokens).transpose(1, 2) / tokens.shape[-1] ** 0.5
        attention = logits.softmax(-1)
        # value first, attention after: the MLP sees single tokens, as an offset within a token is not linear in them
        return logits, attention @ self.value(tokens) + self.place(attention @ self.centres(attention))

    def predict_displacement(
        self,
        read_out: torch.Tensor,
        state_token: torch.Tensor,
        facing: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        equal_turns: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """The way from the present state to the keyframe (B, pose_dim), in the state's scales, the vectors (B, T, 2) of
        its turns where these are apart from it, and the token (B, 1, width) that tells both to the action expert.

        Args:
            read_out: (B, 2, width) of `forward`; state_token: (B, width), the embedded present state.
            facing: (B, T) rad, where the tool faces now, of a model that tells turns apart.
            turns, equal_turns: (B, T) rad and (B,), in training those of the label (see `TurnHead.embed`).
        """
        features = torch.cat([read_out.flatten(1), state_token], dim=-1)
        displacement = self.displacement(features)
        token = self.displacement_token(DISPLACEMENT_GAIN * displacement)
        vectors = None
        if self.turns is not None:
            vectors = self.turns(read_out[:, 0], facing)
            token = token + self.turns.embed(vectors, turns, equal_turns, DISPLACEMENT_GAIN)
        return displacement, vectors, token[:, None]
