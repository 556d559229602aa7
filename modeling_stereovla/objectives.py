"""What a policy learns from, each objective once: its weight, what it counts, and its loss from outputs and targets."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from .cost_volume import disparity_loss, known_disparity
from .depth_loss import known_depth, scale_invariant_losses
from .pointing import Pointed, cells_of_points, in_picture, soft_token_targets
from .turns import turn_losses

IGNORED = -100  # label of a token without a loss, as in transformers


@dataclass
class Targets:
    """What the outputs of a batch are compared with; None = this batch has none of it.

    Args:
        labels: (B, L) int64, `IGNORED` = no loss; compared with the logits of the tokens before them.
        language_weights: (B,), factors on the language losses of the samples; None = 1.
        actions: (B, chunk_size, action_dim), normalised. is_action: (B,) bool, the samples with an action loss; None =
            all. action_mask: (B, chunk_size) bool, the steps with an action loss; None = all.
        disparity: (B', H, W) px of the left view, 0 = unknown, of the samples that disparity is predicted for.
        points: (B, P, 2) px in the left view, what the pointers mark, in their order, NaN = unknown; those beyond a
            model's pointers are not looked at.
        displacement: (B, pose_dim), the way to the keyframe (see the processor), NaN = unknown.
        turns: (B, T) rad, the turns that are apart from it, NaN = unknown. equal_turns: (B,), how many turns in a whole
            one are as right (see `turn_losses`).
        depth_map: (B, V, H, W) m of each view, 0 = unknown.
        answer_points: (B, L, 2) px in the left view, what each label is about, NaN = nothing, or it is not seen.
        name_points: (B', K, 2) px in the left view of the named objects of each picture, NaN = unknown.

    Attributes:
        labelled_at: int64 (T,) each, rows and places of the positions that are `labelled`.
        acting: int64 (R,), the samples with an action loss.
    """

    labels: torch.Tensor | None = None
    language_weights: torch.Tensor | None = None
    actions: torch.Tensor | None = None
    is_action: torch.Tensor | None = None
    action_mask: torch.Tensor | None = None
    disparity: torch.Tensor | None = None
    points: torch.Tensor | None = None
    displacement: torch.Tensor | None = None
    turns: torch.Tensor | None = None
    equal_turns: torch.Tensor | None = None
    depth_map: torch.Tensor | None = None
    answer_points: torch.Tensor | None = None
    name_points: torch.Tensor | None = None
    labelled_at: tuple[torch.Tensor, torch.Tensor] | None = field(init=False, default=None)
    acting: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self):
        # before anything is computed: a device waits for how many there are, and a graph breaks there
        if self.labels is not None:
            self.labelled_at = self.labelled.nonzero(as_tuple=True)
        if self.actions is not None:
            acts = self._acts
            everyone = torch.arange(len(self.actions), device=self.actions.device)
            self.acting = everyone if acts is None else acts.nonzero()[:, 0]

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "Targets":
        """Those among the inputs of a model's `forward`."""
        return cls(**{item.name: inputs.get(item.name) for item in fields(cls) if item.init})

    @property
    def labelled(self) -> torch.Tensor:
        """(B, L - 1) bool: the positions whose next token has a label."""
        return self.labels[:, 1:] != IGNORED

    @property
    def num_acting(self) -> torch.Tensor:
        """() int64: how many samples have an action loss."""
        acts = self._acts
        return torch.tensor(len(self.actions)) if acts is None else acts.sum()

    @property
    def _acts(self) -> torch.Tensor | None:
        """(B,) bool: the samples with an action loss, those without a valid step left out; None = all."""
        if self.action_mask is None:
            return self.is_action
        steps = self.action_mask.any(-1)
        return steps if self.is_action is None else steps & self.is_action


@dataclass
class Predictions:
    """What the losses of a batch are computed from; None = not computed.

    Args:
        logits: (T, vocabulary), before the labelled tokens, in the order of `Targets.labelled_at`.
        velocity: (R', K, chunk, action_dim), of the samples `Targets.acting`, or of any one sample where there are
            none. flow: the same shape, the velocity that is to be learned. given: (R', K, chunk) bool, the steps that
            entered without noise, which teach nothing; None = none did.
        disparity: maps (B', 1, h, w), each in px of its own resolution.
        log_depth: (B, V, H, W), log of m.
        pointed: what the pointers say.
        language_pointing: (T, heads, N), log of the attention on the visual tokens, of the tokens before the labels
            whose point is in the picture. language_reading: (T, heads), log of theirs on the words that say what is
            asked for, in the layer before.
    """

    logits: torch.Tensor | None = None
    velocity: torch.Tensor | None = None
    flow: torch.Tensor | None = None
    given: torch.Tensor | None = None
    disparity: list[torch.Tensor] | None = None
    log_depth: torch.Tensor | None = None
    pointed: Pointed | None = None
    language_pointing: torch.Tensor | None = None
    language_reading: torch.Tensor | None = None


class Objective(ABC):
    """One loss. `name` is also that of its weight in the config, `{name}_loss_weight`, of its value among a model's
    outputs, `{name}_loss`, and of its line in the log.

    Args:
        config: of the model.

    Attributes:
        accuracy: name of the output that the log shows as its accuracy, if there is one.
    """

    name: ClassVar[str]
    accuracy: ClassVar[str | None] = None

    def __init__(self, config: Any):
        self.config = config

    @property
    def weight(self) -> float:
        return getattr(self.config, f"{self.name}_loss_weight")

    @abstractmethod
    def count(self, targets: Targets) -> torch.Tensor | None:
        """How many samples, tokens, points or pixels have this loss, () int64; None where the batch has no such
        targets.
        """

    @abstractmethod
    def outputs(self, predictions: Predictions, targets: Targets, count: torch.Tensor | float) -> dict | None:
        """{"{name}_loss": the sum of the losses over `count`, and what is told beside it}; None where predictions or
        targets are missing.
        """


class ActionObjective(Objective):
    """Flow matching: the squared error of the velocity over the valid steps, a mean over the samples that act."""

    name = "action"

    def count(self, targets):
        return None if targets.actions is None else targets.num_acting

    def outputs(self, predictions, targets, count):
        """Also sample_action_loss (B,), NaN for samples that do not act, without gradient."""
        if predictions.velocity is None:
            return None
        rows = targets.acting
        errors = (predictions.velocity.float() - predictions.flow.float()).square()
        if predictions.given is not None:
            learned = ~predictions.given[: len(rows)]  # (R, K, chunk)
            if targets.action_mask is not None:
                learned = learned & targets.action_mask[rows][:, None]
            steps = errors.mean(3)[: len(rows)] * learned
            losses = steps.sum((1, 2)) / learned.sum((1, 2)).clamp(min=1)  # all valid steps of a sample may be given
        elif targets.action_mask is None:
            losses = errors.mean((1, 2, 3))[: len(rows)]
        else:
            valid = targets.action_mask[rows].float()
            steps = errors.mean((1, 3))[: len(rows)]  # (R, chunk)
            losses = (steps * valid).sum(-1) / valid.sum(-1)
        samples = torch.full((len(targets.actions),), float("nan"), device=losses.device)
        return {
            "action_loss": losses.sum() / count,
            "sample_action_loss": samples.index_put((rows,), losses.detach()),
        }


class LanguageObjective(Objective):
    """Cross-entropy of the next token, one mean over all labelled tokens."""

    name = "language"

    def count(self, targets):
        return None if targets.labels is None else targets.labelled.sum()

    def outputs(self, predictions, targets, count):
        """Also sample_language_loss, sample_token_accuracy (B,), NaN for samples without labels, without gradient."""
        if predictions.logits is None or targets.labels is None:
            return None
        (rows, places), logits = targets.labelled_at, predictions.logits
        labels = targets.labels[rows, places + 1]
        losses = self.token_losses(logits.float(), labels)
        weighted = losses if targets.language_weights is None else losses * targets.language_weights[rows]
        with torch.no_grad():
            tokens = targets.labelled.sum(-1).float()
            zeros = torch.zeros_like(tokens)
            right = (logits.argmax(-1) == labels).float()
            # 0 / 0 = NaN marks samples without labels
            sample_losses = zeros.index_add(0, rows, losses.detach().float()) / tokens
            sample_accuracy = zeros.index_add(0, rows, right) / tokens
        return {
            # 0 * sum keeps every rank's graph alike where a batch has no labelled token
            "language_loss": weighted.sum() / count + 0.0 * logits.sum(),
            "sample_language_loss": sample_losses,
            "sample_token_accuracy": sample_accuracy,
        }

    def token_losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(T,) from logits (T, vocabulary) and labels (T,). With `bin_smoothing` a label that is a bin or hundredths is
        spread over its neighbours, a Gaussian of so many, less its entropy: 0 stays the least loss.
        """
        losses = F.cross_entropy(logits, labels, reduction="none")
        width = getattr(self.config, "bin_smoothing", 0.0)
        if not width:
            return losses
        bins, hundredths = self.config.num_bins, self.config.num_hundredths
        first_bin = self.config.action_vocab_size - bins
        for first, count in ((first_bin, bins), (first_bin - hundredths, hundredths)):
            numbers = (labels >= first) & (labels < first + count)
            places = torch.arange(count, device=labels.device)
            distance = (places - (labels[numbers] - first)[:, None]).float() / width  # (numbers, count)
            wanted = (-0.5 * distance.square()).softmax(-1)
            predicted = logits[numbers].log_softmax(-1)[:, first : first + count]
            smooth = (wanted * (wanted.clamp(min=1e-12).log() - predicted)).sum(-1)
            losses = losses.masked_scatter(numbers, smooth)
        return losses


class DisparityObjective(Objective):
    """Smooth L1 of the initial disparity, and of the refined one where there is one, a mean over the pixels whose true
    one is known and within the volume.
    """

    name = "disparity"

    def count(self, targets):
        if targets.disparity is None:
            return None
        return known_disparity(targets.disparity, self.config.stereo_config.max_disparity)[1].sum()

    def outputs(self, predictions, targets, count):
        if predictions.disparity is None or targets.disparity is None:
            return None
        limit = self.config.stereo_config.max_disparity
        losses = [disparity_loss(found, targets.disparity, limit) for found in predictions.disparity]
        return {"disparity_loss": sum(losses) / count}


class DepthMapObjective(Objective):
    """Scale-invariant error of the log depth (`depth_expert.scale_invariant_losses`), a mean over the pictures of which
    any depth is known.
    """

    name = "depth_map"

    def count(self, targets):
        return None if targets.depth_map is None else known_depth(self._wanted(targets)).flatten(2).any(-1).sum()

    def outputs(self, predictions, targets, count):
        if predictions.log_depth is None or targets.depth_map is None:
            return None
        losses = scale_invariant_losses(predictions.log_depth, self._wanted(targets), self.config.silog_lambda)
        return {"depth_map_loss": losses.sum() / count}

    def _wanted(self, targets: Targets) -> torch.Tensor:
        """The depth of the views that the depth expert sees; a stereo encoder's is that of the first."""
        return targets.depth_map if self.config.stereo_config is None else targets.depth_map[:, :1]


def map_losses(logits: torch.Tensor, points: torch.Tensor, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of attention maps (B, P, N) over the visual tokens and the pixels (B, P, 2) that they shall mark, NaN = unknown:
    their cross-entropies (B, P), 0 where unknown, and whether the largest logit is of the token there, bool.
    """
    patch = config.patch_size
    wanted, known = soft_token_targets(points.to(logits.dtype), config.image_size // patch, patch)
    hits = (logits.detach().argmax(-1) == wanted.argmax(-1)) & known
    return -(wanted * logits.log_softmax(-1)).sum(-1), hits


class PointingObjective(Objective):
    """Cross-entropy of the pointers' attention maps with the visual tokens that hold what they mark, over the points
    that are in the picture.
    """

    name = "pointing"
    accuracy = "pointing_accuracy"

    def count(self, targets):
        return None if targets.points is None else in_picture(self._wanted(targets), self.config.image_size).sum()

    def outputs(self, predictions, targets, count):
        """Also pointing_accuracy: the share of the points that lie in the token with the largest logit."""
        if predictions.pointed is None or targets.points is None:
            return None
        points = self._wanted(targets)
        losses, hits = map_losses(predictions.pointed.logits, points, self.config)
        if (cells := predictions.pointed.cells) is not None:
            losses = losses + self._cell_losses(cells, points) * in_picture(points, self.config.image_size)
        return {"pointing_loss": losses.sum() / count, "pointing_accuracy": hits.sum() / count}

    def _wanted(self, targets: Targets) -> torch.Tensor:
        """(B, P, 2) px of what the model's pointers mark; what the batch does not have is unknown."""
        points, marked = targets.points, self.config.num_pointers
        return F.pad(points[:, :marked], (0, 0, 0, max(0, marked - points.shape[1])), value=float("nan"))

    def _cell_losses(self, cells: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (B, P) of the cell within the token that holds each of `points` (B, P, 2) px."""
        patch = self.config.patch_size
        token, cell = cells_of_points(points, self.config.image_size // patch, patch, self.config.point_cells)
        index = token[..., None, None].expand(-1, -1, 1, cells.shape[-1])
        of_token = cells.float().gather(2, index).squeeze(2)  # (B, P, C)
        return -of_token.log_softmax(-1).gather(-1, cell[..., None]).squeeze(-1)


class NamingObjective(Objective):
    """Cross-entropy of the attention map of each name with the visual tokens that hold the object, over the objects
    that are in the picture. An instruction names one or two of them, and where nothing else tells a cube from a ball,
    few samples teach it.
    """

    name = "naming"
    accuracy = "naming_accuracy"

    def count(self, targets):
        return None if targets.name_points is None else in_picture(targets.name_points, self.config.image_size).sum()

    def outputs(self, predictions, targets, count):
        """Also naming_accuracy: the share of the objects that lie in the token with the largest logit."""
        if predictions.pointed is None or predictions.pointed.named is None or targets.name_points is None:
            return None
        losses, hits = map_losses(predictions.pointed.named, targets.name_points, self.config)
        return {"naming_loss": losses.sum() / count, "naming_accuracy": hits.sum() / count}


class LanguagePointingObjective(Objective):
    """Cross-entropy of the language model's attention in one layer with the visual tokens that hold what an answer is
    about, and of its attention in the layer before with the words that ask for it, whichever of them; a mean over the
    answers' tokens whose point is in the picture, and over the heads.
    """

    name = "language_pointing"
    accuracy = "language_pointing_accuracy"

    def count(self, targets):
        if targets.answer_points is None:
            return None
        return in_picture(targets.answer_points[:, 1:], self.config.image_size).sum()

    def outputs(self, predictions, targets, count):
        """Also language_pointing_accuracy: the share of the tokens whose attention, a mean over the heads, is largest
        where the point lies.
        """
        if predictions.language_pointing is None or targets.answer_points is None:
            return None
        points, patch = targets.answer_points[:, 1:], self.config.patch_size
        points = points[in_picture(points, self.config.image_size)]
        attention = predictions.language_pointing  # not made to sum to 1: what looks at words does not look here
        wanted, _ = soft_token_targets(points.to(attention.dtype), self.config.image_size // patch, patch)
        losses = -(wanted[:, None] * attention).sum(-1).mean(-1) - predictions.language_reading.mean(-1)
        with torch.no_grad():
            hits = attention.exp().mean(1).argmax(-1) == wanted.argmax(-1)
        return {"language_pointing_loss": losses.sum() / count, "language_pointing_accuracy": hits.sum() / count}


class KeyframeObjective(Objective):
    """Smooth L1 of the way to the keyframe, and of the vectors of its turns where these are apart from it, a mean over
    the samples whose keyframe is known.
    """

    name = "keyframe"

    def count(self, targets):
        return None if targets.displacement is None else targets.displacement.isfinite().all(-1).sum()

    def outputs(self, predictions, targets, count):
        pointed = predictions.pointed
        if pointed is None or targets.displacement is None:
            return None
        known = targets.displacement.isfinite().all(-1)
        truth = torch.where(known[:, None], targets.displacement.float(), 0.0)
        losses = F.smooth_l1_loss(pointed.displacement.float(), truth, reduction="none", beta=0.1).mean(-1)
        if (pointed.turns is None) != (targets.turns is None):
            has = "no turns" if targets.turns is None else "turns"
            raise ValueError(
                f"turn_symmetry is {self.config.turn_symmetry} and the batch has {has} beside its displacement; the "
                "model's turn_symmetry and its processor's must be equal"
            )
        if targets.turns is not None:
            apart = turn_losses(pointed.turns, targets.turns, self.config.turn_symmetry, targets.equal_turns)
            losses = losses + apart / truth.shape[-1]  # a part of a vector counts as a number of the way does
        return {"keyframe_loss": (losses * known).sum() / count}


# in the order in which they are added up, logged and validated
OBJECTIVES = (
    ActionObjective,
    LanguageObjective,
    DisparityObjective,
    DepthMapObjective,
    PointingObjective,
    NamingObjective,
    KeyframeObjective,
    LanguagePointingObjective,
)


def objectives_of(config: Any) -> list[Objective]:
    """Those of `OBJECTIVES` that a policy of this config has a weight and outputs for."""
    absent: set[type[Objective]] = set()
    if config.stereo_config is None:
        absent.add(DisparityObjective)
    if not config.use_pointers:
        absent |= {PointingObjective, NamingObjective, KeyframeObjective}
    if getattr(config, "depth_config", None) is None:
        absent.add(DepthMapObjective)
    if getattr(config, "language_pointing_layer", None) is None:
        absent.add(LanguagePointingObjective)
    weighted = [kind for kind in OBJECTIVES if hasattr(config, f"{kind.name}_loss_weight")]
    return [kind(config) for kind in weighted if kind not in absent]


def count_targets(objectives: Sequence[Objective], targets: Targets) -> dict[str, torch.Tensor]:
    """{name: count} of the objectives that a batch has targets for."""
    counts = {objective.name: objective.count(targets) for objective in objectives}
    return {name: count for name, count in counts.items() if count is not None}


def sum_losses(
    objectives: Sequence[Objective], predictions: Predictions, targets: Targets, counts: Mapping[str, Any] | None
) -> dict[str, torch.Tensor]:
    """Outputs of all objectives that apply, and their weighted sum as "loss" where any does.

    Args:
        counts: what each sum of losses is divided by; None = those of `count_targets`, or 1.
    """
    if counts is None:
        counts = {name: count.clamp(min=1) for name, count in count_targets(objectives, targets).items()}
    found, weighted = {}, []
    for objective in objectives:
        outputs = objective.outputs(predictions, targets, counts.get(objective.name))
        if outputs is not None:
            found |= outputs
            weighted.append(objective.weight * outputs[f"{objective.name}_loss"])
    return found | ({"loss": sum(weighted)} if weighted else {})
