"""FoundationStereo's released weights -> a StereoEncoderModel folder.

    stereovla convert foundationstereo --checkpoint model_best_bp2.pth --out stereo_encoder

The weights are NVIDIA's, for research only and non-commercial; whoever converts them downloads them and keeps to that.
Every published key must be known and have the expected shape, and every parameter of ours must be filled.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .configuration_stereo_encoder import StereoEncoderConfig
from .convert_files import Part, open_weights
from .convert_output import Output, outline_model, read_overrides, write_model
from .stereo_encoder import StereoEncoderModel

# Parts of the published network that the filtered volume and the initial disparity do not depend on: the refinement,
# and the last layers of Depth Anything's depth head.
UNUSED = re.compile(
    r"(cnet|update_block|sam|cam|context_zqr_convs|stem_2|stem_4|spx_2_gru|spx_gru)\."
    r"|feature\.dino\.depth_anything\.(pretrained\.mask_token$|depth_head\.scratch\.output_conv2\.)"
)

# (pattern of a published key, our key); the first match wins. {0}, {1}, ... are its groups.
DINO = "feature\\.dino\\.depth_anything\\.pretrained\\."
DPT = "feature\\.dino\\.depth_anything\\.depth_head\\."
RULES = [
    # ViT
    (DINO + r"cls_token", "prior.backbone.embeddings.cls_token"),
    (DINO + r"pos_embed", "prior.backbone.embeddings.position_embeddings"),
    (DINO + r"patch_embed\.proj\.(.+)", "prior.backbone.embeddings.patch_embeddings.projection.{0}"),
    (DINO + r"blocks\.(\d+)\.attn\.proj\.(.+)", "prior.backbone.encoder.layer.{0}.attention.o_proj.{1}"),
    (DINO + r"blocks\.(\d+)\.ls(\d)\.gamma", "prior.backbone.encoder.layer.{0}.layer_scale{1}.lambda1"),
    (DINO + r"blocks\.(\d+)\.(norm\d|mlp\.fc\d)\.(.+)", "prior.backbone.encoder.layer.{0}.{1}.{2}"),
    (DINO + r"norm\.(.+)", "prior.backbone.layernorm.{0}"),
    (DPT + r"projects\.(\d)\.(.+)", "prior.neck.reassemble_stage.layers.{0}.projection.{1}"),
    (DPT + r"resize_layers\.(\d)\.(.+)", "prior.neck.reassemble_stage.layers.{0}.resize.{1}"),
    (DPT + r"scratch\.output_conv1\.(.+)", "prior.head.{0}"),
    # EdgeNeXt
    (r"feature\.stem\.(\d)\.(.+)", "backbone.stem.{0}.{1}"),
    (r"feature\.stages\.(\d)\.downsample\.(\d)\.(.+)", "backbone.stages.{0}.downsample.{1}.{2}"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.gamma", "backbone.stages.{0}.mlp.layer_scale.scale"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.gamma_xca", "backbone.stages.{0}.attention_scale.scale"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.conv_dw\.(.+)", "backbone.stages.{0}.depthwise.{1}"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.convs\.(.+)", "backbone.stages.{0}.convolutions.{1}"),
    (
        r"feature\.stages\.(\d\.blocks\.\d+)\.pos_embd\.token_projection\.(.+)",
        "backbone.stages.{0}.position.projection.{1}",
    ),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.norm_xca\.(.+)", "backbone.stages.{0}.attention_norm.{1}"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.xca\.proj\.(.+)", "backbone.stages.{0}.attention.out.{1}"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.xca\.(.+)", "backbone.stages.{0}.attention.{1}"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.norm\.(.+)", "backbone.stages.{0}.mlp.norm.{1}"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.mlp\.fc1\.(.+)", "backbone.stages.{0}.mlp.expand.{1}"),
    (r"feature\.stages\.(\d\.blocks\.\d+)\.mlp\.fc2\.(.+)", "backbone.stages.{0}.mlp.contract.{1}"),
    # decoder
    (r"feature\.deconv32_16\.conv1\.conv\.weight", "backbone.upsampling.0.upsample.weight"),
    (r"feature\.deconv16_8\.conv1\.conv\.weight", "backbone.upsampling.1.upsample.weight"),
    (r"feature\.deconv8_4\.conv1\.conv\.weight", "backbone.upsampling.2.upsample.weight"),
    (r"feature\.deconv32_16\.conv2\.(.+)", "backbone.upsampling.0.mix.{0}"),
    (r"feature\.deconv16_8\.conv2\.(.+)", "backbone.upsampling.1.mix.{0}"),
    (r"feature\.deconv8_4\.conv2\.(.+)", "backbone.upsampling.2.mix.{0}"),
    (r"feature\.conv4\.0\.conv\.weight", "backbone.fuse.weight"),
    (r"feature\.conv4\.1\.(.+)", "backbone.refine.0.{0}"),
    (r"feature\.conv4\.2\.(.+)", "backbone.refine.1.{0}"),
    (r"proj_cmb\.(.+)", "match_projection.{0}"),
]


def volume_rules() -> list[tuple[str, str]]:
    """Rules of the filter and the classifier, whose building blocks repeat."""
    cost, ours = r"cost_agg\.", "filter.hourglass."
    convolutions = {
        r"corr_stem\.1": "filter.stem",
        cost + "conv1_up": ours + "restore",
        cost + "conv2_up": ours + "up.1.upsample",
        cost + "conv3_up": ours + "up.0.upsample",
        cost + r"agg_0\.0": ours + "up.0.join",
        cost + r"agg_1\.0": ours + "up.1.join",
        r"classifier\.0": "classifier.reduce",
        **{rf"{cost}conv{level}\.0": f"{ours}down.{level - 1}.reduce" for level in (1, 2, 3)},
    }
    residuals = {
        r"corr_stem\.2": "filter.blocks.0",
        r"corr_stem\.3": "filter.blocks.1",
        r"classifier\.1": "classifier.blocks.0",
    }
    axial = {rf"{cost}conv{level}\.1": f"{ours}down.{level - 1}.mix" for level in (1, 2, 3)}
    for block in (0, 1):
        axial[rf"{cost}conv_out\.{block}"] = f"{ours}output.{block}"
        for level in (0, 1):
            axial[rf"{cost}agg_{level}\.{block + 1}"] = f"{ours}up.{level}.mix.{block}"
    gates = {
        "corr_feature_att": "filter.gate",
        cost + "feature_att_8": ours + "down.0.gate",
        cost + "feature_att_16": ours + "down.1.gate",
        cost + "feature_att_32": ours + "down.2.gate",
        cost + "feature_att_up_16": ours + "up.0.gate",
        cost + "feature_att_up_8": ours + "up.1.gate",
    }
    rules = [
        (r"corr_stem\.0\.(.+)", "filter.project.{0}"),
        (r"classifier\.2\.(.+)", "classifier.score.{0}"),
        (cost + r"conv_patch\.0\.(.+)", ours + "transformer.patch.{0}"),
        (cost + r"conv_patch\.1\.(.+)", ours + "transformer.patch_norm.{0}"),
    ]
    layer = cost + r"atts\.4\.sa\.(\d)\."
    for theirs, name in {
        r"self_attn\.q_proj": "query",
        r"self_attn\.k_proj": "key",
        r"self_attn\.v_proj": "value",
        r"self_attn\.out_proj": "out",
        "linear1": "expand",
        "linear2": "contract",
        "norm1": "attention_norm",
        "norm2": "mlp_norm",
    }.items():
        rules.append((rf"{layer}{theirs}\.(.+)", f"{ours}transformer.layers.{{0}}.{name}.{{1}}"))
    for theirs, name in convolutions.items():
        rules += [(rf"{theirs}\.conv\.(.+)", name + ".convolution.{0}"), (rf"{theirs}\.bn\.(.+)", name + ".norm.{0}")]
    for theirs, name in residuals.items():
        rules += [
            (rf"{theirs}\.conv(\d)\.(.+)", name + ".conv{0}.{1}"),
            (rf"{theirs}\.bn(\d)\.(.+)", name + ".norm{0}.{1}"),
        ]
    for theirs, name in axial.items():
        for number, part in ((1, "planar"), (2, "axial")):
            rules.append((rf"{theirs}\.conv{number}\.0\.(.+)", f"{name}.{part}.{{0}}"))
            rules.append((rf"{theirs}\.conv{number}\.1\.(.+)", f"{name}.{part}_norm.{{0}}"))
    for theirs, name in gates.items():
        rules.append((rf"{theirs}\.feat_att\.0\.conv\.(.+)", name + ".reduce.{0}"))
        rules.append((rf"{theirs}\.feat_att\.0\.bn\.(.+)", name + ".norm.{0}"))
        rules.append((rf"{theirs}\.feat_att\.1\.(.+)", name + ".expand.{0}"))
    return rules


def convert_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our keys and tensors for one published key; empty where the published network's part is not used here.

    Raises:
        KeyError: the key is not FoundationStereo's.
    """
    if UNUSED.match(key):
        return {}
    if match := re.fullmatch(DINO + r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key):
        name = f"prior.backbone.encoder.layer.{match[1]}.attention.{{}}_proj.{match[2]}"
        return {name.format(part): rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)}
    if match := re.fullmatch(DPT + r"scratch\.layer(\d)_rn\.weight", key):
        return {f"prior.neck.convs.{int(match[1]) - 1}.weight": tensor}
    if match := re.fullmatch(DPT + r"scratch\.refinenet(\d)\.(.+)", key):
        # transformers counts the fusion layers from the coarsest map
        name = f"prior.neck.fusion_stage.layers.{4 - int(match[1])}.{match[2]}"
        for theirs, ours in (("resConfUnit", "residual_layer"), (".conv", ".convolution"), ("out_conv", "projection")):
            name = name.replace(theirs, ours)
        return {name.replace(".neck.convolution", ".neck.conv"): tensor}
    for pattern, ours in RULES + volume_rules():
        if match := re.fullmatch(pattern, key):
            return {ours.format(*match.groups()): tensor}
    raise KeyError(key)


def release_of(published: dict[str, torch.Tensor]) -> str:
    """ "large" or "small", by the width of the features that are matched."""
    widths = {224: "large", 128: "small"}
    weight = published.get("proj_cmb.weight")
    if weight is None or weight.ndim != 4 or weight.shape[1] not in widths:
        found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
        raise ValueError(f"proj_cmb.weight is {found}; FoundationStereo's is (12, 224, 1, 1) or (12, 128, 1, 1)")
    return widths[weight.shape[1]]


def open_stereo(path: str | Path, **overrides) -> tuple[StereoEncoderConfig, Part]:
    """Config and weights of a released file, or of a folder that `save_pretrained` or this file's command wrote.

    Args:
        overrides: fields of the config, such as max_disparity.
    """
    description = Path(path) / "config.json"
    if (
        description.is_file()
        and json.loads(description.read_text()).get("model_type") == StereoEncoderConfig.model_type
    ):
        config = StereoEncoderConfig.from_pretrained(path, **overrides)
        return config, Part(open_weights(path), lambda key, tensor: {key: tensor})
    source = open_weights(path)
    return StereoEncoderConfig.foundationstereo(release_of(source.outlines), **overrides), Part(source, convert_key)


@dataclass(kw_only=True)
class Options(Output):
    """FoundationStereo's released weights -> a StereoEncoderModel folder.

        stereovla convert foundationstereo --checkpoint model_best_bp2.pth --out stereo_encoder

    The weights are NVIDIA's, for research only and non-commercial; whoever converts them keeps to that.
    """

    checkpoint: str = field(metadata={"help": "FoundationStereo's model_best_bp2.pth, or the same as .safetensors."})
    overrides: str | None = field(
        default=None, metadata={"help": 'Fields of the config to replace, as JSON: {"max_disparity": 128}.'}
    )


def convert(options: Options) -> Path:
    """The folder of a StereoEncoderModel; ValueError if any key is unknown or missing."""
    config, part = open_stereo(options.checkpoint, **read_overrides(options.overrides))
    model = outline_model(StereoEncoderModel, config)
    what = "FoundationStereo state dict of this size"
    return write_model(options, model, [part], what)
