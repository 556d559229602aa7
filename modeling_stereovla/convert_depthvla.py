r"""One DepthVLA from published parts: a VLM from PaliGemma, or VLM and action expert from pi0; an encoder from Depth
Anything V2, or a depth expert that was trained already. What no part brings is new, and to be trained.

Sizes are those of the parts, the rest is the paper's (arXiv 2510.13375): experts shaped like Gemma-300M, with the
layers and heads of the VLM.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .configuration_depthvla import DepthExpertConfig, DepthVLAConfig, gemma_300m
from .configuration_policy import overridden, own_fields
from .convert_depth_anything import open_depth_encoder
from .convert_files import Part, below, open_weights, read_description
from .convert_output import Output, initial_weights, outline_model, read_overrides
from .convert_paligemma import open_paligemma
from .convert_pi0 import SHARED, open_pi0
from .modeling_depthvla import DepthVLAForActionPrediction
from .saved_names import present_name

DEPTH_EXPERT = "model.depth_expert."
NEW_BEHIND_ENCODER = tuple(f"{DEPTH_EXPERT}{name}" for name in ("norm", "projector", "decoder", "head"))


@dataclass(kw_only=True)
class Options(Output):
    r"""One DepthVLA from published parts; what none of them brings is new, and to be trained.

    stereovla convert depthvla --vlm google/paligemma-3b-pt-224 \
        --depth_encoder depth-anything/Depth-Anything-V2-Large-hf --out DepthVLA-untrained
    stereovla convert depthvla --pi0 lerobot/pi0_base --out pi0

    Each part is a folder or an id on the Hub, and keeps its licence: PaliGemma's is Gemma's terms of use, as is pi0's,
    which was trained from it; Depth Anything V2 is for non-commercial use, but for its small model. Without
    --depth_encoder and --depth_expert the model has no depth expert: it is a pi0. Every key of the parts must be known
    and every parameter be filled, or nothing is written and all are listed.
    """

    vlm: str | None = field(default=None, metadata={"help": "PaliGemma; the action expert is new."})
    pi0: str | None = field(
        default=None,
        metadata={"help": "In place of --vlm a pi0, with its action expert: transformers', openpi's or LeRobot's."},
    )
    depth_encoder: str | None = field(
        default=None, metadata={"help": "Depth Anything V2, or a DINOv2; decoder and head behind it are new."}
    )
    depth_expert: str | None = field(
        default=None,
        metadata={"help": "In place of --depth_encoder a whole one, of `stereovla pretrain depth`."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Where tokenizer.json is, for the processor; that beside VLM or pi0 if not given."},
    )
    views: list[str] = field(
        default_factory=lambda: ["left"], metadata={"help": "Names of the cameras that the model sees, 'left' first."}
    )
    vision_heads: int = field(default=16, metadata={"help": "Attention heads of SigLIP in openpi's or LeRobot's pi0."})
    overrides: str | None = field(
        default=None, metadata={"help": 'Fields of the config to replace, as JSON: {"chunk_size": 8}.'}
    )
    seed: int = field(default=0, metadata={"help": "Of the initial weights of the new parts."})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16, of all weights."})


def check_options(options: Options) -> None:
    """ValueError unless there is exactly one VLM and at most one depth expert."""
    if (options.vlm is None) == (options.pi0 is None):
        given = "neither is given" if options.vlm is None else "both are given"
        raise ValueError(f"--vlm and --pi0 both bring the VLM, and {given}; give one of them")
    if options.depth_encoder is not None and options.depth_expert is not None:
        raise ValueError("--depth_expert has an encoder of its own; give it or --depth_encoder")


def open_depth_expert(path: str | Path) -> tuple[dict, Part]:
    """DepthExpertConfig fields and weights of a folder of a DepthExpertModel; ValueError if it is another model."""
    kind = read_description(path).get("model_type")
    if kind != DepthExpertConfig.model_type:
        raise ValueError(f"{path} is a {kind!r}; valid: the folder of a {DepthExpertConfig.model_type!r}")
    return own_fields(DepthExpertConfig.from_pretrained(path)), Part(
        open_weights(path), lambda key, tensor: {present_name(key): tensor}
    )


def policy_of_vlm(fields: dict) -> dict:
    """DepthVLAConfig fields of a PaliGemma of these fields."""
    vision = fields["vision_config"]
    return {
        "vlm_config": fields,
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "image_token_id": fields["image_token_index"],
    }


def gather(
    options: Options, folder_of: Callable[[str], Path] = Path
) -> tuple[DepthVLAForActionPrediction, list[Part], str]:
    """What `write_model` needs: the model without weights, its parts, and what they should be.

    Args:
        folder_of: gives the folder of a part.

    Raises:
        ValueError: a part is another model, or its sizes do not fit the others'.
    """
    check_options(options)
    overrides, new = read_overrides(options.overrides), []
    if options.pi0 is not None:
        values, vlm = open_pi0(folder_of(options.pi0), overrides.get("chunk_size"), options.vision_heads)
    else:
        fields, vlm = open_paligemma(folder_of(options.vlm))
        values = policy_of_vlm(fields)
        new.append("action_expert")
    parts, text = [vlm], values["vlm_config"]["text_config"]
    values |= {"views": options.views, "depth_config": None, "depth_map_loss_weight": 0.0}
    if options.depth_encoder is not None:
        encoder, part = open_depth_encoder(folder_of(options.depth_encoder))
        parts.append(Part(part.source, below(part.convert, f"{DEPTH_EXPERT}encoder.tower.")))
        new += NEW_BEHIND_ENCODER
        values["depth_config"] = {
            "encoder_config": encoder,
            "decoder_config": gemma_300m() | {name: text[name] for name in SHARED},
            "image_size": values["image_size"],
            "patch_size": encoder["patch_size"],
        }
    elif options.depth_expert is not None:
        values["depth_config"], part = open_depth_expert(folder_of(options.depth_expert))
        parts.append(Part(part.source, below(part.convert, DEPTH_EXPERT)))
    if values["depth_config"] is not None:
        values["depth_map_loss_weight"] = 1.0
        values["depth_expert_source"] = options.depth_encoder or options.depth_expert
    model = outline_model(DepthVLAForActionPrediction, overridden(DepthVLAConfig, values, overrides))
    parts.append(initial_weights(model, [*new, "pointers", "model.depth_reading"], options.seed))
    return model, parts, "set of parts of one DepthVLA"
