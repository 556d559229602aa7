"""Pointing: the policy marks the instructed object and its own gripper among the visual tokens, and reads those out.

Not in the papers: an option (off in the `full` preset) without which a small policy that is trained from scratch for
minutes hardly finds its target. The cross-entropy of the two attention maps is an auxiliary loss. The attended tokens,
and the way from the present state to the keyframe pose that a small network regresses from them, join the action
expert's state tokens. The difference, not the pose: told the exact poses as two tokens, a small expert's first action
is still 6 mm off when the keyframe is within 3 cm (the action itself is 5 mm); told their difference, 2.4 mm.

With `points_at_destination` a third pointer marks where the target is to be put, and words are read in their order: of
"stack green cube onto red cube" the words alone, without it, name two things alike.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .turns import TurnHead
from .view_points import in_tokens

# the last centimetres before a keyframe are the ones that matter: a few hundredths of the range
DISPLACEMENT_GAIN = 4.0
# a tool 15 cm from where it goes is 2 cm off by a share of 0.85, which is what sigmoids came to in 3,600 steps
SHARE_GAIN = 4.0
POINT_NUMBERS = 5  # of a point that is read out: x, y, z, and which of two frames
POINTED_AT = ("target", "gripper", "destination")  # the last by an option


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


def cells_of_points(points: torch.Tensor, grid: int, patch_size: int, cells: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The token, and the cell in it, that pixel positions (..., 2) in the picture lie in: int64 (...) each, in row
    order; of positions outside, those nearest to them.
    """
    fine = (points.nan_to_num(0.0) * (cells / patch_size)).long().clamp(0, grid * cells - 1)  # (u, v) in cells
    token, cell = fine // cells, fine % cells
    return token[..., 1] * grid + token[..., 0], cell[..., 1] * cells + cell[..., 0]


class WordsBefore(nn.Linear):
    """What stands before each word, added up: a place counted from the beginning would be another one in every wording,
    and in every prompt. It begins as nothing, as words alone find the target fastest.
    """

    def __init__(self, hidden: int):
        super().__init__(hidden, hidden, bias=False)

    def forward(self, words: torch.Tensor, is_word: torch.Tensor) -> torch.Tensor:
        """(B, L, hidden) of words (B, L, hidden), of which those of `is_word` (B, L, 1), 0 or 1, count."""
        each = super().forward(words) * is_word
        return each.cumsum(1) - each


@dataclass
class Pointed:
    """What the pointers say, in the order of `POINTED_AT`; P is 2, or 3 with a destination.

    logits: (B, P, N), attention over the visual tokens. tokens: (B, S, width), what the action expert is told.
    cells: (B, P, N, C), logits of the cells within each token; points: (B, P, 3), the mean point under the attention,
        as `view_points` has them. None where the model has no points.
    named: (B', K, N), attention for each name of an object, where names are given.
    displacement: (B, pose_dim), the way from the present state to the keyframe, in the state's scales. turns: (B, T,
        2), the vectors of its turns where these are apart from it.
    """

    logits: torch.Tensor
    cells: torch.Tensor | None = None
    points: torch.Tensor | None = None
    named: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    displacement: torch.Tensor | None = None
    turns: torch.Tensor | None = None


def posture(state: torch.Tensor) -> torch.Tensor:
    """The state (B, S) without where in the plane the tool is: how high, turned how, open how far."""
    return F.pad(state[:, 2:], (2, 0))


def match(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Logits (B, P, N) of queries (B, P, hidden) for keys (B, N, hidden)."""
    return queries @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5


class Anchors(nn.Module):
    """The way to the keyframe in the plane from the ways to what is pointed at, each with an offset that is seen there;
    for a model with points. A keyframe is at the target, at the destination or where the tool is, so that what is told
    is their mean by shares that are nearly 0 or 1.

    The present position has no part in them. A demonstration is over its target whenever it is low, so that a network
    that is told the position takes half of what it sees for an error, and a tool that came down 3 cm beside a cube was
    told to go on by 1.
    """

    def __init__(self, config, count: int):
        super().__init__()
        width = config.expert_hidden_size
        self.offset = nn.Linear(width, 3)
        self.seen = nn.Linear(count * width, width)
        self.posture = nn.Linear(config.state_dim, width, bias=False)
        self.share = nn.Linear(width, count)

    def forward(
        self, displacement: torch.Tensor, seen: torch.Tensor, ways: torch.Tensor, state: torch.Tensor
    ) -> torch.Tensor:
        """The displacement (B, pose_dim), where the points are in the base frame with x and y from the ways, and with
        their part of z.

        Args:
            seen: (B, P, width), what is read out of the tokens. ways: (B, P, 5) of `read_points`, in units of the
                state, as the displacement is.
        """
        known = self.seen(seen.flatten(1)) + self.posture(posture(state).to(seen.dtype))
        shares = (SHARE_GAIN * self.share(F.gelu(known)).float()).softmax(-1)[..., None]
        gripper = torch.arange(ways.shape[1], device=ways.device) == POINTED_AT.index("gripper")
        there = ways[..., :3].float().masked_fill(gripper[:, None], 0.0)  # where the tool is, the state says
        along = (shares * (there + self.offset(seen).float())).sum(1)  # (B, 3)
        in_base = ways[:, 0, 4:] > 0
        x_y = torch.where(in_base, along[:, :2], displacement[:, :2].float())
        z = displacement[:, 2:3].float() + along[:, 2:] * in_base
        return torch.cat([x_y, z, displacement[:, 3:].float()], dim=-1).to(displacement.dtype)


class Pointers(nn.Module):
    """Queries over the visual tokens: of the instruction for the target and for the destination, and a learned one for
    the gripper.

    Attributes:
        names: what they point at, of `POINTED_AT`.
    """

    def __init__(self, config):
        super().__init__()
        hidden, width = config.text_config.hidden_size, config.expert_hidden_size
        self.grid, self.patch_size = config.image_size // config.patch_size, config.patch_size
        self.word_norm = nn.LayerNorm(hidden)
        self.names = POINTED_AT[: config.num_pointers]
        self.word_query = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.word_before = self.destination_query = self.carried_query = None
        if "destination" in self.names:
            self.word_before = WordsBefore(hidden)
            self.destination_query = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            # what is carried looks like what it lay among: of two cubes the one in the hand is not where it goes
            self.carried_query = nn.Linear(config.state_dim, hidden, bias=False)
        self.gripper_query = nn.Embedding(1, hidden)
        self.token_norm = nn.LayerNorm(hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, width))
        # (u, v), and of a model with points (x, y, z) and which frame that is in
        self.cells = getattr(config, "point_cells", 0)
        self.cell = nn.Linear(hidden, len(self.names) * self.cells**2) if self.cells else None
        known = POINT_NUMBERS if self.cells else 0
        self.place = nn.Sequential(nn.Linear(2 + known, width), nn.GELU(), nn.Linear(width, width))
        features = (1 + len(self.names)) * width + len(self.names) * known
        self.displacement = nn.Sequential(
            nn.Linear(features, 2 * width),
            nn.GELU(),
            nn.Linear(2 * width, width),
            nn.GELU(),
            nn.Linear(width, config.pose_dim),
        )
        self.anchors = Anchors(config, len(self.names)) if self.cells else None
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
        self,
        visual_tokens: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        state: torch.Tensor,
        state_token: torch.Tensor,
        points: torch.Tensor | None = None,
        frame: torch.Tensor | None = None,
        facing: torch.Tensor | None = None,
        turns: torch.Tensor | None = None,
        equal_turns: torch.Tensor | None = None,
        frames: torch.Tensor | None = None,
        names: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Pointed:
        """
        Args:
            visual_tokens: (B, N, hidden), or where samples share pictures those of the pictures, and `frames` (B,)
                int64 which of them each sample is about; `points` likewise.
            text: (B, L, hidden) token embeddings; text_mask: (B, L) bool, True = a word of the prompt.
            state: (B, state_dim), the present one, normalised; state_token: (B, width), embedded.
            points: (B, 3, h, w) and frame: (B,), of a model that has points (see `view_points`).
            facing: (B, T) rad, where the tool faces now, for a model that tells turns apart.
            turns, equal_turns: (B, T) rad and (B,), in training those of the label (see `TurnHead.embed`).
            names: embeddings (B', K, L, hidden) of names of objects and which of them are words (B', K, L), of the
                pictures; in training.
        """
        words, is_word = self.read_words(text, text_mask)
        gripper = self.gripper_query.weight.expand(len(words), -1).to(words.dtype)
        queries = [(self.word_query(words) * is_word).sum(1), gripper]
        if self.destination_query is not None:
            carried = self.carried_query(posture(state).to(words.dtype))
            queries.append((self.destination_query(words) * is_word).sum(1) + carried)
        tokens = self.token_norm(visual_tokens)

        def of_samples(of_pictures: torch.Tensor) -> torch.Tensor:
            return of_pictures if frames is None else of_pictures.index_select(0, frames)

        keys, values = self.key(tokens), of_samples(self.value(tokens))
        logits = match(torch.stack(queries, dim=1), of_samples(keys))
        # with points what is around the peak alone: a mean over what is meant and what is a little likely lies between
        # things, and where it is off by more than a centimetre it is no use to know depth
        attention = (self.around_peak(logits) if self.cells else logits).softmax(-1)
        pointed = Pointed(logits)
        if names is not None:
            asked, is_asked = self.read_words(*(part.flatten(0, 1) for part in names))
            pointed.named = match((self.word_query(asked) * is_asked).sum(1).unflatten(0, names[1].shape[:2]), keys)
        place, known = attention @ self.centres(attention), []
        if self.cells:
            pointed.cells = of_samples(self.cell(tokens)).unflatten(-1, (len(self.names), -1)).transpose(1, 2)
            pointed.points, ways = self.read_points(attention, pointed.cells, of_samples(points), frame, state)
            known = [ways.to(place.dtype)]
        place = torch.cat([place, *known], dim=-1)
        # value first, attention after: the MLP sees single tokens, as an offset within a token is not linear in them
        seen = attention @ values
        read_out = (seen + self.place(place)).to(state_token.dtype)
        features = torch.cat([read_out.flatten(1), state_token, *(part.flatten(1) for part in known)], dim=-1)
        pointed.displacement = self.displacement(features)
        if self.anchors is not None:
            pointed.displacement = self.anchors(pointed.displacement, seen, ways, state)
        told = self.displacement_token(DISPLACEMENT_GAIN * pointed.displacement)
        if self.turns is not None:
            pointed.turns = self.turns(read_out[:, 0], facing)
            told = told + self.turns.embed(pointed.turns, turns, equal_turns, DISPLACEMENT_GAIN)
        pointed.tokens = torch.cat([read_out, told[:, None]], dim=1)
        return pointed

    def read_words(self, text: torch.Tensor, text_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Words (B, L, hidden) as queries are made of them, and (B, L, 1) which there are, 0 or 1.

        Every word asks on its own and the evidence adds up: "red" and "cube" together point at the red cube. A query of
        the mean embedding dilutes the two words that matter in a dozen that are always there.
        """
        words, is_word = self.word_norm(text), text_mask[..., None].to(text.dtype)
        return words if self.word_before is None else words + self.word_before(words, is_word), is_word

    def around_peak(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (B, P, N) of the largest and of the eight tokens around it, the others -inf."""
        peak = logits.argmax(-1, keepdim=True)
        token = torch.arange(self.grid**2, device=logits.device)
        rows = (token // self.grid - peak // self.grid).abs()
        columns = (token % self.grid - peak % self.grid).abs()
        return logits.masked_fill((rows > 1) | (columns > 1), float("-inf"))

    def read_points(
        self,
        attention: torch.Tensor,
        cells: torch.Tensor,
        points: torch.Tensor,
        frame: torch.Tensor,
        state: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean points (B, P, 3) under the attention, at the resolution of the points, and `POINT_NUMBERS` of each, (B,
        P, 5): the way to it from the tool in the base frame, or from the camera in its own, and which of the two it is.
        """
        in_cells = in_tokens(points, self.grid)  # (B, N, C, 3)
        weights = attention[..., None].float() * cells.float().softmax(-1)
        mean = torch.einsum("bpnc,bnck->bpk", weights, in_cells)
        in_base = (frame == 2).view(-1, 1, 1)
        ways = mean - state[:, None, :3].float() * in_base
        which = torch.stack([frame == 1, frame == 2], dim=-1).to(mean.dtype)[:, None].expand(-1, mean.shape[1], -1)
        return mean, torch.cat([ways * (frame > 0).view(-1, 1, 1), which], dim=-1)
