"""Trains StereoVLA, DepthVLA or pi0 on streamed datasets with Accelerate: options, model, data, checkpoints, loop."""

import shutil
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm

from stereovla.command_line import execute, json_object, option
from stereovla.dataset_builder.streaming.mixture import load_meta
from stereovla.dataset_builder.streaming.window_stream import WindowStream
from stereovla.modeling_stereovla import PI0Policy
from stereovla.modeling_stereovla.configuration_depthvla import DEPTH_INPUTS, MASKS, stereo_encoder
from stereovla.sources import adapted_model
from stereovla.training.adapters import lora_config, trained_adapter
from stereovla.training.checkpoint_folders import checkpoints, last_checkpoint
from stereovla.training.checkpoints import Average, load_checkpoint, save_bad_batch, save_checkpoint, whole_tensors
from stereovla.training.feed import Batches, Feed
from stereovla.training.losses import LossMeans, agree, answer_counts, answer_weights, to_device, validate
from stereovla.training.models import (
    Policy,
    Processor,
    blocks,
    give_depth_expert,
    give_stereo_encoder,
    give_vlm,
    towers_of,
    trained,
    untrained,
)
from stereovla.training.options import (
    RunOptions,
    at_least_one,
    augmentation,
    config_fields,
    dataset_mixture,
    with_depthvla,
    with_pi0,
)
from stereovla.training.processes import join, prepare
from stereovla.training.result import complete, predict_one
from stereovla.training.running import (
    append_line,
    end,
    forget_after,
    learning_rate,
    own_folder,
    seed_step,
    told_to_end,
)
from stereovla.training.terms import (
    HELD_OUT,
    Contents,
    batches_in_words,
    depth_map_share,
    frames_in_words,
    held_out_batches,
    questions,
    questions_per_frame,
    terms,
)

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------

PRESETS = {
    "tiny": {"steps": 20, "batch_size": 8, "warmup_steps": 5, "checkpoint_every": 10, "log_every": 1},
    "demo": {"steps": 1600, "batch_size": 48, "learning_rate": 1e-3, "warmup_steps": 100},
    # with --stereo_encoder, one of `stereovla pretrain stereo --preset points`
    "points": {
        "steps": 350,
        "batch_size": 48,
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "checkpoint_every": 100,
        "freeze": "stereo",
        "mixture": "1:0:0:0",
        "mixed_precision": "bf16",
    },
    # with one too
    "lab": {
        "steps": 3000,
        "batch_size": 48,
        "learning_rate": 7e-4,
        "warmup_steps": 200,
        "freeze": "stereo",
        "mixed_precision": "bf16",
    },
    "full": {
        "steps": 160_000,
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
PRESETS = with_depthvla(PRESETS)
PRESETS["depthvla-demo"] |= {"steps": 700}  # a question sees its pictures anew, so that a step takes twice as long
PRESETS = with_pi0(PRESETS)
# what is asked of the frames where the options leave it open: shares of action : depth : box : pose as StereoVLA's
# released code has them, the share of the samples that teach the disparity, and samples about each frame
USUAL = {"mixture": "5:2:2:1", "depth_map_share": 0.25, "questions_per_frame": 1}
USUAL_OF = {  # of StereoVLA's presets that differ; in the demo's minutes, depth needs more
    "demo": USUAL | {"mixture": "5:3:2:1", "depth_map_share": 0.125, "questions_per_frame": 2},
    "lab": USUAL | {"questions_per_frame": 2},
}
USUAL_OF_DEPTHVLA = {"mixture": "1:0:0:0", "depth_map_share": 1.0, "questions_per_frame": 1}  # PI0's too
IN_PAIRS = " and ".join(name for name, usual in USUAL_OF.items() if usual["questions_per_frame"] == 2)
VALIDATION_BATCHES = 2
SHOWN = ("loss/action", "loss/box", "loss/depth", "loss/depth_map")  # by the progress bar


@dataclass(kw_only=True)
class TrainingOptions(RunOptions):
    """Trains a policy on streamed datasets, or an adapter for another robot.

        stereovla train --preset demo --dataset DATASET --output_dir OUTPUT
        accelerate launch train.py --preset full --model StereoVLA --dataset DATASET --output_dir OUTPUT
        stereovla train --preset demo --model MODEL --lora_rank 8 --dataset OTHER_ROBOT --output_dir OUTPUT

    DATASET is a folder or a dataset id on the Hub. The same command goes on from the last checkpoint in OUTPUT, with as
    many processes as before or with others. The result is OUTPUT/model, a folder that loads by
    `AutoModel.from_pretrained(..., trust_remote_code=True)`: the model, or with --lora_rank its adapter.

    Options marked (preset) default to the preset's value.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    preset: str = option("demo", "Size of model and run.", choices=list(PRESETS))
    model: str | None = option(None, "Folder or Hub id of a model to start from; an untrained one if not given.")
    stereo_encoder: str | None = option(
        None, "Folder or Hub id of a stereo encoder to start with, such as that of `stereovla pretrain stereo`."
    )
    depth_expert: str | None = option(
        None, "DepthVLA: folder or Hub id of a depth expert to start with, that of `stereovla pretrain depth`."
    )
    vlm: str | None = option(
        None, "DepthVLA: folder or Hub id of a PaliGemma, PI0 or DepthVLA whose vision-language model it starts with."
    )
    views: str | None = option(None, "DepthVLA: cameras that it sees, separated by commas (not given: left).")
    depth_input: str | None = option(
        None,
        "DepthVLA: what its depth expert sees: the pictures (not given), left and right by a stereo encoder, or the "
        "true depth in their place; none leaves the expert out, which is pi0.",
        choices=[*DEPTH_INPUTS, "stereo", "none"],
    )
    mask: str | None = option(
        None,
        "DepthVLA: whether language model and depth expert see each other (full; not given: block).",
        choices=MASKS,
    )
    depth_loss: str | None = option(
        None, "DepthVLA: whether the depth expert learns depth (not given: on).", choices=["on", "off"]
    )
    config: str = option(
        "{}",
        "Fields of an untrained model's config that are not the preset's, as JSON: "
        '{"stereo_config": null, "flow_draws": 2}; of a part those that are named.',
    )
    max_delay: int | None = option(
        None,
        "Longest delay of real-time chunking, in steps, that training simulates: the first 0 to so many actions of a "
        "chunk are given. The model's config records it. Not given: the config's own.",
    )
    batch_size: int = option(48, "Samples of one step, over all processes (preset).")
    learning_rate: float = option(3e-4, "Peak learning rate (preset).")
    part_rates: str = option("{}", 'Factors on it by part, as JSON: {"lm_head": 0.1}.')
    freeze: str = option("", "Parts that are not trained, separated by commas (preset).")
    flat_share: float = option(0.3, "Share of the steps at the peak, before the cosine to zero.")
    stop_grad_norm: float = option(1e5, "Training stops, with the batch saved, where the norm exceeds this or is NaN.")
    ema_decay: float = option(0.0, "Decay of the weights' running mean, which is then the result; 0 = off.")
    lora_rank: int = option(
        0,
        "Rank of adapters on language model and action expert, which want a learning rate several times as high; "
        "0 trains the weights themselves.",
    )
    mixed_precision: str = option("no", "Arithmetic of the activations (preset).", choices=["no", "bf16", "fp16"])
    gradient_checkpointing: bool = option(False, "Compute activations again instead of keeping them (preset).")
    compile: bool = option(False, "Compile the transformers' blocks.")
    mixture: str | None = option(
        None,
        "Shares of action : depth : box : pose; a fifth number is that of camera. Not given: of "
        f"{USUAL['mixture']} what the data can answer, with demo {USUAL_OF['demo']['mixture']}, with DepthVLA "
        f"{USUAL_OF_DEPTHVLA['mixture']}.",
    )
    mixture_as: str = option(
        "samples",
        "Whether these are shares of the samples, or weights of the losses of equally many samples.",
        choices=["samples", "losses"],
    )
    questions_per_frame: int | None = option(
        None,
        "StereoVLA: samples about each frame, which see and read its pictures together; 2 nearly halve their cost. Not "
        f"given: 2 with {IN_PAIRS} where the mixture asks for more than one thing and a "
        "process takes an even number of samples, else 1.",
    )
    depth_points: str | None = option(
        None,
        "Where depth is asked: near gripper and target (not given: where the data has masks of these), all over, or "
        "nowhere.",
        choices=["interaction", "uniform", "off"],
    )
    detection_failures: float = option(0.0, "Chance that target or gripper are taken to be where they are not.")
    augmentation: float = option(0.0, "Largest relative change of brightness, contrast and saturation of a pair.")
    on_bad_shard: str = option(
        "raise", "A shard that cannot be read ends the training, or is skipped and counted.", choices=["raise", "skip"]
    )
    depth_map_share: float | None = option(
        None,
        "Share of the samples that teach the disparity, or DepthVLA's depth. Not given: 0 where the data has no depth "
        f"or the model no such loss, else {USUAL['depth_map_share']:g}, with demo "
        f"{USUAL_OF['demo']['depth_map_share']:g}, with DepthVLA {USUAL_OF_DEPTHVLA['depth_map_share']:g}.",
    )
    workers: int = option(0, "Processes that prepare batches for each training process; 0 = itself (preset).")
    validation_batches: int | None = option(
        None,
        f"Held-out batches that are scored at a checkpoint. Not given: {VALIDATION_BATCHES}, or 0 where the data has "
        "no held-out split.",
    )
    tracker: str = option(
        "auto",
        "Where losses go beside losses.jsonl: none, wandb, trackio, ...; auto = tensorboard where it is installed.",
    )

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "batch_size", *(["questions_per_frame"] if self.questions_per_frame is not None else []))
        self.part_factors()
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay is {self.ema_decay}; it must be in [0, 1)")
        if self.lora_rank and self.model is None:
            raise ValueError("--lora_rank needs --model: adapters change a trained model")
        if self.lora_rank and self.max_delay is not None:
            raise ValueError("--max_delay is recorded in a model's config, which an adapter does not have")
        names = ("views", "depth_input", "mask", "depth_loss")
        given = [f"--{name}" for name in names if getattr(self, name) is not None]
        if self.preset.startswith("pi0"):
            given = [name for name in given if name != "--views"]
        if given and not self.preset.startswith("depthvla"):
            kind = "transformers' PI0" if self.preset.startswith("pi0") else "a StereoVLA"
            raise ValueError(f"{', '.join(given)} are options of a DepthVLA, but --preset {self.preset} is {kind}")
        if self.model and (given := [*given, *(["--config"] if config_fields(self.config) else [])]):
            raise ValueError(
                f"{', '.join(given)} say how an untrained model is made, but {self.model} has its own config"
            )

    def part_factors(self) -> dict[str, float]:
        """Factors on the learning rate by part; ValueError for what is none."""
        factors = json_object("part_rates", self.part_rates, '{"lm_head": 0.1}')
        for part, factor in factors.items():
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor >= 0:
                raise ValueError(f"--part_rates: the factor of {part} is {factor!r}; it must be a number from 0 on")
        return factors

    @property
    def overrides(self) -> dict[str, Any]:
        """Fields of an untrained model's config that are not the preset's."""
        fields = config_fields(self.config)
        if self.views is not None:
            fields["views"] = self.views.split(",")
        if self.mask is not None:
            fields["mask"] = self.mask
        if self.depth_loss == "off":
            fields["depth_map_loss_weight"] = 0.0
        if self.depth_input == "none":
            fields |= {"depth_config": None, "depth_map_loss_weight": 0.0}
        elif self.depth_input is not None:
            seen = stereo_encoder() if self.depth_input == "stereo" else {"input": self.depth_input}
            fields["depth_config"] = seen | (fields.get("depth_config") or {})
        return fields


# ----------------------------------------------------------------------------------------------------------------------
# Model and processor
# ----------------------------------------------------------------------------------------------------------------------


def build(options: TrainingOptions, meta: dict) -> tuple[Policy | PeftModel, Processor]:
    """The model as it is trained, with frozen parts and adapters, and its processor."""
    torch.manual_seed(options.seed)
    going_on = bool(options.lora_rank) and adapted_model(options.model) is not None
    if going_on:
        whole, processor = trained_adapter(options.model, meta, options.lora_rank)
        model = whole.get_base_model()
    else:
        new = options.model is None
        model, processor = untrained(options.preset, meta, **options.overrides) if new else trained(options.model, meta)
    if isinstance(model, PI0Policy) and (options.lora_rank or options.max_delay is not None):
        raise ValueError(
            "--lora_rank and --max_delay are of StereoVLA and DepthVLA; of transformers' PI0 the weights themselves "
            "are trained, and it begins every chunk anew"
        )
    if options.max_delay is not None:
        model.config.max_delay = options.max_delay
        model.config.validate_policy()
    if options.stereo_encoder is not None:
        give_stereo_encoder(model, options.stereo_encoder)
    elif options.model is None and "stereo" in options.freeze.split(",") and sees_points(model.config):
        raise ValueError(
            "--freeze stereo and an untrained stereo encoder: the points would be of noise; give --stereo_encoder, "
            f"such as that of `stereovla pretrain stereo --preset {options.preset}`"
        )
    if options.depth_expert is not None:
        give_depth_expert(model, options.depth_expert)
    if options.vlm is not None:
        give_vlm(model, options.vlm)
    parts = [*filter(None, options.freeze.split(","))]
    model.freeze(*(towers_of(model) if options.lora_rank and not parts else parts))
    if hasattr(model.config, "frozen_parts"):
        model.config.frozen_parts = list(model.frozen)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # which older versions of transformers know too
    if options.compile:
        for block in blocks(model):
            block.compile()
    if going_on:
        return whole, processor
    if options.lora_rank:
        return get_peft_model(model, lora_config(model, options.lora_rank)), processor
    return model, processor


def sees_points(config) -> bool:
    """Whether the policy sees points of its stereo encoder's disparity."""
    return getattr(config, "points_frame", None) is not None and config.points_of == "encoder"


def parameter_groups(model, options: TrainingOptions) -> list[dict]:
    """Trained parameters by the factor on their learning rate."""
    factors = options.part_factors()
    parts = (model.get_base_model() if isinstance(model, PeftModel) else model).parts
    if unknown := sorted(factors.keys() - parts.keys()):
        raise ValueError(f"--part_rates names {', '.join(unknown)}; parts are {', '.join(parts)}")
    groups: dict[float, list] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name.removeprefix("base_model.model.")
            part = next((part for part, path in parts.items() if name.startswith(f"{path}.")), None)
            groups[factors.get(part, 1.0)].append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


# ----------------------------------------------------------------------------------------------------------------------
# Loop
# ----------------------------------------------------------------------------------------------------------------------


def save_result(
    folder: Path, accelerator, model, average: Average, processor, options, frames: str, window: dict, mixture: str
) -> None:
    """Gathers the weights, or the adapter's, and writes the folder of the result.

    Args:
        frames: how many were streamed, in words.
    """
    partial = folder.with_suffix(".partial")
    with average.in_place():
        state = whole_tensors(model)
        unwrapped = accelerator.unwrap_model(model)
        prediction = predict_one(unwrapped, processor, window)  # by all processes, each of which may hold a part
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            unwrapped.save_pretrained(partial, state_dict=state)
    if accelerator.is_main_process:
        summary = {
            "summary": f"{options.steps:,} steps of {options.batch_size} samples from {frames}, AdamW, "
            f"peak learning rate {options.learning_rate:g}, seed {options.seed}.",
            "mixture": mixture,
            "options": asdict(options),
        }
        base = unwrapped.peft_config["default"].base_model_name_or_path if options.lora_rank else None
        complete(partial, folder, processor, prediction, summary, base)


def train(options: TrainingOptions) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    tracker = {"none": None, "auto": "tensorboard" if is_tensorboard_available() else None}.get(
        options.tracker, options.tracker
    )
    accelerator = join(options.mixed_precision, log_with=tracker, project_dir=options.output_dir)
    if tracker is not None and not accelerator.log_with:
        raise ValueError(f"--tracker {options.tracker} is not installed; pip install it, or use --tracker none")
    with own_folder(options, accelerator) as complete, told_to_end() as told:
        return complete or run(options, accelerator, told)


def run(options: TrainingOptions, accelerator: Accelerator, told: list[int]) -> Path:
    """The training itself; it saves a checkpoint and ends where something comes into `told`."""
    output = Path(options.output_dir)
    result, losses_file = output / "model", output / "losses.jsonl"
    datasets = dataset_mixture(options.dataset)
    meta, data = load_meta(datasets), Contents.of(datasets, options.on_bad_shard == "skip")
    validation_batches = held_out_batches(data, options.validation_batches, VALIDATION_BATCHES)
    model, processor = build(options, meta)
    if accelerator.device.type == "cpu" and options.mixed_precision == "bf16":
        # the backward pass of PyTorch's fused attention takes four times as long there as the products written out
        model.set_attn_implementation("eager")
    config = model.config
    with_pose = config.writes_pose
    usual = USUAL_OF.get(options.preset, USUAL) if with_pose else USUAL_OF_DEPTHVLA
    asked = questions(
        data,
        options.mixture,
        usual["mixture"],
        options.depth_points,
        views=config.pixel_views,
        writes_pose=with_pose,
    )
    in_words = [name for name, share in asked.shares.items() if share and name != "action"]
    if in_words and not config.language_loss_weight:
        raise ValueError(f"the mixture asks for {', '.join(in_words)}, but the model's language_loss_weight is 0")
    weight = config.disparity_loss_weight if with_pose else config.depth_map_loss_weight
    share = usual["depth_map_share"]
    depth = depth_map_share(data, options.depth_map_share, share, weight, with_pose, config.reads_depth)
    learned = "disparity" if with_pose else "depth"
    part_size = options.batch_size // (accelerator.num_processes * options.accumulation)
    sharing = questions_per_frame(
        options.questions_per_frame, usual["questions_per_frame"], asked, part_size, with_pose
    )
    names = config.use_pointers and config.naming_loss_weight > 0
    learns = terms(data, asked, batches_in_words(validation_batches), depth, learned, names)
    accelerator.print(f"{learns}{f', {sharing} samples about each frame' if sharing > 1 else ''}")
    if not depth and getattr(config, "stereo_learns_from", "all") == "disparity":
        accelerator.print("the stereo encoder learns from disparity alone: it stays as it was given or drawn")
    shares, as_losses = asked.shares, options.mixture_as == "losses"
    shared = asked.windows(config) | {"detection_failures": options.detection_failures, "depth_map_share": depth}
    shared["names"] = names
    if as_losses:
        shared["mixture"] = {name: float(share > 0) for name, share in shares.items()}
    stream = WindowStream(
        datasets,
        split="train",
        seed=options.seed,
        pool_episodes=options.pool_episodes,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        on_bad_shard=options.on_bad_shard,
        augmentation=augmentation(options.augmentation),
        questions_per_frame=sharing,
        # of the samples, so of the frames so many times as much
        **shared | {"depth_map_share": min(1.0, sharing * depth)},
    )

    def held_out() -> WindowStream:
        split, bad = (HELD_OUT, "raise") if validation_batches else ("train", options.on_bad_shard)
        return WindowStream(datasets, split=split, seed=0, on_bad_shard=bad, **shared)

    example = next(iter(held_out()))  # now, not hours later: is there anything that is held out?
    optimizer = torch.optim.AdamW(
        parameter_groups(model, options),
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(0.9, 0.95),
        fused=True,  # one pass over the hundreds of small tensors: 5 % of the step of a small model
    )
    model, optimizer = prepare(accelerator, model, optimizer)
    unwrapped, average = accelerator.unwrap_model(model), Average(model, options.ema_decay)
    model.train()

    step = 0
    if found := last_checkpoint(output, accelerator):
        step = load_checkpoint(found, accelerator, model, optimizer, average, stream)
        accelerator.print(f"going on from {found.name}")
    if accelerator.is_main_process:
        forget_after(losses_file, step)
    if accelerator.log_with:
        accelerator.init_trackers("stereovla", {name: str(value) for name, value in asdict(options).items()})
    feed = Feed(Batches(stream, part_size, processor, config), options.workers, step * options.accumulation)

    means, since, waited = LossMeans(), time.perf_counter(), 0.0
    progress = tqdm(
        total=options.steps, initial=step, desc="training", disable=not accelerator.is_main_process, unit="step"
    )
    while step < options.steps:
        begin = time.perf_counter()
        parts = [feed.take() for _ in range(options.accumulation)]
        waited += time.perf_counter() - begin
        inputs = [to_device(part, accelerator) for part, _ in parts]
        counted = [unwrapped.loss_counts(**part) for part in inputs]
        if as_losses:
            counted = [
                count | answer_counts(part["labels"], names)
                for count, part, (_, names) in zip(counted, inputs, parts, strict=True)
            ]
        counts, present, stop = agree(accelerator, counted, bool(told))
        if as_losses:
            for part, (_, names) in zip(inputs, parts, strict=True):
                part["language_weights"] = part["state"].new_tensor(answer_weights(shares, names, counts))
        seed_step(options.seed, step, accelerator.process_index)
        rate = learning_rate(step, options)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        outputs = []
        for number, part in enumerate(inputs):
            with nullcontext() if number == len(inputs) - 1 else accelerator.no_sync(model):
                outputs.append(model(**part, counts=counts))
                accelerator.backward(outputs[-1].loss)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm))
        # the scaler of float16 skips steps whose gradients overflow, and lowers itself
        if not norm <= options.stop_grad_norm and accelerator.scaler is None:
            path = save_bad_batch(output, step, accelerator.process_index, inputs)
            raise FloatingPointError(
                f"the gradient norm is {norm} at step {step} (limit: --stop_grad_norm {options.stop_grad_norm:g}); its "
                f"batch is saved as {path}; the last good weights: {checkpoints(output)[-1:]}"
            )
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        step += 1
        progress.update()
        means.add(outputs, [names for _, names in parts], present)
        if step % options.log_every == 0:
            seconds, since = time.perf_counter() - since, time.perf_counter()
            line = {"step": step, "lr": rate, "grad_norm": norm, "waiting": waited / seconds}
            line |= {"samples_per_s": options.batch_size * options.log_every / seconds} | means.pop()
            waited = 0.0
            if skipped := stream.skipped_shards:
                line["skipped_shards"] = sum(skipped.values())
            if left_out := stream.left_out_windows:
                line["left_out_windows"] = left_out
            if accelerator.log_with:
                accelerator.log(line, step=step)
            if accelerator.is_main_process:
                append_line(losses_file, line)
            progress.set_postfix({k.split("/")[1]: f"{line[k]:.3f}" for k in SHOWN if k in line})
        if step % options.checkpoint_every == 0 or step == options.steps or stop:
            if validation_batches and not stop:
                batches = Batches(held_out(), part_size, processor, config)
                line = {"step": step} | validate(accelerator, model, batches, validation_batches)
                if accelerator.log_with:
                    accelerator.log(line, step=step)
                if accelerator.is_main_process:
                    append_line(losses_file, line)
            keep = options.keep_checkpoints
            folder = save_checkpoint(output, keep, accelerator, model, optimizer, average, step, feed)
            if stop:
                accelerator.print(f"told to end: {folder.name} is saved, the same command goes on from it")
                end(told)
    progress.close()

    frames = frames_in_words(meta["splits"]["train"]["frames"], stream)
    accelerator.print(f"streamed: {frames}")
    save_result(result, accelerator, model, average, processor, options, frames, example, asked.text)
    accelerator.print(f"trained model: {result}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


if __name__ == "__main__":
    sys.exit(execute(TrainingOptions, train, "train.py"))
