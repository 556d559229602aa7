"""Trains one part of a policy alone, on pictures with a true number for each pixel: what its stages have in common.

A stage is a subclass of `PartTraining`; the loop is `train`.
"""

import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from stereovla.command_line import option
from stereovla.dataset_builder.formats.labelled_sets import Samples, SampleStream, spread
from stereovla.dataset_builder.streaming.lanes import LaneStream
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.processing import StereoImageProcessorPil
from stereovla.training.checkpoint_folders import last_checkpoint
from stereovla.training.checkpoints import (
    Average,
    load_checkpoint,
    save_bad_batch,
    save_checkpoint,
    whole_tensors,
    write_tensors,
)
from stereovla.training.feed import Feed
from stereovla.training.framing import Framing, PictureBatches
from stereovla.training.losses import agree, to_device
from stereovla.training.options import RunOptions, at_least_one, augmentation, config_fields, dataset_mixture
from stereovla.training.processes import in_float32, join, prepare
from stereovla.training.running import append_line, end, forget_after, learning_rate, own_folder, seed_step, told_to_end

WINDOWS = "windows"  # the format of this project's datasets


@dataclass(kw_only=True)
class PartOptions(RunOptions):
    """What every such training can be told. Options marked (preset) default to the preset's value."""

    model: str | None = option(None, "Folder or Hub id of the part to start from; an untrained one if not given.")
    config: str = option(
        "{}",
        "Fields of an untrained part's config that are not the preset's, as JSON; of a config in it those named.",
    )
    held_out: float = option(0.05, "Share of the data that is held out where a set of others has no split validation.")
    zoom: float = option(1.0, "Training pictures are enlarged further by a random factor of up to this (preset).")
    augmentation: float = option(0.2, "Largest relative change of brightness, contrast and saturation of a picture.")
    batch_size: int = option(16, "Samples of one step, over all processes (preset).")
    flat_share: float = option(0.0, "Share of the steps at the peak, before the cosine to zero (preset).")
    freeze_batch_norm: bool = option(
        False, "Batch norm keeps the statistics that the model came with: for small batches on a trained model."
    )
    mixed_precision: str = option("no", "Arithmetic of the activations (preset).", choices=["no", "bf16"])
    pool_episodes: int = option(30, "Episodes of each of 8 lanes that are shuffled together, for --format windows.")
    workers: int = option(0, "Processes that prepare batches for each training process; 0 = itself (preset).")
    checkpoint_every: int = option(
        100, "Steps between two checkpoints, each with the errors on held-out samples (preset)."
    )

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "batch_size", "zoom")
        if config_fields(self.config) and self.model:
            raise ValueError(f"--config says how an untrained part is made, but {self.model} has its own config")
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out is {self.held_out}; it must be a share in (0, 1)")


class PartTraining(ABC):
    """A part, how it learns, and how wrong it is on held-out samples, which are on the CPU. Every process scores all of
    them, as each may hold but a part of the model.

    asked: an objective of this project's windows that needs no more of them than this part; it is not looked at.
    left_out: name in the log of the share of the pixels that have no part in loss and errors. image_processor: of the
    result. held_out: inputs as `Framing.collate` makes them.
    """

    asked: ClassVar[str]
    left_out: ClassVar[str]
    image_processor: type[StereoImageProcessorPil]

    def __init__(self, options: PartOptions, model: PreTrainedModel, framing: Framing, held_out: int):
        """
        Args:
            held_out: number of the held-out samples that are scored.
        """
        self.options, self.model, self.framing = options, model, framing
        self.held_out = self.samples("validation", held_out)

    # ------------------------------------------------------------------ data

    @abstractmethod
    def open_set(self, split: str) -> Samples:
        """A set of others, as the options name it."""

    def windows(self, split: str, **more: Any) -> WindowStream:
        """Windows of this project's datasets, with the depth of the left view."""
        unasked = {"mixture": {self.asked: 1.0}, "chunk_size": 1, "history": 1}
        return WindowStream(
            dataset_mixture(self.options.dataset),
            split,
            depth_map_share=1.0,
            views=self.framing.views,
            **unasked,
            **more,
        )

    def stream(self, rank: int, world_size: int) -> LaneStream:
        """Endless training samples of this process."""
        options = self.options
        share = {"seed": options.seed, "rank": rank, "world_size": world_size}
        if options.format == WINDOWS:
            return self.windows("train", pool_episodes=options.pool_episodes, **share)
        return SampleStream(self.open_set("train"), **share)

    def samples(self, split: str, count: int) -> dict[str, torch.Tensor]:
        """Inputs of some samples, cut from their middle: of random frames, or evenly spaced in a set of others."""
        if self.options.format == WINDOWS:
            found: Iterator[dict[str, Any]] = islice(self.windows(split, epochs=1), count)
        else:
            found = spread(self.open_set(split), count)
        return self.framing.collate([self.framing.apply(sample, random=False) for sample in found])

    # ------------------------------------------------------------------ learning

    @abstractmethod
    def loss(self, model, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the losses, of which `counted` is the number."""

    @abstractmethod
    def counted(self, truth: torch.Tensor) -> torch.Tensor:
        """How many losses true values (B, H, W) give."""

    @abstractmethod
    def pixels(self, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many pixels of true values (B, H, W) are left out, and of how many."""

    # ------------------------------------------------------------------ errors

    @abstractmethod
    def predict_part(self, model, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, H, W), as the true values."""

    @torch.no_grad()
    def predict(self, model, pixel_values: torch.Tensor, batch_size: int) -> torch.Tensor:
        """Predictions (B, H, W) float32 on the CPU, in evaluation mode."""
        trained = [module for module in model.modules() if module.training]  # not all: batch norm may be frozen
        model.eval()
        parts = [self.predict_part(model, part.to(model.device)) for part in pixel_values.split(batch_size)]
        for module in trained:
            module.training = True
        return torch.cat([part.float().cpu() for part in parts])

    def score(self, model, batch_size: int, picture: Path | None = None) -> dict[str, float]:
        """Errors on the held-out samples, and a picture of the first ones where one is asked for."""
        predicted = self.predict(model, self.held_out["pixel_values"], batch_size)
        if picture is not None:
            self.draw(picture, predicted)
        return self.errors(predicted)

    @abstractmethod
    def errors(self, predicted: torch.Tensor) -> dict[str, float]:
        """By name, of predictions (B, H, W) for the held-out samples."""

    @abstractmethod
    def draw(self, path: Path, predicted: torch.Tensor) -> None:
        """Writes a picture of the first held-out samples."""

    # ------------------------------------------------------------------ result

    @abstractmethod
    def difference(self, predicted: torch.Tensor, other: torch.Tensor) -> str:
        """In words how two predictions differ beyond rounding; "" = not."""

    @abstractmethod
    def summary(self, errors: dict[str, float]) -> dict[str, Any]:
        """What training.json says beside the options."""

    @abstractmethod
    def in_words(self, errors: dict[str, float]) -> str:
        """One line about the errors on held-out samples and the best constant's."""

    @abstractmethod
    def card(self, summary: dict[str, Any]) -> str:
        """README.md of the result; `summary` is what training.json says."""


def run_stage(options: PartOptions, stage: type[PartTraining]) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    accelerator = join(options.mixed_precision)
    with own_folder(options, accelerator) as complete, told_to_end() as told:
        return complete or train(stage(options), accelerator, told)


def train(stage: PartTraining, accelerator: Accelerator, told: list[int]) -> Path:
    """The training itself; it saves a checkpoint and ends where something comes into `told`."""
    options, model, truth = stage.options, stage.model, stage.framing.truth
    output = Path(options.output_dir)
    losses_file = output / "losses.jsonl"
    part_size = options.batch_size // (accelerator.num_processes * options.accumulation)
    stream = stage.stream(accelerator.process_index, accelerator.num_processes)
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
    batches = PictureBatches(stream, part_size, stage.framing, augmentation(options.augmentation))
    feed = Feed(batches, options.workers, step * options.accumulation)

    # since the last line of the log: steps, sum of their losses, pixels left out, and of how many
    sums, since, waited = torch.zeros(4, device=accelerator.device), time.perf_counter(), 0.0
    progress = tqdm(
        total=options.steps, initial=step, desc="training", disable=not accelerator.is_main_process, unit="step"
    )
    while step < options.steps:
        begin = time.perf_counter()
        parts = [feed.take()[0] for _ in range(options.accumulation)]
        waited += time.perf_counter() - begin
        parts = [to_device(part, accelerator) for part in parts]
        counts, _, stop = agree(accelerator, [{truth: stage.counted(part[truth])} for part in parts], bool(told))
        seed_step(options.seed, step, accelerator.process_index)
        rate = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate
        for number, part in enumerate(parts):
            with nullcontext() if number == len(parts) - 1 else accelerator.no_sync(model):
                loss = stage.loss(model, part) / counts[truth]
                accelerator.backward(loss)
            sums += torch.stack([loss.new_tensor(1 / len(parts)), loss.detach(), *stage.pixels(part[truth])])
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
            count, loss, left_out, pixels = accelerator.reduce(sums, reduction="sum").tolist()
            line = {"step": step, "lr": rate, "grad_norm": norm, "waiting": waited / seconds}
            line["samples_per_s"] = options.batch_size * options.log_every / seconds
            line |= {f"loss/{truth}": loss / count, stage.left_out: left_out / max(pixels, 1)}
            sums, waited = torch.zeros_like(sums), 0.0
            if accelerator.is_main_process:
                append_line(losses_file, line)
            progress.set_postfix(loss=f"{line[f'loss/{truth}']:.3f}")
        if step % options.checkpoint_every == 0 or step == options.steps or stop:
            if not stop:
                picture = output / f"{truth}.png" if accelerator.is_main_process else None
                errors = stage.score(unwrapped, part_size, picture)
                if accelerator.is_main_process:
                    numbers = {f"validation/{name}": value for name, value in errors.items()}
                    append_line(losses_file, {"step": step} | numbers)
            keep = options.keep_checkpoints
            folder = save_checkpoint(output, keep, accelerator, model, optimizer, average, step, feed)
            if stop:
                accelerator.print(f"told to end: {folder.name} is saved, the same command goes on from it")
                end(told)
    progress.close()

    save_result(stage, accelerator, model, part_size)
    accelerator.print(f"trained model: {options.result}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return options.result


def save_result(stage: PartTraining, accelerator: Accelerator, model, part_size: int) -> None:
    """Writes the folder of the result, with its errors and one prediction, all of it or nothing."""
    state = whole_tensors(model)
    unwrapped, options, truth = accelerator.unwrap_model(model), stage.options, stage.framing.truth
    sample = stage.held_out["pixel_values"][:1]
    # whoever loads the folder can compare: a load that succeeds is not yet a load of these weights
    with in_float32(unwrapped):
        errors = stage.score(unwrapped, part_size)
        predicted = stage.predict(unwrapped, sample, 1)
    if not accelerator.is_main_process:
        return
    partial = options.result.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    unwrapped.save_pretrained(partial, state_dict=state)
    height, width = stage.framing.height, stage.framing.width
    stage.image_processor(size={"height": height, "width": width}).save_pretrained(partial)
    loaded = stage.predict(type(unwrapped).from_pretrained(partial).to(unwrapped.device), sample, 1)
    if difference := stage.difference(loaded, predicted):
        raise RuntimeError(
            f"{partial} was saved, but loaded again it is another model: {difference}; please report this"
        )
    write_tensors(partial / "reference_prediction.safetensors", {"pixel_values": sample, truth: predicted})
    summary = stage.summary(errors) | {"options": asdict(options)}
    (partial / "training.json").write_text(json.dumps(summary, indent=2))
    (partial / "README.md").write_text(stage.card(summary))
    os.replace(partial, options.result)
    print(stage.in_words(errors))
