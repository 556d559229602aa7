r"""One StereoVLA model from separately downloaded parts, with a new projector and a new action expert to be trained.

    stereovla convert parts --language_model internlm2-1_8b --semantic siglip-so400m-patch14-224 \
        --spatial dinov2-with-registers-large --stereo model_best_bp2.pth --out StereoVLA-untrained

Each part is taken as it is published: the language model as InternLM2's folder or as a Llama's; SigLIP and DINOv2 with
registers as transformers' or timm's; the stereo encoder as FoundationStereo's file or as a folder of ours. The sizes
are those of the parts, the rest is the paper's (arXiv 2512.21970): a projector four times as wide as the fused
features, an expert of half the language model's width and a quarter of its intermediate one.

Two tokens are appended to the vocabulary, padding and then the image token; rows of the embedding and of the output
layer that have no token yet are the mean of the others. `stereovla convert processor` writes the processor.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import Dinov2WithRegistersModel, LlamaConfig, SiglipVisionModel

from .configuration_policy import overridden, own_fields
from .configuration_stereovla import StereoVLAConfig
from .convert_files import Part, WeightSource, below, open_weights, read_description
from .convert_foundationstereo import open_stereo
from .convert_internlm2 import llama_fields
from .convert_output import Output, initial_weights, outline_model, read_overrides, write_model
from .convert_stereovla import TOWER, convert_language_key
from .convert_vision_towers import resize_positions, tower_fields, tower_part
from .modeling_stereovla import StereoVLAForActionPrediction

TOWER_CLASSES = {
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2_with_registers": Dinov2WithRegistersModel,
}
NEW_PARTS = ("model.visual_tokens.projector", "action_expert", "pointers")
PAD_MULTIPLE = 64  # rows of the embedding, as in the release
VOCABULARY_KEYS = ("model.language_model.embed_tokens.weight", "lm_head.weight")


def convert_tower_key(key: str, tensor: torch.Tensor, depth: int, grid: int) -> dict[str, torch.Tensor]:
    """One tensor of transformers' SigLIP or DINOv2 of `depth` blocks, if the second-to-last block depends on it.

    Args:
        grid: side of the visual tokens; DINOv2's position table is brought to it.
    """
    if re.match(rf"encoder\.layers?\.{depth - 1}\.|(post_)?layernorm\.|head\.", key):
        return {}
    if key == "embeddings.position_embeddings":
        tensor = torch.cat([tensor[:, :1], resize_positions(tensor[:, 1:], grid)], dim=1)
    return {key: tensor}


def open_tower(path: str | Path, num_heads: int, image_size: int) -> tuple[dict, Part]:
    """Config fields, `model_type` included, and weights of a tower as transformers or timm publish it.

    Args:
        num_heads: attention heads of a timm tower; transformers' config tells its own.
        image_size: side of the views, px.
    """
    kind = read_description(path).get("model_type")
    if kind is None:
        source = open_weights(path)
        fields = tower_fields(source.outlines, num_heads)
        part = tower_part(source, grid=image_size // fields["patch_size"])
    elif kind in TOWER_CLASSES:
        # through transformers, which knows the names that its older folders use
        model, report = TOWER_CLASSES[kind].from_pretrained(path, output_loading_info=True, local_files_only=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{path} lacks {len(missing)} keys of a {kind}: {', '.join(missing)}")
        source = WeightSource.of(str(path), model.state_dict())
        fields = own_fields(model.config)
        depth = model.config.num_hidden_layers
        part = Part(source, partial(convert_tower_key, depth=depth, grid=image_size // model.config.patch_size))
    else:
        raise ValueError(f"{path} is a {kind!r}; valid towers: {', '.join(TOWER_CLASSES)}, or timm's weights")
    if fields["model_type"] == "dinov2_with_registers":
        return fields | {"image_size": image_size}, part
    # exact GELU, as StereoVLA runs it; transformers' config names the tanh form
    return fields | {"vision_use_head": False, "hidden_act": "gelu"}, part


def open_language_model(path: str | Path) -> tuple[dict, Part]:
    """LlamaConfig fields and weights, under our keys, of a folder with an InternLM2 or a Llama."""
    description = read_description(path)
    kind = description.get("model_type")
    if kind not in ("internlm2", "llama"):
        raise ValueError(f"{path} is a {kind!r}; valid language models: internlm2, llama")
    source = open_weights(path)
    if kind == "internlm2":
        fields = llama_fields(description)
        heads = (fields["num_attention_heads"], fields["num_key_value_heads"])
        return fields, Part(source, lambda key, tensor: convert_language_key(key, tensor, *heads))
    fields = own_fields(LlamaConfig.from_pretrained(path))
    if fields["tie_word_embeddings"]:
        raise ValueError(f"{path} ties its embeddings; only models with an output layer are taken")
    return fields, Part(source, lambda key, tensor: {re.sub("^model", "model.language_model", key): tensor})


def fill_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """(n, hidden) with further rows, the mean of the n, up to (rows, hidden)."""
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def with_rows(part: Part, rows: int) -> Part:
    """The language model's part with `rows` tokens."""

    def convert_key(key: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        converted = part.convert(key, tensor)
        return {name: fill_rows(t, rows) if name in VOCABULARY_KEYS else t for name, t in converted.items()}

    return Part(part.source, convert_key)


@dataclass(kw_only=True)
class Options(Output):
    r"""One StereoVLA model from separately downloaded parts, with a new projector and action expert to be trained.

    stereovla convert parts --language_model internlm2-1_8b --semantic siglip-so400m-patch14-224 \
        --spatial dinov2-with-registers-large --stereo model_best_bp2.pth --out StereoVLA-untrained
    """

    language_model: str = field(metadata={"help": "Folder of InternLM2, or of a Llama with its own output layer."})
    semantic: str = field(metadata={"help": "SigLIP: transformers' folder, or timm's weights."})
    spatial: str = field(metadata={"help": "DINOv2 with registers: transformers' folder, or timm's weights."})
    stereo: str = field(metadata={"help": "FoundationStereo's model_best_bp2.pth, or a converted folder."})
    image_size: int = field(default=224, metadata={"help": "Side of both views, px."})
    semantic_heads: int = field(default=16, metadata={"help": "Attention heads of a SigLIP of timm's."})
    spatial_heads: int = field(default=16, metadata={"help": "Attention heads of a DINOv2 of timm's."})
    overrides: str | None = field(
        default=None, metadata={"help": 'Fields of the config to replace, as JSON: {"chunk_size": 8}.'}
    )
    seed: int = field(default=0, metadata={"help": "Of the initial weights of the new parts."})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16, of all weights."})


def convert(options: Options) -> Path:
    """The folder of the assembled model; ValueError if a part has an unknown key or lacks one."""
    text, language_model = open_language_model(options.language_model)
    semantic, semantic_part = open_tower(options.semantic, options.semantic_heads, options.image_size)
    spatial, spatial_part = open_tower(options.spatial, options.spatial_heads, options.image_size)
    stereo, stereo_part = open_stereo(options.stereo)
    vocabulary = text["vocab_size"]
    rows = -(-(vocabulary + 2) // PAD_MULTIPLE) * PAD_MULTIPLE
    values = {
        "text_config": {**text, "vocab_size": rows, "pad_token_id": vocabulary},
        "semantic_config": semantic,
        "spatial_config": spatial,
        "stereo_config": stereo.to_dict(),
        "image_size": options.image_size,
        "patch_size": semantic["patch_size"],
        "expert_hidden_size": text["hidden_size"] // 2,
        "expert_intermediate_size": text["intermediate_size"] // 4,
        "action_vocab_size": vocabulary,
        "image_token_id": vocabulary + 1,
    }
    overrides = read_overrides(options.overrides)
    if "projector_hidden_size" not in overrides:
        values["projector_hidden_size"] = 4 * overridden(StereoVLAConfig, values, overrides).fused_size
    model = outline_model(StereoVLAForActionPrediction, overridden(StereoVLAConfig, values, overrides))
    parts = [
        with_rows(language_model, rows),
        Part(semantic_part.source, below(semantic_part.convert, f"{TOWER}semantic.tower.")),
        Part(spatial_part.source, below(spatial_part.convert, f"{TOWER}spatial.tower.")),
        Part(stereo_part.source, below(stereo_part.convert, f"{TOWER}stereo.")),
        initial_weights(model, NEW_PARTS, options.seed),
    ]
    return write_model(options, model, parts, "set of parts of one model")
