"""A tiny DepthVLA with every weight random, in float64, and batches of what it may be given."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from published_pi0 import randomized

from stereovla.modeling_stereovla import DepthVLAConfig, DepthVLAForActionPrediction

ANSWER = 5  # four bins and EOS
# a depth expert whose tokens hold 2 x 2 cells of its encoder
MERGED = {"depth_config": {"patch_size": 32, "merge_size": 2}}


def tiny_config(**overrides) -> DepthVLAConfig:
    """The time is embedded in the model's dtype, lest it be in float32."""
    return DepthVLAConfig.from_preset("depthvla-tiny", **{"time_embedding_dtype": "model", **overrides})


def tiny(dtype: torch.dtype = torch.float64, **overrides) -> DepthVLAForActionPrediction:
    """The same weights in every call, in evaluation mode."""
    return randomized(DepthVLAForActionPrediction(tiny_config(**overrides))).to(dtype)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """`Tensor.float()` gives float64, so that norms, positions and losses are as exact as the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def prompts(config: DepthVLAConfig, side: str = "left", dtype: torch.dtype = torch.float64, rows: int = 3) -> dict:
    """What `predict_action` takes: prompts of different lengths, padded on one side ("none": all of one length, all
    views there). The second sample has its first view alone.
    """
    return _inputs(config, side, dtype, rows, answers=False)


def training_batch(
    config: DepthVLAConfig,
    side: str = "right",
    dtype: torch.dtype = torch.float64,
    rows: int = 3,
    answers: bool = False,
) -> dict:
    """What `forward` takes, noise and times of `config.flow_draws` draws included; with `answers` each sample has one,
    with labels. Depth is known in part.
    """
    generator = torch.Generator().manual_seed(1)
    size, views, draws = config.image_size, len(config.views), config.flow_draws
    chunk = (config.chunk_size, config.action_dim)
    batch = _inputs(config, side, dtype, rows, answers)
    if config.depth_config is not None:
        depth = 0.3 + torch.rand(rows, views, size, size, generator=generator, dtype=dtype)
        depth[:, :, :, :9] = 0
        batch["depth_map"] = depth * batch["view_mask"][..., None, None]
    batch["actions"] = torch.randn(rows, *chunk, generator=generator, dtype=dtype)
    batch["noise"] = torch.randn(rows, draws, *chunk, generator=generator, dtype=dtype)
    batch["time"] = torch.rand(rows, draws, generator=generator, dtype=dtype)
    return batch


def _inputs(config: DepthVLAConfig, side: str, dtype: torch.dtype, rows: int, answers: bool) -> dict:
    generator = torch.Generator().manual_seed(0)
    size = config.image_size
    view_mask = torch.ones(rows, len(config.views), dtype=torch.bool)
    if side != "none" and rows > 1:
        view_mask[1, 1:] = False
    sequences = []
    for row, views in enumerate(view_mask.sum(-1).tolist()):
        words = torch.randint(10, 200, (3 + (0 if side == "none" else row),), generator=generator)
        start = torch.full((views * config.num_visual_tokens,), config.image_token_id)
        answer = torch.randint(config.action_vocab_size - config.num_bins, 1024, (ANSWER - 1,), generator=generator)
        end = torch.cat([answer, torch.tensor([2])]) if answers else torch.empty(0, dtype=torch.long)
        sequences.append((torch.cat([start, torch.tensor([1]), words]), end))
    length = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids, mask, types = (torch.zeros(rows, length, dtype=torch.long) for _ in range(3))
    for row, (prompt, answer) in enumerate(sequences):
        number = len(prompt) + len(answer)
        begin = length - number if side == "left" else 0
        ids[row, begin : begin + number] = torch.cat([prompt, answer])
        mask[row, begin : begin + number] = 1
        types[row, begin + len(prompt) : begin + number] = 1
    pixels = torch.rand(rows, len(config.pixel_views), 3, size, size, generator=generator, dtype=dtype)
    pixels[:, : len(config.views)] *= view_mask[..., None, None, None]
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "view_mask": view_mask,
        "state": torch.randn(rows, config.state_history, config.state_dim, generator=generator, dtype=dtype),
    }
    if answers:
        inputs |= {"token_type_ids": types, "labels": ids.masked_fill(types == 0, -100)}
    return inputs
