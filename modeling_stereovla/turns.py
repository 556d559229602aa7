"""Turns of the tool about its own axis, modulo the symmetry of the gripper.

A gripper with two equal fingers that is turned by half a turn holds alike, so of two yaws either is right. Regressed as
one number, the turn to an object that lies across is the mean of +90 and -90 degrees, and a turn by pi that of +180 and
-180. So the turn d is told by the vector (cos n d, sin n d), n = `turn_symmetry`, which is one and the same for all
turns that hold alike, and goes round without a seam.

What is read out of the picture is where the tool shall face, not how far it has to turn: most frames of a demonstration
need no turn any more, so that a head that is told the present state predicts none, the median, and learns nothing from
these frames. Where it shall face they show as well as others.

Which of them is meant, the action expert has to know. In training it is told the one that is nearest to the label's, so
that it never contradicts the demonstrated actions; when it acts, the smallest. So the policy chooses, and the actions
follow.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def turn_vectors(turns: torch.Tensor, symmetry: int) -> torch.Tensor:
    """Turns (...) in rad -> (..., 2), (cos n d, sin n d)."""
    angles = symmetry * turns
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def smallest_turns(vectors: torch.Tensor, symmetry: int) -> torch.Tensor:
    """Vectors (..., 2) of any length -> the smallest turns (...) that have this direction, rad in [-pi / n, pi / n]."""
    return torch.atan2(vectors[..., 1], vectors[..., 0]) / symmetry


def nearest_turns(turns: torch.Tensor, others: torch.Tensor, equal: torch.Tensor | int) -> torch.Tensor:
    """Of the turns that are as right as `turns` (..., T), `equal` (...) of them in a whole turn, those nearest to
    `others` (..., T); rad, NaN where either is.
    """
    period = 2 * math.pi / torch.as_tensor(equal, device=turns.device, dtype=turns.dtype)[..., None]
    return turns + period * ((others - turns) / period).round()


def turn_losses(
    vectors: torch.Tensor, turns: torch.Tensor, symmetry: int, equal: torch.Tensor | None = None
) -> torch.Tensor:
    """Smooth L1 of turn vectors, summed over both parts and all turns, (B,); unknown turns have none.

    Args:
        vectors: (B, T, 2), predicted.
        turns: (B, T) rad, NaN = unknown.
        equal: (B,), how many turns in a whole one are as right as that of `turns`, a multiple of `symmetry` (of a cube
            4): the nearest counts. None = `symmetry`.
    """
    vectors, known = vectors.float(), turns.isfinite()
    truth = turns.float()
    if equal is not None:
        truth = nearest_turns(truth, smallest_turns(vectors.detach(), symmetry), equal)
    truth = torch.where(known, truth, 0.0)
    losses = F.smooth_l1_loss(vectors, turn_vectors(truth, symmetry), reduction="none", beta=0.1)
    return (losses.sum(-1) * known).sum(-1)


def turned_back(vectors: torch.Tensor, facing: torch.Tensor, symmetry: int) -> torch.Tensor:
    """Vectors (..., 2) of where the tool shall face -> of the turns there from where it faces now, (...) rad."""
    cosine, sine = turn_vectors(facing, symmetry).to(vectors.dtype).unbind(-1)
    x, y = vectors.unbind(-1)
    return torch.stack([x * cosine + y * sine, y * cosine - x * sine], dim=-1)


class TurnHead(nn.Module):
    """Predicts the turns to the keyframe, and embeds them for the action expert."""

    def __init__(self, in_features: int, width: int, num_turns: int, symmetry: int):
        super().__init__()
        self.symmetry = symmetry
        self.hidden = nn.Sequential(nn.Linear(in_features, width), nn.GELU())
        self.cosine, self.sine = nn.Linear(width, num_turns), nn.Linear(width, num_turns)
        self.token = nn.Sequential(nn.Linear(num_turns, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor, facing: torch.Tensor) -> torch.Tensor:
        """Vectors (B, T, 2) of the turns, of length 1 where the head is sure.

        Args:
            features: (B, in_features), of the target alone: neither state nor gripper tell how the tool stands.
            facing: (B, T) rad, where the tool faces now.
        """
        hidden = self.hidden(features)
        there = torch.stack([self.cosine(hidden), self.sine(hidden)], dim=-1)
        return turned_back(there, facing, self.symmetry)

    def told(self, vectors: torch.Tensor, turns: torch.Tensor | None, equal: torch.Tensor | None) -> torch.Tensor:
        """The turns (B, T) in rad that the action expert is told: the smallest; in training, of those that are as
        right, the nearest to the label's.

        Args:
            vectors: (B, T, 2), predicted.
            turns, equal: in training, as in `turn_losses`.
        """
        smallest = smallest_turns(vectors.float(), self.symmetry)
        if turns is None:
            return smallest
        nearest = nearest_turns(smallest, turns.float(), self.symmetry if equal is None else equal)
        return torch.where(turns.isfinite(), nearest, smallest)

    def embed(
        self, vectors: torch.Tensor, turns: torch.Tensor | None, equal: torch.Tensor | None, gain: float
    ) -> torch.Tensor:
        """`told`, times `gain`, as a token (B, width) for the action expert."""
        # without a gradient: which of them is told leaps, and the direction of a short vector has a gradient without
        # bound. 0 * sum keeps every rank's graph alike where a batch has no keyframe
        told = self.told(vectors.detach(), turns, equal)
        return self.token(gain * told.to(vectors.dtype)) + 0.0 * vectors.sum()
