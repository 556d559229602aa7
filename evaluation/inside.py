"""What a policy looks at, and what it makes of it: attention by layer and by place, features, answers, the keyframe."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from stereovla.evaluation import metrics
from stereovla.evaluation.held_out import HeldOutRow
from stereovla.evaluation.model_policy import ModelPolicy
from stereovla.evaluation.offline import BOX_TOKENS, DEPTH_TOKENS, OfflineEvaluation
from stereovla.evaluation.offline_geometry import observations
from stereovla.evaluation.pointed_keyframes import noted, pointing_maps, told_displacements, way_in_metres

STREAMS = ("pictures", "words", "depth expert", "state", "chunk")
BATCH = 16


@contextmanager
def watched_attention(model: Any) -> Iterator[list[list[torch.Tensor]]]:
    """Within, where one batch of chunks is predicted, the attention of the action tokens in every denoising step is
    noted for each layer of the action expert: (B, keys), a mean over heads and tokens that sums to 1.
    """
    transformer = model.action_expert.transformer
    config, kept = transformer.config, [[] for _ in transformer.layers]
    before, config._attn_implementation = config._attn_implementation, "eager"  # the only one that has weights

    def note(layer: int, weights: torch.Tensor) -> None:
        kept[layer].append(weights.float().mean((1, 2)).cpu())

    hooks = [
        layer.self_attn.register_forward_hook(lambda _, given, output, number=number: note(number, output[1]))
        for number, layer in enumerate(transformer.layers)
    ]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
        config._attn_implementation = before
        for steps in kept:
            del steps[:1]  # of the state tokens, which are read once, before the first step


@dataclass
class Looks:
    """Where a policy looks on rows, B of them.

    shares: (layers, `STREAMS`), of the action tokens' attention, a mean over rows and denoising steps.
    on_picture: (B, grid, grid), its part on the tokens of the first view, a mean over layers and steps; on_depth: on
        those of the depth expert, None without one.
    geometry, semantics: (B, grid, grid, C), features pooled to tokens, before they are mixed; None where the policy has
        none such.
    pointed: {name: (B, grid, grid)}, where the pointers look; None without them.
    """

    shares: np.ndarray
    on_picture: np.ndarray
    on_depth: np.ndarray | None = None
    geometry: np.ndarray | None = None
    semantics: np.ndarray | None = None
    pointed: dict[str, np.ndarray] | None = None


def look(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> Looks:
    """What the policy looks at when it acts on rows."""
    model, given = policy.model, observations(rows)
    inputs = policy.inputs(given)
    geometry, semantics = feature_modules(model)
    with ExitStack() as watching:
        attention = watching.enter_context(watched_attention(model))
        pointing = watching.enter_context(pointing_maps(model))
        pooled = [
            watching.enter_context(noted(module, lambda output: tokens_of(output, model)))
            for module in (geometry, semantics)
        ]
        policy.act(given)
    is_picture = (inputs["input_ids"] == model.config.image_token_id).cpu()
    size, depth, chunk = model.config.num_visual_tokens, depth_tokens(model), model.config.chunk_size
    state = model.config.state_history + (0 if model.pointers is None else len(model.pointers.names) + 1)
    shares, on_picture, on_depth = [], [], []
    for steps in attention:
        weights = torch.stack(steps).mean(0)  # (B, keys): [prompt, keyframe pose if written | depth | state | chunk]
        prompt = weights.shape[1] - depth - state - chunk
        read, *others = weights.split([prompt, depth, state, chunk], dim=1)
        pictures = read[:, : is_picture.shape[1]] * is_picture
        parts = [pictures.sum(-1), (read.sum(-1) - pictures.sum(-1)), *(other.sum(-1) for other in others)]
        shares.append([float(part.mean()) for part in parts])
        first = [row[seen][:size] for row, seen in zip(read[:, : is_picture.shape[1]], is_picture, strict=True)]
        on_picture.append(squared(torch.stack(first)))
        if depth:
            on_depth.append(squared(others[0][:, : model.config.depth_config.num_tokens]))
    found = [part[0].numpy() if part else None for part in pooled]
    maps = dict(zip(model.pointers.names, pointing[0].numpy().swapaxes(0, 1), strict=True)) if pointing else None
    return Looks(
        np.array(shares),
        torch.stack(on_picture).mean(0).numpy(),
        torch.stack(on_depth).mean(0).numpy() if on_depth else None,
        *found,
        maps,
    )


def attention_shares(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> np.ndarray:
    """`Looks.shares` of however many rows, `BATCH` at a time."""
    batches = [rows[begin : begin + BATCH] for begin in range(0, len(rows), BATCH)]
    return np.average([look(policy, batch).shares for batch in batches], axis=0, weights=[*map(len, batches)])


def squared(tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, ...) of a square grid in row order -> (B, grid, grid, ...)."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


def depth_tokens(model: Any) -> int:
    """How many tokens of a depth expert stand in the prefix."""
    config = getattr(model.config, "depth_config", None)
    if config is None:
        return 0
    return config.num_tokens * (len(model.config.views) if config.stereo_config is None else 1)


def feature_modules(model: Any) -> tuple[Any, Any]:
    """What gives the geometric and the semantic features of a policy; None where it has no such part."""
    if model.config.model_type == "depthvla":
        expert = model.model.depth_expert
        return (None if expert is None else expert.norm), model.model.vlm.multi_modal_projector
    visual = model.model.visual_tokens
    geometry = visual.stereo if visual.stereo is not None else getattr(visual, "view_attention", None)
    return geometry, visual.semantic or visual.spatial


def tokens_of(output: Any, model: Any) -> torch.Tensor:
    """What a module of `feature_modules` gives of the first view of each sample, (B, grid, grid, C)."""
    if hasattr(output, "features"):  # of a stereo encoder, a map
        grid = model.config.image_size // model.config.patch_size
        return F.adaptive_avg_pool2d(output.features.float(), grid).permute(0, 2, 3, 1)
    if output.ndim == 4:  # of a depth expert: (B, views, N, C)
        output = output[:, 0]
    elif model.config.model_type == "depthvla":
        output = output[:: len(model.config.views)]
    elif getattr(model.config, "right_view", None) is not None and output.shape[1] == model.config.num_visual_tokens:
        output = output[::2] if model.model.visual_tokens.view_attention is None else output
    return squared(output.float())


def colours_of(features: np.ndarray) -> np.ndarray:
    """Features (B, grid, grid, C) -> (B, grid, grid, 3) in [0, 1]: their three main components, of all rows alike, so
    that what has one colour is alike to the policy.
    """
    flat = features.reshape(-1, features.shape[-1])
    flat = flat - flat.mean(0)
    _, _, ways = np.linalg.svd(flat, full_matrices=False)
    parts = np.zeros((len(flat), 3))
    parts[:, : min(3, len(ways))] = flat @ ways[:3].T
    low, high = np.quantile(parts, [0.02, 0.98], axis=0)
    scaled = np.clip((parts - low) / np.maximum(high - low, 1e-9), 0, 1)
    return scaled.reshape(*features.shape[:-1], 3)


# ----------------------------------------------------------------------------------------------------------------------
# What it makes of it
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Geometry:
    """Of one picture: the left view (H, W, 3) in [0, 1], true and predicted (H, W) of it, 0 = unknown, and their unit,
    "m" of depth or "px" of disparity.
    """

    view: np.ndarray
    true: np.ndarray
    predicted: np.ndarray
    unit: str


def geometries(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> list[Geometry]:
    """Depth of a policy with a depth expert, disparity of one with a stereo encoder, of rows whose truth is known; []
    of others.
    """
    config = policy.model.config
    expert = getattr(config, "depth_config", None) is not None
    if not expert and (config.stereo_config is None or not policy.is_stereovla):
        return []
    rows = [row for row in rows if row.depths and (expert or row.calibration is not None)]
    if not rows:
        return []
    maps = policy.depth_maps([row.depths for row in rows])
    beside = policy.shown_beside(rows) | ({} if expert else {"calibration": [row.calibration for row in rows]})
    inputs = policy.processor(
        images=policy.images([row.views for row in rows]),
        text=[row.task for row in rows],
        state=[row.states[-config.state_history :] for row in rows],
        embodiment=[row.embodiment for row in rows],
        check_stereo=False,
        **(beside | {"depth_map": maps}),
    )
    key = "depth_map" if expert else "disparity"
    true = inputs[key] if policy.needs_depth else inputs.pop(key)
    with torch.inference_mode():
        output = policy.model(**inputs.to(policy.model.device), **{f"output_{'depth' if expert else key}": True})
    true = true[:, 0] if expert else true
    predicted = output.depth[:, 0] if expert else output.disparity
    if predicted.shape != true.shape:  # at a half or a quarter of the resolution
        predicted = F.interpolate(predicted[:, None].float(), size=true.shape[-2:], mode="bilinear")[:, 0]
    views = inputs["pixel_values"][:, 0].permute(0, 2, 3, 1).float().cpu()
    parts = zip(views.numpy(), true.cpu().numpy(), predicted.float().cpu().numpy(), strict=True)
    return [Geometry(*part, "m" if expert else "px") for part in parts]


@dataclass
class Answer:
    """What a policy says of one row, beside the truth in the row; None = it was not asked, or does not say.

    chunk: (n, 3) m, positions of the tool through the predicted chunk, the present one first.
    pointed: (3,) m, the keyframe that the pointers tell the action expert. written: (3,) m, that of its answer in
        words.
    box: (4,) px of the left view. depths: {"target" or "gripper": m}, of the points that are known in the row; NaN
        where the answer is no number.
    """

    chunk: np.ndarray
    pointed: np.ndarray | None = None
    written: np.ndarray | None = None
    box: np.ndarray | None = None
    depths: dict[str, float] = field(default_factory=dict)


def act(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> list[Answer]:
    """What the policy does on rows, and where its pointers say that the keyframe is."""
    answers = []
    for begin in range(0, len(rows), BATCH):
        batch = rows[begin : begin + BATCH]
        with told_displacements(policy.model) as ways:
            chunks = policy.act(observations(batch))
        for number, (row, chunk) in enumerate(zip(batch, chunks, strict=True)):
            now = row.states[-1, :3].astype(np.float64)
            path = now + np.concatenate([np.zeros((1, 3)), np.cumsum(chunk[:, :3], axis=0)])
            answers.append(Answer(path))
            if ways:
                way = ways[0][number].double().numpy()
                answers[-1].pointed = now + way_in_metres(policy.processor, way, row.embodiment)
    return answers


def answer(policy: ModelPolicy, rows: Sequence[HeldOutRow]) -> list[Answer]:
    """`act`, and what the policy answers in words where it has learned to."""
    answers, asking = act(policy, rows), OfflineEvaluation(policy)
    if not policy.model.config.language_loss_weight:
        return answers
    numbers = [number for number, row in enumerate(rows) if row.boxes_px is not None]
    if numbers:
        asked = [rows[number] for number in numbers]
        ids = padded(asking.answer(asked, "box", BOX_TOKENS, text=[row.target for row in asked]), BOX_TOKENS, policy)
        boxes, valid = policy.processor.decode_boxes(ids, source_size=asked[0].left.shape[:2])
        for number, box, readable in zip(numbers, boxes[:, 0], valid, strict=True):
            answers[number].box = box if readable else None
    for name in ("target", "gripper"):
        numbers = [number for number, row in enumerate(rows) if name in row.points_px]
        if numbers:
            points = [rows[number].points_px[name] for number in numbers]
            ids = asking.answer([rows[number] for number in numbers], "depth", DEPTH_TOKENS, points_px=points)
            for number, found in zip(numbers, policy.processor.decode_depths(ids), strict=True):
                answers[number].depths[name] = found[0] if found and len(found) == 1 else float("nan")
    numbers = [number for number, row in enumerate(rows) if row.keyframe_pose is not None]
    if numbers:
        asked, size = [rows[number] for number in numbers], policy.model.config.pose_dim
        states = [asking.history(row) for row in asked]
        ids = padded(asking.answer(asked, "pose", size, text=[row.task for row in asked], state=states), size, policy)
        poses, valid = policy.processor.decode_poses(ids, [row.embodiment for row in asked])
        for number, pose, readable in zip(numbers, poses, valid, strict=True):
            answers[number].written = pose[:3].astype(np.float64) if readable else None
    return answers


def padded(ids: torch.Tensor, size: int, policy: ModelPolicy) -> torch.Tensor:
    """Ids (B, at most `size`) of answers, those that ended early filled up."""
    return F.pad(ids, (0, size - ids.shape[1]), value=policy.processor.tokenizer.pad_token_id)


def keyframe_errors(rows: Sequence[HeldOutRow], answers: Sequence[Answer]) -> dict[str, Any]:
    """{"xy_cm", "z_cm"}: summaries of the errors of the keyframe that the pointers tell; None without any."""
    pairs = [
        (found.pointed, row.keyframe_pose[:3])
        for row, found in zip(rows, answers, strict=True)
        if found.pointed is not None and row.keyframe_pose is not None
    ]
    ways = 100 * np.array([found - true for found, true in pairs]).reshape(-1, 3)
    errors = {"xy_cm": np.linalg.norm(ways[:, :2], axis=1), "z_cm": np.abs(ways[:, 2])}
    return {name: metrics.summary(values) for name, values in errors.items()}


def pixel_of(position: np.ndarray, calibration: dict[str, Any] | None) -> np.ndarray:
    """Pixel (2,) of the left view in which a position (3,) m in the base frame is seen; NaN where it is not known."""
    if calibration is None:
        return np.full(2, np.nan)
    pose = np.asarray(calibration["transform_camera_to_base"], dtype=np.float64)
    camera = (np.asarray(position, dtype=np.float64) - pose[:3, 3]) @ pose[:3, :3]
    if camera[2] <= 0:
        return np.full(2, np.nan)
    focal, centre = (np.broadcast_to(calibration[f"{name}_px"], 2) for name in ("focal_length", "principal_point"))
    return camera[:2] / camera[2] * focal + centre
