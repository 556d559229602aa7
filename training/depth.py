"""Trains the depth expert alone, on pictures with true depth.

The loss is DepthVLA's (arXiv 2510.13375): the scale-invariant error of the log depth, of each picture.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from stereovla.command_line import option
from stereovla.dataset_builder.formats.depth_sets import FORMATS, LAYOUTS, open_depths
from stereovla.dataset_builder.formats.labelled_sets import Samples
from stereovla.modeling_stereovla import DepthExpertConfig, DepthExpertModel
from stereovla.modeling_stereovla.configuration_depthvla import stereo_encoder
from stereovla.modeling_stereovla.configuration_policy import with_overrides
from stereovla.modeling_stereovla.depth_loss import known_depth, scale_invariant_losses
from stereovla.processing import StereoImageProcessorPil, ViewImageProcessorPil
from stereovla.training.depth_errors import MEASURES, BestConstants, depth_errors, draw_depths
from stereovla.training.framing import DepthFraming
from stereovla.training.models import give_encoder, trained_depth_expert
from stereovla.training.options import at_least_one, config_fields
from stereovla.training.part_card import part_card
from stereovla.training.part_training import WINDOWS, PartOptions, PartTraining, run_stage

SAME_MODEL = 1e-3  # relative difference of depths of the same weights, by other kernels or orders of summation
FULL = "depthvla-full"
PRESETS: dict[str, dict[str, Any]] = {
    "depthvla-tiny": {"steps": 40, "batch_size": 8, "warmup_steps": 5, "checkpoint_every": 20},
    "depthvla-demo": {"steps": 1000, "batch_size": 16, "warmup_steps": 100},
    "depthvla-lab": {"steps": 4000, "batch_size": 16, "warmup_steps": 200, "checkpoint_every": 500},
    # not published for this part; those of fine-tuning Depth Anything V2 for metric depth are of this size
    FULL: {
        "steps": 100_000,
        "batch_size": 64,
        "learning_rate": 5e-5,
        "warmup_steps": 1000,
        "checkpoint_every": 1000,
        "mixed_precision": "bf16",
        "workers": 4,
    },
}


@dataclass(kw_only=True)
class DepthOptions(PartOptions):
    """Trains DepthVLA's depth expert, a DepthExpertModel. Options marked (preset) default to the preset's value."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    dataset: list[str] = field(
        metadata={
            "help": "Datasets of this project with depth, folders or Hub ids; of several, each may have a weight: "
            "PATH=0.3. With --format the folders of a set of others, or one dataset with columns."
        }
    )
    preset: str = option("depthvla-demo", "Size of model and run.", choices=list(PRESETS))
    format: str = option(
        WINDOWS,
        "What the dataset is; windows = of this project, folders = images/NAME.jpg beside depth/NAME.png, .tiff, .pfm, "
        ".npy, .npz or .hdf5.",
        choices=[WINDOWS, *FORMATS],
    )
    columns: str = option("image,depth", "Names of these columns, for --format columns.")
    depth_unit_m: float | None = option(
        None, "M per step of the depth (mm: 0.001); needed for --format folders and columns, the others know their own."
    )
    stereo: bool = option(False, "Give it our stereo encoder in place of the encoder of one view.")
    encoder: str | None = option(
        None,
        "Folder or Hub id with the encoder's weights: a Depth Anything checkpoint, a plain vision model, or with "
        "--stereo a stereo encoder.",
    )
    scale: str = option(
        "fit",
        "Pictures of other sizes are scaled until they just fill the model's, or keep their px; the rest is cut off.",
        choices=["fit", "native"],
    )
    silog_lambda: float = option(0.5, "Share of the squared mean error in log depth that the loss forgives.")
    validation_pictures: int = option(
        64, "Held-out pictures that are scored at a checkpoint; the best constants come from as many for training."
    )

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "validation_pictures")
        if not 0 <= self.silog_lambda <= 1:
            raise ValueError(f"--silog_lambda is {self.silog_lambda}; it must be in [0, 1]")
        if len(self.columns.split(",")) != 2:
            raise ValueError(f"--columns is {self.columns!r}; it needs two names, such as image,depth")
        if self.depth_unit_m is not None and not 0 < self.depth_unit_m < float("inf"):
            raise ValueError(f"--depth_unit_m is {self.depth_unit_m}; it must be above 0: mm are 0.001")
        if self.format == WINDOWS:
            if self.depth_unit_m is not None:
                raise ValueError(f"--depth_unit_m is {self.depth_unit_m}, but datasets of this project state theirs")
        elif self.depth_unit_m is None and (self.format not in LAYOUTS or LAYOUTS[self.format].unit_m is None):
            raise ValueError(f"--format {self.format} needs --depth_unit_m: 0.001 for mm, 1 for m")
        if self.model is not None and (self.stereo or self.encoder):
            raise ValueError(
                f"--model {self.model} has its own encoder, and its weights; leave --stereo and --encoder out"
            )
        if self.stereo and self.preset == FULL:
            raise ValueError(
                f"--stereo gives the small presets' stereo encoder, which is no match for {FULL}; valid with it: "
                f"{', '.join(name for name in PRESETS if name != FULL)}"
            )


def build(options: DepthOptions) -> DepthExpertModel:
    """The model as it is trained: of the preset's size, the same as in the preset's policy, or given."""
    torch.manual_seed(options.seed)
    if options.model is not None:
        model = trained_depth_expert(options.model)
        if model.config.input != "pictures":
            raise ValueError(
                f"{options.model} is shown depth (config.input = {model.config.input!r}): it has nothing to learn"
            )
        return model
    fields = with_overrides(stereo_encoder() if options.stereo else {}, config_fields(options.config))
    model = DepthExpertModel(DepthExpertConfig.from_preset(options.preset, **fields))
    if options.encoder is not None:
        give_encoder(model, options.encoder)
    return model


class DepthTraining(PartTraining):
    """Of the depth expert."""

    asked = "action"  # every row has one
    left_out = "unknown"

    def __init__(self, options: DepthOptions):
        model = build(options)
        size, stereo = model.config.image_size, model.stereo is not None
        if stereo and options.format != WINDOWS:
            raise ValueError(
                f"--format {options.format} has one view of each scene, and a stereo encoder needs the right one too; "
                "give datasets of this project (--format windows)"
            )
        views = ("left", "right") if stereo else ("left",)
        self.image_processor = StereoImageProcessorPil if stereo else ViewImageProcessorPil
        framing = DepthFraming(size, size, options.scale, options.zoom, views)
        super().__init__(options, model, framing, options.validation_pictures)
        known = self.samples("train", options.validation_pictures)["depth"]
        self.best = BestConstants.of(known, options.silog_lambda)
        self.constant_errors = self.best.errors(self.held_out["depth"], options.silog_lambda)

    def open_set(self, split: str) -> Samples:
        options = self.options
        names = options.columns.split(",")
        return open_depths(options.dataset, options.format, split, options.held_out, names, options.depth_unit_m)

    def loss(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        log_depth = model(inputs["pixel_values"]).log_depth[:, 0]
        return scale_invariant_losses(log_depth, inputs["depth"], self.options.silog_lambda).sum()

    def counted(self, truth: torch.Tensor) -> torch.Tensor:
        return known_depth(truth).any(-1).any(-1).sum()

    def pixels(self, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (~known_depth(truth)).sum(), truth.new_tensor(truth.numel())

    def predict_part(self, model, pixel_values: torch.Tensor) -> torch.Tensor:
        return model(pixel_values).depth[:, 0]

    def errors(self, predicted: torch.Tensor) -> dict[str, float]:
        return depth_errors(predicted, self.held_out["depth"], self.options.silog_lambda)

    def draw(self, path: Path, predicted: torch.Tensor) -> None:
        draw_depths(path, self.held_out["pixel_values"][:, 0], self.held_out["depth"], predicted)

    def difference(self, predicted: torch.Tensor, other: torch.Tensor) -> str:
        largest = float((predicted / other - 1).abs().max())
        return "" if largest <= SAME_MODEL else f"depths differ by {largest:.2g} (at most {SAME_MODEL:g} is rounding)"

    def summary(self, errors: dict[str, float]) -> dict[str, Any]:
        options, size = self.options, self.framing.width
        return {
            "summary": f"{options.steps:,} steps of {options.batch_size} pictures of {size} x {size} px, AdamW, peak "
            f"learning rate {options.learning_rate:g}, seed {options.seed}, "
            f"L_si with lambda {options.silog_lambda:g}.",
            "held_out_pictures": len(self.held_out["depth"]),
            "errors": errors,
            "best_constant": {
                name: {"m": self.best.constants[name], "error": error} for name, error in self.constant_errors.items()
            },
        }

    def in_words(self, errors: dict[str, float]) -> str:
        return f"held-out pictures: {in_words(errors)}; the best constants: {in_words(self.constant_errors)}"

    def card(self, summary: dict[str, Any]) -> str:
        rows = [
            (
                f"`{name}`, {meaning}",
                f"{summary['errors'][name]:.4f}",
                f"{self.constant_errors[name]:.4f} ({self.best.constants[name]:.3f} m)",
            )
            for name, meaning in MEASURES.items()
        ]
        stereo = len(self.framing.views) == 2
        return part_card(
            "Depth expert",
            f"{'A rectified pair' if stereo else 'A picture'} -> planar depth, m: the depth expert of DepthVLA (arXiv "
            "2510.13375), here alone (`DepthExpertModel`). `stereovla train --depth_expert` gives it to a policy.",
            ("depth-estimation", ["depth", *(["stereo"] if stereo else [])]),
            f"inputs = processor({'[left, right]' if stereo else 'picture'})  # PIL images or uint8 arrays",
            "depth = model(**inputs).depth[0, 0]  # (height, width) m of the processed view",
            summary,
            ("", "this model", "the best constant for each measure, from the training data"),
            rows,
        )


def in_words(errors: dict[str, float]) -> str:
    right = f"delta < 1.25 {100 * errors['delta_1_25']:.1f} %"
    return f"abs rel {errors['abs_rel']:.3f}, RMSE {errors['rmse_m']:.3f} m, {right}, L_si {errors['l_si']:.3f}"


def train(options: DepthOptions) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    return run_stage(options, DepthTraining)
