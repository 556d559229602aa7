"""Makes answers in words better by their rewards: boxes by their overlap, depths by their error; TRL's GRPOTrainer."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from datasets import IterableDataset
from trl import GRPOConfig, GRPOTrainer

from stereovla.command_line import option
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.questions import processor_arguments
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.training.checkpoint_folders import last_checkpoint
from stereovla.training.models import Processor, towers_of
from stereovla.training.options import at_least_one, dataset_mixture, with_depthvla
from stereovla.training.rewards import box_reward, depth_reward
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
from stereovla.training.terms import HELD_OUT, Contents, questions, terms

OBJECTIVES = ("depth", "box")
MIXTURE = "1:1"
BOX_TOKENS = 4  # of a view, and no end-of-sequence
ANSWER_TOKENS = 16  # room for a depth such as "[0.53]" and its end, even where every character is a token
PRESETS = with_depthvla(
    {
        "tiny": {
            "steps": 20,
            "questions": 4,
            "learning_rate": 5e-4,
            "warmup_steps": 2,
            "checkpoint_every": 10,
            "log_every": 1,
        },
        "demo": {"steps": 150, "questions": 8, "learning_rate": 1e-4, "warmup_steps": 10, "checkpoint_every": 50},
        "full": {
            "steps": 2000,
            "questions": 64,
            "learning_rate": 1e-6,
            "warmup_steps": 50,
            "mixed_precision": "bf16",
            "gradient_checkpointing": True,
        },
    }
)


@dataclass(kw_only=True)
class RewardOptions(StageOptions):
    """Reward fine-tuning: the model answers each question several times, and what is better than the mean of these
    answers becomes more likely. Options marked (preset) default to the preset's value.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    questions: int = option(8, "Questions of one step, over all processes (preset).")
    answers: int = option(8, "Answers to each, which are compared with one another.")
    temperature: float = option(1.0, "Temperature that answers are drawn with.")
    mixture: str | None = option(
        None, f"Shares of depth : box questions. Not given: of {MIXTURE} what the data can answer."
    )
    validation_questions: int = option(64, "Held-out questions, scored before the first step and at checkpoints.")

    def __post_init__(self):
        super().__post_init__()
        if self.model is None:
            raise ValueError("--model is missing: rewards improve the answers of a trained model")
        if self.answers < 2:
            raise ValueError(f"--answers is {self.answers}; it must be at least 2, to be compared with one another")
        at_least_one(self, "questions", "validation_questions")

    @property
    def batch_size(self) -> int:
        """Answers of one step, over all processes."""
        return self.questions * self.answers


def check_model(config: Any, source: str) -> None:
    """ValueError for a DepthVLA whose answers this stage cannot draw or score."""
    if not hasattr(config, "mask"):
        return
    several, whole = len(config.views) > 1, config.depth_config is not None and config.mask == "full"
    names = ", ".join(config.views)
    reasons = {
        f"sees the views {names}, of which some may be absent, and TRL's trainer hands on one": several,
        "is shown the true depth, and TRL's trainer hands on pictures alone": config.reads_depth,
        "has the mask 'full', with which answers cannot be drawn from a cache": whole,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ValueError(
            f"{source} cannot learn from rewards: it {found[0]}. `stereovla pretrain grounding` teaches it answers"
        )


def box_tokens(processor: Processor) -> int:
    """Of an answer about all sides that are asked for."""
    return BOX_TOKENS * (2 if "right" in processor.pixel_views else 1)


def question_inputs(processor: Processor, windows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the model is asked about windows, without the answers: input_ids and attention_mask (B, L), padded on the
    left, and pixel_values (B, P, 3, H, W).
    """
    given = processor_arguments(windows, processor.pixel_views)
    asked = {name: given[name] for name in ("images", "text", "embodiment", "objective", "points_px")}
    inputs = processor(**asked, check_stereo=False)
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def reward_functions(processor: Processor) -> list:
    """TRL's reward functions "box" and "depth", each None for the other's questions; a prompt is a window."""

    def box(prompts: list[dict], completion_ids: list[list[int]], **_) -> list[float | None]:
        return [
            score_box(processor, window, ids) if window["objective"] == "box" else None
            for window, ids in zip(prompts, completion_ids, strict=True)
        ]

    def depth(prompts: list[dict], completion_ids: list[list[int]], **_) -> list[float | None]:
        answers = processor.decode_depths(completion_ids)
        return [
            depth_reward(answer, window["depths_m"]) if window["objective"] == "depth" else None
            for window, answer in zip(prompts, answers, strict=True)
        ]

    return [box, depth]


def score_box(processor: Processor, window: dict[str, Any], ids: list[int]) -> float:
    """Reward of generated ids as the boxes of a window's target."""
    size = box_tokens(processor)
    padded = [*ids, *[processor.tokenizer.pad_token_id] * size][:size]
    boxes, valid = processor.decode_boxes([padded], source_size=window["left"].shape[:2])
    return box_reward(boxes[0], bool(valid[0]), window["boxes"][: len(boxes[0])])


class RewardTrainer(LoadedBefore, GRPOTrainer):
    """GRPOTrainer whose prompts are windows. Its own way with images is made for single ones in chat messages."""

    def _tokenize_prompts(self, prompts: list[dict]):
        self.windows = prompts
        inputs = question_inputs(self.processing_class, prompts)
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        pixel_values = inputs["pixel_values"].to(self.accelerator.device)
        self.pairs = {"pixel_values": pixel_values, "num_images": [pixel_values.shape[1]] * len(prompts)}
        return [ids[mask.bool()].tolist() for ids, mask in rows], None, {"pixel_values": pixel_values}

    def _generate_single_turn(self, *arguments, **keywords):
        answers, log_probabilities = super()._generate_single_turn(*arguments, **keywords)
        # what the model writes after a box means nothing and was never trained
        size = box_tokens(self.processing_class)
        ends = [size if window["objective"] == "box" else ANSWER_TOKENS for window in self.windows]
        return [ids[:end] for ids, end in zip(answers, ends, strict=True)], log_probabilities

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        # shuffled and split together with the answers
        return super()._generate_and_score_completions(inputs) | self.pairs

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *rest, **keywords):
        if keywords.get("pixel_values") is None:  # answers are scored that were only just drawn
            keywords |= self.pairs
        if "token_type_ids" in self.processing_class.model_input_names:  # what is written does not see what follows
            types = torch.zeros_like(input_ids)
            types[:, -logits_to_keep:] = 1
            keywords["token_type_ids"] = types
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *rest, **keywords
        )


def train(options: RewardOptions) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    state = this_process()
    with own_folder(options, state) as complete:
        return complete or run(options, state)


def run(options: RewardOptions, state: PartialState) -> Path:
    """The training itself."""
    checkpoint = last_checkpoint(Path(options.output_dir), state)
    datasets = dataset_mixture(options.dataset)
    meta, data = load_meta(datasets), Contents.of(datasets)
    config = starting_config(options)
    check_model(config, options.model)
    asked = questions(data, options.mixture, MIXTURE, options.depth_points, OBJECTIVES, 0, config.pixel_views)
    if lacking := data.without_split(HELD_OUT):
        raise ValueError(f"{lacking} has no split {HELD_OUT!r}: rewards are judged on questions that are not learned")
    state.print(terms(data, asked, f"{options.validation_questions} held-out questions"))
    model, processor = starting_model(options, checkpoint, meta)
    # in training mode their batch norms would answer differently when answers are drawn and when they are scored
    freeze_unused(model, towers_of(model))
    shared = asked.windows(config)
    stream = WindowStream(datasets, split="train", seed=options.seed, pool_episodes=options.pool_episodes, **shared)
    held_out = WindowStream(datasets, split=HELD_OUT, seed=0, **shared)
    unseen = list(islice(held_out, options.validation_questions))
    files = RunFiles(options, checkpoint)
    trainer = RewardTrainer(
        model=model,
        reward_funcs=reward_functions(processor),
        args=GRPOConfig(
            **trainer_arguments(options),
            num_generations=options.answers,
            max_completion_length=ANSWER_TOKENS,
            temperature=options.temperature,
            shuffle_dataset=False,  # the stream is
            eval_strategy="steps",
            eval_steps=options.checkpoint_every,
            eval_on_start=checkpoint is None,
            num_generations_eval=1,
            per_device_eval_batch_size=part_size(options),
        ),
        train_dataset=IterableDataset.from_generator(lambda: ({"prompt": window} for window in stream)),
        eval_dataset=IterableDataset.from_generator(lambda: ({"prompt": window} for window in unseen)),
        processing_class=processor,
        callbacks=[files],
    )
    frames = meta["splits"]["train"]["frames"]
    summary = {
        "summary": f"{options.steps:,} reward steps (TRL's GRPOTrainer) of {options.questions} questions about "
        f"{frames:,} frames with {options.answers} answers each, AdamW, peak learning rate "
        f"{options.learning_rate:g}, seed {options.seed}.",
        "mixture": asked.text,
    }
    return finish(trainer, files, processor, unseen[0], summary)
