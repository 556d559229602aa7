"""Adapters (LoRA) of a policy: what they are put on, and one that is trained on."""

from peft import LoraConfig, PeftConfig, PeftModel

from stereovla.training.models import Policy, Processor, load_policy, load_processor, with_statistics

# what adapters are put on, and what is trained whole beside them: what knows the robot's numbers
LORA_TARGETS = (
    r"(model\.(vlm\.)?language_model|model\.depth_expert\.decoder|action_expert\.transformer)\.layers\.\d+"
    r"\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
)
LORA_HEADS = (
    *(f"action_expert.{name}" for name in ("state_proj", "action_in_proj", "action_out_proj")),
    "pointers.displacement",
    "pointers.displacement_token",
    "pointers.anchors",
    "pointers.carried_query",
    "pointers.turns",
)


def lora_config(model: Policy, rank: int) -> LoraConfig:
    """Of language model and action expert, with the heads that the model has."""
    heads = [name for name in LORA_HEADS if name in dict(model.named_modules())]
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, modules_to_save=heads)


def trained_adapter(source: str, meta: dict, rank: int) -> tuple[PeftModel, Processor]:
    """The adapter in a folder or on the Hub on its base, to be trained on, and its processor with the statistics of the
    dataset beside its own; ValueError where its rank is another, or its robot has other sizes than the dataset's.
    """
    config = PeftConfig.from_pretrained(source)
    if config.r != rank:
        raise ValueError(
            f"{source} is an adapter of rank {config.r}, and --lora_rank is {rank}; {config.r} goes on with it"
        )
    processor = load_processor(source)
    for name in ("state_dim", "action_dim"):
        if getattr(processor, name) != meta[name]:
            raise ValueError(
                f"the adapter {source} is for a robot with {name} {getattr(processor, name)}, the dataset's has "
                f"{meta[name]}; begin a new adapter with --model {config.base_model_name_or_path}"
            )
    base = load_policy(config.base_model_name_or_path)
    base.resize_heads(processor.state_dim, processor.action_dim, processor.num_turns)
    model = PeftModel.from_pretrained(base, source, is_trainable=True)
    return model, with_statistics(source, processor, meta)
