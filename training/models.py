"""Models to train, and their processors: of a preset's size, or one that was trained before."""

import math

import torch

from modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
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
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        num_visual_tokens=config.num_visual_tokens,
        num_bins=config.num_bins,
    )
    config = StereoVLAConfig.from_preset(
        preset,
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
    """The model to start from and its processor, with the statistics of the dataset beside its own."""
    model = StereoVLAForActionPrediction.from_pretrained(source, dtype=torch.float32)
    processor = StereoProcessor.from_pretrained(source)
    rates = {name: meta["fps"] for name in meta["stats"]}
    processor = StereoProcessor.from_pretrained(
        source,
        norm_stats={**(processor.norm_stats or {}), **meta["stats"]},
        control_rates_hz={**(processor.control_rates_hz or {}), **rates},
    )
    return model, processor
