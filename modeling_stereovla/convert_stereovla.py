r"""The released StereoVLA checkpoint -> a folder that `AutoModel.from_pretrained` loads.

    hf download --local-dir storage shengliangd/StereoVLA
    stereovla convert stereovla --checkpoint storage/stereovla/checkpoint/model.safetensors \
        --internlm2_config internlm2-1_8b/config.json --out StereoVLA

The release (https://github.com/shengliangd/StereoVLA) is a safetensors file, and in the folder above it a config.json
and a pickled preprocessor with the statistics. Its weights are for non-commercial use, those of the stereo encoder for
research; whoever converts them keeps to that. Every key must be known and every parameter of ours be filled, or nothing
is written and all of them are listed. Sizes are read from the shapes of the weights and from the two config files.

The folder also holds processor_arguments.json: what StereoProcessor must be told and config.json does not say, such as
the statistics. processing.convert_processor makes the processor of it.
"""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from .configuration_policy import overridden
from .configuration_stereo_encoder import StereoEncoderConfig
from .configuration_stereovla import StereoVLAConfig
from .convert_files import Convert, Part, WeightSource, below, open_weights
from .convert_foundationstereo import convert_key as convert_stereo_key
from .convert_foundationstereo import open_stereo, release_of
from .convert_internlm2 import convert_key as convert_internlm2_key
from .convert_internlm2 import llama_fields
from .convert_output import Output, outline_model, read_overrides, write_model
from .convert_preprocessor import INERT, read_statistics
from .convert_vision_towers import tower_fields, tower_part
from .modeling_stereovla import StereoVLAForActionPrediction

SIGLIP, DINOV2 = "backbone_2d.siglip.model.", "backbone_2d.dino.model."
STEREO = "backbone_2d.stereo.model."
TOWER = "model.visual_tokens."
EXPERT_UNUSED = ("model.tok_embeddings.weight", "output.weight")  # its inputs are embeddings, its output a velocity
FLOW = {
    "proprior_proj": "state_proj",
    "action_in_proj": "action_in_proj",
    "action_time_mlp.0": "action_time_mlp_in",
    "action_time_mlp.2": "action_time_mlp_out",
    "action_out_proj": "action_out_proj",
}


def convert_language_key(key: str, tensor: torch.Tensor, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Our keys for one of InternLM2's; KeyError if it is not InternLM2's."""
    llama = convert_internlm2_key(key, tensor, num_heads, num_kv_heads)
    return {name.replace("model.", "model.language_model.", 1): value for name, value in llama.items()}


def convert_expert_key(key: str, tensor: torch.Tensor, num_heads: int, num_kv_heads: int) -> dict[str, torch.Tensor]:
    """Our keys for one of the action expert's, an InternLM2 of other widths; KeyError if it is not one."""
    if key in EXPERT_UNUSED:
        return {}
    llama = convert_internlm2_key(key, tensor, num_heads, num_kv_heads)
    return {name.replace("model.", "action_expert.transformer.", 1): value for name, value in llama.items()}


def convert_flow_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our keys for one of the projections around the expert; KeyError if it is not one."""
    name, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias"):
        raise KeyError(key)
    return {f"action_expert.{FLOW[name]}.{leaf}": tensor}


def convert_projector_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our keys for one of the projector's; the check against the model finds other layers."""
    return {f"{TOWER}projector.layers.{key}": tensor}


def released_rules(source: WeightSource, num_heads: int, num_kv_heads: int) -> Convert:
    """The rule for all keys of the released checkpoint; the towers' depths are taken from `source`."""
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    rules = {
        SIGLIP: below(tower_part(source.below(SIGLIP)).convert, f"{TOWER}semantic.tower."),
        DINOV2: below(tower_part(source.below(DINOV2)).convert, f"{TOWER}spatial.tower."),
        STEREO: below(convert_stereo_key, f"{TOWER}stereo."),
        "projector.projector.": convert_projector_key,
        "llm.llm.": partial(convert_language_key, **heads),
        "action_expert.": partial(convert_expert_key, **heads),
        "flow_module.": convert_flow_key,
    }

    def convert_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        for prefix, rule in rules.items():
            if key.startswith(prefix):
                return rule(key.removeprefix(prefix), tensor)
        raise KeyError(key)

    return convert_key


def shape_of(source: WeightSource, key: str) -> tuple[int, ...]:
    """Shape of a tensor of the checkpoint; ValueError if it is missing."""
    if key not in source.outlines:
        raise ValueError(f"{source.name} is no released StereoVLA checkpoint: it lacks {key}")
    return tuple(source.outlines[key].shape)


def check_release(release: dict) -> None:
    """Raise ValueError unless the release's config.json describes the model that ours is."""
    model, expected = release["model"], {}
    specific = model["model_specific"]
    expected["model.model_specific.pred"] = (specific["pred"], "cotrain_flow_matching")
    expected["model.model_specific.backbone_2d.name"] = (specific["backbone_2d"]["name"], "dinosiglip_stereo_vcp")
    expected["model.image_keys"] = (model["image_keys"], ["left", "right"])
    expected["model.image_steps"] = (model["image_steps"], 1)
    wrong = [f"{name} is {value!r}, not {known!r}" for name, (value, known) in expected.items() if value != known]
    if wrong:
        raise ValueError(f"the release's config describes another model: {'; '.join(wrong)}")


def released_config(
    source: WeightSource,
    release: dict,
    internlm2: dict,
    stereo: StereoEncoderConfig | None = None,
    semantic_heads: int = 16,
    spatial_heads: int = 16,
    overrides: dict | None = None,
) -> StereoVLAConfig:
    """Our config of the released model.

    Args:
        source: the released weights; only their shapes are read.
        release: the release's config.json.
        internlm2: config.json of the language model that the release began with.
        stereo: config of the stereo encoder; None takes FoundationStereo's that fits the weights.
        semantic_heads, spatial_heads: attention heads of SigLIP and DINOv2, which no shape tells.
        overrides: fields to replace; a dict replaces single fields of a part.
    """
    check_release(release)
    model, specific = release["model"], release["model"]["model_specific"]
    semantic = tower_fields(source.below(SIGLIP).outlines, semantic_heads)
    spatial = tower_fields(source.below(DINOV2).outlines, spatial_heads)
    projector_hidden, fused = shape_of(source, "projector.projector.0.weight")
    if stereo is None:
        stereo = StereoEncoderConfig.foundationstereo(release_of(source.below(STEREO).outlines))
        # the volume has as many disparities as the projector has room for; the weights themselves do not depend on it
        channels = fused - semantic["hidden_size"] - spatial["hidden_size"]
        fields = stereo.to_dict() | {"max_disparity": 4 * channels // stereo.volume_channels}
    else:
        fields = stereo.to_dict()
    rows, _ = shape_of(source, "llm.llm.model.tok_embeddings.weight")
    vocabulary = internlm2["vocab_size"]
    pad = vocabulary + len(specific["llm"].get("special_tokens", []))  # appended to the tokenizer after these
    expert_hidden, action_dim = shape_of(source, "flow_module.action_in_proj.weight")
    flow = {name: float(specific["flow_matching_cfg"][name]) for name in ("time_min", "time_max")}
    values = {
        "text_config": {**llama_fields(internlm2), "vocab_size": rows, "pad_token_id": pad},
        "semantic_config": semantic,
        "spatial_config": spatial,
        "stereo_config": fields,
        "image_size": model["image_size"],
        "patch_size": semantic["patch_size"],
        "projector_hidden_size": projector_hidden,
        "expert_hidden_size": expert_hidden,
        "expert_intermediate_size": shape_of(source, "action_expert.model.layers.0.feed_forward.w1.weight")[0],
        "state_dim": shape_of(source, "flow_module.proprior_proj.weight")[1],
        "state_history": model["proprio_steps"],
        "action_dim": action_dim,
        "chunk_size": model["action_steps"],
        "pose_dim": model["max_goal_dim"],
        "num_bins": specific["action_token_num"],
        "action_vocab_size": vocabulary,
        "image_token_id": pad + 1,
        **flow,
        "time_alpha": float(specific["flow_matching_cfg"]["beta_alpha"]),
        "time_beta": float(specific["flow_matching_cfg"]["beta_beta"]),
        # the release casts its time to the model's dtype, and was trained so
        "time_embedding_dtype": "model",
    }
    return overridden(StereoVLAConfig, values, overrides or {})


def processor_arguments(config: StereoVLAConfig, release: dict, statistics: dict, ratio: float) -> dict:
    """Arguments of StereoProcessor that the release knows and the converted model's config does not hold.

    Args:
        statistics, ratio: of `read_statistics`.

    Raises:
        ValueError: the statistics have other dimensions than the model.
    """
    sizes = {"state": config.state_dim, "action": config.action_dim, "keyframe_pose": config.pose_dim}
    # where 1 % of the data lies beyond each end, these are the percentiles that the processor calls q01 and q99
    names = {"min": "q01", "max": "q99"} if ratio == 0.01 else {"min": "min", "max": "max"}
    for embodiment, quantities in statistics.items():
        for quantity, size in sizes.items():
            found = len(quantities[quantity]["min"])
            if found != size:
                raise ValueError(f"{embodiment} has statistics of {found} {quantity} dimensions, the model has {size}")
    return {
        "norm_stats": {
            embodiment: {
                quantity: {names[end]: values for end, values in ends.items()} for quantity, ends in quantities.items()
            }
            for embodiment, quantities in statistics.items()
        },
        "normalization": "quantiles" if ratio == 0.01 else "min_max",
        "control_rates_hz": dict.fromkeys(statistics, 1 / release["model"]["dt"]),
        "max_length": release["model"]["model_specific"]["llm"]["max_len"],
    }


@dataclass(kw_only=True)
class Options(Output):
    r"""The released StereoVLA checkpoint -> a folder that `AutoModel.from_pretrained` loads.

    hf download --local-dir storage shengliangd/StereoVLA
    stereovla convert stereovla --checkpoint storage/stereovla/checkpoint/model.safetensors --out StereoVLA \
        --internlm2_config internlm2-1_8b/config.json

    The weights are for non-commercial use, those of the stereo encoder for research; whoever converts them keeps to
    that. Every key must be known and every parameter of ours be filled, or nothing is written and all are listed.
    """

    checkpoint: str = field(metadata={"help": "The release's model.safetensors."})
    internlm2_config: str = field(
        metadata={"help": "config.json of internlm/internlm2-1_8b: heads, rotary embedding and norms are read from it."}
    )
    config: str | None = field(
        default=None, metadata={"help": "The release's config.json; in the folder above the checkpoint's if not given."}
    )
    preprocessor: str | None = field(
        default=None,
        metadata={
            "help": "The release's preprocessor.npz, a pickle; in the folder above the checkpoint's if not given."
        },
    )
    inert: list[str] = field(
        default_factory=list,
        metadata={"help": "Further classes in that pickle, module.name, to read as records that do nothing."},
    )
    stereo: str | None = field(
        default=None,
        metadata={
            "help": "FoundationStereo's weights, or a folder of a converted stereo encoder, to take in place of the "
            "checkpoint's stereo encoder."
        },
    )
    semantic_heads: int = field(default=16, metadata={"help": "Attention heads of SigLIP."})
    spatial_heads: int = field(default=16, metadata={"help": "Attention heads of DINOv2."})
    overrides: str | None = field(
        default=None,
        metadata={
            "help": 'Fields of the config to replace, as JSON: {"stereo_config": {"attention_layout": "heads"}}.'
        },
    )


def convert(options: Options) -> Path:
    """The folder of the converted model.

    Raises:
        ValueError: a key is unknown or missing or has another shape (each is listed), the pickle names something that
            is not allowed, or the config describes another model.
    """
    above = Path(options.checkpoint).parent.parent
    release = json.loads(Path(options.config or above / "config.json").read_text())
    statistics, ratio = read_statistics(options.preprocessor or above / "preprocessor.npz", INERT | {*options.inert})
    source = open_weights(options.checkpoint)
    stereo, parts = None, []
    if options.stereo is not None:
        stereo, part = open_stereo(options.stereo)
        parts.append(Part(part.source, below(part.convert, f"{TOWER}stereo.")))
        source = source.without(STEREO)
    config = released_config(
        source,
        release,
        json.loads(Path(options.internlm2_config).read_text()),
        stereo,
        options.semantic_heads,
        options.spatial_heads,
        read_overrides(options.overrides),
    )
    text = config.text_config
    rules = released_rules(source, text.num_attention_heads, text.num_key_value_heads)
    return write_model(
        options,
        outline_model(StereoVLAForActionPrediction, config),
        [Part(source, rules), *parts],
        "released StereoVLA checkpoint of this config",
        {"processor_arguments.json": processor_arguments(config, release, statistics, ratio)},
    )
