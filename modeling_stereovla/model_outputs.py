"""What the models return, and inputs that it does not know."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs


@dataclass
class StereoVLAModelOutput(BaseModelOutputWithPast):
    """
    last_hidden_state: (B, L, hidden), one state for each input id; of samples that share pictures, from that of the
        last image token on.
    visual_tokens: (B, N, hidden), the projected tokens, when images were given.
    disparity: maps (B', 1, h, w), each in px of its own resolution, the finest last, where asked for.
    points: (B, 3, h, w), see `view_points`, where the config has them.
    """

    visual_tokens: torch.Tensor | None = None
    disparity: list[torch.Tensor] | None = None
    points: torch.Tensor | None = None


@dataclass
class StereoVLAOutput(CausalLMOutputWithPast):
    """
    loss: weighted sum of the losses below, when any of them could be computed.
    action_loss, language_loss, disparity_loss, pointing_loss, naming_loss, keyframe_loss, language_pointing_loss: each
        alone, unweighted.
    pointing_accuracy: share of the known points that lie in the visual token which is pointed at; naming_accuracy:
        that of the named objects.
    sample_action_loss (B,), sample_language_loss (B,): means of each sample, NaN where it has none; without gradient.
    sample_token_accuracy (B,): share of the labelled tokens whose argmax is right, NaN where there is none.
    logits: (B, L, vocabulary) or the part that `logits_to_keep` names; with labels, only those of the labelled tokens
        (T, vocabulary).
    velocity: (B', K, chunk, action_dim) of the samples that have an action loss.
    disparity: (B', H/4, W/4), or (B', H/2, W/2) where the stereo encoder refines it, in px of the given left view.
    """

    action_loss: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    disparity_loss: torch.Tensor | None = None
    pointing_loss: torch.Tensor | None = None
    naming_loss: torch.Tensor | None = None
    keyframe_loss: torch.Tensor | None = None
    language_pointing_loss: torch.Tensor | None = None
    pointing_accuracy: torch.Tensor | None = None
    naming_accuracy: torch.Tensor | None = None
    language_pointing_accuracy: torch.Tensor | None = None
    sample_action_loss: torch.Tensor | None = None
    sample_language_loss: torch.Tensor | None = None
    sample_token_accuracy: torch.Tensor | None = None
    velocity: torch.Tensor | None = None
    disparity: torch.Tensor | None = None


@dataclass
class DepthVLAModelOutput(BaseModelOutputWithPast):
    """
    last_hidden_state: (B, L, hidden), one state for each input id.
    prefix: what the action expert reads (`action_expert.Prefix`); None while answers are generated.
    visual_tokens: (B, N, hidden) of the first view, the depth expert's added to them, where pointers read them.
    log_depth: (B, V, H, W) float32, log of m, where asked for.
    """

    prefix: Any = None
    visual_tokens: torch.Tensor | None = None
    log_depth: torch.Tensor | None = None


@dataclass
class DepthVLAOutput(CausalLMOutputWithPast):
    """As `StereoVLAOutput`, and

    depth_map_loss: scale-invariant error of the log depth, unweighted.
    depth: (B, V, H, W) float32, planar depth of the views in m.
    """

    action_loss: torch.Tensor | None = None
    language_loss: torch.Tensor | None = None
    depth_map_loss: torch.Tensor | None = None
    pointing_loss: torch.Tensor | None = None
    naming_loss: torch.Tensor | None = None
    keyframe_loss: torch.Tensor | None = None
    pointing_accuracy: torch.Tensor | None = None
    naming_accuracy: torch.Tensor | None = None
    sample_action_loss: torch.Tensor | None = None
    sample_language_loss: torch.Tensor | None = None
    sample_token_accuracy: torch.Tensor | None = None
    velocity: torch.Tensor | None = None
    depth: torch.Tensor | None = None


# what transformers' attention and Trainer may pass through a model, beside its own inputs
PASSED_ON = frozenset(TransformersKwargs.__annotations__) | {"cache_position"}


def refuse_unknown_inputs(keywords: dict, forward: Callable) -> None:
    """TypeError for an input that is neither one of `forward` nor one of transformers' own, naming the nearest one."""
    for name in keywords.keys() - PASSED_ON:
        own = [known for known in inspect.signature(forward).parameters if known not in ("self", "kwargs")]
        near = difflib.get_close_matches(name, own, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(own)}"
        raise TypeError(f"forward has no input {name!r}; {hint}")


def refuse_targets(unknown: dict[str, Any]) -> None:
    """TypeError for inputs that no `predict_action` has, such as what a processor makes of targets."""
    if unknown:
        raise TypeError(
            f"predict_action got unknown inputs {sorted(unknown)}; build them with the processor without targets"
        )
