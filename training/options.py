"""What several training commands are told in the same words."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stereovla.command_line import json_object, option
from stereovla.dataset_builder.streaming.augmentation import PhotometricAugmentation
from stereovla.dataset_builder.streaming.questions import OBJECTIVES
from stereovla.modeling_stereovla.configuration_depthvla import PRESETS as DEPTHVLA_PRESETS


@dataclass(kw_only=True)
class RunOptions:
    """What every training can be told of its run."""

    dataset: list[str] = field(
        metadata={"help": "Dataset folders or dataset ids on the Hub; of several, each may have a weight: PATH=0.3."}
    )
    output_dir: str = field(metadata={"help": "Where checkpoints, losses and the trained model go."})
    preset: str = option("demo", "Size of model and run.")
    steps: int = option(1000, "Optimizer steps (preset).")
    accumulation: int = option(1, "Parts that each process computes its share of a step in, one after the other.")
    learning_rate: float = option(1e-3, "Peak learning rate (preset).")
    warmup_steps: int = option(100, "Steps of linear warm-up, before the cosine to zero (preset).")
    weight_decay: float = option(0.01, "Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    seed: int = option(0, "Seed of the weights, the order of the data and what is drawn.")
    pool_episodes: int = option(30, "Episodes of each of 8 lanes that are shuffled together.")
    log_every: int = option(10, "Steps between two lines of losses.jsonl (preset).")
    checkpoint_every: int = option(100, "Steps between two checkpoints (preset).")
    keep_checkpoints: int = option(2, "Checkpoints that are kept.")

    def __post_init__(self):
        counts = ("steps", "accumulation", "pool_episodes", "log_every", "checkpoint_every", "keep_checkpoints")
        at_least_one(self, *counts)

    @property
    def result(self) -> Path:
        """Folder of the trained model."""
        return Path(self.output_dir) / "model"


def with_depthvla(presets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Presets of a training, and the same of a DepthVLA, which is trained end to end: none of them freezes a part."""
    frozen = {"freeze": ""} if "freeze" in presets["full"] else {}
    of_depthvla = {f"depthvla-{name}": {**values, **frozen} for name, values in presets.items()}
    return presets | {name: values for name, values in of_depthvla.items() if name in DEPTHVLA_PRESETS}


def with_pi0(presets: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Presets of a training, and the same of transformers' PI0, which learns from actions alone, for those of a
    DepthVLA.
    """
    of_depthvla = {name: values for name, values in presets.items() if name.startswith("depthvla-")}
    own = {"gradient_checkpointing": False}
    return presets | {name.replace("depthvla", "pi0"): {**values, **own} for name, values in of_depthvla.items()}


def at_least_one(options: RunOptions, *names: str) -> None:
    """ValueError if one of these options is smaller."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")


def mixture_weights(text: str, objectives: Sequence[str] = OBJECTIVES, optional: int = 1) -> dict[str, float]:
    """ "5:2:2:1" -> {"action": 5, "depth": 2, "box": 2, "pose": 1, "camera": 0}; a fifth number is the camera's. Of
    other `objectives` likewise, the last `optional` of which need no number.
    """
    try:
        shares = [float(share) for share in text.split(":")]
    except ValueError:
        shares = []
    counts = range(len(objectives) - optional, len(objectives) + 1)
    if len(shares) not in counts or min(shares) < 0 or sum(shares) == 0:
        forms = " or ".join(":".join(objectives[:count]) for count in counts)
        raise ValueError(f"--mixture is {text!r}; it needs shares {forms}, such as {':'.join('5221'[: counts[0]])}")
    missing = [0.0] * (len(objectives) - len(shares))
    return dict(zip(objectives, [*shares, *missing], strict=True))


def config_fields(text: str) -> dict[str, Any]:
    """--config as a dict; ValueError for what is no JSON object. Fields that a config does not have, it refuses."""
    return json_object("config", text, '{"flow_draws": 2}')


def dataset_mixture(names: list[str]) -> str | list[tuple[str, float]]:
    """["a", "b=0.3"] -> [("a", 1.0), ("b", 0.3)]; of a single dataset its name."""
    if len(names) == 1:
        return names[0]
    pairs = [(name.rpartition("=") if "=" in name else (name, "", "1")) for name in names]
    try:
        return [(name, float(weight)) for name, _, weight in pairs]
    except ValueError as error:
        raise ValueError(f"--dataset {names}: a weight must be a number, as in PATH=0.3") from error


def augmentation(strength: float) -> PhotometricAugmentation | None:
    """Photometric changes of up to `strength` in brightness, contrast and saturation, and a tenth and a quarter of it
    between the views and the colours; 0 = none.
    """
    if strength == 0:
        return None
    return PhotometricAugmentation(strength, strength, strength, balance=strength / 4, between_views=strength / 10)
