"""Teaches the language side to see: boxes, depths, poses and camera parameters as answers, by TRL's SFTTrainer."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from datasets import IterableDataset
from trl import SFTConfig, SFTTrainer

from stereovla.command_line import option
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.questions import processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.training.checkpoint_folders import last_checkpoint, step_of
from stereovla.training.checkpoints import load_stream
from stereovla.training.feed import Batches, Feed
from stereovla.training.losses import validate
from stereovla.training.options import at_least_one, dataset_mixture, with_depthvla
from stereovla.training.running import own_folder
from stereovla.training.stage import (
    LoadedBefore,
    RunFiles,
    StageOptions,
    finish,
    freeze_unused,
    part_size,
    starting_config,
    starting_model,
    this_process,
    trainer_arguments,
)
from stereovla.training.terms import (
    HELD_OUT,
    Contents,
    batches_in_words,
    depth_map_share,
    held_out_batches,
    questions,
    terms,
)

OBJECTIVES = ("depth", "box", "pose", "camera")
MIXTURE = "2:2:1:1"
VALIDATION_BATCHES = 4
# what answers in words are learned from
INPUTS = ("pixel_values", "input_ids", "attention_mask", "labels")
ALSO = ("view_mask", "token_type_ids", "depth_map")  # where a policy has them
PRESETS = with_depthvla(
    {
        "tiny": {"steps": 20, "batch_size": 8, "warmup_steps": 5, "checkpoint_every": 10, "log_every": 1},
        "demo": {"steps": 300, "batch_size": 48, "learning_rate": 1e-3, "warmup_steps": 30},
        "full": {
            "steps": 20_000,
            "batch_size": 384,
            "learning_rate": 1e-4,
            "warmup_steps": 1000,
            "checkpoint_every": 1000,
            "freeze": "semantic,spatial,stereo",
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
            "workers": 4,
        },
    }
)


@dataclass(kw_only=True)
class GroundingOptions(StageOptions):
    """Grounding: the model learns to answer where things are, how far away, and how the cameras stand. Without --model
    an untrained one of the preset's size. Options marked (preset) default to the preset's value.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    batch_size: int = option(48, "Samples of one step, over all processes (preset).")
    mixture: str | None = option(
        None,
        f"Shares of depth : box : pose : camera questions. Not given: of {MIXTURE} what the data can answer.",
    )
    freeze: str = option("", "Parts that are not trained, separated by commas (preset); those of actions never are.")
    workers: int = option(0, "Processes that prepare batches for each training process; 0 = itself (preset).")
    validation_batches: int | None = option(
        None,
        f"Held-out batches that are scored before the first step and at checkpoints. Not given: {VALIDATION_BATCHES}, "
        "or 0 where the data has no held-out split.",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "batch_size")


class AnswerBatches(Batches):
    """Batches of what answers in words are learned from, and nothing else."""

    def collate(self, windows: list[dict]) -> dict[str, torch.Tensor]:
        inputs = self.processor(**processor_arguments(windows, self.processor.pixel_views))
        return {name: inputs[name] for name in (*INPUTS, *(name for name in ALSO if name in inputs))}


class GroundingTrainer(LoadedBefore, SFTTrainer):
    """SFTTrainer of batches that come ready, each process's own, from a feed that knows its place in the stream."""

    def __init__(self, feed: Feed, **arguments):
        self.feed = feed
        super().__init__(**arguments)

    def get_train_dataloader(self) -> Feed:
        return self.feed


def train(options: GroundingOptions) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    state = this_process()
    with own_folder(options, state) as complete:
        return complete or run(options, state)


def run(options: GroundingOptions, state: PartialState) -> Path:
    """The training itself."""
    checkpoint = last_checkpoint(Path(options.output_dir), state)
    datasets = dataset_mixture(options.dataset)
    meta, data = load_meta(datasets), Contents.of(datasets)
    config = starting_config(options)
    views = config.pixel_views
    asked = questions(data, options.mixture, MIXTURE, options.depth_points, OBJECTIVES, 0, views)
    # for the model's eyes, not a loss
    shown = depth_map_share(data, None, 0.0, 0.0, calibrated=False, shown=config.reads_depth)
    validation_batches = held_out_batches(data, options.validation_batches, VALIDATION_BATCHES)
    state.print(terms(data, asked, batches_in_words(validation_batches)))
    model, processor = starting_model(options, checkpoint, meta)
    freeze_unused(model, list(filter(None, options.freeze.split(","))))
    shared = asked.windows(config) | {"depth_map_share": shown}
    place = {"pool_episodes": options.pool_episodes, "rank": state.process_index, "world_size": state.num_processes}
    stream = WindowStream(datasets, split="train", seed=options.seed, **place, **shared)
    if checkpoint is not None:
        load_stream(checkpoint, stream)
    size = part_size(options)
    taken = 0 if checkpoint is None else step_of(checkpoint) * options.accumulation
    feed = Feed(AnswerBatches(stream, size, processor, model.config), options.workers, taken)
    unseen = WindowStream(datasets, split=HELD_OUT if validation_batches else "train", seed=0, **shared)
    batches = AnswerBatches(unseen, size, processor, model.config)
    held_out = list(islice((batch for batch in batches if batch[0] is not None), max(1, validation_batches)))

    def validation() -> dict[str, float]:
        return validate(trainer.accelerator, model, held_out, len(held_out))

    files = RunFiles(options, checkpoint, feed, validation if validation_batches else None)
    trainer = GroundingTrainer(
        feed,
        model=model,
        args=SFTConfig(
            **trainer_arguments(options),
            ignore_data_skip=True,  # the feed begins where the checkpoint was saved
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
        ),
        # not trained on: SFTTrainer looks at the names in the first row
        train_dataset=IterableDataset.from_generator(lambda: (inputs for inputs, _, _ in held_out)),
        data_collator=lambda batch: batch,
        processing_class=processor,
        callbacks=[files],
    )
    frames = meta["splits"]["train"]["frames"]
    summary = {
        "summary": f"{options.steps:,} grounding steps (TRL's SFTTrainer) of {options.batch_size} questions about "
        f"{frames:,} frames, AdamW, peak learning rate {options.learning_rate:g}, seed {options.seed}.",
        "mixture": asked.text,
    }
    return finish(trainer, files, processor, next(iter(unseen)), summary)
