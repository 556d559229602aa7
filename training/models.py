"""Models to train, and their processors: of a preset's size, or one that was trained before."""

import json
import math
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from stereovla.modeling_stereovla import (
    StereoEncoderConfig,
    StereoEncoderModel,
    StereoVLAConfig,
    StereoVLAForActionPrediction,
)
from stereovla.modeling_stereovla.robot_heads import sizes_of_robot
from stereovla.processing import StereoImageProcessorPil, StereoProcessor, build_tokenizer
from stereovla.sources import adapted_model, source_of

ADDED = ("architectures", "dtype", "transformers_version", "_name_or_path")  # to the configs within a config


TOWERS = ("semantic", "spatial", "stereo")  # encoders that come trained, but for those of the small presets


def towers_of(model: StereoVLAForActionPrediction) -> list[str]:
    """Those of `TOWERS` that the model has, as `freeze` names them."""
    return [name for name in TOWERS if getattr(model.model.visual_tokens, name) is not None]


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
        state_names=meta.get("state_names"),
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
    if is_adapter(source):
        raise ValueError(
            f"{source} is an adapter: `stereovla train --lora_rank` goes on with it; to train all weights, or in "
            "another stage, merge it into its base first (PeftModel.merge_and_unload) and save the result"
        )
    with source_of(source, "model"):
        model = StereoVLAForActionPrediction.from_pretrained(source, dtype=torch.float32)
    sizes = {name: meta[name] for name in ("state_dim", "action_dim")}
    same = all(getattr(model.config, name) == size for name, size in sizes.items())
    processor = with_statistics(StereoProcessor.from_pretrained(source), meta, keep=same)
    return model.resize_heads(**sizes), processor


def trained_adapter(source: str, meta: dict, rank: int) -> tuple[PeftModel, StereoProcessor]:
    """The adapter in a folder or on the Hub on its base, to be trained on, and its processor with the statistics of the
    dataset beside its own; ValueError where its rank is another, or its robot has other sizes than the dataset's.
    """
    config = PeftConfig.from_pretrained(source)
    if config.r != rank:
        raise ValueError(
            f"{source} is an adapter of rank {config.r}, and --lora_rank is {rank}; {config.r} goes on with it"
        )
    processor = StereoProcessor.from_pretrained(source)
    for name in ("state_dim", "action_dim"):
        if getattr(processor, name) != meta[name]:
            raise ValueError(
                f"the adapter {source} is for a robot with {name} {getattr(processor, name)}, the dataset's has "
                f"{meta[name]}; begin a new adapter with --model {config.base_model_name_or_path}"
            )
    base = StereoVLAForActionPrediction.from_pretrained(config.base_model_name_or_path, dtype=torch.float32)
    base.resize_heads(processor.state_dim, processor.action_dim)
    model = PeftModel.from_pretrained(base, source, is_trainable=True)
    return model, with_statistics(processor, meta)


def is_adapter(source: str) -> bool:
    """Whether a folder or Hub id is that of an adapter."""
    return adapted_model(source) is not None


def with_statistics(processor: StereoProcessor, meta: dict, keep: bool = True) -> StereoProcessor:
    """The processor with the statistics of a dataset, beside its own if these are kept."""
    fields = ("norm_stats", "control_rates_hz", "state_names")
    stats, rates, names = (getattr(processor, field) or {} if keep else {} for field in fields)
    # not as keywords of from_pretrained, which the tokenizer would save among its own
    processor.norm_stats = {**stats, **meta["stats"]}
    processor.control_rates_hz = {**rates, **{name: meta["fps"] for name in meta["stats"]}}
    processor.state_names = {**names, **meta.get("state_names", {})}
    processor.state_dim = processor.pose_dim = meta["state_dim"]
    processor.action_dim = meta["action_dim"]
    return processor


def trained_stereo_encoder(source: str, **fields: Any) -> StereoEncoderModel:
    """The stereo encoder in a folder or on the Hub, in float32, with single fields of its config replaced; ValueError
    where there is none or where it lacks weights.
    """
    with source_of(source, "stereo encoder"):
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind != StereoEncoderConfig.model_type:
        raise ValueError(f"{source} is a {kind!r}; expected a {StereoEncoderConfig.model_type!r}, a StereoEncoderModel")
    model, report = StereoEncoderModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True, **fields)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} weights of a stereo encoder: {', '.join(missing[:5])}, ...")
    return model


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The parts that a model names as one each (`_no_split_modules`): its transformers' blocks."""
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def give_stereo_encoder(model: StereoVLAForActionPrediction, source: str) -> None:
    """Loads the weights of the stereo encoder in `source` into the policy's; ValueError names the fields of their
    configs that differ.
    """
    encoder, policy = trained_stereo_encoder(source), model.model.visual_tokens.stereo
    if policy is None:
        raise ValueError(f"{source} has nowhere to go: this model has no stereo encoder (stereo_config is None)")
    wanted, given = (own_fields(part.config) for part in (policy, encoder))
    if differing := [f"{name} ({wanted[name]}, {given[name]})" for name in wanted if wanted[name] != given[name]]:
        raise ValueError(f"the stereo encoders of the model and of {source} differ in {', '.join(differing)}")
    policy.load_state_dict(encoder.state_dict())


def own_fields(config: StereoEncoderConfig) -> dict[str, Any]:
    """The fields of the config as in JSON, without what saving and loading a folder adds."""

    def plain(value: Any) -> Any:
        return {k: plain(v) for k, v in value.items() if k not in ADDED} if isinstance(value, dict) else value

    names = StereoEncoderConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: plain(fields[name]) for name in sorted(names)}
