"""A checkpoint of a small preset with random weights, saved as train.py does, for the tests of the upper rooms."""

from pathlib import Path

import numpy as np
import torch

from stereovla.modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from stereovla.processing import StereoImageProcessorPil, StereoProcessor, build_tokenizer
from stereovla.training.models import untrained

EMBODIMENT = "franka_panda"
LOW = {"state": [0.3, -0.3, -0.05, -0.2, -0.2, -0.8, 0.0], "action": [-0.04, -0.04, -0.04, -0.2, -0.2, -0.2, -1.0]}
HIGH = {"state": [0.7, 0.3, 0.4, 0.2, 0.2, 0.8, 1.0], "action": [0.04, 0.04, 0.04, 0.2, 0.2, 0.2, 1.0]}


def save_tiny_checkpoint(folder: Path, seed: int = 7, preset: str = "tiny", **overrides) -> Path:
    """Writes model, processor and their code into `folder`, with overrides of the config."""
    tokenizer = build_tokenizer(["pick up the red cube", "pick up the green ball", "red cube"])
    statistics = {
        key: {"q01": LOW[name], "q99": HIGH[name]}
        for key, name in (("state", "state"), ("action", "action"), ("keyframe_pose", "state"))
    }
    config = StereoVLAConfig.from_preset(preset, **overrides)
    processor = StereoProcessor(
        StereoImageProcessorPil(size={"height": config.image_size, "width": config.image_size}),
        tokenizer,
        norm_stats={EMBODIMENT: statistics},
        control_rates_hz={EMBODIMENT: 10.0},
        chunk_size=config.chunk_size,
        state_history=config.state_history,
        num_visual_tokens=config.num_image_tokens,
        points_frame=config.points_frame,
        turn_symmetry=config.turn_symmetry,
    )
    config = StereoVLAConfig.from_preset(
        preset,
        **overrides,
        image_token_id=processor.image_token_id,
        action_vocab_size=processor.bins.vocab_size,
        text_config={"vocab_size": -(-len(tokenizer) // 64) * 64},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = StereoVLAForActionPrediction(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def stereo_pair(seed: int = 0, size: int = 64, disparity: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A textured plane in both views, uint8 (size, size, 3): the right view is the left one moved by `disparity`."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (size // 4, (size + disparity) // 4 + 1, 3), np.uint8)
    wide = np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:, : size + disparity]
    return wide[:, :size].copy(), wide[:, disparity:].copy()


def save_tiny_depthvla(folder: Path, seed: int = 7, **overrides) -> Path:
    """The same of a DepthVLA, with overrides of its config."""
    statistics = {
        key: {"q01": LOW[name], "q99": HIGH[name]}
        for key, name in (("state", "state"), ("action", "action"), ("keyframe_pose", "state"))
    }
    tasks = ["pick up the red cube", "pick up the green ball"]
    meta = {"tasks": tasks, "stats": {EMBODIMENT: statistics}, "fps": 10.0, "state_dim": 7, "action_dim": 7}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = untrained("depthvla-tiny", meta, **overrides)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
