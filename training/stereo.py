"""Trains the stereo encoder alone, on pairs with true disparity.

Smooth L1 on the initial disparity at a quarter of the resolution, as FoundationStereo trains it (arXiv 2501.09898,
section 3.4) before its refinement, which StereoVLA does not use.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from stereovla.command_line import option
from stereovla.dataset_builder.dataset.schema import SEGMENTATION
from stereovla.dataset_builder.formats.disparity_sets import FORMATS, open_pairs
from stereovla.dataset_builder.formats.labelled_sets import Samples
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import StereoEncoderModel, StereoVLAConfig
from stereovla.modeling_stereovla.cost_volume import disparity_loss, known_disparity
from stereovla.processing import StereoImageProcessorPil
from stereovla.training.disparity_errors import (
    best_constant,
    draw_disparities,
    error_numbers,
    error_sums,
    errors_where_it_matters,
    semi_global_matching,
)
from stereovla.training.framing import DisparityFraming
from stereovla.training.models import trained_stereo_encoder
from stereovla.training.options import at_least_one, config_fields
from stereovla.training.part_card import part_card
from stereovla.training.part_training import WINDOWS, PartOptions, PartTraining, run_stage

SAME_MODEL_PX = 1e-2  # disparities of the same weights, by other kernels or orders of summation
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"height": 64, "width": 64, "steps": 40, "batch_size": 8, "warmup_steps": 5, "checkpoint_every": 20},
    "demo": {"height": 96, "width": 96, "zoom": 1.3, "steps": 1000, "batch_size": 16, "warmup_steps": 100},
    "points": {
        "height": 192,
        "width": 192,
        "zoom": 1.3,
        "steps": 1800,
        "batch_size": 16,
        "warmup_steps": 100,
        "flat_share": 0.3,
        "checkpoint_every": 200,
        "interaction_weight": 8.0,
        "loss_beta": 0.25,
        "mixed_precision": "bf16",
    },
    # FoundationStereo's own sizes (section 4.1 there)
    "full": {
        "height": 320,
        "width": 736,
        "steps": 200_000,
        "batch_size": 128,
        "learning_rate": 1e-4,
        "warmup_steps": 1000,
        "flat_share": 0.8,
        "checkpoint_every": 1000,
        "mixed_precision": "bf16",
        "workers": 4,
    },
}
PRESETS["lab"] = PRESETS["points"]  # whose policies have the same encoder


@dataclass(kw_only=True)
class StereoOptions(PartOptions):
    """Trains a StereoEncoderModel. Options marked (preset) default to the preset's value."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    dataset: list[str] = field(
        metadata={
            "help": "Datasets of this project, folders or Hub ids; of several, each may have a weight: PATH=0.3. With "
            "--format the folders of a stereo set, or one dataset with columns."
        }
    )
    preset: str = option("demo", "Size of model and run.", choices=list(PRESETS))
    format: str = option(WINDOWS, "What the dataset is; windows = of this project.", choices=[WINDOWS, *FORMATS])
    columns: str = option("left,right,disparity", "Names of these columns, for --format columns.")
    disparity_unit: float = option(1.0, "Px per step of the disparity column; KITTI's PNG has 1/256 = 0.00390625.")
    max_disparity: int = option(0, "Largest disparity in px, exclusive, a multiple of 32; 0 = the model's own.")
    height: int = option(96, "Height of the training pairs, px, a multiple of 32 (preset).")
    width: int = option(96, "Width of the training pairs, px, a multiple of 32 (preset).")
    scale: str = option(
        "fit",
        "Pairs of other sizes are scaled until they just fill height and width, or keep their px; the rest is cut off.",
        choices=["fit", "native"],
    )
    interaction_weight: float = option(
        1.0,
        "How often an error at gripper, target and other objects counts, where the data has a segmentation (preset).",
    )
    loss_beta: float = option(
        1.0, "Px of the predicted resolution from which on an error counts by its size, not by its square (preset)."
    )
    validation_pairs: int = option(64, "Held-out pairs that are scored at a checkpoint.")

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "validation_pairs", "interaction_weight")
        if not self.loss_beta > 0:
            raise ValueError(f"--loss_beta is {self.loss_beta} px; it must be above 0")
        for name in ("height", "width"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise ValueError(f"--{name} is {getattr(self, name)} px; it must be a multiple of 32")
        if len(self.columns.split(",")) != 3:
            raise ValueError(f"--columns is {self.columns!r}; it needs three names, such as left,right,disparity")

    @property
    def framing(self) -> DisparityFraming:
        return DisparityFraming(self.height, self.width, self.scale, self.zoom)


def build(options: StereoOptions) -> StereoEncoderModel:
    """The model as it is trained: of the preset's size, the same as in the preset's policy, or given."""
    torch.manual_seed(options.seed)
    fields = {"max_disparity": options.max_disparity} if options.max_disparity else {}
    if options.model is not None:
        return trained_stereo_encoder(options.model, **fields)
    config = StereoVLAConfig.from_preset(options.preset, stereo_config=config_fields(options.config)).stereo_config
    if config.depth_anything_config is not None:
        raise ValueError(
            f"--preset {options.preset} has FoundationStereo's frozen monocular features, which must come trained: "
            "give --model FOLDER, such as `stereovla convert foundationstereo` writes"
        )
    return StereoEncoderModel(type(config)(**{**config.to_dict(), **fields}))


class StereoTraining(PartTraining):
    """Of the stereo encoder."""

    asked = "camera"  # a calibrated pair
    left_out = "beyond_range"
    image_processor = StereoImageProcessorPil

    def __init__(self, options: StereoOptions):
        model = build(options)
        self.max_disparity = model.config.max_disparity
        super().__init__(options, model, options.framing, options.validation_pairs)
        self.constant = best_constant(self.held_out["disparity"], self.max_disparity)
        truth = self.held_out["disparity"]
        matched = semi_global_matching(self.held_out["pixel_values"], self.max_disparity)
        self.constant_errors = self.errors(torch.full_like(truth, self.constant))
        self.matching_errors = self.errors(matched)

    def open_set(self, split: str) -> Samples:
        options = self.options
        names = options.columns.split(",")
        return open_pairs(options.dataset, options.format, split, options.held_out, names, options.disparity_unit)

    def windows(self, split: str, **more: Any) -> WindowStream:
        return super().windows(split, segmentation=True, **more)

    def loss(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output, options = model(inputs["pixel_values"]), self.options
        weight = None
        if options.interaction_weight != 1:
            matters = inputs["segmentation"] >= SEGMENTATION["gripper"]
            weight = 1 + (options.interaction_weight - 1) * matters
        maps = [output.initial_disparity, output.refined_disparity]
        losses = [
            disparity_loss(found, inputs["disparity"], self.max_disparity, weight, options.loss_beta)
            for found in maps
            if found is not None
        ]
        return sum(losses)

    def counted(self, truth: torch.Tensor) -> torch.Tensor:
        return known_disparity(truth, self.max_disparity)[1].sum()

    def pixels(self, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (truth >= self.max_disparity).sum(), (truth > 0).sum()

    def predict_part(self, model, pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values).disparity

    def errors(self, predicted: torch.Tensor) -> dict[str, float]:
        truth = self.held_out["disparity"]
        places = errors_where_it_matters(
            predicted, truth, self.held_out["segmentation"], self.held_out["depth_times_disparity"]
        )
        return error_numbers(error_sums(predicted, truth, self.max_disparity)) | places

    def draw(self, path: Path, predicted: torch.Tensor) -> None:
        draw_disparities(path, self.held_out["pixel_values"][:, 0], self.held_out["disparity"], predicted)

    def difference(self, predicted: torch.Tensor, other: torch.Tensor) -> str:
        largest = float((predicted - other).abs().max())
        if largest <= SAME_MODEL_PX:
            return ""
        return f"disparities differ by {largest:.2g} px (at most {SAME_MODEL_PX:g} is rounding)"

    def summary(self, errors: dict[str, float]) -> dict[str, Any]:
        options = self.options
        return {
            "summary": f"{options.steps:,} steps of {options.batch_size} pairs of {options.height} x {options.width} "
            f"px, AdamW, peak learning rate {options.learning_rate:g}, seed {options.seed}.",
            "held_out_pairs": len(self.held_out["disparity"]),
            "errors": errors,
            "best_constant": {"px": self.constant, **self.constant_errors},
            "semi_global_matching": self.matching_errors,
        }

    def in_words(self, errors: dict[str, float]) -> str:
        lines = {"held-out pairs": errors, **self.beside()}
        return "\n".join(f"{what}: {in_words(numbers)}" for what, numbers in lines.items())

    def beside(self) -> dict[str, dict[str, float]]:
        """Errors of what needs no training, by what it is."""
        return {
            f"the best constant, {self.constant:.1f} px": self.constant_errors,
            "semi-global matching": self.matching_errors,
        }

    def card(self, summary: dict[str, Any]) -> str:
        columns = [summary["errors"], *self.beside().values()]
        rows = [
            (words, *(form.format(numbers[name]) for numbers in columns))
            for name, (words, form) in MEASURES.items()
            if name in summary["errors"]
        ]
        return part_card(
            "Stereo encoder",
            "A rectified pair -> geometric features and the disparity of the left view, px (`StereoEncoderModel`).",
            ("depth-estimation", ["stereo", "disparity"]),
            "inputs = processor([left, right])  # PIL images or uint8 arrays",
            "disparity = model(**inputs).disparity[0]  # (height, width) px of the processed left view",
            summary,
            ("", "this model", *self.beside()),
            rows,
        )


# of the card, in its order: what each error is, and how it is written
MEASURES = {
    "end_point_px": ("end-point error, px", "{:.3f}"),
    "bad_2": ("off by more than 2 px", "{:.1%}"),
    "target_px": ("at the target, median, px", "{:.3f}"),
    "target_cm": ("at the target, median, cm of depth", "{:.2f}"),
    "gripper_px": ("at the gripper, median, px", "{:.3f}"),
    "gripper_cm": ("at the gripper, median, cm of depth", "{:.2f}"),
    "border_px": ("within 2 px of a border, mean, px", "{:.3f}"),
    "elsewhere_px": ("elsewhere, mean, px", "{:.3f}"),
}


def in_words(errors: dict[str, float]) -> str:
    text = f"end-point error {errors['end_point_px']:.2f} px, {100 * errors['bad_2']:.1f} % off by more than 2 px"
    if errors["beyond_range"]:
        text += f" ({100 * errors['beyond_range']:.1f} % beyond the volume left out)"
    for name in ("target", "gripper"):
        if f"{name}_cm" in errors:
            text += f", {name} {errors[f'{name}_cm']:.2f} cm ({errors[f'{name}_px']:.2f} px)"
    if "border_px" in errors:
        text += f", borders {errors['border_px']:.2f} px, elsewhere {errors['elsewhere_px']:.2f} px"
    return text


def train(options: StereoOptions) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    return run_stage(options, StereoTraining)
