"""Models to train, and their processors: of a preset's size, or one that was trained before."""

import math

import torch

from modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from modeling_stereovla.robot_heads import sizes_of_robot
from processing import StereoImageProcessorPil, StereoProcessor, build_tokenizer


def untrained(preset: str, meta: dict) -> tuple[StereoVLAForActionPrediction, StereoProcessor]:
    """An untrained model of the preset's size and its processor, with the words and statistics of the dataset."""
    config = StereoVLAConfig.from_preset(preset)
    tokenizer = build_tokenizer(meta["tasks"], num_bins=config.num_bins)
    processor = StereoProcessor(
        StereoImageProcessorPil(size={"height": config.image_size, "width": config.image_size}),
        tokenizer,
        norm_stats=meta["stats"],
        control_rates_hz={name: meta["fps"] for name in meta["stats"]},
        chunk_size=config.chunk_size,
        state_history=config.state_history,
        state_dim=meta["state_dim"],
        action_dim=meta["action_dim"],
        num_visual_tokens=config.num_visual_tokens,
        num_bins=config.num_bins,
    )
    config = StereoVLAConfig.from_preset(
        preset,
        **sizes_of_robot(meta["state_dim"], meta["action_dim"]),
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        action_vocab_size=len(tokenizer),
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,  # a multiple of 64 multiplies faster
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    return StereoVLAForActionPrediction(config), processor


def trained(source: str, meta: dict) -> tuple[StereoVLAForActionPrediction, StereoProcessor]:
    """The model to start from and its processor, with the statistics of the dataset beside its own; without its own
    where the dataset's robot has other sizes, as the model's heads are then new.
    """
    model = StereoVLAForActionPrediction.from_pretrained(source, dtype=torch.float32)
    processor = StereoProcessor.from_pretrained(source)
    sizes = {name: meta[name] for name in ("state_dim", "action_dim")}
    same = all(getattr(model.config, name) == size for name, size in sizes.items())
    stats, rates = (processor.norm_stats, processor.control_rates_hz) if same else ({}, {})
    processor = StereoProcessor.from_pretrained(
        source,
        norm_stats={**(stats or {}), **meta["stats"]},
        control_rates_hz={**(rates or {}), **{name: meta["fps"] for name in meta["stats"]}},
        **sizes,
    )
    return model.resize_heads(**sizes), processor
