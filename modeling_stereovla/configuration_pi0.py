"""pi0 (arXiv 2410.24164) as transformers has it, in the words of our configs, so that the same loop trains it."""

from huggingface_hub.dataclasses import strict
from transformers import PI0Config

from .configuration_depthvla import PRESETS as DEPTHVLA_PRESETS
from .configuration_depthvla import DepthVLAConfig
from .configuration_policy import overridden, own_fields

# our field -> PI0Config's
FIELDS = {
    "chunk_size": "chunk_size",
    "state_dim": "max_state_dim",
    "action_dim": "max_action_dim",
    "num_inference_steps": "num_inference_steps",
    "time_alpha": "time_sampling_beta_alpha",
    "time_beta": "time_sampling_beta_beta",
    "min_period": "min_period",
    "max_period": "max_period",
}


@strict
class PI0PolicyConfig(DepthVLAConfig):
    r"""
    Sizes of transformers' `PI0ForConditionalGeneration`: those fields of a [`DepthVLAConfig`] without depth expert that
    it has. Others keep the value that it is built with; `pi0_config` names those that do not.
    """

    model_type = "pi0_policy"

    depth_map_loss_weight: float = 0.0

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "PI0PolicyConfig":
        """The configuration named `preset` (a key of `PRESETS`) with `overrides`; a dict overrides single options of a
        part.
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
        return overridden(cls, of_depthvla(DEPTHVLA_PRESETS[PRESETS[preset]]()), overrides)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        super().validate_architecture()
        pi0_config(self)


PRESETS = {name.replace("depthvla", "pi0"): name for name in DEPTHVLA_PRESETS}  # and whose sizes it has
KEPT = ("vlm_config", "image_size", "patch_size", "expert_hidden_size", "expert_intermediate_size", "chunk_size")
KEPT += ("action_vocab_size", "image_token_id", "num_inference_steps", "flow_draws")


def of_depthvla(values: dict) -> dict:
    """Fields of a pi0 of the sizes of a DepthVLA with the fields `values`; a convolutional encoder becomes a SigLIP of
    its width and of the language model's layers, as PaliGemma has no other.
    """
    kept = {name: value for name, value in values.items() if name in KEPT}
    vlm, vision = kept["vlm_config"], kept["vlm_config"]["vision_config"]
    if vision["model_type"] != "siglip_vision_model":
        width = vision["hidden_size"]
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": vlm["text_config"]["num_hidden_layers"],
            "num_attention_heads": max(1, width // 32),
            "image_size": kept["image_size"],
            "patch_size": kept["patch_size"],
            "vision_use_head": False,
        }
    return {**kept, "vlm_config": {**vlm, "vision_config": vision}, "depth_config": None}


def pi0_config(config: DepthVLAConfig) -> PI0Config:
    """The PI0Config of a DepthVLA without depth expert.

    Raises:
        ValueError: it has something that PI0 has not; all of it is named.
    """
    text, vision = config.text_config, config.vlm_config.vision_config
    needed = {
        "depth_config": (config.depth_config is None, "None"),
        "use_pointers": (not config.use_pointers, "False"),
        "state_history": (config.state_history == 1, "1"),
        "noise_scale": (config.noise_scale == 1, "1.0"),
        "time_embedding_dtype": (config.time_embedding_dtype == "float32", "'float32'"),
        "vlm_config.text_config.tie_word_embeddings": (text.tie_word_embeddings, "True"),
        "vlm_config.vision_config.model_type": (vision.model_type == "siglip_vision_model", "'siglip_vision_model'"),
    }
    if wrong := [f"{name} must be {value}" for name, (fits, value) in needed.items() if not fits]:
        raise ValueError(f"this DepthVLA is no pi0: {'; '.join(wrong)}")
    expert = {"hidden_size": config.expert_hidden_size, "intermediate_size": config.expert_intermediate_size}
    return PI0Config(
        vlm_config=own_fields(config.vlm_config),
        dit_config={**own_fields(text), **expert},
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        time_sampling_offset=config.time_min,
        time_sampling_scale=config.time_max - config.time_min,
    )
