"""Trains the stereo encoder alone, on pairs with true disparity.

Smooth L1 on the initial disparity at a quarter of the resolution, as FoundationStereo trains it (arXiv 2501.09898,
section 3.4) before its refinement, which StereoVLA does not use.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from stereovla.command_line import option
from stereovla.dataset_builder.formats.disparity_sets import FORMATS, PairStream, open_pairs
from stereovla.dataset_builder.streaming.lanes import LaneStream
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import StereoEncoderModel, StereoVLAConfig
from stereovla.modeling_stereovla.cost_volume import disparity_loss, known_disparity
from stereovla.processing import StereoImageProcessorPil
from stereovla.training.checkpoint_folders import last_checkpoint
from stereovla.training.checkpoints import (
    WHOLE,
    Average,
    load_checkpoint,
    save_bad_batch,
    save_checkpoint,
    write_tensors,
)
from stereovla.training.disparity_errors import (
    PICTURE_PAIRS,
    best_constant,
    draw_disparities,
    error_numbers,
    error_sums,
)
from stereovla.training.feed import Feed
from stereovla.training.losses import agree, to_device
from stereovla.training.models import trained_stereo_encoder
from stereovla.training.options import RunOptions, at_least_one, augmentation, dataset_mixture
from stereovla.training.processes import join, prepare
from stereovla.training.running import (
    append_line,
    end,
    forget_after,
    learning_rate,
    own_folder,
    seed_step,
    told_to_end,
)
from stereovla.training.stereo_pairs import Framing, PairBatches, collate

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------

SAME_MODEL_PX = 1e-2  # disparities of the same weights, by other kernels or orders of summation
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"height": 64, "width": 64, "steps": 40, "batch_size": 8, "warmup_steps": 5, "checkpoint_every": 20},
    "demo": {"height": 96, "width": 96, "zoom": 1.3, "steps": 1000, "batch_size": 16, "warmup_steps": 100},
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


@dataclass(kw_only=True)
class StereoOptions(RunOptions):
    """Trains a StereoEncoderModel. Options marked (preset) default to the preset's value."""

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    dataset: list[str] = field(
        metadata={
            "help": "Datasets of this project, folders or Hub ids; of several, each may have a weight: PATH=0.3. With "
            "--format the folders of a stereo set, or one dataset with columns."
        }
    )
    preset: str = option("demo", "Size of model and run.", choices=list(PRESETS))
    format: str = option("windows", "What the dataset is; windows = of this project.", choices=["windows", *FORMATS])
    columns: str = option("left,right,disparity", "Names of these columns, for --format columns.")
    disparity_unit: float = option(1.0, "Px per step of the disparity column; KITTI's PNG has 1/256 = 0.00390625.")
    held_out: float = option(0.05, "Share of the pairs that is held out where a stereo set has no split validation.")
    model: str | None = option(None, "Folder or Hub id of a stereo encoder to start from; untrained if not given.")
    max_disparity: int = option(0, "Largest disparity in px, exclusive, a multiple of 32; 0 = the model's own.")
    height: int = option(96, "Height of the training pairs, px, a multiple of 32 (preset).")
    width: int = option(96, "Width of the training pairs, px, a multiple of 32 (preset).")
    scale: str = option(
        "fit",
        "Pairs of other sizes are scaled until they just fill height and width, or keep their px; the rest is cut off.",
        choices=["fit", "native"],
    )
    zoom: float = option(1.0, "Training pairs are enlarged further by a random factor of up to this (preset).")
    augmentation: float = option(0.2, "Largest relative change of brightness, contrast and saturation of a pair.")
    batch_size: int = option(16, "Pairs of one step, over all processes (preset).")
    flat_share: float = option(0.0, "Share of the steps at the peak, before the cosine to zero (preset).")
    freeze_batch_norm: bool = option(
        False, "Batch norm keeps the statistics that the model came with: for small batches on a trained model."
    )
    mixed_precision: str = option("no", "Arithmetic of the activations (preset).", choices=["no", "bf16"])
    pool_episodes: int = option(30, "Episodes of each of 8 lanes that are shuffled together, for --format windows.")
    workers: int = option(0, "Processes that prepare batches for each training process; 0 = itself (preset).")
    checkpoint_every: int = option(
        100, "Steps between two checkpoints, each with the errors on held-out pairs (preset)."
    )
    validation_pairs: int = option(64, "Held-out pairs that are scored at a checkpoint.")

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "batch_size", "validation_pairs", "zoom")
        for name in ("height", "width"):
            if getattr(self, name) < 32 or getattr(self, name) % 32:
                raise ValueError(f"--{name} is {getattr(self, name)} px; it must be a multiple of 32")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out is {self.held_out}; it must be a share in (0, 1)")
        if len(self.columns.split(",")) != 3:
            raise ValueError(f"--columns is {self.columns!r}; it needs three names, such as left,right,disparity")

    @property
    def framing(self) -> Framing:
        return Framing(self.height, self.width, self.scale, self.zoom)


# ----------------------------------------------------------------------------------------------------------------------
# Model and data
# ----------------------------------------------------------------------------------------------------------------------


def build(options: StereoOptions) -> StereoEncoderModel:
    """The model as it is trained: of the preset's size, the same as in the preset's policy, or given."""
    torch.manual_seed(options.seed)
    fields = {"max_disparity": options.max_disparity} if options.max_disparity else {}
    if options.model is not None:
        return trained_stereo_encoder(options.model, **fields)
    config = StereoVLAConfig.from_preset(options.preset).stereo_config
    if config.depth_anything_config is not None:
        raise ValueError(
            f"--preset {options.preset} has FoundationStereo's frozen monocular features, which must come trained: "
            "give --model FOLDER, such as `stereovla convert foundationstereo` writes"
        )
    return StereoEncoderModel(type(config)(**{**config.to_dict(), **fields}))


def training_stream(options: StereoOptions, rank: int, world_size: int) -> LaneStream:
    """Endless training pairs of this process."""
    share = {"seed": options.seed, "rank": rank, "world_size": world_size}
    if options.format == "windows":
        return windows(options, "train", pool_episodes=options.pool_episodes, **share)
    return PairStream(stereo_set(options, "train"), **share)


def held_out_pairs(options: StereoOptions) -> Iterator[dict[str, Any]]:
    """The held-out pairs that are scored: of random frames, or evenly spaced in a stereo set."""
    if options.format == "windows":
        return islice(windows(options, "validation", epochs=1), options.validation_pairs)
    pairs = stereo_set(options, "validation")
    chosen = np.linspace(0, len(pairs) - 1, min(len(pairs), options.validation_pairs)).round()
    return (pairs[int(index)] for index in chosen)


def windows(options: StereoOptions, split: str, **more: Any) -> WindowStream:
    # camera questions need no more than disparity: a calibrated pair; they are not looked at
    unasked = {"mixture": {"camera": 1.0}, "chunk_size": 1, "history": 1}
    return WindowStream(dataset_mixture(options.dataset), split, depth_map_share=1.0, **unasked, **more)


def stereo_set(options: StereoOptions, split: str) -> Any:
    return open_pairs(
        options.dataset, options.format, split, options.held_out, options.columns.split(","), options.disparity_unit
    )


# ----------------------------------------------------------------------------------------------------------------------
# Held-out errors
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Disparities (B, H, W) px on the CPU of pairs (B, 2, 3, H, W), in evaluation mode."""
    trained = [module for module in model.modules() if module.training]  # not all: batch norm may be frozen
    model.eval()
    parts = [model(part.to(model.device)).disparity.float().cpu() for part in pixel_values.split(batch_size)]
    for module in trained:
        module.training = True
    return torch.cat(parts)


class HeldOut:
    """Pairs that are not learned from, on the CPU. Every process scores all of them, as each may hold but a part of the
    model.
    """

    def __init__(self, options: StereoOptions, max_disparity: int, batch_size: int):
        self.pairs = collate([options.framing.apply(pair, random=False) for pair in held_out_pairs(options)])
        self.max_disparity, self.batch_size = max_disparity, batch_size
        self.constant = best_constant(self.pairs["disparity"], max_disparity)
        self.constant_errors = error_numbers(error_sums(self.constant, self.pairs["disparity"], max_disparity))

    def score(self, model, picture: Path | None) -> dict[str, float]:
        """Errors, and a picture of the first pairs where one is asked for."""
        predicted = predict(model, self.pairs["pixel_values"], self.batch_size)
        if picture is not None:
            left, truth = self.pairs["pixel_values"][:PICTURE_PAIRS, 0], self.pairs["disparity"][:PICTURE_PAIRS]
            draw_disparities(picture, left, truth, predicted[:PICTURE_PAIRS])
        return error_numbers(error_sums(predicted, self.pairs["disparity"], self.max_disparity))


# ----------------------------------------------------------------------------------------------------------------------
# Loop
# ----------------------------------------------------------------------------------------------------------------------


def save_result(folder: Path, accelerator: Accelerator, model, options: StereoOptions, held_out: HeldOut) -> None:
    """Writes the folder of the result, with its errors and one prediction, all of it or nothing."""
    state = get_model_state_dict(model, options=WHOLE)
    unwrapped = accelerator.unwrap_model(model)
    errors = held_out.score(unwrapped, picture=None)
    # whoever loads the folder can compare: a load that succeeds is not yet a load of these weights
    pair = held_out.pairs["pixel_values"][:1]
    disparity = predict(unwrapped, pair, 1)
    if not accelerator.is_main_process:
        return
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    unwrapped.save_pretrained(partial, state_dict=state)
    StereoImageProcessorPil(size={"height": options.height, "width": options.width}).save_pretrained(partial)
    loaded = predict(StereoEncoderModel.from_pretrained(partial).to(unwrapped.device), pair, 1)
    if not (difference := float((loaded - disparity).abs().max())) <= SAME_MODEL_PX:
        raise RuntimeError(
            f"{partial} was saved, but loaded again its disparities differ by {difference:.2g} px (at most "
            f"{SAME_MODEL_PX:g} is rounding) from those of the trained model; please report this"
        )
    write_tensors(partial / "reference_prediction.safetensors", {"pixel_values": pair, "disparity": disparity})
    summary = {
        "summary": f"{options.steps:,} steps of {options.batch_size} pairs of {options.height} x {options.width} px, "
        f"AdamW, peak learning rate {options.learning_rate:g}, seed {options.seed}.",
        "held_out_pairs": len(held_out.pairs["disparity"]),
        "errors": errors,
        "best_constant": {"px": held_out.constant, **held_out.constant_errors},
        "options": asdict(options),
    }
    (partial / "training.json").write_text(json.dumps(summary, indent=2))
    os.replace(partial, folder)
    print(f"held-out pairs: {in_words(errors)}; the best constant: {in_words(held_out.constant_errors)}")


def in_words(errors: dict[str, float]) -> str:
    text = f"end-point error {errors['end_point_px']:.2f} px, {100 * errors['bad_2']:.1f} % off by more than 2 px"
    if errors["beyond_range"]:
        text += f" ({100 * errors['beyond_range']:.1f} % beyond the volume left out)"
    return text


def train(options: StereoOptions) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    accelerator = join(options.mixed_precision)
    with own_folder(options, accelerator) as complete, told_to_end() as told:
        return complete or run(options, accelerator, told)


def run(options: StereoOptions, accelerator: Accelerator, told: list[int]) -> Path:
    """The training itself; it saves a checkpoint and ends where something comes into `told`."""
    output = Path(options.output_dir)
    result, losses_file = output / "model", output / "losses.jsonl"
    model = build(options)
    max_disparity = model.config.max_disparity
    part_size = options.batch_size // (accelerator.num_processes * options.accumulation)
    stream = training_stream(options, accelerator.process_index, accelerator.num_processes)
    held_out = HeldOut(options, max_disparity, part_size)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        fused=True,
    )
    model, optimizer = prepare(accelerator, model, optimizer)
    unwrapped, average = accelerator.unwrap_model(model), Average(model, 0.0)
    model.train()
    for module in model.modules():
        if options.freeze_batch_norm and isinstance(module, _BatchNorm):
            module.eval()

    step = 0
    if found := last_checkpoint(output, accelerator):
        step = load_checkpoint(found, accelerator, model, optimizer, average, stream)
        accelerator.print(f"going on from {found.name}")
    if accelerator.is_main_process:
        forget_after(losses_file, step)
    batches = PairBatches(stream, part_size, options.framing, augmentation(options.augmentation))
    feed = Feed(batches, options.workers, step * options.accumulation)

    # since the last line of the log: steps, sum of their losses, pixels beyond the volume, known pixels
    sums, since, waited = torch.zeros(4, device=accelerator.device), time.perf_counter(), 0.0
    progress = tqdm(
        total=options.steps, initial=step, desc="training", disable=not accelerator.is_main_process, unit="step"
    )
    while step < options.steps:
        begin = time.perf_counter()
        parts = [feed.take()[0] for _ in range(options.accumulation)]
        waited += time.perf_counter() - begin
        parts = [to_device(part, accelerator) for part in parts]
        known = [{"disparity": known_disparity(part["disparity"], max_disparity)[1].sum()} for part in parts]
        counts, _, stop = agree(accelerator, known, bool(told))
        seed_step(options.seed, step, accelerator.process_index)
        rate = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for number, part in enumerate(parts):
            with nullcontext() if number == len(parts) - 1 else accelerator.no_sync(model):
                predicted = model(part["pixel_values"]).initial_disparity
                loss = disparity_loss(predicted, part["disparity"], max_disparity) / counts["disparity"]
                accelerator.backward(loss)
            beyond, seen = (part["disparity"] >= max_disparity).sum(), (part["disparity"] > 0).sum()
            sums += torch.stack([loss.new_tensor(1 / len(parts)), loss.detach(), beyond, seen])
        norm = float(accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm))
        if not norm < float("inf"):
            path = save_bad_batch(output, step, accelerator.process_index, parts)
            raise FloatingPointError(f"the gradient norm is {norm} at step {step}; its batch is saved as {path}")
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        if step % options.log_every == 0:
            seconds, since = time.perf_counter() - since, time.perf_counter()
            count, loss, beyond, seen = accelerator.reduce(sums, reduction="sum").tolist()
            line = {"step": step, "lr": rate, "grad_norm": norm, "waiting": waited / seconds}
            line["samples_per_s"] = options.batch_size * options.log_every / seconds
            line |= {"loss/disparity": loss / count, "beyond_range": beyond / max(seen, 1)}
            sums, waited = torch.zeros_like(sums), 0.0
            if accelerator.is_main_process:
                append_line(losses_file, line)
            progress.set_postfix(loss=f"{line['loss/disparity']:.3f}")
        if step % options.checkpoint_every == 0 or step == options.steps or stop:
            if not stop:
                picture = output / "disparity.png" if accelerator.is_main_process else None
                errors = held_out.score(unwrapped, picture)
                if accelerator.is_main_process:
                    numbers = {f"validation/{name}": value for name, value in errors.items()}
                    append_line(losses_file, {"step": step} | numbers)
            keep = options.keep_checkpoints
            folder = save_checkpoint(output, keep, accelerator, model, optimizer, average, step, feed)
            if stop:
                accelerator.print(f"told to end: {folder.name} is saved, the same command goes on from it")
                end(told)
    progress.close()

    save_result(result, accelerator, model, options, held_out)
    accelerator.print(f"trained model: {result}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result
