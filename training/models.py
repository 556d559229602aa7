"""Models to train, and their processors: of a preset's size, or one that was trained before."""

import json
import math
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    DepthAnythingForDepthEstimation,
    PaliGemmaForConditionalGeneration,
    PI0ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from stereovla.modeling_stereovla import (
    DepthExpertModel,
    DepthVLAConfig,
    DepthVLAForActionPrediction,
    PI0Policy,
    PI0PolicyConfig,
    StereoEncoderModel,
    StereoVLAConfig,
    StereoVLAForActionPrediction,
)
from stereovla.modeling_stereovla.configuration_depthvla import PRESETS as DEPTHVLA_PRESETS
from stereovla.modeling_stereovla.configuration_pi0 import PRESETS as PI0_PRESETS
from stereovla.modeling_stereovla.configuration_policy import with_overrides
from stereovla.modeling_stereovla.robot_heads import sizes_of_robot
from stereovla.processing import DepthVLAProcessor, StereoImageProcessorPil, StereoProcessor, build_tokenizer
from stereovla.processing.text_tokenizer import HUNDREDTHS
from stereovla.sources import adapted_model, source_of

# what configs hold beside what the weights compute: what saving adds, and how they are used and were trained
UNCOMPARED = {
    *PreTrainedConfig.__dataclass_fields__,
    *("auto_map", "_name_or_path", "initializer_range", "use_cache", "max_position_embeddings", "use_mask_token"),
    *("output_attentions", "drop_path_rate", "layerscale_value", "image_token_index", "num_image_tokens"),
    # what the shapes of the weights say, and the masks that our models make themselves
    *("vocab_size", "tie_word_embeddings", "use_bidirectional_attention"),
    # of a backbone: which of its maps it returns, and how
    *("out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "apply_layernorm"),
    "reshape_hidden_states",
    # of a stereo encoder: which of what it computes it gives
    "features",
}

Policy = StereoVLAForActionPrediction | DepthVLAForActionPrediction | PI0Policy
Processor = StereoProcessor | DepthVLAProcessor
POLICIES = {
    StereoVLAConfig.model_type: (StereoVLAForActionPrediction, StereoProcessor),
    DepthVLAConfig.model_type: (DepthVLAForActionPrediction, DepthVLAProcessor),
    PI0PolicyConfig.model_type: (PI0Policy, DepthVLAProcessor),
}


def classes_of(source: str) -> tuple[type[Policy], type[Processor]]:
    """Of the policy, or of the one that an adapter changes, in a folder or on the Hub; ValueError where it is none."""
    source = adapted_model(source) or source
    kind = kind_of(source, "model")
    if kind not in POLICIES:
        raise ValueError(f"{source} is a {kind!r}; expected a policy, one of {', '.join(POLICIES)}")
    return POLICIES[kind]


def load_policy(source: str) -> Policy:
    """The policy in a folder or on the Hub, in float32."""
    return classes_of(source)[0].from_pretrained(source, dtype=torch.float32)


def load_processor(source: str, **options: Any) -> Processor:
    """The processor of a policy or an adapter, with options replaced."""
    return classes_of(source)[1].from_pretrained(source, **options)


def config_of(preset: str, **overrides: Any) -> StereoVLAConfig | DepthVLAConfig:
    """The configuration of a preset of any policy, with overrides."""
    kinds = {**dict.fromkeys(DEPTHVLA_PRESETS, DepthVLAConfig), **dict.fromkeys(PI0_PRESETS, PI0PolicyConfig)}
    return kinds.get(preset, StereoVLAConfig).from_preset(preset, **overrides)


def towers_of(model: Policy) -> list[str]:
    """The `towers` that the model has, as `freeze` names them."""
    modules = dict(model.named_modules())
    return [name for name in model.towers if model.parts[name] in modules]


def untrained(preset: str, meta: dict, **overrides: Any) -> tuple[Policy, Processor]:
    """An untrained model of the preset's size and its processor, with the words and statistics of the dataset."""
    config = config_of(preset, **overrides)
    policy_class, processor_class = POLICIES[config.model_type]
    of_views = {}
    if processor_class is DepthVLAProcessor:
        of_views = {"views": list(config.views), "stereo": config.stereo_config is not None}
    else:
        of_views = {"points_frame": config.points_frame}
    tokenizer = build_tokenizer(
        meta["tasks"], num_bins=config.num_bins, images_first=processor_class.images_first, image_size=config.image_size
    )
    processor = processor_class(
        StereoImageProcessorPil(size={"height": config.image_size, "width": config.image_size}),
        tokenizer,
        norm_stats=meta["stats"],
        control_rates_hz={name: meta["fps"] for name in meta["stats"]},
        chunk_size=config.chunk_size,
        state_history=config.state_history,
        state_dim=meta["state_dim"],
        action_dim=meta["action_dim"],
        state_names=meta.get("state_names"),
        turn_symmetry=config.turn_symmetry,
        num_visual_tokens=config.num_image_tokens,
        num_bins=config.num_bins,
        **of_views,
    )
    image_token_id, vocab_size = tokenizer.convert_tokens_to_ids(processor.image_token), len(tokenizer)
    text_config = {
        "vocab_size": math.ceil(vocab_size / 64) * 64,  # a multiple of 64 multiplies faster
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    words = {"text_config": text_config}
    if processor_class is DepthVLAProcessor:
        of_vlm = {"vocab_size": text_config["vocab_size"], "image_token_index": image_token_id}
        words = {"vlm_config": {**words, **of_vlm}}
    overrides |= sizes_of_robot(meta["state_dim"], meta["action_dim"], processor.num_turns)
    overrides |= {"image_token_id": image_token_id, "action_vocab_size": vocab_size}
    if policy_class is StereoVLAForActionPrediction:
        overrides.setdefault("num_hundredths", len(HUNDREDTHS))
    model = policy_class(config_of(preset, **with_overrides(overrides, words)))
    if getattr(config, "place_code", False):
        pixels = tokenizer.convert_tokens_to_ids([str(number) for number in range(config.image_size)])
        model.write_pixels({word: number for number, word in enumerate(pixels)})
    return model, processor


def trained(source: str, meta: dict) -> tuple[Policy, Processor]:
    """The model to start from and its processor, with the statistics of the dataset beside its own; without its own
    where the dataset's robot has other sizes, as the model's heads are then new.
    """
    if adapted_model(source) is not None:
        raise ValueError(
            f"{source} is an adapter: `stereovla train --lora_rank` goes on with it; to train all weights, or in "
            "another stage, merge it into its base first (PeftModel.merge_and_unload) and save the result"
        )
    model = load_policy(source)
    sizes = {name: meta[name] for name in ("state_dim", "action_dim")}
    same = all(getattr(model.config, name) == size for name, size in sizes.items())
    processor = with_statistics(source, load_processor(source), meta, keep=same)
    return model.resize_heads(**sizes, num_turns=processor.num_turns), processor


def with_statistics(source: str, processor: Processor, meta: dict, keep: bool = True) -> Processor:
    """The processor in `source` with the statistics of a dataset, beside its own if these are kept."""
    fields = ("norm_stats", "control_rates_hz", "state_names")
    stats, rates, names = (getattr(processor, field) or {} if keep else {} for field in fields)
    return load_processor(
        source,
        norm_stats={**stats, **meta["stats"]},
        control_rates_hz={**rates, **{name: meta["fps"] for name in meta["stats"]}},
        state_names={**names, **meta.get("state_names", {})},
        state_dim=meta["state_dim"],
        pose_dim=meta["state_dim"],
        action_dim=meta["action_dim"],
    )


def trained_stereo_encoder(source: str, **fields: Any) -> StereoEncoderModel:
    """The stereo encoder in a folder or on the Hub, in float32, with single fields of its config replaced."""
    return trained_part(source, StereoEncoderModel, "stereo encoder", **fields)


def trained_depth_expert(source: str) -> DepthExpertModel:
    """The depth expert in a folder or on the Hub, in float32."""
    return trained_part(source, DepthExpertModel, "depth expert")


def trained_part(source: str, part: type[PreTrainedModel], what: str, **fields: Any) -> Any:
    """The model of class `part` in a folder or on the Hub; ValueError where there is none or where weights are not
    what they should be.
    """
    kind = kind_of(source, what)
    if kind != part.config_class.model_type:
        raise ValueError(f"{source} is a {kind!r}; expected a {part.config_class.model_type!r}, a {part.__name__}")
    return whole(source, part, what, dtype=torch.float32, **fields)


def kind_of(source: str, what: str) -> str | None:
    """The type of the model in a folder or on the Hub."""
    with source_of(source, what):
        return PreTrainedConfig.get_config_dict(source)[0].get("model_type")


def whole(source: str, kind: Any, what: str, **options: Any) -> Any:
    """`kind.from_pretrained(source)`; ValueError names weights that are missing or superfluous."""
    model, report = kind.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{source} lacks {len(missing)} weights of a {what}: {shortened(missing)}")
    if unknown := sorted(report["unexpected_keys"]):
        raise ValueError(f"{source} has {len(unknown)} weights that a {what} has not: {shortened(unknown)}")
    return model


def shortened(names: list[str]) -> str:
    """The first five."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The parts that a model names as one each (`_no_split_modules`): its transformers' blocks."""
    return [module for module in model.modules() if type(module).__name__ in model._no_split_modules]


def give_stereo_encoder(model: Policy, source: str) -> None:
    """Loads the weights of the stereo encoder in `source` into the policy's; ValueError names the fields of their
    configs that differ.
    """
    encoder, policy = trained_stereo_encoder(source), dict(model.named_modules()).get(model.parts.get("stereo"))
    if policy is None:
        raise ValueError(f"{source} has nowhere to go: this model has no stereo encoder (stereo_config is None)")
    if policy.classifier is None:  # a depth expert asks for no disparity
        encoder.classifier = None
    give_weights(policy, encoder, f"the stereo encoders of the model and of {source}")


def give_depth_expert(model: Policy, source: str) -> None:
    """Loads the weights of the depth expert in `source`, such as `stereovla pretrain depth` writes, into the policy's,
    which notes it in its config; ValueError names the fields of their configs that differ.
    """
    expert, policy = trained_depth_expert(source), dict(model.named_modules()).get(model.parts.get("depth_expert"))
    if policy is None:
        raise ValueError(f"{source} has nowhere to go: this model has no depth expert (depth_config is None)")
    give_weights(policy, expert, f"the depth experts of the model and of {source}")
    model.config.depth_expert_source = source


def give_encoder(model: DepthExpertModel, source: str) -> None:
    """Loads the weights of an encoder into the depth expert's: those of a Depth Anything checkpoint's backbone or of a
    plain vision model, or of a stereo encoder; ValueError names the fields of their configs that differ.
    """
    what = f"the encoders of the model and of {source}"
    if model.stereo is not None:
        stereo = trained_stereo_encoder(source)
        if model.stereo.classifier is None:  # of disparities, which the depth expert does not ask for
            stereo.classifier = None
        return give_weights(model.stereo, stereo, what)
    kind, tower = kind_of(source, "encoder"), model.encoder.tower
    if kind == "depth_anything":
        found = whole(source, DepthAnythingForDepthEstimation, "Depth Anything model", dtype=torch.float32).backbone
    elif kind == tower.config.model_type:
        found = whole(source, AutoModel, f"{kind!r} encoder", dtype=torch.float32)
    else:
        raise ValueError(
            f"{source} is a {kind!r}; expected a {tower.config.model_type!r}, or a 'depth_anything' with one"
        )
    if found.config.model_type != tower.config.model_type:
        raise ValueError(f"{what} differ: a {tower.config.model_type!r}, a {found.config.model_type!r}")
    give_weights(tower, found, what)


def give_vlm(model: Policy, source: str) -> None:
    """Loads the vision-language model in `source`, a PaliGemma, a DepthVLA or a PI0 of transformers, into the policy's;
    ValueError names the fields of their configs that differ.
    """
    if not isinstance(model, DepthVLAForActionPrediction):
        raise ValueError(f"{source} has nowhere to go: this model is a {model.config.model_type!r}, not a 'depthvla'")
    kind = kind_of(source, "vision-language model")
    holders = {
        "paligemma": (PaliGemmaForConditionalGeneration, "model"),
        "depthvla": (DepthVLAForActionPrediction, "model.vlm"),
        "pi0": (PI0ForConditionalGeneration, "model.vlm"),
    }
    if kind not in holders:
        raise ValueError(f"{source} is a {kind!r}; expected one of {', '.join(holders)}")
    holder, path = holders[kind]
    found = whole(source, holder, f"{kind!r} model", dtype=model.dtype)
    give_weights(model.model.vlm, found.get_submodule(path), f"the vision-language models of the model and of {source}")
    if not model.config.tie_word_embeddings:
        if found.get_output_embeddings() is None:
            raise ValueError(f"{source} has no output layer of its own, which this model has beside the embedding")
        model.lm_head.load_state_dict(found.get_output_embeddings().state_dict())


def give_weights(mine: PreTrainedModel, other: PreTrainedModel, what: str) -> None:
    """Loads all weights of `other` into `mine`; ValueError, which begins with `what`, names the fields of their configs
    that differ, or the weights.
    """
    check_alike(mine.config, other.config, what)
    own, given = mine.state_dict(), other.state_dict()
    differing = sorted(own.keys() ^ given.keys())
    differing += sorted(name for name in own.keys() & given.keys() if own[name].shape != given[name].shape)
    if differing:
        raise ValueError(f"{what} differ in {len(differing)} weights: {shortened(differing)}")
    mine.load_state_dict(given)


def check_alike(mine: PreTrainedConfig, other: PreTrainedConfig, what: str) -> None:
    """ValueError, which begins with `what`, names the fields in which two configs of one class differ."""
    wanted, given = own_fields(mine), own_fields(other)
    names = [name for name in sorted(wanted.keys() | given.keys()) if wanted.get(name) != given.get(name)]
    if names:
        raise ValueError(
            f"{what} differ in {', '.join(f'{name} ({wanted.get(name)}, {given.get(name)})' for name in names)}"
        )


def own_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a config that say what its weights compute, those of a part as "part.field", as in JSON."""

    def fields(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            if name in UNCOMPARED or name.endswith(("_token_id", "_dropout", "dropout_prob")):
                continue
            found |= fields(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return fields(json.loads(config.to_json_string(use_diff=False)), "")
