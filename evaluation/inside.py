"""What a policy looks at: where its action tokens' attention goes, layer by layer, and the depth that it predicts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stereovla.evaluation.held_out import HeldOutRow
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline_geometry import observations
from stereovla.evaluation.plots import ACCENT, GREY, INK, entitle, new_figure, save

STREAMS = ("pictures", "words", "depth expert", "state", "chunk")
COLOURS = dict(zip(STREAMS, ("#3d6b8e", "#9bbcd1", ACCENT, "#8e5a3d", GREY), strict=True))
PICTURES = 4  # of which depth is drawn
POINTERS = 3  # tokens beside the states: target, gripper, and the way to the keyframe


@contextmanager
def watched_attention(model: Any) -> Iterator[list[list[torch.Tensor]]]:
    """Within, the attention of the action tokens in every denoising step is noted for each layer of the action expert:
    (B, keys), a mean over heads and tokens that sums to 1.
    """
    transformer = model.action_expert.transformer
    config, noted = transformer.config, [[] for _ in transformer.layers]
    before, config._attn_implementation = config._attn_implementation, "eager"  # the only one that has weights

    def note(layer: int, weights: torch.Tensor) -> None:
        if weights.shape[2] == model.config.chunk_size:  # not the state tokens', which are read once
            noted[layer].append(weights.float().mean((1, 2)).cpu())

    hooks = [
        layer.self_attn.register_forward_hook(lambda _, given, output, number=number: note(number, output[1]))
        for number, layer in enumerate(transformer.layers)
    ]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
        config._attn_implementation = before


def attention_shares(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> np.ndarray:
    """(layers, `STREAMS`): the shares of the action tokens' attention, a mean over rows and denoising steps."""
    model, given = policy.model, observations(rows)
    inputs = policy.inputs(given)
    with watched_attention(model) as noted:
        policy.act(given)
    is_picture = (inputs["input_ids"] == model.config.image_token_id).cpu()
    chunk, depth = model.config.chunk_size, depth_tokens(model)
    state = model.config.state_history + (0 if model.pointers is None else POINTERS)
    shares = []
    for steps in noted:
        weights = torch.stack(steps).mean(0)  # (B, keys): [prompt, keyframe pose if written | depth | state | chunk]
        prompt = weights.shape[1] - depth - state - chunk
        read, *others = weights.split([prompt, depth, state, chunk], dim=1)
        pictures = (read[:, : is_picture.shape[1]] * is_picture).sum(-1)
        parts = [pictures, read.sum(-1) - pictures, *(other.sum(-1) for other in others)]
        shares.append([float(part.mean()) for part in parts])
    return np.array(shares)


def depth_tokens(model: Any) -> int:
    """How many tokens of a depth expert stand in the prefix."""
    config = getattr(model.config, "depth_config", None)
    if config is None:
        return 0
    return config.num_tokens * (len(model.config.views) if config.stereo_config is None else 1)


def depth_pictures(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(left view (H, W, 3) in [0, 1], true depth (H, W) m with 0 = unknown, predicted depth (H, W) m) as processed."""
    config = policy.model.config
    inputs = policy.processor(
        images=policy.images([row.views for row in rows]),
        text=[row.task for row in rows],
        state=[row.states[-config.state_history :] for row in rows],
        embodiment=[row.embodiment for row in rows],
        depth_map=policy.depth_maps([row.depths for row in rows]),
        check_stereo=False,
    )
    true = inputs["depth_map"][:, 0] if policy.needs_depth else inputs.pop("depth_map")[:, 0]
    with torch.inference_mode():
        predicted = policy.model(**inputs.to(policy.model.device), output_depth=True).depth[:, 0].float().cpu()
    views = inputs["pixel_values"][:, 0].permute(0, 2, 3, 1).cpu()
    return [tuple(part.numpy() for part in parts) for parts in zip(views, true, predicted, strict=True)]


def draw_attention(policy: ModelPolicy, rows: Sequence[HeldOutRow], path: Path) -> np.ndarray:
    """Writes the picture of `attention_shares`; returns them."""
    shares = attention_shares(policy, rows)
    figure, (axis,) = new_figure(1, 1, 7.0, 0.9 + 0.42 * len(shares))
    left = np.zeros(len(shares))
    for stream, values in zip(STREAMS, shares.T, strict=True):
        if not values.any():
            continue
        axis.barh(range(len(shares)), values, left=left, color=COLOURS[stream], label=stream)
        for layer, value in enumerate(values):
            if value > 0.05:
                place = left[layer] + value / 2
                axis.text(place, layer, f"{100 * value:.0f} %", ha="center", va="center", color="white", fontsize=8)
        left += values
    axis.set_yticks(range(len(shares)), [f"layer {number + 1}" for number in range(len(shares))])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.grid(False)
    axis.set_xlabel(f"share of the action tokens' attention, mean over {len(rows)} held-out frames", color=INK)
    axis.legend(ncols=len(STREAMS), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=8)
    save(figure, path)
    return shares


def draw_depth(policy: ModelPolicy, rows: Sequence[HeldOutRow], path: Path) -> None:
    """Writes pictures, true and predicted depth and the relative error of the first `PICTURES` rows with depth."""
    found = depth_pictures(policy, [row for row in rows if row.depths][:PICTURES])
    figure, axes = new_figure(len(found), 4, 8.4, 0.3 + 2.1 * len(found))
    for number, (view, true, predicted) in enumerate(found):
        known = true > 0
        low, high = np.quantile(true[known], [0.02, 0.98])
        error = np.where(known, np.abs(predicted - true) / np.where(known, true, 1), np.nan)
        panels = (
            ("left view", view, {}),
            (f"true, {low:.2f} to {high:.2f} m", np.where(known, true, np.nan), {"vmin": low, "vmax": high}),
            ("predicted", predicted, {"vmin": low, "vmax": high}),
            (f"error, {100 * np.nanmean(error):.1f} % (to 20 %)", error, {"vmax": 0.2, "cmap": "magma"}),
        )
        for axis, (title, picture, options) in zip(axes[4 * number : 4 * number + 4], panels, strict=True):
            axis.imshow(picture, **({"vmin": 0} | options if options else {}))
            axis.set_axis_off()
            entitle(axis, title)
    save(figure, path)
