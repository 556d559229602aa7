"""Trains StereoVLA on a streamed dataset with Accelerate: options, model, data, checkpoints, loop.

    python train.py --preset demo --dataset DATASET --output_dir OUTPUT

DATASET is a folder or a dataset id on the Hub. The same command goes on from the last checkpoint in OUTPUT. The result
is OUTPUT/model, a
folder that loads by `AutoModel.from_pretrained(..., trust_remote_code=True)`.
"""

import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from dataset_builder.mixture import load_meta
from dataset_builder.questions import processor_arguments
from dataset_builder.streaming import WindowStream
from modeling_stereovla import StereoVLAConfig, StereoVLAForActionPrediction
from processing import StereoImageProcessorPil, StereoProcessor, build_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------

PRESETS = {
    "tiny": {"steps": 20, "batch_size": 8, "warmup_steps": 5, "checkpoint_every": 10, "log_every": 1},
    "demo": {"steps": 700, "batch_size": 48, "learning_rate": 1e-3, "warmup_steps": 100, "disparity_share": 0.125},
    "full": {
        "steps": 160_000,
        "batch_size": 384,
        "learning_rate": 1e-4,
        "warmup_steps": 1000,
        "checkpoint_every": 1000,
    },
}


@dataclass
class TrainingOptions:
    """What `python train.py` can be told. Options marked (preset) default to the preset's value."""

    dataset: str = field(metadata={"help": "Dataset folder, or dataset id on the Hub."})
    output_dir: str = field(metadata={"help": "Where checkpoints, losses and the trained model go."})
    preset: str = field(default="demo", metadata={"help": "Size of model and run.", "choices": list(PRESETS)})
    steps: int = field(default=1000, metadata={"help": "Optimizer steps (preset)."})
    batch_size: int = field(default=48, metadata={"help": "Samples of one step, over all processes (preset)."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate (preset)."})
    warmup_steps: int = field(default=100, metadata={"help": "Steps of linear warm-up (preset)."})
    flat_share: float = field(
        default=0.3, metadata={"help": "Share of the steps at the peak, before the cosine to zero."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    mixture: str = field(default="5:2:2:1", metadata={"help": "Shares of action : depth : box : pose samples."})
    depth_points: str = field(
        default="interaction",
        metadata={
            "help": "Where depth is asked: near gripper and target, or all over.",
            "choices": ["interaction", "uniform"],
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of the weights, the order of the data and the noise."})
    disparity_share: float = field(
        default=0.25, metadata={"help": "Share of the samples that teach the disparity (preset)."}
    )
    pool_episodes: int = field(default=30, metadata={"help": "Episodes of each of 8 lanes that are shuffled together."})
    log_every: int = field(default=10, metadata={"help": "Steps between two lines of losses.jsonl (preset)."})
    checkpoint_every: int = field(default=100, metadata={"help": "Steps between two checkpoints (preset)."})
    keep_checkpoints: int = field(default=2, metadata={"help": "Checkpoints that are kept."})
    validation_batches: int = field(default=2, metadata={"help": "Held-out batches that are scored at a checkpoint."})


def parse_options(arguments: list[str] | None = None) -> TrainingOptions:
    """Options from the command line, over the preset's values, over the defaults."""
    parser = HfArgumentParser(TrainingOptions, description=__doc__)
    (chosen,) = parser.parse_args_into_dataclasses(arguments)
    parser.set_defaults(**PRESETS[chosen.preset])
    (options,) = parser.parse_args_into_dataclasses(arguments)
    for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints", "pool_episodes"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least 1")
    return options


def mixture_weights(text: str) -> dict[str, float]:
    """ "5:2:2:1" -> {"action": 5, "depth": 2, "box": 2, "pose": 1}."""
    names = ("action", "depth", "box", "pose")
    try:
        shares = [float(share) for share in text.split(":")]
    except ValueError:
        shares = []
    if len(shares) != len(names) or min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"--mixture is {text!r}; it needs four shares, action:depth:box:pose, such as 5:2:2:1")
    return dict(zip(names, shares, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Model and processor
# ----------------------------------------------------------------------------------------------------------------------


def build(options: TrainingOptions, meta: dict) -> tuple[StereoVLAForActionPrediction, StereoProcessor]:
    """An untrained model of the preset's size and its processor, with the words and statistics of the dataset."""
    config = StereoVLAConfig.from_preset(options.preset)
    tokenizer = build_tokenizer(meta["tasks"], num_bins=config.num_bins)
    processor = StereoProcessor(
        StereoImageProcessorPil(size={"height": config.image_size, "width": config.image_size}),
        tokenizer,
        norm_stats=meta["stats"],
        control_rates_hz={name: meta["fps"] for name in meta["stats"]},
        chunk_size=config.chunk_size,
        state_history=config.state_history,
        state_dim=config.state_dim,
        action_dim=config.action_dim,
        num_visual_tokens=config.num_visual_tokens,
        num_bins=config.num_bins,
    )
    config = StereoVLAConfig.from_preset(
        options.preset,
        image_token_id=tokenizer.convert_tokens_to_ids(processor.image_token),
        action_vocab_size=len(tokenizer),
        text_config={
            "vocab_size": math.ceil(len(tokenizer) / 64) * 64,  # a multiple of 64 multiplies faster
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    torch.manual_seed(options.seed)
    return StereoVLAForActionPrediction(config), processor


def collate(processor: StereoProcessor, windows: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Model inputs of training windows (`dataset_builder.schema.WINDOW`), and the objective of each."""
    inputs = dict(processor(**processor_arguments(windows)))
    # the loss covers the whole chunk, the held-still steps after its end included
    inputs.pop("action_mask", None)
    return inputs, [window["objective"] for window in windows]


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, accelerator: Accelerator, model, optimizer, step: int, stream: WindowStream) -> None:
    """Weights, optimizer and stream position under `folder`, all of it or nothing."""
    unwrapped = accelerator.unwrap_model(model)
    partial = folder.with_suffix(".partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    (partial / f"stream-{accelerator.process_index}.json").write_text(json.dumps(stream.state_dict()))
    if accelerator.is_main_process:
        save_file({k: v.contiguous() for k, v in unwrapped.state_dict().items()}, partial / "model.safetensors")
        names = [name for name, parameter in unwrapped.named_parameters() if parameter.requires_grad]
        state = optimizer.state_dict()["state"]
        tensors = {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial / "optimizer.safetensors")
        (partial / "trainer.json").write_text(json.dumps({"step": step, "processes": accelerator.num_processes}))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


def load_checkpoint(folder: Path, accelerator: Accelerator, model, optimizer, stream: WindowStream) -> int:
    """Undoes `save_checkpoint`; returns the step."""
    trainer = json.loads((folder / "trainer.json").read_text())
    if trainer["processes"] != accelerator.num_processes:
        raise ValueError(
            f"{folder} was written by {trainer['processes']} processes; resume with as many, "
            f"not {accelerator.num_processes}"
        )
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.load_state_dict(load_file(folder / "model.safetensors"))
    names = [name for name, parameter in unwrapped.named_parameters() if parameter.requires_grad]
    tensors = load_file(folder / "optimizer.safetensors")
    state: dict[int, dict] = defaultdict(dict)
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        state[names.index(name)][entry] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
    stream.load_state_dict(json.loads((folder / f"stream-{accelerator.process_index}.json").read_text()))
    return trainer["step"]


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints of `output`, oldest first."""
    return sorted(path for path in output.glob("checkpoint-*") if path.suffix != ".partial")


# ----------------------------------------------------------------------------------------------------------------------
# Loop
# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(step: int, options: TrainingOptions) -> float:
    """Linear warm-up, flat, cosine to zero; `step` counts from 0."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    start = options.warmup_steps + options.flat_share * (options.steps - options.warmup_steps)
    if step < start:
        return options.learning_rate
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, options.steps - start)))


class LossMeans:
    """Means of each loss since the last `pop`; language losses are kept apart by objective."""

    def __init__(self):
        self.sums: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, output, objectives: list[str]) -> None:
        for name in ("action", "disparity", "pointing", "keyframe"):
            if (value := output.get(f"{name}_loss")) is not None:
                self._add(f"loss/{name}", value.item())
        self._add("loss/total", output.loss.item())
        losses, accuracies = output.sample_language_loss.tolist(), output.sample_token_accuracy.tolist()
        for objective, loss, accuracy in zip(objectives, losses, accuracies, strict=True):
            # action samples are taught the keyframe pose as well (the released rule)
            objective = "pose" if objective == "action" else objective
            self._add(f"loss/{objective}", loss)
            self._add(f"accuracy/{objective}", accuracy)

    def _add(self, name: str, value: float) -> None:
        if not math.isnan(value):
            self.sums[name] += value
            self.counts[name] += 1

    def pop(self) -> dict[str, float]:
        means = {name: self.sums[name] / self.counts[name] for name in sorted(self.sums)}
        self.sums.clear()
        self.counts.clear()
        return means


def batches(stream: WindowStream, size: int, processor: StereoProcessor) -> Iterator[tuple[dict, list[str]]]:
    windows = []
    for window in stream:
        windows.append(window)
        if len(windows) == size:
            yield collate(processor, windows)
            windows = []


def validate(model, processor: StereoProcessor, stream: WindowStream, options: TrainingOptions) -> dict[str, float]:
    """Mean losses on the first batches of the held-out episodes, with fixed noise."""
    means = LossMeans()
    model.eval()
    with torch.no_grad():
        for number, (inputs, objectives) in zip(
            range(options.validation_batches), batches(stream, options.batch_size, processor), strict=False
        ):
            generator = torch.Generator().manual_seed(number)
            means.add(model(**inputs, generator=generator), objectives)
    model.train()
    return {f"validation/{name}": value for name, value in means.pop().items()}


def append_line(path: Path, record: dict) -> None:
    with path.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Removes the lines of `path` that a resumed run will write again."""
    if path.exists():
        kept = []
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                break  # cut off by a kill
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        os.replace(partial, path)


def save_result(
    folder: Path, model, processor: StereoProcessor, options: TrainingOptions, meta: dict, window: dict
) -> None:
    """The folder that the Hub accepts: weights, config, processor, their code, how it was trained, and one recorded
    prediction.
    """
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.eval()
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    # whoever loads the folder can compare: a load that succeeds is not yet a load of these weights
    inputs = processor(
        images=[window["left"], window["right"]],
        text=window["task"],
        state=window["state_history"],
        embodiment=window["embodiment"],
    )
    noise = torch.randn(1, model.config.chunk_size, model.config.action_dim, generator=torch.Generator().manual_seed(0))
    actions = processor.decode_actions(model.predict_action(**inputs, noise=noise), embodiment=window["embodiment"])
    tensors = {
        "left": torch.from_numpy(window["left"]),
        "right": torch.from_numpy(window["right"]),
        "state": torch.from_numpy(window["state_history"]),
        "noise": noise,
        "actions": torch.from_numpy(actions),
    }
    prompt = {"instruction": window["task"], "embodiment": window["embodiment"]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, partial / "reference_prediction.safetensors", metadata={"prompt": json.dumps(prompt)})
    frames = meta["splits"]["train"]["frames"]
    summary = {
        "summary": f"{options.steps:,} steps of {options.batch_size} samples from {frames:,} frames, AdamW, "
        f"peak learning rate {options.learning_rate:g}, seed {options.seed}.",
        "mixture": options.mixture,
        "example_instruction": window["task"],
        "options": asdict(options),
    }
    (partial / "training.json").write_text(json.dumps(summary, indent=2))
    os.replace(partial, folder)


def train(options: TrainingOptions) -> Path:
    """Trains, or goes on training, and returns the folder of the model."""
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    output = Path(options.output_dir)
    result = output / "model"
    record = asdict(options)
    if (result / "config.json").exists():
        accelerator.print(f"{result} is complete; delete {output} to train again")
        return result
    saved = output / "options.json"
    if saved.exists() and json.loads(saved.read_text()) != record:
        changed = sorted(k for k, v in json.loads(saved.read_text()).items() if record.get(k) != v)
        raise ValueError(
            f"{output} holds a run with other options ({', '.join(changed)}); choose another --output_dir or delete it"
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps(record, indent=2))

    if options.batch_size % accelerator.num_processes:
        raise ValueError(
            f"--batch_size {options.batch_size} does not divide among {accelerator.num_processes} processes"
        )
    meta = load_meta(options.dataset)
    model, processor = build(options, meta)
    config = model.config
    shared = {
        "mixture": mixture_weights(options.mixture),
        "depth_points": options.depth_points,
        "chunk_size": config.chunk_size,
        "history": config.state_history,
        "depth_map_share": options.disparity_share if config.disparity_loss_weight else 0.0,
    }
    stream = WindowStream(
        options.dataset,
        split="train",
        seed=options.seed,
        pool_episodes=options.pool_episodes,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        **shared,
    )
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.parameters() if parameter.requires_grad),
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        betas=(0.9, 0.95),
        fused=True,  # one pass over the hundreds of small tensors: 5 % of the step of a small model
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()

    step = 0
    losses_file = output / "losses.jsonl"
    if found := checkpoints(output):
        step = load_checkpoint(found[-1], accelerator, model, optimizer, stream)
        accelerator.print(f"going on from {found[-1].name}")
    if accelerator.is_main_process:
        forget_after(losses_file, step)

    means, since = LossMeans(), time.perf_counter()
    progress = tqdm(
        total=options.steps, initial=step, desc="training", disable=not accelerator.is_main_process, unit="step"
    )
    for inputs, objectives in batches(stream, options.batch_size // accelerator.num_processes, processor):
        if step == options.steps:
            break
        # all randomness of a step follows from (seed, step, rank): nothing to save for an exact resume
        number = (options.seed * 1_000_003 + step) * 1009 + accelerator.process_index
        generator = torch.Generator(device=accelerator.device).manual_seed(number)
        torch.manual_seed(number)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        outputs = model(**{k: v.to(accelerator.device) for k, v in inputs.items()}, generator=generator)
        accelerator.backward(outputs.loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm is {float(norm)} at step {step}; the last good weights: {checkpoints(output)[-1:]}"
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        progress.update()
        means.add(outputs, objectives)
        if step % options.log_every == 0 and accelerator.is_main_process:
            seconds, since = time.perf_counter() - since, time.perf_counter()
            line = {"step": step, "lr": learning_rate(step - 1, options), "grad_norm": float(norm)}
            line |= {"samples_per_s": options.batch_size * options.log_every / seconds} | means.pop()
            append_line(losses_file, line)
            progress.set_postfix(
                {k.split("/")[1]: f"{line[k]:.3f}" for k in ("loss/action", "loss/box", "loss/depth") if k in line}
            )
        if step % options.checkpoint_every == 0 or step == options.steps:
            if accelerator.is_main_process and options.validation_batches:
                held_out = WindowStream(options.dataset, split="validation", seed=0, **shared)
                append_line(
                    losses_file,
                    {"step": step} | validate(accelerator.unwrap_model(model), processor, held_out, options),
                )
            save_checkpoint(output / f"checkpoint-{step:07d}", accelerator, model, optimizer, step, stream)
            if accelerator.is_main_process:
                for old in checkpoints(output)[: -options.keep_checkpoints]:
                    shutil.rmtree(old)
    progress.close()

    if accelerator.is_main_process:
        held_out = WindowStream(options.dataset, split="validation", seed=0, **shared)
        save_result(result, accelerator.unwrap_model(model), processor, options, meta, next(iter(held_out)))
        print(f"trained model: {result}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return result


if __name__ == "__main__":
    train(parse_options())
